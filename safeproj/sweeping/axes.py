"""What a sweep varies: the interventions of each axis."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from safeproj.checkpoint.hashes import Hash
from safeproj.errors import SafeprojError
from safeproj.methods.interface import Method
from safeproj.run.options import Options
from safeproj.sweeping.candidates import Candidates, candidates
from safeproj.sweeping.strengths import strengths
from safeproj.sweeping.weights import weights

AXES: dict[str, Callable[..., Candidates]] = {
    "layers": partial(candidates, by="layers"),
    "threshold": partial(candidates, by="threshold"),
    "mu": strengths,
    "weight": weights,
}
"""One line for each."""


def require_axis(method: Method, axis: str | None) -> None:
    """Refuse an axis that the method has not.

    Raises:
        SafeprojError: it is one.
    """
    if axis is not None and axis not in method.axes:
        varied = " or ".join(method.axes)
        raise SafeprojError(f"--by does not go with {method.mark}, with which {varied} is varied")


def interventions(
    method: Method,
    adapter: str,
    options: Options,
    *,
    axis: str | None = None,
    seed: int = 0,
    hashes: Collection[Hash] = (),
) -> Candidates:
    """Score an adapter with all that is tried on it, in one reading.

    Args:
        method: what is done, prepared.
        adapter: SRC of the adapter.
        options: how.
        axis: one of the method's; its first if None.
        seed: of random controls.
        hashes: by which what is read is hashed, for what is written to record.

    Raises:
        SafeprojError: an input cannot be used.
    """
    if not method.axes:
        raise SafeprojError(
            f"no sweep tries {method.words.name}; patch with several strengths, and compare them "
            "with `safeproj eval`"
        )
    return AXES[axis or method.axes[0]](method, adapter, options, seed=seed, hashes=hashes)
