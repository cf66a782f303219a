"""Annotations among a TensorFlow dataset's features besides a caption: a class, or objects in boxes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from sdjax.core.errors import UserError


class Annotated(NamedTuple):
    """Names of the features.

    Attributes:
        classes: their names; () where there are none.
        label: the key of the image's class.
        objects: the keys of a sequence of objects, and in each of its box and its class.
        label_map: the key of an image of one channel that is not the image itself.
    """

    classes: tuple[str, ...] = ()
    label: str | None = None
    objects: tuple[str, str, str] | None = None
    label_map: str | None = None

    def read(self, record: Any) -> dict[str, Any]:
        """`label`, or `objects` with `boxes`, or `label_map` of a record."""
        made: dict[str, Any] = {}
        if self.label is not None:
            made["label"] = np.int32(record[self.label])
        if self.label_map is not None:
            made["label_map"] = np.asarray(record[self.label_map])[..., 0]
        if self.objects is not None:
            objects, box, kind = self.objects
            top, left, bottom, right = np.asarray(record[objects][box], np.float32).reshape(-1, 4).T
            made["boxes"] = np.stack([left, top, right - left, bottom - top], axis=1)
            made["objects"] = np.asarray(record[objects][kind], np.int32).reshape(-1)
        return made


def annotated(features: Any, image: str) -> Annotated:
    """Finds a ClassLabel, a sequence with a BBoxFeature and a ClassLabel, and a second image, of one channel.

    Objects win over a class of the whole image. `image` is the key of the image itself.
    """
    objects = next(filter(None, (_objects(key, feature) for key, feature in features.items())), None)
    maps = (key for key, f in features.items() if key != image and isinstance(f, tfds.features.Image))
    label_map = next((key for key in maps if tuple(features[key].shape)[-1] == 1), None)
    if objects is not None:
        (key, _, kind) = objects
        return Annotated(_names(features[key].feature[kind]), None, objects, label_map)
    label = next((key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)), None)
    return Annotated(() if label is None else _names(features[label]), label, None, label_map)


def _objects(key: str, feature: Any) -> tuple[str, str, str] | None:
    inner = getattr(feature, "feature", None)
    if not isinstance(feature, tfds.features.Sequence) or not isinstance(inner, tfds.features.FeaturesDict):
        return None
    box = next((name for name, f in inner.items() if isinstance(f, tfds.features.BBoxFeature)), None)
    kind = next((name for name, f in inner.items() if isinstance(f, tfds.features.ClassLabel)), None)
    return None if box is None or kind is None else (key, box, kind)


def _names(feature: Any) -> tuple[str, ...]:
    if feature.num_classes is None:
        raise UserError("the data set's label has no number of classes")
    return tuple(feature.int2str(i) for i in range(feature.num_classes))
