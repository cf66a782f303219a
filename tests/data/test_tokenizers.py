"""The tokenizer against transformers' CLIPTokenizer, id for id."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

from sdjax.core.errors import UserError
from sdjax.data.sources import openmoji
from sdjax.data.text.added_tokens import apart, write_added
from sdjax.data.text.tokenizer_training import train_tokenizer
from sdjax.data.text.tokenizers import BOS, EOS, load_tokenizer

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


TOY, LEARNT = (
    "<cat-toy>",
    ["a <cat-toy> on a flag", "<CAT-TOY>, red", "cat-toy <cat-toy>s <cat-toy><style-1>", "<style-1>"],
)


def in_tokenizer_json(folder, path):
    made = CLIPTokenizer.from_pretrained(folder)
    made.add_tokens([TOY, "<style-1>"])
    made.save_pretrained(path)


def in_added_tokens(folder, path):
    shutil.copytree(folder, path)
    (path / "added_tokens.json").write_text(json.dumps({TOY: 2048, "<style-1>": 2049}))


def in_config(folder, path):
    shutil.copytree(folder, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    specials = {str(number): {"content": token, "special": True} for number, token in ((2046, BOS), (2047, EOS))}
    words = {"2048": {"content": TOY}, "2049": {"content": "<style-1>"}}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": {**specials, **words}}))


@pytest.mark.parametrize("write", [in_tokenizer_json, in_added_tokens, in_config])
def test_words_of_a_saved_textual_inversion(write, folder, tmp_path):
    """Wherever transformers of some version keeps them, they are one token each, in any case."""
    write(folder, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == 2050
    ids = tokenizer.encode([*LEARNT, *ODD])
    assert ids[0, 2] == 2048
    np.testing.assert_array_equal(ids, reference(tmp_path / "tokenizer", [*LEARNT, *ODD]))


def test_a_word_of_several_vectors_is_as_many_tokens(folder, tmp_path):
    """As diffusers' pipelines continue it (loaders/textual_inversion.py)."""
    shutil.copytree(folder, tmp_path / "tokenizer")
    write_added(tmp_path / "tokenizer", apart([(TOY, (2048, 2049, 2051)), ("<style>", (2050,))]))
    found = load_tokenizer(tmp_path / "tokenizer").encode(["<cat-toy> <style>", "<cat-toy>_1"])
    continued = TextualInversionLoaderMixin()._maybe_convert_prompt(
        "<cat-toy> <style>", CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    )
    assert continued == "<cat-toy> <cat-toy>_1 <cat-toy>_2 <style>"
    assert list(found[0, 1:6]) == [2048, 2049, 2051, 2050, 2047]
    assert list(found[1, 1:3]) == [2049, 2047]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {TOY: "2048"}),
        ("added_tokens.json", {TOY: -1}),
        ("added_tokens.json", {" ": 2048}),
        ("tokenizer.json", {"added_tokens": [{"content": TOY}]}),
        ("tokenizer.json", {"added_tokens": [TOY]}),
        ("tokenizer.json", {"added_tokens": {TOY: 2048}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [TOY]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"many": {"content": TOY}}}),
    ],
)
def test_added_tokens_that_are_none_are_named(name, content, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"added.token") as error:
        load_tokenizer(tmp_path / "tokenizer")
    assert str(tmp_path) in str(error.value)


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
