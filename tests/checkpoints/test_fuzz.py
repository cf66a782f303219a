"""Truncated and tampered files: refused in one line or read, and never at a cost beyond their size."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize
from tiny_checkpoints import tiny_checkpoint

from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS, read_single_file
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.checkpoints.networks.clip import VOCABULARY
from sdjax.checkpoints.storage.safetensors import read_safetensors, write_safetensors
from sdjax.checkpoints.storage.weights import Weights
from sdjax.core.errors import UserError

CASES = 1200
TENSORS = {
    "a.weight": np.ones((64, 128), np.float32),
    "b.weight": np.ones((3, 5, 7, 11), np.float16),
    "c": np.ones((), np.float32),
    "d.bias": np.ones(300_000, np.float32),
    "empty": np.ones((0, 4), np.float32),
}
SLACK = 300_000  # bytes for what parsing a small header takes; the tensors here take 1.2 MB
EXTREMES: list[Any] = [
    *(-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), True, None, "", "F32", "F64", "I4", "x" * 1000),
    *([], {}, [[]], [2**40, 2**40], [0, 2**62], [1] * 100, [10**300] * 100, [0, 8], [8, 0], [-4, 4], [0, 2**63]),
]


def parts(content: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + length], content[8 + length :]


def packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def truncated(rng: random.Random, content: bytes) -> bytes:
    header, _ = parts(content)
    return content[: rng.choice([rng.randrange(len(header) + 9), rng.randrange(len(content))])]


def other_length(rng: random.Random, content: bytes) -> bytes:
    length = rng.choice([0, 1, 8, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(len(content))])
    return struct.pack("<Q", length) + content[8:]


def other_bytes(rng: random.Random, content: bytes) -> bytes:
    changed, (header, _) = bytearray(content), parts(content)
    for _ in range(rng.randint(1, 8)):
        changed[8 + rng.randrange(len(header))] = rng.choice([rng.randrange(256), *b'0123456789[]{},:"'])
    return bytes(changed)


def cut_or_doubled(rng: random.Random, content: bytes) -> bytes:
    header, data = parts(content)
    first, last = sorted(rng.sample(range(len(header)), 2))
    return packed(header[:first] + header[last:] if rng.random() < 0.5 else header[:last] + header[first:], data)


def other_values(rng: random.Random, content: bytes) -> bytes:
    """A header that is JSON still, with one or two of its values, or of its keys, put in question."""
    header, data = parts(content)
    entries = json.loads(header)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(entries))
        entry, value = entries[name], rng.choice(EXTREMES)
        if rng.random() < 0.2 or not isinstance(entry, dict):
            entries[name] = value
        elif rng.random() < 0.2:
            entries.pop(name)
        else:
            key = rng.choice(["dtype", "shape", "data_offsets"])
            whole = rng.random() < 0.5 or not isinstance(entry.get(key), list) or not entry[key]
            if whole:
                entry[key] = value
            else:
                entry[key][rng.randrange(len(entry[key]))] = value
    return packed(json.dumps(entries).encode(), data)


def nested(rng: random.Random, content: bytes) -> bytes:
    depth = rng.choice([10, 1000, 20_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return packed(b'{"a":' + opening * depth + b"1" + closing * rng.choice([0, depth]) + b"}", b"")


WAYS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    truncated,
    other_length,
    other_bytes,
    cut_or_doubled,
    other_values,
    nested,
)


def test_fuzzed_headers(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, None)
    content, rng, read = path.read_bytes(), random.Random(0), 0
    tracemalloc.start()
    try:
        for case in range(CASES):
            way = WAYS[case % len(WAYS)]
            path.write_bytes(way(rng, content))
            size = path.stat().st_size
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.monotonic()
            try:
                found = read_safetensors(path)
                total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in found.values())
                assert total <= size
                for tensor in found.values():
                    np.asarray(tensor)
                read += 1
            except UserError as error:
                said = str(error)
            else:
                said = str(path)
            assert str(path) in said, way.__name__
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= size + SLACK, f"{way.__name__}, case {case}: {peak} bytes for a file of {size}"
            assert time.monotonic() - start < 10, way.__name__
            if said == str(path):
                deserialize(path.read_bytes())  # the reference reads it, too
    finally:
        tracemalloc.stop()
    assert 0 < read < CASES / 3, "some changes do no harm; most do"


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("original") / "x.safetensors"
    checkpoint = tiny_checkpoint("sd2", TOKENIZER_FOLDERS / "open_clip", VOCABULARY)
    write_single_file(path, dataclasses.replace(checkpoint), "float16")
    return path.read_bytes()


def renamed_or_reshaped(rng: random.Random, entries: dict[str, Any]) -> None:
    """A header that describes its file, but another model than a whole one."""
    name = rng.choice([name for name in entries if name != "__metadata__"])
    shape = entries[name]["shape"]
    how = rng.randrange(4)
    if how == 0:
        entries[name]["shape"] = [math.prod(shape)]
    elif how == 1:
        entries[name]["shape"] = [1, *shape]
    elif how == 2:
        entries[name]["shape"] = [0] if math.prod(shape) == 0 else shape[::-1]
    else:
        parts = name.split(".")
        i = rng.randrange(len(parts))
        parts[i] = rng.choice(["0", "1", "7", "999", "99999", "weight", "x" * 200, ""])
        entries[".".join(parts)] = entries.pop(name)


def test_no_shape_or_name_of_a_checkpoint_crashes(checkpoint_file: bytes, tmp_path: Path):
    """Every axis that a size follows from is looked at; what does not fit is listed."""
    header, data = parts(checkpoint_file)
    path, rng = tmp_path / "x.safetensors", random.Random(1)
    said: list[str] = []
    for _ in range(60):
        entries = json.loads(header)
        for _ in range(rng.randint(1, 3)):
            renamed_or_reshaped(rng, entries)
        path.write_bytes(packed(json.dumps(entries).encode(), data))
        try:
            read_single_file(path, "float16")
        except UserError as error:
            said.append(str(error))
    assert len(said) > 40
    assert all(str(path) in message for message in said)


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.encoder.down.", "cond_stage_model.model."
LEVEL = ("out_layers.3.weight", (64, 1, 1, 1)), ("op.weight", (1,))
MISLEADING: dict[str, dict[str, tuple[int, ...]]] = {
    "levels of an autoencoder": {f"{VAE}{i}.block.0.conv1.weight": (32, 1, 1, 1) for i in range(900)},
    "levels of a UNet": {f"{UNET}input_blocks.{i}.0.{LEVEL[i % 2][0]}": LEVEL[i % 2][1] for i in range(3, 900)},
    "blocks of an autoencoder": {f"{VAE}0.block.{i}.conv1.weight": (32,) for i in range(900)},
    "blocks of a transformer": {
        f"{UNET}{block}.transformer_blocks.{i}.a": (1,)
        for i in range(900)
        for block in ("input_blocks.1.1", "middle_block.1")
    },
    "layers of a text encoder": {f"{TEXT}transformer.resblocks.{i}.a": (1,) for i in range(900)},
    "no channels": {f"{VAE}0.block.0.conv1.weight": (0, 3)},
    "no channels of a UNet": {f"{UNET}input_blocks.1.0.out_layers.3.weight": (0, 3)},
    "no features of a text encoder": {f"{TEXT}token_embedding.weight": (VOCABULARY, 0)},
    "channels without elements": {f"{VAE}0.block.0.conv1.weight": (2**45, 0)},
    "features without elements": {f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (0, 2**45)},
}


@pytest.mark.parametrize("name", MISLEADING)
def test_sizes_that_follow_from_misleading_keys(name: str, checkpoint_file: bytes, tmp_path: Path):
    """A few keys and shapes, without data, ask for a network that takes minutes to trace, or for none at all."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint_file)
    tensors = {key: np.broadcast_to(np.float16(0), shape) for key, shape in MISLEADING[name].items()}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_single_file(Weights({**read_safetensors(path), **tensors}, {}, path), "float16")
    assert time.monotonic() - start < 20
