"""What stays whole on every device under FSDP, in bytes, for every published size of network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from configs import controlnet as control_config
from configs import dreambooth, lora, stable_diffusion_training
from sdjax.checkpoints.checkpoint import ALL_FORMATS, FORMATS
from sdjax.core.errors import UserError
from sdjax.core.tree import nbytes
from sdjax.models import added_kv_unet, autoencoder, clip, controlnet, t5, unet
from sdjax.parallel.audit import LIMIT, audit, check
from sdjax.parallel.sharding import spec_of
from sdjax.parallel.trees import device_bytes, path_name
from sdjax.tasks.make import make_task
from sdjax.training.optim import make_optimizer
from sdjax.training.step import state_shapes

ROOT = Path(__file__).parents[2]
NETWORKS = [("unet", name, unet.VARIANTS[name]) for name in ("sd1", "sd2", "x4_upscaler", "sdxl", "sdxl_refiner")]
NETWORKS += [("unet", name, config) for name, config in added_kv_unet.VARIANTS.items()]
NETWORKS += [("controlnet", name, config) for name, config in controlnet.VARIANTS.items()]
NETWORKS += [("vae", name, config) for name, config in autoencoder.VARIANTS.items()]
NETWORKS += [("text_encoder", name, config) for name, config in (clip.VARIANTS | t5.VARIANTS).items()]


@pytest.mark.parametrize(("kind", "name", "config"), NETWORKS, ids=[f"{kind}-{name}" for kind, name, _ in NETWORKS])
def test_at_most_one_percent_of_the_bytes_is_replicated(kind, name, config):
    """For fsdp 2 to 64; and a device of n holds an n-th of the rest."""
    shapes = ALL_FORMATS[kind].shapes(config)
    for fsdp in (2, 4, 8, 16, 32, 64):
        found = audit(shapes, {"fsdp": fsdp})
        assert found.total == nbytes(shapes)
        assert found.share < LIMIT, (fsdp, found.share)
        assert found.per_device == found.replicated + (found.total - found.replicated) // fsdp
        check(found, {"fsdp": fsdp}, name)


def test_a_mesh_that_divides_too_little_is_refused():
    shapes = FORMATS["vae"].shapes(autoencoder.VARIANTS["sd"])
    with pytest.raises(UserError, match=r"of vae is on every device whole, more than 1%; the largest is .*kernel"):
        check(audit(shapes, {"fsdp": 48}), {"fsdp": 48}, "vae")


def test_tensor_axis_splits_heads_and_feed_forward():
    """Of SDXL's transformers and residual blocks; norms, biases and the time embedding's own layers are not split."""
    found = audit(FORMATS["unet"].shapes(unet.SDXL), {"tensor": 4, "fsdp": 2})
    spec = {entry.name.split("transformer_blocks_0/")[-1]: entry.spec for entry in found.entries}
    assert spec["attn1/to_q/kernel"] == P("fsdp", "tensor")
    assert spec["attn1/to_out/kernel"] == P("tensor", "fsdp")
    assert spec["ff/proj_in/kernel"] == P("fsdp", "tensor")
    assert spec["ff/proj_out/kernel"] == P("tensor", "fsdp")
    assert spec["down_blocks_0_resnets_0/conv1/kernel"] == P(None, None, "fsdp", "tensor")
    assert spec["down_blocks_0_resnets_0/conv2/kernel"] == P(None, None, "tensor", "fsdp")
    split = sum(entry.nbytes for entry in found.entries if "tensor" in entry.spec)
    assert split > 0.9 * found.total
    # one head cannot be split
    assert spec_of("vae/encoder/mid_block/attentions_0/attention/to_q/kernel", (512, 512), {"tensor": 2}) == P(), (
        "1 head"
    )


def test_tensor_axis_splits_heads_and_feed_forward_of_t5():
    """Its heads make up another width than the model's; both feed-forwards, gated and not."""
    for name in ("t5_v1_1_xxl", "t5_3b"):
        found = audit(FORMATS["text_encoder"].shapes(t5.VARIANTS[name]), {"tensor": 4, "fsdp": 2})
        spec = {entry.name.split("layers_0/")[-1]: entry.spec for entry in found.entries}
        for outputs in ("self_attn/to_q", *(("ff/wi_0", "ff/wi_1") if name == "t5_v1_1_xxl" else ("ff/wi",))):
            assert spec[f"{outputs}/kernel"] == P("fsdp", "tensor")
        assert spec["self_attn/to_out/kernel"] == spec["ff/wo/kernel"] == P("tensor", "fsdp")
        split = sum(entry.nbytes for entry in found.entries if "tensor" in entry.spec)
        assert split > 0.9 * found.total


