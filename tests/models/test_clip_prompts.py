"""What diffusion models take from text encoders: layers and clip skip, emphasis, textual inversion."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch_reference import randomised, translated

from sdjax.checkpoints.networks import clip as conversion
from sdjax.core.errors import UserError
from sdjax.data.text.textual_inversion import fit, read_embedding
from sdjax.data.text.tokenizer_training import train_tokenizer
from sdjax.data.text.tokenizers import load_tokenizer, with_placeholders
from sdjax.models.clip import TEXT_LAYERS, CLIPText, CLIPTextConfig, emphasise, extend_vocabulary, layer_states

PROMPTS = ["red heart, a cat", "dog"]
SIZES = {"intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
KINDS = {"CLIPTextModel": (48, "quick_gelu"), "CLIPTextModelWithProjection": (64, "gelu")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["red heart cat dog"] * 4, folder, 560)
    return folder


def encoders(folder, kind, eos=None):
    """A random text encoder of transformers' and the same as ours: (torch model, config, parameters)."""
    tokenizer = load_tokenizer(folder)
    width, activation = KINDS[kind]
    config = transformers.CLIPTextConfig(
        **SIZES,
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        hidden_act=activation,
        projection_dim=24,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos if eos is None else eos,
        pad_token_id=tokenizer.pad,
    )
    model = randomised(getattr(transformers, kind)(config))
    ours = conversion.from_diffusers_config(config.to_dict() | {"architectures": [kind]})
    return model, ours, translated(model, conversion.TABLE, conversion.shapes(ours))


def stable_diffusion(folder, model):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    rest = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    # diffusers 0.42 looks for the final norm where transformers 5 no longer has it.
    object.__setattr__(model, "text_model", SimpleNamespace(final_layer_norm=model.final_layer_norm))
    return StableDiffusionPipeline(text_encoder=model, tokenizer=tokenizer, requires_safety_checker=False, **rest)


def run(config, params, ids):
    return jax.jit(CLIPText(config).apply)({"params": params}, ids)


def normalise(config, params):
    return lambda hidden: CLIPText(config).apply({"params": params}, hidden, method="normalise")


def theirs(prompt_embeds):
    return prompt_embeds.detach().numpy()


def test_clip_skip_of_sd_matches_diffusers(folder):
    model, config, params = encoders(folder, "CLIPTextModel")
    pipe, out = stable_diffusion(folder, model), run(config, params, load_tokenizer(folder).encode(PROMPTS))
    found = []
    for skip in (None, 0, 1, 2, 4):
        expected = pipe.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=skip)[0]
        found.append(layer_states(out, TEXT_LAYERS["last"], normalise(config, params), skip or 0))
        np.testing.assert_allclose(found[-1], theirs(expected), atol=1e-4, rtol=0)
    assert np.abs(found[1] - found[2]).max() > 0.1


def test_clip_skip_of_sdxl_matches_diffusers(folder):
    small, large = encoders(folder, "CLIPTextModel"), encoders(folder, "CLIPTextModelWithProjection")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    pipe = StableDiffusionXLPipeline(None, small[0], large[0], tokenizer, tokenizer, None, None)
    ids = load_tokenizer(folder).encode(PROMPTS)
    outputs = [run(config, params, ids) for _, config, params in (small, large)]
    for skip in (None, 0, 1, 3):
        expected, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=skip
        )
        layer = TEXT_LAYERS["penultimate_raw"]
        states = [layer_states(out, layer, normalise(*small[1:]), skip or 0) for out in outputs]
        np.testing.assert_allclose(np.concatenate(states, axis=-1), theirs(expected), atol=1e-4, rtol=0)
        np.testing.assert_allclose(outputs[1].pooled, theirs(pooled), atol=1e-4, rtol=0)


def test_penultimate_layer(folder):
    """Stable Diffusion 2 is published with ViT-H's last layer (original naming) and without it (diffusers)."""
    _, config, params = encoders(folder, "CLIPTextModel")
    ids = load_tokenizer(folder).encode(PROMPTS)
    fewer = CLIPTextConfig(**{**vars(config), "layers": config.layers - 1})
    less = {name: value for name, value in params.items() if name != f"layers_{config.layers - 1}"}
    for skip in (0, 1):
        whole, cut = (
            layer_states(run(c, p, ids), TEXT_LAYERS[layer], normalise(c, p), skip)
            for c, p, layer in ((config, params, "penultimate"), (fewer, less, "last"))
        )
        np.testing.assert_allclose(whole, cut, atol=1e-6)


