"""What a call promises besides parity: no second compilation, no dependence on batches, plain errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from sdjax.pipeline.stages import first_bad_row, noise_stage, rows_of
from tiny_diffusers import LATENT, SIZE

import sdjax
from sdjax.convert.folder import read_folder, write_checkpoint
from sdjax.core.errors import UserError
from sdjax.pipeline.pipeline import Pipeline
from sdjax.tasks.base import to_uint8

FAST = {"steps": 3, "guidance_scale": 3.0}


@pytest.fixture
def compilations():
    """A list that grows with every program that XLA compiles."""
    compiled = []

    def listener(event: str, seconds: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listener)


def test_changing_what_a_user_changes_compiles_nothing(theirs, compilations):
    pipe = sdjax.load(theirs.folder)
    picture, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.eye(SIZE, dtype=bool)
    calls = []
    calls.append(pipe(["a", "b"], batch_size=3, **FAST))
    pipe(["a", "b"], batch_size=3, init_image=picture, **FAST)
    assert compilations, "the listener hears nothing"
    compilations.clear()
    again = {"batch_size": 3}
    calls.append(pipe("red heart", **again, **FAST))
    calls.append(pipe(["x", "y", "z"], **again, **FAST))
    calls.append(pipe(["a", "b"], "ugly", **again, **FAST))
    calls.append(pipe(["a", "b"], seed=7, **again, **FAST))
    calls.append(pipe(["a", "b"], steps=9, guidance_scale=9.0, guidance_rescale=0.5, eta=1.0, **again))
    calls.append(pipe(["a", "b"], sampler="ddpm", steps=6, **again))  # in as many steps it is euler_a, bit for bit
    for sampler in ("plms", "euler", "euler_a", "lms", "dpmpp_2m", "heun", "dpm2"):
        calls.append(pipe(["a", "b"], sampler=sampler, steps=5, **again))
    calls.append(pipe(["a", "b"], sampler="euler", schedule="karras", **again, **FAST))
    calls.append(pipe(["a", "b"], sampler="ddim", schedule="trailing", **again, **FAST))
    calls.append(pipe(["a", "b"], init_image=picture, strength=0.4, **again, **FAST))
    calls.append(pipe(["a", "b"], init_image=picture, mask=mask, **again, **FAST))
    calls.append(pipe(["a", "b"], latents=np.ones((2, LATENT, LATENT, 4), np.float32), **again, **FAST))
    assert not compilations
    pairs = [images[:2] for images in calls if len(images) > 1]
    different = {images.tobytes() for images in pairs}
    assert len(different) == len(pairs), "an argument that changes nothing would not need compiling either"


def test_a_picture_depends_on_its_index_and_not_on_its_batch(ours):
    prompts = ["red heart", "blue cat", "flag"]
    together = ours(prompts, sampler="euler_a", num_images=2, batch_size=2, seed=5, **FAST)
    one_by_one = ours(prompts, sampler="euler_a", num_images=2, batch_size=1, seed=5, **FAST)
    np.testing.assert_allclose(one_by_one, together, atol=1e-5)
    alone = ours("blue cat", sampler="euler_a", first_index=3, seed=5, **FAST)
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
    assert np.abs(together[2] - together[3]).max() > 0.05, "two images of one prompt have noise of their own"
    other = ours("blue cat", sampler="euler_a", first_index=3, seed=2**32 - 1, **FAST)
    assert np.abs(other[0] - alone[0]).max() > 0.05


def test_what_a_mask_keeps_is_kept(ours):
    picture = np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, SIZE // 2 :] = True
    given = {"init_image": picture, "output": "latent", **FAST}
    known = ours("", mask=np.zeros_like(mask), **given)
    painted = ours("red heart", mask=mask, **given)
    half = LATENT // 2
    np.testing.assert_allclose(painted[:, :, :half], known[:, :, :half], atol=1e-5)
    assert np.abs(painted[:, :, half:] - known[:, :, half:]).min(axis=-1).mean() > 0.01
    everything = ours("red heart", mask=np.ones_like(mask), strength=0.5, **given)
    np.testing.assert_array_equal(everything, ours("red heart", strength=0.5, **given))


@pytest.mark.parametrize("feather", [0.0, 3.0])
def test_outside_of_a_mask_the_given_picture_is_left(feather, ours):
    """Bit for bit as bytes; within the mask it fades out over `feather` pixels."""
    given = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:24, 4:20] = True
    (image,) = ours("red heart", init_image=given, mask=mask, feather=feather, **FAST)
    (bare,) = ours("red heart", init_image=given, mask=mask, paste=False, **FAST)
    np.testing.assert_array_equal(to_uint8(image)[~mask], given[~mask])
    assert np.abs(bare - given / 255.0)[~mask].max() > 0.01, "the autoencoder alone keeps nothing exactly"
    deep = mask[:, :] & False
    deep[11:21, 7:17] = True
    np.testing.assert_array_equal(image[deep], bare[deep])
    edge = mask & ~deep
    assert (np.abs(image - bare)[edge].max() > 0.01) == (feather > 0)


def test_large_pictures_go_through_the_autoencoder_in_tiles(ours):
    """With random weights a tile's own GroupNorm and attention show; a seam would show more, and between all tiles."""
    latents = np.random.default_rng(1).standard_normal((1, LATENT * 3, LATENT * 2, 4)).astype(np.float32)
    whole = ours("red heart", latents=latents, tile=0, **FAST)
    tiled = ours("red heart", latents=latents, tile=SIZE, **FAST)
    assert np.abs(whole - tiled).max() > 0
    off = (tiled - whole)[0]
    assert np.abs(off).mean() < 0.15 * whole.std()
    for axis in (0, 1):
        steps = np.abs(np.diff(off, axis=axis)).mean((1 - axis, 2))
        assert steps.max() < 3 * np.median(steps), "from one pixel to the next, nowhere much more than anywhere"
    picture = np.random.default_rng(2).random((SIZE * 2, SIZE * 2, 3)).astype(np.float32)
    asked = {"init_image": picture, "strength": 0.4, "width": SIZE * 2, "height": SIZE * 2, **FAST}
    assert 0 < np.abs(ours("flag", **asked) - ours("flag", tile=SIZE, **asked)).mean() < 0.1


