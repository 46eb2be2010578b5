"""Alignment files: what `C` needs of every weight, in one safetensors file instead of two models.

The tensors of a weight are named by its key: `KEY.U` (m, K) and `KEY.eigenvalues` (K,), the leading
eigenpairs of `C`; or the smaller exact form, `KEY.C` (m, m) or `KEY.V` (m, n). All are float32. The
rest is JSON under `safeproj` in the file's metadata; docs/formats.md describes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from safeproj.adapter import Adapter
from safeproj.alignment.targets import key_of
from safeproj.checkpoint import Weight
from safeproj.checkpoint.expression import Expression, Head, Swapped, stored_names
from safeproj.checkpoint.interface import TensorInfo, as_matrix
from safeproj.checkpoint.safetensors import SafetensorsWeight
from safeproj.engine import Comparison, Kept, Score
from safeproj.errors import SafeprojError, first_line, shorten
from safeproj.match import Plan, PlannedChange, PlannedModule, plan, quantised_warning
from safeproj.names import Layout, Names
from safeproj.select import Selection
from safeproj.source import LocalFolder, identity, open_folder
from safeproj.tensorfile import Header, read_header, require_printable, unique

SCHEMA = "safeproj.alignment/1"
SUFFIX = ".safealign.safetensors"
METADATA = "safeproj"
"""Key of the JSON text in the file's metadata."""

VALUES = "eigenvalues"

IDENTITY = ("source", "revision")
"""What a report says of a checkpoint that the file was made of."""

ZERO, V_ITSELF, C_ITSELF, EIGENPAIRS = "zero", "V", "C", "U"
FORMS = (ZERO, V_ITSELF, C_ITSELF, EIGENPAIRS)
"""What is kept of a weight: nothing where `V = 0`, `V`, `C`, or eigenpairs of `C`."""


@dataclass(frozen=True)
class Recorded:
    """What an alignment file says of one weight, beside its tensors.

    Attributes:
        form: one of `FORMS`.
        shape: (m, n).
        alignment_norm: `‖V‖_F`.
        error: upper bound of `‖C - C_K‖_F / ‖C‖_F`; 0 for the exact forms.
        residual: upper bound of `‖C - C_K‖₂`.
        leak: upper bound of `‖Uᵀ (C - C_K) U‖₂`.
    """

    form: str
    shape: tuple[int, int]
    alignment_norm: float
    error: float = 0.0
    residual: float = 0.0
    leak: float = 0.0


