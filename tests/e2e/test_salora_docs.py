"""docs/salora.md runs as it is printed, from the data to the served adapter."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeproj import salora
from tests.e2e.test_readme import assert_same_but_for_rounding
from tests.support import safeproj

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "salora.md").read_text("utf-8")
PERCENT = re.compile(r"\d+\.\d%")
"""Shares in bfloat16, whose last digit another processor may round otherwise."""

BLOCKS = re.findall(r"```(console|python)\n(.*?)```", DOCUMENT, re.DOTALL)


INTERPRETER = """
import sys
state = {}
for path in sys.stdin:
    exec(open(path.strip(), encoding="utf-8").read(), state)
    print("done", path.strip(), flush=True)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which all blocks were run, in order; Python in one interpreter."""
    root = tmp_path_factory.mktemp("salora")
    (root / "examples").symlink_to(ROOT / "examples")
    interpreter = subprocess.Popen(
        [sys.executable, "-c", INTERPRETER],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    with interpreter:
        for number, (kind, text) in enumerate(BLOCKS):
            if kind == "python":
                run_python(interpreter, root / f"block{number}.py", text)
                continue
            command, _, shown = text.partition("\n")
            result = safeproj(*shlex.split(command)[2:], cwd=root)
            assert result.returncode == 0, (command, result.stderr)
            printed = PERCENT.sub("%", result.stdout + result.stderr)
            assert_same_but_for_rounding(printed, PERCENT.sub("%", shown))
    return root


def run_python(interpreter: subprocess.Popen[str], path: Path, text: str) -> None:
    assert interpreter.stdin is not None
    assert interpreter.stdout is not None
    path.write_text(text, "utf-8")
    interpreter.stdin.write(f"{path}\n")
    interpreter.stdin.flush()
    for line in interpreter.stdout:  # the Trainer prints too
        if line == f"done {path}\n":
            return
    raise AssertionError(f"a script of the document failed: {text[:200]}")


def model() -> Any:
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(ROOT / "examples" / "tiny-lm" / "aligned", dtype=torch.float32)


def test_there_are_commands_and_scripts() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("console") == 4
    assert kinds.count("python") == 3


def test_the_served_adapter_computes_what_was_trained(done: Path) -> None:
    module = salora.SafetyModule.load(done / "tiny.safety.safetensors")
    trained = salora.attach(
        model(), done / "run" / "checkpoint-60", module, initial=salora.Initial.load(done / "start")
    ).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = model()(ids).logits
        wanted = trained(ids).logits
        for name in ("served", "run/folded"):
            served = PeftModel.from_pretrained(model(), str(done / name)).eval()
            assert torch.allclose(served(ids).logits, wanted, atol=1e-4, rtol=1e-5)
    assert (plain - wanted).abs().max() > 0.1


def test_the_constraint_alone_gives_a_plain_adapter(done: Path) -> None:
    from safetensors.torch import load_file

    module = salora.SafetyModule.load(done / "tiny.safety.safetensors")
    tensors = load_file(done / "served-plain" / "adapter_model.safetensors")
    for name, each in module.directions.items():
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert B.norm() > 0
        assert (each.U.T @ B).norm() < 1e-5 * B.norm()
