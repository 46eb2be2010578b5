"""Benchmarks of time and memory, and what runs cost as computed from shapes."""
