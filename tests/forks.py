"""The command in forks of a process that has imported what it needs: `tests.support.safeproj`.

It is the installed command's own entry point with its own arguments, environment, directory, output
and exit code; only the seconds that imports take are not spent again each time. Tests of how the
command starts and ends use `tests.support.installed`. Scripts that are started as `python -m` are
run in the same way: `tests.support.python_m`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 900
"""Nothing takes so long."""

_AT_IMPORT = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "PYTHON",
    "HOME", "XDG_", "LD_",
)  # fmt: skip
"""Variables that are read, by name or by how they begin, when modules are imported."""

_SERVED = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Those of them for whose values a process is kept."""

_HUB = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HOME", "XDG_")
"""Those that torch does not read at import: what reads them is imported in the fork."""

_SERVERS = 3
"""Processes kept by one worker of the tests; each holds some 300 MB."""

_SERVER = r"""
import atexit, gc, importlib, json, os, pkgutil, resource, runpy, signal, sys, weakref
gc.disable()  # what imports leave is looked through for a second and more
import jinja2, numpy, rich.progress, rich.table, safetensors.torch, torch
import safeproj, typer.main, typer.rich_utils
import filelock, fsspec, regex, sympy, tokenizers, torch._dynamo, torch.distributed.tensor, yaml
late = ("huggingface_hub", "peft", "transformers")  # all that the above are imported for
if sys.argv[1] == "all":
    import peft, transformers.conversion_mapping, transformers.core_model_loading
    import transformers.initialization, transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
for module in pkgutil.walk_packages(safeproj.__path__, "safeproj."):
    if sys.argv[1] == "all" or not module.name.endswith(".callback"):
        importlib.import_module(module.name)
assert sys.argv[1] == "all" or not [name for name in late if name in sys.modules]
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
weakref.finalize._registry.clear()  # or each fork takes apart at its end what imports made
gc.freeze()
gc.enable()
for line in sys.stdin:
    job = json.loads(line)
    if "ended" in job:
        found, status = os.waitpid(job["ended"], 0 if job["wait"] else os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if found else None), flush=True)
        continue
    child = os.fork()
    if not child:
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
    print(child, flush=True)
"""

_servers: OrderedDict[tuple[str, tuple[tuple[str, str], ...]], subprocess.Popen[str]] = (
    OrderedDict()
)


def _server(which: str, own: Mapping[str, str]) -> subprocess.Popen[str]:
    """Return a process that was started with these variables, the least used of many ends."""
    key = which, tuple(sorted(own.items()))
    if key not in _servers:
        while len(_servers) >= _SERVERS:
            process = _servers.popitem(last=False)[1]
            process.communicate()  # the end of its input ends it
        _servers[key] = subprocess.Popen(
            [sys.executable, "-c", _SERVER, which],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),
            env={**os.environ, **own},
        )
    _servers.move_to_end(key)
    return _servers[key]


class Fork:
    """A run of the command in a fork: what a test needs of `subprocess.Popen`.

    Attributes:
        args: the arguments.
        pid: the process.
        returncode: the exit code, None until it is known to have ended.
    """

    def __init__(self, server: subprocess.Popen[str], job: Mapping[str, Any]) -> None:
        self.args: list[str] = job["arguments"]
        self.returncode: int | None = None
        self._server = server
        self._texts = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        out, err = (file.name for file in self._texts)
        self.pid: int = self._asked({**job, "out": out, "err": err})

    def _asked(self, job: Mapping[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

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
        server = _server("all", own)
    elif all(name.startswith(_HUB) for name in own):
        server = _server("what reads no settings of the Hub", {})
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
    return Fork(server, job)


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