@dataclass(frozen=True)
class AlignmentFile:
    """An alignment file, in place of two checkpoints.

    It is a checkpoint whose weights are those of the running model, as far as names and shapes go.

    Attributes:
        source: the SRC as the user gave it.
        revision: the commit, if it is on the Hub.
        path: the local file.
        header: where its tensors are.
        document: the JSON object in its metadata.
        parameters: the running model's weights: name to shape and layout.
        weights: what is kept: key to record.
        maps: `--map` rules.
    """

    source: str
    revision: str | None
    path: Path
    header: Header = field(repr=False)
    document: dict[str, Any] = field(repr=False)
    parameters: dict[str, tuple[tuple[int, ...], Layout]] = field(repr=False)
    weights: dict[str, Recorded] = field(repr=False)
    maps: tuple[str, ...] = ()

    @property
    def is_truncated(self) -> bool:
        """Whether it holds eigenpairs of any weight, so that `C` is not exact."""
        return any(weight.form == EIGENPAIRS for weight in self.weights.values())

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["config"]
        return found

    @property
    def names(self) -> KeysView[str]:
        return self.parameters.keys()

    @property
    def documents(self) -> tuple[Path, ...]:
        return ()

    def describe(self, name: str) -> TensorInfo:
        return TensorInfo("F32", self.parameters[name][0])

    def weight(self, name: str, columns: int | None = None) -> Weight:  # noqa: ARG002
        raise SafeprojError(f"{self.source}: an alignment file, which does not hold {name} itself")

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for role, recorded in self.document["inputs"].items():
            found[role] = {name: recorded[name] for name in IDENTITY if name in recorded}
        return {**found, "alignment": {**self.document["options"], **identity(self)}}

    def plan(self, adapter: Adapter, selection: Selection) -> Plan:
        found = plan(adapter, self._names, self._names, selection)
        quantised = tuple(
            quantised_warning(role, recorded["quantised"])
            for role, recorded in self.document["inputs"].items()
            if recorded["quantised"]
        )
        return replace(found, warnings=(*found.warnings, *quantised))

    def origin(self, item: PlannedModule) -> Kept:
        key, rows = key_of(item.aligned), _rows(item.aligned)
        names = tuple(stored_names(item.aligned))
        kept = self.weights.get(key or "")
        if key is None or kept is None or rows not in (None, self.parameters[names[0]][0][0]):
            raise SafeprojError(
                f"{self.source}: holds nothing for {item.module.name} as the adapter has it "
                f"({key or shorten(names)}); make a file with it among --targets, with "
                "transformers installed (safeproj[train]), or use the checkpoints"
            )
        if kept.form == ZERO:
            return Kept(kept.form, None, kept.alignment_norm)
        weight = self._matrix(f"{key}.{kept.form}")
        eigenvalues = self._vector(f"{key}.{VALUES}") if kept.form == EIGENPAIRS else ()
        return Kept(
            kept.form,
            weight,
            kept.alignment_norm,
            eigenvalues,
            kept.error,
            kept.residual,
            kept.leak,
        )

    def comparison(self, adapter: Adapter, item: PlannedChange) -> Comparison | None:  # noqa: ARG002
        return None

    def digests(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        recorded = self.document["inputs"]
        read: dict[str, str] = {}
        for score in scores.values():
            read |= score.sha256[0] if score.sha256 is not None else {}
        for name in [name for name in read if name.endswith(f".{EIGENPAIRS}")]:
            values = f"{name.removesuffix(EIGENPAIRS)}{VALUES}"
            read[values] = hashlib.sha256(self._bytes(values)).hexdigest()
        text = self.header.metadata or {}
        of_text = hashlib.sha256(text[METADATA].encode()).hexdigest()
        return {
            **{role: recorded[role]["sha256"] for role in ("base", "aligned")},
            "alignment": {"tensors": read, "metadata": of_text},
        }

    @cached_property
    def _names(self) -> Names:
        return _RecordedNames(self)

    def _matrix(self, name: str) -> SafetensorsWeight:
        entry = self.header.tensors[name]
        return SafetensorsWeight(name, self.path, entry, as_matrix(entry.shape, None))

    def _vector(self, name: str) -> tuple[float, ...]:
        found = numpy.frombuffer(self._bytes(name), "<f4")
        if not bool(numpy.isfinite(found).all()):
            raise SafeprojError(f"{self.path}: {name} has NaN or Inf; the file is damaged")
        if bool((found <= 0.0).any()):
            raise SafeprojError(
                f"{self.path}: {name} has values that are not positive; the file is damaged"
            )
        return tuple(found.tolist())

    def _bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor."""
        entry = self.header.tensors[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.nbytes)


class _RecordedNames(Names):
    """Names that are the running model's own: nothing has to be asked but the file."""

    def __init__(self, file: AlignmentFile) -> None:
        super().__init__(file, file.maps, architecture=False)
        self._types = frozenset()  # nothing is turned on disk or called something else
        self._file = file

    def _not_found(self, parameter: str) -> SafeprojError:
        return SafeprojError(
            f"{self._file.source}: holds nothing for {parameter}{self._closest(parameter)}; make a "
            "file with its module among --targets, or use the checkpoints; if it is only named "
            "otherwise there, say how with --map RUNTIME=CHECKPOINT"
        )

    def layout(self, parameter: str) -> Layout | None:
        try:
            names = tuple(stored_names(self.find(parameter, lambda _: True)))
        except SafeprojError:
            return None
        return self._file.parameters[names[0]][1] if len(names) == 1 else None


def _rows(expression: Expression) -> int | None:
    """Return how many rows of a weight an expression is about, None for all."""
    if isinstance(expression, Head):
        return expression.rows
    return _rows(expression.part) if isinstance(expression, Swapped) else None


def open_file(source: str, maps: Sequence[str] = ()) -> AlignmentFile:
    """Return the alignment file that SRC names: a file, or a folder or repository that holds one.

    Raises:
        SafeprojError: there is none, or it is damaged.
    """
    folder = open_folder(source)
    if isinstance(folder, LocalFolder) and folder.only is not None:
        name = folder.only
    else:
        files = sorted(file for file in folder.files if file.endswith(SUFFIX))
        if len(files) != 1:
            raise SafeprojError(
                f"{source}: {shorten(files) or 'no file'} ends in {SUFFIX}, expected one; pass the "
                "file itself, as `safeproj align` wrote it"
            )
        name = files[0]
    path = folder.path(name)
    header = read_header(path)
    text = (header.metadata or {}).get(METADATA)
    if text is None:
        raise SafeprojError(
            f"{source}: no alignment file, its metadata has no {METADATA!r}; expected a file that "
            "`safeproj align` wrote"
        )
    try:
        document = json.loads(text, object_pairs_hook=unique)
        json.dumps(document, allow_nan=False, ensure_ascii=False).encode()  # as it will be repeated
        if document["schema"] != SCHEMA:
            raise SafeprojError(
                f"{source}: alignment file of schema {str(document['schema'])[:40]!a}, expected "
                f"{SCHEMA}; use the version of safeproj that wrote it"
            )
        parameters = {name: _parameter(item) for name, item in document["parameters"].items()}
        weights = {key: _recorded(item) for key, item in document["weights"].items()}
        _check(document, header, parameters, weights)
    except _DAMAGES as error:
        raise SafeprojError(
            f"{source}: damaged alignment file ({type(error).__name__}: {first_line(error)}); "
            "fetch it again, or make it again with `safeproj align`"
        ) from error
    require_printable(source, [*parameters, *weights])
    return AlignmentFile(
        source, folder.revision, path, header, document, parameters, weights, tuple(maps)
    )


_DAMAGES = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What reading JSON of another form than expected raises."""


def is_plain(text: str) -> bool:
    """Tell whether a text from a file can be shown in a report or a model card as it is."""
    return text.isprintable() and not set(text) & set("`<>|")


def _parameter(item: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
    shape = tuple(int(size) for size in item["shape"])
    layout = Layout(item["kind"], item["out_first"], bool(item["marked_transposed"]))
    return shape, layout


def _recorded(item: Mapping[str, Any]) -> Recorded:
    m, n = item["shape"]
    numbers = {
        name: float(item.get(name, 0.0)) for name in ("alignment_norm", "error", "residual", "leak")
    }
    if not all(math.isfinite(value) and value >= 0.0 for value in numbers.values()):
        raise ValueError(f"not a size: {numbers}")
    if item["form"] not in FORMS or (item["form"] == ZERO) != (numbers["alignment_norm"] == 0.0):
        raise ValueError(f"form {item['form']!a} with norm {numbers['alignment_norm']}")
    return Recorded(item["form"], (int(m), int(n)), **numbers)


def _check(
    document: Mapping[str, Any],
    header: Header,
    parameters: Mapping[str, tuple[tuple[int, ...], Layout]],
    weights: Mapping[str, Recorded],
) -> None:
    """Refuse what does not fit together, and what could steer a report that shows it.

    Raises:
        LookupError, TypeError, ValueError: something does not.
    """
    if set(document["inputs"]) != {"base", "aligned"}:
        raise ValueError(f"inputs are {sorted(document['inputs'])}")
    for role, recorded in document["inputs"].items():
        shown = [recorded["source"], *recorded["quantised"], recorded.get("revision", "")]
        if not all(isinstance(text, str) and is_plain(text) for text in shown):
            raise ValueError(f"identity of {role}")
        if not isinstance(recorded["sha256"]["tensors"], dict):
            raise TypeError(f"digests of {role}")
    if not isinstance(document["config"], dict):
        raise TypeError("config")
    _check_options(**document["options"])
    for key, weight in weights.items():
        if weight.shape != _expected_shape(key, parameters):
            raise ValueError(f"{key} has the shape {weight.shape}")
        if weight.form == ZERO:
            continue
        m, n = weight.shape
        entry = header.tensors[f"{key}.{weight.form}"]
        columns = {V_ITSELF: n, C_ITSELF: m, EIGENPAIRS: entry.shape[-1]}[weight.form]
        if entry.dtype != "F32" or entry.shape != (m, columns) or columns < 1:
            raise ValueError(f"{key} is {entry.dtype} {list(entry.shape)}")
        if weight.form == EIGENPAIRS:
            values = header.tensors[f"{key}.{VALUES}"]
            if values.dtype != "F32" or values.shape != (columns,):
                raise ValueError(f"{key}.{VALUES} is {values.dtype} {list(values.shape)}")


def _check_options(
    *, targets: Any, rank: Any = None, energy: Any = None, exact: Any = False
) -> None:
    """Refuse options that `align` does not write."""
    fits = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not fits or not all(is_plain(name) for name in targets):
        raise ValueError("targets")
    if not (rank is None or type(rank) is int) or type(exact) is not bool:
        raise ValueError("rank or exact")
    if energy is not None and not (isinstance(energy, float) and 0.0 < energy <= 1.0):
        raise ValueError("energy")


def _expected_shape(
    key: str, parameters: Mapping[str, tuple[tuple[int, ...], Layout]]
) -> tuple[int, int]:
    """Return the (m, n) of what a key names.

    Raises:
        LookupError, ValueError: it names nothing.
    """
    match = re.fullmatch(r"(?P<name>.*?)(\[(?P<expert>\d+)\])?(?P<turned>\.T)?", key)
    assert match is not None
    shape, layout = parameters[match["name"]]
    if match["expert"] is not None:
        count, *shape_of_one = shape
        if layout.kind != "experts" or int(match["expert"]) >= count:
            raise ValueError(f"{key} is no expert")
        shape = tuple(shape_of_one)
    if layout.kind == "conv":
        shape = (shape[0], math.prod(shape[1:]))
    if (match["turned"] is None) == (not layout.out_first):
        raise ValueError(f"{key} is turned the wrong way")
    m, n = shape[::-1] if match["turned"] else shape
    return m, n
