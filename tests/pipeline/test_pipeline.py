"""What a call promises besides parity: no second compilation, no dependence on batches, plain errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import zoo
from PIL import Image

import sdjax
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint
from sdjax.core.errors import UserError
from sdjax.core.prng import seed_words, stream
from sdjax.data import image_inputs
from sdjax.data.images import to_uint8
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion_model import sampling
from sdjax.pipeline import execute
from sdjax.pipeline.pipeline import Pipeline

SIZE, LATENT = zoo.SIDE, zoo.SIDE // 2
FAST = {"steps": 3, "guidance_scale": 3.0}


def test_nothing_that_changes_between_calls_compiles(folder, compilations):
    """Prompts, seeds, guidance, samplers, schedules, strengths and given images are arguments of the programs."""
    pipe = sdjax.load(folder)
    picture, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.eye(SIZE, dtype=bool)
    calls = [pipe(["a", "b"], batch_size=2, **FAST)]
    pipe(["a", "b"], batch_size=2, init_image=picture, **FAST)
    compilations.clear()
    again = {"batch_size": 2}
    pipe("red heart", **again, **FAST)
    calls.append(pipe(["x", "y", "z"], **again, **FAST)[:2])
    calls.append(pipe(["a", "b"], "ugly", **again, **FAST))
    calls.append(pipe(["a", "b"], seed=7, **again, **FAST))
    calls.append(pipe(["a", "b"], steps=9, guidance_scale=9.0, guidance_rescale=0.5, eta=1.0, **again))
    for i, sampler in enumerate(SAMPLERS):
        calls.append(pipe(["a", "b"], sampler=sampler, steps=4 + i % 4, guidance_scale=3.0 + i / 10, **again))
    calls.append(pipe(["a", "b"], sampler="euler", schedule="karras", **again, **FAST))
    calls.append(pipe(["a", "b"], sampler="ddim", schedule="trailing", **again, **FAST))
    calls.append(pipe(["a", "b"], init_image=picture, strength=0.4, **again, **FAST))
    calls.append(pipe(["a", "b"], init_image=picture, mask=mask, **again, **FAST))
    calls.append(pipe(["a", "b"], latents=np.ones((2, LATENT, LATENT, 4), np.float32), **again, **FAST))
    assert not compilations
    different = {images.tobytes() for images in calls}
    assert len(different) == len(calls), "an argument that changes nothing would not need compiling either"


def test_rows_of_a_call_change_no_bit(folder, compilations):
    """One row of the tables a call of the loop, three, or all: one program, the same images."""
    pipe = sdjax.load(folder)
    rows = pipe.prepare(["red heart", "flag"], sampler="euler_a", steps=7, guidance_scale=3.0)
    images = [dict(pipe.run(rows, 2, rows_per_call=1))]
    compilations.clear()
    images += [dict(pipe.run(rows, 2, rows_per_call=many)) for many in (3, 100)]
    assert not compilations
    for other in images[1:]:
        for place in (0, 1):
            np.testing.assert_array_equal(other[place], images[0][place])


def test_requests_share_a_batch(ours, compilations):
    """Another sampler, as many network calls, another seed and scale: to the bit what each request gives by itself.

    In the same place of the batch: in another one a CPU adds some sums in another order.
    """
    requests = [
        {"sampler": "euler", "steps": 7, "seed": 1, "guidance_scale": 2.0},
        {"sampler": "heun", "steps": 4, "seed": 2, "guidance_scale": 6.0, "guidance_rescale": 0.3},
    ]
    rows = [row for request in requests for row in ours.prepare("red heart", **request)]
    alone = [dict(ours.run([row, row], 2))[place] for place, row in enumerate(rows)]
    compilations.clear()
    assert list(execute.split(ours, rows, 2)) == [([0, 1], 2)]
    together = dict(ours.run(rows, 2))
    assert not compilations
    for place, request in enumerate(requests):
        np.testing.assert_array_equal(together[place], alone[place])
        np.testing.assert_allclose(together[place], ours("red heart", batch_size=2, **request)[0], atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.05


def test_interrupts_leave_between_network_calls(ours):
    """At most one more call runs, which was on its way; what comes after is as if nothing had been."""
    expected = ours("red heart", steps=7, batch_size=2)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours("red heart", steps=7, batch_size=2, progress=progress)
    assert seen == [1, 2]
    np.testing.assert_array_equal(ours("red heart", steps=7, batch_size=2), expected)


def test_images_depend_on_their_index_and_not_on_their_batch(ours):
    """But for the order of some sums."""
    prompts = ["red heart", "blue cat", "flag"]
    how = {"sampler": "euler_a", "seed": 5, "batch_size": 2, **FAST}
    together = ours(prompts, num_images=2, **how)
    np.testing.assert_allclose(ours("blue cat", first_index=3, **how)[0], together[3], atol=1e-5)
    one_by_one = ours(prompts[:1], num_images=2, **{**how, "batch_size": 1})
    np.testing.assert_allclose(one_by_one, together[:2], atol=1e-5)
    assert np.abs(together[2] - together[3]).max() > 0.05, "two images of one prompt have noise of their own"
    other = ours("blue cat", first_index=3, **{**how, "seed": 2**32 - 1})
    assert np.abs(other[0] - together[3]).max() > 0.05


def test_seeds_have_64_bits(ours):
    """Every bit counts; below 2^32 a seed's keys are those of JAX's own 32-bit seeds."""
    seeds = [5, 5 + 2**32, 5 + 2**63, 2**32 - 1, 2**64 - 1]
    indices = np.full(len(seeds), 3, np.int32)
    words = seed_words([row.seed for seed in seeds for row in ours.prepare("red heart", seed=seed)])
    keys = jax.random.key_data(sampling.draw_noise(words, indices, (2, 2, 4), np.int32(0))[0])
    assert len(set(map(tuple, keys.tolist()))) == len(seeds)
    np.testing.assert_array_equal(keys[0], jax.random.key_data(stream(5, "image", 3)))


@pytest.mark.parametrize("seed", [-1, None])
def test_a_seed_may_be_drawn(seed, ours, caplog):
    with caplog.at_level("INFO", "sdjax"):
        calls = [ours.prepare(["red heart", "flag"], seed=seed) for _ in range(2)]
    drawn = [[row.seed for row in rows] for rows in calls]
    assert [first for first, _ in drawn] == [second for _, second in drawn]
    assert drawn[0] != drawn[1]
    for rows, (one, _) in zip(calls, drawn, strict=True):
        assert 0 <= one < 2**32
        assert all(row.settings["seed"] == one for row in rows)
        assert f"seed {one}, drawn at random" in caplog.text
    assert ours.prepare("red heart")[0].seed == 0


def test_masked_sampling_keeps_known_latents(ours):
    picture = np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, SIZE // 2 :] = True
    given = {"init_image": picture, "output": "latent", "batch_size": 2, **FAST}
    known = ours("", mask=np.zeros_like(mask), **given)
    made = ours("red heart", mask=mask, **given)
    half = LATENT // 2
    np.testing.assert_allclose(made[:, :, :half], known[:, :, :half], atol=1e-5)
    assert np.abs(made[:, :, half:] - known[:, :, half:]).min(axis=-1).mean() > 0.01
    everything = ours("red heart", mask=np.ones_like(mask), strength=0.5, **given)
    np.testing.assert_array_equal(everything, ours("red heart", strength=0.5, **given))


@pytest.mark.parametrize(("content", "factor"), [("noise", 1.0), ("nothing", 0.0), ("image", None)])
def test_latents_under_the_mask_are_exchanged(content: str, factor: float | None, ours, monkeypatch):
    """A1111's masked content: init_latent * mask + noise * nmask, or the former alone, to which noise is added."""
    begun = []

    def start_state(tables, noise, known, fresh):
        begun.append((np.asarray(noise), np.asarray(known)))
        return original(tables, noise, known, fresh)

    original = sampling.start_state
    monkeypatch.setattr(sampling, "start_state", start_state)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, SIZE // 2 :] = True
    given = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    how = {"init_image": given, "mask": mask, "strength": 0.5, "seed": 3, "batch_size": 2, **FAST}
    usual = ours("red heart", **how)
    made = ours("red heart", masked_content=content, **how)
    (noise, known), (same, exchanged) = begun
    np.testing.assert_array_equal(noise, same)
    half = LATENT // 2
    np.testing.assert_array_equal(exchanged[:, :, :half], known[:, :, :half])
    wanted = known if factor is None else factor * noise
    np.testing.assert_array_equal(exchanged[:, :, half:], wanted[:, :, half:])
    assert (np.abs(made - usual).max() > 0.05) == (factor is not None)


