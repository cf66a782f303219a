"""Metrics of images, autoencoders and checkpoints. Figures are printed, and written as JSON with --output FILE.

    python -m sdjax.eval --fake SAMPLES --real SOURCE [--metrics fid,kid] [--size 256]
    python -m sdjax.eval --fake SAMPLES --metrics clip_score [--clip FOLDER]
    python -m sdjax.eval --autoencoder FOLDER --real SOURCE [--size 256]
    python -m sdjax.eval --pixels FOLDER --real SOURCE [--steps 50]
    python -m sdjax.eval --config configs/openmoji.py [--checkpoint FOLDER]
    python -m sdjax.eval --config configs/controlnet.py:openmoji --checkpoint FOLDER
    python -m sdjax.eval --config configs/clip.py [--checkpoint FOLDER]
    python -m sdjax.eval --drawbench FILE.csv --model MODEL [--against OTHER] [--folder OUT]
    python -m sdjax.eval --sweep 1,1.5,2,3 --model MODEL --real SOURCE [--size 256] [--folder OUT]

SAMPLES is a folder of images. SOURCE is a folder of images, a data source as configs name it (openmoji:held_out,
tfds:NAME, webdataset:PATTERN ...), or an .npz file of statistics (pytorch-fid's, guided-diffusion's). Metrics: fid,
sfid, kid, inception_score, precision_recall; in pairs, by order of names: psnr, ssim, lpips; and clip_score, of the
prompts in the JSON files that sample.py writes beside images, by a CLIP of the Hub's layout. An autoencoder is judged
by all pairs and its reconstructions' FID; one with a codebook also by how much of it is used; a model of pixels by bits
per dimension over --steps of its timesteps, with its learned variance, where it has one, and with the fixed ones; a
ControlNet by how well its images' edges agree with their hints (F1), with it and without it; a CLIP by retrieval
between held-out images and captions.
DrawBench is the user's copy of the list, with the columns Prompts and Category; --samples of each prompt (8), a sheet
and the CLIP score of each category, and of two models a page to compare them blindly, OUT/side_by_side.html. A sweep
samples captions of SOURCE, one an image, at each guidance scale: FID and CLIP score, and a plot of both,
OUT/sweep.svg. --seed and --steps are the samples' in both; the same command goes on where it was stopped.
Networks that judge need their published weights; what a missing file is called, and where it was looked for, is said,
and the rest is computed. --batch_size is a device's, --kid_subset and --splits are KID's and the Inception Score's,
--limit takes some images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from sdjax.checkpoints.checkpoint import CONTROLNET
from sdjax.checkpoints.clip_pair import find_clip, missing_clip, read_clip
from sdjax.checkpoints.open import within_workdir
from sdjax.core.compilation import keep_compiled
from sdjax.core.errors import UserError, run_or_exit
from sdjax.core.files import check_target, write_text
from sdjax.core.flags import parse_flags
from sdjax.core.scripts import require
from sdjax.data.sources.base import Images
from sdjax.data.sources.folder import FolderSource, plain_images
from sdjax.data.sources.open import source
from sdjax.data.sources.rules import ANY
from sdjax.eval.bits import bits
from sdjax.eval.caption_retrieval import evaluate_clip
from sdjax.eval.checkpoint import evaluate
from sdjax.eval.comparison import METRICS, MetricOptions, Real, chosen, compare, read_statistics
from sdjax.eval.drawbench import drawbench, read_prompts
from sdjax.eval.edges import evaluate_control
from sdjax.eval.first_stage import judge
from sdjax.eval.samples import Sampling
from sdjax.eval.subset import Evenly
from sdjax.eval.sweep import drawn_captions, parse_scales, sweep

SAMPLED = ("drawbench", "sweep")
TEXTS = ("fake", "real", "autoencoder", "pixels", "checkpoint", "metrics", "clip", "output")
TEXTS += (*SAMPLED, "model", "against", "folder")
CLIP_SCORE = "clip_score"
INTEGERS: dict[str, Any] = {"size": None, "batch_size": 16, "steps": None, "limit": None}
INTEGERS |= {"kid_subset": 1000, "splits": 10, "samples": 8}
BITS_STEPS = 50


def main() -> None:
    """Reads the command line, evaluates and prints."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    for name in TEXTS:
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name, default in INTEGERS.items():
        flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "", lower_bound=0, flag_values=values)
    parse_flags(values, sys.argv, __doc__)
    output = Path(values["output"].value).expanduser() if values["output"].value else None
    if output is not None:
        check_target(output)
    keep_compiled()
    figures = _figures(values)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if output is not None:
        write_text(output, json.dumps(figures, indent=2) + "\n")


