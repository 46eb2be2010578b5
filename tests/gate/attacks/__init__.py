"""Further groups of the adversarial table, one file per kind of attack.

Every module here adds to `tests.gate.adversarial.ATTACKS` when it is imported, and all are.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
