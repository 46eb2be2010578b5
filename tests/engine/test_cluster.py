"""The engine on a Ray cluster of three nodes, each with real processes of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from typer.main import get_command

import safeproj as product
from safeproj import SafeLora, engine
from safeproj.cli.app import app
from safeproj.engine import Buffers, Cluster, Progress, Task, cluster
from safeproj.errors import SafeprojError
from safeproj.records.profile import Usage
from tests import hub_server
from tests.forks import SECONDS
from tests.support import assert_refused, safeproj, snapshot, started

ray = pytest.importorskip("ray", reason="needs Ray")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Ray's clusters need Linux, macOS")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
NODES = 3


@dataclass
class Nodes:
    """A cluster, and the nodes beside its head."""

    made: Any
    others: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.made.address)

    @property
    def options(self) -> product.Options:
        return product.Options(cluster=Cluster(self.address))

    @property
    def words(self) -> list[str]:
        return ["--engine", "ray", "--ray-address", self.address]

    def add(self) -> Any:
        """Add a node; Ray gives each 30 seconds to begin, which a busy machine can miss."""
        for _ in range(4):
            with suppress(Exception):
                return self.made.add_node(num_cpus=1)
        try:
            return self.made.add_node(num_cpus=1)
        except Exception as error:
            pytest.skip(f"Ray begins no node on this machine: {error}")

    def grow(self) -> None:
        """Add nodes until there are three."""
        while len(self.others) < NODES - 1:
            self.others.append(self.add())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no other worker of the tests have nodes of Ray meanwhile: it begins some once only."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


@pytest.fixture(scope="module")
def nodes(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    del alone
    from ray.cluster_utils import Cluster as Made

    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))  # where the nodes run
    made = Nodes(Made())
    made.add()
    made.grow()
    os.chdir(here)
    yield made
    made.made.shutdown()


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the example in as many parts as there would be of a large model."""
    monkeypatch.setattr(cluster, "SLICE_BYTES", 1)


BASE, ALIGNED = str(EXAMPLE / "base"), str(EXAMPLE / "aligned")
METHOD = SafeLora(base=BASE, aligned=ALIGNED)


@dataclass(frozen=True)
class Bytes:
    """What a task of these tests reads: nothing."""

    nbytes: int = 1 << 20
    weights: tuple[Any, ...] = ()


TASKS = [Task(f"layers.{number}", Bytes(), ()) for number in range(24)]


@pytest.mark.usefixtures("alone")
def test_the_way_of_slurm_runs_on_one_node(tmp_path: Path) -> None:
    """The first of all: Ray begins no node of its own beside those of `nodes`."""
    script = next(iter(fenced("slurm", "bash")))
    line = script[script.index("srun ") + len("srun ") :].replace("\\\n", " ").strip()
    for name, value in {
        "$head": "127.0.0.1",
        "6379": "6391",
        '"$SLURM_JOB_NUM_NODES"': "1",
        '"$SLURM_CPUS_PER_TASK"': "1",
        "/shared/base": "base",
        "/shared/aligned": "aligned",
        "/shared/loras/*": "adapters/mixed",
        "/shared/patched": str(tmp_path / "out"),
    }.items():
        assert name in line
        line = line.replace(name, value)
    folder = Path(sys.executable).parent
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    done = subprocess.run(
        shlex.split(line),
        cwd=EXAMPLE,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if "timed out during startup" in done.stderr:
        pytest.skip("Ray begins no node on this machine")
    assert done.returncode == 0, done.stdout + done.stderr
    product.patch(METHOD, EXAMPLE / "adapters" / "mixed", tmp_path / "here")
    assert same_but_names(tmp_path / "here", tmp_path / "out")


def test_patched_adapters_are_the_same_byte_for_byte(nodes: Nodes, tmp_path: Path) -> None:
    adapters = [str(EXAMPLE / "adapters" / name) for name in ("bad", "mixed", "skill")]
    for name, options in (("here", None), ("there", nodes.options)):
        product.patch_many(METHOD, adapters, tmp_path / name, options)
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")


def test_an_alignment_file_is_the_same_byte_for_byte(nodes: Nodes, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safealign.safetensors" for name in ("here", "there")]
    for path, options in zip(files, (None, nodes.options), strict=True):
        product.align(BASE, ALIGNED, path, options=options)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_commands_say_the_same_from_any_directory(nodes: Nodes) -> None:
    given = ["--base", "base", "--aligned", "aligned", "adapters/mixed"]
    for name in ("inspect", "check"):
        here = safeproj(name, *given, cwd=EXAMPLE)
        there = safeproj(name, *given, *nodes.words, cwd=EXAMPLE)
        assert (here.returncode, here.stdout) == (there.returncode, there.stdout), there.stderr


def test_workers_read_what_they_need_from_the_hub(nodes: Nodes, tmp_path: Path) -> None:
    given = ["--adapter", str(EXAMPLE / "adapters" / "mixed"), "--format", "json"]
    here = safeproj("inspect", "--base", BASE, "--aligned", ALIGNED, *given)
    with hub_server.running() as hub:
        for name, path in (("base", BASE), ("aligned", ALIGNED)):
            hub.publish(f"org/{name}", Path(path))
        there = safeproj(
            "inspect", "--base", "org/base", "--aligned", "org/aligned", *given,
            "--download", "never", *nodes.words,
            env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
        assert there.returncode == 0, there.stderr
        asked = [each for each in hub.requests if str(each.file).endswith(".safetensors")]
    assert json.loads(there.stdout)["modules"] == json.loads(here.stdout)["modules"]
    assert asked
    assert not list(tmp_path.rglob("*.safetensors"))


def test_progress_and_profile_are_those_of_all_workers(nodes: Nodes) -> None:
    events: list[Progress] = []
    usage = Usage()

    def work(_: Buffers, task: Task) -> str:
        time.sleep(0.02)
        return task.name

    found = engine.run(
        TASKS, work, on_progress=events.append, usage=usage, where=Cluster(nodes.address)
    )
    assert list(found) == [task.name for task in TASKS]
    finished = [event.name for event in events if event.finished]
    assert sorted(finished) == sorted(task.name for task in TASKS)
    assert sum(event.nbytes for event in events) == sum(task.origin.nbytes for task in TASKS)
    assert usage.workers == NODES
    assert usage.busy_seconds >= 0.02 * len(TASKS)
    assert usage.wall_seconds * usage.workers >= usage.busy_seconds


def test_a_lost_node_changes_nothing(nodes: Nodes, tmp_path: Path) -> None:
    mark = tmp_path / "begun"

    def work(_: Buffers, task: Task) -> str:
        with mark.open("a") as file:
            file.write(f"{task.name}\n")
        time.sleep(0.3)
        return task.name

    found = engine.run(TASKS, work, where=Cluster(nodes.address))
    first = next(iter(found))
    nodes.made.remove_node(nodes.others.pop(), allow_graceful=False)
    assert [first, *found] == [task.name for task in TASKS]
    begun = mark.read_text().split()
    assert set(begun) == {task.name for task in TASKS}
    nodes.grow()


def test_what_fails_on_a_worker_ends_in_one_line_that_names_it(
    nodes: Nodes, tmp_path: Path
) -> None:
    gone = tmp_path / "model.safetensors"

    def work(*_: Any) -> bytes:
        try:
            return gone.read_bytes()
        except OSError as error:
            raise SafeprojError(f"{gone.name}: cannot be read ({error.strerror})") from error

    with pytest.raises(SafeprojError, match=r"cannot be read \(No such file.*\) \(on .+\)$"):
        list(engine.run(TASKS, work, where=Cluster(nodes.address)))


def test_an_error_of_our_own_stays_one(nodes: Nodes) -> None:
    def work(_: Buffers, task: Task) -> float:
        return 1 / (len(task.name) - len(task.name))

    with pytest.raises(ZeroDivisionError):
        list(engine.run(TASKS, work, where=Cluster(nodes.address)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_nothing_and_another_succeeds(
    nodes: Nodes, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    words: list[str | Path] = ["patch", "--base", BASE, "--aligned", ALIGNED]
    words += [EXAMPLE / "adapters" / "mixed", "--out", out]
    run = started(*words, *nodes.words, "--profile", cwd=EXAMPLE)
    time.sleep(1.5)  # Ray is being asked, or works
    run.send_signal(number)
    run.communicate()
    assert not out.exists()
    done = safeproj(*words, *nodes.words, cwd=EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert out.is_dir()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_another_version_on_a_worker_is_refused() -> None:
    how: Any = {"version": "0", "directory": ".", "device": "cpu", "wide": False, "workers": 1}
    found: Any = cluster.run_slice(TASKS, lambda _, task: task.name, **how)
    assert "install the same on all nodes" in str(found.error)


def test_a_cluster_that_is_not_there_ends_in_one_line() -> None:
    words = ["inspect", "--base", "base", "--aligned", "aligned", "adapters/mixed"]
    done = safeproj(*words, "--engine", "ray", "--ray-address", "127.0.0.1:9", cwd=EXAMPLE)
    assert_refused(done, "no Ray cluster at 127.0.0.1:9", "ray start --head")
    done = safeproj(*words, "--ray-address", "127.0.0.1:9", cwd=EXAMPLE)
    assert_refused(done, "--ray-address is for --engine ray")


def test_full_models_stay_on_one_machine(tmp_path: Path) -> None:
    words = ["patch", "--model", "aligned", "--base", "base", "--aligned", "aligned"]
    done = safeproj(*words, "--out", tmp_path / "out", "--engine", "ray", cwd=EXAMPLE)
    assert_refused(done, "a Ray cluster is for adapters")


def test_slices_are_of_about_as_many_bytes_and_leave_out_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [5, 1, 1, 1, 9, 2, 2, 2, 2]
    found = cluster.sliced(sizes, 4)
    assert [sizes[each] for each in found] == [[5, 1, 1], [1, 9], [2, 2, 2, 2]]
    monkeypatch.setattr(cluster, "SLICE_BYTES", 100)
    assert cluster.sliced(sizes, 4) == [slice(0, 9)]
    assert cluster.sliced([], 4) == []


def test_the_job_for_kubernetes_runs_a_command_that_there_is() -> None:
    job = yaml.safe_load(next(iter(fenced("kuberay", "yaml"))))
    program, name, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, name) == ("safeproj", "patch")
    known = {word for each in get_command(app).commands["patch"].params for word in each.opts}  # type: ignore[attr-defined]
    assert {word for word in words if word.startswith("--")} <= known
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    assert workers == job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]


def fenced(mark: str, language: str) -> list[str]:
    """Return what the page shows below a mark."""
    page = (EXAMPLE.parents[1] / "docs" / "scale.md").read_text("utf-8")
    return re.findall(rf"<!-- {mark} -->\n```{language}\n(.*?)```", page, re.DOTALL)


def same_but_names(here: Path, there: Path) -> bool:
    """Tell whether two patched adapters hold the same weights and config."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    return all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