def test_what_a_kind_of_model_has_no_use_for(ours):
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    for given, message in [
        ({"depth": picture}, "depth is given, of which this model makes nothing"),
        ({"mask": picture}, "a mask needs an init_image"),
        ({"init_image": picture, "mask": picture[:8]}, f"the mask is {SIZE}x8 pixels and its init_image {SIZE}x{SIZE}"),
        ({"init_image": picture, "mask": picture, "feather": -1}, "feather -1: choose a number of at least 0"),
        ({"tile": -1}, "tile -1: choose an integer of at least 0"),
    ]:
        with pytest.raises(UserError, match=message):
            ours("red heart", **given, **FAST)


@pytest.mark.parametrize(
    ("component", "path", "message"),
    [
        ("text_encoder", "final_layer_norm", "text encoder's output is not finite"),
        ("unet", "conv_out", "UNet's output at network call 1 of 3 .timestep 667"),
        ("vae", "encoder", "autoencoder's encoding of the given picture"),
        ("vae", "decoder", "autoencoder's decoded picture is not finite"),
    ],
)
def test_values_that_are_not_finite_name_their_stage(component, path, message, theirs):
    pipe = sdjax.load(theirs.folder)
    broken = jax.tree.map(lambda x: np.full(x.shape, np.inf, x.dtype), pipe.params[component][path])
    pipe.params = {**pipe.params, component: {**pipe.params[component], path: broken}}
    with pytest.raises(UserError, match=message):
        pipe("red heart", init_image=np.zeros((SIZE, SIZE, 3), np.uint8), strength=1.0, **FAST)


def test_the_network_call_at_which_values_overflow_is_named(theirs):
    """A weight on cos(t) that overflows at timesteps where it is of the other sign than at the first."""
    pipe = sdjax.load(theirs.folder)
    timesteps = pipe.settings(steps=15).table(pipe.scheduler_config).timestep[:15]
    signs = np.sign(np.cos(timesteps))
    row = int(np.argmax(signs != signs[0]))
    embedding = pipe.params["unet"]["time_embedding"]
    first = {**embedding["linear_1"], "kernel": embedding["linear_1"]["kernel"].at[0].set(-3e38 * signs[0])}
    unet = {**pipe.params["unet"], "time_embedding": {**embedding, "linear_1": first}}
    pipe.params = {**pipe.params, "unet": unet}
    with pytest.raises(UserError, match=rf"at network call {row + 1} of 15 \(timestep {timesteps[row]:g}, .* finite"):
        pipe("red heart", steps=15)
    assert row > 0


def test_bisection_finds_every_row(ours):
    table = ours.settings(steps=15).table(ours.scheduler_config)
    for row in range(15):
        assert first_bad_row(lambda shorter, row=row: rows_of(shorter) <= row, table) == row


def test_a_plain_prompt_that_is_cut_is_named(ours, caplog):
    prompt = "red heart " * 60
    with caplog.at_level("WARNING", "sdjax"):
        long = ours([prompt, "flag"], syntax="plain", **FAST)
    (record,) = caplog.records
    assert "was cut from the prompt 'red heart red" in record.message
    np.testing.assert_array_equal(long, ours([prompt + "never read", "flag"], syntax="plain", **FAST))


