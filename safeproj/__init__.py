"""safeproj: repair the safety of fine-tuned LoRA adapters after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeproj.errors import SafeprojError

if TYPE_CHECKING:
    from safeproj.api import (
        Form,
        Options,
        align,
        check,
        evaluate,
        inspect,
        inspect_many,
        patch,
        patch_many,
        refusals,
        repair,
        sweep,
        verify,
    )
    from safeproj.evaluation.generate import Generation
    from safeproj.evaluation.judges import Keywords
    from safeproj.evaluation.sets import read_prompts
    from safeproj.gate.demands import Demands
    from safeproj.gate.policy import Policy
    from safeproj.lm.feed import Feed
    from safeproj.methods import salora
    from safeproj.methods.covariance.method import Covariance
    from safeproj.methods.recorded import Made
    from safeproj.methods.safe_lora.method import SafeLora
    from safeproj.methods.salora.method import Salora
    from safeproj.plan.select import Selection

__version__ = "0.1.0"
__all__ = [
    "Covariance",
    "Demands",
    "Feed",
    "Form",
    "Generation",
    "Keywords",
    "Made",
    "Options",
    "Policy",
    "SafeLora",
    "SafeprojError",
    "Salora",
    "Selection",
    "__version__",
    "align",
    "check",
    "evaluate",
    "inspect",
    "inspect_many",
    "patch",
    "patch_many",
    "read_prompts",
    "refusals",
    "repair",
    "salora",
    "sweep",
    "verify",
]

_HOME = {
    "Covariance": "methods.covariance.method",
    "Demands": "gate.demands",
    "Feed": "lm.feed",
    "Form": "api",
    "Generation": "evaluation.generate",
    "Keywords": "evaluation.judges",
    "Made": "methods.recorded",
    "Options": "api",
    "Policy": "gate.policy",
    "SafeLora": "methods.safe_lora.method",
    "Salora": "methods.salora.method",
    "Selection": "plan.select",
    "align": "api",
    "check": "api",
    "evaluate": "api",
    "inspect": "api",
    "inspect_many": "api",
    "patch": "api",
    "patch_many": "api",
    "read_prompts": "evaluation.sets",
    "refusals": "api",
    "repair": "api",
    "sweep": "api",
    "verify": "api",
}


def __getattr__(name: str) -> object:
    """Import the API on first use: `import safeproj` and `safeproj --help` must not load torch."""
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"safeproj.{_HOME[name]}"), name)
    if name == "salora":
        return import_module("safeproj.methods.salora")
    raise AttributeError(f"module 'safeproj' has no attribute {name!r}")
