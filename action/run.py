"""Run the steps of a composite action here, as GitHub's runner would.

    python -m action.run . --input adapter=DIR --input base=DIR --input aligned=DIR

Steps with `run` run in bash, in order, with the files of `GITHUB_OUTPUT`, `GITHUB_ENV`,
`GITHUB_PATH` and `GITHUB_STEP_SUMMARY`. Of steps with `uses`, `actions/cache/restore` and
`actions/cache/save` are done with a directory (`--cache`); every other one is named on a line that
begins with `skipped:`, with what it would have been given. Expressions may use `inputs`, `steps`,
`github.action_path`, `runner.temp` and `runner.os`, string and boolean literals, `!`, `==`, `!=`,
`&&`, `||`, parentheses, and the functions of a step's status.

What this file does not know it refuses: a key of a step, another shell, a function, a context. The
exit code is that of the first step that failed, or 0; 3 if the action is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

REFUSED = 3
"""Exit code for an action that cannot be run here."""

CACHE_HIT = {True: "true", False: ""}
"""What `actions/cache/restore` sets: nothing at all on a miss."""

_STEP_KEYS = {"name", "id", "if", "uses", "with", "run", "shell", "env", "working-directory"}
_RESTORE, _SAVE = "actions/cache/restore", "actions/cache/save"
_STATUS = ("always", "cancelled", "failure", "success")
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"\s*(?:(?P<string>'(?:[^']|'')*')|(?P<name>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)"
    r"|(?P<mark>==|!=|&&|\|\||[!()]))"
)
_OUTPUT = re.compile(r"(?P<name>[^=<]+)=(?P<value>.*)|(?P<long>[^=<]+)<<(?P<end>.+)")

Value = str | bool


class RefusedError(Exception):
    """The action uses something that is not known here."""


@dataclass
class Result:
    """What a run of an action gave.

    Attributes:
        code: the exit code of the first step that failed, 0 if none did.
        outputs: of the action.
        skipped: the steps that were not run, with what each would have been given.
    """

    code: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    skipped: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@dataclass
class Context:
    """What expressions can name."""

    inputs: Mapping[str, str]
    action_path: Path
    temp: Path
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: bool = False

    def lookup(self, name: str) -> str:
        """Return the value of a name with dots; steps and outputs that are not set are empty."""
        match name.split("."):
            case ["inputs", key] if key in self.inputs:
                return self.inputs[key]
            case ["steps", step, "outputs", key]:
                return self.steps.get(step, {}).get(key, "")
            case ["github", "action_path"]:
                return str(self.action_path)
            case ["runner", "temp"]:
                return str(self.temp)
            case ["runner", "os"]:
                return {"Darwin": "macOS"}.get(platform.system(), platform.system())
        raise RefusedError(f"unknown name in an expression: {name}")

    def call(self, name: str) -> bool:
        """Return the value of a function of the job's status."""
        if name not in _STATUS:
            raise RefusedError(f"unknown function in an expression: {name}()")
        return {"failure": self.failed, "success": not self.failed}.get(name, name == "always")


class _Parser:
    """Evaluates one expression by recursive descent, loosest operator first.

    Both sides of `&&` and `||` are evaluated, so that what is not known is refused wherever it is.
    """

    def __init__(self, text: str, context: Context) -> None:
        self._tokens = list(_tokens(text))
        self._text = text
        self._context = context

    def value(self) -> Value:
        result = self._or()
        if self._tokens:
            raise RefusedError(f"cannot be read as an expression: {self._text.strip()}")
        return result

    def _or(self) -> Value:
        left = self._and()
        while self._take("||"):
            right = self._and()
            left = left or right
        return left

    def _and(self) -> Value:
        left = self._equal()
        while self._take("&&"):
            right = self._equal()
            left = right if left else left
        return left

    def _equal(self) -> Value:
        left = self._not()
        while self._tokens and self._tokens[0] in (("mark", "=="), ("mark", "!=")):
            mark = self._tokens.pop(0)[1]
            right = self._not()
            if isinstance(left, bool) != isinstance(right, bool):
                raise RefusedError(f"compares unlike kinds: {self._text.strip()}")
            same = str(left).casefold() == str(right).casefold()  # as GitHub compares strings
            left = same if mark == "==" else not same
        return left

    def _not(self) -> Value:
        return not self._not() if self._take("!") else self._primary()

    def _primary(self) -> Value:
        if self._take("("):
            result = self._or()
            self._expect(")")
            return result
        kind, text = self._tokens.pop(0) if self._tokens else ("", "")
        if kind == "string":
            return text[1:-1].replace("''", "'")
        if kind == "name" and self._take("("):
            self._expect(")")
            return self._context.call(text)
        if kind == "name":
            return text == "true" if text in ("true", "false") else self._context.lookup(text)
        raise RefusedError(f"cannot be read as an expression: {self._text.strip()}")

    def _take(self, mark: str) -> bool:
        if self._tokens and self._tokens[0] == ("mark", mark):
            del self._tokens[0]
            return True
        return False

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise RefusedError(f"cannot be read as an expression: {self._text.strip()}")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            raise RefusedError(f"cannot be read as an expression: {text.strip()}")
        place = match.end()
        kind = cast(str, match.lastgroup)
        yield kind, match[kind]


