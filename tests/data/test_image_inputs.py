"""Given images, masks and depth against Pillow, torch and diffusers; pasting back; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.image_inputs import check_mask_size, load_depth, load_image, load_mask, paste_back, resize_bicubic
from sdjax.diffusion_model.conditioner import Host
from sdjax.diffusion_model.conditioners.inpaint import InpaintConditioner

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (48, 60, 3), np.uint8)


def test_all_forms_of_an_image_are_the_same(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "x.png")
    expected = PICTURE / 255.0
    for given in (PICTURE, Image.fromarray(PICTURE), tmp_path / "x.png", str(tmp_path / "x.png"), PICTURE / 255.0):
        np.testing.assert_allclose(load_image(given, (48, 60)), expected, atol=1e-6)


def test_the_largest_centred_part_is_resampled():
    expected = Image.fromarray(np.ascontiguousarray(PICTURE[:, 6:54])).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(load_image(PICTURE, (16, 16)), np.asarray(expected) / 255.0, atol=1e-6)
    wide = Image.fromarray(np.ascontiguousarray(PICTURE[9:39])).resize((40, 20), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(load_image(PICTURE, (20, 40)), np.asarray(wide) / 255.0, atol=1e-6)


@pytest.mark.parametrize("latents", [(6, 6), (12, 12), (48, 48)])
def test_masks_take_the_nearest_pixel_as_torch_does(latents):
    grey = RNG.integers(0, 256, (48, 48), np.uint8)
    binary = torch.from_numpy((grey >= 128).astype(np.float32))[None, None]
    expected = torch.nn.functional.interpolate(binary, size=latents)[0, 0].numpy()
    for given in (grey, Image.fromarray(grey), (grey / 255.0).astype(np.float32), grey >= 128):
        mask = load_mask(given, (48, 48))[..., 0]
        np.testing.assert_array_equal(mask[:: 48 // latents[0], :: 48 // latents[1]], expected)


SQUARE = np.zeros((48, 48), np.uint8)
SQUARE[12:32, 16:36] = 255  # 400 of 2,304 pixels
FULL = np.full_like(SQUARE, 255)
MASKS = {
    "white": ("RGBA", (SQUARE, SQUARE, SQUARE, FULL)),
    "white on transparent": ("RGBA", (SQUARE, SQUARE, SQUARE, SQUARE)),
    "grey and transparent": ("LA", (SQUARE, SQUARE)),
    "white under a gradient": ("LA", (SQUARE, np.broadcast_to(np.arange(48, dtype=np.uint8), (48, 48)))),
    "black on transparent": ("RGBA", (0 * SQUARE, 0 * SQUARE, 0 * SQUARE, SQUARE)),
    "white everywhere, transparent outside": ("LA", (FULL, SQUARE)),
}


@pytest.mark.parametrize("name", MASKS)
def test_transparency_is_no_white(name, tmp_path, caplog):
    """As diffusers reads masks, by `convert("L")`; where that says nothing, the opaque part is made anew."""
    mode, channels = MASKS[name]
    mask = Image.merge(mode, [Image.fromarray(channel) for channel in channels])
    mask.save(tmp_path / "mask.png")
    caplog.set_level("INFO", "sdjax")
    for given in (mask, tmp_path / "mask.png"):
        np.testing.assert_array_equal(load_mask(given, (48, 48))[..., 0], SQUARE / 255)
    assert ("opaque part" in caplog.text) == (len(mask.convert("L").getcolors()) == 1)


@pytest.mark.parametrize("name", [name for name in MASKS if name.startswith(("white on", "white under", "grey"))])
def test_masks_with_transparency_are_diffusers_own(name):
    mask = Image.merge(MASKS[name][0], [Image.fromarray(channel) for channel in MASKS[name][1]])
    processor = VaeImageProcessor(8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = processor.preprocess(mask, height=48, width=48)
    np.testing.assert_array_equal(load_mask(mask, (48, 48))[..., 0], theirs[0, 0])


@pytest.mark.parametrize("value", [0, 255])
def test_an_opaque_mask_of_one_grey_is_what_it_shows(value):
    for mode in ("RGBA", "LA", "RGB", "L"):
        mask = Image.new("L", (8, 8), value).convert(mode)
        np.testing.assert_array_equal(load_mask(mask, (8, 8)), value / 255)


def test_masks_of_palettes_and_16_bits(tmp_path):
    Image.fromarray(SQUARE).convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(SQUARE.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(SQUARE).convert("1").save(tmp_path / "bit.png")
    for name in ("palette", "deep", "bit"):
        np.testing.assert_array_equal(load_mask(tmp_path / f"{name}.png", (48, 48))[..., 0], SQUARE / 255)


def test_a_mask_is_cut_like_its_image():
    """A white square in the image's middle is in the middle of the latents, whatever the proportions."""
    mask = np.zeros((48, 60), np.uint8)
    mask[12:36, 18:42] = 255
    kept = load_mask(mask, (32, 32))[::4, ::4, 0]
    np.testing.assert_array_equal(np.argwhere(kept).min(0), [2, 2])
    np.testing.assert_array_equal(np.argwhere(kept).max(0), [5, 5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.full((4, 4, 3), 3.0), r"floats in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"floats in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
    ],
)
def test_rejects_what_is_no_image(given, message):
    with pytest.raises(UserError, match=message):
        load_image(given, (8, 8))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_input_of_inpainting_models_is_diffusers_own(mode):
    """Mask, masked image and the mask over latents, as its 9-channel pipeline makes them."""
    size, latents = (48, 64), (6, 8)
    picture = Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8))
    mask = Image.fromarray(RNG.integers(0, 256, (*size, 3)[: 2 + (mode == "RGB")], np.uint8))
    masks = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = masks.preprocess(mask, height=48, width=64)
    masked = VaeImageProcessor(vae_scale_factor=8).preprocess(picture, height=48, width=64) * (theirs < 0.5)
    over = torch.nn.functional.interpolate(theirs, size=latents)
    conditioner = InpaintConditioner()
    columns = conditioner.encode({"init_image": picture, "mask": mask}, Host("inpainting", {}, {}, size, latents))
    columns = {name: np.asarray(column)[None] for name, column in columns.items()}
    np.testing.assert_array_equal(columns["mask"], theirs.numpy().transpose(0, 2, 3, 1))
    ours = conditioner.images_to_encode(columns)
    np.testing.assert_allclose(ours["masked_latents"], masked.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-6)
    cond = conditioner.cond({}, {**columns, "masked_latents": np.zeros((1, *latents, 4), np.float32)})
    np.testing.assert_array_equal(cond.concat[..., :1], over.numpy().transpose(0, 2, 3, 1))
    assert 0.3 < columns["mask"].mean() < 0.7


