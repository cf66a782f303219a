"""Classes, boxes and label maps: of folders, of data sets, and through crops and mirrors."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.sources.open import source
from sdjax.data.sources.tfds import TfdsSource
from sdjax.data.sources.tfds_annotations import annotated
from sdjax.data.transforms.images import Flip, InRange, OfShape, Square

LINES = [
    {"label": "dog", "objects": {"bbox": [[8, 4, 8, 16]], "categories": ["cat"]}, "label_map": "0.map.png"},
    {"label": "cat", "objects": {"bbox": [], "categories": []}, "label_map": "1.map.png"},
]


@pytest.fixture
def folder(tmp_path):
    """Two images of 32 x 16 pixels with all annotations; the map's class is the column's number."""
    for i in range(2):
        Image.fromarray(np.full((16, 32, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.tile(np.arange(32, dtype=np.uint8), (16, 1))).save(tmp_path / f"{i}.map.png")
    write(tmp_path, LINES)
    return tmp_path


def write(folder, lines):
    rows = [json.dumps({"file_name": f"{i}.png", "text": "", **line}) for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_a_folder_names_classes_boxes_and_maps(folder):
    pictures = source(f"folder:{folder}")
    assert tuple(pictures.classes) == ("cat", "dog")
    first, second = pictures[0], pictures[1]
    assert (int(first["label"]), int(second["label"])) == (1, 0)
    np.testing.assert_allclose(first["boxes"], [[0.25, 0.25, 0.25, 1.0]])
    assert first["objects"].tolist() == [0]
    assert second["boxes"].shape == (0, 4)
    assert first["label_map"].shape == (16, 32)


def test_a_crop_takes_what_is_said_of_places_with_it(folder):
    """The middle half of the width: the box begins at its left edge; columns 8 to 23 of the map are left."""
    first = Square(16).map(source(f"folder:{folder}")[0])
    np.testing.assert_allclose(first["boxes"], [[0.0, 0.25, 0.5, 0.75]])
    assert first["label_map"][0].tolist() == list(range(8, 24))
    outside = {**first, "image": np.zeros((16, 32, 3), np.uint8), "label_map": np.zeros((16, 32), np.uint8)}
    outside |= {"boxes": np.array([[0.0, 0.0, 0.2, 1.0], [0.5, 0.0, 0.4, 0.5]], np.float32), "objects": np.arange(2)}
    cropped = Square(16).map(outside)
    assert cropped["objects"].tolist() == [1]
    np.testing.assert_allclose(cropped["boxes"], [[0.5, 0.0, 0.5, 0.5]])
    mirrored = Flip(1.0).random_map(first, np.random.default_rng(0))
    np.testing.assert_allclose(mirrored["boxes"], [[0.5, 0.25, 0.5, 0.75]])
    assert mirrored["label_map"][0].tolist() == list(range(23, 7, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, "label -1 is neither a name nor a number from 0"),
        ({"label": True}, "label True is neither"),
        ({"objects": {"bbox": [[1, 2, 3]], "categories": ["a"]}}, "boxes of four numbers x, y, width, height"),
        ({"objects": {"bbox": [[1, 2, 3, 10**30]], "categories": ["a"]}}, "boxes of four numbers"),
        ({"objects": {"bbox": [[1, 2, 3, math.inf]], "categories": ["a"]}}, "boxes of four numbers"),
        ({"label": 3_000_000_000}, "label 3000000000 is neither a name nor a number from 0 to 99999"),
        ({"objects": {"bbox": [[1, 2, 3, 4]], "categories": [3_000_000_000]}}, "names or numbers below 100000"),
        ({"objects": {"bbox": [], "categories": ["a"]}}, "two lists of one length"),
        ({"objects": [1]}, "objects needs bbox and categories"),
        ({"label_map": 3}, "label_map 3 is not the name of a file"),
        ({"neighbours": 3}, "neighbours 3 is not the name of a file"),
        ({"neighbours": "none.npy"}, "none.npy, which does not exist"),
        ({"label_map": "none.png"}, "none.png, which does not exist"),
        ({"label_map": "../0.png"}, "which is outside the folder"),
        ({"label": 3}, "has names and numbers as classes"),
    ],
)
def test_bad_annotations_are_one_line(folder, change, message):
    write(folder, [LINES[0], {**LINES[1], **change}])
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        source(f"folder:{folder}")
    assert message in str(error.value)


def test_maps_of_another_kind_or_size_are_one_line(folder):
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(folder / "0.map.png")
    Image.fromarray(np.zeros((8, 32), np.uint8)).save(folder / "1.map.png")
    pictures = source(f"folder:{folder}")
    with pytest.raises(UserError, match="is an image of mode RGB; it needs one channel of 8 bits"):
        pictures[0]
    with pytest.raises(UserError, match="has 8x32 pixels, its image 16x32"):
        pictures[1]


def test_classes_out_of_range_name_the_picture():
    element = {"id": "a.png", "label": np.int32(3), "label_map": np.full((2, 2), 9, np.uint8)}
    assert InRange("label", 4).map(element) is element
    with pytest.raises(UserError, match=r"label of 'a.png' has the class 3; the model has 0 to 2"):
        InRange("label", 3).map(element)
    with pytest.raises(UserError, match=r"label_map of 'a.png' has the class 9"):
        InRange("label_map", 9).map(element)
    with pytest.raises(UserError, match=r"the data says no boxes of 'a.png'"):
        InRange("boxes", 9).map(element)


def test_folders_in_a_folder_are_classes(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    pictures = source(f"pictures:{tmp_path}")
    assert pictures.classes == ("a", "b")
    assert [int(pictures[i]["label"]) for i in range(2)] == [0, 1]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert not source(f"pictures:{tmp_path}").classes


class Pairs(tfds.core.GeneratorBasedBuilder):
    """One image with two objects, as COCO has them: a box is (top, left, bottom, right)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        boxes = [tfds.features.BBox(0.1, 0.2, 0.5, 0.9), tfds.features.BBox(0.0, 0.0, 1.0, 1.0)]
        objects = [{"bbox": box, "label": kind} for box, kind in zip(boxes, ("dog", "cat"), strict=True)]
        yield 0, {"image": io.BytesIO(file.getvalue()), "caption": "two", "objects": objects}


