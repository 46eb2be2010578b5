"""Attacks on what loaders and servers do with files that a gate might skim, and with scalings."""

# ruff: noqa: ARG001 - all edits take the same two arguments

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.gate.adversarial import PLAIN, Ground, attack, change_tensors, configure

PADDING = "x" * (17 << 20)


def model(adapter: Path, ground: Ground, **settings: object) -> None:
    """Put the config of the aligned model beside the adapter, with further settings."""
    config = json.loads((ground.starts[PLAIN].aligned / "config.json").read_text("utf-8"))
    (adapter / "config.json").write_text(json.dumps({**config, **settings}), "utf-8")


def put(adapter: Path, name: str, content: bytes) -> None:
    (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    (adapter / name).write_bytes(content)


@attack("served", "SP014")
def index_padded_to_be_skipped(adapter: Path, ground: Ground) -> None:
    """The index of a whole model, whose weights pass as an optimizer's, is too long to be read."""
    model(adapter, ground)
    torch.save(dict(ground.weights), adapter / "optimizer.bin")
    names = dict.fromkeys(ground.weights, "optimizer.bin")
    index = {"metadata": {"note": PADDING}, "weight_map": names}
    put(adapter, "pytorch_model.bin.index.json", json.dumps(index).encode())


@attack("served", "SP039", says="auto_map")
def code_in_a_padded_config(adapter: Path, ground: Ground) -> None:
    """A config that names code to run is too long to be read."""
    model(adapter, ground, note=PADDING, auto_map={"AutoConfig": "evil.Evil"})
    put(adapter, "evil.py", b"class Evil: ...\n")


@attack("served", "SP041", code=2, says="nested too deep")
def code_in_a_deep_config(adapter: Path, ground: Ground) -> None:
    """A config is nested so deep that looking for code in it gives up."""
    deep = b"[" * 100_000 + b"]" * 100_000
    put(adapter, "config.json", b'{"auto_map": {"AutoConfig": "evil.Evil"}, "x": ' + deep + b"}")


@attack("served", "SP014")
def weights_that_begin_like_an_object_of_git(adapter: Path, ground: Ground) -> None:
    """The length of a header makes a whole model look like what git keeps compressed."""
    for size in range(256):
        save_file(dict(ground.weights), adapter / "x", metadata={"format": "pt", "x": "y" * size})
        if (adapter / "x").read_bytes()[:1] == b"x":
            break
    place = adapter / ".git" / "objects" / "ab" / ("c" * 38)
    place.parent.mkdir(parents=True)
    shutil.move(adapter / "x", place)


@attack("served", "SP014")
def index_among_the_refs_of_git(adapter: Path, ground: Ground) -> None:
    """Nobody reads what lies among the branches, but a config may name it."""
    names = dict.fromkeys(ground.weights, "../objects/ab/" + "c" * 38)
    index = json.dumps({"metadata": {}, "weight_map": names})
    put(adapter, ".git/refs/model.safetensors.index.json", index.encode())


@attack("served", "SP014", says="transformers_weights")
def config_that_names_other_weights(adapter: Path, ground: Ground) -> None:
    """The model's own config says which file has its weights."""
    model(adapter, ground, transformers_weights="notes.md")


@attack("served", "SP039", says="makes git run programs")
def git_config_that_runs_a_program(adapter: Path, ground: Ground) -> None:
    """Whoever asks git about the directory runs the attacker's program."""
    put(adapter, ".git/config", b'[core]\n\tbare = false\n\tfsmonitor = "sh -c evil"\n')


@attack("served", "SP014")
def weights_as_training_state_of_a_subdirectory(adapter: Path, ground: Ground) -> None:
    """A second adapter lies below, under the name of an optimizer's state."""
    (adapter / "sub").mkdir()
    torch.save({"w": torch.ones(8, 8)}, adapter / "sub" / "optimizer.bin")


@attack("served", "SP039", says="experts_implementation")
def kernel_for_experts(adapter: Path, ground: Ground) -> None:
    """Compiled code of a repository computes the experts, or one part of the model."""
    model(adapter, ground, experts_implementation="evil/kernel")


@attack("served", "SP039", says="attn_implementation")
def kernel_for_one_part(adapter: Path, ground: Ground) -> None:
    """The setting is a mapping, in which only one part of the model has the attacker's kernel."""
    model(adapter, ground, attn_implementation={"text_config": "evil/kernel"})


@attack("served", "SP036", says="float16 times")
def scaling_that_rounds_the_update_away(adapter: Path, ground: Ground) -> None:
    """Servers multiply B by the scaling in float16, where hardly a value of it is left."""

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] *= 2.0**18 if "lora_A" in name else 2.0**6

    change_tensors(adapter, grow)
    configure(adapter, lora_alpha=8 * 2.0**-30)
