"""Makes an alignment file of two checkpoints."""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any

from safeproj import __version__
from safeproj.adapter.files import bytes_of
from safeproj.alignment.decomposition import eigenpairs, smaller_form
from safeproj.alignment.file import (
    EIGENPAIRS,
    METADATA,
    SCHEMA,
    VALUES,
    ZERO,
    Recorded,
    is_plain,
    open_file,
)
from safeproj.alignment.pair import Pair
from safeproj.alignment.targets import Target
from safeproj.errors import SafeprojError
from safeproj.manifest import versions
from safeproj.match import quantised_dtypes, quantised_warning
from safeproj.tensorfile import write

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20
"""Bytes that are copied at a time."""

SQUARES = 1 << 22
"""Numbers whose squares are summed in float32, before float64 takes over."""


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

    def keep(self, V: Tensor) -> tuple[Recorded, dict[str, Tensor]]:
        """Return what is recorded of `V` (m, n), and the tensors by the last part of their name.

        Raises:
            FloatingPointError: `V` is too large for float32.
        """
        m, n = V.shape
        rows = max(1, SQUARES // max(n, 1))
        norm = sum(float(block.square().sum().double()) for block in V.split(rows)) ** 0.5
        if not math.isfinite(norm):
            raise FloatingPointError("the alignment matrix has a norm that is not finite")
        if norm == 0.0:
            return Recorded(ZERO, (m, n), 0.0), {}
        if self.exact:
            form, tensor = smaller_form(V)
            return Recorded(form, (m, n), norm), {form: tensor.cpu().clone()}
        found = eigenpairs(V, self.rank, self.energy)
        record = Recorded(EIGENPAIRS, (m, n), norm, found.error, found.residual, found.leak)
        return record, {EIGENPAIRS: found.U, VALUES: found.eigenvalues}


@dataclass(frozen=True)
class Made:
    """An alignment file that was written.

    Attributes:
        weights: key to what is recorded.
        nbytes: size of the file.
        warnings: what the user should know about the checkpoints.
    """

    weights: dict[str, Recorded]
    nbytes: int
    warnings: tuple[str, ...]

    def describe(self) -> str:
        """Return what it holds in words."""
        text = f"{len(self.weights)} weights, {self.nbytes / 1e6:.1f} MB"
        errors = [w.error for w in self.weights.values() if w.form == EIGENPAIRS]
        if not errors:
            return f"{text}, exact"
        mean = sum(errors) / len(errors)
        return (
            f"{text}, relative error of C {min(errors):.3f} to {max(errors):.3f}, mean {mean:.3f}"
        )


def check_file(out: Path, overwrite: bool) -> None:
    """Refuse an `--out` that cannot be written, before any weight is read.

    Raises:
        SafeprojError: it exists and is not to be replaced, or is in no directory.
    """
    if not out.name.endswith(".safetensors"):
        raise SafeprojError(
            f"--out {out}: expected a name such as model.safealign.safetensors for the file"
        )
    if not out.resolve().parent.is_dir():
        raise SafeprojError(f"--out {out}: {out.resolve().parent} is no directory; create it")
    if os.path.lexists(out):
        if not overwrite:
            raise SafeprojError(f"--out {out}: exists; give --overwrite to replace it")
        if out.is_symlink() or not out.is_file():
            raise SafeprojError(f"--out {out}: is no file; choose a name that does not exist")
        open_file(str(out))  # nothing else is replaced


def make_file(
    pair: Pair,
    targets: Sequence[Target],
    kept: Iterable[
        tuple[tuple[Recorded, dict[str, Tensor]], tuple[dict[str, str], dict[str, str]]]
    ],
    wanted: Mapping[str, Any],
    out: Path,
) -> Made:
    """Write the file; it appears complete or not at all.

    What is kept goes to a nameless file beside it first, since its header comes before the tensors
    and says how large they are: for a moment the disk holds them twice.

    Args:
        pair: the two checkpoints.
        targets: the weights.
        kept: of each weight, in the same order: what `Form.keep` returned, and the digests.
        wanted: the options, for the file.
        out: the file to create or to replace.

    Raises:
        SafeprojError: it cannot be written; nothing is left behind.
    """
    place = out.resolve()
    hidden = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    weights: dict[str, Recorded] = {}
    layout: dict[str, tuple[str, tuple[int, ...], int]] = {}
    digests = []
    try:
        with tempfile.TemporaryFile(dir=place.parent) as spool:
            for target, ((record, tensors), sha256) in zip(targets, kept, strict=True):
                weights[target.key] = record
                digests.append(sha256)
                for name, tensor in tensors.items():
                    layout[f"{target.key}.{name}"] = ("F32", tuple(tensor.shape), tensor.nbytes)
                    spool.write(bytes_of(tensor))
            quantised = _quantised(pair, targets)
            document = _document(pair, targets, weights, digests, wanted, quantised)
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
            spool.seek(0)
            try:
                write(hidden, {"format": "pt", METADATA: text}, layout, _chunks(spool))
                with hidden.open("rb+") as file:
                    os.fsync(file.fileno())
                open_file(str(hidden))
                hidden.replace(place)
            finally:
                hidden.unlink(missing_ok=True)
    except OSError as error:
        raise SafeprojError(
            f"--out {out}: cannot be written ({error.strerror or error}); nothing was written"
        ) from error
    warnings = (quantised_warning(role, found) for role, found in quantised.items() if found)
    return Made(weights, place.stat().st_size, tuple(warnings))


def _chunks(file: IO[bytes]) -> Iterator[memoryview]:
    while chunk := file.read(CHUNK):
        yield memoryview(chunk)


def _document(
    pair: Pair,
    targets: Sequence[Target],
    weights: Mapping[str, Recorded],
    digests: Sequence[tuple[dict[str, str], dict[str, str]]],
    wanted: Mapping[str, Any],
    quantised: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return the JSON of the metadata: no time and no host, so that the same run gives the same."""
    sha256 = pair.digests_of(digests)
    inputs = {
        role: {
            **_published(identity),
            "quantised": list(quantised[role]),
            "sha256": sha256[role],
        }
        for role, identity in pair.inputs.items()
    }
    parameters = {
        target.parameter: {"shape": list(target.stored_shape), **asdict(target.layout)}
        for target in targets
    }
    return {
        "schema": SCHEMA,
        "tool": {"name": "safeproj", "version": __version__},
        "versions": versions(),
        "options": dict(wanted),
        "inputs": inputs,
        "config": _without_paths(pair.config),
        "parameters": parameters,
        "weights": {key: asdict(record) for key, record in weights.items()},
    }


def _without_paths(value: Any) -> Any:
    """Return a config without the places on a machine that some keep, such as `_name_or_path`."""
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items() if not _is_path(each)}
    return [_without_paths(each) for each in value] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    absolute = (PurePosixPath, PureWindowsPath)
    return isinstance(value, str) and any(kind(value).is_absolute() for kind in absolute)


def _published(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the directories of the machine that the file is made on."""
    if "revision" in identity:
        return dict(identity)
    name = Path(identity["source"]).expanduser().resolve().name
    return {"source": "".join(each if is_plain(each) else "_" for each in name)}


def _quantised(pair: Pair, targets: Sequence[Target]) -> dict[str, list[str]]:
    """Return for each role the dtypes of codes among the weights."""
    return {
        "base": quantised_dtypes((target.base for target in targets), pair.base.checkpoint),
        "aligned": quantised_dtypes(
            (target.aligned for target in targets), pair.aligned.checkpoint
        ),
    }
