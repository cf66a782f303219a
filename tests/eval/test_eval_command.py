"""python -m sdjax.eval on folders of images, with networks drawn at random under their published names."""

from __future__ import annotations

import json
import re
import sys

import jax
import numpy as np
import pytest
import torch
from faults import full_disk
from fidelity import fidelity
from PIL import Image
from torch_critics import TorchLPIPS, vgg16
from torch_reference import drawn

from configs import autoencoders
from sdjax.checkpoints import metric_weights
from sdjax.checkpoints.storage.safetensors import read_safetensors
from sdjax.core.errors import UserError
from sdjax.eval.__main__ import main
from sdjax.eval.comparison import read_statistics
from sdjax.eval.features import kept
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.autoencoder import make

COUNT = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real images, and sampled ones that are near their pairs."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("real", "fake"):
        (root / name).mkdir()
    for i in range(COUNT):
        picture = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((48, 48)))
        noisy = np.clip(picture + 20.0 * rng.standard_normal(picture.shape), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / "real" / f"{i:02}.png")
        Image.fromarray(noisy).save(root / "fake" / f"{i:02}.png")
    return root


@pytest.fixture
def run(monkeypatch, tmp_path, weights, capsys):
    """Runs the command; returns its figures and what it said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("SDJAX_WEIGHTS", str(weights))

    def command(*flags: object) -> tuple[dict[str, float], str]:
        target = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["eval", *map(str, flags), f"--output={target}"])
        main()
        return json.loads(target.read_text()), capsys.readouterr().err

    return command


def images_of(folder) -> torch.Tensor:
    files = sorted(folder.glob("*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)


SIZES = ("--kid_subset=5", "--splits=2", "--batch_size=4")


def test_metrics_of_two_folders(run, folders, networks):
    """The Inception Score is that of torch-fidelity's features, 1e-3, KID to 1e-6; LPIPS is PyTorch's."""
    names = "kid,inception_score,precision_recall,psnr,ssim,lpips"
    figures, said = run(f"--fake={folders}/fake", f"--real={folders}/real", f"--metrics={names}", *SIZES)
    (fake, logits), (real, _) = features(networks[0], folders)
    kid, isc = map(fidelity, ("metric_kid", "metric_isc"))
    expected = kid.kid_features_to_metric(fake, real, kid_subset_size=5, verbose=False)
    assert figures["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    expected = isc.isc_features_to_metric(logits, splits=2)
    assert figures["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    linear = [torch.from_numpy(np.asarray(v)) for _, v in sorted(read_safetensors(metric_weights.LINEAR).items())]
    vgg = vgg16()
    vgg.load_state_dict(torch.load(metric_weights.find("vgg16"), weights_only=True))
    scaled = [images_of(folders / name).float() / 127.5 - 1.0 for name in ("fake", "real")]
    with torch.no_grad():
        assert figures["lpips"] == pytest.approx(float(TorchLPIPS(vgg, linear)(*scaled).mean()), rel=1e-3)
    error = ((scaled[0] - scaled[1]).double() / 2.0).square().mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(float(-10.0 * error.log10().mean()), rel=1e-5)
    assert 0.3 < figures["ssim"] < 1.0
    assert {"precision", "recall"} <= set(figures)
    # The real images' features are kept.
    again, said = run(f"--fake={folders}/fake", f"--real={folders}/real", "--metrics=kid", *SIZES)
    assert again["kid"] == figures["kid"]
    assert "real:" not in said


@pytest.mark.slow
def test_frechet_distances_of_two_folders(run, folders, networks, tmp_path):
    """FID is that of torch-fidelity's features, 1e-3; statistics of others take the images' place.

    The trace of the root of A B is the nuclear norm of X Y^T, where A and B are the covariances of few rows X and Y.
    """
    figures, _ = run(f"--fake={folders}/fake", f"--real={folders}/real", "--metrics=fid,sfid", "--batch_size=4")
    (fake, _), (real, _) = features(networks[0], folders)
    rows = [(x - x.mean(0)).numpy().astype(np.float64) / np.sqrt(COUNT - 1) for x in (fake, real)]
    difference = (fake.mean(0) - real.mean(0)).double().square().sum().item()
    shared = np.linalg.norm(rows[0] @ rows[1].T, "nuc")
    expected = difference + sum(np.square(x).sum() for x in rows) - 2.0 * shared
    assert figures["fid"] == pytest.approx(expected, rel=1e-3)
    assert figures["sfid"] > 0.0
    np.savez(tmp_path / "stats.npz", mu=real.mean(0).double(), sigma=rows[1].T @ rows[1])
    again, _ = run(f"--fake={folders}/fake", f"--real={tmp_path}/stats.npz", "--metrics=fid", "--batch_size=4")
    assert again["fid"] == pytest.approx(figures["fid"], rel=1e-3)
    with pytest.raises(UserError, match=r"stats\.npz holds statistics, and this metric needs the images"):
        run(f"--fake={folders}/fake", f"--real={tmp_path}/stats.npz", "--metrics=kid")


def features(theirs, folders):
    """torch-fidelity's features and logits of the sampled images, and of the real ones."""
    with torch.no_grad():
        return tuple(theirs(images_of(folders / name)) for name in ("fake", "real"))


