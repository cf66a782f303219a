"""From what a user calls a model to a pipeline."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from sdjax.convert.folder import INDEX, Checkpoint, read_folder
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.data.tokenizers import load_tokenizer
from sdjax.diffusion.denoise import check_prediction
from sdjax.models.autoencoder import Autoencoder
from sdjax.models.clip import CLIPText
from sdjax.models.unet import UNet
from sdjax.pipeline.pipeline import Pipeline
from sdjax.tasks.base import export_folder
from sdjax.tasks.latent import System

UNDERSTOOD = f"a diffusers folder (one with {INDEX}) or the workdir of a finished train.py run"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".bin")


def load(source: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Pipeline:
    """A pipeline of a checkpoint.

    Args:
        source: a diffusers folder, or the workdir of a finished train.py run.
        dtype: of the UNet and the text encoder, "float32" or "bfloat16"; the autoencoder works in float32 always.
        mesh: of `sdjax.parallel.mesh.make_mesh`; parameters and batches are spread over it. None for one device.

    Raises:
        UserError: the source is missing or is none of these, or what it holds is corrupt or not supported.
    """
    kind = dtype_named(dtype)
    folder = find_folder(source)
    checkpoint = read_folder(folder)
    prediction = checkpoint.scheduler_config.get("prediction_type", "epsilon")
    check_prediction(prediction)
    _check_latents(checkpoint, folder)
    system = System(
        unet=UNet(checkpoint.unet.config, dtype=kind),
        autoencoder=Autoencoder(checkpoint.vae.config),
        text_encoder=CLIPText(checkpoint.text_encoder.config, kind),
        prediction=prediction,
    )
    tokenizer = load_tokenizer(checkpoint.tokenizer, checkpoint.text_encoder.config.max_length)
    if tokenizer.vocab_size > checkpoint.text_encoder.config.vocab_size:
        raise UserError(
            f"{checkpoint.tokenizer} has {tokenizer.vocab_size} tokens, "
            f"the text encoder beside it {checkpoint.text_encoder.config.vocab_size}"
        )
    name = folder.parent.name if folder.name == export_folder(Path()).name else folder.name
    return Pipeline(name, checkpoint, system, tokenizer, dtype, mesh)


def find_folder(source: str | Path) -> Path:
    """The diffusers folder that a source means, with its symbolic links followed.

    Raises:
        UserError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path, export_folder(path)):
            if (folder / INDEX).is_file():
                return folder.resolve()
        if (path / "checkpoints").is_dir():
            raise UserError(
                f"{path} is a workdir without {export_folder(path).name}: train.py writes it when training ends"
            )
        raise UserError(f"{path} is no checkpoint: it has no {INDEX}; give {UNDERSTOOD}")
    if path.is_file() or path.suffix in SINGLE_FILES:
        missing = "" if path.is_file() else " (and it does not exist)"
        raise UserError(f"{path} is a single file{missing}, which is not read; give {UNDERSTOOD}")
    raise UserError(f"there is no checkpoint {str(source)!r}: the folder does not exist; give {UNDERSTOOD}")


def _check_latents(checkpoint: Checkpoint, folder: Path) -> None:
    latent, unet = checkpoint.vae.config.latent_channels, checkpoint.unet.config
    if not latent == unet.in_channels == unet.out_channels:
        raise UserError(
            f"{folder}: the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the autoencoder's "
            f"latents have {latent}; only models where the three agree are sampled"
        )
    width = checkpoint.text_encoder.config.width
    if unet.context_dim != width:
        raise UserError(f"{folder}: the UNet attends to {unet.context_dim} features, the text encoder gives {width}")
