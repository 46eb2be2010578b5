"""Measure safeproj on synthetic checkpoints, next to plain reading and a dense baseline.

    python -m bench                   # a 1.1B pair: 8 GB of disk, some ten minutes
    python -m bench --size small      # under a minute
    python -m bench --clean           # delete the files of that size

The pair is a Llama-shaped base and aligned checkpoint in bfloat16 with random weights, made once
and reused, with LoRA adapters on q and v and on all linear layers. Every program is measured as a
whole process, with the files in the page cache unless said otherwise:

* `safeproj inspect` and `safeproj patch --all`, and an interpreter that only imports what
  they do; "after imports" is the time of a process less that of this interpreter;
* reading the weights that the adapter needs, by offset into one small buffer per thread, and
  nothing else, with 1, 2, 4 and 8 threads; the best of them counts;
* that reading and `inspect` once more, with the pair dropped from the page cache before each;
* a dense baseline: load both models with transformers in float32, form every C (m, m) and every
  update (m, n), project B, save the adapter. It holds one C at a time and handles the adapter as
  plain tensors, both of which favour it over the implementations it stands for;
* the peak memory, also for layers in the shapes of an 8B and a 70B model;
* many adapters in one pass, an alignment file in place of the checkpoints, and a second worker.

Targets are printed next to the figures and never enforced. What is enforced (exit code 1) is that
safeproj and the dense baseline agree on every cosine and on every projected B. A program that fails
leaves its figures out and makes the exit code 2.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import math
import mmap
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
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.files import (
    HIGH_RANK,
    KINDS,
    LORA_B,
    MANY,
    OUT,
    PREFIX,
    RANK,
    SHAPES,
    SIZES,
    BenchError,
    Size,
    clean,
    folder_of,
    high_rank_folder,
    make_all,
    make_sparse,
    many_folders,
    prepare,
)

if TYPE_CHECKING:
    import torch

# This process must stay small and never import torch: the kernel counts the memory of the process
# that starts a child towards the child's peak (until exec replaces it). Heavy work is done in
# workers: this file again, started as `python -m bench --worker NAME JSON`.

CHUNK = 1 << 20  # bytes per read of the plain reader
THREADS = (1, 2, 4, 8)  # of the plain reader
ALIGNMENT_RANK = 64
TOLERANCE = 1e-3  # on cosines (absolute) and on projected B (relative, Frobenius norm)

TARGET_CACHED_READ = 3
TARGET_COLD_READ = 1.25
TARGET_DENSE = Fraction(1, 12)
TARGET_PEAK_MB = 600
TARGET_MANY = 2
TARGET_ALIGNMENT = Fraction(1, 2)
TARGET_WORKERS = 0.6
TARGET_HELP_S = 0.3

IMPORTS = [sys.executable, "-c", "import safeproj.api"]


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

    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, aligned)
    ]
    w_base, w_aligned = (dict(model.named_parameters()) for model in models)
    state, metadata = load_adapter(Path(adapter))
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
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(out) / "adapter_model.safetensors", metadata=metadata)
    shutil.copyfile(Path(adapter) / "adapter_config.json", Path(out) / "adapter_config.json")
    Path(result).write_text(json.dumps(cosines))


def worker_compare(pairs: dict[str, tuple[str, str]], result: str) -> None:
    """Largest relative difference of the tensors of two adapters, for each pair of them."""
    import torch

    found: dict[str, float] = {}
    for label, (ours, dense) in pairs.items():
        left, _ = load_adapter(Path(ours))
        right, _ = load_adapter(Path(dense))
        if left.keys() != right.keys():
            odd = sorted(left.keys() ^ right.keys())
            raise BenchError(f"the two adapters differ in {len(odd)} tensor names, first {odd[0]}")
        worst = 0.0
        for key, expected in right.items():
            shapes = tuple(left[key].shape), tuple(expected.shape)
            if shapes[0] != shapes[1]:
                raise BenchError(f"{key}: shape {shapes[0]}, not {shapes[1]}")
            gap = torch.linalg.vector_norm(left[key].double() - expected.double())
            gap = gap / torch.linalg.vector_norm(expected.double())
            worst = max(worst, float(gap)) if not gap.isnan() else math.inf
        found[label] = worst
    Path(result).write_text(json.dumps(found))


def worker_make(root: str, size: str) -> None:
    """Write the pair and every adapter."""
    make_all(Path(root), SIZES[size])


def worker_sparse(root: str, shapes: Sequence[dict[str, Any]]) -> None:
    """Write the pairs in the shapes of larger models, each with its adapter."""
    for shape in shapes:
        make_sparse(Path(root) / shape["label"], Size(**shape))


WORKERS: dict[str, Callable[..., None]] = {
    "make": worker_make,
    "sparse": worker_sparse,
    "dense": worker_dense,
    "compare": worker_compare,
}


# --- running and measuring whole processes -------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished process."""

    wall_s: float
    peak_mb: float


