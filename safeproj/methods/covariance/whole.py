"""What the covariance-weighted correction makes of whole changes: `ΔW · μS (H + μS)⁻¹`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from safeproj.checkpoint.hashes import Hash, Sides
from safeproj.engine import Buffers
from safeproj.errors import SafeprojError
from safeproj.methods.covariance.detail import Acting, Effects
from safeproj.methods.covariance.formulas import Correction, Moment, Reconstruction, SingularError
from safeproj.methods.covariance.score import read_moments, singular
from safeproj.methods.covariance.sources import Moments
from safeproj.methods.detail import Detail
from safeproj.methods.differences import DifferenceBlocks
from safeproj.methods.whole import Part, Remade, Remake, Sums, WholeTask
from safeproj.storage.arrays import AnyArray, namespace


def remake(
    task: WholeTask,
    formulas: Correction | Reconstruction,
    buffers: Buffers,
    hashes: Collection[Hash],
) -> Remake:
    """Return what corrects changes of the weights that read one input: one factorisation.

    Args:
        task: the weights.
        formulas: how they are corrected.
        buffers: of the thread.
        hashes: by which what is read is hashed.

    Raises:
        SafeprojError: the moments are none, or the model would have to be run with the fine-tune.
    """
    if isinstance(formulas, Reconstruction):
        raise SafeprojError("--reconstruct runs an adapter; leave it out with --model")
    assert isinstance(task.origin, Moments)
    H, S, digests = read_moments(task.name, task.origin, buffers, hashes)
    try:
        correct = formulas.solver(H, S)
    except SingularError as error:
        raise singular(task, error) from error
    return lambda D: Corrected(correct, H, S, digests, D, is_scored=bool(D.weighs))


class Corrected(Remade):
    """One change, corrected.

    Args:
        correct: makes `A'` of `A` (r, n).
        H: of the safety data.
        S: of the benign data.
        digests: of what both were read from.
        D: the change.
        is_scored: whether it is wanted how strongly it acts.
    """

    def __init__(
        self,
        correct: Callable[[AnyArray], AnyArray],
        H: Moment,
        S: Moment,
        digests: Sides,
        D: DifferenceBlocks,
        *,
        is_scored: bool,
    ) -> None:
        self.digests = digests
        self._correct, self._H, self._S, self._D = correct, H, S, D
        self._is_scored = is_scored
        self._safety, self._benign = [0.0, 0.0], [0.0, 0.0]

    def rows(self) -> Iterator[Part]:
        start = 0
        for before in self._D:
            xp = namespace(before)
            wide = xp.astype(before, xp.float64)
            after = self._correct(wide)
            for at, each in enumerate((wide, after) if self._is_scored else ()):
                self._safety[at] += float(xp.sum(self._H.apply(each) * each))
                ridge = self._S.ridge * float(xp.sum(each * each))
                self._benign[at] += float(xp.sum(self._S.apply(each) * each)) + ridge
            stop = start + len(before)
            yield Part(slice(start, stop), before, xp.astype(after, xp.float32))
            start = stop

    def detail(self, sums: Sums) -> Detail:
        if sums.before <= 0.0:
            return Detail()
        safety, benign = self._safety, self._benign
        before, after = (Effects(max(safety[at], 0.0), benign[at]) for at in (0, 1))
        return Acting(before, after)