@pytest.mark.slow
def test_an_autoencoder_with_a_codebook(run, folders, networks, tmp_path):
    config = autoencoders.get_config("vq_f4_tiny")
    config.data.source = f"pictures:{folders}/real"
    config.data.size = 48
    config.task.perceptual_weight = 0.0
    task = make(config, make_mesh({"data": -1}))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    task.export(params, tmp_path / "export")
    figures, _ = run(f"--autoencoder={tmp_path}/export", f"--real={folders}/real", "--batch_size=4")
    assert set(figures) == {"rfid", "psnr", "ssim", "lpips", "codes_used", "perplexity"}
    assert 1 / 16 <= figures["codes_used"] <= 1.0
    assert 1.0 <= figures["perplexity"] <= 16 * figures["codes_used"] + 1e-3
    config.model.autoencoder.update(variant="vq_f8", channels=(8,) * 6)
    config.task.crop = config.data.size = 64
    other = make(config, make_mesh({"data": -1}))
    other.export(drawn(jax.eval_shape(other.init, jax.random.key(0))), tmp_path / "other")
    with pytest.raises(UserError, match="images of 48x48 do not suit"):
        run(f"--autoencoder={tmp_path}/other", f"--real={folders}/real")


def test_a_missing_network_is_named_and_the_rest_computed(run, folders, monkeypatch, tmp_path):
    monkeypatch.setenv("SDJAX_WEIGHTS", str(tmp_path / "nothing"))
    figures, said = run(f"--fake={folders}/fake", f"--real={folders}/real", "--metrics=fid,psnr,lpips")
    assert set(figures) == {"psnr"}
    assert "fid is left out: no weights of Inception v3" in said
    assert "pt_inception-2015-12-05-6726825d.pth" in said
    assert "lpips is left out: no weights of VGG16" in said
    assert str(tmp_path / "nothing") in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--real={0}/real"], "one of --fake, --autoencoder, --pixels, --drawbench, --sweep and --config is required"),
        (["--fake={0}/fake"], "--real is required"),
        (["--config=configs/controlnet.py:openmoji"], "--checkpoint is required"),
        (["--fake={0}/fake", "--real={0}/real", "--metrics=fidd"], "unknown metric 'fidd' in --metrics; choose"),
        (["--fake={0}/nowhere", "--real={0}/real"], "/nowhere does not exist"),
        (["--fake={0}/fake", "--real={0}/real", "--limit=3", "--metrics=psnr"], "6 sampled and 3 real images"),
        (["--fake={0}/fake", "--real={0}/none.npz"], "cannot read"),
    ],
)
def test_bad_flags_are_one_line(run, folders, flags, message):
    with pytest.raises(UserError) as error:
        run(*(flag.format(folders) for flag in flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_statistics_of_others(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.ones(3), sigma_s=np.eye(3))
    found = read_statistics(tmp_path / "adm.npz")
    assert set(found) == {"fid", "sfid"}
    assert found["sfid"].mean.shape == (3,)
    np.savez(tmp_path / "empty.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="holds neither mu and sigma nor mu_s and sigma_s"):
        read_statistics(tmp_path / "empty.npz")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("/proc/sdjax/figures.json", "cannot write /proc/sdjax: No such file or directory; choose another place"),
        ("/tmp", "cannot write /tmp: it is a folder; name a file"),
    ],
)
def test_the_output_is_checked_before_the_work(output, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval", "--fake=nowhere", "--real=nowhere", f"--output={output}"])
    with pytest.raises(UserError, match=said):
        main()


def test_features_that_cannot_be_kept_are_still_used(tmp_path, caplog):
    """A full cache ends no evaluation."""
    for nbytes, said in ((100, "features are not kept: cannot write .*: File too large"), (2**20, "")):
        with full_disk(nbytes):
            made = kept("key", lambda: {"pooled": np.ones(1000)}, tmp_path)
        np.testing.assert_array_equal(made["pooled"], np.ones(1000))
        assert re.search(said, caplog.text)
        assert len(list(tmp_path.iterdir())) == (not said)
        caplog.clear()


def test_damaged_features_are_made_anew(tmp_path, caplog):
    """Cut at every hundredth byte, or with some other content, a cache's file is named and replaced."""
    wanted = np.arange(50.0)
    kept("key", lambda: {"pooled": wanted}, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (*(whole[:end] for end in range(0, len(whole), 100)), b"PK" + bytes(200), b"text"):
        file.write_bytes(content)
        np.testing.assert_array_equal(kept("key", lambda: {"pooled": wanted}, tmp_path)["pooled"], wanted)
        assert caplog.messages[-1].startswith(f"{file} is damaged, and is made anew")
        assert file.read_bytes() == whole
        caplog.clear()
