"""docs/salora.md runs as it is printed, from the data to the served adapter."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeproj import salora
from tests.e2e.test_readme import assert_same_but_for_rounding
from tests.support import Process, safeproj, started_m

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "salora.md").read_text("utf-8")
PERCENT = re.compile(r"\d+\.\d%")
"""Shares in bfloat16, whose last digit another processor may round otherwise."""

BLOCKS = re.findall(r"```(console|python)\n(.*?)```", DOCUMENT, re.DOTALL)


INTERPRETER = """
import sys, time
from pathlib import Path
state = {}
for name in sys.argv[1:]:
    while not Path(name).exists():
        time.sleep(0.02)
    exec(Path(name).read_text("utf-8"), state)
    Path(name).rename(f"{name}.done")
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which all blocks were run, in order; Python in one interpreter."""
    root = tmp_path_factory.mktemp("salora")
    (root / "examples").symlink_to(ROOT / "examples")
    names = [f"block{number}.py" for number, (kind, _) in enumerate(BLOCKS) if kind == "python"]
    (root / "interpreter.py").write_text(INTERPRETER, "utf-8")
    interpreter = started_m("interpreter", *names, cwd=root, env={"OMP_NUM_THREADS": "1"})
    try:
        for number, (kind, text) in enumerate(BLOCKS):
            if kind == "python":
                run_python(interpreter, root / f"block{number}.py", text)
                continue
            command, _, shown = text.partition("\n")
            result = safeproj(*shlex.split(command)[2:], cwd=root)
            assert result.returncode == 0, (command, result.stderr)
            printed = PERCENT.sub("%", result.stdout + result.stderr)
            assert_same_but_for_rounding(printed, PERCENT.sub("%", shown))
    finally:
        interpreter.kill()
    return root


def run_python(interpreter: Process, path: Path, text: str) -> None:
    written = path.with_suffix(".new")
    written.write_text(text, "utf-8")
    written.rename(path)
    while not Path(f"{path}.done").exists():
        if interpreter.poll() is not None:
            raise AssertionError(f"{text[:200]}: {interpreter.communicate()[1]}")
        time.sleep(0.02)


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
