"""Textual inversion beside diffusers' training script: the same vectors after the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from configs import textual_inversion
from sdjax.checkpoints.embeddings import read_embeddings
from sdjax.core.errors import UserError
from sdjax.core.prng import stream
from sdjax.core.tree import flatten, merge
from sdjax.data.text.prompt_templates import TEMPLATES, prompts_of
from sdjax.parallel.batches import put_batch
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.make import make_task
from sdjax.training.optim import make_optimizer
from sdjax.training.step import init_state, make_step
from sdjax.training.task import split_frozen

WORD, STEPS = "<toy>", 2


def config_of(base: Path, images: Path, **task: Any):
    config = textual_inversion.get_config(str(base))
    config.data.source = f"pictures:{images}"
    config.task.update(word=WORD, initializer="cat", vectors=2, **task)
    return config


class Script:
    """The state of diffusers' examples/textual_inversion scripts: its networks, and AdamW of whole tables."""

    def __init__(self, folder: Path, config: Any):
        self.xl = (folder / "text_encoder_2").exists()
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
        self.tokenizers, self.encoders = [], []
        for number in ("", "_2") if self.xl else ("",):
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")
            kind = transformers.CLIPTextModelWithProjection if number else transformers.CLIPTextModel
            encoder = kind.from_pretrained(folder / f"text_encoder{number}").requires_grad_(False)
            self.first = len(tokenizer)
            assert tokenizer.add_tokens([WORD, f"{WORD}_1"]) == 2
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            table.data[self.first :] = table.data[tokenizer.convert_tokens_to_ids("cat</w>")]
            table.requires_grad_(True)
            self.tokenizers.append(tokenizer)
            self.encoders.append(encoder)
        self.before = [table.detach().clone() for table in self.tables]
        rate, decay = config.optim.learning_rate, config.optim.weight_decay
        self.optimizer = torch.optim.AdamW(self.tables, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        self.noise = diffusers.DDPMScheduler.from_config(diffusers.DDIMScheduler.load_config(folder / "scheduler"))
        self.scale = diffusers.AutoencoderKL.load_config(folder / "vae")["scaling_factor"]

    @property
    def tables(self) -> list[torch.nn.Parameter]:
        return [encoder.get_input_embeddings().weight for encoder in self.encoders]

    def loss(self, batch: dict, key: jax.Array) -> torch.Tensor:
        """From the draws of a key of this library."""
        latent_key, rest, _ = jax.random.split(key, 3)
        noise_key, time_key = jax.random.split(rest)
        mean, logvar = np.split(np.float32(batch["moments"]), 2, -1)
        x0 = (mean + np.exp(0.5 * logvar) * np.asarray(jax.random.normal(latent_key, mean.shape))) * self.scale
        noise = np.asarray(jax.random.normal(noise_key, x0.shape))
        t = torch.tensor(np.array(jax.random.randint(time_key, (len(x0),), 0, 1000)))
        x0, noise = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x0, noise))
        ids = torch.tensor(batch["tokens"]).long()
        outputs = [e(ids[:, i], output_hidden_states=True) for i, e in enumerate(self.encoders)]
        context, added = outputs[0].last_hidden_state, None
        if self.xl:
            context = torch.cat([output.hidden_states[-2] for output in outputs], -1)
            added = {"text_embeds": outputs[1].text_embeds, "time_ids": torch.tensor(batch["sizes"])}
        output = self.unet(self.noise.add_noise(x0, noise, t), t, context, added_cond_kwargs=added).sample
        return torch.nn.functional.mse_loss(output, noise)

    def step(self, batch: dict, key: jax.Array) -> float:
        """One step, after which all rows but the placeholder's are put back."""
        loss = self.loss(batch, key)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for table, before in zip(self.tables, self.before, strict=True):
            table.data[: self.first] = before[: self.first]
        return loss.item()


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_steps_are_those_of_diffusers_script(family, bases, few, tmp_path):
    """Losses to 1e-5 of them, vectors to 1e-4; nothing but them is trained, and the files hold them."""
    config = config_of(bases(family), few)
    theirs, mesh = Script(bases(family), config), make_mesh(config.mesh)
    task, optimizer = make_task(config, mesh), make_optimizer(config.optim, STEPS)
    frozen, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
    state = init_state(task, optimizer, config.train.seed, mesh, initial)
    step, batches = (
        make_step(task, optimizer, config.train.seed, decay=config.optim.ema_decay),
        task.batch(merge(frozen, state.params)),
    )
    encoders = ["text_encoder", "text_encoder_2"][: len(theirs.encoders)]
    assert set(flatten(state.params)) == {f"{name}/token_embedding/words" for name in encoders}
    prompts = [prompt.replace(WORD, f"{WORD} {WORD}_1") for prompt in prompts_of("object", WORD)]
    known = theirs.tokenizers[0](prompts, padding="max_length", truncation=True, return_tensors="np").input_ids
    for number in range(STEPS):
        batch = next(batches)
        assert all((row == known).all(-1).any() for row in batch["tokens"][:, 0])
        expected = theirs.step(batch, stream(config.train.seed, "train", number))
        state, metrics = step(state, frozen, put_batch(batch, mesh))
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    task.export(merge(frozen, state.ema), tmp_path / "export")
    for found in (tmp_path / "export", tmp_path / "export/webui/toy.safetensors"):
        (word,) = read_embeddings(found)
        assert word.word == (WORD if found.is_dir() else "toy")
        for vectors, table, before in zip(word.vectors, theirs.tables, theirs.before, strict=True):
            np.testing.assert_allclose(vectors, table.detach()[theirs.first :], atol=1e-4)
            assert np.abs(vectors - before[theirs.first :].numpy()).max() > 1e-3


def test_templates_are_the_published_ones():
    assert {name: len(prompts) for name, prompts in TEMPLATES.items()} == {"object": 27, "style": 19}
    assert all(prompt.count("{}") == 1 for prompts in TEMPLATES.values() for prompt in prompts)
    assert prompts_of("a drawing of {}", WORD) == ("a drawing of <toy>",)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"word": "heart"}, "config.task.word: the tokenizer knows 'heart' already; choose another word"),
        ({"word": "<a>+<a>"}, "config.task.initializer='cat': config.task.word='<a>+<a>' needs 2 of them"),
        (
            {"word": "<a>+<b>+<A>", "initializer": "cat+dog+cat"},
            "config.task.word='<a>+<b>+<A>' has '<A>' twice; choose",
        ),
        (
            {"word": "<a>+<a>_2", "initializer": "cat+dog"},
            "word '<a>_2' is the name of a file of '<a>'; choose another",
        ),
        (
            {"word": "<a>+<<a>", "initializer": "cat+dog"},
            "words '<a>' and '<<a>' have the same file 'a'; choose another word",
        ),
        ({"word": "<a>+b/c", "initializer": "cat+dog"}, "word 'b/c' cannot be the name of a file, with a '/' in it; "),
        ({"initializer": "red cat"}, "config.task.initializer: 'red cat' is 2 tokens of the text_encoder; choose "),
        ({"export": "words"}, "unknown export 'words' in config.task.export; choose one of: "),
    ],
)
def test_bad_words_are_one_line(task, message, bases, few):
    config = config_of(bases("sd1"), few)
    config.task.update(task)
    mesh = make_mesh(config.mesh)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        make_task(config, mesh).pretrained(sharded_put(mesh))
    assert message in str(error.value)
