"""How a run is done, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from safeproj.engine import Cluster, Progress, resolve_devices
from safeproj.errors import SafeprojError
from safeproj.lm.chat import ChatOptions
from safeproj.names import parse_rules
from safeproj.plan.select import Selection
from safeproj.records.profile import Profile
from safeproj.run.decide import DTYPES
from safeproj.storage.ranges import DOWNLOADS, Download, Fetching

if TYPE_CHECKING:
    from safeproj.lm.layers import OnBatch


class Observer(Protocol):
    """Who wants to see a run go on."""

    def start(self, modules: int, nbytes: int) -> None:
        """So many weights are to be read, so many bytes; again for each further batch."""

    def progress(self, event: Progress) -> None:
        """Something was read or finished; called from the engine's threads."""

    def ran(self, done: int, total: int) -> None:
        """So many of all batches of data were run, before anything is read."""


@dataclass(frozen=True)
class Options:
    """How a run is done.

    Attributes:
        selection: which modules are projected; if it does not say how they are chosen, those with
            `cos <= 0.35`, or all, as the method has it.
        device: where the arithmetic runs: `auto`, `cpu`, `cuda`, `cuda:N`, `mps`, or
            `torch` for the processor by torch; several GPUs, among which the weights are shared,
            as `cuda:0,cuda:1` or `cuda:all`.
        workers: threads over modules on the CPU, None for one per core, at most 8. The result
            does not depend on it.
        cluster: the Ray cluster on which weights are read and scored; None for this machine.
        dtype: of the projected tensors: `keep`, `float32`, `bfloat16` or `float16`.
        maps: `RUNTIME=CHECKPOINT` rules for names that the checkpoints have in another form.
        portable: write an adapter that all readers compute alike.
        download: whether remote weights are downloaded as whole files: `always`, `never`, or
            `auto`: where half of a file is needed, or it is small. Else ranges of it are read.
        keep: keep what is read in ranges for later runs.
        chat: how chats in data are put to a model that is run on it.
        observer: told about the progress.
        profile: filled in with where the time went.

    Raises:
        SafeprojError: a value is out of range, a rule is malformed, or the device is not there.
    """

    selection: Selection = field(default_factory=Selection)
    device: str = "auto"
    workers: int | None = None
    cluster: Cluster | None = None
    dtype: str = "keep"
    maps: tuple[str, ...] = ()
    portable: bool = False
    download: Download = "auto"
    keep: bool = False
    chat: ChatOptions = field(default_factory=ChatOptions)
    observer: Observer | None = field(default=None, compare=False, repr=False)
    profile: Profile = field(default_factory=Profile, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SafeprojError(f"--dtype {self.dtype}: expected {', '.join(DTYPES)}")
        if self.workers is not None and self.workers < 1:
            raise SafeprojError(f"--workers must be 1 or more, found {self.workers}")
        if self.download not in DOWNLOADS:
            raise SafeprojError(f"--download {self.download}: expected {', '.join(DOWNLOADS)}")
        parse_rules(self.maps)
        resolve_devices(self.device)

    @property
    def on_batch(self) -> OnBatch | None:
        """Who is told how many batches of data were run."""
        return None if self.observer is None else self.observer.ran

    @property
    def fetching(self) -> Fetching:
        """How remote checkpoints are read."""
        return Fetching(self.download, self.keep)
