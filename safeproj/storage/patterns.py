"""Regular expressions that come out of files: they are run with a bound on their time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import IO

from safeproj.errors import SafeprojError

SECONDS = 10.0
"""How long all patterns of a config may take, over all names: honest ones take milliseconds."""

MEMORY = 1 << 30
"""Bytes that the process may use which runs them."""

MAX_PATTERNS = 20_000
"""Patterns that are tried one after another: one for each module of a mixture of experts."""

MAX_PATTERN = 100_000
"""Characters of one: some name every module of a model."""

MAX_FORMS = 64
"""Lengths and places of dots among plain patterns that are looked up; further ones are run."""

_PLAIN = re.compile(r"[\w.]*", re.ASCII)

_SCRIPT = """\
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
except (ImportError, OSError, ValueError):
    pass
for line in sys.stdin:
    prefix, patterns, names = json.loads(line)
    found, compiled = {}, []
    try:
        for number, pattern in patterns:
            re.compile(pattern)  # by itself: it must not close the group that it is put into
            compiled.append((number, re.compile(f"{prefix}({pattern})" if prefix else pattern)))
    except (re.error, OverflowError, RecursionError, MemoryError):
        print(json.dumps(number), flush=True)
        continue
    for name in names:
        for number, each in compiled:
            if each.fullmatch(name):
                found[name] = number
                break
    print(json.dumps(found), flush=True)
""".replace("MEMORY", str(MEMORY))


class _Runner:
    """A process that runs patterns, and the time that it has left."""

    def __init__(self) -> None:
        self._left = SECONDS
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, prefix: str, patterns: Sequence[tuple[int, str]], names: Sequence[str]
    ) -> dict[str, int] | int:
        """Return the first pattern that each name matches, or the number of one that is none.

        Raises:
            TimeoutError: there is no more time.
            OSError, ValueError: the process came to an end.
        """
        if self._left <= 0.0:
            raise TimeoutError
        begin = time.monotonic()
        process = self._started()
        timer = threading.Timer(self._left, process.kill)
        timer.start()
        try:
            stdin, stdout = _pipes(process)
            stdin.write(json.dumps([prefix, patterns, names]) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except OSError:  # the process has come to an end
            answer = ""
        finally:
            timer.cancel()
            self._left -= time.monotonic() - begin
        if not answer:
            self.close()
            if self._left <= 0.0:
                raise TimeoutError
        found: dict[str, int] | int = json.loads(answer)
        return found

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for pipe in _pipes(process):
                with suppress(OSError):  # what was not sent yet
                    pipe.close()


_current: ContextVar[_Runner | None] = ContextVar("patterns", default=None)


@contextmanager
def one_budget() -> Iterator[None]:
    """Let all patterns that are run meanwhile share one process and one time limit."""
    if _current.get() is not None:
        yield
        return
    runner = _Runner()
    token = _current.set(runner)
    try:
        yield
    finally:
        _current.reset(token)
        runner.close()


def fullmatches(pattern: str, names: Sequence[str], *, prefix: str = "") -> frozenset[str]:
    r"""Return those of the names that a pattern from a file matches as a whole.

    Args:
        pattern: the regular expression.
        names: what it is matched against.
        prefix: a trusted expression in front of it, empty or one that ends with a dot.

    Raises:
        SafeprojError: it is no regular expression, or takes too long.

    >>> sorted(fullmatches(r".*\.(q|v)_proj", ["layers.0.q_proj", "layers.0.k_proj"]))
    ['layers.0.q_proj']
    """
    return frozenset(first_matches([pattern], names, prefix=prefix))


def first_matches(
    patterns: Sequence[str], names: Sequence[str], *, prefix: str = ""
) -> dict[str, int]:
    r"""Return for each name which of the patterns is the first that matches it as a whole.

    A pattern can take longer than the universe lasts, and `re` cannot be stopped: what is more than
    letters, digits and dots runs in a process of its own.

    Args:
        patterns: the regular expressions.
        names: what they are matched against.
        prefix: as for `fullmatches`.

    Returns:
        The number of the pattern, for each name that one matches.

    Raises:
        SafeprojError: there are too many, one is no regular expression, or they take too long.

    >>> first_matches(["q_proj", r"layers\.0\..*"], ["layers.0.q_proj", "layers.0.k_proj"])
    {'layers.0.q_proj': 1, 'layers.0.k_proj': 1}
    """
    if len(patterns) > MAX_PATTERNS:
        raise SafeprojError(f"{len(patterns)} patterns; expected at most {MAX_PATTERNS}")
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise SafeprojError(
                f"the pattern {pattern[:80]!a} has {len(pattern)} characters; expected at most "
                f"{MAX_PATTERN}"
            )
    plain: dict[tuple[int, ...], dict[str, int]] = {}
    others: list[tuple[int, str]] = []
    for number, pattern in enumerate(patterns):
        form = _form(pattern)
        if form is not None and (form in plain or len(plain) < MAX_FORMS):
            plain.setdefault(form, {}).setdefault(_masked(pattern, form), number)
        else:
            others.append((number, pattern))
    found = _run(prefix, others, names) if others else {}
    for name in names:
        numbers = [found[name]] if name in found else []
        for form, wanted in plain.items():
            tail = name[len(name) - form[0] :] if len(name) >= form[0] else None
            if tail is None or (len(name) > form[0] and not (prefix and name[-form[0] - 1] == ".")):
                continue
            hit = wanted.get(_masked(tail, form))
            numbers += [] if hit is None else [hit]
        if numbers:
            found[name] = min(numbers)
    return {name: found[name] for name in names if name in found}


def _form(pattern: str) -> tuple[int, ...] | None:
    """Return length and places of dots of a plain pattern, None for any other."""
    if _PLAIN.fullmatch(pattern) is None:
        return None
    return (len(pattern), *(at for at, each in enumerate(pattern) if each == "."))


def _masked(text: str, form: tuple[int, ...]) -> str:
    """Return a text without what the dots of a plain pattern, which match anything, stand for."""
    for at in form[1:]:
        text = f"{text[:at]}.{text[at + 1 :]}"
    return text


def _run(prefix: str, patterns: Sequence[tuple[int, str]], names: Sequence[str]) -> dict[str, int]:
    with one_budget():
        runner = _current.get()
        assert runner is not None
        first = patterns[0][1][:80]
        which = f"the pattern {first!a}" if len(patterns) == 1 else f"{len(patterns)} patterns"
        try:
            found = runner.run(prefix, patterns, list(names))
        except TimeoutError:
            raise SafeprojError(
                f"{which}, with those before: more than {SECONDS:g} seconds are needed to match "
                "them"
            ) from None
        except (OSError, ValueError) as error:
            runner.close()
            raise SafeprojError(f"{which} cannot be matched: too large") from error
    if isinstance(found, int):
        bad = next(pattern for number, pattern in patterns if number == found)
        raise SafeprojError(f"the pattern {bad[:80]!a} is no regular expression")
    return found


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout
