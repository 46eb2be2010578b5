"""Regular expressions that come out of files: they are run with a bound on their time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from safeproj.errors import SafeprojError

SECONDS = 10.0
"""How long all names may take: an honest pattern over thousands of names takes milliseconds."""

_PLAIN = re.compile(r"[\w.]*", re.ASCII)

_SCRIPT = """\
import json, re, sys
prefix, pattern, names = json.load(sys.stdin)
re.compile(pattern)  # by itself: it must not close the group that it is put into
compiled = re.compile(f"{prefix}({pattern})" if prefix else pattern)
json.dump([name for name in names if compiled.fullmatch(name)], sys.stdout)
"""


def fullmatches(pattern: str, names: Sequence[str], *, prefix: str = "") -> frozenset[str]:
    r"""Return those of the names that a pattern from a file matches as a whole.

    A pattern can take longer than the universe lasts, and `re` cannot be stopped: what is more than
    letters, digits and dots runs in a process of its own.

    Args:
        pattern: the regular expression.
        names: what it is matched against.
        prefix: a trusted expression in front of it.

    Raises:
        SafeprojError: it is no regular expression, or takes too long.

    >>> sorted(fullmatches(r".*\.(q|v)_proj", ["layers.0.q_proj", "layers.0.k_proj"]))
    ['layers.0.q_proj']
    """
    if _PLAIN.fullmatch(pattern):
        compiled = re.compile(f"{prefix}({pattern})")
        return frozenset(name for name in names if compiled.fullmatch(name))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _SCRIPT],
            input=json.dumps([prefix, pattern, list(names)]),
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=True,
        )
        return frozenset(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise SafeprojError(
            f"the pattern {pattern[:80]!a} takes more than {SECONDS:g} seconds"
        ) from None
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise SafeprojError(f"the pattern {pattern[:80]!a} is no regular expression") from error
