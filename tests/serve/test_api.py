"""This server's own API and OpenAI's, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import time

import numpy as np
import openai
import pytest
import requests
from listening import listening
from PIL import Image

from sdjax.cli.records import parameters
from sdjax.cli.settings.read import read_settings
from sdjax.data.images import to_uint8
from sdjax.pipeline.options import OPTIONS

SMALL = {"height": 16, "width": 16, "steps": 4, "seed": 5}


@pytest.fixture(scope="module")
def address(engine):
    with listening(engine) as address:
        yield address


@pytest.fixture(scope="module")
def pipe(engine, address):
    requests.get(f"{address}/v1/options", timeout=60)
    return engine.models.find(None).pipe


def submit(address, prompt="red heart", **options):
    answer = requests.post(f"{address}/v1/jobs", json={"prompt": prompt, "options": options}, timeout=60)
    assert answer.status_code == 201, answer.text
    return answer.json()


def events(address, job):
    """Names and data of a job's events."""
    with requests.get(f"{address}/v1/jobs/{job['id']}/events", stream=True, timeout=60) as answer:
        lines = [line for line in answer.iter_lines(decode_unicode=True) if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event")]
    return list(
        zip(names, [json.loads(line.removeprefix("data: ")) for line in lines if "data: " in line], strict=True)
    )


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_a_job_from_submission_to_its_images(address, pipe, tmp_path):
    """The pictures of a call, with settings that make them again."""
    told = events(address, submit(address, **SMALL, num_images=2))
    assert [name for name, _ in told][-1] == "end"
    assert [job["done"] for _, job in told] == sorted(job["done"] for _, job in told)
    end = told[-1][1]
    assert (end["state"], end["done"], end["total"]) == ("done", 8, 8)
    wanted = to_uint8(pipe("red heart", **SMALL, num_images=2)).astype(int)
    for number, image in enumerate(end["images"]):
        data = requests.get(f"{address}{image['url']}", timeout=60).content
        assert np.abs(opened(data) - wanted[number]).max() <= 1
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        assert read_settings(path).values["index"] == number
        assert image["parameters"] == parameters(image["settings"])
        file = {"file": ("a.png", data, "image/png")}
        read = requests.post(f"{address}/v1/settings", files=file, timeout=60).json()
        assert {name: read["settings"][name] for name in SMALL} == SMALL
        assert read["settings"]["prompt"] == "red heart"


def test_images_go_in_as_base64_and_data_urls(address, pipe):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    jobs = [submit(address, **SMALL, init_image=text + png(image)) for text in ("", "data:image/png;base64,")]
    ends = [events(address, job)[-1][1] for job in jobs]
    first, second = (requests.get(address + end["images"][0]["url"], timeout=60).content for end in ends)
    np.testing.assert_array_equal(opened(first), opened(second))
    wanted = to_uint8(pipe("red heart", **SMALL, init_image=image))[0].astype(int)
    assert np.abs(opened(first) - wanted).max() <= 1


def test_a_job_is_cancelled_and_remembered(address):
    job = submit(address, **SMALL | {"steps": 140})
    cancelled = requests.delete(f"{address}/v1/jobs/{job['id']}", timeout=60).json()
    assert cancelled["state"] == "cancelled"
    assert requests.get(f"{address}/v1/jobs/{job['id']}", timeout=60).json()["images"] == [None]
    assert requests.get(f"{address}/v1/jobs", timeout=60).json()["jobs"][0]["id"] == job["id"]


def test_a_listing_is_bounded_and_names_prompts(address):
    """Of jobs that wait, too, so that whoever watches the queue knows what is in it."""
    jobs = [submit(address, prompt, **SMALL) for prompt in ("red heart", "blue cat")]
    assert [job["prompt"] for job in jobs] == ["red heart", "blue cat"]
    listed = requests.get(f"{address}/v1/jobs?limit=2", timeout=60).json()["jobs"]
    assert [(job["id"], job["prompt"]) for job in listed] == [(job["id"], job["prompt"]) for job in reversed(jobs)]
    assert requests.get(f"{address}/v1/jobs?limit=0", timeout=60).status_code == 422


def test_previews_are_small_pictures(address):
    job = submit(address, **SMALL | {"steps": 140}, num_images=8)
    url, deadline = None, time.time() + 60
    while url is None and time.time() < deadline:
        url = requests.get(f"{address}/v1/jobs/{job['id']}", timeout=60).json()["preview"]
    assert url.startswith(f"/v1/jobs/{job['id']}/preview?v=")
    shown = opened(requests.get(address + url, timeout=60).content)
    assert shown.shape == (8, 8, 3)  # a pixel a latent
    assert shown.std() > 1.0
    requests.delete(f"{address}/v1/jobs/{job['id']}", timeout=60)
    assert requests.get(f"{address}/v1/jobs/{job['id']}/preview", timeout=60).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "detail", "option"),
    [
        ({"prompt": "x", "options": {"steps": 0}}, 422, "steps 0: choose an integer of at least 1", "steps"),
        ({"prompt": "x", "options": {"sampler": "x"}}, 422, "unknown sampler 'x'", "sampler"),
        ({"prompt": "x", "options": {"init_image": "/etc/passwd"}}, 422, "it is no image in base64", "init_image"),
        ({"prompt": "x", "options": {"init_image": 3}}, 422, "init_image: give an image in base64", "init_image"),
        ({"prompt": "x", "options": {"mask": ""}}, 422, "mask: it is no PNG", "mask"),
        ({"prompt": "x", "model": "y"}, 422, "unknown model 'y'; choose one of: tiny", "model"),
        ({"options": {}}, 422, "needs a prompt", None),
        ({"prompt": 3}, 422, "prompt: Input should be a valid string", "prompt"),
        ({"prompt": "x", "options": {"stepps": 3}}, 422, "unknown option 'stepps'", None),
    ],
)
def test_mistakes_are_a_line_and_name_their_option(address, pipe, body, status, detail, option):
    answer = requests.post(f"{address}/v1/jobs", json=body, timeout=60)
    assert answer.status_code == status
    assert detail in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    if option is not None:
        assert answer.json()["option"] == option