@pytest.mark.parametrize(("old", "new"), [((50, 70), (8, 8)), ((8, 8), (50, 70)), ((7, 9), (7, 9)), ((3, 2), (5, 1))])
def test_bicubic_is_torchs(old, new):
    values = RNG.standard_normal(old)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size=new, mode="bicubic")[0, 0]
    np.testing.assert_allclose(resize_bicubic(values, new), expected.numpy(), atol=1e-12)


def theirs_depth(values: np.ndarray, latents: tuple[int, int]) -> np.ndarray:
    pipe = object.__new__(StableDiffusionDepth2ImgPipeline)
    object.__setattr__(pipe, "vae_scale_factor", 8)
    image = [Image.new("RGB", (latents[1] * 8, latents[0] * 8))]
    depth = torch.from_numpy(values.astype(np.float32))[None]
    found = pipe.prepare_depth_map(image, depth, 1, False, torch.float32, torch.device("cpu"))
    return found.numpy().transpose(0, 2, 3, 1)[0]


def test_depth_is_diffusers_own_in_every_form(tmp_path):
    wide = RNG.integers(0, 65536, (40, 56), np.uint16)
    narrow = RNG.integers(0, 256, (40, 56), np.uint8)
    floats = RNG.standard_normal((40, 56)).astype(np.float32) * 30.0
    np.save(tmp_path / "x.npy", floats)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(narrow).save(tmp_path / "narrow.png")
    forms = {
        "array": (floats, floats),
        "file": (tmp_path / "x.npy", floats),
        "one channel": (floats[..., None], floats),
        "16 bits": (str(tmp_path / "wide.png"), wide),
        "8 bits": (tmp_path / "narrow.png", narrow),
        "Pillow": (Image.fromarray(narrow), narrow),
    }
    for name, (given, values) in forms.items():
        found = load_depth(given, (5, 7))
        np.testing.assert_allclose(found, theirs_depth(values, (5, 7)), atol=1e-5, err_msg=name)
        assert (found.min(), found.max()) == (-1.0, 1.0)


