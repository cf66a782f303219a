"""Tokenizer files whose values are of other types than they should be: one line that names the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdjax.core.errors import UserError
from sdjax.data.text.t5_tokenizer import SPECIALS, load_t5_tokenizer
from sdjax.data.text.tokenizers import BOS, EOS, load_tokenizer
from sdjax.data.text.word_pieces import load_word_pieces

VOCAB = {"a": 0, "b</w>": 1, "ab</w>": 2, BOS: 3, EOS: 4}
FILES: dict[str, Any] = {"vocab.json": VOCAB, "merges.txt": b"#version: 0.2\na b</w>\n", "tokenizer_config.json": {}}
PIECES = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}
VOCABULARIES = [
    *([], {}, 3, "a", None, VOCAB | {"a": 1}, VOCAB | {"a": -1}, VOCAB | {"a": 2**40}, VOCAB | {"a": True}),
    *(VOCAB | {"a": 0.0}, VOCAB | {"a": None}, VOCAB | {"a": []}, VOCAB | {"a": {"b": 1}}),
]
CONFIGS = [
    *([], "a", {"bos_token": 3}, {"bos_token": []}, {"eos_token": {"content": 3}}, {"pad_token": {}}),
    *({"pad_token": "\n" * 5000}, {"pad_token": {"content": "<pad>"}}, {"bos_token": False}),
    *({"model_max_length": length} for length in ("77", 2, -1, None, [], {}, True)),
]
ADDED: list[Any] = [[], 3, {"c": "5"}, {"c": -1}, {"c": 2**40}, {"c": None}, {"c": True}, {"": 5}, {" ": 5}]
ADDED += [{f"c{i}": i for i in range(10_001)}]
DECODERS: list[Any] = [[], 3, "a", {"5": 3}, {"5": {}}, {"5": {"content": 3}}, {"a": {"content": "c"}}]
DECODERS += [{number: {"content": "c"}} for number in ("-1", "9" * 5000, "5.0", "\u0665", "")]
LISTED: list[Any] = [
    {},
    3,
    "a",
    [3],
    [{}],
    [{"id": 5}],
    [{"content": "c"}],
    [{"content": "c", "id": "5"}],
    [[["c", 5]]],
]
MERGES = [3, "a b", {"a": 1}, [3], ["a"], ["a b</w> c"], [["a"]], [["a", 3]], [[["a"], "b</w>"]], [None], ["a c"]]


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def one_file(vocab: Any, merges: Any) -> dict[str, Any]:
    return {"tokenizer.json": {"model": {"vocab": vocab, "merges": merges}}}


@pytest.mark.parametrize(
    "files",
    [
        *({"vocab.json": content, "merges.txt": b""} for content in VOCABULARIES),
        *(FILES | {"tokenizer_config.json": content} for content in CONFIGS),
        *(FILES | {"special_tokens_map.json": content} for content in CONFIGS[:9]),
        *(FILES | {"added_tokens.json": content} for content in ADDED),
        *(FILES | {"tokenizer_config.json": {"added_tokens_decoder": content}} for content in DECODERS),
        *(FILES | {"tokenizer.json": {"added_tokens": content}} for content in LISTED),
        *(FILES | {"merges.txt": content} for content in (b"\xff", b"a", b"a b</w> c", b"a x", b"a  b</w>", b"x a")),
        *(one_file(content, []) for content in VOCABULARIES),
        *(one_file(VOCAB, content) for content in MERGES),
        *({"tokenizer.json": content} for content in ([], {"model": []}, {"model": {}}, {"model": "a"}, {})),
    ],
)
def test_clips(tmp_path: Path, files: dict[str, Any]):
    with pytest.raises(UserError) as error:
        load_tokenizer(written(tmp_path, files))
    said = str(error.value)
    assert str(tmp_path) in said
    assert len(said.removeprefix(str(tmp_path))) < 400
    assert "\n" not in said


def test_what_is_unusual_and_fits(tmp_path: Path):
    tokenizer = load_tokenizer(written(tmp_path, FILES | {"tokenizer_config.json": {"model_max_length": 10**30}}))
    assert (tokenizer.length, tokenizer.vocab_size) == (77, 5)
    assert tokenizer.row([token.ids[0] for token in tokenizer.tokens("ab a")])[:4] == [3, 2, 4, 4]
    assert load_tokenizer(tmp_path, 248).length == 248
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB | {"c": 9}))
    assert load_tokenizer(tmp_path).vocab_size == 10, "ids with gaps need as many rows as the last one says"


@pytest.mark.parametrize(
    "files",
    [
        *({"tokenizer.json": {"model": {"vocab": content}}} for content in (*VOCABULARIES, PIECES | {"b": 7})),
        *({"tokenizer.json": content} for content in ([], {"model": []}, {"model": {}}, {})),
        *({"vocab.txt": content} for content in (b"\xff", b"", b"a\nb", b"[CLS]\n[SEP]\n[PAD]")),
    ],
)
def test_berts(tmp_path: Path, files: dict[str, Any]):
    with pytest.raises(UserError) as error:
        load_word_pieces(written(tmp_path, files), 8)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert load_word_pieces(written(tmp_path, {"vocab.txt": "\n".join(PIECES).encode()}), 8).vocab_size == 5


UNIGRAMS = [[token, 0.0] for token in SPECIALS] + [["\u2581", -2.0], ["a", -3]]
TABLES = [3, "a", ["a"], "!!!!", "AAAA", "BAAAAP////8=", "BAAAAAD+//8="]
MODELS = [b"", b"\xff", b"\x0a", b"\x0a\x05\x0a\x03abc", b"{}", b"\x80" * 99]


@pytest.mark.parametrize(
    "files",
    [
        {},
        *({"tokenizer.json": content} for content in ([], {"model": []}, {"model": {}}, {}, one_file(VOCAB, []))),
        *(one_file(content, []) for content in (*VOCABULARIES, UNIGRAMS[1:], [["a", -1.0]], UNIGRAMS[:2])),
        *(one_file([*UNIGRAMS, entry], []) for entry in ("b", ["b"], ["b", "c"], [3, -1.0], ["b", True], ["", -1.0])),
        one_file([*UNIGRAMS, ["b", float("inf")]], []),
        *(
            {"tokenizer.json": {"model": {"vocab": UNIGRAMS}, "normalizer": {"precompiled_charsmap": table}}}
            for table in TABLES
        ),
        *(
            {"spiece.model": content}
            for content in (b"", b"\xff", b"\x0a", b"\x0a\x05\x0a\x03abc", b"{}", b"\x80" * 99)
        ),
    ],
)
def test_t5s(tmp_path: Path, files: dict[str, Any]):
    with pytest.raises(UserError) as error:
        load_t5_tokenizer(written(tmp_path, files), 8)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert load_t5_tokenizer(written(tmp_path, one_file(UNIGRAMS, [])), 8).vocab_size == 5
