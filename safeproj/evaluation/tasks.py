"""Tasks of EleutherAI's lm-eval on a model that is loaded, where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.lm.models import quietly
from safeproj.storage.nearby import nearby
from safeproj.storage.source import StrPath
from safeproj.text import first_line, printable

Results = dict[str, dict[str, dict[str, float | None]]]
"""Task to metric to `value` and `stderr`."""


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        SafeprojError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise SafeprojError(
            "--lm-eval: lm-eval is not installed; install it beside safeproj (pip install "
            "'lm-eval[hf]'), or leave --lm-eval out"
        )


class Tasks:
    """Tasks of lm-eval, by name.

    Args:
        names: of tasks or groups.
        path: directory with further tasks, as `--include_path` of lm-eval.
        batch_size: requests that run at a time.
        limit: only so many documents of each task.
        seed: of whatever a task samples.

    Raises:
        SafeprojError: lm-eval is not installed, or knows no such task.
    """

    def __init__(
        self,
        names: Sequence[str],
        path: StrPath | None = None,
        batch_size: int = 16,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        require_lm_eval()
        path = None if path is None else Path(path)
        if path is not None and not path.is_dir():
            raise SafeprojError(f"--lm-eval-path {path}: no such directory{nearby(path)}")
        self.names = tuple(names)
        self.batch_size = batch_size
        self.limit = limit
        self.seed = seed
        manager = import_module("lm_eval.tasks").TaskManager
        self._manager = manager(include_path=None if path is None else str(path))
        unknown = [name for name in self.names if not self._manager.match_tasks([name])]
        if unknown or not self.names:
            raise SafeprojError(
                f"--lm-eval {', '.join(unknown)}: lm-eval knows no such task; lm-eval ls tasks "
                "lists them, and --lm-eval-path names a directory of your own"
            )

    def run(self, model: Any, tokenizer: Any) -> Results:
        """Return what a model reaches.

        Raises:
            SafeprojError: lm-eval cannot run a task.
        """
        evaluator = import_module("lm_eval.evaluator")
        wrapper = import_module("lm_eval.models.huggingface").HFLM
        with quietly():
            try:
                wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
                found = evaluator.simple_evaluate(
                    model=wrapped,
                    tasks=list(self.names),
                    task_manager=self._manager,
                    limit=self.limit,
                    random_seed=self.seed,
                    numpy_random_seed=self.seed,
                    torch_random_seed=self.seed,
                    fewshot_random_seed=self.seed,
                    log_samples=False,
                    verbosity="ERROR",
                )
            except Exception as error:  # whatever lm-eval and its tasks raise
                raise SafeprojError(
                    f"--lm-eval {','.join(self.names)}: {type(error).__name__}: "
                    f"{printable(first_line(error))}"
                ) from error
        return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return metrics, which lm-eval calls `acc,none`, and errors, `acc_stderr,none`."""
    found = {}
    for name, value in values.items():
        metric, _, filtered = name.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        found[shown] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return found
