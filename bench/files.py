"""The files that `python -m bench` measures with: checkpoints and adapters with random weights.

A Llama-shaped base and aligned checkpoint in bfloat16, made once per size and reused, with LoRA
adapters for them; and pairs in the shape of larger models as sparse files, which are zero but for a
few rows and take next to no disk.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# __main__.py must stay small and imports this: torch is imported only where files are written.

RANK = 16
HIGH_RANK = 256
MANY = 32
ALPHA = 32
SEED = 20240516
RECIPE = 2  # raise it whenever the generated files change, so that old ones are not reused
MARKER = "bench.json"
OUT = "out"  # beside the generated files: what the measured programs write

PREFIX = "base_model.model."
LORA_B = ".lora_B.weight"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
KINDS: dict[str, tuple[str, ...]] = {
    "q+v": ("q_proj", "v_proj"),
    "all linear": ATTENTION + MLP,
}


class BenchError(Exception):
    """Something that stops the benchmark; its text is the message to print."""


@dataclass(frozen=True)
class Size:
    """The shape of the generated models."""

    label: str
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
        return sum(math.prod(shape) for _, shape in self.tensors())


SIZES = {
    "small": Size("small", 4, 512, 8, 2, 1408, 4000, 8),
    "7b-layer": Size("one layer of 7B", 1, 4096, 32, 32, 11008, 1000, 500),
    "1.1b": Size("1.1B", 22, 2048, 32, 4, 5632, 32000, 500),
    "8b": Size("8B", 32, 4096, 32, 8, 14336, 128256, 4000),  # Llama 3.1
}


# Of sparse files: some layers of larger models.
SHAPES = [
    Size("8B", 2, 4096, 32, 8, 14336, 1000, 0),
    Size("70B", 2, 8192, 64, 8, 28672, 1000, 0),
]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter to generate."""

    folder: str
    kinds: tuple[str, ...]
    rank: int
    seed: int

    def n_bytes(self, size: Size) -> int:
        return sum(4 * self.rank * (m + n) for _, (m, n) in size.modules(self.kinds))


def folder_of(label: str) -> str:
    """Return the name of an adapter's directory by its label in KINDS."""
    return "adapter-" + label.replace("+", "").replace(" ", "-")


def many_folders(label: str) -> list[str]:
    """Return the names of the directories of the adapters that are measured together."""
    return [f"{folder_of(label)}-{number:02d}" for number in range(MANY)]


def high_rank_folder() -> str:
    """Return the name of the directory of the adapter of high rank, on all linear layers."""
    return f"{folder_of('all linear')}-r{HIGH_RANK}"


def adapters() -> list[Adapter]:
    """Return every adapter of a pair, no two with the same seed."""
    wanted = [(folder_of(label), kinds, RANK) for label, kinds in KINDS.items()]
    wanted.append((high_rank_folder(), KINDS["all linear"], HIGH_RANK))
    for label, kinds in KINDS.items():
        wanted += [(folder, kinds, RANK) for folder in many_folders(label)]
    return [Adapter(*each, SEED - number) for number, each in enumerate(wanted, start=1)]


# --- the work directory --------------------------------------------------------------------------


def file_sizes(root: Path) -> dict[str, int]:
    """Return the size of every generated file."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size
        for top in ("base", "aligned", *(adapter.folder for adapter in adapters()))
        for path in sorted((root / top).rglob("*"))
        if path.is_file()
    }


def prepare(root: Path, size: Size, make: Callable[[], object]) -> bool:
    """Call `make` for the files unless they are complete and match; True when it was called."""
    recipe = {
        "recipe": RECIPE,
        "alpha": ALPHA,
        "size": asdict(size),
        "adapters": json.loads(json.dumps([asdict(adapter) for adapter in adapters()])),
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
    # Beside the files themselves, ten times an adapter's size for what the programs write.
    sizes = [adapter.n_bytes(size) for adapter in adapters()]
    needed = int(1.02 * (4 * size.parameters() + sum(sizes))) + 10 * sizes[1]
    free = shutil.disk_usage(root).free
    if free < needed:
        raise BenchError(f"{root}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    make()
    marker.write_text(json.dumps({"made_from": recipe, "files": file_sizes(root)}, indent=2))
    return True


def clean(root: Path) -> bool:
    """Delete the generated files, if this script made them; True when it did."""
    if not (root / MARKER).is_file():
        return False
    shutil.rmtree(root)
    return True


# --- making the files (in a process that may import torch) ---------------------------------------


def make_all(root: Path, size: Size) -> None:
    """Write the pair and every adapter."""
    make_pair(root, size)
    for adapter in adapters():
        make_adapter(root, size, adapter)


def make_pair(root: Path, size: Size, device: str = "cpu") -> None:
    """Write both checkpoints, shard by shard. The same size and device give the same bytes."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from safetensors.torch import save_file

    tensors = size.tensors()
    shards: list[list[int]] = [[]]
    filled = 0
    for index, (_, shape) in enumerate(tensors):
        n_bytes = 2 * math.prod(shape)
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
        generator = torch.Generator(device).manual_seed(SEED + index)
        weight = torch.randn(shape, generator=generator, device=device).mul_(0.02)
        base = weight.to(torch.bfloat16)
        # Rows of the difference get unequal sizes, more so for some tensors than for others, so
        # that cosines differ from module to module and a mix-up of modules would show.
        spread = 2.0 * ((index * 7) % 16) / 15
        rows = torch.exp(torch.linspace(-spread, spread, shape[0], device=device))
        rows *= 0.001 / rows.square().mean().sqrt()
        change = torch.randn(shape, generator=generator, device=device).mul_(rows[:, None])
        return base.cpu(), base.float().add_(change).to(torch.bfloat16).cpu()

    folders = (root / "base", root / "aligned")
    for folder in folders:
        write_config(folder, size)
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


def write_config(folder: Path, size: Size) -> None:
    """Write `config.json` into a folder that may have to be created."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2) + "\n")


def make_adapter(root: Path, size: Size, adapter: Adapter) -> None:
    """Write a LoRA adapter in PEFT's format, A and B random, in float32 as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(adapter.seed)
    state: dict[str, torch.Tensor] = {}
    for name, (m, n) in size.modules(adapter.kinds):
        a = torch.randn((adapter.rank, n), generator=generator).div_(n**0.5)
        b = torch.randn((m, adapter.rank), generator=generator).mul_(0.01)
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
        "r": adapter.rank,
        "target_modules": list(adapter.kinds),
        "task_type": "CAUSAL_LM",
    }
    folder = root / adapter.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make_sparse(root: Path, size: Size) -> None:
    """Write base, aligned and an adapter on all linear layers; the checkpoints as sparse files.

    They are zero but for the first, the middle and the last row of the aligned weights, so that no
    difference of two weights vanishes.
    """
    import torch

    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in size.tensors():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    generator = torch.Generator().manual_seed(SEED)
    for side in ("base", "aligned"):
        write_config(root / side, size)
        with (root / side / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + end)
            if side == "base":
                continue
            for name, (m, n) in size.modules(ATTENTION + MLP):
                offset = start + header[f"{name}.weight"]["data_offsets"][0]
                for row in (0, m // 2, m - 1):
                    values = torch.randn(n, generator=generator).to(torch.bfloat16)
                    file.seek(offset + 2 * n * row)
                    file.write(values.view(torch.int16).numpy().tobytes())
    make_adapter(root, size, Adapter("adapter", ATTENTION + MLP, RANK, SEED))
