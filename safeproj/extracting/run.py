"""From two checkpoints to an adapter: weight by weight, then written complete or not at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safeproj import __version__
from safeproj.adapter.digests import WEIGHTS
from safeproj.adapter.files import write_safetensors
from safeproj.adapter.interface import CONFIG, MANIFEST
from safeproj.adapter.peft_config import PREFIX
from safeproj.adapter.write import CARD, appears_at, check_out
from safeproj.checkpoint.expression import (
    Expression,
    Flat,
    Stored,
    dtype_and_shape,
    stored_names,
)
from safeproj.checkpoint.hashes import Sides
from safeproj.engine import one_thread, resolve_device
from safeproj.errors import SafeprojError
from safeproj.extracting.difference import relative_size
from safeproj.methods.interface import local_path
from safeproj.methods.leading import Leading, leading
from safeproj.methods.safe_lora.pair import Pair
from safeproj.methods.safe_lora.score import differences
from safeproj.methods.safe_lora.targets import Target, find_targets
from safeproj.names import Names
from safeproj.plan.match import quantised_dtypes
from safeproj.records.extractions import Extracted, Extraction
from safeproj.run.options import Options
from safeproj.storage.arrays import Array
from safeproj.storage.documents import json_document
from safeproj.storage.published import published
from safeproj.storage.ranges import fetching_by
from safeproj.storage.tensorfile import DTYPES
from safeproj.text import shorten
from safeproj.versions import versions

FAR = 1.1
"""Size of a change, relative to the weight, from which on the model is no fine-tune of the other:
between independent trainings it is `√(1 + ratio of their squares)`, of fine-tunes hundredths."""

SAMPLE = 8
"""Weights of which it is looked at."""

LITTLE = 0.5
"""Relative error of an extracted update from which on the user is told that much is missing."""

_BUFFERS = ("inv_freq", "position_ids", "attn.bias", "attn.masked_bias")
"""Ends of names of tensors that follow from the config, which some checkpoints keep."""


@one_thread()
def extract(
    model: str,
    aligned: str,
    rank: int,
    out: Path,
    targets: Sequence[str],
    options: Options,
    *,
    overwrite: bool = False,
) -> Extraction:
    """Write the adapter; see `safeproj.extract`."""
    if rank < 1:
        raise SafeprojError(f"--rank must be at least 1, found {rank}")
    inputs = [("--model", local_path(model)), ("--aligned", local_path(aligned))]
    check_out(out, overwrite, inputs)
    profile, observer = options.profile, options.observer
    with profile.phase("match"), fetching_by(options.fetching):
        pair = Pair(model, aligned, options.maps)
        found = find_targets(pair.aligned, pair.base, targets)
        _require_linear(found)
        others = _others(pair, found)
        _require_near(pair, found)
    with profile.phase("fetch"):
        tasks = [(target.key, pair.difference(target.aligned, target.base)) for target in found]
    if observer is not None:
        observer.start(len(tasks), sum(source.nbytes for _, source in tasks))
    with profile.phase("extract"):
        made = differences(
            tasks,
            lambda V: leading(V, rank),
            device=options.device,
            workers=options.workers,
            on_progress=None if observer is None else observer.progress,
            usage=profile.usage,
        )
        changed: dict[str, tuple[Target, Leading]] = {}
        digests: list[Sides] = []
        for target, (part, read) in zip(found, made, strict=True):
            digests.append(read)
            if part is not None:
                changed[_module(target)] = target, part
    with profile.phase("compare"):
        left = {name: relative_size(pair.difference(*sides)) for name, sides in others.items()}
    left = {name: size for name, size in left.items() if size != 0.0}
    if not changed:
        rest = f", but other tensors differ: {shorten(left)}" if left else ""
        raise SafeprojError(
            f"{model}: does not differ from {aligned} in any of {len(found)} weights{rest}; "
            "expected a fine-tune of it"
        )
    record = Extraction(
        version=__version__,
        rank=rank,
        targets=tuple(targets),
        inputs={"model": pair.inputs["aligned"], "aligned": pair.inputs["base"]},
        modules=tuple(
            Extracted(name, target.shape, len(part.A), part.norm, part.error)
            for name, (target, part) in changed.items()
        ),
        others=left,
        warnings=tuple(_warnings(pair, changed, left)),
    )
    read_of = pair.digests_of(digests)
    manifest = {
        **record.to_dict(),
        "inputs": {
            role: {**published(record.inputs[role]), **read_of[side]}
            for role, side in (("model", "aligned"), ("aligned", "base"))
        },
        "versions": versions(by_torch=resolve_device(options.device).engine == "torch"),
    }
    with profile.phase("write"):
        config = _config(pair, aligned, rank, changed)
        _write(out, config, changed, manifest, _card(record, aligned), overwrite=overwrite)
    return record


def _module(target: Target) -> str:
    return target.parameter.removesuffix(".weight")


def _require_linear(targets: Sequence[Target]) -> None:
    """Refuse targets of which PEFT would store the factors otherwise."""
    others = [each.parameter for each in targets if each.layout.kind not in ("linear", "conv1d")]
    if others:
        raise SafeprojError(
            f"--targets: {shorten(others)} is no linear layer; only those are extracted"
        )


def _require_near(pair: Pair, targets: Sequence[Target]) -> None:
    """Refuse a model whose weights have nothing to do with those of the other.

    Raises:
        SafeprojError: it is one, or a weight cannot be read.
    """
    chosen = targets[:: math.ceil(len(targets) / SAMPLE)]
    found = (relative_size(pair.difference(each.aligned, each.base)) for each in chosen)
    sizes = [size for size in found if size is not None]
    if sizes and statistics.median(sizes) > FAR:
        raise SafeprojError(
            f"{pair.aligned.checkpoint.source}: differs from {pair.base.checkpoint.source} by "
            f"{statistics.median(sizes):.2f} times the size of that, as another model does; "
            "expected a fine-tune of it"
        )


def _others(pair: Pair, targets: Sequence[Target]) -> dict[str, tuple[Expression, Expression]]:
    """Return what both models have beside the targets, by name: what may be changed and is left.

    Raises:
        SafeprojError: one of them has a tensor that the other lacks, or in another shape.
    """
    covered = {name for target in targets for name in stored_names(target.aligned)}
    also = {name for target in targets for name in stored_names(target.base)}
    found: dict[str, tuple[Expression, Expression]] = {}
    for names, other, own_covered, turned in (
        (pair.aligned, pair.base, covered, False),
        (pair.base, pair.aligned, also, True),
    ):
        for name in sorted(set(names.checkpoint.names) - own_covered):
            if name in found or name.endswith(_BUFFERS):
                continue
            sides = Stored(name), _counterpart(name, names, other)
            if turned and any(part in covered for part in stored_names(sides[1])):
                continue  # it is stored together with a target there
            _require_same_shape(name, sides, names, other)
            found[name] = sides[::-1] if turned else sides
    return {
        name: (_flat(sides[0], pair.aligned), _flat(sides[1], pair.base))
        for name, sides in found.items()
        if dtype_and_shape(sides[0], pair.aligned.checkpoint)[0] in DTYPES
    }


def _counterpart(name: str, names: Names, other: Names) -> Expression:
    try:
        return other.find(name, lambda _: True)
    except SafeprojError:
        raise SafeprojError(
            f"{other.checkpoint.source}: has no {name}, which {names.checkpoint.source} has; "
            "expected a model and a fine-tune of it, with the same tensors"
        ) from None


def _require_same_shape(
    name: str, sides: tuple[Expression, Expression], names: Names, other: Names
) -> None:
    shapes = [
        dtype_and_shape(each, side.checkpoint)[1]
        for each, side in zip(sides, (names, other), strict=True)
    ]
    if shapes[0] == shapes[1]:
        return
    text = (
        f"{name}: shapes do not fit: {list(shapes[0])} in {names.checkpoint.source}, "
        f"{list(shapes[1])} in {other.checkpoint.source}"
    )
    if shapes[0][1:] == shapes[1][1:]:
        raise SafeprojError(
            f"{text}; the vocabulary was resized, and an adapter of linear layers holds no new "
            "tokens: fine-tune without, or cut the model's vocabulary to that of the aligned one"
        )
    raise SafeprojError(f"{text}; are both of the same model?")


def _flat(whole: Expression, names: Names) -> Expression:
    dimensions = len(dtype_and_shape(whole, names.checkpoint)[1])
    return Flat(whole) if dimensions > 2 else whole


def _warnings(
    pair: Pair,
    changed: Mapping[str, tuple[Target, Leading]],
    left: Mapping[str, float | None],
) -> Iterator[str]:
    for role, names in (("model", pair.aligned), ("aligned model", pair.base)):
        wanted = [
            each.aligned if names is pair.aligned else each.base for each, _ in changed.values()
        ]
        dtypes = quantised_dtypes(wanted, names.checkpoint)
        if dtypes:
            yield (
                f"the {role} stores weights as {', '.join(dtypes)}: their rounding errors are part "
                "of what is extracted"
            )
    worst = max(changed, key=lambda name: changed[name][1].error)
    error = changed[worst][1].error
    if error > LITTLE:
        yield (
            f"the adapter holds little of what the fine-tune changed: the relative error is "
            f"{error:.2f} for {worst}; a larger --rank holds more"
        )
    if left:
        sizes = (
            f"{name} (by {size:.2g})" if size is not None else f"{name} (was zero)"
            for name, size in left.items()
        )
        yield (f"{len(left)} tensors were changed that the adapter does not hold: {shorten(sizes)}")


def _config(
    pair: Pair, aligned: str, rank: int, changed: Mapping[str, tuple[Target, Leading]]
) -> dict[str, Any]:
    """Return `adapter_config.json`: with the scaling 1, so that the product is the update."""
    smaller = {name: len(part.A) for name, (_, part) in changed.items() if len(part.A) < rank}
    architectures = pair.base.checkpoint.config.get("architectures") or []
    causal = any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in architectures)
    source, _, revision = aligned.partition("@")
    is_hub = local_path(aligned) is None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": source if is_hub else aligned,
        "revision": (revision or None) if is_hub else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(each.layout.kind == "conv1d" for each, _ in changed.values()),
        "init_lora_weights": True,
        "target_modules": list(changed),
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
    }


def _write(
    out: Path,
    config: Mapping[str, Any],
    changed: Mapping[str, tuple[Target, Leading]],
    manifest: Mapping[str, Any],
    card: str,
    *,
    overwrite: bool,
) -> None:
    tensors: dict[str, Array] = {}
    for name, (_, part) in changed.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = part.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = part.B
    with appears_at(out, overwrite) as appearance:
        directory = appearance.path
        digests = write_safetensors(directory / WEIGHTS[0], {"format": "pt"}, tensors)
        (directory / CONFIG).write_bytes(json_document(config))
        (directory / CARD).write_bytes(card.encode())
        output = {"tensors": digests}
        (directory / MANIFEST).write_bytes(json_document({**manifest, "output": output}))


def _card(record: Extraction, aligned: str) -> str:
    is_named = local_path(aligned) is None
    head = ["---", "library_name: peft", *([f"base_model: '{aligned}'"] if is_named else []), "---"]
    names = {role: published(each)["source"] for role, each in record.inputs.items()}
    return "\n".join(
        [
            *head,
            "",
            "## Extracted from a full fine-tune",
            "",
            f"safeproj {record.version} extracted the best approximation of rank {record.rank} of "
            f"what `{names['model']}` changed in {len(record.modules)} weights of "
            f"`{names['aligned']}`. Its relative error is {record.error:.4f} over all of them; "
            "that of each is in `safeproj.json`.",
            "",
            "It is not the fine-tune: evaluate it before you use it in its place.",
            *(f"\n> Warning: {warning}" for warning in record.warnings),
            "",
        ]
    )
