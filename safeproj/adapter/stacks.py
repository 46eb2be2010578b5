"""Stacks of experts with a pair of factors for each: A (E, r, in) and B (E, out, r)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from safeproj.adapter.record import AdaptedModule, Factor, Kind
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array


def stack_modules(
    source: str,
    tensors: Mapping[str, Array],
    a_key: str,
    b_key: str,
    paths: Callable[[int], tuple[str, ...]],
) -> Iterator[AdaptedModule]:
    """Yield one update for each expert.

    Models store such experts one by one, or stacked, or gate and up in one stack: it is left to the
    names of the checkpoint to tell.

    Args:
        source: the SRC, for messages.
        tensors: the adapter's.
        a_key: key of the input-side factors, (E, r, in) or, from older programs, (E·r, in).
        b_key: key of the output-side factors, (E, out, r).
        paths: gives an expert's module paths by its number, the most usual first.

    Raises:
        SafeprojError: the factors do not fit.
    """
    A, B = tensors[a_key].shape, tensors[b_key].shape
    flat = len(A) == 2
    rank = B[-1]
    if len(B) != 3 or rank == 0 or tuple(A[:-1]) != ((B[0] * rank,) if flat else (B[0], rank)):
        raise SafeprojError(
            f"{source}: {a_key} {list(A)} and {b_key} {list(B)} do not fit; expected (experts, r, "
            "in) and (experts, out, r) with the same r"
        )
    for expert in range(B[0]):
        rows = slice(expert * rank, (expert + 1) * rank)
        path, *aliases = paths(expert)
        yield AdaptedModule(
            name=path,
            parameter=f"{path}.weight",
            kind=Kind.linear,
            output=Factor(b_key, item=expert),
            input=Factor(a_key, rows=rows) if flat else Factor(a_key, item=expert),
            rank=rank,
            in_features=A[-1],
            out_features=B[1],
            aliases=tuple(aliases),
        )
