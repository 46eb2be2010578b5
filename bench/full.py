"""Measure how a full fine-tune is patched, next to the dense way in torch.

    python -m bench.full                # three small models, under a minute
    python -m bench.full --size 1.1b    # 9 GB in a temporary directory, some ten minutes
    python -m bench.full --size 7b-layer --alone    # the largest weights: 2 GB

Both ways run in a process of their own on the same three bfloat16 checkpoints (Llama-shaped) and
project every linear layer by Safe LoRA. The dense way is that of research code: it loads all three
models, forms `C = V Vᵀ / ‖V‖_F` (m, m) of every weight, keeps them all, and multiplies, in float32.
Time is that of the whole process without its imports; memory is its peak less that before loading.
Beside them stand the two floors: reading three models and writing one, and the products of both
passes at 70 % of what the same number of threads multiplies at best.
It ends with exit code 1 if the two ways do not write the same weights but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy

from bench.files import ATTENTION, MLP, SEED, SIZES, Size, make_pair

ROLES = ("base", "aligned", "tuned")
SAME = 0.01
"""How far weights of the two ways may be apart, relative to how far either is from the aligned
ones; beyond that of their rounding to bfloat16."""

REPEATS = 4
"""Products of one thread by which the best rate is found."""

SHARE = 0.7
"""Of the best rate of products that counts as reached."""


def make_triple(root: Path, size: Size) -> None:
    """Write the three checkpoints, if they are not there."""
    import torch
    from safetensors.torch import load_file, save_file

    if (root / "made").exists():
        return
    for role in ROLES:
        (root / role).mkdir(parents=True, exist_ok=True)
    make_pair(root, size)
    for path in sorted((root / "aligned").iterdir()):
        if path.suffix != ".safetensors":
            (root / "tuned" / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            generator = torch.Generator().manual_seed(SEED + 7 * number)
            moved = torch.randn(tensor.shape, generator=generator).mul_(0.0005)
            tensors[name] = tensor.float().add_(moved).to(torch.bfloat16)
        save_file(tensors, root / "tuned" / path.name, metadata={"format": "pt"})
    (root / "made").touch()


def dense(root: Path, size: Size, out: Path) -> None:
    """Patch as research code does."""
    import torch
    from safetensors.torch import load_file, save_file

    def load(role: str) -> dict[str, Any]:
        files = sorted((root / role).glob("*.safetensors"))
        return {name: each for path in files for name, each in load_file(path).items()}

    with torch.inference_mode():
        base, aligned, tuned = map(load, ROLES)
        names = [f"{name}.weight" for name, _ in size.modules(ATTENTION + MLP)]
        projectors = {}
        for name in names:
            V = aligned[name].float() - base[name].float()
            projectors[name] = V @ V.T / V.norm()
        for name in names:
            change = tuned[name].float() - aligned[name].float()
            new = aligned[name].float() + projectors[name] @ change
            tuned[name] = new.to(tuned[name].dtype)
    out.mkdir()
    save_file(tuned, out / "model.safetensors", metadata={"format": "pt"})


def patched(root: Path, _: Size, out: Path) -> None:
    """Patch as `safeproj patch --all` does, without the head."""
    import safeproj

    method = safeproj.SafeLora(root / "base", root / "aligned")
    chosen = safeproj.Selection(all=True, exclude=("lm_head",))
    safeproj.patch(method, safeproj.FullModel(root / "tuned"), out, safeproj.Options(chosen))


WAYS: dict[str, Callable[[Path, Size, Path], None]] = {"safeproj": patched, "dense": dense}


def child(way: str, root: Path, size: Size, out: Path) -> None:
    """Run one way in this process, and print how long it took and what it held."""
    import_module("safetensors.torch" if way == "dense" else "safeproj.api")
    before = peak()
    start = time.perf_counter()
    WAYS[way](root, size, out)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": peak() - before}))


def peak() -> float:
    """Return the most megabytes that this process has held; Linux counts from its own start."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def measured(way: str, arguments: argparse.Namespace, root: Path, out: Path) -> dict[str, float]:
    """Return what a process of its own took."""
    command = [sys.executable, "-m", "bench.full", "--size", arguments.size, "--child", way]
    done = subprocess.run(
        [*command, "--root", str(root), "--out", str(out)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bytes_floor(root: Path) -> float:
    """Return the seconds of reading three models and writing one."""
    start = time.perf_counter()
    buffer = bytearray(16 << 20)
    with tempfile.TemporaryFile(dir=root) as target:
        for role in ROLES:
            for path in (root / role).glob("*.safetensors"):
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        if role == "tuned":
                            target.write(memoryview(buffer)[:count])
    return time.perf_counter() - start


def products_floor(size: Size, threads: int) -> float:
    """Return the seconds of the products of both passes at `SHARE` of the best rate."""
    side = 1024
    one = numpy.ones((side, side), numpy.float32)

    def multiply(_: int) -> None:
        for _ in range(REPEATS):
            one @ one

    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(multiply, range(threads)))
            best = min(best, time.perf_counter() - start)
    rate = threads * REPEATS * 2 * side**3 / best
    # Both products have 2 s² l operations; V Vᵀ is symmetric, and takes half of them.
    operations = 0.0
    for _, (m, n) in size.modules(ATTENTION + MLP):
        small, large = sorted((m, n))
        operations += 2 * (3 if m < n else 4) * small**2 * large
    return operations / (SHARE * rate)


def distance(size: Size, outs: list[Path]) -> float:
    """Return how far the weights of both ways are apart, relative to what they changed."""
    import torch
    from safetensors.torch import load_file

    one, other = (
        {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
        for out in outs
    )
    worst = 0.0
    for name, _ in size.modules(ATTENTION + MLP):
        a, b = one[f"{name}.weight"].float(), other[f"{name}.weight"].float()
        rounding = a.abs() * torch.finfo(torch.bfloat16).eps
        beyond = ((a - b).abs() - rounding).clamp(min=0.0)
        worst = max(worst, float(beyond.norm() / a.norm()))
    return worst


def main() -> int:
    """Measure both ways, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=[*SIZES], default="small")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--alone", action="store_true", help="without the dense way and the floors")
    parser.add_argument("--child", choices=[*WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.child:
        child(arguments.child, arguments.root, size, arguments.out)
        return 0
    root = arguments.root or Path(tempfile.gettempdir()) / f"safeproj-bench-full-{arguments.size}"
    make_triple(root, size)
    if arguments.alone:
        with tempfile.TemporaryDirectory(dir=root) as place:
            ours = measured("safeproj", arguments, root, Path(place) / "safeproj")
        print(f"{size.label}: {ours['seconds']:.1f} s, {ours['megabytes']:.0f} MB above start")
        return 0
    with tempfile.TemporaryDirectory(dir=root) as place:
        outs = [Path(place) / way for way in WAYS]
        found = {w: measured(w, arguments, root, out) for w, out in zip(WAYS, outs, strict=True)}
        apart = distance(size, outs)
    ours, theirs = found["safeproj"], found["dense"]
    threads = min(os.cpu_count() or 1, 8)
    rows = {
        "safeproj": (ours["seconds"], ours["megabytes"]),
        "dense, in torch": (theirs["seconds"], theirs["megabytes"]),
        "reading three models, writing one": (bytes_floor(root), 0.0),
        f"products at {SHARE:.0%} of {threads} threads": (products_floor(size, threads), 0.0),
    }
    print(f"{size.label}: every linear layer of {size.parameters() / 1e9:.2f} G parameters\n")
    print("| | seconds | MB above start |\n|---|---:|---:|")
    for name, (seconds, megabytes) in rows.items():
        print(f"| {name} | {seconds:.1f} | {f'{megabytes:.0f}' if megabytes else ''} |")
    times, share = (theirs[key] / ours[key] for key in ("seconds", "megabytes"))
    print(f"\n{times:.1f} times as fast, 1/{share:.1f} of the memory")
    print(f"weights differ by {apart:.1e} beyond rounding")
    return 0 if apart <= SAME else 1


if __name__ == "__main__":
    sys.exit(main())
