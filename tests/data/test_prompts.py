"""A1111's prompt syntax: facts from its own documentation and source, chunks derived by hand, and properties."""

import random
import re
import time

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.text.prompts import Span, chunk, parse, plain, stack
from sdjax.data.text.tokenizer_training import train_tokenizer
from sdjax.data.text.tokenizers import with_placeholders

ROOM = 75
WORDS = ("red", "heart", "cat", "dog", "hat", "flag")
# modules/prompt_parser.py: the examples in the docstring of parse_prompt_attention, then what its loop gives.
A1111 = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ],
    ),
    ("", []),
    ("((a))", [("a", 1.21)]),
    ("[[a]] b", [("a", 1 / 1.21), (" b", 1.0)]),
    ("[a:1.2)", [("a:1.2)", 1 / 1.1)]),
    ("(a:-.5) (b:+2.)", [("a", -0.5), (" ", 1.0), ("b", 2.0)]),
    ("a) b] c:", [("a) b] c:", 1.0)]),
    (r"(a\)b:1.5)", [("a)b", 1.5)]),
    (r"back\\slash l\one \[x\]", [(r"back\slash lone [x]", 1.0)]),
    ("(a [b)]", [("a ", 1.1), ("b", 1.0)]),
    ("(style: blue)", [("style: blue", 1.1)]),
    ("(red: 1.3) (blue:1.2 )(a:\t+.5\n)", [("red", 1.3), (" ", 1.0), ("blue", 1.2), ("a", 0.5)]),
    ("a: 1.3) [b: 1.3]", [("a: 1.3) ", 1.0), ("b: 1.3", 1 / 1.1)]),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([" ".join(WORDS)] * 4, folder, 560)


def tokens_of(tokenizer, ids):
    """Each row's ids between BOS and the EOS that ends them; the rest must be pads."""
    rows = []
    for row in ids.reshape(-1, tokenizer.length).tolist():
        end = row.index(tokenizer.eos)
        assert row[0] == tokenizer.bos
        assert set(row[end + 1 :]) <= {tokenizer.pad}
        rows.append(row[1:end])
    return rows


def ids_of(tokenizer, text):
    return [i for token in tokenizer.tokens(text) for i in token.ids]


@pytest.mark.parametrize(("prompt", "expected"), A1111)
def test_weights_are_a1111s(prompt, expected):
    (section,) = parse(prompt).sections
    assert [span.text for span in section] == [text for text, _ in expected]
    np.testing.assert_allclose([span.weight for span in section], [weight for _, weight in expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("prompt", "sections"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("a\nBREAK, b", [["a"], [", b"]]),
        ("BREAK b", [[], ["b"]]),
        ("BREAKFAST at break, BREAK_x", [["BREAKFAST at break, BREAK_x"]]),
        ("a (b BREAK c:2) d", [["a ", "b"], ["c", " d"]]),
    ],
)
def test_break_divides(prompt, sections):
    assert [[span.text for span in section] for section in parse(prompt).sections] == sections


def test_break_keeps_the_weight_of_the_brackets_around_it():
    assert parse("(b BREAK c:2)").sections == [[Span("b", 2.0)], [Span("c", 2.0)]]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("cat AND hat", ["AND"]),
        ("cat <lora:fur:0.8> (hat)", ["<lora:fur:0.8>"]),
        ("(cat", ["("]),
        ("cat] dog:1.2)", ["]", ":1.2)"]),
        ("(cat: 1.2) (dog:1.2.3) (hat: 1.)", [":1.2.3)"]),
        ("((((cat [[hat dog) 1) 2) 3) 4) 5) 6)", [")", "["]),
        (r"plain, (cat:1.2) [dog] [a:b] \[a:b:0.5\] \( BRAND", []),
    ],
)
def test_what_is_not_understood_is_reported(prompt, pieces):
    reports = parse(prompt).reports
    assert [report.text for report in reports] == pieces
    assert {report.kind for report in reports} <= {"not understood"}


def test_unknown_tags_are_left_out():
    assert parse("cat<lora:fur:0.8> (hat)").sections == [[Span("cat "), Span("hat", 1.1)]]


