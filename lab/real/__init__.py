"""Recipes for real models, which have not been run; only ``--dry-run`` has."""