def run_process(command: Sequence[str], mentions: Sequence[str] = ()) -> Run:
    """Run a command to its end; it must succeed and print all that is in `mentions`."""
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    with tempfile.TemporaryFile() as log:
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
        log.seek(0)
        output = log.read().decode("utf-8", "replace").strip()
    if process.returncode != 0:
        last = output.splitlines()[-1:] or ["no output"]
        raise BenchError(f"exit code {process.returncode}: {last[0]}")
    missing = [text for text in mentions if text not in output]
    if missing:
        raise BenchError(f"the output does not mention {missing[0]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_maxrss * unit / 1e6)


def worker_command(name: str, **arguments: Any) -> list[str]:
    """Return the command that runs one of WORKERS in a process of its own."""
    return [sys.executable, "-m", "bench", "--worker", name, json.dumps(arguments)]


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


@dataclass
class Bench:
    """The benchmark of one size: what is measured, and what the measured programs took so far."""

    root: Path
    size: Size
    shapes: Sequence[Size]
    safeproj: str
    runs: int
    device: str
    done: dict[str, list[Run]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.root / OUT

    @property
    def pair(self) -> list[str]:
        return ["--base", str(self.root / "base"), "--aligned", str(self.root / "aligned")]

    def inspect(self, *options: str) -> list[str]:
        return [self.safeproj, "inspect", *options, "--device", self.device, "--format", "json"]

    def patch(self, out: Path, *options: str) -> list[str]:
        command = [self.safeproj, "patch", *options, "--device", self.device, "--all"]
        return [*command, "--out", str(out), "--overwrite"]

    def gate(self, command: str, adapter: Path, *options: str) -> list[str]:
        shared = [*self.pair, "--device", self.device, "--format", "json"]
        return [self.safeproj, command, str(adapter), *shared, *options]

    def adapter(self, label: str) -> list[str]:
        return ["--adapter", str(self.root / folder_of(label))]

    def run(self, name: str, command: Sequence[str], mentions: Sequence[str] = ()) -> bool:
        """Run a program once more, unless it has failed before; True when it succeeded."""
        if name in self.failed:
            return False
        try:
            self.done.setdefault(name, []).append(run_process(command, mentions))
        except BenchError as error:
            self.failed[name] = str(error)
            del self.done[name]
            say(f"{name}: {error}")
            return False
        return True

    def wall(self, name: str) -> float:
        """Return the seconds of a program, NaN if it has not run."""
        walls = [run.wall_s for run in self.done.get(name, ())]
        return statistics.median(walls) if walls else math.nan

    def after_imports(self, name: str) -> float:
        """Return the seconds of a program less the import's, NaN if they do not stand out."""
        seconds = self.wall(name) - self.wall("imports")
        return seconds if seconds > 0 else math.nan

    def peak(self, name: str) -> float:
        """Return the largest resident set of a program in MB, NaN if it has not run."""
        return max((run.peak_mb for run in self.done.get(name, ())), default=math.nan)

    def peak_above_import(self, name: str) -> float:
        return self.peak(name) - self.peak("imports")


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


def needed_by(bench: Bench, label: str) -> list[Range]:
    """Return what an adapter needs of both checkpoints."""
    names = [f"{name}.weight" for name, _ in bench.size.modules(KINDS[label])]
    return [r for side in ("base", "aligned") for r in needed_ranges(bench.root / side, names)]


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


class Reads:
    """The times of the plain reader, per number of threads."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.ranges = ranges
        self.n_bytes = sum(length for _, _, length in ranges)
        self.walls: dict[int, list[float]] = {threads: [] for threads in THREADS}

    def read(self, threads: int) -> None:
        """Read everything once more."""
        self.walls[threads].append(read_ranges(self.ranges, threads))

    def wall(self, threads: int) -> float:
        return statistics.median(self.walls[threads])

    @property
    def threads(self) -> int:
        """The number of threads of the best reader."""
        return min(self.walls, key=self.wall)

    @property
    def best(self) -> float:
        return self.wall(self.threads)

    def rows(self, where: str) -> list[Row]:
        """Return the figures of the best reader and, to compare, of one thread."""
        return [
            Row(f"best plain read, {where}, s", self.best, ".3f"),
            Row(f"best plain read, {where}, GB/s", self.n_bytes / 1e9 / self.best, ".1f"),
            Row(f"best plain read, {where}, threads", self.threads, ".0f"),
            Row(f"plain read with one thread, {where}, s", self.wall(1), ".3f"),
        ]


# --- the page cache ------------------------------------------------------------------------------


def files_of(*folders: Path) -> list[Path]:
    """Return the files in the folders."""
    return sorted(path for top in folders for path in top.rglob("*") if path.is_file())


def warm(bench: Bench) -> None:
    """Read every generated file once, so that all that follows finds it in the page cache."""
    read_ranges([(path, 0, path.stat().st_size) for path in files_of(bench.root)], 2)


def drop(files: Sequence[Path]) -> bool:
    """Take files, and nothing else, out of the page cache; False where that is not possible."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(files) < 0.01


def cached_share(files: Sequence[Path]) -> float:
    """Return the share of the files' pages that are in the page cache, 1 if it cannot be told."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        return 1.0
    pages = cached = 0
    for path in files:
        length = path.stat().st_size
        if not length:
            continue
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) as mapped,
        ):
            flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
            first = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(first))
            failed = mincore(address, ctypes.c_size_t(length), flags)
            del first  # or the map cannot be closed
            if failed:
                return 1.0
        pages += len(flags)
        cached += sum(flag & 1 for flag in flags)
    return cached / max(pages, 1)


# --- the cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        figure: what was measured.
        value: NaN where it could not be measured.
        form: how to print it.
        target: what it should at most be, if anything.
        enforced: whether to miss the target is an error.
    """

    figure: str
    value: float
    form: str
    target: float | Fraction | None = None
    enforced: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met, None without a target or a value."""
        if self.target is None or math.isnan(self.value):
            return None
        return self.value <= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        target = None if self.target is None else float(self.target)
        value = None if math.isnan(self.value) else self.value
        return {"figure": self.figure, "target": target, "value": value, "met": self.met}

    def cells(self) -> tuple[str, str, str]:
        """Return figure, target and value as text."""
        value = "not measured" if math.isnan(self.value) else format(self.value, self.form)
        verdict = {None: "", True: " (met)", False: " (missed)"}[self.met]
        target = f"{self.target:g}" if isinstance(self.target, float) else str(self.target)
        return self.figure, "" if self.target is None else f"≤ {target}", value + verdict


def align(bench: Bench) -> list[Row]:
    """Make the alignment file of the pair."""
    file = bench.out / "pair.safealign.safetensors"
    say("align")
    command = [bench.safeproj, "align", *bench.pair, "--out", str(file)]
    made = bench.run("align", [*command, "--rank", str(ALIGNMENT_RANK)])
    return [
        Row("`align`, all linear, s", bench.wall("align"), ".1f"),
        Row("`align`, all linear, peak, MB", bench.peak("align"), ".0f"),
        Row("alignment file, MB", file.stat().st_size / 1e6 if made else math.nan, ".1f"),
    ]


def report_of(bench: Bench, label: str) -> Path:
    """Return the file of the report on an adapter."""
    return bench.out / f"report-{folder_of(label)}.json"


def patched(bench: Bench, label: str) -> Path:
    """Return the directory of the projected adapter."""
    return bench.out / f"patched-{folder_of(label)}"


def measure_cached(bench: Bench) -> dict[str, Reads]:
    """Run every program that is measured with the files in the page cache.

    In turn, so that a slow spell of the machine hits all alike. The functions below then only work
    out the figures.
    """
    programs: dict[str, list[str]] = {"imports": IMPORTS}
    mentions: dict[str, list[str]] = {}
    alignment = ["--alignment", str(bench.out / "pair.safealign.safetensors")]
    for label in KINDS:
        sources = [*bench.pair, *bench.adapter(label)]
        report = ["--output", str(report_of(bench, label))]
        programs[f"inspect, {label}"] = bench.inspect(*sources, *report)
        programs[f"patch, {label}"] = bench.patch(patched(bench, label), *sources)
        lenient = ("--threshold", "0", "--max-size", "1e9")  # random factors are no training
        programs[f"check, {label}"] = bench.gate("check", patched(bench, label), *lenient)
        original = ("--original", str(bench.root / folder_of(label)))
        programs[f"verify, {label}"] = bench.gate("verify", patched(bench, label), *original)
        many = [bench.root / folder for folder in many_folders(label)]
        options = [option for path in many for option in ("--adapter", str(path))]
        programs[f"inspect, {MANY} adapters, {label}"] = bench.inspect(*bench.pair, *options)
        mentions[f"inspect, {MANY} adapters, {label}"] = [path.name for path in many]
        if "align" not in bench.failed:
            programs[f"inspect --alignment, {label}"] = bench.inspect(
                *alignment, *bench.adapter(label)
            )
    sources = [*bench.pair, "--adapter", str(bench.root / high_rank_folder())]
    for workers in ("1", "2"):
        programs[f"inspect --workers {workers}"] = bench.inspect(*sources, "--workers", workers)

    warm(bench)
    reads = {label: Reads(needed_by(bench, label)) for label in KINDS}
    for number in range(bench.runs):
        say(f"page cache, {number + 1} of {bench.runs}")
        for reader in reads.values():
            for threads in THREADS:
                reader.read(threads)
        for name, command in programs.items():
            bench.run(name, command, mentions.get(name, ()))
    return reads


def case_cached(bench: Bench, reads: dict[str, Reads]) -> list[Row]:
    """Inspect and patch next to plain reading, with the files in the page cache."""
    rows = [
        Row(
            "`inspect` after imports / best plain read, page cache, all linear",
            bench.after_imports("inspect, all linear") / reads["all linear"].best,
            ".2f",
            TARGET_CACHED_READ,
        ),
        Row("imports, s", bench.wall("imports"), ".2f"),
        Row("imports, peak, MB", bench.peak("imports"), ".0f"),
    ]
    for label, reader in reads.items():
        rows.append(Row(f"modules, {label}", len(bench.size.modules(KINDS[label])), ".0f"))
        rows.append(Row(f"needed weights, {label}, GB", reader.n_bytes / 1e9, ".3f"))
        rows += reader.rows(label)
        for command in ("inspect", "patch"):
            name = f"{command}, {label}"
            rows.append(Row(f"`{command}`, {label}, s", bench.wall(name), ".2f"))
            after = bench.after_imports(name)
            rows.append(Row(f"`{command}` after imports, {label}, s", after, ".2f"))
            if name != "inspect, all linear":
                figure = f"`{command}` after imports / best plain read, {label}"
                rows.append(Row(figure, after / reader.best, ".1f"))
    return rows


def case_cold(bench: Bench) -> list[Row]:
    """Inspect next to plain reading, both after dropping the pair from the page cache."""
    label = "all linear"
    reader = Reads(needed_by(bench, label))
    files = files_of(bench.root / "base", bench.root / "aligned")
    figure = "`inspect` after imports / best plain read, cold, all linear"
    for number in range(bench.runs):
        say(f"cold, {number + 1} of {bench.runs}")
        for threads in THREADS:
            if not drop(files):
                bench.notes.append("cold: this system did not drop the files from its page cache")
                return [Row(figure, math.nan, ".2f", TARGET_COLD_READ)]
            reader.read(threads)
        drop(files)
        bench.run("inspect, cold", bench.inspect(*bench.pair, *bench.adapter(label)))
        bench.run("imports", IMPORTS)
    after = bench.after_imports("inspect, cold")
    return [
        Row(figure, after / reader.best, ".2f", TARGET_COLD_READ),
        *reader.rows(f"cold, {label}"),
        Row(f"`inspect` after imports, cold, {label}, s", after, ".2f"),
    ]


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


def case_dense(bench: Bench) -> list[Row]:
    """Patch next to the dense baseline, run once per adapter, and whether the two agree."""
    warm(bench)
    pairs: dict[str, tuple[str, str]] = {}
    cosine_gaps: dict[str, float] = {}
    for label, kinds in KINDS.items():
        say(f"dense baseline, {label}")
        out, result = (bench.out / f"dense-{folder_of(label)}{end}" for end in ("", ".json"))
        arguments = {
            "base": str(bench.root / "base"),
            "aligned": str(bench.root / "aligned"),
            "adapter": str(bench.root / folder_of(label)),
            "out": str(out),
            "result": str(result),
        }
        ran = bench.run(f"dense, {label}", worker_command("dense", **arguments))
        if not ran or not {f"inspect, {label}", f"patch, {label}"} <= bench.done.keys():
            continue
        dense = json.loads(result.read_text())
        ours = cosines_of(report_of(bench, label), [n for n, _ in bench.size.modules(kinds)])
        gaps = [abs(ours[name] - cosine) for name, cosine in dense.items()]
        cosine_gaps[label] = math.inf if any(map(math.isnan, gaps)) else max(gaps)
        pairs[label] = (str(patched(bench, label)), str(out))
    result = bench.out / "compare.json"
    compared = bench.run("compare", worker_command("compare", pairs=pairs, result=str(result)))
    b_gaps: dict[str, float] = json.loads(result.read_text()) if compared else {}

    rows = []
    for label in KINDS:
        wall = bench.wall(f"dense, {label}")
        ratio = bench.wall(f"patch, {label}") / wall
        target = TARGET_DENSE if label == "q+v" else None
        rows += [
            Row(f"`patch` / dense baseline, {label}", ratio, ".3f", target),
            Row(f"dense baseline, {label}, s", wall, ".1f"),
            Row(f"dense baseline, {label}, peak, MB", bench.peak(f"dense, {label}"), ".0f"),
        ]
    for text, by_label in (
        ("largest difference of a cosine", cosine_gaps),
        ("largest relative difference of a B", b_gaps),
    ):
        for label in KINDS:
            value = by_label.get(label, math.nan)
            rows.append(Row(f"{text}, {label}", value, ".1e", TOLERANCE, enforced=True))
    return rows


def case_memory(bench: Bench) -> list[Row]:
    """Peak memory of inspect and patch on all linear layers, for the pair and larger shapes."""
    roots = {shape.label: bench.out / shape.label for shape in bench.shapes}
    shapes = [asdict(shape) for shape in bench.shapes]
    worker = worker_command("sparse", root=str(bench.out), shapes=shapes)
    made = bench.run("sparse files", worker)
    for label, root in roots.items() if made else ():
        say(f"peak memory, {label}")
        sources = ["--base", str(root / "base"), "--aligned", str(root / "aligned")]
        sources += ["--adapter", str(root / "adapter")]
        bench.run(f"inspect, {label}", bench.inspect(*sources))
        bench.run(f"patch, {label}", bench.patch(root / "patched", *sources))
        shutil.rmtree(root)  # which also makes room in the page cache
    rows = []
    for label in (bench.size.label, *roots):
        for command in ("inspect", "patch"):
            name = f"{command}, {label if label in roots else 'all linear'}"
            figure = f"`{command}` peak above imports, {label}, all linear, MB"
            rows.append(Row(figure, bench.peak_above_import(name), ".0f", TARGET_PEAK_MB))
    return rows


def case_many(bench: Bench) -> list[Row]:
    """Many adapters in one pass next to one of them."""
    rows = []
    for label in KINDS:
        wall = bench.wall(f"inspect, {MANY} adapters, {label}")
        ratio = wall / bench.wall(f"inspect, {label}")
        figure = f"`inspect` of {MANY} adapters in one pass / of one, {label}"
        rows.append(Row(figure, ratio, ".2f", TARGET_MANY if label == "q+v" else None))
        rows.append(Row(f"`inspect` of {MANY} adapters, {label}, s", wall, ".2f"))
        peak = bench.peak_above_import(f"inspect, {MANY} adapters, {label}")
        figure = f"`inspect` of {MANY} adapters, {label}, peak above imports, MB"
        rows.append(Row(figure, peak, ".0f"))
    return rows


def case_gate(bench: Bench) -> list[Row]:
    """The gate on a patched adapter next to inspect, whose scores it needs."""
    rows = []
    for label in KINDS:
        for command in ("check", "verify"):
            wall = bench.wall(f"{command}, {label}")
            figure = f"`{command}` of a patched adapter / `inspect`, {label}"
            rows.append(Row(figure, wall / bench.wall(f"inspect, {label}"), ".2f"))
            rows.append(Row(f"`{command}`, {label}, s", wall, ".2f"))
    return rows


def case_alignment(bench: Bench) -> list[Row]:
    """Inspect with an alignment file next to inspect with the checkpoints."""
    rows = []
    for label in KINDS:
        wall = bench.wall(f"inspect --alignment, {label}")
        ratio = wall / bench.wall(f"inspect, {label}")
        figure = f"`inspect --alignment` / from checkpoints, {label}"
        rows.append(Row(figure, ratio, ".2f", TARGET_ALIGNMENT))
        rows.append(Row(f"`inspect --alignment`, {label}, s", wall, ".2f"))
        after = bench.after_imports(f"inspect --alignment, {label}")
        rows.append(Row(f"`inspect --alignment` after imports, {label}, s", after, ".2f"))
    return rows


def case_workers(bench: Bench) -> list[Row]:
    """Two workers next to one where the arithmetic takes most of the time."""
    one, two = (bench.after_imports(f"inspect --workers {n}") for n in (1, 2))
    where = f"after imports, rank {HIGH_RANK}, all linear"
    return [
        Row(f"`inspect`, 2 workers / 1, {where}", two / one, ".2f", TARGET_WORKERS),
        Row(f"`inspect`, 1 worker, {where}, s", one, ".2f"),
        Row(f"`inspect`, 2 workers, {where}, s", two, ".2f"),
    ]


def case_help(bench: Bench) -> list[Row]:
    """Start the command without importing torch."""
    for _ in range(6):
        bench.run("help", [bench.safeproj, "--help"])
    del bench.done.get("help", [])[:1]  # the first one may read from the disk
    return [Row("`safeproj --help`, s", bench.wall("help"), ".3f", TARGET_HELP_S)]


# --- the result ----------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print progress or an error to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the last column to the right."""
    rule = ["---"] * (len(head) - 1) + ["---:"]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def environment(bench: Bench) -> dict[str, Any]:
    """Describe the pair, the machine and the versions."""
    affinity = getattr(os, "sched_getaffinity", None)
    versions = {}
    for package in ("safeproj", "torch", "transformers", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "size": {"parameters": bench.size.parameters(), **asdict(bench.size)},
        "sparse": [asdict(shape) for shape in bench.shapes],
        "device": bench.device,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def heading(env: dict[str, Any], runs: int) -> str:
    """Return the lines printed above the tables."""
    size = env["size"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    shapes = "; ".join(
        f"{shape['label']}, {shape['layers']} layer(s), hidden {shape['hidden']}, "
        f"intermediate {shape['intermediate']}"
        for shape in env["sparse"]
    )
    return (
        f"Pair: {size['parameters'] / 1e9:.2f} B parameters in bfloat16, {size['layers']} layers, "
        f"hidden {size['hidden']}, intermediate {size['intermediate']}; LoRA rank {RANK}, "
        f"alignment rank {ALIGNMENT_RANK}.\n"
        f"Larger shapes, as sparse files: {shapes}.\n"
        f"Machine: {env['cores']} cores, {env['machine']}, {env['system']}; arithmetic on "
        f"{env['device']}. Python {env['python']}, {versions}.\n"
        "Whole processes, files in the page cache unless cold. "
        f"Times: median of {runs} (dense baseline, `align` and larger shapes: one run). "
        "Peaks: largest resident set, mapped file pages included.\n"
        "The targets are set for `--size 1.1b`."
    )


def measure_all(bench: Bench, skip_dense: bool) -> list[Row]:
    """Run every case and return the rows in the order in which they are shown."""
    helps = case_help(bench)
    aligns = align(bench)  # also brings torch's files into the page cache
    reads = measure_cached(bench)
    dense = [] if skip_dense else case_dense(bench)
    cold = case_cold(bench)
    memory = case_memory(bench)  # last: its files push others out of the page cache
    many, alignment = [*case_many(bench), *case_gate(bench)], case_alignment(bench)
    cached, workers = case_cached(bench, reads), case_workers(bench)
    return [*cached, *cold, *dense, *memory, *many, *aligns, *alignment, *workers, *helps]


def run_bench(args: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit code."""
    root = Path(args.dir).expanduser().resolve() / f"pair-{args.size}"
    if args.clean:
        say(f"deleted {root}" if clean(root) else f"nothing to delete at {root}")
        return 0
    # The small size only shows that everything runs: once each, and on one layer of an 8B model.
    small = args.size == "small"
    runs, shapes = (1, [replace(SHAPES[0], layers=1)]) if small else (3, SHAPES)
    runs = args.runs or runs
    bench = Bench(root, SIZES[args.size], shapes, find_command(), runs, args.device)
    started = time.perf_counter()
    make = worker_command("make", root=str(root), size=args.size)
    if prepare(root, bench.size, lambda: run_process(make)):
        say(f"made {root} in {time.perf_counter() - started:.1f} s")
    shutil.rmtree(bench.out, ignore_errors=True)
    bench.out.mkdir()
    env = environment(bench)
    try:
        rows = measure_all(bench, args.skip_dense)
    finally:
        shutil.rmtree(bench.out, ignore_errors=True)
    say(f"took {time.perf_counter() - started:.0f} s")

    targets = [row.cells() for row in rows if row.target is not None]
    others = [row.cells()[::2] for row in rows if row.target is None]
    print(heading(env, runs))
    print(f"\n{table(('figure', 'target', 'reached'), targets)}")
    print(f"\n{table(('figure', 'measured'), others)}", flush=True)
    notes = [*bench.notes, *(f"{name}: {error}" for name, error in bench.failed.items())]
    if any(math.isnan(row.value) for row in rows):
        print("\nNot measured: what failed or was not possible, and times too short to tell.")
        print("".join(f"\n* {note}" for note in notes), flush=True)
    if args.json:
        document = {
            "schema": "safeproj.bench/2",
            "environment": env,
            "runs": runs,
            "rows": [row.to_dict() for row in rows],
            "processes": {name: list(map(asdict, each)) for name, each in bench.done.items()},
            "not_measured": notes,
        }
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")
    wrong = [row.figure for row in rows if row.enforced and row.met is False]
    if wrong:
        say(f"error: safeproj and the dense baseline disagree: {'; '.join(wrong)}")
        return 1
    return 2 if bench.failed else 0


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure safeproj next to plain reading and a dense baseline.",
    )
    default = Path(tempfile.gettempdir()) / "safeproj-bench"
    parser.add_argument("--dir", default=str(default), help="work directory (%(default)s)")
    parser.add_argument("--size", choices=sorted(SIZES), default="1.1b", help="(%(default)s)")
    parser.add_argument("--runs", type=positive, help="runs per figure (3, of the small size 1)")
    parser.add_argument("--device", default="cpu", help="of inspect and patch (%(default)s)")
    parser.add_argument("--skip-dense", action="store_true", help="leave the baseline out")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--clean", action="store_true", help="delete the generated files and stop")
    args = parser.parse_args()
    if not hasattr(os, "wait4"):
        say("error: this script measures peak memory with os.wait4, which this system lacks")
        return 2
    try:
        return run_bench(args)
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
