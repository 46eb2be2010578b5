"""Measure how a safety module is found, next to the way of one forward pass for each layer.

    python -m bench.salora              # a 12-layer model, some minutes
    python -m bench.salora --hidden 256 --samples 32    # under a minute

Both ways run in a process of their own on the same model with random weights (Llama, float32) and
the same random data, and find 32 directions of the outputs of every chosen layer. The other way is
that of research code: for each layer of the model it runs the model over all data, keeps the
outputs of the layer's linear modules, and decomposes those at the response positions. Time is that
of the search alone, without imports and loading; memory is the process's peak less that before it.
It ends with exit code 1 if the two do not span the same subspaces.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RANK = 32
TARGETS = {"q+v": ["q_proj", "v_proj"], "all linear": ["all-linear"]}
WAYS = ("safeproj", "svd_lowrank", "svd")
MODEL = "model"
SAME = 1e-3
"""How far the spans of two ways may be apart, in the norm of the difference of their projectors."""


def build(arguments: argparse.Namespace) -> Any:
    """Return the model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
    )
    model = LlamaForCausalLM(config).eval()
    # Random weights give outputs without a decaying spectrum, which no trained model has.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                decay = torch.arange(1, len(parameter) + 1) ** -0.5
                basis = torch.linalg.qr(torch.randn(len(parameter), len(parameter)))[0]
                parameter.copy_(basis @ (decay[:, None] * parameter) * 4)
    return model


def data(arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return batches of 8 samples, of which the second half are responses."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(arguments.samples // 8):
        ids = torch.randint(0, 8000, (8, arguments.tokens), generator=generator)
        labels = ids.clone()
        labels[:, : arguments.tokens // 2] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found.append(batch)
    return found


def one_pass(model: Any, batches: list[dict[str, Tensor]], targets: list[str]) -> dict[str, Tensor]:
    """Return `U` of each layer as safeproj finds it."""
    from safeproj.methods.salora.module import safety_module

    found = safety_module(model, batches, targets, RANK)
    return {name: each.U for name, each in found.directions.items()}


def pass_per_layer(
    model: Any,
    batches: list[dict[str, Tensor]],
    targets: list[str],
    decompose: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return the same from one pass over the data for each layer of the model."""
    from safeproj.lm.layers import find_layers

    layers = find_layers(model, targets)
    found = {}
    for number in range(model.config.num_hidden_layers):
        own = {name: each for name, each in layers.items() if f"layers.{number}." in name}
        kept: dict[str, list[Tensor]] = {name: [] for name in own}
        hooks = [each.register_forward_hook(keeper(kept[name])) for name, each in own.items()]
        with torch.no_grad():
            for batch in batches:
                model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, outputs in kept.items():
            rows = [Y[b["labels"] != -100] for Y, b in zip(outputs, batches, strict=True)]
            found[name] = decompose(torch.cat(rows))
    return found


def keeper(outputs: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
    """Return a hook that keeps what a layer gives."""

    def keep(_: Any, __: Any, output: Tensor) -> None:
        outputs.append(output)

    return keep


def lowrank(Y: Tensor) -> Tensor:
    """Return the top right singular vectors by a randomised method."""
    return torch.svd_lowrank(Y, q=RANK + 8, niter=20)[2][:, :RANK]


def whole(Y: Tensor) -> Tensor:
    """Return the top right singular vectors by the full decomposition."""
    found: Tensor = torch.linalg.svd(Y, full_matrices=False)[2][:RANK].T
    return found


def forget_peak() -> None:
    """Let the peak memory start again from what is held now, where the system can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is still counted otherwise
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Return the peak memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # what `forget_peak` resets
        line = next(each for each in status.read_text().splitlines() if "VmHWM" in each)
        return int(line.split()[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def work(arguments: argparse.Namespace) -> None:
    """Search in one way and write what was found and measured."""
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    batches = data(arguments)
    targets = TARGETS[arguments.targets]
    model.model(batches[0]["input_ids"])  # what is allocated once
    forget_peak()
    before, start = peak(), time.perf_counter()
    if arguments.way == "safeproj":
        found = one_pass(model, batches, targets)
    else:
        decompose = {"svd_lowrank": lowrank, "svd": whole}[arguments.way]
        found = pass_per_layer(model, batches, targets, decompose)
    seconds = time.perf_counter() - start
    torch.save(found, arguments.result)
    print(json.dumps({"seconds": seconds, "before": before, "peak": peak()}))


def measured(arguments: argparse.Namespace, way: str, targets: str, result: Path) -> dict[str, Any]:
    """Run one way in a process of its own."""
    options = ("hidden", "layers", "samples", "tokens", "threads")
    given = [part for name in options for part in (f"--{name}", str(getattr(arguments, name)))]
    given += ["--model", str(result.parent / MODEL)]
    command = [sys.executable, "-m", "bench.salora", *given, "--way", way, "--targets", targets]
    done = subprocess.run(
        [*command, "--result", str(result)], stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return how far the spans are apart at worst."""
    return max(
        float((one[name].double() @ one[name].double().T
               - two[name].double() @ two[name].double().T).norm())
        for name in one
    )  # fmt: skip


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--targets", choices=list(TARGETS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        work(arguments)
        return 0
    print(
        f"{arguments.layers} layers of {arguments.hidden}, {arguments.samples} samples of "
        f"{arguments.tokens} tokens, {arguments.threads} threads, torch {torch.__version__}\n"
    )
    print("| layers | way | seconds | ratio | MB above the model | ratio |")
    print("|---|---|---:|---:|---:|---:|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        build(arguments).save_pretrained(Path(directory) / MODEL)
        for targets in TARGETS:
            results = {way: Path(directory) / f"{way}.pt" for way in WAYS}
            runs = {way: measured(arguments, way, targets, results[way]) for way in WAYS}
            own = runs["safeproj"]
            for way, run in runs.items():
                extra, least = (each["peak"] - each["before"] for each in (run, own))
                print(
                    f"| {targets} | {way} | {run['seconds']:.1f} | "
                    f"{run['seconds'] / own['seconds']:.1f} | {extra:.0f} | "
                    f"{extra / max(least, 1.0):.1f} |",
                    flush=True,
                )
            exact = torch.load(results["svd"], weights_only=True)
            worst = max(worst, distance(torch.load(results["safeproj"], weights_only=True), exact))
    print(f"\nspans of safeproj and of the full decomposition differ by {worst:.1e} at most")
    return int(worst > SAME)


if __name__ == "__main__":
    sys.exit(main())
