"""Models of the Hub, from a stand-in on loopback that answers as the Hub's API does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import assert_same, tiny_checkpoint, tiny_if, write_tokenizer
from torch_reference import drawn

from sdjax.checkpoints.checkpoint import ALL_FORMATS, Checkpoint, Component
from sdjax.checkpoints.families import FAMILIES
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint, write_component
from sdjax.checkpoints.ldm_config import config_beside
from sdjax.checkpoints.open import read_vae, resolve
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.data.text.t5_tokenizer import load_t5_tokenizer
from sdjax.data.text.tokenizer_training import train_unigrams, train_word_pieces
from sdjax.data.text.word_pieces import load_word_pieces
from sdjax.models.autoencoder import VARIANTS
from sdjax.models.bert import BertConfig
from sdjax.models.unet import UNetConfig
from sdjax.tasks.variants import sizes_of

SHA = "0123456789abcdef0123456789abcdef01234567"
STEM = "diffusion_pytorch_model"


class Hub:
    """Serves the files below a folder as repositories `owner/name`, one revision each."""

    def __init__(self, root: Path) -> None:
        hub = self
        self.root, self.gated, self.served = root, {"acme/gated"}, list[str]()
        self.sha, self.etag, self.oid, self.listed = SHA, "", "", list[str]()  # of hostile ones

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, True)

            def do_HEAD(self) -> None:
                hub.answer(self, False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, to: BaseHTTPRequestHandler, body: bool) -> None:
        parts = to.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repo in self.gated:
            return self.send(to, 403, b"", {"X-Error-Code": "GatedRepo"}, body)
        folder = self.root / repo
        if not folder.is_dir():
            return self.send(to, 404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", SHA):
            return self.send(to, 404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if api:
            return self.send(to, 200, json.dumps(self.listing(folder, rest[:1])).encode(), {}, body)
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.send(to, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha}, body)
        if body:
            self.served.append("/".join(rest[2:]))
        content = file.read_bytes()
        digest = hashlib.sha1(content).hexdigest()
        etag = self.etag or f'"{digest}"'
        return self.send(to, 200, content, {"ETag": etag, "X-Repo-Commit": self.sha}, body)

    def listing(self, folder: Path, kind: list[str]) -> object:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        names += self.listed if kind == ["tree"] else []
        files += files[: len(names) - len(files)]
        if kind == ["tree"]:
            oids = [hashlib.sha1(path.read_bytes()).hexdigest() for path in files]
            sizes = [path.stat().st_size for path in files]
            return [
                {"type": "file", "path": name, "size": size, "oid": self.oid or oid}
                for name, size, oid in zip(names, sizes, oids, strict=True)
            ]
        siblings = [{"rfilename": name} for name in (*names, *self.listed)]
        return {"id": "/".join(folder.parts[-2:]), "sha": self.sha, "siblings": siblings}

    @staticmethod
    def send(to: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        to.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            to.send_header(name, value)
        to.end_headers()
        if body:
            to.wfile.write(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tokenizer = tmp_path_factory.mktemp("source") / "tokenizer"
    return tiny_checkpoint("sdxl", tokenizer, write_tokenizer(tokenizer))


@pytest.fixture
def hub(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served" / "acme" / "xl"
    write_checkpoint(folder, checkpoint)
    write_checkpoint(tmp_path / "half", checkpoint, "float16")
    for name, stem in (("unet", STEM), ("vae", STEM), ("text_encoder", "model"), ("text_encoder_2", "model")):
        shutil.copy(tmp_path / "half" / name / f"{stem}.safetensors", folder / name / f"{stem}.fp16.safetensors")
        (folder / name / f"{stem}.bin").write_bytes(b"a pickle")
        (folder / name / "model.onnx").write_bytes(b"another format")
    (folder / "xl_base.safetensors").write_bytes(b"all in one file")
    (folder / "README.md").write_text("a card")
    hub = Hub(tmp_path / "served")
    yield hub
    hub.stop()


def weights(names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith((".json", ".txt"))}


def test_hub_download_is_cached(checkpoint, hub: Hub, tmp_path: Path):
    cache = tmp_path / "cache"
    (hub.root / "acme" / "xl" / "tokenizer" / "added_tokens.json").write_text("{}")
    first = resolve("acme/xl", cache_dir=cache, endpoint=hub.url)
    assert (first / "tokenizer" / "added_tokens.json").is_file()
    assert_same(checkpoint, read_folder(first))
    expected = {f"{name}/{STEM}.safetensors" for name in ("unet", "vae")}
    expected |= {f"{name}/model.safetensors" for name in ("text_encoder", "text_encoder_2")}
    assert weights(hub.served) == expected, "only what is read, in one precision"
    hub.served.clear()
    assert resolve("acme/xl", cache_dir=cache, endpoint=hub.url) == first
    assert hub.served == []
    hub.stop()
    assert resolve("acme/xl", cache_dir=cache, endpoint=hub.url) == first
    with pytest.raises(
        UserError, match="acme/xl is neither a local path nor in the cache, and the Hub cannot be reached"
    ) as error:
        resolve("acme/xl", cache_dir=tmp_path / "other", endpoint=hub.url)
    assert "\n" not in str(error.value)


def test_listed_controlnets_are_downloaded(hub: Hub, tmp_path: Path):
    """With their model, and alone where nothing else is wanted."""
    folder = hub.root / "acme" / "xl"
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "controlnet": ["diffusers", "ControlNetModel"]}))
    (folder / "controlnet").mkdir()
    (folder / "controlnet" / "config.json").write_text("{}")
    (folder / "controlnet" / f"{STEM}.safetensors").write_bytes(b"weights")
    resolve("acme/xl", component="controlnet", cache_dir=tmp_path / "alone", endpoint=hub.url)
    assert weights(hub.served) == {f"controlnet/{STEM}.safetensors"}
    whole = resolve("acme/xl", cache_dir=tmp_path / "whole", endpoint=hub.url)
    assert {path.parent.name for path in whole.rglob(f"{STEM}.safetensors")} == {"controlnet", "unet", "vae"}


def test_half_precision_is_taken_when_asked_for(checkpoint, hub: Hub, tmp_path: Path):
    folder = resolve("acme/xl", variant="fp16", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert len(weights(hub.served)) == 4
    assert all(".fp16." in name for name in weights(hub.served))
    assert read_folder(folder, None).components["unet"].params["conv_in"]["kernel"].dtype == "float16"
    hub.stop()  # what was downloaded serves whoever asks for less
    assert resolve("acme/xl", cache_dir=tmp_path / "cache", endpoint=hub.url) == folder


def test_deepfloyd_if_comes_without_its_safety_checker(hub: Hub, tmp_path: Path):
    """With T5, its tokenizer, and the schedule of the small image's noise."""
    (tmp_path / "captions").mkdir()
    train_unigrams(["a red heart"], tmp_path / "captions", 60)
    made, folder = tiny_if("if_ii", tmp_path / "captions"), hub.root / "acme" / "if"
    write_checkpoint(folder, made)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["deepfloyd_if", "IFSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"a network that is not here")
    found = resolve("acme/if", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert weights(hub.served) == {f"unet/{STEM}.safetensors", "text_encoder/model.safetensors"}
    assert_same(made, read_folder(found))
    assert read_folder(found).low_res_scheduler == made.low_res_scheduler
    assert load_t5_tokenizer(found / "tokenizer", 8).vocab_size > 3


def test_models_of_the_ldm_paper_come_whole(hub: Hub, tmp_path: Path):
    """With their first stage, the network of their words and its vocabulary."""
    unet = UNetConfig((32, 64), (0, 1), 1, (2, 2), 16, in_channels=3, out_channels=3, layers_per_block=1)
    small = {"channels": (8, 8, 16), "layers_per_block": 1, "groups": 4, "codes": 64}
    sizes = {"unet": unet, "vae": sizes_of({"variant": "vq_f4", **small}, VARIANTS, "")}
    sizes |= {"bert": BertConfig(vocab_size=80, width=16, layers=1, max_length=11)}
    components = {name: Component(size, drawn(ALL_FORMATS[name].shapes(size))) for name, size in sizes.items()}
    train_word_pieces(["a red heart"], tmp_path / "words", 60)
    scheduler = FAMILIES["text_f4"].scheduler
    folder = tmp_path / "served" / "acme" / "words"
    tokenizers = {"bert": tmp_path / "words"}
    made = Checkpoint(components=components, scheduler=scheduler, conditioning="text_bert", tokenizers=tokenizers)
    write_checkpoint(folder, made)
    (folder / "vqvae" / "model.onnx").write_bytes(b"another format")
    found = resolve("acme/words", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert weights(hub.served) == {f"unet/{STEM}.safetensors", f"vqvae/{STEM}.safetensors", "bert/model.safetensors"}
    read = read_folder(found)
    assert load_word_pieces(read.tokenizers["bert"], 11).encode(["a red heart"]).shape == (1, 11)
    for name, component in components.items():
        for key, leaf in flatten(component.params).items():
            np.testing.assert_array_equal(flatten(read.components[name].params)[key], leaf, err_msg=key)


def test_shards_come_with_their_index(checkpoint, hub: Hub, tmp_path: Path):
    unet = hub.root / "acme" / "xl" / "unet"
    tensors = json.loads((unet / f"{STEM}.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    (unet / f"{STEM}.safetensors").rename(unet / f"{STEM}-00001-of-00001.safetensors")
    names = dict.fromkeys(set(tensors) - {"__metadata__"}, f"{STEM}-00001-of-00001.safetensors")
    (unet / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same(checkpoint, read_folder(resolve("acme/xl", cache_dir=tmp_path / "cache", endpoint=hub.url)))


def test_a_download_that_broke_off_is_no_model(hub: Hub, tmp_path: Path):
    folder = resolve("acme/xl", cache_dir=tmp_path / "cache", endpoint=hub.url)
    (folder / "vae" / f"{STEM}.safetensors").unlink()
    hub.stop()
    with pytest.raises(UserError, match="nor in the cache, and the Hub cannot be reached"):
        resolve("acme/xl", cache_dir=tmp_path / "cache", endpoint=hub.url)


def test_one_file_of_a_repository(hub: Hub, tmp_path: Path):
    cache = tmp_path / "cache"
    (hub.root / "acme" / "xl" / "xl_base.yaml").write_text("model: {params: {parameterization: v}}")
    path = resolve("acme/xl/xl_base.safetensors@v1", cache_dir=cache, endpoint=hub.url)
    assert path.read_bytes() == b"all in one file"
    assert config_beside(path).prediction == "v_prediction"
    assert weights(hub.served) == {"xl_base.safetensors", "xl_base.yaml"}
    hub.stop()
    assert resolve("acme/xl/xl_base.safetensors@v1", cache_dir=cache, endpoint=hub.url) == path
    with pytest.raises(UserError, match=r"acme/xl/other\.ckpt is neither a local path nor in the cache"):
        resolve("acme/xl/other.ckpt", cache_dir=cache, endpoint=hub.url)


def test_an_autoencoder_of_the_hub(checkpoint, hub: Hub, tmp_path: Path):
    """Alone in a repository, a file there with its config.json, or that of a model, of which nothing else comes."""
    cache, vae = tmp_path / "cache", checkpoint.components["vae"]
    write_component(hub.root / "acme" / "vae", "vae", vae)
    (hub.root / "acme" / "vae" / "sdxl_vae.safetensors").write_bytes(b"the same in the original naming")
    sources = {"acme/vae": f"{STEM}.safetensors", f"acme/vae/{STEM}.safetensors": f"{STEM}.safetensors"}
    for source, file in {**sources, "acme/xl": f"vae/{STEM}.safetensors"}.items():
        hub.served.clear()
        path = resolve(source, component="vae", cache_dir=cache / source.replace("/", "-"), endpoint=hub.url)
        assert weights(hub.served) == {file}
        found, scale = read_vae(path)
        assert (found.config, scale) == (vae.config, 0.13025)
        np.testing.assert_array_equal(found.params["quant_conv"]["kernel"], vae.params["quant_conv"]["kernel"])
    with pytest.raises(UserError, match=r"acme/vae has no model_index\.json"):
        resolve("acme/vae", cache_dir=cache, endpoint=hub.url)
    hub.stop()
    assert resolve("acme/vae", component="vae", cache_dir=cache / "acme-vae", endpoint=hub.url).is_dir()


def test_local_paths_come_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "xl").mkdir(parents=True)
    assert resolve("acme/xl", endpoint=hub.url) == Path("acme/xl")
    assert hub.served == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("acme/gated", "acme/gated is gated: accept its terms"),
        ("acme/absent", "no acme/absent on the Hub, nor a local path"),
        ("acme/xl@v9", "acme/xl has no revision 'v9'"),
        ("acme/xl/none.safetensors", r"acme/xl has no file 'none\.safetensors'"),
        ("acme/files", r"no model_index\.json.*acme/files/a\.safetensors"),
        ("acme/empty", "no weights either"),
        ("acme/hollow", "acme/hollow holds no weights of its unet"),
        ("models/x.safetensors", r"no file or folder 'models/x\.safetensors'"),
        ("./acme/xl", r"no file or folder '\./acme/xl'"),
        ("/nowhere/at/all", "no file or folder"),
        ("acme", "no file or folder 'acme'"),
        ("acme/xl/unet", "no file or folder 'acme/xl/unet'"),
        ("", "no file or folder ''"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(source: str, words: str, hub: Hub, tmp_path: Path):
    owner = hub.root / "acme"
    for name, file in (("files", "a.safetensors"), ("empty", "README.md")):
        (owner / name).mkdir()
        (owner / name / file).write_bytes(b"x")
    (owner / "hollow").mkdir()
    (owner / "hollow" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(UserError, match=words) as error:
        resolve(source, cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert "\n" not in str(error.value)


def test_the_clients_own_settings_are_followed(hub: Hub, tmp_path: Path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when the client is imported: so in a process of its own."""
    code = "from sdjax.checkpoints.open import resolve; print(resolve('acme/xl'))"

    def run(**settings: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **settings}
        root = Path(__file__).parents[2]
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)

    online = run()
    assert online.returncode == 0, online.stderr
    assert str(tmp_path / "home") in online.stdout
    assert run(HF_HUB_OFFLINE="1").stdout == online.stdout
    alone = run(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert "UserError: acme/xl is neither a local path nor in the cache, and the Hub cannot be reached" in alone.stderr


CLIMBING = "../../../../climbed"
ANSWERS: list[dict[str, Any]] = [
    *({"sha": sha} for sha in (CLIMBING, "/climbed", "..", SHA[:-1], f"{SHA}/../..", "", "main")),
    *({"etag": f'"{etag}"'} for etag in (CLIMBING, "..", "a/b", "W/..", "a" * 200, "")),
    *({"oid": oid} for oid in (CLIMBING, "a/b", "..")),
    *({"listed": [name]} for name in (CLIMBING, "/climbed", "scheduler/../../../climbed.json", "a\\b", "..")),
]


def test_an_endpoint_that_answers_paths_is_refused(hub: Hub, tmp_path: Path):
    honest = dict(vars(hub))
    for number, answers in enumerate(ANSWERS):
        vars(hub).update(honest | answers)
        cache = tmp_path / str(number) / "some" / "cache"
        cache.mkdir(parents=True)
        before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
        with pytest.raises(UserError, match=r"answers as no Hub does: .* is no (commit|digest|name)") as error:
            resolve("acme/xl", cache_dir=cache, endpoint=hub.url)
        assert "\n" not in str(error.value)
        assert {path for path in tmp_path.rglob("*") if cache not in path.parents} == before, answers
        assert not [path for path in cache.rglob("*") if "climbed" in path.name]
        shutil.rmtree(cache)
