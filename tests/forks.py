"""The command in forks of a process that has imported what it needs: `tests.support.safeproj`.

It is the installed command's own entry point with its own arguments, environment, directory, output
and exit code; only the seconds that imports take are not spent again each time. Tests of how the
command starts and ends use `tests.support.installed`. Scripts that are started as `python -m` are
run in the same way: `tests.support.python_m`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

SECONDS = 900
"""Nothing takes so long."""

_AT_IMPORT = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "PYTHON",
    "HOME", "XDG_", "LD_",
)  # fmt: skip
"""Variables that are read, by name or by how they begin, when modules are imported."""

_SERVED = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Those of them for whose values a process is kept."""

_AT_ONCE = ("OMP_NUM_THREADS",)
"""Those of these that torch reads; the others are for what is imported on top of it."""

_HUB = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HOME", "XDG_")
"""Those that torch does not read at import: what reads them is imported in the fork."""

_SERVER = r"""
import atexit, gc, importlib, json, os, pkgutil, resource, runpy, select, shutil, signal, socket
import sys, weakref
gc.disable()  # what imports leave is looked through for a second and more
import jinja2, numpy, rich.progress, rich.table, safetensors.torch, torch
import safeproj, typer.main, typer.rich_utils
import filelock, fsspec, regex, sympy, tokenizers, torch._dynamo, torch.distributed.tensor, yaml
late = ("huggingface_hub", "peft", "transformers")  # all that the above are imported for
for module in pkgutil.walk_packages(safeproj.__path__, "safeproj."):
    if not module.name.endswith(".callback"):
        importlib.import_module(module.name)
assert not [name for name in late if name in sys.modules]
from safeproj.__main__ import main
from safeproj.cli.app import app
made = typer.main.get_command
command = made(app)
parts = [command]
for part in parts:  # the types of their options take longer than most commands
    parts += getattr(part, "commands", {}).values()
    for parameter in part.params:
        getattr(parameter, "get_runtime_param", bool)()
typer.main.get_command = lambda given: command if given is app else made(given)


def serve(path):
    # Whoever connects has jobs run by a fork of this process, until the tests have ended.
    weakref.finalize._registry.clear()  # or each fork takes apart at its end what imports made
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    if os.path.exists(f"{path}.new"):
        os.unlink(f"{path}.new")
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)  # now there is one who answers
    while lives(int(sys.argv[1])):
        if select.select([listener], [], [], 1)[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection.makefile("rw"))
                os._exit(0)
            connection.close()
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    os._exit(0)


def lives(process):
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # dead, and nobody looks
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # no Linux
        return True


def answer(stream):
    for line in stream:
        job = json.loads(line)
        if "ended" in job:
            found, status = os.waitpid(job["ended"], 0 if job["wait"] else os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if found else None), file=stream)
        elif "variables" in job:
            if not os.fork():
                os.environ.update(job["variables"])
                gc.disable()
                import peft, transformers.conversion_mapping, transformers.core_model_loading
                import transformers.initialization, transformers.models.auto.modeling_auto
                import transformers.models.llama.modeling_llama
                import safeproj.callback
                serve(job["place"])
        else:
            child = os.fork()
            if not child:
                run(job)
            print(child, file=stream)
        stream.flush()


def run(job):
    signal.alarm(job["seconds"])
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    sys.argv = [job["module"], *job["arguments"]]
    try:
        if job["module"] == "safeproj":
            main()
        else:
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else code is not None)  # nothing is torn down


serve(sys.argv[2])
"""

_streams: dict[tuple[tuple[str, str], ...] | None, TextIO] = {}
_processes: list[subprocess.Popen[bytes]] = []


def _stream(own: Mapping[str, str] | None) -> TextIO:
    """Return where to ask a process for forks, one for all workers of the tests.

    Args:
        own: variables beside those of the tests; None (and not an empty mapping) for a process that
            has read no settings of the Hub.
    """
    key = None if own is None else tuple(sorted(own.items()))
    if key not in _streams:
        import fcntl

        owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        folder = Path(tempfile.gettempdir(), f"safeproj-forks-{owner}")
        folder.mkdir(mode=0o700, exist_ok=True)
        at_once = {name: (own or {})[name] for name in (own or {}) if name in _AT_ONCE}
        first, place = (folder / _digest(each) for each in (at_once, key))
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _connected(first if key is None else place)
            if found is None:
                found = _connected(first) or _appeared(first, _process(owner, first, at_once))
                if key is not None:
                    with found:
                        print(json.dumps({"place": str(place), "variables": own}), file=found)
                    found = _appeared(place)
        _streams[key] = found
    return _streams[key]


