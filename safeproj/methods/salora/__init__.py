"""SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765): fine-tuning that keeps clear of safety features.

    from safeproj import salora

    module = salora.safety_module(model, salora.read_data("safety.jsonl", tokenizer).batches())
    peft_model = get_peft_model(model, LoraConfig(...))
    initial = salora.initialise(peft_model, module, task_batches)
    salora.constrain(peft_model, module)
    ...  # train as usual
    salora.fold(peft_model, module, "adapter", initial=initial)

docs/salora.md goes through all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeproj.lm.data import Data, read_data
    from safeproj.methods.salora.callback import FoldCallback
    from safeproj.methods.salora.constraint import Constraint, constrain
    from safeproj.methods.salora.directions import Directions
    from safeproj.methods.salora.folding import Folded, fold
    from safeproj.methods.salora.initialisation import Initial, attach, initialise
    from safeproj.methods.salora.module import SafetyModule, safety_module

__all__ = [
    "Constraint",
    "Data",
    "Directions",
    "FoldCallback",
    "Folded",
    "Initial",
    "SafetyModule",
    "attach",
    "constrain",
    "fold",
    "initialise",
    "read_data",
    "safety_module",
]

_HOME = {
    "Constraint": "methods.salora.constraint",
    "Data": "lm.data",
    "Directions": "methods.salora.directions",
    "FoldCallback": "methods.salora.callback",
    "Folded": "methods.salora.folding",
    "Initial": "methods.salora.initialisation",
    "SafetyModule": "methods.salora.module",
    "attach": "methods.salora.initialisation",
    "constrain": "methods.salora.constraint",
    "fold": "methods.salora.folding",
    "initialise": "methods.salora.initialisation",
    "read_data": "lm.data",
    "safety_module": "methods.salora.module",
}


def __getattr__(name: str) -> object:
    """Import on first use: the reader of a safety module needs neither transformers nor PEFT."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"safeproj.{_HOME[name]}"), name)
    raise AttributeError(f"module 'safeproj.salora' has no attribute {name!r}")
