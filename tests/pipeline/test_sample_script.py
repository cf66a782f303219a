"""sample.py: the files it leaves, and what it says to bad input."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zoo
from faults import full_disk
from PIL import Image
from tqdm import tqdm

import sdjax
from sdjax.checkpoints.lora.reading import hash_of
from sdjax.checkpoints.lora.writing import write_lora
from sdjax.cli.records import write_image
from sdjax.core.errors import run_or_exit
from sdjax.data import image_inputs
from sdjax.pipeline import execute

ROOT = Path(__file__).parents[2]
FAST = ("--steps=2", "--guidance_scale=2")
SIDE = zoo.SIDE
P = "--prompt=red heart"
TWO = (P, "--prompt=flag")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, folder, ours, tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit code, stdout, stderr), in this process and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    load = sdjax.load

    def loaded(source: object, mesh: object = None, **options: object) -> sdjax.Pipeline:
        there = source == str(folder) and mesh is None and options == {"dtype": "float32"}
        return ours if there else load(source, mesh=mesh, **options)

    monkeypatch.setattr(sdjax, "load", loaded)
    monkeypatch.setattr(execute, "default_batch_size", lambda *_: zoo.BATCH)  # whose programs are there

    def call(*flags: str, config: str = "configs/openmoji.py:tiny", checkpoint: object = folder):
        argv = ["sample.py", f"--config={ROOT / config}", f"--checkpoint={checkpoint}", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            run_or_exit(script.main)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_files_of_a_run(run, ours, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\n\n  flag: 旗 \n", encoding="utf-8")
    flags = ("--negative_prompt=ugly, bad", "--sampler=euler", "--schedule=karras", "--seed=5")
    code, out, err = run(f"--from_file={prompts}", *flags, *FAST, "--outdir=made")
    assert code == 0, err
    assert out.strip() == "made"
    assert names(tmp_path / "made") == ["00000.json", "00000.png", "00001.json", "00001.png", "grid.png"]
    how = {"sampler": "euler", "schedule": "karras", "seed": 5, "steps": 2, "guidance_scale": 2}
    expected = ours(["red heart", "flag: 旗"], "ugly, bad", **how)
    images = [Image.open(tmp_path / "made" / f"0000{i}.png") for i in range(2)]
    for image, wanted in zip(images, expected, strict=True):
        np.testing.assert_allclose(np.asarray(image) / 255.0, wanted, atol=0.51 / 255.0)
    assert images[1].text["parameters"] == (
        "flag: 旗\nNegative prompt: ugly, bad\n"
        "Steps: 2, Sampler: Euler, Schedule type: Karras, CFG scale: 2, Seed: 5, Image index: 1, Size: 16x16, "
        "Model: sd1"
    )
    cell = np.asarray(Image.open(tmp_path / "made" / "grid.png"))[:SIDE, SIDE:]
    np.testing.assert_array_equal(cell, np.asarray(images[1]))


def test_an_image_can_be_made_again_from_its_json(run, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    picture.save(tmp_path / "given.png")
    given = ("--init_image=given.png", "--mask=given.png", "--strength=0.6")
    assert run(*TWO, *given, "--sampler=euler_a", "--steps=5", "--outdir=all")[0] == 0
    record = records(tmp_path / "all")[1]
    flags = [f"--{key}={value}" for key, value in record.items() if value is not None and key in FLAGS]
    again = ("--num_images=2", f"--first_index={record['index']}", "--outdir=again")
    assert run(*again, *flags, checkpoint=record["checkpoint"])[0] == 0
    first, again = (pixels(tmp_path / name / "00001.png") for name in ("all", "again"))
    assert np.abs(first - again).max() <= 1


FLAGS = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "sampler", "schedule", "width", "height")
FLAGS += ("init_image", "mask", "strength")


def test_an_image_is_made_again_from_itself(run, tmp_path):
    how = (
        "--sampler=euler_a",
        "--steps=4",
        "--seed=9",
        "--rng=torch",
        "--hires=1.5",
        "--hires_strength=0.6",
        "--hires_steps=3",
    )
    assert run(*TWO, *how, "--negative_prompt=cat", "--outdir=all")[0] == 0
    code, _, err = run("--from_image=all/00001.png", "--outdir=again")
    assert code == 0, err
    assert names(tmp_path / "again") == ["00001.json", "00001.png"]
    first, again = (pixels(tmp_path / name / "00001.png") for name in ("all", "again"))
    assert first.shape == (24, 24, 3)
    assert np.abs(first - again).max() <= 1
    assert records(tmp_path / "again")[0]["torch_batch"] == 2
    assert run("--from_image=all/00001.png", "--seed=10", "--outdir=other")[0] == 0
    assert np.abs(first - pixels(tmp_path / "other" / "00001.png")).max() > 20


def test_an_image_of_another_program_is_made_with_flags_that_win(run, ours, tmp_path):
    """A JPEG of A1111's, whose sampler is not known here, and whose strength acts on no image."""
    text = "red heart\nNegative prompt: cat\nSteps: 2, Sampler: Restart, CFG scale: 2, Seed: 5, Size: 16x16, "
    text += "Denoising strength: 0.7"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "x.jpg", exif=exif)
    check_error(*run("--from_image=x.jpg"), "unknown sampler 'Restart' in x.jpg; choose one of: ddim")
    code, _, err = run("--from_image=x.jpg", "--sampler=euler", "--schedule=karras", "--outdir=made")
    assert code == 0, err
    how = {"sampler": "euler", "schedule": "karras", "seed": 5, "steps": 2, "guidance_scale": 2, "batch_size": 2}
    expected = ours(["red heart"], "cat", **how)[0]
    np.testing.assert_allclose(pixels(tmp_path / "made" / "00000.png") / 255.0, expected, atol=1.01 / 255.0)
    exif.get_ifd(0x8769)[0x9286] = text.removeprefix("red heart\n").replace("Restart", "Euler").encode()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "empty.jpg", exif=exif)
    code, _, err = run("--from_image=empty.jpg", "--outdir=empty")
    assert code == 0, err
    assert records(tmp_path / "empty")[0]["prompt"] == "", "an empty prompt is one, too"
    assert run("--from_image=x.jpg", "--grid=sampler=euler,lms", "--outdir=grid")[0] == 0
    assert [record["sampler"] for record in records(tmp_path / "grid")] == ["euler", "lms"]


