"""The layouts in which textual inversions are found, and how they are given to encoders."""

import base64
import itertools
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdjax.checkpoints.embedding_images import generated
from sdjax.checkpoints.embeddings import read_embeddings
from sdjax.checkpoints.storage.weights import read_groups
from sdjax.core.errors import UserError
from sdjax.data.text.textual_inversion import Embedding, fit, read_embedding

A, B = np.arange(8, dtype=np.float32).reshape(2, 4), -np.arange(12, dtype=np.float32).reshape(2, 6)


@pytest.mark.parametrize(
    ("tensors", "word", "vectors"),
    [
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": A}, "name": "cat-500", "step": 9}, "stem", [A]),
        ({"<cat-toy>": A}, "<cat-toy>", [A]),
        ({"<cat-toy>": A[1]}, "<cat-toy>", [A[1:]]),
        ({"emb_params": A}, "stem", [A]),
        ({"emb_params": A, "step": np.zeros(())}, "stem", [A]),
        ({"*": A}, "stem", [A]),
        ({"clip_g": B, "clip_l": A}, "stem", [A, B]),
        ({"clip_g": B}, "stem", [B]),
        ({"text_encoders_1": B, "text_encoders_0": A}, "stem", [A, B]),
        ({"clip_l": A.astype(np.float16)}, "stem", [A]),
    ],
)
def test_every_layout_is_read(tensors, word, vectors):
    embedding = read_embedding(tensors, "stem")
    assert embedding.word == word
    assert len(embedding.vectors) == len(vectors)
    for found, expected in zip(embedding.vectors, vectors, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_pickles_of_every_program(tmp_path):
    """A1111's mapping within a mapping, the module that LDM's own script stored, diffusers' tensor by its word."""
    trained = torch.nn.Parameter(torch.from_numpy(A).to(torch.bfloat16))  # with gradients, in a type NumPy lacks
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": trained}, "name": "x", "step": 9}
    old = {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": trained})}
    for name, stored in (("a1111", a1111), ("old", old), ("<x>", {"<x>": trained})):
        torch.save(stored, tmp_path / f"{name}.pt")
        embedding = read_embedding(read_groups(tmp_path / f"{name}.pt"), name)
        assert embedding.word == name
        np.testing.assert_array_equal(embedding.vectors, [A])


STORED = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": {"TORCHTENSOR": A.tolist()}},
    "name": "cat",
    "step": 9,
}
PIXELS = np.random.default_rng(0).integers(16, 255, (24, 30, 3)).astype(np.uint8)


def mask(count: int) -> np.ndarray:
    """What A1111 combines its pixels with, number for number."""
    numbers = itertools.accumulate(range(count), lambda state, _: (1664525 * state + 1013904223) % 2**32, initial=0)
    return np.array([number % 255 for number in list(numbers)[1:]])


def with_hidden(content: bytes) -> Image.Image:
    """PIXELS between the low and the high halves of bytes, which fill columns by repetition, in a black frame."""
    height, packed = len(PIXELS), np.frombuffer(zlib.compress(content, 9), np.uint8)
    packed = np.resize(packed, (height, -(-len(packed) // (3 * height)), 3))
    combine = (mask(packed.size) & 0x0F).astype(np.uint8).reshape(packed.shape)
    low, high = (half ^ combine | 0x50 for half in (packed & 0x0F, packed >> 4))
    line = np.zeros((height, 1, 3), np.uint8)
    return Image.fromarray(np.pad(np.concatenate([low, line, PIXELS, line, high], 1), ((2, 3), (1, 4), (0, 0))))


def test_images_of_a1111_are_read(tmp_path):
    """Their words are in a PNG's text or in its pixels; other images of a folder are passed over."""
    content, seen = json.dumps(STORED).encode(), Image.fromarray(PIXELS)
    text = PngImagePlugin.PngInfo()
    text.add_text("sd-ti-embedding", base64.b64encode(content).decode())
    seen.save(tmp_path / "written.png", pnginfo=text)
    with_hidden(content).save(tmp_path / "hidden.png")
    with_hidden(content).save(tmp_path / "hidden.webp", lossless=True)
    seen.save(tmp_path / "cat.preview.png")
    for name in ("written.png", "hidden.png", "hidden.webp"):
        (found,) = read_embeddings(tmp_path / name)
        assert found.word == "cat"
        np.testing.assert_array_equal(found.vectors, [A])
    assert [word.word for word in read_embeddings(tmp_path)] == ["cat"] * 3
    np.testing.assert_array_equal(generated(1000), mask(1000))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.fromarray(PIXELS), "holds no textual inversion"),
        (Image.fromarray(0 * PIXELS), "holds no textual inversion"),
        (with_hidden(b'{"name": "cat"}'), "its text has no string_to_param"),
        (with_hidden(b"[" * 9), "is not JSON"),
        (with_hidden(json.dumps({"string_to_param": {"*": {"TORCHTENSOR": [[1], [1, 2]]}}}).encode()), "not a tensor"),
        (with_hidden(json.dumps({"string_to_param": {"*": {}}}).encode()), "not a list of finite"),
    ],
)
def test_images_without_words_are_refused_in_a_line(image, said, tmp_path):
    image.save(tmp_path / "x.png")
    with pytest.raises(UserError, match=said) as error:
        read_embeddings(tmp_path / "x.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "'stem' is no textual inversion: .* not nothing"),
        ({"a": A, "b": A}, "not a, b"),
        ({"string_to_param": {"*": A, "+": A}}, "no textual inversion"),
        ({"string_to_param": A}, "no textual inversion"),
        ({"clip_l": A, "clip_g": B[:1]}, "has 2 and 1 vectors"),
        ({"x": np.zeros((2, 3, 4))}, r"its shape is \(2, 3, 4\)"),
        ({"x": np.zeros((0, 4))}, r"its shape is \(0, 4\)"),
        ({"x": A * np.nan}, "finite"),
        ({"x": "words"}, "'x' in textual inversion 'stem' is not a tensor"),
        ({"x": {"y": A}}, "is not a tensor"),
    ],
)
def test_other_content_is_named(tensors, said):
    with pytest.raises(UserError, match=said):
        read_embedding(tensors, "stem")