def _process(owner: int, place: Path, own: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Begin a process that listens at a place until the tests, the owner, have ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(owner), str(place)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=tempfile.gettempdir(),
        env={**os.environ, **own},
    )
    _processes.append(process)
    return process


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _appeared(place: Path, process: subprocess.Popen[bytes] | None = None) -> TextIO:
    """Wait for one who answers at a place."""
    end = time.monotonic() + SECONDS
    while (found := _connected(place)) is None:
        assert process is None or process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def _connected(place: Path) -> TextIO | None:
    """Return a stream to one who answers at a place, None if nobody does or does any more."""
    with socket.socket(socket.AF_UNIX) as found:
        try:
            found.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        return found.makefile("rw", encoding="utf-8")


class Fork:
    """A run of the command in a fork: what a test needs of `subprocess.Popen`.

    Attributes:
        args: the arguments.
        pid: the process.
        returncode: the exit code, None until it is known to have ended.
    """

    def __init__(self, stream: TextIO, job: Mapping[str, Any]) -> None:
        self.args: list[str] = job["arguments"]
        self.returncode: int | None = None
        self._stream = stream
        self._texts = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        out, err = (file.name for file in self._texts)
        self.pid: int = self._asked({**job, "out": out, "err": err})

    def _asked(self, job: Mapping[str, Any]) -> Any:
        print(json.dumps(job), file=self._stream, flush=True)
        return json.loads(self._stream.readline())

    def _ended(self, *, wait: bool) -> int | None:
        if self.returncode is None:
            self.returncode = self._asked({"ended": self.pid, "wait": wait})
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code if it has ended."""
        return self._ended(wait=False)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is known to have ended."""
        if self.returncode is None:  # until it is known nothing else has its number
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, for so many seconds, and return what it printed."""
        end = time.monotonic() + (timeout or SECONDS)
        while timeout is not None and self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.002)
        self._ended(wait=True)
        out, err = (Path(file.name).read_text("utf-8") for file in self._texts)
        for file in self._texts:
            file.close()
        return out, err


def begun(
    arguments: list[str],
    env: Mapping[str, str],
    cwd: str,
    largest_file: int | None = None,
    module: str = "safeproj",
) -> Fork | None:
    """Begin to run the command; None where it has to be started anew.

    Args:
        arguments: of the command.
        env: all variables.
        cwd: where it runs.
        largest_file: bound on the bytes of the files that it writes.
        module: what is run; another than the command is looked for in `cwd` first.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin":  # where forks are not safe
        return None
    own = {
        name: value
        for name, value in env.items()
        if name.startswith(_AT_IMPORT) and os.environ.get(name) != value
    }
    if own.keys() <= set(_SERVED):
        stream = _stream(own)
    elif all(name.startswith(_HUB) for name in own):
        stream = _stream(None)
    else:
        return None
    job = {
        "module": module,
        "arguments": arguments,
        "env": dict(env),
        "cwd": cwd,
        "seconds": SECONDS,
        "largest_file": largest_file,
    }
    return Fork(stream, job)


def _run(
    arguments: list[str], env: Mapping[str, str], cwd: str
) -> subprocess.CompletedProcess[str] | None:
    """Run the command with these variables alone, and return what it printed."""
    found = begun(arguments, env, cwd)
    if found is None:
        return None
    texts = found.communicate()
    assert found.returncode is not None
    return subprocess.CompletedProcess(arguments, found.returncode, *texts)


_CLIENT = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
server.sendall(json.dumps([sys.argv[3:], dict(os.environ), os.getcwd()]).encode() + b"\\n")
found = server.makefile().readline()
if not found:
    os.execv(sys.argv[2], sys.argv[2:])
code, out, err = json.loads(found)
for file, text in ((2, err), (1, out)):
    with open(file, "wb", closefd=False) as stream:
        stream.write(text.encode())
sys.exit(code)
"""


class _Handler(socketserver.StreamRequestHandler):
    """Has a job of a program run, and answers with its exit code."""

    def handle(self) -> None:
        found = _run(*json.loads(self.rfile.readline()))
        if found is not None:
            answer = found.returncode, found.stdout, found.stderr
            self.wfile.write(json.dumps(answer).encode() + b"\n")


@contextmanager
def program(command: str) -> Iterator[Path]:
    """Yield a directory with a program `safeproj` that scripts may start, to be run in forks.

    This process has to wait for the scripts: it starts no command itself in the meantime.

    Args:
        command: the installed command, which is started where forks are not to be had.
    """
    with tempfile.TemporaryDirectory() as name:
        path, client, place = Path(name, "safeproj"), Path(name, "client.py"), Path(name, "socket")
        client.write_text(_CLIENT, "utf-8")
        words = [sys.executable, "-IS", str(client), str(place), command]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', "utf-8")
        path.chmod(0o755)
        with socketserver.UnixStreamServer(str(place), _Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield path.parent
            server.shutdown()