def test_every_line_may_have_settings_of_its_own(run, ours, tmp_path):
    """Lines with as many network calls share a batch, whatever their samplers."""
    lines = "red heart --sampler heun --steps 3\n# not this\nflag --n ugly --steps 5\nflag --w 32\nflag --w 32\n"
    (tmp_path / "prompts.txt").write_text(lines)
    code, _, err = run("--from_file=prompts.txt", *FAST, "--outdir=made")
    assert code == 0, err
    assert "9/9" in err or "7/7" in err, "a bar counts network calls"
    made = records(tmp_path / "made")
    assert [record["sampler"] for record in made] == ["heun", "ddim", "ddim", "ddim"]
    assert [record["steps"] for record in made] == [3, 5, 2, 2]
    assert [record["width"] for record in made] == [16, 16, 32, 32]
    assert [record.get("negative_prompt") for record in made] == [None, "ugly", None, None]
    expected = ours("flag", "ugly", first_index=1, steps=5, guidance_scale=2, batch_size=2)[0]
    np.testing.assert_allclose(pixels(tmp_path / "made" / "00001.png") / 255.0, expected, atol=1.01 / 255.0)


def test_a_grid_has_every_combination_of_one_noise(run, ours, tmp_path):
    code, _, err = run(*TWO, "--grid=steps=1,2;sampler=euler,dpmpp_2m", "--outdir=g")
    assert code == 0, err
    cells = [(record["index"], record["steps"], record["sampler"]) for record in records(tmp_path / "g")]
    assert cells == [(i, s, name) for i in (0, 1) for s in (1, 2) for name in ("euler", "dpmpp_2m")]
    expected = ours("flag", first_index=1, steps=2, sampler="dpmpp_2m", guidance_scale=2.5, batch_size=2)[0]
    np.testing.assert_allclose(pixels(tmp_path / "g" / "00007.png") / 255.0, expected, atol=1.01 / 255.0)
    sheet = np.asarray(Image.open(tmp_path / "g" / "grid.png"))
    assert sheet.shape[0] > 4 * SIDE, "four rows: the prompts, and the steps of each"


def test_without_outdir_every_run_has_its_own_folder(run, tmp_path):
    for number in range(2):
        code, out, err = run(*TWO, *FAST)
        assert code == 0, err
        assert out.strip() == f"outputs/sd1/{number:04d}"
        assert len(names(tmp_path / out.strip())) == 5
        assert "2/2" in err, "a bar counts network calls"


