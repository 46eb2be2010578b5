"""Put the real output of the README's commands into the README: `make readme`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).parent / "safeproj"


def output(command: list[str], cwd: str) -> str:
    """Return what a command prints on both streams."""
    return subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=True,
    ).stdout


def main() -> None:
    """Rewrite README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "examples").symlink_to(ROOT / "examples")

        def console(match: re.Match[str]) -> str:
            shown = match[1]
            printed = output([str(COMMAND), *shlex.split(shown)[2:]], directory)
            return f"```console\n{shown}\n{printed}```"

        text = re.sub(r"```console\n(\$ safeproj .*)\n(?:.*\n)*?```", console, text)
        demo = output([sys.executable, str(ROOT / "scripts" / "demo.py")], directory)
    (table,) = re.findall(r"^ +complies(?:.*\n)*.*B merely scaled.*\n", demo, re.MULTILINE)
    text = re.sub(
        r"(<!-- example: demo -->\n```text\n)(?:.*\n)*?```", lambda m: f"{m[1]}{table}```", text
    )
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
