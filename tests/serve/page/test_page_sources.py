"""The page's files: of its own, and nothing in them that its policy of content forbids."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "sdjax" / "serve" / "page"
SCRIPTS = sorted(PAGE.glob("*.js"))
IMPORT = re.compile(r'import \{([^}]*)\} from "([^"]*)"')
EXPORT = re.compile(r"^export (?:async )?(?:function|const|class) (\w+)", re.MULTILINE)


def test_nothing_comes_from_elsewhere():
    for path in PAGE.iterdir():
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", path.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path.name


def test_nothing_is_inline():
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    for path in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|\bstyle:", path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_imports_and_ids_are_there(path: Path):
    text = path.read_text()
    for names, source in IMPORT.findall(text):
        exported = set(EXPORT.findall((PAGE / source).read_text()))
        assert {name.strip() for name in names.split(",") if name.strip()} <= exported, source
        assert all(re.search(rf"\b{name.strip()}\b", IMPORT.sub("", text)) for name in names.split(",") if name.strip())
    ids = set(re.findall(r'\bid="([\w-]+)"', (PAGE / "index.html").read_text()))
    own = set(re.findall(r'\bid: "([\w-]+)"', "".join(script.read_text() for script in SCRIPTS)))
    assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids | own


def test_every_script_is_used_and_none_imports_in_a_circle():
    sources = {path.name: {Path(name).name for _, name in IMPORT.findall(path.read_text())} for path in SCRIPTS}
    left = dict(sources)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}
    used = {"main.js"}.union(*sources.values())
    assert used == set(sources)


def test_lines_fit_and_exports_are_used():
    texts = {path.name: path.read_text() for path in PAGE.iterdir() if path.suffix != ".svg"}
    assert [f"{name}: {line}" for name, text in texts.items() for line in text.splitlines() if len(line) > 120] == []
    for path in SCRIPTS:
        imported = {
            name.strip() for text in texts.values() for names, _ in IMPORT.findall(text) for name in names.split(",")
        }
        assert set(EXPORT.findall(texts[path.name])) <= imported, path.name


def test_the_package_holds_the_page():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "serve/page/*" in table["sdjax"]
