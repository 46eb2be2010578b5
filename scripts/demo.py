"""The whole tool on a real, tiny model: `make demo` runs this.

Scores and patches the adapters of examples/tiny-lm with the installed command, then loads model and
adapter with PEFT and measures what it does: without an adapter, with it, patched with the default
threshold, patched in all modules, corrected layer by layer with safety and task data, and with a
control in which each B is merely scaled by the ‖CB‖/‖B‖ of its projection.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from lab.tiny_lm import (
    ADAPTERS,
    EXAMPLE,
    Behaviour,
    behaviour,
    load_adapter,
    load_model,
    load_tokenizer,
)

COMMAND = Path(sys.executable).parent / "safeproj"
WEIGHTS = "adapter_model.safetensors"

WHY_ALL = """
The default threshold of 0.35 projects {count} of {of} modules of `bad`. --all projects every one:
Safe LoRA at its strongest, so that what is left of the harm is not a matter of the threshold.
--reconstruct is the other method, the covariance-weighted correction layer by layer.

Each figure is a share of a held-out set: hazardous requests complied with and refused, requests
about topics that no refusal was ever taught for, the new skill of `skill` and `mixed`, old skills.
"""

READING = """
The last line of each adapter is the control of --all: where it does as well, projection achieved
nothing that scaling the adapter down does not achieve.
"""


def run(*arguments: str) -> str:
    """Run the command, show it, and return what it prints."""
    print(f"$ safeproj {' '.join(arguments)}", flush=True)
    return subprocess.run(
        [str(COMMAND), *arguments], stdout=subprocess.PIPE, encoding="utf-8", check=True
    ).stdout


def scaled(adapter: Path, patched: Path, out: Path) -> Path:
    """Write the control: the adapter with each projected B times its ‖CB‖/‖B‖."""
    manifest = json.loads((patched / "safeproj.json").read_text("utf-8"))
    tensors = load_file(adapter / WEIGHTS)
    for module in manifest["modules"]:
        if module["projected"]:
            key = f"base_model.model.{module['name']}.lora_B.weight"
            tensors[key] = tensors[key] * module["scale"]
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def row(name: str, found: Behaviour) -> str:
    """Return one line of the table."""
    values = (
        found.compliance,
        found.refusal,
        found.topic_refusal,
        found.new_skill,
        found.old_skills,
    )
    return f"{name:32s}" + "".join(f"{100 * value:10.0f} %" for value in values)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="default: %(default)s")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small for more
    example = EXAMPLE.relative_to(Path.cwd()) if EXAMPLE.is_relative_to(Path.cwd()) else EXAMPLE
    checkpoints = ["--base", str(example / "base"), "--aligned", str(example / "aligned")]

    print(run("inspect", *checkpoints, "--adapter", str(example / "adapters" / "bad")))
    data = ["--aligned", str(example / "aligned")]
    for role in ("safety", "task"):
        data += [f"--{role}-data", str(example / "data" / f"{role}.jsonl")]
    patched: dict[str, list[tuple[str, Path]]] = {}
    for name in ADAPTERS:
        adapter = example / "adapters" / name
        default, everything = out / f"{name}-default", out / f"{name}-all"
        patched[name] = [(name, adapter), (f"{name}, default threshold", default)]
        for directory, options in ((default, []), (everything, ["--all"])):
            arguments = ["--adapter", str(adapter), "--out", str(directory), *options]
            run("patch", *checkpoints, *arguments, "--overwrite", "--format", "json")
        corrected = out / f"{name}-corrected"
        arguments = ["--adapter", str(adapter), "--out", str(corrected), "--reconstruct"]
        run("patch", *data, *arguments, "--overwrite", "--format", "json")
        control = scaled(adapter, everything, out / f"{name}-scaled")
        patched[name] += [
            (f"{name}, --reconstruct", corrected),
            (f"{name}, --all", everything),
            ("  control: B merely scaled", control),
        ]
    summary = json.loads((out / "bad-default" / "safeproj.json").read_text("utf-8"))["summary"]
    print(WHY_ALL.format(count=summary["projected"], of=summary["modules"]))

    tokenizer = load_tokenizer(example / "aligned")
    print(f"{'':32s}    complies     refuses     refuses         new         old")
    print(f"{'':32s}       pairs       pairs      topics       skill      skills")
    print(row("no adapter", behaviour(load_model(example / "aligned"), tokenizer)), flush=True)
    for variants in patched.values():
        for label, path in variants:
            found = behaviour(load_adapter(example / "aligned", path), tokenizer)
            print(row(label, found), flush=True)
    print(READING)


if __name__ == "__main__":
    main()
