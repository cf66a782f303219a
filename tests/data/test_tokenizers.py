"""The tokenizer against transformers' CLIPTokenizer, id for id."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from sdjax.core.errors import UserError
from sdjax.data.sources import openmoji
from sdjax.data.text.tokenizer_training import train_tokenizer
from sdjax.data.text.tokenizers import load_tokenizer

SHIPPED = Path(__file__).parents[2] / "checkpoints/openmoji/tokenizer"
ODD = [
    "",
    "   ",
    "RED  Heart\t\nRED",
    "one o\u2019clock, it's we'll I'D don't",
    "日本語 emoji ❤️ 👩🏽‍🔬 \u200d",
    "pin\u0303ata piñata e\u0301 İstanbul ǅ ß ﬁ",
    "\u00a0nbsp\u3000wide",
    "wow!!! (a:1.2) [b] 1234 ½ ²",
    "a <|endoftext|> b <|StartOfText|><|startoftext|>!",
    "word " * 200,
    "x" * 500,
]


@pytest.fixture(scope="module")
def captions():
    return list(openmoji.captions().values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([caption for caption in captions if not openmoji.is_held_out(caption)], folder, 2048)
    return folder


def reference(folder, texts):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    return out.input_ids


def test_same_ids_as_transformers(folder, captions):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(captions + ODD)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, reference(folder, captions + ODD))


@pytest.mark.parametrize("files", [("special_tokens_map.json",), ("special_tokens_map.json", "tokenizer_config.json")])
def test_padding_with_id_zero_as_stable_diffusion_2_does(folder, tmp_path, files):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in files:
        config = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**config, "pad_token": {"content": "!", "__type": "AddedToken"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad == 0
    ids = tokenizer.encode(["red heart", "wow! a cat!", *ODD])
    np.testing.assert_array_equal(ids, reference(tmp_path, ["red heart", "wow! a cat!", *ODD]))
    assert (ids[0, -10:] == 0).all()


def test_reads_the_single_file_that_transformers_5_writes(folder, tmp_path):
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    np.testing.assert_array_equal(load_tokenizer(tmp_path).encode(ODD), load_tokenizer(folder).encode(ODD))


def test_trained_vocabulary_is_clips_layout(folder):
    tokenizer = load_tokenizer(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    # openai/clip-vit-large-patch14 vocab.json: "!" 0, "~" 93, "¡" 94, "Ā" (byte 0) 188, "!</w>" 256, "a</w>" 320.
    expected = {"!": 0, "~": 93, "¡": 94, "Ā": 188, "!</w>": 256, "a</w>": 320}
    assert {token: vocab[token] for token in expected} == expected
    assert sorted(vocab.values()) == list(range(2048))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (2046, 2047, 2047, 2048)


def test_frequent_words_are_one_token(folder):
    tokenizer = load_tokenizer(folder)
    words = ["woman", "man", "person", "skin", "tone", "medium", "light", "dark", "heart", "flag", "face"]
    assert (tokenizer.encode([" ".join(words)])[0, len(words) + 1 :] == tokenizer.eos).all()


def test_truncation_is_reported(folder):
    tokenizer = load_tokenizer(folder)
    fits, cut = "heart " * 75, "Heart " * 75 + "dark Face"
    assert tokenizer.truncated([fits, cut, ""]) == ["", "dark Face", ""]
    np.testing.assert_array_equal(*tokenizer.encode([fits, cut]))


def test_shipped_tokenizer_is_what_the_captions_give(folder):
    shipped = load_tokenizer(SHIPPED)
    texts = [*openmoji.captions().values(), *ODD]
    np.testing.assert_array_equal(shipped.encode(texts), load_tokenizer(folder).encode(texts))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "merges.txt"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 1,'), "vocab.json is not JSON"),
        (lambda folder: (folder / "merges.txt").write_text("q zz</w>\n"), "merge 'q zz</w>' does not fit"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}'), None),
    ],
)
def test_damaged_folder_is_named(folder, tmp_path, damage, said):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "special_tokens_map.json").unlink()
    damage(tmp_path)
    with pytest.raises(UserError, match=said or "no token '<s>'"):
        load_tokenizer(tmp_path)


def test_too_small_a_vocabulary_is_an_error(tmp_path):
    with pytest.raises(UserError, match="vocab_size 514 is too small"):
        train_tokenizer(["a"], tmp_path, 514)
    assert not list(tmp_path.iterdir())