def test_plain_prompt_equals_tokenizer(tokenizer):
    for text in ("", "red heart", "flag: a cat, a dog!", "cat " * ROOM, "cat " * 60 + "," + " dog" * 14):
        for padded in (tokenizer, tokenizer._replace(pad=0)):  # Stable Diffusion 1 pads with EOS, 2 with id 0
            chunks, reports = chunk(padded, text)
            np.testing.assert_array_equal(chunks.ids, padded.encode([text]))
            assert (chunks.weights == 1).all()
            assert not reports


def test_weights_stand_at_their_tokens(tokenizer):
    chunks, _ = chunk(tokenizer, "red (heart cat:1.5) [dog]")
    assert tokens_of(tokenizer, chunks.ids) == [ids_of(tokenizer, "red heart cat dog")]
    np.testing.assert_allclose(chunks.weights[0, :6], [1, 1, 1.5, 1.5, 1 / 1.1, 1], rtol=1e-6)
    assert (chunks.weights[0, 5:] == 1).all()


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [
        (55, 19, 56),  # the comma is token 55 of 0 to 74: 20 back, the last that counts
        (54, 20, 75),  # 21 back: the chunk is filled
        (74, 0, 75),  # the comma is the chunk's last token
        (75, 0, 75),  # the comma begins the next chunk
    ],
)
def test_a_chunk_ends_after_a_comma_nearby(tokenizer, before, after, first):
    text = "cat " * before + "," + " dog" * (after + 5)
    rows = tokens_of(tokenizer, chunk(tokenizer, text)[0].ids)
    assert [len(row) for row in rows] == [first, before + 1 + after + 5 - first]
    assert rows[0] + rows[1] == ids_of(tokenizer, text)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("cat " * 60 + "," + " dog" * 14 + " dog" * ROOM + " hat", [61, 75, 15]),
        ("cat " * 75 + "," + " dog" * 160 + " hat", [75, 75, 75, 12]),
    ],
)
def test_a_comma_counts_for_one_chunk_only(tokenizer, text, lengths):
    assert [len(row) for row in tokens_of(tokenizer, chunk(tokenizer, text)[0].ids)] == lengths


def test_moved_tokens_keep_their_weights(tokenizer):
    chunks, _ = chunk(tokenizer, "cat " * 70 + ", red (dog:2) hat hat hat")
    assert [len(row) for row in tokens_of(tokenizer, chunks.ids)] == [71, 5]
    assert chunks.weights[0].tolist() == [1.0] * 77
    assert chunks.weights[1, :5].tolist() == [1.0, 1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("", [0]),
        ("cat BREAK dog", [1, 1]),
        ("BREAK dog", [0, 1]),
        ("cat BREAK", [1]),
        ("cat BREAK BREAK dog", [1, 0, 1]),
        ("BREAK", [0]),
        ("cat " * 75 + "BREAK dog", [75, 1]),
        ("cat " * 76 + "BREAK dog", [75, 1, 1]),
    ],
)
def test_break_begins_a_chunk(tokenizer, prompt, lengths):
    assert [len(row) for row in tokens_of(tokenizer, chunk(tokenizer, prompt)[0].ids)] == lengths


def test_random_texts_keep_all_their_tokens(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        pieces = [draw.choice([*WORDS, ",", ".", "!?", "4", "é", "x-y", "\n"]) for _ in range(draw.randrange(260))]
        text = " ".join(pieces)
        chunks, reports = chunk(tokenizer, text)
        rows = tokens_of(tokenizer, chunks.ids)
        assert [i for row in rows for i in row] == ids_of(tokenizer, text)
        assert (chunks.weights == 1).all()
        assert not reports
        assert all(ROOM - 20 < len(row) <= ROOM for row in rows[:-1])


def test_random_escaped_texts_survive():
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choice("ab ()[]\\:1.") for _ in range(draw.randrange(30)))
        parsed = parse(re.sub(r"([()\[\]\\])", r"\\\1", text))
        assert parsed.sections == ([[Span(text)]] if text else [[]])
        assert not parsed.reports


def test_random_brackets_lose_no_word():
    draw = random.Random(2)
    for _ in range(500):
        pieces = [draw.choice(["(", ")", "[", "]", ":1.3)", "cat ", "dog "]) for _ in range(draw.randrange(20))]
        (section,) = parse("".join(pieces)).sections
        words = re.findall("cat|dog", "".join(span.text for span in section))
        assert words == [piece.strip() for piece in pieces if piece.strip() in WORDS]
        assert all(0 < span.weight < np.inf for span in section)


