"""Experiments: a tiny language and its models, evidence, methods compared, makers of fixtures."""
