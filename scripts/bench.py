"""Measure safeproj on a synthetic pair of checkpoints, next to plain reading and a dense baseline.

    python scripts/bench.py                   # a 1.1B pair: 4.4 GB of disk, some minutes
    python scripts/bench.py --size small      # well under a minute
    python scripts/bench.py --clean           # delete the pair of that size

The pair is a Llama-shaped base and aligned checkpoint in bfloat16 with random weights, made once
and reused, with two LoRA adapters of rank 16: on q and v, and on all linear layers. Everything is
measured with the files in the page cache, every program as a whole process:

* `safeproj inspect` and `safeproj patch --all`, and an interpreter that only imports torch;
* reading the weights that the adapter needs, by offset into one small buffer, and nothing else;
* a dense baseline: load both models with transformers in float32, form every C (m, m) and every
  update (m, n), project B, save the adapter. It holds one C at a time and handles the adapter as
  plain tensors, both of which favour it over the implementations it stands for.

Targets are printed next to the figures and never enforced. What is enforced (exit code 1) is that
safeproj and the dense baseline agree on every cosine and on every projected B.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# This process must stay small and never import torch: the kernel counts the memory of the process
# that starts a child towards the child's peak (until exec replaces it). Heavy work is done in
# workers: this file again, started as `bench.py --worker NAME JSON`.

RANK = 16
ALPHA = 32
SEED = 20240516
CHUNK = 1 << 20  # bytes per read of the plain reader
TOLERANCE = 1e-3  # on cosines (absolute) and on projected B (relative, Frobenius norm)
RECIPE = 1  # raise it whenever the generated files change, so that old ones are not reused
MARKER = "bench.json"

TARGET_READ_RATIO = 6.0
TARGET_DENSE_RATIO = 8.0
TARGET_PEAK_MB = 1000.0
TARGET_HELP_S = 0.3

PREFIX = "base_model.model."
LORA_B = ".lora_B.weight"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, tuple[str, ...]] = {
    "q+v": ("q_proj", "v_proj"),
    "all linear": ATTENTION + MLP,
}


class BenchError(Exception):
    """Something that stops the benchmark; its text is the message to print."""


@dataclass(frozen=True)
class Size:
    """The shape of the generated models."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    shard_mb: int

    def linear(self, kind: str) -> tuple[int, int]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[kind]

    def modules(self, kinds: Sequence[str]) -> list[tuple[str, tuple[int, int]]]:
        """Name and shape of every linear module of the given kinds, in model order."""
        return [
            (f"model.layers.{i}.{'self_attn' if k in ATTENTION else 'mlp'}.{k}", self.linear(k))
            for i in range(self.layers)
            for k in ATTENTION + MLP
            if k in kinds
        ]

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of a checkpoint, in model order."""
        out: list[tuple[str, tuple[int, ...]]] = []
        out.append(("model.embed_tokens.weight", (self.vocab, self.hidden)))
        per_layer = len(ATTENTION + MLP)
        linear = self.modules(ATTENTION + MLP)
        for i in range(self.layers):
            for name, shape in linear[i * per_layer : (i + 1) * per_layer]:
                out.append((f"{name}.weight", shape))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out.append((f"model.layers.{i}.{norm}.weight", (self.hidden,)))
        out.append(("model.norm.weight", (self.hidden,)))
        out.append(("lm_head.weight", (self.vocab, self.hidden)))
        return out

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    def parameters(self) -> int:
        total = 0
        for _, shape in self.tensors():
            count = 1
            for n in shape:
                count *= n
            total += count
        return total


SIZES = {
    "small": Size(4, 512, 8, 2, 1408, 4000, 8),
    "1.1b": Size(22, 2048, 32, 4, 5632, 32000, 500),
}


def adapter_dir(root: Path, label: str) -> Path:
    """Return the directory of an adapter by its label in ADAPTERS."""
    return root / ("adapter-" + label.replace("+", "").replace(" ", "-"))


# --- making the files (worker) -------------------------------------------------------------------


def make_pair(root: Path, size: Size) -> None:
    """Write both checkpoints, shard by shard. The same size always gives the same bytes."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from safetensors.torch import save_file

    tensors = size.tensors()
    shards: list[list[int]] = [[]]
    filled = 0
    for index, (_, shape) in enumerate(tensors):
        n_bytes = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        if shards[-1] and filled + n_bytes > size.shard_mb * 1_000_000:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += n_bytes

    def pair(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, shape = tensors[index]
        if len(shape) == 1:
            ones = torch.ones(shape, dtype=torch.bfloat16)
            return ones, ones.clone()
        generator = torch.Generator().manual_seed(SEED + index)
        weight = torch.randn(shape, generator=generator).mul_(0.02)
        base = weight.to(torch.bfloat16)
        # Rows of the difference get unequal sizes, more so for some tensors than for others, so
        # that cosines differ from module to module and a mix-up of modules would show.
        spread = 2.0 * ((index * 7) % 16) / 15
        rows = torch.exp(torch.linspace(-spread, spread, shape[0]))
        rows *= 0.001 / rows.square().mean().sqrt()
        change = torch.randn(shape, generator=generator).mul_(rows[:, None])
        return base, base.float().add_(change).to(torch.bfloat16)

    folders = (root / "base", root / "aligned")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(size.config(), indent=2) + "\n")
    weight_map: dict[str, str] = {}
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        for number, members in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            made = list(pool.map(pair, members))
            for side, folder in enumerate(folders):
                named = {tensors[i][0]: made[j][side] for j, i in enumerate(members)}
                save_file(named, folder / file, metadata={"format": "pt"})
            weight_map.update((tensors[i][0], file) for i in members)
    index_json = {
        "metadata": {"total_size": 2 * size.parameters()},
        "weight_map": dict(sorted(weight_map.items())),
    }
    for folder in folders:
        text = json.dumps(index_json, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)


