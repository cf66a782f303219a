"""Templates of prompts: the syntax of sd-dynamic-prompts' docs/SYNTAX.md, its examples, files, and long prompts."""

import collections
import itertools
import random
import time

import pytest

from sdjax.core.errors import UserError
from sdjax.data.text.wildcards import WildcardFolder, fill_template, wildcards_of

FILES = {
    "season": "# seasons\n\nsummer\n  {autumn|fall}  \r\nwinter\n",
    "flavours": "chocolate\nvanilla\nstrawberry\n",
    "people": "__places/africa__\n",
    "places/africa": "\ufeffZimbabwean\nBasotho\n",
    "colours-cold": "blue\n",
    "colours-warm": "3::red\n",
    "circle": "a __circle__\n",
}
ICE = ("chocolate", "vanilla", "strawberry")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wildcards")
    for name, text in FILES.items():
        file = path / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode())
    return WildcardFolder(path)


def drawn(template, folder=None, count=300):
    """How often each text comes out."""
    return collections.Counter(fill_template(template, folder, str(seed)) for seed in range(count))


def in_orders(separator, *counts):
    return {separator.join(order) for count in counts for order in itertools.permutations(ICE, count)}


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{summer|autumn|winter} is coming", {f"{name} is coming" for name in ("summer", "autumn", "winter")}),
        ("a {b|{c|d} e} f", {"a b f", "a c e f", "a d e f"}),
        ("fe{ |}male", {"fe male", "female"}),
        ("{2$$chocolate|vanilla|strawberry}", in_orders(", ", 2)),
        ("{2$$ and $$chocolate|vanilla|strawberry}", in_orders(" and ", 2)),
        ("{1-2$$ and $$chocolate|vanilla|strawberry}", in_orders(" and ", 1, 2)),
        ("{-2$$chocolate|vanilla|strawberry}", in_orders(", ", 1, 2)),
        ("{2-$$chocolate|vanilla|strawberry}", in_orders(", ", 2, 3)),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{4$$chocolate|vanilla|strawberry}", in_orders(", ", 3)),
        ("{9-4$$a}", {"a"}),
        ("__season__ is coming", {f"{name} is coming" for name in ("summer", "autumn", "fall", "winter")}),
        ("{2$$__flavours__}", in_orders(", ", 2)),
        ("{2-$$_$$__flavours__}", in_orders("_", 2, 3)),
        ("{2$$__flavours__|x}", {f"{one}, x" for one in ICE} | {f"x, {one}" for one in ICE}),
        ("__people__", {"Zimbabwean", "Basotho"}),
        ("__colours*__ __*/africa__", {f"{a} {b}" for a in ("blue", "red") for b in ("Zimbabwean", "Basotho")}),
        ("{0::a|b|0.0::c}", {"b"}),
        ("[{a|b}:{[c|d]|e}:0.5]", {f"[{a}:{b}:0.5]" for a in "ab" for b in ("[c|d]", "e")}),
    ],
)
def test_all_texts_of_a_template_are_drawn(template, texts, folder):
    assert set(drawn(template, folder)) == texts


@pytest.mark.parametrize(
    "text",
    [
        "plain (red:1.2) [a|b] a|b",
        "{word} {} { a }} {{x}} {a",
        r"\{a|b\} \__season__ {a\|b}",
        "a } { b | c",
        "___ __ _a_ __a b$$c __(x)__",
        "{[a|b}",
    ],
)
def test_what_is_no_template_stays_as_it_is(text, folder):
    assert set(drawn(text, folder, 5)) == {text}


def test_without_a_folder_wildcards_are_words():
    assert set(drawn("__season__ {a|a}", count=5)) == {"__season__ a"}
    assert wildcards_of(r"a __season__ {__x/y__|b} \__z__ ___") == ["__season__", "__x/y__"]


def test_weights_are_relative(folder):
    """Each within five standard deviations of its share of 2,000 draws."""
    counts = drawn("{3::a|b|.5::c|0.5::d}", count=2000)
    for text, share in {"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.1}.items():
        assert abs(counts[text] - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5
    counts = drawn("__colours*__", folder, 2000)  # 3 to 1
    assert abs(counts["red"] - 1500) < 5 * 375**0.5


def test_a_seed_draws_the_same_words(folder):
    """Also in later versions: by the uniform numbers that Python promises to keep, one an option, as they are read."""
    for seed in map(str, range(20)):
        draw = random.Random(seed).random
        one, two = "abcd"[int(draw() * 4)], ("chocolate", "vanilla", "strawberry")[int(draw() * 3)]
        assert fill_template("{a|b|c|d} __flavours__", folder, seed) == f"{one} {two}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("__seasons__", "unknown wildcard 'seasons' in .*; choose one of: circle, colours-cold.*season"),
        ("__x*__", r"unknown wildcard 'x\*' in .*choose one of"),
        ("a __circle__ b", "wildcards of 'a __circle__ b' refer to each other without end"),
        ("{0::a|0::b}", "all options of a choice in the prompt weigh 0"),
    ],
)
def test_mistakes_are_named(template, message, folder):
    with pytest.raises(UserError, match=message) as error:
        fill_template(template, folder, "")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"# nothing\n\n", "holds no value: write one a line"),
        (b"\xff\xfe", "can't decode byte"),
        (b"a\n" * 2**23 + b"a", "such files have at most 16777216"),
    ],
)
def test_files_that_cannot_be_read(data, message, tmp_path):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.txt.*{message}"):
        fill_template("__x__", WildcardFolder(tmp_path), "")


def test_a_mark_at_the_beginning_is_no_word(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffcat\r\n".encode())
    assert fill_template("a __x__", WildcardFolder(tmp_path), "") == "a cat"


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"wildcard_dir .*nowhere' is no folder"):
        WildcardFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        WildcardFolder(tmp_path)


PIECES = ("{", "{a|", "{a|b}", "}", "__", "__a", "_", "{2$$", "|", "$$", "\\", "{1::", "[{", "{a")


@pytest.mark.parametrize("piece", PIECES)
def test_long_prompts_take_linear_time(piece):
    count = 20_000 // len(piece)
    start = time.perf_counter()
    fill_template(piece * count + "|x}" * count, None, "")
    assert time.perf_counter() - start < 3.0
