"""From an adapter that was trained with a safety module to one that any PEFT loads as it is."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeproj import __version__
from safeproj.adapter import Adapter, read_adapter
from safeproj.adapter.digests import adapter_record
from safeproj.adapter.interface import CONFIG
from safeproj.adapter.peft import Peft
from safeproj.adapter.peft_config import ON_SAVING, doubled
from safeproj.adapter.record import Kind
from safeproj.adapter.weightfiles import NAMED
from safeproj.adapter.write import check_out, unpatched_beside, write_adapter
from safeproj.errors import SafeprojError
from safeproj.lm.live import active_adapter, saved_in
from safeproj.methods.interface import local_path
from safeproj.methods.salora.formulas import without
from safeproj.methods.salora.initialisation import INITIAL, METHOD, Initial
from safeproj.methods.salora.method import FOLDED
from safeproj.methods.salora.module import SafetyModule
from safeproj.storage.arrays import Array, cast, double, from_torch, joined, norm
from safeproj.storage.documents import json_document
from safeproj.storage.source import StrPath, identity, src
from safeproj.text import shorten
from safeproj.versions import versions

NOT_SERVED = (INITIAL, "trainer_state.json")
"""Files of a checkpoint that only training needs, beside the pickles that are always left out."""

NOTICEABLE = 0.01
"""Share of a factor `B` that is more than rounding to bfloat16 moves into the safety subspace."""


@dataclass(frozen=True)
class Folded:
    """What `fold` wrote.

    Attributes:
        modules: the number of layers.
        rank: the largest rank among them: twice that of training, where the initial factors are
            subtracted.
        unmodified: whether initial factors were subtracted, so that it serves on the unmodified
            model though it was trained on `W_0`.
        removed: `‖U_C Uᵀ_C B‖_F / ‖B‖_F`, the largest of any layer: next to nothing where the
            adapter was trained with the constraint.
        left_out: other weights beside the adapter, which are not folded, and not copied.
    """

    modules: int
    rank: int
    unmodified: bool
    removed: float
    left_out: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about the adapter."""
        left_out: tuple[str, ...] = ()
        if self.left_out:
            names = shorten(self.left_out, NAMED)
            left_out = (f"other weights are not folded, and left out: {names}",)
        if self.removed <= NOTICEABLE:
            return left_out
        return (
            *left_out,
            f"up to {self.removed:.1%} of a factor B lay in the safety subspace and was removed: "
            "the adapter was not trained with this safety module, evaluate what is left of its "
            "skill",
        )

    def describe(self) -> str:
        """Return what was done in words."""
        where = "for the unmodified model, " if self.unmodified else ""
        return f"{self.modules} layers, {where}rank {self.rank}"


def fold(
    adapter: Any,
    module: SafetyModule,
    out: StrPath,
    *,
    rank: int | None = None,
    initial: Initial | None = None,
    overwrite: bool = False,
) -> Folded:
    """Write the plain LoRA adapter of a trained one (SaLoRA, section 3.3).

    `B ← C_S B`. Where training began from the task-specific initialisation the adapter belongs to
    `W_0 = W - s · C_S B_0 A_0`, and the one that serves on `W` is `A' = [A; A_0]` (2r, n) and
    `B' = [C_S B, -C_S B_0]` (m, 2r), with `lora_alpha` such that `s` stays.

    Args:
        adapter: a `PeftModel`, or the directory of an adapter that was saved.
        module: the safety module that it was trained with.
        out: the directory to create; it appears complete or not at all.
        rank: use the first directions of each layer alone, as in training.
        initial: the initial factors; those beside the adapter if None.
        overwrite: replace an adapter that is at `out`.

    Returns:
        How many layers were folded, their rank, and what they lost.

    Raises:
        SafeprojError: it cannot be folded, or `out` cannot be written; nothing is written.
    """
    if isinstance(adapter, str | os.PathLike):
        source = src(adapter)
        check_out(Path(out), overwrite, [("--adapter", local_path(source))])
        return _fold(source, module.cut(rank), Path(out), initial, overwrite)
    check_out(Path(out), overwrite, [])
    with tempfile.TemporaryDirectory() as directory:
        name = active_adapter(adapter)
        adapter.save_pretrained(directory, selected_adapters=[name])
        saved = str(saved_in(directory, name))
        return _fold(saved, module.cut(rank), Path(out), initial, overwrite)


def _fold(
    source: str, module: SafetyModule, out: Path, initial: Initial | None, overwrite: bool
) -> Folded:
    adapter = read_adapter(source)
    if initial is None and INITIAL in adapter.folder.files:
        initial = Initial.load(adapter.path(INITIAL))
    _check(adapter, module, initial)
    replaced, removed = _constrained(adapter, module)
    documents: dict[str, bytes | None] = dict.fromkeys(NOT_SERVED)
    if initial is not None:
        replaced |= _difference(adapter, replaced, initial)
        documents[CONFIG] = json_document(doubled(adapter.config))
    ranks = [replaced[item.output.key].shape[1] for item in adapter.modules]
    others, _ = unpatched_beside(adapter, documents)
    folded = Folded(len(ranks), max(ranks), initial is not None, max(removed), tuple(others))
    record, section = _record(adapter, module, folded), _section(folded)
    write_adapter(adapter, replaced, record, section, out, documents, overwrite=overwrite)
    return folded


