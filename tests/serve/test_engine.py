"""Requests that share batches get what each gets alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import shutil
import weakref
from collections import Counter

import jax
import numpy as np
import pytest
from asking import ended, together
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdjax.core.errors import UserError
from sdjax.data.images import to_uint8
from sdjax.serve.jobs import Call, Job, QueueFullError

SIDE = {"height": 16, "width": 16}
SAMPLERS = ("ddim", "euler_a", "heun", "dpmpp_2m", "dpmpp_sde", "unipc")


def requests(count: int) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "sampler": draw.choice(SAMPLERS),
            "steps": draw.randint(2, 7),
            "seed": draw.randint(0, 2**40),
            "guidance_scale": draw.choice((1.5, 3.0, 7.5)),
            **SIDE,
        }
        for _ in range(count)
    ]


def pixels(job):
    assert job.state == "done", job.error
    return [result.pixels for result in job.results]


def test_requests_that_join_and_leave_get_what_they_get_alone(engine):
    """To the bit in batches of one size, whoever shares them and whenever they join.

    But in the last place: CPUs' products round the last rows of a batch otherwise (Eigen's kernels for what is left).
    """
    wanted = requests(12)
    alone = [pixels(together(ended(engine, **options))[0]) for options in wanted]
    shared = together(*(ended(engine, delay=0.01 * i, **options) for i, options in enumerate(wanted)))
    same = 0
    for (own,), job in zip(alone, shared, strict=True):
        (made,) = pixels(job)
        assert np.abs(own.astype(int) - made).max() <= 1
        same += np.array_equal(own, made)
    assert same >= 9
    assert len({own.tobytes() for (own,) in alone}) == len(wanted)


def test_one_after_another_all_is_to_the_bit(served):
    """In batches of one image, which is what CPUs have by default."""
    single, wanted = served(batch_sizes=(1,)), requests(8)
    alone = [pixels(together(ended(single, **options))[0]) for options in wanted]
    shared = together(*(ended(single, delay=0.01 * i, **options) for i, options in enumerate(wanted)))
    for own, job in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(own, pixels(job))


def test_images_are_those_of_a_call(engine):
    """Whatever the batch, within 1 of 255; with a second pass, from an image, under a mask."""
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
    mask = Image.fromarray(np.repeat(np.array([[0] * 8 + [255] * 8], np.uint8), 16, axis=0))
    cases = [
        {},
        {"num_images": 2},
        {"init_image": image, "strength": 0.6},
        {"init_image": image, "mask": mask, "strength": 1.0},
        {"hires": 2.0, "hires_strength": 0.5},
        {"rng": "torch", "sampler": "euler_a"},
        {"guidance_scale": 1.0},
    ]
    cases = [{"steps": 4, "seed": 5, **SIDE, **case} for case in cases] + [{"steps": 4, "seed": 5, **SIDE}]
    prompts = ["red heart"] * (len(cases) - 1) + ["[red:blue:0.5] heart AND a hat"]
    jobs = together(*(ended(engine, prompt, **case) for prompt, case in zip(prompts, cases, strict=True)))
    pipe = engine.models.find(None).pipe
    for job, prompt, case in zip(jobs, prompts, cases, strict=True):
        for made, wanted in zip(pixels(job), to_uint8(pipe(prompt, **case)), strict=True):
            assert np.abs(made.astype(int) - wanted).max() <= 1, case
    kept = np.asarray(image)[:, :8]
    np.testing.assert_array_equal(jobs[3].results[0].pixels[:, :8], kept)


def test_another_batch_size_gives_the_same_image(served, engine):
    """Within 1 of 255, while the loop grows and shrinks."""
    changing, wanted = served(batch_sizes=(1, 2, 4)), requests(6)
    jobs = together(*(ended(changing, delay=0.02 * i, **options) for i, options in enumerate(wanted)))
    for job, options in zip(jobs, wanted, strict=True):
        (own,), (made,) = pixels(together(ended(engine, **options))[0]), pixels(job)
        assert np.abs(own.astype(int) - made).max() <= 1, options


def test_a_job_ends_between_two_calls_and_its_place_is_free(engine):
    async def cancelled():
        job = await engine.submit(None, [Call("red heart", None, {"steps": 100, **SIDE})], "test")
        async for _ in job.changes():
            if job.done >= 3:
                engine.cancel(job)
        return job

    job, other = together(cancelled(), ended(engine, steps=5, seed=1, **SIDE))
    assert (job.state, job.results) == ("cancelled", [None])
    assert 3 <= job.done < 90
    pixels(other)
    assert engine.running() is None


def test_a_job_that_was_cancelled_stays_so():
    job = Job("tiny", [], "test", {})
    job.end("cancelled")
    job.begin()
    job.end("done")
    assert (job.state, job.started) == ("cancelled", None)


def test_progress_previews_and_places(engine):
    """Calls grow one by one; who waits knows how many are before."""
    told = []

    async def watched():
        job = await engine.submit(None, [Call("red heart", None, {"steps": 60, "num_images": 5, **SIDE})], "test")
        async for _ in job.changes():
            shape = None if job.preview is None else job.preview.shape
            told.append((job.done, job.total, job.eta, shape, job.state))
        return job

    job = together(watched())[0]
    pixels(job)
    counts = [done for done, *_ in told]
    assert counts == sorted(counts)
    assert len(set(counts)) > 20
    assert told[-1][:2] == (300, 300)
    assert any(eta is not None and 0.0 < eta < 300.0 for _, _, eta, _, _ in told)


def test_a_full_queue_refuses(served):
    small = served(batch_sizes=(1,), queue_length=2, lanes=1)

    async def many():
        jobs = [await small.submit(None, [Call("red heart", None, {"steps": 90, **SIDE})], "test")]
        while jobs[0].state != "running":
            await asyncio.sleep(0.01)
        for _ in range(2):
            jobs.append(await small.submit(None, [Call("red heart", None, {"steps": 90, **SIDE})], "test"))
        with pytest.raises(QueueFullError, match="2 requests wait") as refusal:
            await small.submit(None, [Call("red heart", None, SIDE)], "test")
        places = [job.place for job in jobs]
        for job in jobs:
            small.cancel(job)
        return refusal.value.retry_after, places

    after, places = asyncio.run(many())
    assert after >= 1
    assert places[0] == 0
    assert sorted(places)[-1] <= 2


def test_mistakes_are_said_before_anything_runs(engine):
    cases = [
        ({"steps": 0}, "steps 0: choose an integer of at least 1"),
        ({"steps": 151}, "steps 151: this server runs at most 150"),
        ({"width": 4096}, "width or height of 4096x16"),
        ({"num_images": 17}, "num_images 17: choose an integer of 1 to 16"),
        ({"init_image": "/etc/passwd"}, "init_image: a request holds the data itself, not the name of a file"),
        ({"wildcard_dir": "/etc"}, "wildcard_dir is no option of a request"),
        ({"batch_size": 1}, "batch_size is no option of a request"),
        ({"sampler": "eulr"}, "unknown sampler 'eulr'"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            together(ended(engine, **{"height": 16, "width": 16, **options}))
    with pytest.raises(UserError, match="unknown model 'other'; choose one of: tiny"):
        asyncio.run(engine.submit("other", [Call("x", None, {})], "test"))


def test_weights_that_overflow_are_named_and_others_go_on(served, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (file,) = (broken / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_out.weight"] = np.full_like(tensors["conv_out.weight"], 3e38)
    save_file(tensors, file)
    both = served({"good": str(folder), "broken": str(broken)}, batch_sizes=(4,))

    async def one(model):
        job = await both.submit(model, [Call("red heart", None, {"steps": 3, **SIDE})], "test")
        await job.finished()
        return job

    good, bad = together(one("good"), one("broken"))
    pixels(good)
    assert (bad.state, bad.results) == ("failed", [None])
    assert bad.error == "the UNet's output is not finite: the weights of broken hold values that overflow"


def test_the_least_recently_used_model_leaves(served, folder):
    """Memory for one model; a job keeps its own until it has ended."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(served().models.find(None).pipe.params))
    two = served({"a": str(folder), "b": str(folder)}, memory=int(1.5 * size), batch_sizes=(4,))

    async def one(model, steps):
        job = await two.submit(model, [Call("red heart", None, {"steps": steps, **SIDE})], "test")
        await job.finished()
        return job

    first, second = together(one("a", 30), one("b", 3))
    pixels(first), pixels(second)
    assert [model.pipe is not None for model in two.models.all.values()] == [False, True]
    assert second.ended > first.ended
    small = served({"a": str(folder)}, batch_sizes=(4,))
    small.models.memory = size // 2
    small.models.unload(small.models.find("a"))
    with pytest.raises(UserError, match=r"model 'a' needs .* GiB; the server may take"):
        asyncio.run(small.pipeline("a"))


