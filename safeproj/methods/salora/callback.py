"""Folds an adapter whenever `transformers.Trainer` saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from safeproj.adapter.write import check_place
from safeproj.lm.live import active_adapter, saved_in
from safeproj.methods.salora.folding import fold
from safeproj.methods.salora.initialisation import Initial
from safeproj.methods.salora.module import SafetyModule

FOLDED = "folded"
"""Where the folded adapter appears, below `output_dir`. Not below the checkpoint: the Trainer takes
a directory with an adapter in it for one that it has to load when it resumes."""


class FoldCallback(TrainerCallback):
    """Keeps `output_dir/folded`, the plain PEFT adapter of what was saved last.

    Checkpoints themselves hold `C_S B`, and with the task-specific initialisation the initial
    factors beside it, so that `safeproj salora fold` can fold any of them later.

    Args:
        module: the safety module that `constrain` was given.
        rank: as for `constrain`.
        initial: what `initialise` returned, if it was used.
    """

    def __init__(
        self, module: SafetyModule, *, rank: int | None = None, initial: Initial | None = None
    ) -> None:
        self._module = module.cut(rank)
        self._initial = initial

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse an output that could not be replaced, before any training."""
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        check_place(output / FOLDED, overwrite=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Fold what was saved, and keep the initial factors beside it."""
        if not state.is_world_process_zero:
            return
        model = kwargs["model"]
        checkpoint = saved_in(
            Path(args.output_dir) / f"checkpoint-{state.global_step}", active_adapter(model)
        )
        if self._initial is not None and checkpoint.is_dir():
            self._initial.save(checkpoint)
        self._fold(args, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Fold the result, which may be the best checkpoint instead of the last."""
        if state.is_world_process_zero:
            self._fold(args, kwargs["model"])

    def _fold(self, args: Any, model: Any) -> None:
        place = Path(args.output_dir) / FOLDED
        fold(model, self._module, place, initial=self._initial, overwrite=True)
