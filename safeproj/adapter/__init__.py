"""LoRA adapters on disk: reading, checking, and writing a patched one."""

from safeproj.adapter.peft import read_adapter
from safeproj.adapter.record import AdaptedModule, Adapter

__all__ = ["AdaptedModule", "Adapter", "read_adapter"]
