"""Adapters that belong to what an initialisation left of the base weights: converted, or told.

PiSSA, OLoRA and CorDA start from `s · B₀ A₀`, a part of the weight `W` (m, n) itself, and train on
the residual `W_res = W - s · B₀ A₀`. What they serve is `W_res + s · B A`, so the update of `W` is
`s · (B A - B₀ A₀)`, of rank 2r, and not `s · B A`. PEFT (0.21.2, `LoraLayer.pissa_init`,
`olora_init`) computes the start from `W` again whenever such an adapter is loaded:

| name | `s · B₀ A₀` |
|---|---|
| `pissa` | `U_r Σ_r V_rᵀ`, the leading part of `W` |
| `olora` | `s · Q_r R_r`, of `W = Q R` |

Both follow from `W` alone, whatever signs the factors have. The other names do not: their start is
drawn at random (`pissa_niter_N`), or follows from data or rounding that are not at hand.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy

from safeproj.adapter import Adapter
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.low_rank import balanced, decomposed, padded
from safeproj.adapter.peft_config import ON_SAVING, doubled
from safeproj.adapter.record import Kind
from safeproj.adapter.vocabulary import HEADS
from safeproj.checkpoint import Reader, settle
from safeproj.checkpoint.expression import Matrix, Swapped, matrix, stored_names
from safeproj.engine.blocks import row_width, rows_per_block
from safeproj.engine.device import Host
from safeproj.engine.local import MAX_WORKERS
from safeproj.errors import SafeprojError, install
from safeproj.names import Names
from safeproj.plan.match import PlannedModule, plan
from safeproj.plan.select import Selection
from safeproj.storage.arrays import (
    FLOAT32,
    FLOAT64,
    Array,
    DType,
    cast,
    double,
    from_torch,
    is_finite,
    promoted,
    quiet,
    single,
    to_torch,
)
from safeproj.storage.documents import json_document
from safeproj.text import shorten

ROUNDING = 1e-6
"""What the start says of the update, relative to its norm: PEFT computes it in float32."""

PART = 0.5
"""Share of what an update reaches of a weight from which on it counts as that part of the weight.