def evaluate(text: str, context: Context) -> Value:
    """Return the value of one expression, without its braces."""
    return _Parser(text, context).value()


def resolve(text: object, context: Context) -> str:
    """Return a text of the action with its expressions replaced by their values."""

    def replaced(match: re.Match[str]) -> str:
        value = evaluate(match[1], context)
        return str(value).lower() if isinstance(value, bool) else value

    result = _EXPRESSION.sub(replaced, _scalar(text))
    if "${{" in _EXPRESSION.sub("", _scalar(text)):
        raise RefusedError(f"an expression does not end: {text}")
    return result


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise RefusedError(f"not a text: {value!r}")


def wanted(condition: object, context: Context) -> bool:
    """Return whether a step runs: without a function of the status only if none has failed."""
    if condition is None:
        return not context.failed
    text = _scalar(condition).strip()
    if text.startswith("${{") and text.endswith("}}"):
        text = text[3:-2]
    met = bool(evaluate(text, context))
    asks = any(f"{name}(" in text.replace(" ", "") for name in _STATUS)
    return met and (asks or not context.failed)


class Runner:
    """Runs one action.

    Args:
        action: its directory.
        given: values of inputs.
        workspace: the directory that its steps run in.
        temp: `RUNNER_TEMP`, new for each job.
        cache: what stands for GitHub's cache, kept between runs.
        summary: the file for the summary of the steps.
        env: further variables of the environment.
    """

    def __init__(
        self,
        action: Path,
        given: Mapping[str, str],
        *,
        workspace: Path,
        temp: Path,
        cache: Path,
        summary: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.action = action.resolve()
        self.document = _document(self.action / "action.yml")
        self.context = Context(_inputs(self.document, given), self.action, temp)
        self.workspace, self.temp, self.cache = workspace, temp, cache
        self.summary = temp / "summary.md" if summary is None else summary
        self.env = {**os.environ, **(env or {})}
        self.result = Result()

    def run(self) -> Result:
        """Run the steps and return what came of them.

        Raises:
            RefusedError: the action uses something that is not known here.
        """
        runs = self.document["runs"]
        if runs.get("using") != "composite" or set(runs) != {"using", "steps"}:
            raise RefusedError("not a composite action of steps")
        for step in runs["steps"]:
            self._step(step)
        for name, output in self.document.get("outputs", {}).items():
            self.result.outputs[name] = resolve(output["value"], self.context)
        return self.result

    def _step(self, step: Mapping[str, Any]) -> None:
        if unknown := set(step) - _STEP_KEYS:
            raise RefusedError(f"unknown in a step: {', '.join(sorted(unknown))}")
        name = str(step.get("name") or step.get("uses") or step.get("run"))
        if not wanted(step.get("if"), self.context):
            print(f"not run: {name}", flush=True)
            return
        if "uses" in step:
            self._use(step, name)
            return
        print(f"run: {name}", flush=True)
        if step.get("shell") != "bash":
            raise RefusedError(f"{name}: its shell is {step.get('shell')}; only bash is known")
        code, outputs = self._bash(step)
        if "id" in step:
            self.context.steps[step["id"]] = outputs
        if code:
            print(f"failed with exit code {code}: {name}", flush=True)
            self.result.code = self.result.code or code
            self.context.failed = True

    def _bash(self, step: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
        with tempfile.TemporaryDirectory(dir=self.temp) as folder:
            files = {
                key: Path(folder) / key for key in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_PATH")
            }
            for file in files.values():
                file.touch()
            self.summary.touch()
            script = Path(folder) / "step.sh"
            script.write_text(resolve(step["run"], self.context), "utf-8")
            env = {
                **self.env,
                "GITHUB_ACTIONS": "true",
                "GITHUB_ACTION_PATH": str(self.action),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "GITHUB_WORKSPACE": str(self.workspace),
                "RUNNER_TEMP": str(self.temp),
                **{key: str(file) for key, file in files.items()},
                **{key: resolve(value, self.context) for key, value in step.get("env", {}).items()},
            }
            place = self.workspace / resolve(step.get("working-directory", "."), self.context)
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
                cwd=place,
                env=env,
                check=False,
            )
            self.env.update(_settings(files["GITHUB_ENV"]))
            added = files["GITHUB_PATH"].read_text("utf-8").split("\n")
            for path in filter(None, added):
                self.env["PATH"] = f"{path}{os.pathsep}{self.env['PATH']}"
            return done.returncode, _settings(files["GITHUB_OUTPUT"])

    def _use(self, step: Mapping[str, Any], name: str) -> None:
        action = str(step["uses"]).partition("@")[0]
        given = {key: resolve(value, self.context) for key, value in step.get("with", {}).items()}
        if action not in (_RESTORE, _SAVE):
            print(f"skipped: {name}: uses {step['uses']} with {json.dumps(given)}", flush=True)
            self.result.skipped.append((str(step["uses"]), given))
            return
        if set(given) != {"path", "key"} or "\n" in given["path"] or "/" in given["key"]:
            raise RefusedError(f"{name}: only one path and a key without slashes are known")
        kept, place = self.cache / given["key"], Path(given["path"])
        if action == _SAVE:
            print(f"cache saved as {given['key']}: {name}", flush=True)
            if not kept.exists():  # GitHub keeps the first, too
                shutil.copytree(place, kept)
            return
        hit = kept.exists()
        print(f"cache {'hit' if hit else 'miss'} for {given['key']}: {name}", flush=True)
        if hit:
            shutil.copytree(kept, place, dirs_exist_ok=True)
        if "id" in step:
            self.context.steps[step["id"]] = {"cache-hit": CACHE_HIT[hit]}


def _document(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(document, dict) or "runs" not in document:
        raise RefusedError(f"{path.name} is no action")
    return document


def _inputs(document: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    known = document.get("inputs", {})
    if unknown := set(given) - set(known):
        raise RefusedError(f"no such input: {', '.join(sorted(unknown))}")
    values = {name: _scalar((about or {}).get("default", "")) for name, about in known.items()}
    return {**values, **given}


def _settings(file: Path) -> dict[str, str]:
    """Return what a step wrote to GITHUB_OUTPUT or GITHUB_ENV: lines, or texts of several lines."""
    found: dict[str, str] = {}
    lines = iter(file.read_text("utf-8").split("\n"))
    for line in lines:
        if not line:
            continue
        match = _OUTPUT.fullmatch(line.rstrip("\r"))
        if match is None:
            raise RefusedError(f"cannot be read as NAME=VALUE: {line}")
        if match["name"] is not None:
            found[match["name"]] = match["value"]
            continue
        text = []
        for each in lines:
            if each == match["end"]:
                break
            text.append(each)
        else:
            raise RefusedError(f"there is no {match['end']} after {match['long']}")
        found[match["long"]] = "\n".join(text)
    return found


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description="Run a composite action here.")
    parser.add_argument("action", type=Path, help="directory of the action")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--workspace", type=Path, default=Path(), help="where the steps run")
    parser.add_argument("--cache", type=Path, help="directory that stands for GitHub's cache")
    parser.add_argument("--temp", type=Path, help="RUNNER_TEMP, kept")
    parser.add_argument("--summary", type=Path, help="file for the summary of the steps")
    given = parser.parse_args(arguments)
    pairs = [each.partition("=") for each in given.input]
    try:
        with _folder(given.temp) as temp, _folder(given.cache) as cache:
            runner = Runner(
                given.action,
                {name: value for name, _, value in pairs},
                workspace=given.workspace.resolve(),
                temp=temp,
                cache=cache,
                summary=given.summary and given.summary.resolve(),
            )
            result = runner.run()
    except RefusedError as error:
        print(f"action.run: {error}", file=sys.stderr)
        return REFUSED
    for name, value in result.outputs.items():
        print(f"output {name}={value}")
    return result.code


if __name__ == "__main__":
    raise SystemExit(main())