@contextlib.contextmanager
def traced():
    """Functions that JAX traces or compiles anew meanwhile."""
    found = Counter()

    def count(event, duration, fun_name="", **_):
        if event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"):
            found[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_nothing_compiles_after_the_warm_up(folder, served):
    """Samplers, steps, guidance, given images and numbers of requests are all arguments."""
    from sdjax.serve.warm_up import warm_up

    warm = served(batch_sizes=(1, 2))
    asyncio.run(warm.call(lambda: warm_up(warm._worker, warm.models.find(None), [(16, 16)])))
    image = Image.new("RGB", (16, 16), "red")
    with traced() as found:
        cases = [*requests(6), {"init_image": image, "strength": 0.5, "seed": 1, **SIDE}]
        cases.append({"guidance_scale": 1.0, "seed": 2, **SIDE})
        jobs = together(*(ended(warm, delay=0.02 * i, **case) for i, case in enumerate(cases)))
    for job in jobs:
        pixels(job)
    assert found == {}


def test_records_are_json_and_make_the_image_again(engine):
    options = {"steps": 4, "seed": 5, "init_image": Image.new("RGB", (16, 16), "red"), **SIDE}
    (job,) = together(ended(engine, num_images=2, **options))
    first, second = (json.loads(json.dumps(result.record)) for result in job.results)
    assert (first["index"], second["index"], first["steps"], first["seed"]) == (0, 1, 4, 5)
    assert "init_image" not in first
    again = {n: v for n, v in second.items() if n not in ("index", "model", "dtype", "prompt", "negative_prompt")}
    (job_again,) = together(ended(engine, **again, first_index=1, init_image=options["init_image"]))
    np.testing.assert_array_equal(pixels(job_again)[0], pixels(job)[1])


def test_a_model_that_leaves_frees_its_weights(served, folder):
    engine = served({"a": str(folder)}, batch_sizes=(4,))
    together(ended(engine, steps=2, **SIDE))
    model = engine.models.find(None)
    leaf = weakref.ref(jax.tree.leaves(model.pipe.params)[0])
    asyncio.run(engine.call(lambda: engine.models.unload(model)))
    gc.collect()
    assert leaf() is None
    pixels(together(ended(engine, steps=2, **SIDE))[0])
