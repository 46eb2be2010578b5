"""From the name of a weight in the running model to the checkpoint tensors it is made of."""

from __future__ import annotations

from safeproj.names.find import Names
from safeproj.names.layout import Layout
from safeproj.names.rules import Rule, parse_rules

__all__ = ["Layout", "Names", "Rule", "parse_rules"]