def _check(adapter: Adapter, module: SafetyModule, initial: Initial | None) -> None:
    source, modules = adapter.source, adapter.modules
    if not isinstance(adapter.format, Peft):
        raise SafeprojError(f"{source}: no PEFT adapter; only such are folded")
    others = [item.name for item in modules if item.kind is not Kind.linear]
    others += [target.module for target in adapter.targets]
    if others:
        raise SafeprojError(
            f"{source}: {shorten(others)} is no linear layer, and SaLoRA is for linear layers"
        )
    module.require({item.name: (item.out_features, item.in_features) for item in modules})
    init = adapter.format.changed_base(adapter)
    if init not in (None, METHOD):
        raise SafeprojError(
            f"{source}: init_lora_weights is {init!r}: its factors belong to what that leaves of "
            "the base weights, and a fold would be of those; train it without, or convert it "
            f"with PEFT first, {ON_SAVING}"
        )
    wanted = init == METHOD
    if wanted and initial is None:
        raise SafeprojError(
            f"{source}: was trained from the task-specific initialisation, and there is no "
            f"{INITIAL} in it; give --init DIR, the directory that `safeproj salora init` wrote"
        )
    if initial is None:
        return
    if not wanted:
        raise SafeprojError(
            f"{source}: its config does not have init_lora_weights {METHOD!r}, so it was not "
            "trained from the initial factors; fold it without them"
        )
    if initial.A.keys() != {item.name for item in modules}:
        raise SafeprojError(f"{source}: the initial factors are not those of its layers")
    for item in modules:
        shape = initial.B[item.name].shape[0], initial.A[item.name].shape[1]
        if shape != (item.out_features, item.in_features):
            raise SafeprojError(
                f"{source}: {item.name}: the initial factors are of another shape than its own"
            )
        if item.dora:
            raise SafeprojError(f"{source}: {item.name} is DoRA, whose update is no B A")


def _constrained(adapter: Adapter, module: SafetyModule) -> tuple[dict[str, Array], list[float]]:
    """Return the tensors of `C_S B`, and what share of each `B` was removed."""
    replaced: dict[str, Array] = {}
    removed = []
    for item in adapter.modules:
        U = double(from_torch(module.directions[item.name].U))
        for factor in item.written("output"):
            before = adapter.tensors[factor.key]
            replaced[factor.key] = before.copy()
            view = factor.view(replaced)
            view[...] = cast(without(U, double(view)), view.dtype)
            if factor == item.output:
                old = double(factor.view(adapter.tensors))
                gone = U @ (U.T @ old)
                removed.append(norm(gone) / max(norm(old), 1e-300))
    return replaced, removed


def _difference(
    adapter: Adapter, constrained: Mapping[str, Array], initial: Initial
) -> dict[str, Array]:
    """Return the tensors of `[A; A_0]` and `[C_S B, -C_S B_0]`."""
    found = {}
    for item in adapter.modules:
        A, B = item.input.key, item.output.key
        A_0, B_0 = (from_torch(each[item.name]) for each in (initial.A, initial.B))
        found[A] = joined([adapter.tensors[A], A_0])
        found[B] = joined([constrained[B], -B_0], axis=1)
    return found


def _record(adapter: Adapter, module: SafetyModule, folded: Folded) -> dict[str, Any]:
    return {
        "schema": FOLDED,
        "tool": {"name": "safeproj", "version": __version__},
        "method": METHOD,
        "inputs": {
            **module.inputs,
            "adapter": {**identity(adapter.folder), **adapter_record(adapter, [INITIAL])},
        },
        "summary": {k: v for k, v in dataclasses.asdict(folded).items() if k != "left_out"},
        "options": module.options,
        "versions": versions(by_torch=True),
    }


def _section(folded: Folded) -> str:
    lines = [
        "## Safety",
        "",
        f"safeproj {__version__} folded the fixed safety module that this adapter was trained with "
        f"into its {folded.modules} layers (SaLoRA, arXiv 2501.01765): its updates have no part "
        "in the directions of the aligned model's outputs on the safety data.",
    ]
    if folded.unmodified:
        lines.append(
            "It was trained from the task-specific initialisation; that is subtracted, so that the "
            "adapter serves on the unmodified model."
        )
    if folded.left_out:
        lines.append(f"Other weights were left out: {shorten(folded.left_out, NAMED)}.")
    lines += ["", "This is no proof of safety: evaluate the adapter before you publish it."]
    return "\n".join(lines)
