"""Put what the commands print into README.md and pages of docs, and the rules: `make readme`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from safeproj.records.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).parent / "safeproj"
PAGES = (
    "README.md",
    "docs/scores.md",
    "docs/gate.md",
    "docs/covariance.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/sweep.md",
)
"""The pages with console blocks: each `$ safeproj` line is run, in order, in one directory."""


PROGRESS = re.compile(r"^safeproj: .*, [\d:]+ so far(?:, about [\d:]+ left)?\n", re.MULTILINE)
"""What a slow machine says besides: a run of more than 30 seconds shows that it goes on."""


def output(command: list[str], cwd: str) -> str:
    """Return what a command prints on both streams; gates end with 1 where they fail."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout)
    return PROGRESS.sub("", done.stdout)


def with_consoles(text: str) -> str:
    """Return a page with the real output in its console blocks."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "examples").symlink_to(ROOT / "examples")

        def console(match: re.Match[str]) -> str:
            shown = match[1]
            printed = output([str(COMMAND), *shlex.split(shown)[2:]], directory)
            return f"```console\n{shown}\n{printed}```"

        return re.sub(r"```console\n(\$ safeproj .*)\n(?:.*\n)*?```", console, text)


def with_demo(text: str) -> str:
    """Return the README with the demonstration's table."""
    with tempfile.TemporaryDirectory() as directory:
        demo = output([sys.executable, "-m", "scripts.demo", "--out", directory], str(ROOT))
    (table,) = re.findall(r"^ +complies(?:.*\n)*.*B merely scaled.*\n", demo, re.MULTILINE)
    return re.sub(
        r"(<!-- example: demo -->\n```text\n)(?:.*\n)*?```", lambda m: f"{m[1]}{table}```", text
    )


def rules() -> str:
    """Return the section about every finding."""
    parts = [
        f"### {rule.id} {rule.name}\n\n{rule.text}\n\n*What to do:* {rule.remedy}\n"
        for rule in RULES.values()
    ]
    return "\n".join(parts)


def main() -> None:
    """Rewrite the pages."""
    for name in PAGES:
        page = ROOT / name
        text = with_consoles(page.read_text("utf-8"))
        if name == "README.md":
            text = with_demo(text)
        text = re.sub(
            r"(<!-- findings: [^>]*-->\n)(?:.*\n)*?(<!-- end -->)",
            lambda m: f"{m[1]}\n{rules()}\n{m[2]}",
            text,
        )
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
