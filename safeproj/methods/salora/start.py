"""`safeproj salora init`: a PEFT directory to train from, with the initial factors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeproj import __version__
from safeproj.adapter.interface import CONFIG, MANIFEST
from safeproj.adapter.write import appears_at
from safeproj.lm.data import Batch
from safeproj.lm.layers import MEMORY, OnBatch, find_layers
from safeproj.methods.salora.initialisation import Initial, initialise
from safeproj.methods.salora.module import RANK, SafetyModule
from safeproj.storage.documents import json_document
from safeproj.versions import versions

SCHEMA = "safeproj.start/1"

CARD = """---
library_name: peft
---

# A start for SaLoRA training

Factors of the task-specific initialisation (arXiv 2501.01765), made by safeproj {version}. They
belong to frozen weights `W_0 = W - s · C_S B_0 A_0`, which `safeproj.salora.attach` sets; put on
the unmodified model they would change what it computes, so PEFT refuses to load them as they are.
"""


def write_start(
    model: Any,
    module: SafetyModule,
    batches: Sequence[Batch],
    out: Path,
    *,
    rank: int = 16,
    alpha: float | None = None,
    task_rank: int = RANK,
    targets: Sequence[str] = (),
    base_model: str = "",
    inputs: Mapping[str, Any] | None = None,
    memory: int = MEMORY,
    on_batch: OnBatch | None = None,
    overwrite: bool = False,
) -> Initial:
    """Initialise an adapter and write it to the directory `out`, complete or not at all.

    Args:
        model: the aligned model; its weights are changed.
        module: the safety module, cut to the rank that training uses.
        batches: samples of the task.
        out: the directory; see `check_out`.
        rank: r of the adapter.
        alpha: `lora_alpha`; r if None, so that `s = 1`.
        task_rank: d_s.
        targets: layers to adapt, by name or last part; all that the module holds if empty.
        base_model: what the adapter's config calls its model.
        inputs: identities for the record.
        memory: as for `safety_module`.
        on_batch: as for `safety_module`.
        overwrite: whether an adapter that is at `out` may be replaced.

    Raises:
        SafeprojError: something cannot be used, or `out` cannot be written; nothing is written.
    """
    from peft import LoraConfig, get_peft_model

    names = list(find_layers(model, targets) if targets else module.directions)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=_shortest(model, names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model or None,
    )
    peft_model = get_peft_model(model, config)
    initial = initialise(
        peft_model, module, batches, task_rank=task_rank, memory=memory, on_batch=on_batch
    )
    record = {
        "schema": SCHEMA,
        "tool": {"name": "safeproj", "version": __version__},
        "options": {
            "rank": rank,
            "alpha": config.lora_alpha,
            "task_rank": task_rank,
            "safety_rank": module.rank,
        },
        "inputs": dict(inputs or {}),
        "versions": versions(by_torch=True),
    }
    with appears_at(out, overwrite) as appearance:
        directory = appearance.path
        peft_model.save_pretrained(str(directory))
        _sort_targets(directory / CONFIG)
        initial.save(directory)
        (directory / "README.md").write_text(CARD.format(version=__version__), "utf-8")
        (directory / MANIFEST).write_bytes(json_document(record))
    return initial


def _sort_targets(path: Path) -> None:
    """Put `target_modules` in order: PEFT keeps a set, whose order differs from run to run."""
    config = json.loads(path.read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def _shortest(model: Any, names: Sequence[str]) -> list[str]:
    """Return `target_modules`: the last parts of the names where they mean the same layers."""
    parts = sorted({name.rpartition(".")[2] for name in names})
    return parts if find_layers(model, parts).keys() == set(names) else sorted(names)
