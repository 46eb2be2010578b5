"""safeproj: repair the safety of fine-tuned LoRA adapters after training.

What it offers is listed in `__init__.pyi`; docs/python.md goes through it.
"""

from safeproj import exports

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = exports.attach(__name__, __file__)
