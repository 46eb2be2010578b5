"""LoRA adapters on disk: reading, checking, and writing a patched one."""

from safeproj.adapter.peft import read_adapter
from safeproj.adapter.record import AdaptedModule, Adapter, FullChange

__all__ = ["AdaptedModule", "Adapter", "FullChange", "read_adapter"]