@pytest.mark.parametrize("feather", [0.0, 2.0])
def test_inpainting_keeps_unmasked_pixels(feather, ours):
    """Bit for bit as bytes; within the mask the given image fades out over `feather` pixels."""
    given = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[3:13, 2:12] = True
    how = {"init_image": given, "mask": mask, "batch_size": 2, **FAST}
    (image,) = ours("red heart", feather=feather, **how)
    (bare,) = ours("red heart", paste=False, **how)
    np.testing.assert_array_equal(to_uint8(image)[~mask], given[~mask])
    assert np.abs(bare - given / 255.0)[~mask].max() > 0.01, "the autoencoder alone keeps nothing exactly"
    deep = np.zeros_like(mask)
    deep[5:11, 4:10] = True
    np.testing.assert_array_equal(image[deep], bare[deep])
    edge = mask & ~deep
    assert (np.abs(image - bare)[edge].max() > 0.01) == (feather > 0)


def test_large_images_go_through_the_autoencoder_in_tiles(ours):
    """Its result is that of the tiles, which tests/diffusion_model/test_tiles.py holds to the one without."""
    how = {"output": "latent", "batch_size": 2, **FAST}
    latents = ours("red heart", **how)
    for name, option in {"one": {}, "tiles": {"tile": SIZE // 2}, "none": {"tile": 0}}.items():
        image = ours("red heart", **{**how, "output": "image"}, **option)
        padded = np.repeat(latents, 2, 0) * np.float32(ours.model.scale)
        expected = execute.decode(ours, jax.numpy.asarray(padded), option.get("tile", 0))[:1]
        np.testing.assert_allclose(image, expected, atol=1e-6, err_msg=name)
        assert (np.abs(image - execute.decode(ours, padded, 0)[:1]).max() > 1e-3) == (name == "tiles")
    images = np.random.default_rng(2).random((2, SIZE, SIZE, 3)).astype(np.float32)
    whole, tiled = (np.asarray(execute.encode(ours, images, tile, "given image")) for tile in (0, SIZE // 2))
    assert 1e-3 < np.abs(whole - tiled).mean() < 0.8 * whole.std()


def test_rejects_unused_inputs(ours):
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    for given, message in [
        ({"depth": picture}, "depth changes nothing: sd1 is conditioned on prompt; leave it out"),
        ({"mask": picture}, "mask changes nothing without an init_image whose unmasked part is kept"),
        ({"init_image": picture, "mask": picture[:8]}, f"the mask is {SIZE}x8 pixels and its init_image {SIZE}x{SIZE}"),
        ({"init_image": picture, "masked_content": "noise"}, "masked_content changes nothing without a mask"),
        (
            {"init_image": picture, "mask": picture, "masked_content": "fill"},
            "unknown masked_content 'fill'; choose one of: image, noise, nothing",
        ),
        ({"init_image": picture, "mask": picture, "feather": -1}, "feather -1: choose a number of at least 0"),
        ({"tile": -1}, "tile -1: choose an integer of at least 0"),
    ]:
        with pytest.raises(UserError, match=message):
            ours.prepare("red heart", **given, **FAST)


@pytest.mark.parametrize(
    ("component", "path", "message"),
    [
        ("text_encoder", "final_layer_norm", "text encoder's output is not finite"),
        ("unet", "conv_out", "UNet's output at network call 1 of 3 .timestep 667"),
        ("vae", "encoder", "autoencoder's encoding of the given image"),
        ("vae", "decoder", "the decoded image is not finite"),
    ],
)
def test_values_that_are_not_finite_name_their_stage(component, path, message, folder):
    pipe = sdjax.load(folder)
    broken = jax.tree.map(lambda x: np.full(x.shape, np.inf, x.dtype), pipe.params[component][path])
    pipe.params = {**pipe.params, component: {**pipe.params[component], path: broken}}
    with pytest.raises(UserError, match=message):
        pipe("red heart", init_image=np.zeros((SIZE, SIZE, 3), np.uint8), strength=1.0, batch_size=2, **FAST)


def test_overflow_names_the_network_call(folder):
    """A weight on cos(t) that overflows at timesteps where it is of the other sign than at the first."""
    pipe = sdjax.load(folder)
    timesteps = pipe.prepare("", steps=15)[0].parts[0].table.timestep[:15]
    signs = np.sign(np.cos(timesteps))
    row = int(np.argmax(signs != signs[0]))
    embedding = pipe.params["unet"]["time_embedding"]
    first = {**embedding["linear_1"], "kernel": embedding["linear_1"]["kernel"].at[0].set(-3e38 * signs[0])}
    unet = {**pipe.params["unet"], "time_embedding": {**embedding, "linear_1": first}}
    pipe.params = {**pipe.params, "unet": unet}
    with pytest.raises(UserError, match=rf"at network call {row + 1} of 15 \(timestep {timesteps[row]:g}, .* finite"):
        pipe("red heart", steps=15, batch_size=2)
    assert row > 0


def test_a_plain_prompt_that_is_cut_is_named(ours, caplog):
    prompt = "red heart " * 60
    with caplog.at_level("WARNING", "sdjax"):
        (row,) = ours.prepare(prompt, syntax="plain", **FAST)
    (record,) = caplog.records
    assert "was cut from the prompt 'red heart red" in record.message
    assert row.parts[0].columns["ids"].shape == (1, 1, zoo.TOKENS)


def test_images_do_not_depend_on_their_neighbours_prompts(ours):
    """Neither on their lengths, for prompts of other numbers of chunks have batches of their own, nor on negatives."""
    prompts, negatives = ["red heart " * 8, "blue cat", "flag"], ["ugly", None, "ugly"]
    together = ours(prompts, negatives, batch_size=2, **FAST)
    for i in range(3):
        alone = ours(prompts[i], negatives[i], first_index=i, batch_size=2, **FAST)[0]
        np.testing.assert_allclose(alone, together[i], atol=1e-5)


def test_long_prompts_are_read_to_their_end(ours, caplog):
    """In chunks: what differs in the second one only changes the image."""
    with caplog.at_level("WARNING", "sdjax"):
        images = ours(["red heart " * 8 + end for end in ("", "flag")], batch_size=2, seed=1, **FAST)
        again = ours("red heart " * 8, batch_size=2, seed=1, first_index=1, **FAST)
    assert not caplog.records
    assert np.abs(images[1] - again[0]).max() > 1e-3


def test_given_images_decide_the_size(ours):
    picture = np.zeros((25, 40, 3), np.uint8)
    assert ours.prepare("red heart", init_image=picture, **FAST)[0].size == (24, 40)
    (image,) = ours("red heart", init_image=picture, width=SIZE, height=SIZE, batch_size=2, **FAST)
    assert image.shape == (SIZE, SIZE, 3)


def test_inputs_are_one_for_all_or_one_a_prompt(ours):
    dark, light = (np.full((SIZE, SIZE, 3), value, np.uint8) for value in (0, 255))
    rows = ours.prepare(["a", "b"], init_image=[dark, light], num_images=2)
    assert [row.image.mean() for row in rows] == [0.0, 0.0, 1.0, 1.0]
    assert [row.image.mean() for row in ours.prepare(["a", "b"], init_image=light)] == [1.0, 1.0]
    with pytest.raises(UserError, match="3 entries in init_image for 2 prompts"):
        ours.prepare(["a", "b"], init_image=[dark] * 3)


def test_files_are_read_once(opened, tmp_path, monkeypatch):
    """Although an inpainting model is conditioned on them, and begins from them."""
    files = tmp_path / "image.png", tmp_path / "mask.png"
    for file in files:
        Image.new("RGB", (SIZE, SIZE)).save(file)
    read = []
    for name in ("read_image", "read_mask"):
        reader = getattr(image_inputs, name)
        monkeypatch.setattr(image_inputs, name, lambda f, n, reader=reader: read.append(f) or reader(f, n))
    opened("sd1_inpainting").prepare("red heart", init_image=files[0], mask=files[1], num_images=2)
    assert sorted(read) == sorted(files)


def test_prepare_finds_what_is_wrong(ours):
    for wrong in ({"init_image": "nowhere.png"}, {"sampler": "nope"}, {"first_index": 2**31}, {"width": 2**20}):
        with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
            ours.prepare("red heart", **{**FAST, **wrong})


def test_a_refiner_has_noise_of_its_own():
    """Its rows are counted anew; with the base's keys they would draw the base's noise a second time."""
    seeds, indices = seed_words([3] * 4), np.arange(4, dtype=np.int32)
    keys = [sampling.draw_noise(seeds, indices, (2, 2, 4), np.int32(part))[0] for part in (0, 1, 2)]
    words = {tuple(key) for each in keys for key in np.asarray(jax.random.key_data(each)).tolist()}
    assert len(words) == 12


def test_progress_counts_network_calls(ours):
    """Those of all batches, one by one, to the end."""
    seen = []
    how = {"batch_size": 2, "sampler": "heun", "progress": lambda *count: seen.append(count), **FAST}
    ours(["a", "b", "c"], **how)
    assert seen == [(done, 10) for done in range(1, 11)]  # two batches of 2 * 3 - 1 calls


def test_progress_counts_the_calls_of_unequal_requests(ours):
    seen = []
    rows = [row for steps in (3, 5) for row in ours.prepare(["a", "b"], steps=steps)]
    made = list(ours.run(rows, 2, lambda *count: seen.append(count), rows_per_call=2))
    assert seen == [(done, 8) for done in (2, 3, 5, 7, 8)]
    assert [place for place, _ in made] == [0, 1, 2, 3]


def test_checkpoints_have_defaults_of_their_own(folder, in_diffusers, tmp_path):
    checkpoint = dataclasses.replace(read_folder(folder), settings={"steps": 7, "guidance_scale": 2.5})
    write_checkpoint(tmp_path / "run" / "export", checkpoint)
    pipe = sdjax.load(tmp_path / "run")  # as train.py leaves it
    assert pipe.name == "run"
    settings = pipe.prepare("")[0].settings
    assert (settings["steps"], settings["guidance_scale"]) == (7, 2.5)
    assert pipe.prepare("", steps=9)[0].settings["steps"] == 9
    pipe.save(tmp_path / "copy")
    assert sdjax.load(tmp_path / "copy").prepare("")[0].settings["steps"] == 7
    theirs = in_diffusers("StableDiffusionPipeline", "sd1")
    assert type(theirs).from_pretrained(tmp_path / "copy").scheduler.config.steps_offset == 1


def test_half_precision_is_near(folder, ours):
    pipe = sdjax.load(folder, "bfloat16")
    assert pipe.params["unet"]["conv_in"]["kernel"].dtype == jax.numpy.bfloat16
    assert pipe.params["vae"]["quant_conv"]["kernel"].dtype == jax.numpy.float32
    difference = np.abs(pipe("red heart", batch_size=2, **FAST) - ours("red heart", batch_size=2, **FAST))
    assert 1e-6 < difference.mean() < 0.03


HEAVY = ("tensorflow_datasets", "grain", "emoji", "resvg_py", "array_record", "orbax", "torch")


def test_import_is_light():
    """`import sdjax` alone imports not even jax; what loads a model, nothing that only data or training needs."""
    code = (
        "import sys, sdjax; assert 'jax' not in sys.modules; sdjax.load; assert 'jax' in sys.modules; "
        f"found = sorted(set(sys.modules) & set({HEAVY!r})); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_does_not_import_torch(tmp_path):
    """Not even where its metrics are written, by a package that looks for torch."""
    code = (
        "import sys, train; from etils import epath; from sdjax.training.tensorboard import TensorBoard; "
        f"TensorBoard(epath.Path({str(tmp_path)!r}), 0).scalars({{'loss': 1.0}}, 1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


BAD = {
    "no prompts": ({"prompts": []}, "no prompts"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
    "steps": ({"steps": 0}, "steps 0"),
    "too many steps": ({"steps": 1001}, "1 to 1000"),
    "sampler": ({"sampler": "eular"}, "unknown sampler 'eular'.*euler"),
    "schedule": ({"schedule": "linear"}, "unknown schedule 'linear'.*trailing"),
    "karras ddim": ({"sampler": "ddim", "schedule": "karras"}, "karras"),
    "width": ({"width": 33}, "width 33 is not a multiple of 2.*32, 34"),
    "height": ({"height": -4}, "height -4"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale nan"),
    "seed": ({"seed": -2}, "seed -2: choose an integer of -1 to 18446744073709551615"),
    "large seed": ({"seed": 2**64}, "seed 18446744073709551616: choose an integer of -1 to 18446744073709551615"),
    "num_images": ({"num_images": 0}, "num_images 0"),
    "latents": ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, r"\[1, 4, 8, 8\].*\[1, 4, 8, 4\], NHWC"),
    "mask alone": ({"mask": np.zeros((4, 4), bool)}, "init_image"),
    "strength": ({"init_image": np.zeros((4, 4, 3), np.uint8), "strength": 1.5}, r"strength 1\.5"),
    "no strength": ({"init_image": np.zeros((4, 4, 3), np.uint8), "strength": 0.0}, r"strength 0\.0"),
    "image": ({"init_image": "nowhere.png"}, "nowhere.png"),
    "shape": ({"init_image": np.zeros((4, 4, 7), np.uint8)}, r"\[4, 4, 7\]"),
    "output": ({"output": "pil"}, "unknown output 'pil'.*latent"),
    "batch": ({"batch_size": 0}, "batch_size 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, ours: Pipeline):
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message):
        ours(**{"prompts": "red heart", **FAST, **arguments})


def test_numbers_of_the_wrong_kind(ours):
    for name, value in {"steps": 2.5, "width": "wide", "seed": True, "guidance_scale": "strong"}.items():
        with pytest.raises(UserError, match=f"{name} {value!r}"):
            ours.prepare("", **{name: value})


def test_sources_that_are_none(folder, tmp_path):
    for source, message in {
        tmp_path / "missing": "there is no file or folder",
        tmp_path: "no model_index.json",
        "model.safetensors": "there is no file or folder 'model.safetensors', nor is it an id of the Hub",
    }.items():
        with pytest.raises(UserError, match=message):
            sdjax.load(source)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="workdir without export"):
        sdjax.load(tmp_path)
    with pytest.raises(UserError, match="unknown dtype 'float31'"):
        sdjax.load(folder, "float31")


def test_save_leaves_other_peoples_files(ours, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="left as it is"):
        ours.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