def make_adapter(folder: Path, size: Size, kinds: Sequence[str]) -> None:
    """Write a LoRA adapter in PEFT's format, A and B random, in float32 as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED - len(kinds))
    state: dict[str, torch.Tensor] = {}
    for name, (m, n) in size.modules(kinds):
        a = torch.randn((RANK, n), generator=generator).div_(n**0.5)
        b = torch.randn((m, RANK), generator=generator).mul_(0.01)
        state[f"{PREFIX}{name}.lora_A.weight"] = a
        state[f"{PREFIX}{name}.lora_B.weight"] = b
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(kinds),
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def worker_make(root: str, size: str) -> None:
    """Write the pair and every adapter."""
    make_pair(Path(root), SIZES[size])
    for label, kinds in ADAPTERS.items():
        make_adapter(adapter_dir(Path(root), label), SIZES[size], kinds)


# --- the dense baseline and the comparison (workers) ---------------------------------------------


def load_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return an adapter's tensors and its file's metadata."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def worker_dense(base: str, aligned: str, adapter: str, out: str, result: str) -> None:
    """Safe LoRA with everything dense: both models loaded, C (m, m) and both updates formed."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, aligned)
    ]
    w_base, w_aligned = (dict(model.named_parameters()) for model in models)
    state, metadata = load_adapter(Path(adapter))
    loaded = time.perf_counter()
    cosines: dict[str, float] = {}

    def norm(x: torch.Tensor) -> float:
        # In float32, CPU norms of ten million elements are off by up to 1e-3: too coarse to
        # compare with.
        return float(torch.linalg.vector_norm(x, dtype=torch.float64))

    with torch.no_grad():
        for key in [key for key in state if key.endswith(LORA_B)]:
            name = key[len(PREFIX) : -len(LORA_B)]
            a = state[key.replace("lora_B", "lora_A")].float()
            b = state[key].float()
            v = w_aligned[f"{name}.weight"] - w_base[f"{name}.weight"]
            c = torch.mm(v, v.t()) / norm(v)
            projected = torch.mm(c, b)
            update = torch.mm(b, a)
            safe_update = torch.mm(projected, a)
            dot = float(torch.sum(safe_update * update))
            cosines[name] = dot / (norm(safe_update) * norm(update))
            state[key] = projected.to(state[key].dtype)
    computed = time.perf_counter()
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(out) / "adapter_model.safetensors", metadata=metadata)
    shutil.copyfile(Path(adapter) / "adapter_config.json", Path(out) / "adapter_config.json")
    report = {"load_s": loaded - started, "compute_s": computed - loaded, "cosines": cosines}
    Path(result).write_text(json.dumps(report))


