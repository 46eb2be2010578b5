"""The statistics that a run needs: opened, or made first where data is given in their place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.adapter import Adapter, read_adapter
from safeproj.adapter.record import WeightNames
from safeproj.engine import Replacement
from safeproj.errors import SafeprojError
from safeproj.lm.data import BATCH_SIZE, RANDOM, Data, random_data, read_data
from safeproj.methods.covariance.file import Statistics, open_statistics
from safeproj.methods.covariance.formulas import Reconstruction
from safeproj.methods.covariance.method import STATISTICS, Covariance
from safeproj.methods.interface import require_all_as_they_are
from safeproj.plan.match import Plan
from safeproj.storage.arrays import from_torch
from safeproj.storage.source import open_folder

if TYPE_CHECKING:
    from safeproj.run.options import Options


@contextmanager
def prepared(
    method: Covariance, adapters: Sequence[str | Adapter], options: Options
) -> Iterator[Covariance]:
    """Yield the method with statistics, in a temporary directory if the model has to be run.

    They are those of the layers that the adapters change, made with the defaults of
    `safeproj stats`: the model is loaded, and run on the data.

    Raises:
        SafeprojError: the data, or the model, cannot be used.
    """
    if method.reconstruct:
        require_data(method, adapters, options)
    if not method.runs_model:
        yield method
        return
    with tempfile.TemporaryDirectory(prefix="safeproj-") as directory:
        with options.profile.phase("statistics"):
            made = _made(method, adapters, options, Path(directory))
        yield replace(method, statistics=made)


@dataclass(frozen=True)
class Rebuilding(Statistics):
    """Statistics with which adapters are corrected layer by layer, by running the model."""

    method: Covariance | None = None

    runs_adapter = True

    def prepare(self, adapter: Adapter, plan: Plan, options: Options) -> dict[str, Replacement]:
        from safeproj.lm import models
        from safeproj.lm.adapters import require_peft, wide_host
        from safeproj.lm.passes import batch_size
        from safeproj.methods.covariance.reconstruct import reconstructed

        method = self.method
        assert method is not None
        formulas = method.formulas
        assert isinstance(formulas, Reconstruction)
        require_peft(adapter.folder)
        folder = open_folder(method.sources["aligned"])
        tokenizer = models.load_tokenizer(folder)
        data = [
            read_data(str(source), tokenizer, option=name, chat=options.chat)
            for name, source in _data(method)
        ]
        safety, benign = (each.batches(batch_size(len(each.samples))) for each in data)
        host = wide_host(method.host, folder, options.device)
        modules = [item.module.name for item in plan.modules]
        with host.adapted(adapter) as (load, moved):
            names = {moved.get(name, name): name for name in modules}
            found = reconstructed(load(), list(names), safety, benign, formulas, options.on_batch)
        return {names[place]: Replacement(from_torch(A)) for place, A in found.items()}


def _data(method: Covariance) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    given = method.sources
    return ("--safety-data", given.get("safety_data")), ("--task-data", given.get("task_data"))


def require_data(method: Covariance, adapters: Sequence[str | Adapter], options: Options) -> None:
    """Refuse what cannot be corrected layer by layer.

    Raises:
        SafeprojError: there is no data to run the model with the adapter on, more than one adapter,
            or a selection by scores.
    """
    require_all_as_they_are(options, "--reconstruct")
    if len(adapters) != 1:
        raise SafeprojError("--reconstruct goes with one adapter; patch them one by one")
    for option, source in _data(method):
        if source is None or source.endswith(STATISTICS):
            found = "missing" if source is None else "a file of statistics"
            raise SafeprojError(
                f"--reconstruct runs the adapter on data, and {option} is {found}; give prompts "
                "with responses"
            )


def statistics_of(method: Covariance, maps: Sequence[str]) -> Statistics:
    """Return the statistics that adapters are scored with.

    Raises:
        SafeprojError: they cannot be used, or are still to be made.
    """
    given = method.sources
    if method.statistics is not None:
        names = (given["safety_data"], given.get("task_data", RANDOM))
        found = open_statistics(*method.statistics, maps, given.get("aligned"), names)
        return Rebuilding(**vars(found), method=method) if method.reconstruct else found
    if method.runs_model:
        raise SafeprojError(
            "statistics are needed here, not data; make them with `safeproj stats`, and give them "
            "as --safety-data and --task-data"
        )
    return open_statistics(given["safety_data"], given["task_data"], maps, given.get("aligned"))


def _made(
    method: Covariance, adapters: Sequence[str | Adapter], options: Options, directory: Path
) -> tuple[Path, Path]:
    """Make the statistics that are missing, and return where both are."""
    from safeproj.lm import models
    from safeproj.lm.adapters import Host
    from safeproj.lm.layers import ALL_LINEAR
    from safeproj.methods.covariance.make import make_statistics

    models.require_extra()
    folder = open_folder(method.sources["aligned"])
    tokenizer = models.load_tokenizer(folder)
    given = {role: method.sources.get(f"{role}_data") for role in ("safety", "task")}
    data: dict[str, Data] = {}
    for role, source in given.items():
        if source is None:
            data[role] = random_data(tokenizer)
        elif not source.endswith(STATISTICS):
            data[role] = read_data(source, tokenizer, option=f"--{role}-data", chat=options.chat)
    read = [_adapter(source) for source in adapters]
    places = {role: Path(str(source)) for role, source in given.items()}
    host = method.host or Host(folder, options.device)
    with models.quietly(), host.plain() as model:
        adapted = [each for each in read if each is not None]
        targets = _targets(model, adapted) if adapters else [ALL_LINEAR]
        for role, each in data.items():
            places[role] = directory / f"{role}.stats.safetensors"
            make_statistics(
                model,
                each.batches(BATCH_SIZE),
                places[role],
                targets,
                models.recorded_inputs(folder, each),
                on_batch=options.on_batch,
            )
    return places["safety"], places["task"]


def _adapter(source: str | Adapter) -> Adapter | None:
    try:
        return source if isinstance(source, Adapter) else read_adapter(source, unknown=True)
    except SafeprojError:
        return None


def _targets(model: Any, adapters: Sequence[Adapter]) -> list[str]:
    """Return the names of the linear layers that adapters change."""
    from safeproj.lm.layers import is_linear
    from safeproj.lm.places import relocated

    weights = WeightNames({name for name, _ in model.named_parameters()})
    linear = {name for name, module in model.named_modules() if is_linear(module)}
    adapted = {module.named(weights).name for each in adapters for module in each.modules}
    moved = relocated(model, adapted)
    found = sorted(linear & {moved.get(name, name) for name in adapted})
    if adapters and not found:
        raise SafeprojError(
            f"{adapters[0].source}: changes no linear layer of the model; expected an adapter "
            "that was trained on it"
        )
    return found
