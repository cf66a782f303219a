"""Images and masks before and after sampling, as A1111 has them (modules/processing.py, init of img2img).

The mask is blurred; the part of the image under it is filled or kept; with "only masked" a region around the mask is
sampled at the full size and put back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage

from sdjax.core.errors import UserError
from sdjax.data.image_inputs import check_mask_size
from sdjax.data.images import on_white
from sdjax.serve.api.a1111.fields import ImageToImage
from sdjax.serve.api.a1111.resizing import CROP, FILL, LATENT, STRETCH, Region, Size, region_of, resized

KEEP = 1
"""inpainting_fill that leaves the image as it is; all others fill the masked part with blurred colours before it is
encoded, and 2 and 3 exchange its latents after that."""
GREYS = range(256)
CUT = 128  # grey values above are masked
REACH = 2.5  # standard deviations of the blur's kernel
# Radii of the blurs that are laid over each other, the widest first, and how often.
FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


class Given(NamedTuple):
    """An image to begin from.

    Attributes:
        image: at the size that is sampled.
        mask: grey, as large; None for all of the image.
        original: under which what is made shows where `overlay` is white.
        overlay: None without a mask.
        region: of the original that was sampled; None for all of it.
    """

    image: Image.Image
    mask: Image.Image | None = None
    original: Image.Image | None = None
    overlay: Image.Image | None = None
    region: Region | None = None

    def restored(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The made image, under the original where the mask is not."""
        if self.original is None or self.overlay is None:
            return pixels
        made = Image.fromarray(pixels)
        if self.region is not None:
            left, top, right, bottom = self.region
            canvas = self.original.copy()
            canvas.paste(resized(made, (right - left, bottom - top), CROP), (left, top))
            made = canvas
        return np.asarray(Image.composite(made, self.original, self.overlay))


def given_image(image: Image.Image, mask: Image.Image | None, request: ImageToImage, size: Size) -> Given:
    """An image and a mask as a request has them, brought to the size that is sampled.

    Args:
        image: of any size and mode.
        mask: of `blurred_mask`, or None.
        request, size: and width and height.

    Raises:
        UserError: the mask has another size than the image of which only the masked part is to be made anew, or the
            image needs a resize of latents.
    """
    image, mode = on_white(image), request.resize_mode or STRETCH
    region = None
    if mask is not None and request.inpaint_full_res is not False:
        check_mask_size(image, mask)
        region = region_of(mask, request.inpaint_full_res_padding or 0, size)
        if region is None:
            mask = None
    if mask is None or region is None:
        if mode == LATENT and image.size != size:
            raise UserError(f"resize_mode {LATENT}: latents are not resized here; choose 0, 1 or 2")
        image, mask = resized(image, size, mode), None if mask is None else resized(mask, size, mode)
        if mask is None:
            return Given(image)
        given = Given(image, mask, image, mask.point([min(2 * value, 255) for value in GREYS]))
    else:
        cropped = resized(image.crop(region), size, FILL)
        given = Given(cropped, resized(mask.crop(region), size, FILL), image, mask, region)
    if request.inpainting_fill != KEEP and given.mask is not None:
        given = given._replace(image=filled(given.image, given.mask))
    return given


def blurred_mask(mask: Image.Image, request: ImageToImage) -> Image.Image:
    """The grey mask that a request asks for: from its opacity where that varies, cut, inverted and blurred."""
    opaque = mask.mode == "RGBA" and mask.getchannel("A").getextrema() != (255, 255)
    grey = mask.getchannel("A") if opaque else mask.convert("L")
    if request.mask_round is not False:
        grey = grey.point([255 * (value > CUT) for value in GREYS])
    if request.inpainting_mask_invert:
        grey = ImageOps.invert(grey)
    values = np.asarray(grey, np.float32)
    for axis, sigma in enumerate(_sigmas(request)):
        if sigma > 0.0:
            radius = int(REACH * sigma + 0.5)
            values = np.rint(ndimage.gaussian_filter1d(values, sigma, axis, mode="mirror", radius=radius))
    return Image.fromarray(values.astype(np.uint8))


def _sigmas(request: ImageToImage) -> tuple[float, float]:
    """Standard deviations of the blur, down and across."""
    if request.mask_blur is not None:
        return request.mask_blur, request.mask_blur
    return request.mask_blur_y or 0.0, request.mask_blur_x or 0.0


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the colours around the mask spread over it (modules/masking.py, fill)."""
    shown = image.convert("RGBA")
    shown.putalpha(ImageOps.invert(mask))
    weighted = shown.convert("RGBa")
    made = Image.new("RGBA", image.size)
    for radius, times in FILLS:
        layer = weighted.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            made.alpha_composite(layer)
    return made.convert("RGB")


def cut_mask(mask: Image.Image, factor: int) -> Image.Image:
    """A mask of black and white, each square of a latent of one value: A1111 resizes the grey one to the latents.

    Args:
        mask: grey.
        factor: pixels of a latent, along each side; 1 for a mask of pixels.
    """
    small = mask if factor == 1 else mask.resize((mask.width // factor, mask.height // factor))
    return small.point([255 * (value >= CUT) for value in GREYS]).resize(mask.size, Image.Resampling.NEAREST)
