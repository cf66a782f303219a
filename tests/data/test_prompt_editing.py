"""A1111's prompt editing: the examples of its schedule parser's docstring, its grammar's rules, and long prompts."""

import time

import pytest

from sdjax.data.text.prompt_editing import Pass, composed, texts_by_step

STEPS = 10
# modules/prompt_parser.py: last steps and texts of the docstring of get_learned_conditioning_prompt_schedules.
A1111 = [
    ("test", [(10, "test")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("[a|(b:1.1)]", [(i, ("(b:1.1)", "a")[i % 2]) for i in range(1, 11)]),
    ("[fe|]male", [(i, ("male", "female")[i % 2]) for i in range(1, 11)]),
    ("[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)]),
]
RULES = [
    ("a [b::3 ] c", [(3, "a b c"), (10, "a  c")]),
    ("[a:b:20]", [(10, "a")]),
    ("[a:b:0] [c:d:-1] [e:f:0.09]", [(10, "b d f")]),
    ("[a:b:1.0] [c:d:1e1] [e:f:1e999]", [(10, "a c e")]),
    ("[a:b:1]", [(1, "a"), (10, "b")]),
    ("[a:b] [c:d:e:3] [f] [g:] [:] []", [(10, "[a:b] [c:d:e:3] [f] [g:] [:] []")]),
    (r"[a\:b:c\]:2] \[d:e:2\]", [(2, r"a\:b \[d:e:2\]"), (10, r"c\] \[d:e:2\]")]),
    ("[[a|b]:[c|d]:2]x", [(1, "ax"), (2, "bx"), *((i, ("dx", "cx")[i % 2]) for i in range(3, 11))]),
    ("a | b: c [d:2]", [(2, "a | b: c "), (10, "a | b: c d")]),
    ("[<lora:x:0.5> a:b:2]", [(2, "<lora:x:0.5> a"), (10, "b")]),
    ("[a (b:2] [c:d:2]", [(2, "[a (b:2] c"), (10, "[a (b:2] d")]),
    ("[a:b:2\\", [(10, "[a:b:2\\")]),
]
SECOND_PASS = [  # of ten steps after ten: the docstring's two, and steps that count on
    ("a [b:.5] c", [(10, "a b c")]),
    ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
    ("a [b:5] c", [(10, "a b c")]),
    ("a [b:13] c", [(3, "a  c"), (10, "a b c")]),
]


def schedule_of(texts):
    """(last step, text) of each run of equal texts."""
    ends = [i for i in range(1, len(texts) + 1) if i == len(texts) or texts[i] != texts[i - 1]]
    return [(end, texts[end - 1]) for end in ends]


def merged(schedule):
    return [pair for pair, after in zip(schedule, [*schedule[1:], (0, None)], strict=True) if pair[1] != after[1]]


@pytest.mark.parametrize(("prompt", "expected"), A1111 + RULES)
def test_schedules_are_a1111s(prompt, expected):
    assert schedule_of(texts_by_step(prompt, Pass(STEPS))) == merged(expected)


@pytest.mark.parametrize(("prompt", "expected"), SECOND_PASS)
def test_a_second_pass_counts_on(prompt, expected):
    assert schedule_of(texts_by_step(prompt, Pass(STEPS, earlier=STEPS))) == expected


def test_the_example_of_a_hundred_steps():
    """At the head of modules/prompt_parser.py."""
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert schedule_of(texts_by_step(prompt, Pass(100))) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat: 2", [("a cat: 2", 1.0)]),
        ("a cat :1.2 AND a dog AND (hat:2) : -.5 ", [("a cat", 1.2), (" a dog", 1.0), (" (hat:2)", -0.5)]),
        ("AND a\nAND:+2.", [("", 1.0), (" a", 1.0), ("", 2.0)]),
        ("a BRAND AND_ and b:1e3 AND c:x", [("a BRAND AND_ and b:1e3", 1.0), (" c:x", 1.0)]),
    ],
)
def test_and_composes(prompt, expected):
    """get_multicond_prompt_list: a number at the end of each part, with or without blanks, is its weight."""
    assert composed(prompt) == expected


PIECES = ("[", "[a:", "]", "[a:b:3]", "[a|", "(", ":", "|", "\\", "<a:", "[a:b:", "([", "1", " ")


@pytest.mark.parametrize("piece", PIECES)
def test_long_prompts_take_linear_time(piece):
    """20 kB of each piece, closed by as many brackets: what is quadratic takes long."""
    count = 20_000 // len(piece)
    start = time.perf_counter()
    texts = texts_by_step(piece * count + ":2]" * count, Pass(2))
    composed("a AND :" + piece * count)
    assert time.perf_counter() - start < 3.0
    assert len(texts) == 2
