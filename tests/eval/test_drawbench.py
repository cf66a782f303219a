"""DrawBench of a user's list: what is read, sampled, scored and shown, and what is said of a list that is none."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import zoo
from PIL import Image

import sdjax
from sdjax.checkpoints.clip_pair import read_clip
from sdjax.core.errors import UserError
from sdjax.data.images import read_image, to_uint8
from sdjax.eval import __main__ as command
from sdjax.eval import drawbench
from sdjax.eval.drawbench import Prompt, file_name, read_prompts

LIST = (
    '\ufeffPrompts,Category,Links\r\n"a ""red"", heart",Colors,x\r\n\r\n'
    "a cat, Gary Marcus et al. ,\r\nphoto of a cat,Colors,\r\n"
)
PROMPTS = [
    Prompt('a "red", heart', "Colors"),
    Prompt("a cat", "Gary Marcus et al."),
    Prompt("photo of a cat", "Colors"),
]
SAMPLES = 2


def written(tmp_path, text: str):
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_list_is_read_as_spreadsheets_write_it(tmp_path):
    """Quotes, blank lines, further columns; and it is said that these are not the 200 prompts."""
    said = []
    path = written(tmp_path, LIST)
    assert read_prompts(path, said.append) == PROMPTS
    assert said == [f"{path} has 3 prompts in 2 categories; DrawBench has 200 in 11"]
    whole = "".join(f"prompt {i},category {i % 11}\n" for i in range(200))
    said.clear()
    assert len(read_prompts(written(tmp_path, f"Prompts,Category\n{whole}"), said.append)) == 200
    assert said == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,kind\na,b\n",
            "has no column Prompts; its columns are prompt, kind, and DrawBench's Prompts, Category",
        ),
        ("Prompts\na\n", "has no column Category; its columns are Prompts, and"),
        ("", "has no column Prompts; its columns are none, and"),
        ("Prompts,Category\na,b\nc\n", "list.csv, line 3: there is no Category"),
        ("Prompts,Category\n,b\n", "list.csv, line 2: there is no Prompts"),
        ("Prompts,Category\n", "list.csv has no prompts"),
        (f"Prompts,Category\n{'a' * 140_000},b\n", "is no CSV file: field larger than field limit"),
    ],
)
def test_another_list_is_one_line(text, message, tmp_path):
    with pytest.raises(UserError) as error:
        read_prompts(written(tmp_path, text), print)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def run(model_folder, clip_folder, tmp_path_factory):
    """run(*flags): figures of the command on the list; its folder."""
    root = tmp_path_factory.mktemp("drawbench")
    path = written(root, LIST)

    def command_of(*flags: str) -> dict:
        common = [f"--drawbench={path}", f"--model={model_folder}", f"--clip={clip_folder}", f"--folder={root / 'out'}"]
        common += [f"--samples={SAMPLES}", f"--batch_size={zoo.BATCH}", f"--steps={zoo.STEPS}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["eval", *common, f"--output={root / 'figures.json'}", *flags])
            command.main()
        return json.loads((root / "figures.json").read_text())

    return command_of, root / "out"


def test_samples_sheets_and_scores(run, model_folder, clip_folder, monkeypatch):
    """Images are those of a call, sheets have them in rows of a prompt, scores are those of their own prompts.

    Embeddings are taken without their signs: scores of a random CLIP would be held at zero, all of them.
    """
    embed = {name: getattr(drawbench, name) for name in ("image_embeddings", "caption_embeddings")}
    for name, function in embed.items():
        monkeypatch.setattr(drawbench, name, lambda *given, function=function: np.abs(function(*given)))
    command_of, out = run
    figures = command_of()
    texts = [prompt.text for prompt in PROMPTS for _ in range(SAMPLES)]
    images = [read_image(out / "model" / f"{i:05d}.png") for i in range(len(texts))]
    pipe = sdjax.load(model_folder)
    call = pipe([p.text for p in PROMPTS], num_images=2, seed=0, steps=zoo.STEPS, batch_size=zoo.BATCH, syntax="plain")
    np.testing.assert_array_equal(images, to_uint8(call))
    assert len({image.tobytes() for image in images}) == len(images)
    assert [json.loads(path.read_text())["prompt"] for path in sorted((out / "model").glob("*.json"))] == texts
    rows = {"colors": [0, 1, 4, 5], "gary_marcus_et_al": [2, 3], "": range(6)}
    for name, own in rows.items():
        pair = read_clip(clip_folder)
        image = np.abs(embed["image_embeddings"](pair, [{"image": images[i]} for i in own], zoo.BATCH))
        text = np.abs(embed["caption_embeddings"](pair, [texts[i] for i in own], zoo.BATCH))
        expected = 100.0 * np.mean([a @ b for a, b in zip(image, text, strict=True)])
        assert figures["_".join(["model_clip_score", name]).strip("_")] == pytest.approx(expected, abs=0.006)
        assert expected > 10.0
    sheet = np.asarray(Image.open(out / "sheets" / "model" / "colors.png"))
    side = images[0].shape[0]
    np.testing.assert_array_equal(sheet[side:, :side], images[4])
    np.testing.assert_array_equal(sheet[:side, side:], images[1])


def test_a_stopped_run_goes_on(run):
    """What is there stays, what is missing is made anew, the same; other settings are refused."""
    command_of, out = run
    command_of()
    first, last = out / "model" / "00000.png", out / "model" / "00005.png"
    before, kept = last.read_bytes(), first.stat().st_mtime_ns
    last.unlink()
    command_of()
    assert last.read_bytes() == before
    assert first.stat().st_mtime_ns == kept
    with pytest.raises(UserError, match=r"00000\.png is an image of another prompt, model or setting; choose another"):
        command_of("--seed=3")


def test_a_model_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval", f"--drawbench={written(tmp_path, LIST)}"])
    with pytest.raises(UserError, match="--model is required"):
        command.main()


def test_names_of_files():
    assert file_name("Gary Marcus et al.") == "gary_marcus_et_al"
    assert file_name("../DALL-E") == "dall_e"
    assert file_name("///") == "_"


def test_a_second_model_makes_a_page(run, model_folder):
    command_of, out = run
    figures = command_of(f"--against={model_folder}")
    assert figures["against_clip_score"] == figures["model_clip_score"]
    page = (out / "side_by_side.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [pair["prompt"] for pair in data["pairs"]] == [prompt.text for prompt in PROMPTS]
    assert data["pairs"][1]["sides"] == [[f"{name}/{i:05d}.png" for i in (2, 3)] for name in ("model", "against")]