def test_options_are_those_that_the_model_reads(address, pipe):
    told = requests.get(f"{address}/v1/options", timeout=60).json()
    rows = {row["name"]: row for row in told["options"]}
    assert told["default_size"] == list(pipe.default_size)
    assert rows["steps"] == rows["steps"] | {"kind": "int", "least": 1, "default": 50}
    assert rows["init_image"]["kind"] == "image"
    assert rows["sampler"]["choices"] == list(OPTIONS["sampler"].choices)
    assert not {"class_label", "control_image", "ip_image", "refiner_start", "wildcard_dir", "latents"} & set(rows)


def test_unknown_things_are_404(address):
    for path in ("v1/jobs/x", "v1/jobs/x/images/0", "v1/jobs/x/events", "nothing"):
        assert requests.get(f"{address}/{path}", timeout=60).status_code == 404


def test_states_and_metrics(address, pipe):
    submit(address, **SMALL)
    assert requests.get(f"{address}/healthz", timeout=60).json() == {"status": "ok"}
    assert requests.get(f"{address}/readyz", timeout=60).status_code == 200
    text = requests.get(f"{address}/metrics", timeout=60).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['sdjax_requests_total{origin="jobs"}']) >= 1.0
    assert 0.0 <= float(figures["sdjax_batch_fill"]) <= 1.0


class TestOpenAI:
    """OpenAI's own client."""

    @pytest.fixture
    def client(self, address):
        return openai.OpenAI(base_url=f"{address}/v1", api_key="none")

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]

    def test_generations(self, client, pipe):
        answer = client.images.generate(model="tiny", prompt="red heart", n=2, size="16x16")
        first, second = (opened(base64.b64decode(image.b64_json)) for image in answer.data)
        assert first.shape == (16, 16, 3)
        assert not np.array_equal(first, second)
        data = base64.b64decode(answer.data[1].b64_json)
        record = read_settings(io.BytesIO(data), place="it").values
        again = to_uint8(pipe("red heart", width=16, height=16, seed=record["seed"], first_index=1))[0]
        assert np.abs(again.astype(int) - second).max() <= 1

    def test_streaming(self, client):
        stream = client.images.generate(prompt="red heart", size="16x16", stream=True, partial_images=2)
        told = [(event.type, event.b64_json) for event in stream]
        kinds = [kind for kind, _ in told]
        assert kinds[-1] == "image_generation.completed"
        assert set(kinds[:-1]) <= {"image_generation.partial_image"}
        assert opened(base64.b64decode(told[-1][1])).shape == (16, 16, 3)

    def test_edits(self, client):
        """What the mask shows stays; what it leaves transparent is made anew."""
        image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        alpha = np.full((16, 16, 1), 255, np.uint8)
        alpha[:, 8:] = 0
        files = [io.BytesIO(), io.BytesIO()]
        Image.fromarray(image).save(files[0], format="PNG")
        Image.fromarray(np.concatenate([image, alpha], axis=-1)).save(files[1], format="PNG")
        whole, mask = (("a.png", file.getvalue(), "image/png") for file in files)
        answer = client.images.edit(image=whole, mask=mask, prompt="blue cat", size="16x16")
        made = opened(base64.b64decode(answer.data[0].b64_json))
        np.testing.assert_array_equal(made[:, :8], image[:, :8])
        assert np.abs(made[:, 8:] - image[:, 8:]).max() > 10

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"prompt": "x", "size": "big"}, "size 'big': choose auto or WIDTHxHEIGHT"),
            ({"prompt": "x", "n": 99}, "num_images 99"),
            ({"prompt": "x", "model": "other"}, "unknown model 'other'"),
            ({"prompt": "x", "response_format": "url"}, "images are sent as b64_json"),
        ],
    )
    def test_mistakes(self, client, fields, message):
        with pytest.raises(openai.UnprocessableEntityError, match=message):
            client.images.generate(**fields)
