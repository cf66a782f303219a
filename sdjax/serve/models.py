"""Checkpoints of a server: loaded on demand, the least recently used of them leaves when memory is short."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from sdjax.core.errors import UserError, unknown
from sdjax.pipeline.pipeline import Pipeline

GIB = 2**30

logger = logging.getLogger("sdjax")


class Model:
    """One checkpoint.

    Attributes:
        name, source: as clients and as the command line name it.
        pipe: None while it is not loaded.
        users: jobs that need it.
        used: number of its last use among all models' uses.
        size: bytes of its parameters; 0 until it was loaded once.
        lock: held while a request is prepared, which may load a LoRA, and while an image begins.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        self.pipe: Pipeline | None = None
        self.users = self.used = self.size = 0
        self.lock = threading.Lock()

    def expected(self) -> int:
        """Bytes of its parameters; before the first load those of its files."""
        return self.size or bytes_of(Path(self.source).expanduser())


class Models:
    """All checkpoints; its methods are the engine's thread's alone, but for `find`, `share` and `release`."""

    def __init__(self, sources: Mapping[str, str], load: Callable[[str], Pipeline], memory: int | None = None) -> None:
        """Name the checkpoints; none is loaded.

        Args:
            sources: by name.
            load: from a source to a pipeline.
            memory: bytes of parameters on the devices at a time; None for no bound.
        """
        self.all = {name: Model(name, source) for name, source in sources.items()}
        self.current = next(iter(self.all))
        self._load, self.memory, self._uses = load, memory, 0
        self._counting = threading.Lock()

    def find(self, name: str | None) -> Model:
        """The model of this name, or the current one; a UserError where there is none."""
        if name is None:
            name = self.current
        if name not in self.all:
            raise unknown("model", name, self.all)
        return self.all[name]

    def that_fit(self) -> list[Model]:
        """The first models that memory holds together, at least one."""
        found: list[Model] = []
        for model in self.all.values():
            bytes_ = sum(one.expected() for one in [*found, model])
            if found and self.memory is not None and bytes_ > self.memory:
                break
            found.append(model)
        return found

    def share(self, model: Model) -> bool:
        """Count a further user of a model that has some, from any thread; False where it has none."""
        with self._counting:
            if not model.users:
                return False
            model.users += 1
            return True

    def acquire(self, model: Model) -> bool:
        """Have the model loaded and count a user, whom `release` takes off; False where others must end before.

        Raises:
            UserError: it cannot be loaded, or alone needs more memory than there is.
        """
        self._uses += 1
        if model.pipe is None:
            if not self._make_room(model):
                return False
            logger.info("loading %s", model.name)
            model.pipe = self._load(model.source)
            model.size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.pipe.params))
            bound = "" if self.memory is None else f" of {self.memory / GIB:.1f}"
            logger.info(
                "loaded %s: %.2f GiB; %.2f%s GiB are taken", model.name, model.size / GIB, self.taken / GIB, bound
            )
        model.used = self._uses
        with self._counting:
            model.users += 1
        return True

    def release(self, model: Model) -> None:
        """Take a user off, from any thread."""
        with self._counting:
            model.users -= 1

    def unload(self, model: Model) -> None:
        """Free a model that nobody uses."""
        with self._counting:
            if model.pipe is None or model.users:
                return
            model.pipe = None
        logger.info("unloaded %s", model.name)

    @property
    def taken(self) -> int:
        """Bytes of parameters on the devices."""
        return sum(model.size for model in self.all.values() if model.pipe is not None)

    def _make_room(self, model: Model) -> bool:
        if self.memory is None:
            return True
        wanted = model.expected()
        if wanted > self.memory:
            have = f"the server may take {self.memory / GIB:.2f}"
            raise UserError(f"model {model.name!r} needs {wanted / GIB:.2f} GiB; {have}")
        loaded = sorted((one for one in self.all.values() if one.pipe is not None), key=lambda one: one.used)
        for one in loaded:
            if self.taken + wanted <= self.memory:
                return True
            self.unload(one)
        return self.taken + wanted <= self.memory


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder; 0 where it is not on this machine."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*.safetensors")) if path.is_dir() else 0