THREE = (*TWO, "--prompt=smiling face", *FAST, "--outdir=o")


@pytest.fixture
def whole(run, tmp_path) -> dict[str, bytes]:
    """Files of a run of THREE, which are then removed."""
    assert run(*THREE)[0] == 0
    files = {name: (tmp_path / "o" / name).read_bytes() for name in names(tmp_path / "o")}
    shutil.rmtree(tmp_path / "o")
    return files


def test_the_same_command_completes_a_folder(run, whole, tmp_path, caplog):
    """Whole images are left as they are, also where their batch was not whole; a second time nothing is made."""
    (tmp_path / "o").mkdir()
    for name in ("00001.png", "00001.json", "00002.png"):
        (tmp_path / "o" / name).write_bytes(whole[name])
    (tmp_path / "o" / "00000.png").write_bytes(whole["00000.png"][:-40])
    kept = (tmp_path / "o" / "00001.png").stat()
    code, out, err = run(*THREE)
    assert (code, out) == (0, "o\n"), err
    assert "00000.png is damaged; it is 00000.png.damaged now, and is made anew" in caplog.text
    assert "2/2" in err, "network calls of one batch"
    assert (tmp_path / "o" / "00001.png").stat() == kept
    assert names(tmp_path / "o") == sorted([*whole, "00000.png.damaged"])
    assert np.abs(pixels(tmp_path / "o" / "00000.png") - decoded(whole["00000.png"])).max() <= 1
    for name in ("00002.json", "00001.json", "00000.json"):
        assert (tmp_path / "o" / name).read_bytes() == whole[name]
    before = {path: path.stat() for path in (tmp_path / "o").iterdir()}
    code, out, err = run(*THREE)
    assert (code, out) == (0, "o\n"), err
    assert {path: path.stat() for path in (tmp_path / "o").iterdir()} == before


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), int)


@pytest.mark.parametrize("room", [0, 700])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(room, run, whole, tmp_path):
    assert min(len(data) for data in whole.values()) < 700 < len(whole["00000.png"])
    with full_disk(room):
        code, out, err = run(*THREE)
    check_error(code, out, err, "cannot write o/?.*: File too large; make room and run the same command again")
    assert not names(tmp_path / "o")
    assert run(*THREE)[0] == 0
    assert {name: (tmp_path / "o" / name).read_bytes() for name in names(tmp_path / "o")} == whole


def test_the_time_left_is_that_of_sampling_alone(script):
    """The first of 25 calls is compiled, for a minute and a half: the bar begins after it."""
    bar = tqdm(file=io.StringIO())
    bar.start_t -= 100.0
    progress = script.advance(bar)
    for done in (1, 3):
        progress(done, 25)
    shown = bar.format_dict
    assert (shown["n"], shown["initial"], shown["total"], shown["prefix"]) == (3, 1, 25, "sampling: ")
    assert shown["elapsed"] < 50.0


def test_an_interrupt_keeps_what_is_finished(script, run, whole, tmp_path, monkeypatch, caplog):
    """At the first network call of the second batch: no other follows."""
    seen = []

    def advance(bar: object):
        def progress(done: int, total: int) -> None:
            seen.append((done, total))
            if done == 3:
                signal.raise_signal(signal.SIGINT)

        return progress

    with monkeypatch.context() as patch:
        patch.setattr(script, "advance", advance)
        code, out, _ = run(*THREE)
    assert (code, out, seen) == (130, "", [(1, 4), (2, 4), (3, 4)])
    assert "2 of 3 images are in o; --outdir o goes on" in caplog.text
    assert names(tmp_path / "o") == ["00000.json", "00000.png", "00001.json", "00001.png"]
    assert run(*THREE)[0] == 0
    assert {name: (tmp_path / "o" / name).read_bytes() for name in names(tmp_path / "o")} == whole


def test_outputs_that_cannot_be_made_are_refused_before_the_work(run, tmp_path):
    (tmp_path / "outputs").write_text("mine")
    check_error(*run(*TWO, *FAST), "cannot write outputs/sd1: Not a directory; choose another place")