def test_objects_of_a_tensorflow_dataset(tmp_path):
    builder = Pairs(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    pictures = TfdsSource(builder, "train")
    assert pictures.classes == ("cat", "dog")
    example = pictures[0]
    assert example["objects"].tolist() == [1, 0]
    np.testing.assert_allclose(example["boxes"], [[0.2, 0.1, 0.7, 0.4], [0.0, 0.0, 1.0, 1.0]], atol=1e-6)


def test_a_grey_picture_is_no_label_map():
    features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    found = annotated(features, "image")
    assert (found.label, found.label_map, len(found.classes)) == ("label", None, 10)
    features["image"], features["mask"] = (tfds.features.Image(shape=(4, 4, channels)) for channels in (3, 1))
    found = annotated(features, "image")
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    record = found.read({"label": 7, "mask": labels[..., None]})
    assert int(record["label"]) == 7
    np.testing.assert_array_equal(record["label_map"], labels)


def test_a_folder_names_the_embeddings_of_neighbours(folder):
    near = np.random.default_rng(0).standard_normal((3, 5))
    np.save(folder / "0.npy", near)
    np.save(folder / "1.npy", np.full((3, 5), np.nan))
    write(folder, [{"neighbours": "0.npy"}, {"neighbours": "1.npy"}])
    pictures = source(f"folder:{folder}")
    first = OfShape("neighbours", (3, 5)).map(pictures[0])
    np.testing.assert_array_equal(first["neighbours"], near.astype(np.float32))
    with pytest.raises(UserError, match=r"metadata.jsonl line 2: .*1.npy holds no finite embeddings of shape \[k, d\]"):
        pictures[1]
    with pytest.raises(UserError, match=r"of '0.png': an array of shape \[3, 5\]; this task needs the shape \[3, 4\]"):
        OfShape("neighbours", (3, 4)).map(pictures[0])
    with pytest.raises(UserError, match="no such array"):
        OfShape("neighbours", (3, 5)).map({"id": "0.png"})


def test_adms_squares_are_means_then_bicubic():
    """A quarter of the size is the mean of 4 x 4 pixels, to 2 of 255; the rest of the length is cut on both sides."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    found = Square(16, "adm").map({"image": image})["image"]
    means = image[:, 16:80].reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(found - means).max() < 2  # each halving is rounded
    third = Square(24, "adm").map({"image": image})["image"]  # halved once, then by 3/4
    halved = Image.fromarray(image).resize((48, 32), Image.Resampling.BOX)
    np.testing.assert_array_equal(third, np.asarray(halved.resize((36, 24), Image.Resampling.BICUBIC))[:, 6:30])
    with pytest.raises(UserError, match=r"unknown crop 'middle' in config.data.crop; choose one of: adm, centre"):
        Square(16, "middle")