@pytest.mark.parametrize(("layer", "skip", "most"), [("last", 5, 4), ("penultimate_raw", 4, 3), ("last", -1, 4)])
def test_too_much_clip_skip_is_named(folder, layer, skip, most):
    _, config, params = encoders(folder, "CLIPTextModel")
    out = run(config, params, load_tokenizer(folder).encode(PROMPTS))
    with pytest.raises(UserError, match=f"clip_skip {skip} .* choose 0 to {most}"):
        layer_states(out, TEXT_LAYERS[layer], normalise(config, params), skip)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_of_one_change_no_bit(dtype):
    states = jax.random.normal(jax.random.key(0), (3, 77, 48), dtype) + 0.1
    weights = jnp.ones((3, 77)).at[1, 4].set(1.5)
    out = jax.jit(emphasise)(states, weights)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[::2], states[::2])
    assert not (out[1] == states[1]).all()


def test_emphasis_is_a1111s_for_each_chunk_by_itself():
    draw = np.random.default_rng(0)
    states = draw.normal(0.2, 1.0, (2, 3, 77, 16)).astype(np.float32)
    weights = draw.choice([1.0, 1.1, 0.5, -0.3], (2, 3, 77)).astype(np.float32)
    out = np.asarray(jax.jit(emphasise)(states, weights))
    for i in np.ndindex(2, 3):
        z = torch.from_numpy(states[i]).double()  # sd_emphasis.py: multiply, then restore the mean
        weighted = z * torch.from_numpy(weights[i]).double()[:, None]
        np.testing.assert_allclose(out[i], (weighted * (z.mean() / weighted.mean())).numpy(), rtol=1e-4, atol=1e-5)


def test_emphasis_of_nothing_stays_finite():
    states = jax.random.normal(jax.random.key(0), (1, 77, 8))
    np.testing.assert_array_equal(emphasise(states, jnp.zeros((1, 77))), jnp.zeros_like(states))


def test_textual_inversion_gives_diffusers_states_to_1e_5(folder):
    model, config, params = encoders(folder, "CLIPTextModel")
    pipe, rows = stable_diffusion(folder, model), torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    files = {
        "first": {"<cat-toy>": rows[0]},
        "easy": {"string_to_param": {"*": rows[1:4]}, "name": "easy", "string_to_token": {"*": 265}},
    }
    for content in files.values():
        pipe.load_textual_inversion(content)
    prompts = ["a <cat-toy>, red", "easy dog", "easy, <cat-toy> heart easy."]
    expected = pipe.encode_prompt(prompts, "cpu", 1, False)[0]

    fitted = fit([read_embedding(content, stem) for stem, content in files.items()], [config.width])
    tokenizer = with_placeholders(load_tokenizer(folder), fitted.counts, config.vocab_size)
    longer, more = extend_vocabulary(config, params, fitted.rows[0], tokenizer.eos)
    ids = tokenizer.encode(prompts)
    expanded = pipe.maybe_convert_prompt(prompts, pipe.tokenizer)
    np.testing.assert_array_equal(ids, pipe.tokenizer(expanded, padding="max_length", return_tensors="np").input_ids)
    np.testing.assert_allclose(run(longer, more, ids).last, theirs(expected), atol=1e-5, rtol=0)


def test_pooled_state_is_at_end_of_text(folder):
    _, config, params = encoders(folder, "CLIPTextModelWithProjection", eos=2)  # as SDXL's configurations say
    assert config.eos_token_id == 2
    tokenizer = with_placeholders(load_tokenizer(folder), {"toy": 2}, config.vocab_size)
    longer, more = extend_vocabulary(config, params, np.ones((2, config.width), np.float32), tokenizer.eos)
    ids = tokenizer.encode(["red toy dog", "cat"])
    out = run(longer, more, ids)
    at_end = out.last[np.arange(2), [5, 2]]
    np.testing.assert_allclose(out.pooled, at_end @ params["text_projection"]["kernel"], atol=1e-5)
    before = run(config, params, ids[1:])
    np.testing.assert_allclose(out.pooled[1:], before.pooled, atol=1e-5)


def test_vectors_of_another_width_are_named(folder):
    _, config, params = encoders(folder, "CLIPTextModel")
    with pytest.raises(UserError, match="embeddings of 7 numbers do not fit a text encoder of width 48"):
        extend_vocabulary(config, params, np.ones((2, 7), np.float32), 2)
