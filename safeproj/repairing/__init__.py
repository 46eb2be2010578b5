"""A repair: methods tried on an adapter, measured, and the one that keeps the most written."""