def test_the_config_says_what_the_flags_do_not(run, tmp_path):
    code, _, err = run(*TWO, "--outdir=o", "--config.sample.steps=3", "--config.sample.sampler=lms")
    assert code == 0, err
    record = records(tmp_path / "o")[0]
    assert (record["steps"], record["sampler"], record["guidance_scale"]) == (3, "lms", 2.5)


def test_a_random_seed_is_drawn_once_said_and_recorded(run, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("red heart --seed 3\nflag --seed -1\n")
    flags = ("--from_file=prompts.txt", "--seed", "-1", "--grid=steps=1,2", "--guidance_scale=2")
    assert run(*flags, "--outdir=o")[0] == 0
    assert run("--prompt=flag", "--seed=-1", "--steps=1", "--guidance_scale=2", "--outdir=p")[0] == 0
    first, second, third, fourth, other = (r["seed"] for folder in "op" for r in records(tmp_path / folder))
    assert (first, second) == (3, 3)
    assert third == fourth != other
    assert caplog.text.count("drawn at random") == 2
    assert all(f"seed {seed}, drawn at random" in caplog.text for seed in (third, other))


def test_given_images_are_read_once(script, run, ours, tmp_path, monkeypatch):
    """A job's rows are prepared once: what checks a request is what is run."""
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "given.png")
    read, prepared = [], []
    read_image, prepare = image_inputs.read_image, ours.prepare
    monkeypatch.setattr(
        image_inputs, "read_image", lambda file, place="": read.append(str(file)) or read_image(file, place)
    )
    monkeypatch.setattr(ours, "prepare", lambda prompts, *a, **k: prepared.append(prompts) or prepare(prompts, *a, **k))
    code, _, err = run(*TWO, *FAST, "--init_image=given.png", "--outdir=o")
    assert code == 0, err
    assert read == ["given.png"] * 2
    assert prepared == [["red heart", "flag"]]


