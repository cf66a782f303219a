"""What a run shows: a progress bar, TensorBoard files, and pictures in the workdir."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sdjax.core.config import Config
from sdjax.core.errors import UserError


class Metrics:
    """Reports one step behind the device, so that it never waits for the host."""

    def __init__(self, workdir: Path, start: int, options: Config):
        """Opens workdir/tensorboard and a bar; `options` is the `train` section of a config."""
        self._workdir, self._every, self._batch_size = workdir, options.log_every, options.batch_size
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self._bar = tqdm(
            total=options.steps, initial=start, unit="step", dynamic_ncols=True, desc=workdir.name or "train"
        )
        self._pending: tuple[int, dict[str, Any]] | None = None

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of `step`, still being computed, and shows those of the step before.

        Raises:
            UserError: a loss is not finite; the message names its step.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Shows what is pending."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}; the last checkpoint before it is intact")
        self._bar.update()
        rate = self._bar.format_dict["rate"]
        speed = f"{rate * self._batch_size:.1f}" if rate else "?"
        self._bar.set_postfix({"loss": f"{loss:.4f}", "images/s": speed}, refresh=False)
        if step % self._every == 0:
            for name, value in metrics.items():
                self._writer.add_scalar(f"train/{name}", float(value), step)
            if rate:
                self._writer.add_scalar("train/images_per_second", rate * self._batch_size, step)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a picture to TensorBoard and to workdir/samples."""
        folder = self._workdir / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}_{step:07d}.png")
        self._writer.add_image(name, image, step, dataformats="HWC")

    def __enter__(self) -> Metrics:
        """For `with`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Shows what is pending, ends the bar and writes what is buffered."""
        try:
            if kind is None:
                self.flush()
        finally:
            self._bar.close()
            self._writer.close()
