"""Links in data folders: those of a Hub snapshot are read, and none leads to another file of the machine."""

import os

import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.sources.open import source
from sdjax.data.sources.rules import RowRules

KINDS = ["folder", "pictures"]


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (value, 0, 0)).save(path, "PNG")


@pytest.fixture
def snapshot(tmp_path):
    """As huggingface_hub keeps it: files of a revision are links to blobs."""
    folder = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    (folder / "train").mkdir(parents=True)
    for number in range(3):
        image(tmp_path / "datasets--a--b" / "blobs" / f"h{number}", number)
        (folder / "train" / f"{number}.png").symlink_to(f"../../../blobs/h{number}")
    (tmp_path / "datasets--a--b" / "blobs" / "list").write_text(
        "\n".join(f'{{"file_name": "train/{number}.png", "text": "x"}}' for number in range(3))
    )
    (folder / "metadata.jsonl").symlink_to("../../blobs/list")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_of_the_hub_is_read(snapshot, kind):
    rows = source(f"{kind}:{snapshot}")
    assert [int(rows[i]["image"][0, 0, 0]) for i in range(len(rows))] == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["a link", "a link when it is read", "blobs that are a link", "beside it"])
def test_no_link_leads_to_other_files(tmp_path, snapshot, kind, way):
    image(tmp_path / "secret" / "h0")
    blobs = snapshot.parent.parent / "blobs"
    first = snapshot / "train" / "0.png"
    rows = None
    if way == "a link when it is read":
        rows = source(f"{kind}:{snapshot}")
    if way == "blobs that are a link":
        list_of = (blobs / "list").read_text()
        blobs.rename(tmp_path / "secret" / "blobs")
        blobs.symlink_to(tmp_path / "secret" / "blobs")
        (snapshot / "metadata.jsonl").unlink()
        (snapshot / "metadata.jsonl").write_text(list_of)
    else:
        first.unlink()
        first.symlink_to(tmp_path / "secret" / "h0" if way != "beside it" else blobs.parent / "h0")
        image(blobs.parent / "h0")
    with pytest.raises(UserError, match=r"0\.png', which is outside the folder; config\.data\.links is for folders"):
        (rows or source(f"{kind}:{snapshot}"))[0]


def test_a_caption_is_no_link_to_other_files(tmp_path):
    image(tmp_path / "a" / "0.png")
    (tmp_path / "key").write_text("a private key")
    (tmp_path / "a" / "0.txt").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"0\.png names '0\.txt', which is outside the folder"):
        source(f"folder:{tmp_path}/a")


def test_a_list_is_no_link_to_other_files(tmp_path):
    image(tmp_path / "a" / "0.png")
    (tmp_path / "list").write_text('{"file_name": "0.png", "text": "x"}')
    (tmp_path / "a" / "metadata.jsonl").symlink_to(tmp_path / "list")
    with pytest.raises(UserError, match=r"names 'metadata\.jsonl', which is outside the folder"):
        source(f"folder:{tmp_path}/a")


def test_a_split_is_no_link_to_other_files(tmp_path):
    image(tmp_path / "other" / "0.png")
    (tmp_path / "other" / "0.txt").write_text("x")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"the split train names 'train', which is outside the folder"):
        source(f"folder:{tmp_path}/a")


@pytest.mark.parametrize("kind", KINDS)
def test_links_lead_where_the_user_lets_them(tmp_path, kind):
    image(tmp_path / "photos" / "0.png")
    image(tmp_path / "photos" / "more" / "1.png", 1)
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "a.png").symlink_to(tmp_path / "photos" / "0.png")
    (tmp_path / "farm" / "more").symlink_to(tmp_path / "photos" / "more")
    (tmp_path / "photos" / "more" / "round").symlink_to(tmp_path / "photos" / "more")
    for name in ("farm/a", "photos/more/1"):
        (tmp_path / f"{name}.txt").write_text("x")
    needs = ("caption",) * (kind == "folder")
    with pytest.raises(UserError, match="outside the folder"):
        source(f"{kind}:{tmp_path}/farm", rules=RowRules(needs))
    rows = source(f"{kind}:{tmp_path}/farm", rules=RowRules(needs, links=(str(tmp_path / "photos"),)))
    assert [rows.id(i) for i in range(len(rows))] == ["a.png", "more/1.png"]
    assert int(rows[1]["image"][0, 0, 0]) == 1


def test_links_within_the_folder_are_read_once(tmp_path):
    image(tmp_path / "cats" / "0.png")
    (tmp_path / "again").symlink_to(tmp_path / "cats")
    (tmp_path / "cats" / "round").symlink_to(tmp_path)
    os.symlink(tmp_path, tmp_path.parent / f"{tmp_path.name}.link")
    rows = source(f"pictures:{tmp_path}.link")
    assert [rows.id(i) for i in range(len(rows))] == ["cats/0.png"]
