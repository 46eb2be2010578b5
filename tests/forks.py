"""The command in forks of a process that has imported what it needs: `tests.support.safeproj`.

It is the installed command's own entry point with its own arguments, environment, directory, output
and exit code; only the seconds that imports take are not spent again each time. Tests of how the
command starts, is interrupted and ends use `tests.support.installed`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

SECONDS = 300
"""Nothing takes so long."""

_AT_IMPORT = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "PYTHON",
    "HOME", "XDG_", "LD_", "PATH",
)  # fmt: skip
"""Variables that are read, by name or by how they begin, when modules are imported."""

_SERVED = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Those of them for whose values a process is kept."""

_SERVERS = 3
"""Processes kept by one worker of the tests; each holds some 300 MB."""

_SERVER = r"""
import atexit, gc, importlib, json, os, pkgutil, signal, sys
import jinja2, numpy, peft, rich.progress, rich.table, safetensors.torch, torch
import transformers.conversion_mapping, transformers.core_model_loading, transformers.initialization
import transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
import safeproj, typer.main
for module in pkgutil.walk_packages(safeproj.__path__, "safeproj."):
    importlib.import_module(module.name)
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

_servers: OrderedDict[tuple[tuple[str, str], ...], subprocess.Popen[str]] = OrderedDict()


def _server(own: Mapping[str, str]) -> subprocess.Popen[str]:
    """Return a process that was started with these variables, the least used of many ends."""
    key = tuple(sorted(own.items()))
    if key not in _servers:
        while len(_servers) >= _SERVERS:
            process = _servers.popitem(last=False)[1]
            process.communicate()  # the end of its input ends it
        _servers[key] = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
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
    if not hasattr(os, "fork") or sys.platform == "darwin":  # where forks are not safe
        return None
    own = {
        name: value
        for name, value in env.items()
        if name.startswith(_AT_IMPORT) and os.environ.get(name) != value
    }
    if not own.keys() <= set(_SERVED):
        return None
    server = _server(own)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        job = {
            "arguments": arguments,
            "env": {**os.environ, **env},
            "cwd": str(cwd),
            "out": out.name,
            "err": err.name,
            "seconds": SECONDS,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [Path(file.name).read_text("utf-8") for file in (out, err)]
    return subprocess.CompletedProcess(arguments, code, *texts)