def worker_compare(ours: str, dense: str, result: str) -> None:
    """Largest relative difference of two adapters' tensors."""
    import torch

    left, _ = load_adapter(Path(ours))
    right, _ = load_adapter(Path(dense))
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise BenchError(f"the two adapters differ in {len(odd)} tensor names, first {odd[0]}")
    worst = 0.0
    for key, expected in right.items():
        if left[key].shape != expected.shape:
            raise BenchError(f"{key}: shape {tuple(left[key].shape)}, not {tuple(expected.shape)}")
        gap = torch.linalg.vector_norm(left[key].double() - expected.double())
        gap = gap / torch.linalg.vector_norm(expected.double())
        worst = max(worst, float(gap)) if not gap.isnan() else float("inf")
    Path(result).write_text(json.dumps({"max_relative_difference": worst}))


WORKERS: dict[str, Callable[..., None]] = {
    "make": worker_make,
    "dense": worker_dense,
    "compare": worker_compare,
}


# --- running and measuring whole processes -------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished process."""

    wall_s: float
    peak_bytes: int


def run_process(command: Sequence[str], scratch: Path, env: dict[str, str] | None = None) -> Run:
    """Run a command to its end; its output is shown only if it fails."""
    with tempfile.TemporaryFile(dir=scratch) as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            output = log.read().decode("utf-8", "replace").strip()
            shown = " ".join(command)
            raise BenchError(f"exit code {process.returncode} from: {shown}\n{output[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_maxrss * unit)


def run_worker(name: str, scratch: Path, **arguments: str) -> Run:
    """Run one of WORKERS in a process of its own."""
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
    return run_process([*command, json.dumps(arguments)], scratch, env)


def find_command() -> str:
    """Return the path of the installed safeproj, first beside this interpreter, then on PATH."""
    name = "safeproj"
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise BenchError(
            f"the command `{name}` is neither beside this interpreter ({beside}) nor on PATH: "
            "install the package first"
        )
    return found


# --- plain reading -------------------------------------------------------------------------------

Range = tuple[Path, int, int]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header and the offset at which its data starts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


def needed_ranges(checkpoint: Path, names: Sequence[str]) -> list[Range]:
    """Return where the named tensors lie in a sharded checkpoint."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    headers: dict[str, tuple[dict[str, Any], int]] = {}
    ranges: list[Range] = []
    for name in names:
        file = weight_map[name]
        if file not in headers:
            headers[file] = read_header(checkpoint / file)
        header, start = headers[file]
        begin, end = header[name]["data_offsets"]
        ranges.append((checkpoint / file, start + begin, end - begin))
    return sorted(ranges)


def read_ranges(ranges: Sequence[Range], threads: int) -> float:
    """Seconds to read the ranges, spread over threads, each with one reused buffer."""
    shares: list[list[Range]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for item in sorted(ranges, key=lambda item: -item[2]):
        lightest = loads.index(min(loads))
        shares[lightest].append(item)
        loads[lightest] += item[2]

    short: list[Path] = []

    def read(share: list[Range]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for path, offset, length in sorted(share):
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while length:
                    got = file.readinto(buffer[: min(CHUNK, length)])
                    if not got:
                        short.append(path)
                        return
                    length -= got

    started = time.perf_counter()
    if threads == 1:
        read(shares[0])
    else:
        workers = [threading.Thread(target=read, args=(share,)) for share in shares]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    wall = time.perf_counter() - started
    if short:
        raise BenchError(f"{short[0]} ends too early: delete it with --clean")
    return wall


def warm(root: Path) -> None:
    """Read every generated file once, so that all that follows finds it in the page cache."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    read_ranges([(path, 0, path.stat().st_size) for path in files], 2)


# --- the work directory --------------------------------------------------------------------------


def file_sizes(root: Path) -> dict[str, int]:
    """Return the size of every generated file."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size
        for top in ("base", "aligned", *(adapter_dir(root, label).name for label in ADAPTERS))
        for path in sorted((root / top).rglob("*"))
        if path.is_file()
    }


def prepare(root: Path, size_name: str) -> bool:
    """Make the pair and the adapters unless complete and matching; True when they were made."""
    size = SIZES[size_name]
    recipe = {
        "recipe": RECIPE,
        "seed": SEED,
        "rank": RANK,
        "alpha": ALPHA,
        "adapters": {label: list(kinds) for label, kinds in ADAPTERS.items()},
        "size": asdict(size),
        "torch": importlib.metadata.version("torch"),
    }
    marker = root / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found["made_from"] == recipe and found["files"] == file_sizes(root):
            return False
        clean(root)
    if root.exists() and any(root.iterdir()):
        raise BenchError(f"{root} holds files this script did not make: choose another --dir")
    root.mkdir(parents=True, exist_ok=True)
    # Marked as ours from the start, so that an interrupted run is cleaned up by the next.
    marker.write_text(json.dumps({"made_from": None, "files": {}}))
    needed = int(4.2 * size.parameters())
    free = shutil.disk_usage(root).free
    if free < needed:
        raise BenchError(f"{root}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    run_worker("make", root, root=str(root), size=size_name)
    marker.write_text(json.dumps({"made_from": recipe, "files": file_sizes(root)}, indent=2))
    return True


def clean(root: Path) -> bool:
    """Delete the generated files, if this script made them; True when it did."""
    if not (root / MARKER).is_file():
        return False
    shutil.rmtree(root)
    return True


# --- the benchmark -------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print progress or an error to stderr."""
    print(text, file=sys.stderr, flush=True)


def cosines_of(report: Path, names: Sequence[str]) -> dict[str, float]:
    """Return the cosines of safeproj's JSON report, which must be of exactly these modules."""
    modules = json.loads(report.read_text())["modules"]
    found = {module["name"]: module["cosine"] for module in modules}
    if sorted(found) != sorted(names):
        odd = sorted(set(found) ^ set(names)) or ["a name that comes twice"]
        raise BenchError(f"safeproj reports {len(modules)} modules, not {len(names)}: see {odd[0]}")
    undefined = [name for name, cosine in found.items() if cosine is None]
    if undefined:
        raise BenchError(f"safeproj reports no cosine for {undefined[0]}")
    return found


def measure(root: Path, label: str, command: str, runs: int) -> dict[str, Any]:
    """Everything but the dense baseline, for one adapter."""
    base, aligned, adapter = root / "base", root / "aligned", adapter_dir(root, label)
    report = root / f"report-{adapter.name}.json"
    header, _ = read_header(adapter / "adapter_model.safetensors")
    names = [key[len(PREFIX) : -len(LORA_B)] for key in header if key.endswith(LORA_B)]
    weights = [f"{name}.weight" for name in names]
    ranges = needed_ranges(base, weights) + needed_ranges(aligned, weights)

    sources = ["--base", str(base), "--aligned", str(aligned), "--adapter", str(adapter)]
    output = ["--format", "json", "--output", str(report)]
    inspect = [command, "inspect", *sources, *output]
    out = root / f"patched-{adapter.name}"
    patch = [command, "patch", *sources, "--all", "--out", str(out), "--overwrite"]
    only_torch = [sys.executable, "-c", "import torch"]

    reads: dict[int, list[float]] = {1: [], 2: []}
    done: dict[str, list[Run]] = {"import": [], "inspect": [], "patch": []}
    read_ranges(ranges, 2)
    for _ in range(runs):  # interleaved, so that a slow spell of the machine hits all alike
        for threads, walls in reads.items():
            walls.append(read_ranges(ranges, threads))
        done["import"].append(run_process(only_torch, root))
        done["inspect"].append(run_process(inspect, root))
        done["patch"].append(run_process(patch, root))

    read_s, threads = min((statistics.median(walls), n) for n, walls in reads.items())
    import_s = statistics.median(run.wall_s for run in done["import"])
    import_peak = statistics.median(run.peak_bytes for run in done["import"])
    result: dict[str, Any] = {
        "adapter": label,
        "modules": len(names),
        "needed_bytes": sum(length for _, _, length in ranges),
        "read_s": read_s,
        "read_threads": threads,
        "read_runs_s": {str(threads): walls for threads, walls in reads.items()},
        "import_torch_s": import_s,
        "import_torch_peak_mb": import_peak / 1e6,
        "cosines": cosines_of(report, names),
    }
    for name in ("inspect", "patch"):
        wall = statistics.median(run.wall_s for run in done[name])
        peak = max(run.peak_bytes for run in done[name])
        result[name] = {
            "wall_s": wall,
            "after_import_s": wall - import_s,
            "after_import_over_read": (wall - import_s) / read_s,
            "peak_mb": peak / 1e6,
            "peak_above_import_mb": (peak - import_peak) / 1e6,
            "runs_s": [run.wall_s for run in done[name]],
        }
    return result


def measure_dense(root: Path, result: dict[str, Any]) -> None:
    """Run the dense baseline once for one adapter and compare its results with safeproj's."""
    adapter = adapter_dir(root, result["adapter"])
    out = root / f"dense-{adapter.name}"
    report = root / f"dense-{adapter.name}.json"
    run = run_worker(
        "dense",
        root,
        base=str(root / "base"),
        aligned=str(root / "aligned"),
        adapter=str(adapter),
        out=str(out),
        result=str(report),
    )
    dense = json.loads(report.read_text())
    ours = result["cosines"]
    gaps = [abs(ours[name] - cosine) for name, cosine in dense["cosines"].items()]
    gap = float("inf") if any(math.isnan(value) for value in gaps) else max(gaps)
    compared = root / f"compare-{adapter.name}.json"
    patched = root / f"patched-{adapter.name}"
    run_worker("compare", root, ours=str(patched), dense=str(out), result=str(compared))
    result["dense"] = {
        "wall_s": run.wall_s,
        "load_s": dense["load_s"],
        "compute_s": dense["compute_s"],
        "peak_mb": run.peak_bytes / 1e6,
        "over_inspect": run.wall_s / result["inspect"]["wall_s"],
        "over_patch": run.wall_s / result["patch"]["wall_s"],
        "max_cosine_difference": gap,
        "max_relative_difference": json.loads(compared.read_text())["max_relative_difference"],
    }


def table(results: Sequence[dict[str, Any]], help_s: float) -> str:
    """The markdown table: one row per figure, its target, one column per adapter."""
    rows: list[tuple[str, ...]] = []

    def row(
        name: str,
        get: Callable[[dict[str, Any]], float],
        form: str,
        target: str = "",
        met: Callable[[float], bool] | None = None,
    ) -> None:
        cells = []
        for result in results:
            value = get(result)
            verdict = "" if met is None else " (met)" if met(value) else " (missed)"
            cells.append(format(value, form) + verdict)
        rows.append((name, target, *cells))

    row("modules", lambda r: r["modules"], "d")
    row("needed weights, GB", lambda r: r["needed_bytes"] / 1e9, ".3f")
    row("plain read, s", lambda r: r["read_s"], ".3f")
    row("plain read, GB/s", lambda r: r["needed_bytes"] / 1e9 / r["read_s"], ".1f")
    row("threads of the fastest read", lambda r: r["read_threads"], "d")
    row("plain read with one thread, s", lambda r: statistics.median(r["read_runs_s"]["1"]), ".3f")
    row("`import torch`, s", lambda r: r["import_torch_s"], ".2f")
    row("`import torch` peak, MB", lambda r: r["import_torch_peak_mb"], ".0f")
    for name in ("inspect", "patch"):

        def field(key: str, name: str = name) -> Callable[[dict[str, Any]], float]:
            return lambda r: float(r[name][key])

        row(f"`{name}`, s", field("wall_s"), ".2f")
        row(f"`{name}` after import, s", field("after_import_s"), ".2f")
        row(
            f"`{name}` after import / read",
            field("after_import_over_read"),
            ".1f",
            f"≤ {TARGET_READ_RATIO:g}",
            lambda value: value <= TARGET_READ_RATIO,
        )
        row(
            f"`{name}` after import / read with one thread",
            lambda r, name=name: (  # type: ignore[misc]
                r[name]["after_import_s"] / statistics.median(r["read_runs_s"]["1"])
            ),
            ".1f",
        )
        row(
            f"`{name}` peak above import, MB",
            field("peak_above_import_mb"),
            ".0f",
            f"≤ {TARGET_PEAK_MB:g}",
            lambda value: value <= TARGET_PEAK_MB,
        )
    if all("dense" in result for result in results):
        row("dense baseline, s", lambda r: r["dense"]["wall_s"], ".1f")
        row("dense baseline peak, MB", lambda r: r["dense"]["peak_mb"], ".0f")
        row(
            "dense / `patch`",
            lambda r: r["dense"]["over_patch"],
            ".1f",
            f"≥ {TARGET_DENSE_RATIO:g}",
            lambda value: value >= TARGET_DENSE_RATIO,
        )
        row("dense / `inspect`", lambda r: r["dense"]["over_inspect"], ".1f")
        for text, key in (
            ("largest difference of a cosine", "max_cosine_difference"),
            ("largest relative difference of a B", "max_relative_difference"),
        ):
            row(
                text,
                lambda r, key=key: r["dense"][key],  # type: ignore[misc]
                ".1e",
                f"≤ {TOLERANCE:g}",
                lambda value: value <= TOLERANCE,
            )
    row(
        "`safeproj --help`, s",
        lambda _: help_s,
        ".3f",
        f"< {TARGET_HELP_S:g}",
        lambda value: value < TARGET_HELP_S,
    )
    head = ("figure", "target", *(result["adapter"] for result in results))
    lines = [head, tuple("---" if i < 2 else "---:" for i in range(len(head))), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(size_name: str) -> dict[str, Any]:
    """Describe the pair, the machine and the versions."""
    size = SIZES[size_name]
    affinity = getattr(os, "sched_getaffinity", None)
    versions = {}
    for package in ("safeproj", "torch", "transformers", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "size": {"name": size_name, "parameters": size.parameters(), **asdict(size)},
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def heading(env: dict[str, Any], runs: int) -> str:
    """Return the lines printed above the table."""
    size = env["size"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return (
        f"Pair: {size['parameters'] / 1e9:.2f} B parameters in bfloat16, {size['layers']} layers, "
        f"hidden {size['hidden']}, intermediate {size['intermediate']}; LoRA rank {RANK}.\n"
        f"Machine: {env['cores']} cores, {env['machine']}, {env['system']}. "
        f"Python {env['python']}, {versions}.\n"
        f"Whole processes, files in the page cache. Times: median of {runs} "
        "(dense: one run). Peaks: largest resident set, mapped file pages included.\n"
        "The targets are set for `--size 1.1b`."
    )


def bench(args: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit code."""
    root = Path(args.dir).expanduser().resolve() / f"pair-{args.size}"
    if args.clean:
        say(f"deleted {root}" if clean(root) else f"nothing to delete at {root}")
        return 0
    command = find_command()
    started = time.perf_counter()
    if prepare(root, args.size):
        say(f"made {root} in {time.perf_counter() - started:.1f} s")
    env = environment(args.size)
    try:
        run_process([sys.executable, "-c", "import torch"], root)
        run_process([command, "--help"], root)
        helps = [run_process([command, "--help"], root).wall_s for _ in range(5)]
        warm(root)
        results = []
        for label in ADAPTERS:
            say(f"{label}: reading, safeproj")
            results.append(measure(root, label, command, args.runs))
        if not args.skip_dense:
            for result in results:
                say(f"{result['adapter']}: dense baseline")
                warm(root)
                measure_dense(root, result)
    finally:
        if not args.keep:
            remove_outputs(root)
    help_s = statistics.median(helps)
    print(f"{heading(env, args.runs)}\n\n{table(results, help_s)}", flush=True)
    if args.json:
        document = {
            "schema": "safeproj.bench/1",
            "environment": env,
            "runs": args.runs,
            "targets": {
                "after_import_over_read": TARGET_READ_RATIO,
                "dense_over_patch": TARGET_DENSE_RATIO,
                "peak_above_import_mb": TARGET_PEAK_MB,
                "help_s": TARGET_HELP_S,
            },
            "help_s": help_s,
            "help_runs_s": helps,
            "results": results,
        }
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")
    wrong = [
        result["adapter"]
        for result in results
        for key in ("max_cosine_difference", "max_relative_difference")
        if "dense" in result and not result["dense"][key] <= TOLERANCE
    ]
    if wrong:
        say(f"error: safeproj and the dense baseline disagree on: {', '.join(sorted(set(wrong)))}")
        return 1
    return 0


def remove_outputs(root: Path) -> None:
    """Delete what the measured programs wrote."""
    for pattern in ("report-*", "patched-*", "dense-*", "compare-*"):
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        description="Measure safeproj next to plain reading and a dense baseline."
    )
    default = Path(tempfile.gettempdir()) / "safeproj-bench"
    parser.add_argument("--dir", default=str(default), help="work directory (%(default)s)")
    parser.add_argument("--size", choices=sorted(SIZES), default="1.1b", help="(%(default)s)")
    parser.add_argument("--runs", type=positive, default=3, help="runs per figure (%(default)s)")
    parser.add_argument("--skip-dense", action="store_true", help="leave the baseline out")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--keep", action="store_true", help="keep reports and projected adapters")
    parser.add_argument("--clean", action="store_true", help="delete the generated pair and stop")
    args = parser.parse_args()
    if not hasattr(os, "wait4"):
        say("error: this script measures peak memory with os.wait4, which this system lacks")
        return 2
    try:
        return bench(args)
    except BenchError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        WORKERS[sys.argv[2]](**json.loads(sys.argv[3]))
        sys.exit(0)
    sys.exit(main())