@pytest.mark.parametrize("other", ["red heart " * 60, "flag"])
def test_a_picture_does_not_depend_on_its_neighbours_words(other, ours):
    """Neither on how long their prompts are nor on whether they have negative ones."""
    together = ours([other, "blue cat"], ["ugly", None], **FAST)
    np.testing.assert_allclose(ours("blue cat", first_index=1, **FAST)[0], together[1], atol=1e-5)
    np.testing.assert_allclose(ours(other, "ugly", **FAST)[0], together[0], atol=1e-5)


def test_given_pictures_decide_the_size(ours):
    picture = np.zeros((25, 40, 3), np.uint8)
    assert ours("red heart", init_image=picture, **FAST).shape == (1, 24, 40, 3)
    assert ours("red heart", init_image=picture, width=16, height=16, **FAST).shape == (1, 16, 16, 3)


def test_a_dry_run_finds_what_is_wrong_and_paints_nothing(ours):
    told = []
    assert not len(ours("red heart", dry_run=True, progress=lambda *count: told.append(count), **FAST))
    assert not told
    for wrong in ({"init_image": "nowhere.png"}, {"sampler": "nope"}, {"first_index": 2**31}, {"width": 2**20}):
        with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
            ours("red heart", dry_run=True, **{**FAST, **wrong})


def test_a_long_prompt_is_read_to_its_end(ours, caplog):
    prompt = "red heart " * 60
    with caplog.at_level("WARNING", "sdjax"):
        long, longer = ours([prompt, prompt + "flag"], **FAST)
    assert not caplog.records
    assert np.abs(long - longer).max() > 1e-3


def test_a_refiner_draws_noise_of_its_own():
    """Its rows are counted anew; with the base's keys they would draw the base's noise a second time."""
    arguments = np.int32(3), np.arange(4, dtype=np.int32), (2, 2, 4)
    (keys, first), (later, same) = (noise_stage(*arguments, np.int32(part)) for part in (0, 1))
    np.testing.assert_array_equal(same, first)
    words = {tuple(key) for keys in (keys, later) for key in np.asarray(jax.random.key_data(keys)).tolist()}
    assert len(words) == 8


def test_progress_counts_network_calls(ours):
    told = []
    ours(["a", "b"], batch_size=1, sampler="heun", progress=lambda done, total: told.append((done, total)), **FAST)
    assert told[-1] == (10, 10)  # two passes of 2 * 3 - 1 calls
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_the_checkpoints_own_defaults(theirs, tmp_path):
    checkpoint = dataclasses.replace(read_folder(theirs.folder), settings={"steps": 7, "guidance_scale": 2.5})
    write_checkpoint(tmp_path / "run" / "export", checkpoint)
    pipe = sdjax.load(tmp_path / "run")  # as train.py leaves it
    assert pipe.name == "run"
    assert (pipe.settings().steps, pipe.settings().guidance_scale) == (7, 2.5)
    assert pipe.settings(steps=9).steps == 9
    pipe.save(tmp_path / "copy")
    assert sdjax.load(tmp_path / "copy").settings().steps == 7
    assert type(theirs).from_pretrained(tmp_path / "copy").scheduler.config.steps_offset == 1


def test_half_precision_is_near(theirs, ours):
    pipe = sdjax.load(theirs.folder, "bfloat16")
    assert pipe.params["unet"]["conv_in"]["kernel"].dtype == jax.numpy.bfloat16
    assert pipe.params["vae"]["quant_conv"]["kernel"].dtype == jax.numpy.float32
    difference = np.abs(pipe("red heart", **FAST) - ours("red heart", **FAST))
    assert 1e-6 < difference.mean() < 0.03


def test_import_is_light():
    code = "import sys, sdjax; assert 'jax' not in sys.modules; sdjax.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    "seed": ({"seed": -1}, "seed -1.*0 to 4294967295"),
    "num_images": ({"num_images": 0}, "num_images 0"),
    "latents": ({"latents": np.zeros((1, 4, 16, 16), np.float32)}, r"\[1, 4, 16, 16\].*\[1, 4, 16, 4\], NHWC"),
    "mask alone": ({"mask": np.zeros((4, 4), bool)}, "init_image"),
    "strength": ({"init_image": np.zeros((4, 4, 3), np.uint8), "strength": 1.5}, r"strength 1\.5"),
    "no strength": ({"init_image": np.zeros((4, 4, 3), np.uint8), "strength": 0.0}, r"strength 0\.0"),
    "picture": ({"init_image": "nowhere.png"}, "nowhere.png"),
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
            ours.settings(**{name: value})


def test_sources_that_are_none(theirs, tmp_path):
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
        sdjax.load(theirs.folder, "float31")


def test_save_leaves_other_peoples_files(ours, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="left as it is"):
        ours.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