PIECES = ("(", "(a", "()", "[a", "a)", "(a:1.0)", "(a [b ", r"\(", "1", ":1", "a:\n", " ", "BREAK ", "<a:b>", "<")


@pytest.mark.parametrize("piece", PIECES)
def test_long_prompts_take_linear_time(piece):
    """60 kB of each piece: what is quadratic takes minutes, or a log of as many lines."""
    start = time.perf_counter()
    parsed = parse("(a:" + piece * (60_000 // len(piece)))
    assert time.perf_counter() - start < 3.0
    assert len(parsed.reports) < 9


def test_weights_that_overflow_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"the prompt '\(\(\(\(.* has a weight above 3.4e\+38; nest fewer brackets"):
        chunk(tokenizer, "(" * 1000 + "red heart")


def test_plain_reads_no_syntax_and_says_what_was_cut(tokenizer):
    text = "(cat:1.2) BREAK " + "red " * 80 + "Hat"
    chunks, (report,) = plain(tokenizer, text)
    np.testing.assert_array_equal(chunks.ids, tokenizer.encode([text]))
    assert (chunks.weights == 1).all()
    assert (report.kind, report.text) == ("cut", tokenizer.truncated([text])[0])
    assert report.text.endswith("red Hat")
    assert plain(tokenizer, "red hat")[1] == []


def test_prompts_are_padded_with_empty_chunks(tokenizer):
    short, long = chunk(tokenizer, "(cat:1.3)")[0], chunk(tokenizer, "dog BREAK hat BREAK flag")[0]
    both = stack(tokenizer, [short, long])
    assert both.ids.shape == both.weights.shape == (2, 3, 77)
    np.testing.assert_array_equal(both.ids[0, 1:], np.repeat(tokenizer.encode([""]), 2, axis=0))
    np.testing.assert_array_equal(both.ids[1], long.ids)
    np.testing.assert_array_equal(both.weights[0, 0], short.weights[0])
    assert (both.weights[0, 1:] == 1).all()
    assert (both.ids.dtype, both.weights.dtype) == (np.int32, np.float32)


def test_placeholders_are_whole_words_in_any_case(tokenizer):
    placed = with_placeholders(tokenizer, {"toy": 2, "<cat-toy>": 1, "toy box": 1}, 600)
    prompt = "a Toy, toys, <CAT-toy>! atoy <cat-toy>toy toy box"
    tokens = [i for i in ids_of(placed, prompt) if i >= 600]
    assert tokens == [600, 601, 602, 602, 600, 601, 603]
    without = ids_of(tokenizer, "a") + ids_of(tokenizer, ", toys,") + ids_of(tokenizer, "! atoy")
    assert [i for i in ids_of(placed, prompt) if i < 600] == without
    assert placed.truncated(["cat " * 74 + "toy dog"]) == ["toy dog"]


def test_a_placeholders_ids_stay_in_one_chunk(tokenizer):
    placed = with_placeholders(tokenizer, {"toy": 8}, 600)
    chunks, _ = chunk(placed, "cat " * 70 + "(toy:1.4) dog")
    rows = tokens_of(placed, chunks.ids)
    assert [len(row) for row in rows] == [70, 9]
    assert rows[1][:8] == list(range(600, 608))
    np.testing.assert_allclose(chunks.weights[1, :10], [1, *[1.4] * 8, 1], rtol=1e-6)
    moved = tokens_of(placed, chunk(placed, "cat " * 60 + ", toy dog dog dog dog dog dog dog")[0].ids)
    assert [len(row) for row in moved] == [61, 15]
    assert moved[1][:8] == list(range(600, 608))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({" ": 1}, "needs a word"),
        ({"toy": 1, "Toy": 1}, "two textual inversions"),
        ({"toy": 76}, "76 vectors; 1 to 75"),
    ],
)
def test_impossible_placeholders_are_named(tokenizer, counts, said):
    with pytest.raises(UserError, match=said):
        with_placeholders(tokenizer, counts, 600)


def test_placeholders_are_added_one_after_another(tokenizer):
    more = with_placeholders(with_placeholders(tokenizer, {"toy": 1}, 600), {"box": 2}, 601)
    assert ids_of(more, "box toy") == [601, 602, 600]