def test_each_encoder_gets_its_vectors_in_the_same_order():
    embeddings = [Embedding("one", (A, B)), Embedding("two", (A[:1], B[:1]))]
    fitted = fit(embeddings, [4, 6])
    assert fitted.counts == {"one": 2, "two": 1}
    np.testing.assert_array_equal(fitted.rows[0], [*A, A[0]])
    np.testing.assert_array_equal(fitted.rows[1], [*B, B[0]])
    (refiner,) = fit(embeddings, [6]).rows  # SDXL's refiner has the second encoder only
    np.testing.assert_array_equal(refiner, fitted.rows[1])
    assert [rows.shape for rows in fit([], [4, 6]).rows] == [(0, 4), (0, 6)]


def test_encoders_of_one_width_take_the_vectors_in_turn():
    first, second = fit([Embedding("one", (A, A + 1))], [4, 4]).rows
    np.testing.assert_array_equal(second, first + 1)


@pytest.mark.parametrize(
    ("embeddings", "widths", "said"),
    [
        ([Embedding("one", (A,))], [6], "'one' was made for text encoders of width 4, not 6"),
        ([Embedding("one", (A,))], [4, 6], "of width 4, not 4 and 6"),
        ([Embedding("one", (A,)), Embedding("one", (A,))], [4], "two textual inversions for the word 'one'"),
    ],
)
def test_what_does_not_fit_is_named(embeddings, widths, said):
    with pytest.raises(UserError, match=said):
        fit(embeddings, widths)
