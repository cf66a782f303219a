"""T5's tokenizer against transformers' T5Tokenizer, id for id."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import T5Tokenizer

from sdjax.core.errors import UserError
from sdjax.data.sources import openmoji
from sdjax.data.text.sentencepiece import read_sentencepiece
from sdjax.data.text.t5_tokenizer import load_t5_tokenizer, write_t5_tokenizer
from sdjax.data.text.tokenizer_training import train_unigrams

LENGTH = 16
ODD = [
    "",
    "   ",
    "RED  Heart\t\nred",
    "one o\u2019clock, it's we'll",
    "\u65e5\u672c\u8a9e emoji \u2764\ufe0f \U0001f469\U0001f3fd\u200d\U0001f52c",
    "pin\u0303ata pi\u00f1ata \u00df \ufb01 \uff28\uff45 \u00bd \u3000wide\u00a0nbsp",
    "</s> <pad> <unk> a</s>b <extra_id_0> <extra_id_99>",
    "\u2581 _ \u2581red",
    "word " * 100,
    "x" * 300,
]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return list(openmoji.captions().values())[:400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, captions: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    train_unigrams(captions, folder, 600)
    return folder


def reference(folder: Path, texts: list[str], **settings: Any) -> np.ndarray:
    tokenizer = T5Tokenizer.from_pretrained(folder, **settings)
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np").input_ids


def test_same_ids_as_transformers(folder: Path, captions: list[str]):
    tokenizer = load_t5_tokenizer(folder, LENGTH)
    ids = tokenizer.encode(captions + ODD)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, reference(folder, captions + ODD))
    assert ids[len(captions)].tolist() == [1] + [0] * (LENGTH - 1)
    assert ids.max() < tokenizer.vocab_size


def test_the_same_texts_give_the_same_tokenizer(folder: Path, captions: list[str], tmp_path: Path):
    train_unigrams(captions, tmp_path, 600)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_is_cut_is_told(folder: Path):
    tokenizer = load_t5_tokenizer(folder, LENGTH)
    text = "red heart " * 20
    cut = tokenizer.truncated(text)
    assert tokenizer.truncated("red") == ""
    assert cut
    assert text.endswith(cut)
    np.testing.assert_array_equal(tokenizer.encode([text]), tokenizer.encode([text[: -len(cut)]]))


@pytest.fixture(scope="module")
def made_by_sentencepiece() -> dict[str, Any]:
    """By tests/reference/sentencepiece_ids.py."""
    return json.loads((Path(__file__).parent / "sentencepiece.json").read_text())


def test_same_ids_as_sentencepiece(tmp_path: Path, made_by_sentencepiece: dict[str, Any]):
    """A spiece.model alone, as google/t5-v1_1-xxl and DeepFloyd/IF-I-XL-v1.0 have it."""
    (tmp_path / "spiece.model").write_bytes(base64.b64decode(made_by_sentencepiece["model"]))
    tokenizer = load_t5_tokenizer(tmp_path, 64)
    texts, rows = zip(*made_by_sentencepiece["ids"], strict=True)
    expected = np.array([[*row, *[0] * (64 - len(row))] for row in rows])
    np.testing.assert_array_equal(tokenizer.encode(texts), expected)
    assert tokenizer.vocab_size == 300 + 100  # with T5's sentinels


def test_characters_are_replaced_as_by_transformers(tmp_path: Path, made_by_sentencepiece: dict[str, Any]):
    """A tokenizer.json whose table of characters stands alone, or in a sequence."""
    found = read_sentencepiece(written(tmp_path, "spiece.model", base64.b64decode(made_by_sentencepiece["model"])))
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(found.charsmap).decode()}
    model = {"type": "Unigram", "unk_id": 2, "vocab": found.pieces, "byte_fallback": False}
    texts = [text for text, _ in made_by_sentencepiece["ids"]]
    for normalizer in (table, {"type": "Sequence", "normalizers": [table]}, None):
        content = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}
        written(tmp_path, "tokenizer.json", json.dumps(content).encode())
        ids = load_t5_tokenizer(tmp_path, LENGTH).encode([*texts, *ODD[:-4]])
        np.testing.assert_array_equal(ids, reference(tmp_path, [*texts, *ODD[:-4]], extra_ids=0))


def test_transformers_reads_what_is_written(tmp_path: Path, made_by_sentencepiece: dict[str, Any]):
    """Of a spiece.model, which it does not read without SentencePiece."""
    written(tmp_path, "spiece.model", base64.b64decode(made_by_sentencepiece["model"]))
    tokenizer = load_t5_tokenizer(tmp_path, LENGTH)
    write_t5_tokenizer(tokenizer, tmp_path / "new")
    texts = [*(text for text, _ in made_by_sentencepiece["ids"]), *ODD, "a<extra_id_7> b"]
    np.testing.assert_array_equal(reference(tmp_path / "new", texts), tokenizer.encode(texts))
    assert len(T5Tokenizer.from_pretrained(tmp_path / "new")) == tokenizer.vocab_size == 400


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def test_damaged_models_are_refused_or_read(tmp_path: Path, made_by_sentencepiece: dict[str, Any]):
    """The tokenizers library panics where a table leads out of itself, which no handler of errors would see."""
    model, rng = base64.b64decode(made_by_sentencepiece["model"]), np.random.default_rng(0)
    refused = []
    for turn in range(400):
        damaged = bytearray(model[: rng.integers(len(model))] if turn % 4 == 0 else model)
        for place in rng.integers(0, max(len(damaged), 1), 3) if damaged else []:
            damaged[place] = rng.integers(256)
        written(tmp_path, "spiece.model", bytes(damaged))
        try:
            load_t5_tokenizer(tmp_path, LENGTH).encode(ODD)
        except UserError as error:
            refused.append(str(error))
    assert 100 < len(refused) < 400
    assert all(str(tmp_path) in said and "\n" not in said for said in refused)