It is 1 at the start of PiSSA, OLoRA and CorDA, and about `1 - ε²` once training has moved the
update by `ε` times that part. An update of the whole weight has at most `2 η c`, with `η` its size
relative to that part and `c` their cosine: the latter is about `√(r/n)` for directions that have
nothing to do with `W`, and `η` is small where an adapter changes a model and does not replace it.
"""

SAMPLE = 8
"""Modules that are looked at: an initialisation is one of all modules of an adapter."""


@dataclass(frozen=True)
class Start:
    """`B₀ A₀` as PEFT computes it: `L` (m, r) with orthonormal columns, and `R` (r, n), float64."""

    L: Array
    R: Array


def pissa(W: Array, rank: int, s: float) -> Start:
    """Return `U_r Σ_r V_rᵀ / s` of `W` (m, n).

    In float32 by torch, as PEFT does: where the r-th singular value is close to the next one,
    rounding decides between their vectors, and the adapter belongs to what rounding left.

    Raises:
        SafeprojError: torch is not installed.
    """
    if find_spec("torch") is None:
        raise SafeprojError(
            "init_lora_weights is 'pissa', whose start only torch computes as PEFT does; "
            + install("torch")
        )
    import torch

    from safeproj.engine.torch_device import scope

    with scope():
        U, S, Vh = torch.linalg.svd(to_torch(single(W)), full_matrices=False)
        parts = (U[:, :rank].double(), S[:rank, None].double() / s * Vh[:rank].double())
        return Start(*map(from_torch, parts))


def olora(W: Array, rank: int, s: float) -> Start:
    """Return `Q_r R_r` of `W = Q R` (m, n), float64: the first r columns of `W` span `Q_r`."""
    del s  # PEFT multiplies by it in the residual as in the update
    Q = numpy.linalg.qr(W[:, :rank])[0]
    return Start(Q, Q.T @ W)


STARTS = {"pissa": pissa, "olora": olora}
"""The initialisations that are converted here, by name in lower case."""


def converted(adapter: Adapter, aligned: Names | None, workers: int | None = None) -> Adapter:
    """Return an adapter of a changed base as one of twice the rank for the weights themselves.

    Args:
        adapter: its config names an initialisation that changes the base weights.
        aligned: the weights that it was trained on; None if they are not at hand.
        workers: threads, one for each module; the result does not depend on it.

    Raises:
        SafeprojError: its update does not follow from what is at hand.
    """
    init = str(adapter.format.changed_base(adapter))
    compute = _start(adapter, init, aligned)
    assert aligned is not None
    found = plan(adapter, aligned, aligned, Selection())
    for _, error in found.unmatched:
        raise error
    _require_plain(adapter, init, found.modules, aligned)
    scalings = adapter.format.scalings(adapter, adapter.modules)
    for name, s in scalings.items():
        if not s > 0.0:
            raise SafeprojError(
                f"{adapter.source}: {name} is scaled by {s:g}; expected more than 0"
            )

    @quiet
    def work(item: PlannedModule) -> dict[str, Array]:
        module = item.module
        A, B = (double(f.view(adapter.tensors)) for f in (module.input, module.output))
        if module.kind is Kind.linear:
            W = _whole(matrix(item.aligned, aligned.checkpoint))
            if not is_finite(W):
                raise SafeprojError(
                    f"{aligned.checkpoint.source}: the weight of {module.name} has NaN or Inf; the "
                    "checkpoint is damaged"
                )
            A, B = difference(A, B, compute(W, module.rank, scalings[module.name]))
        else:  # PEFT starts embeddings from zero whatever the name
            A, B = padded(A, B, 2 * module.rank)
        return {
            factor.key: numpy.require(
                cast(value, _wide(adapter.tensors[factor.key].dtype)), requirements="C"
            )
            for factor, value in ((module.input, A), (module.output, B))
        }

    tensors = dict(adapter.tensors)
    threads = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    with Host().session(), ThreadPoolExecutor(threads, "safeproj") as pool:
        for changed in pool.map(work, found.modules):
            tensors |= changed
    config = doubled(adapter.config)
    return replace(
        adapter,
        config=config,
        tensors=tensors,
        modules=tuple(replace(m, rank=2 * m.rank) for m in adapter.modules),
        warnings=(*adapter.warnings, _warning(init)),
        documents={CONFIG: json_document(config)},
        converted_from=init,
    )


def difference(A: Array, B: Array, start: Start) -> tuple[Array, Array]:
    """Return `A'` (2r, n) and `B'` (m, 2r) with `B' A' = B A - B₀ A₀`, for float64 factors.

    PEFT puts the factors beside each other, `[B, -B₀]` and `[A; A₀]`: two products much larger than
    their difference, which whoever rounds them to bfloat16 loses. Here they are `balanced`.
    """
    U, S, V = decomposed(numpy.concatenate([A, start.R]), numpy.concatenate([B, -start.L], axis=1))
    noise = ROUNDING * float(numpy.linalg.norm(start.R, 2))
    return balanced(U, numpy.where(noise < S, S, 0.0), V, 2 * len(A))


def _wide(dtype: DType) -> DType:
    return promoted(dtype, FLOAT32)


def _start(adapter: Adapter, init: str, aligned: Names | None) -> Callable[..., Start]:
    """Return what computes the start of an adapter.

    Raises:
        SafeprojError: nothing here does.
    """
    compute = STARTS.get(init if init == "pissa" else init.lower())  # as PEFT compares them
    told = (
        f"{adapter.source}: init_lora_weights is {init!r}: the adapter belongs to what that "
        "leaves of the base weights"
    )
    if init == "salora":
        raise SafeprojError(
            f"{told}; fold it first with `safeproj salora fold`, and use the result"
        )
    if compute is None or adapter.config.get("peft_type") != "LORA":
        raise SafeprojError(
            f"{told}, which does not follow from the aligned weights; convert it with PEFT, "
            f"{ON_SAVING} with the start that was saved before training, and use the result"
        )
    if aligned is None:
        raise SafeprojError(
            f"{told}; its conversion needs the weights that it was trained on: give --base and "
            f"--aligned, or convert it with PEFT, {ON_SAVING}"
        )
    return compute


def _require_plain(
    adapter: Adapter, init: str, items: Sequence[PlannedModule], aligned: Names
) -> None:
    """Refuse modules whose start is not that of a weight of their own.

    Raises:
        SafeprojError: there are such.
    """
    shared = Counter(item.aligned for item in items)
    for item in items:
        module, why = item.module, None
        linear = module.kind is Kind.linear and not module.parameter.endswith("in_proj_weight")
        if not linear and module.kind is not Kind.embedding:
            why = "PEFT has no such start for its kind of layer"
        elif linear and init != "pissa" and isinstance(item.aligned, Swapped):
            why = "PEFT takes the start from its weight as stored, which is the transpose"
        elif module.mirrors or shared[item.aligned] > 1 or (linear and _is_tied(item, aligned)):
            why = "shares its weight with another module, which the start changes too"
        elif linear and (item.note or module.rank > min(module.out_features, module.in_features)):
            why = "is larger or smaller than its weight"
        if why is not None:
            raise SafeprojError(
                f"{adapter.source}: init_lora_weights is {init!r}, and {module.name} cannot be "
                f"converted: {why}; convert the adapter with PEFT, {ON_SAVING}, and use the result"
            )


def _is_tied(item: PlannedModule, aligned: Names) -> bool:
    """Tell whether a head has the embedding's weight in the running model."""
    leaf = item.module.name.rpartition(".")[2]
    if leaf not in HEADS:
        return False
    config = aligned.checkpoint.config
    text = config.get("text_config")
    told = (text if isinstance(text, dict) else {}).get("tie_word_embeddings")
    told = config.get("tie_word_embeddings", told)
    return bool(told) or not any(leaf in name for name in stored_names(item.aligned))