def test_tensor_axis_splits_attention_with_added_keys_and_values():
    """Of DeepFloyd IF's largest UNet, whose residual blocks also change the resolution."""
    found = audit(FORMATS["unet"].shapes(added_kv_unet.VARIANTS["if_i_xl"]), {"tensor": 4, "fsdp": 2})
    spec = {entry.name: entry.spec for entry in found.entries}
    level = "down_blocks_1"
    for outputs in ("to_q", "to_v", "add_k_proj"):
        assert spec[f"{level}_attentions_0/{outputs}/kernel"] == P("fsdp", "tensor")
    assert spec[f"{level}_attentions_0/to_out/kernel"] == P("tensor", "fsdp")
    assert spec[f"{level}_downsamplers_0/conv1/kernel"] == P(None, None, "fsdp", "tensor")
    assert spec[f"{level}_downsamplers_0/conv2/kernel"] == P(None, None, "tensor", "fsdp")
    split = sum(entry.nbytes for entry in found.entries if "tensor" in entry.spec)
    assert split > 0.9 * found.total


def test_optimiser_moments_are_sharded():
    import optax

    from sdjax.parallel.trees import path_name

    params = {"unet": {"attn1": {"to_q": {"kernel": jax.ShapeDtypeStruct((640, 640), np.float32)}}}}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
    assert len(leaves) == 2
    assert all(spec_of(name, leaf.shape, {"tensor": 2, "fsdp": 2}) == P("fsdp", "tensor") for name, leaf in leaves)


def test_the_command_prints_every_kind_and_the_sum():
    command = [sys.executable, "-m", "sdjax.parallel", "--config", "configs/stable_diffusion_training.py:sdxl_tiny"]
    done = subprocess.run([*command, "--mesh", "fsdp=8"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "(-, -, -, fsdp)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("all: ")
    wrong = subprocess.run([*command, "--mesh", "model=8"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown mesh axis 'model'")


def test_factors_of_lora_are_split_as_the_kernels_they_change():
    """Over the tensor axis where they have the split dimension, and over FSDP by size."""
    names = {"attn1/to_k/lora/0/up": P(None, "tensor"), "attn1/to_k/lora/0/down": P(), "attn1/to_out/lora/3/up": P()}
    names |= {"attn1/to_out/lora/3/down": P("tensor", None), "resnets_0/conv1/lora/0/up": P(None, "tensor")}
    for name, spec in names.items():
        shape = (4, 1280) if name.endswith("up") else (1280, 4)
        assert spec_of(f"unet/down_blocks_0_{name}", shape, {"tensor": 2}) == spec, name
    assert spec_of("unet/x/attn1/to_k/lora/0/up", (4, 1280), {"tensor": 2, "fsdp": 2}) == P("fsdp", "tensor")


def adapting(name: str):
    """A config of Stable Diffusion 1.5 at full size, which needs no files of it."""
    config = {"controlnet": control_config, "dreambooth": dreambooth}.get(name, lora).get_config("").unlock()
    published = stable_diffusion_training.get_config("sd1")
    config.model.update(published.model)
    config.task.update(conditioning="text", text="tokens", latents="encoded", scheduler=published.task.scheduler)
    config.data.size = published.data.size
    if name == "lora_of_all":
        parts = ("attention", "feed_forward", "projections", "convolutions", "text_attention", "text_feed_forward")
        config.task.lora.update(targets=parts, rank=16)
    if name == "dreambooth":
        config.train.trainable = ("unet",)
    return config


@pytest.mark.parametrize(
    ("name", "learns"),
    [("lora", 797_184), ("lora_of_all", 19_467_264), ("controlnet", 361_279_120), ("dreambooth", 859_520_964)],
)
def test_a_training_state_of_an_adapted_model_is_sharded(name, learns):
    """Parameters, averages, moments and the frozen networks, on eight devices: at most 1 % is on all of them.

    Of the state alone it is less, too, but for a LoRA of rank 4: all of that is 12 MiB, in arrays of which most are too
    small to be worth gathering.
    """
    config, sizes = adapting(name), {"data": 1, "fsdp": 8}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)
    task = make_task(config, mesh)  # pyright: ignore[reportArgumentType]  (shapes need no devices)
    state = state_shapes(task, make_optimizer(config.optim, 1), mesh)  # pyright: ignore[reportArgumentType]
    own = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    found = audit({"state": own, "frozen": task.frozen}, sizes)
    assert sum(np.prod(leaf.shape) for path, leaf in own.items() if path.startswith("params/")) == learns
    assert audit(own, sizes).per_device == device_bytes(state)
    assert found.total > 4e9
    assert found.share < LIMIT / 2
    assert found.per_device < found.total / 8 * 1.04
    assert name == "lora" or audit(own, sizes).share < LIMIT
