"""Which updates meet which weights."""