def _figures(values: flags.FlagValues) -> dict[str, Any]:
    flag: dict[str, Any] = {name: values[name].value for name in (*TEXTS, *INTEGERS, "seed")}
    if config := values["config"].value:
        if CONTROLNET in config.model:
            return evaluate_control(config, require(values, "checkpoint"))
        checkpoint = flag["checkpoint"] or config.sample.checkpoint
        if config.task.name == "contrastive":
            return evaluate_clip(config, checkpoint)
        return evaluate(config, checkpoint, flag["clip"] or "")
    judged = [name for name in ("fake", "autoencoder", "pixels", *SAMPLED) if flag[name]]
    if len(judged) != 1:
        raise UserError(
            "one of --fake, --autoencoder, --pixels, --drawbench, --sweep and --config is required; given: "
            f"{len(judged)}"
        )
    if judged[0] in SAMPLED:
        require(values, "model")
        return (_drawbench if flag["drawbench"] else _sweep)(flag)
    clip = Path(flag["clip"]) if flag["clip"] else None
    options = MetricOptions(flag["size"], flag["batch_size"], flag["kid_subset"], flag["splits"], clip=clip)
    metrics = chosen(flag["metrics"] or (CLIP_SCORE if clip and not flag["real"] else ""))
    if clip is not None and CLIP_SCORE not in metrics:
        metrics.append(CLIP_SCORE)
    if flag["fake"] and all(METRICS[name].alone for name in metrics):
        return compare(_sampled(flag["fake"]), Real("", None, {}), metrics, options, _say)
    real = _real(require(values, "real"), flag["limit"])
    if flag["autoencoder"]:
        return judge(within_workdir(Path(flag["autoencoder"])), real, options, _say)
    if flag["pixels"]:
        if real.images is None:
            raise UserError(f"{real.name} holds statistics; bits are those of images")
        steps = flag["steps"] or BITS_STEPS
        return bits(within_workdir(Path(flag["pixels"])), real.images, steps, flag["batch_size"])
    return compare(_sampled(flag["fake"]), real, metrics, options, _say)


def _drawbench(flag: dict[str, Any]) -> dict[str, Any]:
    prompts = read_prompts(Path(flag["drawbench"]).expanduser(), _say)
    place = find_clip(flag["clip"])
    if place is None:
        _say(f"{CLIP_SCORE} is left out: {missing_clip()}")
    models = {"model": flag["model"]} | ({"against": flag["against"]} if flag["against"] else {})
    clip = None if place is None else read_clip(place)
    return drawbench(prompts, models, _folder(flag), _sampling(flag, flag["samples"]), clip)


def _sweep(flag: dict[str, Any]) -> dict[str, Any]:
    scales, name = parse_scales(flag["sweep"]), flag["real"]
    if not name:
        raise UserError("--real is required: images with captions to generate from")
    split = name.removeprefix("openmoji:")
    images = source("openmoji", split) if split != name else source(name)
    options = MetricOptions(flag["size"], flag["batch_size"], clip=Path(flag["clip"]) if flag["clip"] else None)
    captions = drawn_captions(images, flag["limit"], flag["seed"])
    real = Real(name, images, {})
    return sweep(flag["model"], real, captions, scales, _folder(flag), _sampling(flag, 1), options, _say)


def _folder(flag: dict[str, Any]) -> Path:
    """The folder for samples."""
    kind = next(name for name in SAMPLED if flag[name])
    return Path(flag["folder"] or f"outputs/{kind}").expanduser()


def _sampling(flag: dict[str, Any], images: int) -> Sampling:
    return Sampling(images, flag["seed"], flag["batch_size"], flag["steps"])


def _sampled(folder: str) -> FolderSource:
    """A folder of images, without the sheet of all of them that sample.py puts beside."""
    return plain_images(Path(folder).expanduser(), without=("grid.png",))


def _real(name: str, limit: int | None) -> Real:
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return Real(name, None, read_statistics(path))
    if path.is_dir():
        images: Images = plain_images(path)
    elif name.startswith("openmoji:"):
        images = source("openmoji", name.partition(":")[2], rules=ANY)
    else:
        images = source(name, rules=ANY)
    return Real(f"{name} {limit}", images if limit is None else Evenly(images, limit), {})


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run_or_exit(main)
