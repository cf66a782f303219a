"""Models of the LDM paper beside Stable Diffusion, by what they are told: classes, words, layouts, maps, pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sdjax.convert.components import Checkpoint
from sdjax.core.errors import UserError, unknown
from sdjax.core.prng import image_keys
from sdjax.data.folder import read_embeddings
from sdjax.data.pictures import picture_size, read_labels, read_picture
from sdjax.data.word_pieces import load_word_pieces
from sdjax.diffusion.samplers import SamplerOptions, make_table, schedule_of
from sdjax.pipeline.devices import Devices
from sdjax.tasks.latent.networks import VAE
from sdjax.tasks.layout import layout_tokens
from sdjax.tasks.ldm.model import ImageGuide, draw, load_model
from sdjax.tasks.ldm.tokens import BERT

# What each task's model is told, by the names of a call's arguments.
TOLD: dict[str, tuple[str, ...]] = {
    "unconditional": (),
    "class_conditional": ("class_label",),
    "text_bert": ("prompt",),
    "layout": ("layout",),
    "semantic_synthesis": ("label_map",),
    "super_resolution": ("init_image",),
    "inpainting": ("init_image", "mask"),
    "retrieval": ("neighbours",),
}
STEPS, SAMPLER = 50, "ddim"


class ConditionalPipeline:
    """A model, its parameters on the devices, ready to be called.

    Attributes:
        name: what a user would call it.
        task: what it is told: a key of `TOLD`.
        params: parameters by component.
        settings: how it was trained to be sampled; `classes` are the names of its classes, where it has some.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, dtype: str = "float32", mesh: Mesh | None = None):
        """Takes a latent model, its parameters where they shall be: on the devices of `mesh`, if any.

        Raises:
            UserError: a part of it is missing.
        """
        self.name, self.task = name, checkpoint.conditioning
        self._tokenizer = checkpoint.tokenizers.get(BERT)
        if self.task == "text_bert" and self._tokenizer is not None and "nothing" not in checkpoint.settings:
            # diffusers' folders do not say which tokens say nothing: those of the empty prompt.
            length = checkpoint.components[BERT].config.max_length
            nothing = load_word_pieces(self._tokenizer, length).encode([""])[0].tolist()
            checkpoint = dataclasses.replace(checkpoint, settings={**checkpoint.settings, "nothing": nothing})
        self.settings = dict(checkpoint.settings)
        self.model, self.params = load_model(checkpoint, dtype)
        self._scheduler, self._devices = checkpoint.scheduler, Devices(mesh)
        self._sizes: Mapping[str, Any] = {key: part.config for key, part in checkpoint.components.items()}
        self._pixels = int(checkpoint.components[VAE].extra.get("sample_size", 0)) or self.settings.get("size", 256)

    def __call__(
        self,
        prompt: str | None = None,
        *,
        class_label: str | int | None = None,
        layout: str | Path | Sequence[Mapping[str, Any]] | None = None,
        label_map: str | Path | np.ndarray | None = None,
        init_image: str | Path | np.ndarray | None = None,
        mask: str | Path | np.ndarray | None = None,
        neighbours: str | Path | np.ndarray | None = None,
        resemble: str | Path | np.ndarray | None = None,
        resemble_scale: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        first_index: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_images: int = 1,
    ) -> Float[np.ndarray, "b H W 3"]:
        """Pictures in [0, 1] of one condition.

        Args:
            prompt: words, for a text model.
            class_label: a class's number or name.
            layout: objects as {"class": number or name, "box": [x, y, width, height]} in shares of the sides, or a JSON
                file with a list of them.
            label_map: uint8 [H W], or a picture of one channel.
            init_image: the small picture of a super-resolution model, or that with a hole; uint8 [h w 3], or a file.
            mask: white in the hole, as large as the picture.
            neighbours: embeddings by CLIP of what the picture shall be like, float [k d], each of length 1, or a NumPy
                file of them.
            resemble: a picture that any of these models is drawn to (LDM, appendix C): uint8 [h w 3], or a file; of the
                proportions of the pictures, and at most as large. Small ones are enlarged so by a model that is told
                nothing.
            resemble_scale: how strongly; None for 1.
            steps, sampler, schedule, eta, guidance_scale: None for what the model was trained with.
            seed: with the number of the picture, `first_index` for the first, decides its noise.
            width, height: in pixels, where the condition does not say them; None for those of training.
            num_images: how many.

        Raises:
            UserError: something is missing or is not for this model, or has a wrong value.
        """
        given = {"prompt": prompt, "class_label": class_label, "layout": layout, "label_map": label_map}
        given |= {"init_image": init_image, "mask": mask, "neighbours": neighbours}
        self._check(given)
        row = self._row({name: value for name, value in given.items() if value is not None})
        columns = {name: np.repeat(value[None], num_images, axis=0) for name, value in row.items()}
        sampler = str(sampler or self._default("sampler", SAMPLER))
        options = SamplerOptions.from_scheduler_config(self._scheduler, sampler)
        if eta is not None:
            options = dataclasses.replace(options, eta=eta)
        count = int(self._default("steps", STEPS) if steps is None else steps)
        table = make_table(sampler, schedule_of(self._scheduler), count, options, spacing=schedule)
        scale = self._default("guidance_scale", 1.0) if guidance_scale is None else guidance_scale
        if guidance_scale not in (None, 1.0) and self.model.conditioner.silent(columns) is None:
            raise UserError(
                f"guidance_scale {guidance_scale}: {self.name} never learned to be told nothing; leave it out"
            )
        keys = image_keys(seed, jnp.arange(first_index, first_index + num_images))
        size = self._size(columns, height, width)
        if resemble is None and resemble_scale is not None:
            raise UserError(f"resemble_scale {resemble_scale}: there is no picture to resemble; give one")
        strength = 1.0 if resemble_scale is None else resemble_scale
        guide = None if resemble is None else self._guide(_picture(resemble), strength, num_images, size)
        table, scale, (columns, keys) = *map(self._devices.whole, (table, scale)), self._devices.rows((columns, keys))
        with self._devices.working():
            return np.asarray(draw(self.model, self.params, table, columns, scale, keys, size, guide))

    def _guide(self, picture: np.ndarray, scale: float, count: int, size: tuple[int, int]) -> ImageGuide:
        """A picture to resemble, once for each that is made."""
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise UserError(
                f"resemble is {picture.dtype} {list(picture.shape)}; a picture of bytes [h, w, 3] is needed"
            )
        height, width = picture.shape[:2]
        if height > size[0] or width > size[1] or height * size[1] != width * size[0]:
            raise UserError(
                f"resemble has {width}x{height} pixels, and {self.name} makes {size[1]}x{size[0]}: it must have the "
                "same proportions, and at most the same size"
            )
        target = np.repeat(picture[None].astype(np.float32) / 255.0, count, axis=0)
        return ImageGuide(self._devices.rows(target), self._devices.whole(np.float32(scale)))

    def _default(self, name: str, otherwise: Any) -> Any:
        return self.settings.get(name, otherwise)

    def _check(self, given: Mapping[str, Any]) -> None:
        if self.task not in TOLD:
            raise unknown("task", self.task, TOLD, self.name)
        wanted = TOLD[self.task]
        for name, value in given.items():
            if (value is None) == (name in wanted):
                told = ", ".join(wanted) or "nothing"
                problem = "needs" if value is None else "is not told"
                raise UserError(f"{self.name} {problem} {name}: a model of {self.task} is told {told}")

    def _size(self, columns: Mapping[str, np.ndarray], height: int | None, width: int | None) -> tuple[int, int]:
        asked = self.model.conditioner.size(columns)
        if asked is not None and (height, width) != (None, None):
            raise UserError(f"width and height are not for {self.name}: its condition says {asked[1]}x{asked[0]}")
        size = asked or (height or self._pixels, width or self._pixels)
        factor = self.model.autoencoder.config.factor
        if any(side < factor or side % factor for side in size):
            raise UserError(f"{size[1]}x{size[0]} pixels: {self.name} makes sides that are multiples of {factor}")
        return size

    def _row(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What the conditioner reads of one picture."""
        if self.task == "class_conditional":
            return {"label": np.array(self._class(given["class_label"], "class_label"), np.int32)}
        if self.task == "text_bert":
            if self._tokenizer is None:
                raise UserError(f"{self.name} has no tokenizer; give the folder with BERT's vocab.txt")
            words = load_word_pieces(self._tokenizer, self._sizes[BERT].max_length)
            return {"tokens": words.encode([given["prompt"]])[0]}
        if self.task == "layout":
            return {"tokens": self._layout(given["layout"])}
        if self.task == "semantic_synthesis":
            return {"label_map": self._map(given["label_map"])}
        if self.task == "super_resolution":
            return {"low_res": _picture(given["init_image"])}
        if self.task == "retrieval":
            return {"neighbours": self._neighbours(given["neighbours"])}
        if self.task == "inpainting":
            image = _picture(given["init_image"])
            return {"image": image, "mask": _hole(given["mask"], (image.shape[0], image.shape[1]))}
        return {}

    def _class(self, value: str | int, place: str) -> int:
        """The number of a class that is given by its number or its name."""
        names = list(self.settings.get("classes", ()))
        if value in names:
            return names.index(value)
        count = len(names) or self._classes()
        if isinstance(value, str) and not value.isdecimal():
            raise unknown("class", value, names or (f"0 to {count - 1}",), place)
        if not 0 <= int(value) < count:
            raise UserError(f"{place} {value}: {self.name} has the classes 0 to {count - 1}")
        return int(value)

    def _classes(self) -> int:
        if self.task == "class_conditional":
            none = self.settings.get("none")
            return self._sizes["class_embedder"].classes if none is None else none
        return int(self.settings.get("object_classes", self._sizes[BERT].vocab_size - 1))

    def _layout(self, layout: str | Path | Sequence[Mapping[str, Any]]) -> np.ndarray:
        objects = _json(layout) if isinstance(layout, str | Path) else list(layout)
        form = 'a list of {"class": ..., "box": [x, y, width, height]}'
        if not isinstance(objects, list) or not all(
            isinstance(o, dict) and {"class", "box"} <= set(o) for o in objects
        ):
            raise UserError(f"layout: {form} is needed")
        try:
            boxes = np.array([o["box"] for o in objects], np.float32).reshape(-1, 4)
        except (TypeError, ValueError) as error:
            raise UserError(f"layout: {form} is needed") from error
        kinds = [self._class(o["class"], "layout") for o in objects]
        return layout_tokens(self._sizes[BERT], self._classes()).encode(kinds, boxes)

    def _neighbours(self, given: str | Path | np.ndarray) -> np.ndarray:
        array, width = _embeddings(given), self.model.conditioner.context_width
        if array.ndim != 2 or array.shape[1] != width or not len(array) or not np.isfinite(array).all():
            raise UserError(
                f"neighbours have the shape {list(array.shape)}; {self.name} wants [k, {width}], all finite"
            )
        return array

    def _map(self, label_map: str | Path | np.ndarray) -> np.ndarray:
        if isinstance(label_map, str | Path):
            label_map = read_labels(label_map, picture_size(label_map))
        count = self._sizes["rescaler"].classes
        if label_map.ndim != 2 or label_map.max() >= count:
            raise UserError(f"label_map has the class {label_map.max()}; {self.name} has 0 to {count - 1}")
        return label_map


def _embeddings(given: str | Path | np.ndarray) -> np.ndarray:
    return given if isinstance(given, np.ndarray) else read_embeddings(Path(given), "neighbours")


def _picture(given: str | Path | np.ndarray) -> np.ndarray:
    return given if isinstance(given, np.ndarray) else read_picture(given)


def _hole(given: str | Path | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h w 1], 1 where a mask is light.

    Raises:
        UserError: it is not as large as its picture.
    """
    mask = _picture(given)
    light = (mask if mask.ndim == 2 else mask[..., :3].mean(-1)) >= (127.5 if mask.max() > 1 else 0.5)
    if light.shape != size:
        raise UserError(f"mask has {light.shape[0]}x{light.shape[1]} pixels, its picture {size[0]}x{size[1]}")
    return light[..., None].astype(np.uint8)


def _json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the layout {path}: {error}") from error
