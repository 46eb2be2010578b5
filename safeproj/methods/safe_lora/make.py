"""Makes an alignment file of two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.checkpoint.hashes import Sides
from safeproj.engine import Cluster, one_thread, resolve_device
from safeproj.errors import SafeprojError
from safeproj.methods.recorded import Made, check_file, recorded_document, write_recorded
from safeproj.methods.safe_lora.decomposition import eigenpairs, smaller_form
from safeproj.methods.safe_lora.file import EIGENPAIRS, KIND, VALUES, ZERO, Recorded
from safeproj.methods.safe_lora.pair import Pair
from safeproj.methods.safe_lora.score import differences
from safeproj.methods.safe_lora.targets import Target, find_targets
from safeproj.plan.match import quantised_dtypes, quantised_warning
from safeproj.storage.arrays import AnyArray, sum_of_squares, to_host
from safeproj.storage.published import published

if TYPE_CHECKING:
    from safeproj.records.profile import Profile
    from safeproj.run.options import Observer


@dataclass(frozen=True)
class Form:
    """How much of `C` is kept. Exactly one of the fields is given.

    Attributes:
        rank: the K leading eigenpairs.
        energy: the fewest eigenpairs with `σ₁² + … + σ_K² >= energy · ‖V‖_F²`, 0 < energy <= 1.
        exact: `C` or `V`, whichever is smaller.

    Raises:
        SafeprojError: none is given, or more than one, or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if (self.rank is not None) + (self.energy is not None) + self.exact != 1:
            raise SafeprojError("give one of --rank, --energy and --exact")
        if self.rank is not None and self.rank < 1:
            raise SafeprojError(f"--rank must be at least 1, found {self.rank}")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise SafeprojError(f"--energy must lie in (0, 1], found {self.energy}")

    def to_dict(self) -> dict[str, Any]:
        """Return the field that is given."""
        return {name: value for name, value in asdict(self).items() if value}

    def keep(self, V: AnyArray) -> tuple[Recorded, dict[str, AnyArray]]:
        """Return what is recorded of `V` (m, n), and the tensors by the last part of their name.

        Raises:
            FloatingPointError: `V` is too large for float32.
        """
        m, n = V.shape
        norm = math.sqrt(float(sum_of_squares(V)))
        if not math.isfinite(norm):
            raise FloatingPointError("the alignment matrix has a norm that is not finite")
        if norm == 0.0:
            return Recorded(ZERO, (m, n), 0.0), {}
        if self.exact:
            form, tensor = smaller_form(V, norm)
            return Recorded(form, (m, n), norm), {form: to_host(tensor).copy()}
        found = eigenpairs(V, norm, self.rank, self.energy)
        record = Recorded(EIGENPAIRS, (m, n), norm, found.error, found.residual, found.leak)
        return record, {EIGENPAIRS: found.U, VALUES: found.eigenvalues}


@dataclass(frozen=True)
class Aligned(Made):
    """An alignment file that was written.

    Attributes:
        weights: key to what is recorded.
    """

    weights: Mapping[str, Recorded] = field(default_factory=dict)


@one_thread()
def make_alignment(
    out: Path,
    base: str,
    aligned: str,
    form: Form,
    targets: Sequence[str],
    *,
    device: str,
    workers: int | None,
    cluster: Cluster | None,
    maps: Sequence[str],
    observer: Observer | None,
    profile: Profile,
    overwrite: bool,
) -> Aligned:
    """Write an alignment file of two checkpoints; see `SafeLora.make`."""
    check_file(out, overwrite, KIND)
    with profile.phase("match"):
        pair = Pair(aligned, base, maps)
        found = find_targets(pair.aligned, pair.base, targets)
    with profile.phase("fetch"):
        tasks = [(target.key, pair.difference(target.aligned, target.base)) for target in found]
    if observer is not None:
        observer.start(len(tasks), sum(source.nbytes for _, source in tasks))
    with profile.phase("score"):
        kept = differences(
            tasks,
            form.keep,
            device=device,
            workers=workers,
            where=cluster,
            on_progress=observer.progress if observer is not None else None,
            usage=profile.usage,
        )
        wanted = {"targets": list(targets), **form.to_dict()}
        by_torch = resolve_device(device, wide=True).engine == "torch"
        return make_file(pair, found, kept, wanted, out, by_torch=by_torch, overwrite=overwrite)


def make_file(
    pair: Pair,
    targets: Sequence[Target],
    kept: Iterable[tuple[tuple[Recorded, dict[str, AnyArray]], Sides]],
    wanted: Mapping[str, Any],
    out: Path,
    *,
    by_torch: bool = False,
    overwrite: bool = False,
) -> Aligned:
    """Write the file; it appears complete or not at all.

    Args:
        pair: the two checkpoints.
        targets: the weights.
        kept: of each weight, in the same order: what `Form.keep` returned, and the digests.
        wanted: the options, for the file.
        out: the file to create.
        by_torch: whether torch computed it.
        overwrite: whether an alignment file that is there may be replaced.

    Raises:
        SafeprojError: it cannot be written; nothing is left behind.
    """
    weights: dict[str, Recorded] = {}
    digests: list[Sides] = []
    quantised: dict[str, list[str]] = {}

    def tensors() -> Iterator[tuple[str, AnyArray]]:
        for target, ((record, found), read) in zip(targets, kept, strict=True):
            weights[target.key] = record
            digests.append(read)
            for name, tensor in found.items():
                yield f"{target.key}.{name}", tensor

    def document() -> dict[str, Any]:
        quantised.update(_quantised(pair, targets))
        return _document(pair, targets, weights, digests, wanted, quantised, by_torch)

    nbytes = write_recorded(out, KIND, tensors(), document, overwrite=overwrite)
    warnings = (quantised_warning(role, found) for role, found in quantised.items() if found)
    told = pair.swapped()
    said = (*warnings, *(() if told is None else (told,)))
    return Aligned(nbytes, _described(weights, nbytes), said, weights)


def _described(weights: Mapping[str, Recorded], nbytes: int) -> str:
    text = f"{len(weights)} weights, {nbytes / 1e6:.1f} MB"
    errors = [weight.error for weight in weights.values() if weight.form == EIGENPAIRS]
    if not errors:
        return f"{text}, exact"
    mean = sum(errors) / len(errors)
    return f"{text}, relative error of C {min(errors):.3f} to {max(errors):.3f}, mean {mean:.3f}"


def _document(
    pair: Pair,
    targets: Sequence[Target],
    weights: Mapping[str, Recorded],
    digests: Sequence[Sides],
    wanted: Mapping[str, Any],
    quantised: Mapping[str, Sequence[str]],
    by_torch: bool,
) -> dict[str, Any]:
    """Return the JSON of the metadata."""
    found = pair.digests_of(digests)
    inputs = {
        role: {
            **published(identity),
            "quantised": list(quantised[role]),
            **found[role],
        }
        for role, identity in pair.inputs.items()
    }
    parameters = ((each.parameter, each.stored_shape, each.layout) for each in targets)
    records = {key: asdict(record) for key, record in weights.items()}
    return recorded_document(
        KIND, wanted, inputs, pair.config, parameters, records, by_torch=by_torch
    )


def _quantised(pair: Pair, targets: Sequence[Target]) -> dict[str, list[str]]:
    """Return for each role the dtypes of codes among the weights."""
    return {
        "base": quantised_dtypes((target.base for target in targets), pair.base.checkpoint),
        "aligned": quantised_dtypes(
            (target.aligned for target in targets), pair.aligned.checkpoint
        ),
    }
