"""The command in forks of a process that has imported what it needs: `tests.support.safeproj`.

It is the installed command's own entry point with its own arguments, environment, directory, output
and exit code; only the seconds that imports take are not spent again each time. Tests of how the
command starts, is interrupted and ends use `tests.support.installed`.
"""

from __future__ import annotations

import json
import os
import shlex
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SECONDS = 300
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
import atexit, gc, importlib, json, os, pkgutil, signal, sys
import jinja2, numpy, rich.progress, rich.table, safetensors.torch, torch
import safeproj, typer.main
late = ("huggingface_hub", "peft", "transformers")
if sys.argv[1] == "all":
    import peft, transformers.conversion_mapping, transformers.core_model_loading
    import transformers.initialization, transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
for module in pkgutil.walk_packages(safeproj.__path__, "safeproj."):
    if sys.argv[1] == "all" or module.name != "safeproj.methods.salora.callback":
        importlib.import_module(module.name)
assert sys.argv[1] == "all" or not [name for name in late if name in sys.modules]
from safeproj.__main__ import main
from safeproj.cli.app import app
command = typer.main.get_command(app)
typer.main.get_command = lambda app: command  # made once: it takes longer than most commands
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(job["seconds"])
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["safeproj", *job["arguments"]]
        try:
            main()
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
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
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


def forked(
    arguments: list[str], env: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str] | None:
    """Run the command and return what it printed; None where it has to be started anew.

    Args:
        arguments: of the command.
        env: variables beside those of this process.
        cwd: where it runs.
    """
    return _run(arguments, {**os.environ, **env}, str(cwd))


def _run(
    arguments: list[str], env: dict[str, str], cwd: str
) -> subprocess.CompletedProcess[str] | None:
    """Do the same with these variables alone."""
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
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        job = {
            "arguments": arguments,
            "env": env,
            "cwd": cwd,
            "out": out.name,
            "err": err.name,
            "seconds": SECONDS,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [Path(file.name).read_text("utf-8") for file in (out, err)]
    return subprocess.CompletedProcess(arguments, code, *texts)


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
