"""What ranges save: a repository of the shapes of Llama 2 7B behind a slow line, on this machine.

    python -m bench.remote                    # all 32 layers, 4.2 GB of them read: some minutes
    python -m bench.remote --layers 4         # a shorter one of the same shapes
    python -m bench.remote --megabits 100     # a slower line, for a machine that is busy

The loopback Hub of the tests serves two repositories, each in two shards of zeros but for the first
values of each weight, so that they take no disk. It answers after 50 ms, and sends 125 MB/s in all
(1 Gbit/s) unless told otherwise, whatever the number of connections. Each line is `safeproj
inspect` as a process of its own with an adapter on q and v:

* ranges: `--download never`, which has to receive at most 1.02 times the bytes that are needed, and
  at most a sixth of the repositories;
* kept: `--keep` for the second time;
* whole files: `--download always`, with an empty cache.

The ideal is the bytes that are needed at that speed, and the time of the same command on the same
files by their paths, if that is longer. The targets are printed and not enforced.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from safeproj.storage.tensorfile import PREFIX
from tests.hub_server import Hub, running

HIDDEN, WIDE, VOCABULARY = 4096, 11008, 32000
ADAPTED = ("q_proj.weight", "v_proj.weight")
RANK = 16
ROUND_TRIP = 0.05
REPOSITORIES = ("org/base", "org/aligned")


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of the model, in the order of its files."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (HIDDEN,)
        yield f"{name}.mlp.down_proj.weight", (HIDDEN, WIDE)
        yield f"{name}.mlp.gate_proj.weight", (WIDE, HIDDEN)
        yield f"{name}.mlp.up_proj.weight", (WIDE, HIDDEN)
        yield f"{name}.post_attention_layernorm.weight", (HIDDEN,)
        for each in "koqv":
            yield f"{name}.self_attn.{each}_proj.weight", (HIDDEN, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_model(root: Path, layers: int, seed: int) -> int:
    """Write two sparse shards with their index, and return the bytes of q and v."""
    root.mkdir(parents=True)
    generator = numpy.random.default_rng(seed)
    tensors = list(shapes(layers))
    half, location, needed = len(tensors) * 3 // 4, {}, 0
    for number, part in enumerate((tensors[:half], tensors[half:]), start=1):
        header: dict[str, dict[str, object]] = {}
        places: dict[str, int] = {}
        end, file = 0, f"model-{number:05}-of-00002.safetensors"
        for name, shape in part:
            size = 2 * int(numpy.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
            places[name] = end
            end, location[name] = end + size, file
            needed += size if name.endswith(ADAPTED) else 0
        text = json.dumps(header).encode()
        with (root / file).open("wb") as out:
            out.write(len(text).to_bytes(PREFIX, "little") + text)
            start = out.tell()
            out.truncate(start + end)
            for name, first in places.items():
                if name.endswith(ADAPTED):
                    out.seek(start + first)
                    values = generator.standard_normal(1 << 14, numpy.float32)
                    out.write((values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())
    index = {"metadata": {}, "weight_map": location}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}
    (root / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return needed


def write_adapter(root: Path, layers: int) -> None:
    """Write an adapter on q and v."""
    root.mkdir()
    generator = numpy.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for each in "qv":
            name = f"base_model.model.model.layers.{layer}.self_attn.{each}_proj"
            for factor, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
                made = generator.standard_normal(shape, numpy.float32)
                tensors[f"{name}.lora_{factor}.weight"] = made
    save_file(tensors, root / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    (root / "adapter_config.json").write_text(json.dumps(config))


def publish(hub: Hub, repo: str, root: Path) -> None:
    """Publish a directory without reading its weights."""
    files: dict[str, bytes | mmap] = {}
    for path in root.iterdir():
        with path.open("rb") as file:
            mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
        files[path.name] = mapped if path.suffix == ".safetensors" else mapped[:]
    hub.publish(repo, files)


def inspect(*words: str, **variables: str) -> tuple[float, float]:
    """Return the seconds of one run, as a process of its own, and those of the processor."""
    begin, before = time.monotonic(), os.times()
    command = [str(Path(sys.executable).parent / "safeproj"), "inspect", *words, "--format", "json"]
    subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    busy = sum(after[2:4]) - sum(before[2:4])  # of the children, by them and for them
    return time.monotonic() - begin, busy


def received(hub: Hub) -> int:
    """Return the bytes of weights that were sent, and forget them."""
    found = sum(r.sent for r in hub.requests if r.file and r.file.endswith(".safetensors"))
    hub.requests.clear()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--megabits", type=float, default=1000.0)
    parser.add_argument("--skip-whole", action="store_true", help="download no whole files")
    layers, megabits, skips = vars(parser.parse_args()).values()
    rate = megabits * 1e6 / 8
    with tempfile.TemporaryDirectory(prefix="safeproj-bench-") as place, running() as hub:
        root = Path(place)
        needed = sum(write_model(root / repo, layers, i) for i, repo in enumerate(REPOSITORIES))
        write_adapter(root / "adapter", layers)
        total = sum(each.stat().st_size for each in root.glob("org/*/*.safetensors"))
        for repo in REPOSITORIES:
            publish(hub, repo, root / repo)
        common = ("--adapter", str(root / "adapter"))
        local, busy = inspect(
            "--base", f"{root}/org/base", "--aligned", f"{root}/org/aligned", *common
        )
        ideal = max(needed / rate, local)
        print(f"{layers} layers: {needed / 1e9:.2f} of {total / 1e9:.2f} GB are needed", end="")
        print(f"; {local:.1f} s by their paths, {busy:.1f} s of the processor; ", end="")
        print(f"{needed / rate:.1f} s by the line; ideal {ideal:.1f} s\n", flush=True)
        hub.delay, hub.rate = ROUND_TRIP, rate
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{root}/home", "NO_PROXY": "127.0.0.1"}
        both = ("--base", "org/base", "--aligned", "org/aligned", *common)
        lines = {
            "ranges": ("--download", "never"),
            "kept, first": ("--download", "never", "--keep"),
            "kept, again": ("--download", "never", "--keep"),
            **({} if skips else {"whole files": ("--download", "always")}),
        }
        print("| | GB received | × needed | share of all | seconds | × ideal | processor |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name, options in lines.items():
            (seconds, busy), sent = inspect(*both, *options, **home), received(hub)
            print(
                f"| {name} | {sent / 1e9:.3f} | {sent / needed:.4f} | {sent / total:.3f} | "
                f"{seconds:.1f} | {seconds / ideal:.2f} | {busy:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
