"""State between requests of A1111's API: options that clients change, and names of their tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.core.errors import unknown
from sdjax.pipeline.options import check_int
from sdjax.serve.engine import Engine
from sdjax.serve.jobs import Job
from sdjax.serve.models import Model

ORIGIN = "a1111"
CHECKPOINT, CLIP_STOP, VAE = "sd_model_checkpoint", "CLIP_stop_at_last_layers", "sd_vae"
NOISE, CPU = "randn_source", "CPU"
SOURCES = ("GPU", CPU, "NV")
AUTOMATIC_VAE = ("Automatic", "None", "", None)
MOST_TASKS = 1000
MOST_LAYERS = 12  # that A1111's slider leaves out


class Override(NamedTuple):
    """Options that act on every image, as A1111 counts and names them.

    Attributes:
        clip_stop: layer of the text encoder at which to stop, counted from the last, 1.
        noise: where it is drawn; only a CPU's is the same here, and the others are this program's own.
    """

    clip_stop: int = 1
    noise: str = SOURCES[0]

    def changed(self, options: Mapping[str, Any]) -> Override:
        """These options, but for those that are given; a UserError where one is none."""
        stop, noise = options.get(CLIP_STOP), options.get(NOISE)
        if isinstance(stop, float) and stop.is_integer():
            stop = int(stop)
        if noise is not None and noise not in SOURCES:
            raise unknown(NOISE, str(noise)[:80], SOURCES)
        clip_stop = self.clip_stop if stop is None else check_int(CLIP_STOP, stop, 1, MOST_LAYERS)
        return Override(clip_stop, self.noise if noise is None else noise)


class Session:
    """Options and tasks, shared by all clients, as A1111 shares them.

    Attributes:
        engine: whose current model is A1111's sd_model_checkpoint.
        usual: options of requests that name none.
        others: options that are kept and act on nothing.
        tasks: ids of jobs by their clients' own.
        interrupted, skipped: whether the last job was.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.usual = Override()
        self.others: dict[str, Any] = {"send_seed": True}
        self.tasks: OrderedDict[str, str] = OrderedDict()
        self.interrupted = self.skipped = False

    def options(self) -> dict[str, Any]:
        """Options as clients read them."""
        return {
            "samples_format": "png",
            CHECKPOINT: self.engine.models.current,
            VAE: "Automatic",
            CLIP_STOP: self.usual.clip_stop,
            NOISE: self.usual.noise,
            **self.others,
        }

    async def change(self, changes: dict[str, Any]) -> None:
        """Change options, and load the model that is named; those that are not known are passed over.

        Raises:
            UserError: a model or a number is wrong; nothing has been changed.
        """
        usual = self.usual.changed(changes)
        name = self.model_of(changes.get(CHECKPOINT))
        if isinstance(send_seed := changes.get("send_seed"), bool):
            self.others["send_seed"] = send_seed
        if name is not None and name != self.engine.models.current:
            await self.engine.pipeline(name)
            self.engine.models.current = name
        self.usual = usual

    def model_of(self, title: Any) -> str | None:
        """The name of the model that a client names by its title, name or file; None for none.

        Raises:
            UserError: there is none.
        """
        if title in (None, "", "None"):
            return None
        models = self.engine.models.all
        wanted = str(title)[:200].casefold()
        for model in models.values():
            if wanted in (model.name.casefold(), filename(model).casefold()):
                return model.name
        raise unknown("model", str(title)[:200], models, CHECKPOINT)

    def begin(self, job: Job, task: str | None) -> None:
        """Note a new job, and what its client calls it."""
        self.interrupted = self.skipped = False
        if task:
            self.tasks[task] = job.id
            while len(self.tasks) > MOST_TASKS:
                self.tasks.popitem(last=False)

    def running(self) -> Job | None:
        """The oldest job of this API that is on the devices."""
        jobs = list(self.engine.jobs.values())
        return next((job for job in jobs if job.origin == ORIGIN and job.state == "running"), None)

    def end_running(self) -> bool:
        """End the job that runs, which keeps its finished images; False where there is none."""
        job = self.running()
        if job is not None:
            self.engine.cancel(job)
        return job is not None


def filename(model: Model) -> str:
    """The last part of a model's source: paths of the server are nobody's business."""
    return model.source.rstrip("/").replace("\\", "/").split("/")[-1]


def check_vae(options: dict[str, Any]) -> list[str]:
    """A note where another autoencoder is named, which a server loads with its model."""
    vae = options.get(VAE)
    return [] if vae in AUTOMATIC_VAE else [f"{VAE} {str(vae)[:80]!r} is not followed: models have their own"]