def corrupt(folder: Path, theirs: Path) -> Path:
    shutil.copytree(theirs, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


BAD = {
    "config key": ([P, "--config.sample.stepz=3"], "stepz"),
    "flag": ([P, "--guidance=3"], "guidance"),
    "argument": ([P, "heart"], "unexpected argument 'heart'"),
    "neither": ([], "sd1 needs a prompt; give one by --prompt"),
    "both": ([P, "--from_file=x"], "give one of --prompt, --from_file and --from_image"),
    "no file": (["--from_file=missing.txt"], "missing.txt: No such file"),
    "file without prompts": (["--from_file=bare.txt"], "sd1 needs a prompt; .* before the flags of a line"),
    "empty file": (["--from_file=empty.txt"], "empty.txt holds no prompt"),
    "binary file": (["--from_file=broken.png"], "broken.png: it is not UTF-8"),
    "sampler": ([P, "--sampler=nope"], "unknown sampler 'nope' in --sampler; choose one of: ddim"),
    "schedule": ([P, "--schedule=nope"], "unknown schedule 'nope' in --schedule; choose one of: ays"),
    "width": ([P, "--width=31"], "width 31 is not a multiple of 2.*nearest: 30, 32"),
    "steps": ([P, "--steps=0"], "steps 0 in --steps: choose an integer of at least 1"),
    "steps type": ([P, "--steps=many"], "steps 'many' in --steps: choose an integer of at least 1"),
    "num_images": ([P, "--num_images=0"], "num_images 0"),
    "strength": ([P, "--init_image=fine.png", "--strength=1.5"], r"strength 1\.5"),
    "no strength": ([P, "--init_image=fine.png", "--strength=0"], r"strength 0\.0: choose more than 0"),
    "strength of nothing": ([P, "--strength=0.5"], "strength 0.5 changes nothing without an init_image"),
    "feather of nothing": ([P, "--feather=2"], "feather 2.0 changes nothing without a mask"),
    "hires of nothing": ([P, "--hires_strength=0.3"], "hires_strength 0.3 changes nothing without hires"),
    "hires steps of nothing": ([P, "--hires_steps=3"], "hires_steps 3 changes nothing without hires"),
    "hires steps": (
        [P, "--hires=2", "--hires_steps=9", "--hires_strength=0.001"],
        "hires_steps 9 are 0.001 of 9000 steps, and the model was trained on 1000; lower hires_steps or raise "
        "hires_strength",
    ),
    "hires steps beyond": (
        [P, "--hires=2", "--hires_steps=3", "--hires_strength=5e-324"],
        "hires_steps 3 are .* of inf",
    ),
    "hires strength": (
        [P, "--hires=2", "--hires_strength=0", "--hires_steps=9"],
        "strength 0.0: choose more than 0, at most 1",
    ),
    "hires beyond": ([P, "--hires=1e308"], r"hires 1e\+308 of 16x16: at most 16384 pixels a side are made"),
    "hires of an image": ([P, "--hires=2", "--init_image=fine.png"], "hires 2 is for images from a prompt alone"),
    "size of an SDXL": ([P, "--crop=3,4"], r"crop \(3, 4\) changes nothing: sd1 is conditioned on prompt; "),
    "empty name": (["--from_image="], "cannot read the settings of "),
    "index": ([P, "--first_index=3000000000"], "first_index 3000000000 in --first_index: choose an integer of 0 to"),
    "huge": ([P, "--width=100000000"], "width 100000000 in --width: choose an integer of 1 to 16384"),
    "second line": (["--from_file=two.txt"], "nowhere.png"),
    "picture": ([P, "--init_image=broken.png"], "cannot read image broken.png"),
    "no image": ([P, "--init_image=nowhere.png"], "nowhere.png"),
    "mask": ([P, "--mask=fine.png"], "mask changes nothing without an init_image"),
    "mask of another size": (
        [P, "--mask=small.png", "--init_image=fine.png"],
        "the mask is 8x8 pixels and its .* 16x16",
    ),
    "grid": ([P, "--grid=steps=1;samplr=euler"], "unknown setting 'samplr' in --grid at character 9"),
    "grid value": ([P, "--grid=sampler=euler,nope"], "unknown sampler 'nope' in --grid at character 15"),
    "line's flag": (["--from_file=flags.txt"], "unknown flag '--stepz' in flags.txt line 2"),
    "pair": ([P, "--crop=3"], r"crop \[3\] in --crop: choose two integers of at least 0, vertical first"),
    "hires": ([P, "--hires=0.5", "--steps=1"], "hires 0.5 in --hires: choose a number of at least 1"),
    "no settings": (["--from_image=fine.png"], "fine.png does not say how it was made"),
    "depth": ([P, "--depth=fine.png"], "depth changes nothing: sd1 is conditioned on prompt; "),
    "refiner": ([P, "--refiner=missing"], "there is no file or folder 'missing'"),
    "embedding": ([P, "--embedding=missing.pt"], "there is no file or folder 'missing.pt'"),
    "vae": ([P, "--vae=missing.safetensors"], "there is no file or folder 'missing.safetensors'"),
    "existing": ([P, "--outdir=taken"], "taken/00000.png exists and is left as it is; choose another --outdir"),
    "of another command": (
        [P, "--outdir=done"],
        "done/00000.png exists, with prompt 'mine' where .* 'red heart'",
    ),
    "no place": ([P, "--outdir=/proc/sdjax"], "cannot write /proc/sdjax: No such file or directory; choose another"),
    "folder is a file": (
        [P, "--outdir=fine.png", "--steps=1"],
        "fine.png is a file, not a folder; choose another --outdir",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "bare.txt").write_text("red heart\n--seed 3\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "fine.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    (tmp_path / "two.txt").write_text("red heart\nflag --init_image nowhere.png\n")
    (tmp_path / "flags.txt").write_text("red heart --steps 3\nflag --stepz 3\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "00000.png").write_text("mine")
    write_image(tmp_path / "done" / "00000.png", np.zeros((SIDE, SIDE, 3), np.uint8), {"prompt": "mine"})
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    flags, message = BAD[case]
    check_error(*run(*flags), message)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_bad_checkpoints(run, folder, tmp_path):
    check_error(*run(P, checkpoint="missing"), "there is no file or folder 'missing'")
    check_error(*run(P, checkpoint=corrupt(tmp_path / "cut", folder)), "cut/unet/.*safetensors is truncated")
    check_error(*run(P, config="configs/nope.py"), "cannot read the config file .*nope.py: .*No such file")
    check_error(*run(P, config="configs/openmoji.py:huge"), "unknown variant 'huge'.*tiny")
    assert names(tmp_path / "cut")
    assert not (tmp_path / "outputs").exists()


def check_error(code: int, out: str, err: str, message: str) -> None:
    lines = [line for line in err.strip().splitlines() if "call/s" not in line]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1, err
    assert re.search(rf"^error: .*{message}", lines[0]), lines[0]


def test_as_a_command(folder, tmp_path):
    command = [sys.executable, str(ROOT / "sample.py"), f"--config={ROOT / 'configs/openmoji.py'}"]
    command += [f"--checkpoint={folder}", *FAST]
    made = subprocess.run([*command, P], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert names(tmp_path) == ["outputs/sd1/0000/00000.json", "outputs/sd1/0000/00000.png"]
    bad = subprocess.run([*command, P, "--sampler=nope"], cwd=tmp_path, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: unknown sampler 'nope'")
    assert bad.stderr.count("\n") == 1


def test_help(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "python sample.py --config" in out


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter"])
def test_commands_take_hints_by_flag_line_and_grid(kind, run, nets, adapters, tmp_path):
    """The same image by flags, by a line of a prompt file, by a cell of a grid, and by its own record."""
    colors = np.random.default_rng(5).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    for name, image in zip("ab", colors, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    sources, stem, mode = {
        "controlnet": ((nets("sd1"), nets("sd1", 1)), "control", " --control_mode prompt"),
        "t2i_adapter": ((adapters("full")[1], adapters("grey")[1]), "t2i", ""),
    }[kind]
    model = [f"--{kind}={source}" for source in sources]
    hints = f"--{stem}_image a.png --{stem}_image b.png{mode}"
    (tmp_path / "lines.txt").write_text(f"red heart {hints} --{stem}_scale 0.5,1 --steps 2\nflag {hints} --steps 2\n")
    for folder, flags in {
        "flags": ["--prompt=red heart", *hints.split(), f"--{stem}_scale=0.5,1", "--steps=2"],
        "lines": ["--from_file=lines.txt"],
        "grid": ["--prompt=red heart", *hints.split(), "--steps=2", f"--grid={stem}_scale=0,1"],
    }.items():
        code, _, err = run(*model, *flags, f"--outdir={folder}")
        assert code == 0, err
    code, _, err = run("--from_image=flags/00000.png", "--outdir=again")
    assert code == 0, err
    for other in ("lines", "again"):
        np.testing.assert_array_equal(pixels(tmp_path / "flags/00000.png"), pixels(tmp_path / f"{other}/00000.png"))
    assert np.abs(pixels(tmp_path / "grid/00000.png") - pixels(tmp_path / "grid/00001.png")).max() > 10
    assert pixels(tmp_path / "lines/00001.png").shape == (SIDE, SIDE, 3), "as large as the hint"


def test_loras(run, checkpoints, tmp_path, caplog):
    """A grid of strengths, a tag found in a folder, what a PNG says, and the image made again from it."""
    path, rng = tmp_path / "loras" / "style.safetensors", np.random.default_rng(0)
    shapes = {"down": (64, 2), "up": (2, 64), "scale": ()}
    layer = "unet/down_blocks_0_attentions_0/transformer_blocks_0/attn2/to_q"
    path.parent.mkdir()
    factors = {layer: {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}}
    write_lora(path, checkpoints("sd1"), factors, "kohya")
    lora = f"--lora={path}:0.5"
    assert run(P, lora, "--grid=lora_scale=0,0.5", "--outdir=grid", *FAST)[0] == 0
    assert "matched 1 of 1 layers" in caplog.text
    zero, half = (pixels(tmp_path / "grid" / f"0000{i}.png") for i in (0, 1))
    assert np.abs(zero - half).max() > 5
    found = records(tmp_path / "grid")
    assert [record.get("loras") for record in found] == [None, [["style", 0.5, 0.5, hash_of(path)]]]
    text = Image.open(tmp_path / "grid" / "00001.png").info["parameters"]
    assert text.startswith("red heart <lora:style:0.5:0.5>\n")
    assert f'Lora hashes: "style: {hash_of(path)}"' in text

    assert run("--from_image=grid/00001.png", "--outdir=again")[0] == 0
    np.testing.assert_array_equal(pixels(tmp_path / "again" / "00000.png"), half)
    (tmp_path / "prompts.txt").write_text("red heart <lora:style:0.5>\nred heart <lora:style:1> --lora_scale 0\n")
    assert run("--from_file=prompts.txt", f"--lora_dir={path.parent}", "--outdir=tags", *FAST)[0] == 0
    np.testing.assert_allclose(pixels(tmp_path / "tags" / "00000.png"), half, atol=1)
