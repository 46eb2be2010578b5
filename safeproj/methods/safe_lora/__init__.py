"""Alignment files: what a base and an aligned checkpoint say about `C`, stored to be used again."""
