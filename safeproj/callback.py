"""Projects an adapter whenever `transformers.Trainer` saves it."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from safeproj.api import inspect, patch
from safeproj.errors import SafeprojError
from safeproj.lm.live import Live, active_adapter, saved_in
from safeproj.methods.interface import Method
from safeproj.records.scores import Report, spread
from safeproj.run.job import Job
from safeproj.run.options import Options

PROJECTED = "projected"
"""Begin of the name of a patched adapter, beside `checkpoint-…`. Not below that: the Trainer takes
a directory with an adapter in it for one that it has to load when it resumes."""


class ProjectionCallback(TrainerCallback):
    """Says at each save how safe the adapter is, and writes it patched beside the checkpoint.

    The model that is trained stays as it is. `output_dir/projected-N` is what `patch` makes of
    `output_dir/checkpoint-N`; it goes when the Trainer removes the checkpoint. The cosines go to
    the Trainer's log history, and to stderr.

    Args:
        method: as for `project`. What it needs is looked at, and statistics are made, when training
            begins. An adapter that cannot be used later, such as one that diverged, ends no
            training: a warning says so.
        options: as for `project`, and the dtype that is written.
        adapter: the name of the adapter; the active one if None.
        write: False to write nothing but the cosines.
        on_report: told the step and the report of each save.

    Attributes:
        reports: by step.
    """

    def __init__(
        self,
        method: Method,
        options: Options | None = None,
        *,
        adapter: str | None = None,
        write: bool = True,
        on_report: Callable[[int, Report], None] | None = None,
    ) -> None:
        self.reports: dict[int, Report] = {}
        self._method = method
        self._options = options or Options()
        self._adapter = adapter
        self._write = write
        self._on_report = on_report
        self._stack = ExitStack()
        self._written: dict[Path, Path] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse what cannot be done, before any training."""
        if not state.is_world_process_zero:
            return
        model = kwargs["model"]
        self._stack.close()  # of a training that did not end
        live = Live(model, self._adapter)
        (self._name,) = live.chosen(self._adapter or active_adapter(model))
        adapter = live.read(self._name)
        method = replace(self._method, host=live)
        self._ready = self._stack.enter_context(method.prepared([adapter], self._options))
        Job(self._ready, self._options).matched(adapter)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Score what was saved, and write it patched."""
        if not state.is_world_process_zero:
            return
        step, output = state.global_step, Path(args.output_dir)
        checkpoint, out = output / f"checkpoint-{step}", output / f"{PROJECTED}-{step}"
        saved = saved_in(checkpoint, self._name)
        try:
            if self._write:
                report = patch(self._ready, saved, out, self._options, overwrite=True)
                self._written[checkpoint] = out
            else:
                report = inspect(self._ready, saved, self._options)
        except SafeprojError as error:
            told = SafeprojError(f"step {step}: the adapter was not projected: {error.message}")
            warnings.warn(str(told), stacklevel=2)
            return
        self._forget()
        self._tell(state, step, report)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Remove the statistics that were made."""
        self._stack.close()

    def _forget(self) -> None:
        """Remove what was written of checkpoints that the Trainer has removed."""
        for checkpoint in [each for each in self._written if not each.exists()]:
            shutil.rmtree(self._written.pop(checkpoint), ignore_errors=True)

    def _tell(self, state: Any, step: int, report: Report) -> None:
        self.reports[step] = report
        found = {f"cosine_{name}": value for name, value in spread(report.cosines).items()}
        found |= {"modules": len(report.modules), "projected": report.projected}
        log = {f"safeproj_{name}": value for name, value in found.items()}
        state.log_history.append({**log, "epoch": state.epoch, "step": step})
        cosines = ", ".join(
            f"{name} {value:.3f}"
            for name, value in spread(report.cosines).items()
            if value is not None
        )
        tqdm.write(
            f"safeproj: step {step}: cosine {cosines or 'undefined'}; {report.doing} "
            f"{report.projected} of {len(report.modules)} modules",
            file=sys.stderr,
        )
        if self._on_report is not None:
            self._on_report(step, report)
