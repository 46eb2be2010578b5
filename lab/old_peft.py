"""Remake the fixtures that old versions of PEFT wrote: ``tests/fixtures``.

    python -m lab.old_peft                 # installs for some minutes, 1.2 GB of temporary disk
    python -m lab.old_peft --venvs DIR     # keep the environments in DIR, and use them again

Each version of PEFT in ``VERSIONS`` gets a virtual environment of its own, with the transformers of
its time, in which this file runs again as a worker. No model is downloaded: all are built from a
configuration, with random weights. What results:

    tests/fixtures/models/MODEL/base, aligned        checkpoints; aligned is base, a little moved
    tests/fixtures/peft-VERSION/CASE/adapter         as that PEFT's ``save_pretrained`` wrote it
    tests/fixtures/peft-VERSION/CASE/expected.safetensors

MODEL is ``base_model_name_or_path`` in the adapter's configuration. The last file holds the float32
``ΔW`` of every adapted module as that PEFT's own ``get_delta_weight`` computes it, in the layout of
the weight that it is added to. Its keys are the paths of the modules at run time; for a parameter
of a module (``target_parameters``) the path and the parameter's name, such as
``model.layers.0.mlp.experts.gate_up_proj``, with ``ΔW`` of shape (E, d1, d2).

The layouts of expert stacks, all of them real models:

    (E, out, in)                          tiny-granitemoe (transformers 4.57; each stack a module),
                                          tiny-mixtral and tiny-qwen3-moe (transformers 5)
    (E, in, out), marked is_transposed    tiny-gpt-oss (the mark came with transformers 5; PEFT 0.17
                                          and 0.18 do not read it)
    (E, in, out), without the mark        tiny-llama4

With the ``-square`` models ``gate_up_proj`` is square (16, 16), so that its shape tells nothing.
tiny-mixtral and tiny-qwen3-moe are stored with one tensor per expert, in the names of their time:
transformers 5 stacks them while loading.

Seeds and the hashing of strings are fixed: the same versions and machine give the same bytes. Made
and tested with Python 3.11; the oldest versions have no wheels for 3.13. Where pip's default for
torch is a build for GPUs, point pip at the CPU builds by its own settings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"

VERSIONS: dict[str, dict[str, str]] = {
    "0.7.1": {"transformers": "4.36.2", "numpy": "1.26.4", "huggingface_hub": "0.36.2"},
    "0.13.2": {"transformers": "4.45.2", "numpy": "1.26.4", "huggingface_hub": "0.36.2"},
    "0.17.1": {"transformers": "4.57.6", "numpy": "2.3.5", "huggingface_hub": "0.36.2"},
    "0.18.1": {"transformers": "5.0.0", "numpy": "2.3.5", "huggingface_hub": "1.33.0"},
    "0.19.0": {"transformers": "5.5.4", "numpy": "2.3.5", "huggingface_hub": "1.33.0"},
}
"""The versions of PEFT, and what is installed beside each, besides ``EVERYWHERE``."""

EVERYWHERE = {"torch": "2.13.0", "accelerate": "1.15.0", "safetensors": "0.8.0"}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
}
"""Of the workers. The hash seed decides the order of ``target_modules`` in a configuration."""


@dataclass(frozen=True)
class Model:
    """A tiny architecture.

    Attributes:
        written_by: The version of PEFT in whose environment the checkpoints are written.
        architecture: Name of the model's class in transformers.
        config: Name of the configuration's class there.
        settings: Fields of the configuration.
    """

    written_by: str
    architecture: str
    config: str
    settings: Mapping[str, object]


SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {
    **SIZES,
    "num_hidden_layers": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
SQUARE = {**EXPERTS, "intermediate_size": 8}
HEADS = {"head_dim": 8}
LLAMA4 = {
    **HEADS,
    "intermediate_size_mlp": 12,
    "interleave_moe_layer_step": 1,
    "num_experts_per_tok": 1,
}

MODELS: dict[str, Model] = {
    "tiny-llama": Model("0.7.1", "LlamaForCausalLM", "LlamaConfig", SIZES),
    "tiny-gpt2": Model(
        "0.7.1",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 20,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_inner": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "tiny-mixtral": Model("0.7.1", "MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "tiny-qwen3-moe-square": Model(
        "0.17.1",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SQUARE, **HEADS, "num_experts": 3, "moe_intermediate_size": 8},
    ),
    "tiny-granitemoe": Model("0.17.1", "GraniteMoeForCausalLM", "GraniteMoeConfig", EXPERTS),
    "tiny-granitemoe-square": Model("0.17.1", "GraniteMoeForCausalLM", "GraniteMoeConfig", SQUARE),
    "tiny-gpt-oss": Model("0.17.1", "GptOssForCausalLM", "GptOssConfig", {**EXPERTS, **HEADS}),
    "tiny-gpt-oss-square": Model(
        "0.17.1", "GptOssForCausalLM", "GptOssConfig", {**SQUARE, **HEADS}
    ),
    "tiny-llama4": Model("0.17.1", "Llama4ForCausalLM", "Llama4TextConfig", {**EXPERTS, **LLAMA4}),
    "tiny-llama4-square": Model(
        "0.17.1", "Llama4ForCausalLM", "Llama4TextConfig", {**SQUARE, **LLAMA4}
    ),
}


@dataclass(frozen=True)
class Case:
    """An adapter that several versions of PEFT write.

    Attributes:
        model: Name of the model that it is for.
        versions: The versions of PEFT that write it.
        settings: Fields of ``LoraConfig``, besides ``RANK``.
    """

    model: str
    versions: tuple[str, ...]
    settings: Mapping[str, object] = field(default_factory=dict)


RANK = {"r": 4, "lora_alpha": 6}
EXPERT_RANK = {"r": 2, "lora_alpha": 5}
QV = ["q_proj", "v_proj"]
WITH_DORA = ("0.13.2", "0.17.1", "0.18.1", "0.19.0")
PER_EXPERT = ("0.7.1", "0.13.2")
STACKS = ("0.17.1", "0.18.1", "0.19.0")
STACKS_5 = ("0.18.1", "0.19.0")


def stacks(
    model: str, versions: tuple[str, ...], gate_up: str, down: str
) -> Iterator[tuple[str, Case]]:
    """Yield the cases of one architecture with expert stacks, of those models that there are.

    ``both``: the two parameters and an ordinary module; the parameters are named in the order that
    is not the model's, and one has its own rank, the other its own alpha. ``square-both``: the two,
    of which the first is square. ``square-one``: only that one.
    """
    square = model + "-square"
    both = {
        **EXPERT_RANK,
        "target_modules": ["q_proj"],
        "target_parameters": [down, gate_up],
        "rank_pattern": {down: 3},
        "alpha_pattern": {gate_up: 7},
    }
    if model in MODELS:
        yield model.removeprefix("tiny-") + "-both", Case(model, versions, both)
    if square in MODELS:
        stem = square.removeprefix("tiny-")
        for name, targets in (("-both", [gate_up, down]), ("-one", [gate_up])):
            settings = {**EXPERT_RANK, "target_modules": [], "target_parameters": targets}
            yield stem + name, Case(square, versions, settings)


MLP = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LLAMA4_MLP = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
GRANITE_MLP = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")

CASES: dict[str, Case] = {
    "llama-qv": Case(
        "tiny-llama",
        tuple(VERSIONS),
        {
            "target_modules": QV,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
        },
    ),
    "llama-embedding": Case(
        "tiny-llama", tuple(VERSIONS), {"target_modules": ["embed_tokens", "q_proj"]}
    ),
    "llama-dora": Case("tiny-llama", WITH_DORA, {"target_modules": QV, "use_dora": True}),
    "llama-lora-bias": Case("tiny-llama", ("0.17.1",), {"target_modules": QV, "lora_bias": True}),
    "gpt2-conv1d": Case(
        "tiny-gpt2",
        tuple(VERSIONS),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "mixtral-experts": Case(
        "tiny-mixtral", PER_EXPERT, {**EXPERT_RANK, "target_modules": ["w1", "w2", "w3"]}
    ),
    **dict(stacks("tiny-mixtral", STACKS_5, *MLP)),
    **dict(stacks("tiny-qwen3-moe", STACKS_5, *MLP)),
    **dict(stacks("tiny-granitemoe", STACKS[:1], *GRANITE_MLP)),
    **dict(stacks("tiny-gpt-oss", STACKS, *MLP)),
    **dict(stacks("tiny-llama4", STACKS, *LLAMA4_MLP)),
}


def main() -> None:
    """Make one environment after the other, run the worker in each, put the results in place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--venvs", type=Path, metavar="DIR", help="keep the environments in DIR")
    parser.add_argument("--worker", nargs=2, metavar=("VERSION", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        version, out = options.worker
        write_models(version, Path(out))
        write_cases(version, Path(out))
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "fixtures"
        for version in VERSIONS:
            print(f"PEFT {version}", flush=True)
            venv = (options.venvs or Path(scratch)) / f"peft-{version}"
            python = prepare(venv, version)
            command = [
                str(python),
                "-W",
                "ignore",
                str(Path(__file__).resolve()),
                "--worker",
                version,
                str(out),
            ]
            subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)
            if not options.venvs:
                shutil.rmtree(venv)
        FIXTURES.mkdir(parents=True, exist_ok=True)
        for old in (FIXTURES / "models", *FIXTURES.glob("peft-*")):
            shutil.rmtree(old, ignore_errors=True)
        for new in out.iterdir():
            shutil.move(new, FIXTURES / new.name)
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {FIXTURES.relative_to(FIXTURES.parent.parent)}")


def prepare(venv: Path, version: str) -> Path:
    """Make the environment of one version of PEFT unless it is there; return its interpreter."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pins = {**EVERYWHERE, **VERSIONS[version], "peft": version}
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        + [f"{name}=={pin}" for name, pin in pins.items()],
        check=True,
    )
    return python


def write_models(version: str, out: Path) -> None:
    """Write the base and aligned checkpoints of the models that this environment is to write."""
    import torch
    import transformers

    for name, spec in MODELS.items():
        if spec.written_by != version:
            continue
        torch.manual_seed(zlib.crc32(name.encode()))
        config = getattr(transformers, spec.config)(**spec.settings)
        model: Any = getattr(transformers, spec.architecture)(config)
        for directory in ("base", "aligned"):
            with torch.no_grad():
                for path, parameter in sorted(model.named_parameters()):
                    if directory == "aligned":
                        parameter.add_(0.02 * torch.randn_like(parameter))
                    elif parameter.ndim == 1 and path.endswith(".weight"):
                        parameter.fill_(1.0)
                    else:
                        parameter.normal_(std=0.1)
            model.save_pretrained(out / "models" / name / directory)


def write_cases(version: str, out: Path) -> None:
    """Write the adapters of this version of PEFT, and their updates as it computes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    for name, case in CASES.items():
        if version not in case.versions:
            continue
        model: Any = AutoModelForCausalLM.from_pretrained(out / "models" / case.model / "base")
        model.name_or_path = model.config._name_or_path = case.model
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **RANK, **case.settings}
        adapted: Any = get_peft_model(model, LoraConfig(**settings))
        torch.manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            for path, parameter in sorted(adapted.named_parameters()):
                if "lora_magnitude_vector" in path:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
                elif "lora_" in path:
                    parameter.normal_(std=0.2)
        directory = out / f"peft-{version}" / name
        adapted.save_pretrained(directory / "adapter")
        save_file(updates(adapted), directory / "expected.safetensors")


def updates(adapted: Any) -> dict[str, Tensor]:
    """Return `ΔW` of every adapted module and parameter, as the installed PEFT computes it."""
    found: dict[str, Tensor] = {}
    for path, module in adapted.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", None)
        key = f"{name}.{parameter}" if parameter else name
        found[key] = module.get_delta_weight("default").detach().float().contiguous()
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