def test_depth_is_cut_like_its_image():
    """With a slope from left to right, what is left of the middle are its ends."""
    slope = np.broadcast_to(np.arange(60.0), (48, 60))
    np.testing.assert_allclose(load_depth(slope, (8, 8)), load_depth(slope[:, 6:54], (8, 8)), atol=1e-6)


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full((8, 8), 3.0), "depth map is 3 everywhere"),
        (np.full((8, 8), np.nan), "not all finite"),
        (np.zeros((8, 8, 3)), r"depth has the shape \[8, 8, 3\]; a depth map is \[height, width\]"),
        (np.zeros((8, 0)), r"depth has the shape \[8, 0\]"),
        (np.array([["a"]]), "depth holds <U1 values"),
        (b"", "depth: cannot read .*: it is not an array"),
        (b"\x93NUMPY\x01\x00", "depth: cannot read"),
        (npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999, 9999999)}\n"), "depth: cannot read"),
        (npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}\n") + bytes(99), "depth: cannot read"),
    ],
)
def test_rejects_what_is_no_depth(given, message, tmp_path):
    if isinstance(given, bytes):
        (tmp_path / "x.npy").write_bytes(given)
        given = tmp_path / "x.npy"
    with pytest.raises(UserError, match=message):
        load_depth(given, (4, 4))
    with pytest.raises(UserError, match="No such file"):
        load_depth(tmp_path / "none.npy", (4, 4))


def test_masks_have_the_size_of_their_images():
    check_mask_size(PICTURE, np.zeros((48, 60)))
    check_mask_size(PICTURE, Image.new("L", (60, 48)))
    with pytest.raises(UserError, match="the mask is 48x60 pixels and its init_image 60x48; give a mask of 60x48"):
        check_mask_size(PICTURE, np.zeros((60, 48)))


@pytest.mark.parametrize("feather", [0, 1, 4, 7.5])
def test_paste_back_feathers_inside_the_mask(feather):
    made, original = (RNG.random((2, 24, 30, 3), np.float32) for _ in range(2))
    mask = np.zeros((2, 24, 30, 1), np.float32)
    mask[0, 5:20, 6:26] = 1.0
    mask[1, :, 15:] = 1.0
    made[..., 0][mask[..., 0] == 0.0] = np.nan  # whatever was painted there
    found = paste_back(made, original, mask, feather)
    assert found.dtype == np.float32
    outside = mask[..., 0] == 0.0
    np.testing.assert_array_equal(found[outside].view(np.int32), original[outside].view(np.int32))
    # The second mask is a half plane: shares are known from the column alone.
    share = np.clip((np.arange(30) - 14) / (feather + 1), 0.0, 1.0)[:, None]
    np.testing.assert_allclose(found[1], share * np.nan_to_num(made[1]) + (1.0 - share) * original[1], atol=1e-6)
    inner = np.zeros((24, 30), bool)
    reach = int(np.ceil(feather))
    inner[5 + reach : 20 - reach, 6 + reach : 26 - reach] = True
    np.testing.assert_array_equal(found[0][inner], made[0][inner])


def test_pasting_back_bytes_and_whole_masks():
    made = RNG.random((1, 6, 6, 3), np.float32)
    original = (RNG.integers(0, 256, (1, 6, 6, 3)) / np.float32(255.0)).astype(np.float32)
    np.testing.assert_array_equal(paste_back(made, original, np.ones((1, 6, 6, 1), np.float32), 3), made)
    np.testing.assert_array_equal(paste_back(made, original, np.zeros((1, 6, 6, 1), np.float32), 3), original)
    with pytest.raises(UserError, match="feather -1: choose"):
        paste_back(made, original, np.ones((1, 6, 6, 1), np.float32), -1)