def _warning(init: str) -> str:
    return (
        f"init_lora_weights is {init!r}: the adapter belongs to what that leaves of the base "
        "weights; it is converted to one of twice the rank for the weights themselves, as PEFT "
        "can do on saving, and scored and written as that"
    )


def held_parts(
    adapter: Adapter, items: Sequence[PlannedModule], aligned: Names
) -> dict[str, float]:
    """Return the `share` of some updates, by module.

    Args:
        adapter: the adapter.
        items: its updates; those of linear layers are looked at, a few of them.
        aligned: the aligned weights.

    Raises:
        SafeprojError: a weight cannot be read.
    """
    linear = [item for item in items if item.module.kind is Kind.linear and item.module.rank]
    step = max(len(linear) / SAMPLE, 1.0)
    chosen = [linear[int(i * step)] for i in range(min(SAMPLE, len(linear)))]
    try:
        scalings = adapter.format.scalings(adapter, [item.module for item in chosen])
    except SafeprojError:
        scalings = {}
    return {
        item.module.name: _share(adapter, item, aligned, scalings.get(item.module.name))
        for item in chosen
    }


def share(W: Array, A: Array, B: Array, s: float | None) -> float:
    """Return how much of what an update reaches of a weight is that part of the weight itself.

    With `P` the orthogonal projector onto the columns of `B` (m, r), what `s · B A` reaches of `W`
    (m, n) is `P W`, and the start of PiSSA, OLoRA or CorDA is exactly that, as no trained update
    is. The share is `1 - ‖P W - s B A‖² / ‖P W‖²`, with the most favourable `s` where it is not
    known; not a number where `W` has one that is none.
    """
    Q, T = numpy.linalg.qr(B)
    reached, moved = double(Q.astype(W.dtype).T @ W), T @ A  # Qᵀ P W and Qᵀ B A
    own, size = float(numpy.square(reached).sum()), float(numpy.square(moved).sum())
    both = float((reached * moved).sum())
    if not own or not size or both <= 0.0:
        return 0.0
    s = both / size if s is None else s
    return 2 * s * both / own - s * s * size / own


@quiet
def _share(adapter: Adapter, item: PlannedModule, aligned: Names, s: float | None) -> float:
    W = _whole(matrix(item.aligned, aligned.checkpoint), FLOAT32)
    module, tensors = item.module, adapter.tensors
    A, B = (double(factor.view(tensors)) for factor in (module.input, module.output))
    if module.gain is not None:
        A = A * double(module.gain.view(tensors))
    return share(W, A, B, s)


def told_of(parts: Mapping[str, float]) -> str | None:
    """Return what `held_parts` means, None where it means nothing."""
    held = {name: part for name, part in parts.items() if part > PART}
    if not held:
        return None
    return (
        f"{len(held)} of {len(parts)} updates that were looked at are a part of the weight itself "
        f"({shorten(f'{name}: {part:.0%}' for name, part in held.items())})"
    )


def _whole(found: Matrix, dtype: DType = FLOAT64) -> Array:
    """Return a weight (m, n), in float64 or another dtype."""
    weight, reader = found.weight, Reader()
    settle([weight])
    reader.start()
    try:
        step = rows_per_block(Host(), weight)
        buffer = numpy.empty(step * row_width(weight), numpy.uint8)
        rows, columns = weight.shape
        whole = numpy.empty((rows, columns), dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            whole[start:stop] = weight.read_rows(reader, start, stop, buffer)
    finally:
        reader.close()
    return whole.T if found.transposed else whole
