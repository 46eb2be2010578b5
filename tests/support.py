"""What several tests need: the installed command, tiny models, adapters, and the oracle."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from safeproj.storage.arrays import AnyArray, Array, from_torch, to_host, to_torch
from scripts.readme import PROGRESS
from tests.forks import SECONDS, Fork, begun

COMMAND = str(Path(sys.executable).parent / "safeproj")
"""The command as it is installed beside the interpreter that runs the tests."""

CONFIG = "adapter_config.json"
FACTORS = "adapter_model.safetensors"
MANIFEST = "safeproj.json"

Put = Callable[[Tensor], AnyArray]
"""Gives formulas a tensor as an array of a library that they compute with."""

both_engines = pytest.mark.parametrize("put", [from_torch, Tensor.detach], ids=["numpy", "torch"])
"""Runs a test of formulas once with each of these libraries."""


def for_each(
    names: str | tuple[str, ...], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with each of some arguments, as `parametrize` does, but as one test.

    For hundreds of cases that take less than what pytest does around a test. A failure names its
    case; fixtures are those of all cases.
    """
    own, cases = (names,) if isinstance(names, str) else names, list(cases)
    assert cases

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def all_of_them(**others: Any) -> None:
            for case in cases:
                values = (case,) if isinstance(names, str) else case
                try:
                    test(**dict(zip(own, values, strict=True)), **others)
                except (Exception, pytest.fail.Exception) as error:
                    raise AssertionError(f"{names} = {case!r}: {error}") from error

        signature = inspect.signature(test)
        kept = [each for name, each in signature.parameters.items() if name not in own]
        changed: Any = all_of_them
        changed.__signature__ = signature.replace(parameters=kept)
        return all_of_them

    return decorate


def tensor_of(array: AnyArray) -> Tensor:
    """Return an array of either library as a tensor."""
    return array if isinstance(array, Tensor) else to_torch(array)


def hosts(*arrays: AnyArray) -> Iterator[Array]:
    """Yield arrays of either library as those of the host."""
    return map(to_host, arrays)


def tensors_of(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return arrays of the host by name as tensors."""
    return {name: to_torch(each) for name, each in arrays.items()}


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return tensors by name as arrays of the host."""
    return {name: from_torch(each) for name, each in tensors.items()}


def safeproj(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    largest_file: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command and return what it printed, without importing everything again each time.

    Args:
        arguments: of the command.
        env: variables beside those of this process.
        cwd: where it runs; here if None.
        largest_file: bound on the bytes of the files that it writes.
    """
    return _completed(started(*arguments, env=env, cwd=cwd, largest_file=largest_file))


def installed(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the installed command from its start, and return what it printed."""
    return _completed(started(*arguments, env=env, cwd=cwd, anew=True))


def python_m(
    module: str, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module of a directory as `python -m` does, and return what it printed."""
    return _completed(started_m(module, *arguments, cwd=cwd, env=env))


def python_c(program: str, cwd: Path) -> str:
    """Run a program in a directory as `python -c` does, and return what it printed.

    It is put into a file there, or scripts that start processes would find no main module.
    """
    (cwd / "program.py").write_text(program, "utf-8")
    done = python_m("program", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started_m(
    module: str, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> Process:
    """Begin to run a module of a directory as `python -m` does."""
    words, variables = [str(each) for each in arguments], {**os.environ, **(env or {})}
    fork = begun(words, variables, str(cwd), module=module)
    return fork or _opened([sys.executable, "-m", module, *words], cwd=cwd, env=variables)


Process = subprocess.Popen[str] | Fork
"""A run of the command that goes on."""


def started(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    largest_file: int | None = None,
    anew: bool = False,
) -> Process:
    """Begin to run the command.

    Args:
        arguments: of the command.
        env: variables beside those of this process.
        cwd: where it runs; here if None.
        largest_file: bound on the bytes of the files that it writes.
        anew: from the start of the interpreter, and not in a fork that has imported everything.
    """
    words, variables = [str(each) for each in arguments], {**os.environ, **(env or {})}
    if not anew:
        fork = begun(words, variables, str(cwd or Path.cwd()), largest_file)
        if fork is not None:
            return fork

    def limit() -> None:
        import resource

        assert largest_file is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return _opened(
        [COMMAND, *words],
        env=variables,
        cwd=cwd,
        preexec_fn=None if largest_file is None else limit,
    )


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def on_terminal(
    *arguments: str | Path, columns: int = 80, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run the installed command on a pseudo-terminal; return its exit code and what was shown."""
    import fcntl
    import pty
    import struct
    import termios

    place, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: os.environ[name] for name in os.environ.keys() - {"COLUMNS", "NO_COLOR"}}
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=child,
        stderr=child,
        env={**kept, "TERM": "xterm-256color", **(env or {})},
    )
    os.close(child)
    shown = b""
    with suppress(OSError):  # Linux reports the end of a pseudo-terminal as an error
        while chunk := os.read(place, 4096):
            shown += chunk
    os.close(place)
    return process.wait(timeout=SECONDS), shown.decode().replace("\r\n", "\n")


def _opened(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def _completed(process: Process) -> subprocess.CompletedProcess[str]:
    # What runs in a fork ends itself in time.
    texts = (
        process.communicate() if isinstance(process, Fork) else process.communicate(timeout=SECONDS)
    )
    assert process.returncode is not None
    stdout, stderr = texts
    # However slow the machine is, tests compare the same.
    said = PROGRESS.sub("", stderr)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, said)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check the contract for unusable input: exit code 2, one line, no traceback, the facts."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("safeproj: error: ")
    assert "unexpected" not in lines[0]
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"


def tiny_llama(seed: int = 0, **settings: Any) -> Any:
    """Return a Llama model with random weights, small enough for a test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings}))


def moved(model: Any, size: float = 0.02, seed: int = 1) -> Any:
    """Return a copy of the model whose weights have all moved a little, as alignment does."""
    import copy

    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def dated_model(path: Path, model: Path) -> Path:
    """Copy a model, with a template that says what day it is in a word that it knows."""
    shutil.copytree(model, path)
    vocabulary = read_json(path / "tokenizer.json")["model"]["vocab"]
    names = [each for each in vocabulary if each.isalpha()][20:29]
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ " + json.dumps(names) + "[strftime_now('%d') | int % 9] }} "
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    return path


def save_adapter(model: Any, path: Path, seed: int = 2, **settings: Any) -> Path:
    """Put a LoRA adapter with random factors on the model and save it, as training would."""
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    }
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{**defaults, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name and name.endswith("bias"):
                parameter.normal_()
    adapted.save_pretrained(str(path))
    return path


def deltas(model: Any, adapter: Path) -> dict[str, Tensor]:
    """Return `ΔW` of every adapted module, as PEFT computes it from the adapter's files."""
    import copy

    from peft import PeftModel
    from peft.tuners.lora.layer import Linear

    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach().double()
        for name, module in loaded.named_modules()
        if isinstance(module, Linear)
    }


def oracle_C(W_aligned: Tensor, W_base: Tensor, rank: int | None = None) -> Tensor:
    """Return the projector (m, m), formed in float64 as the paper writes it.

    The fast form without a rank, `U_k U_kᵀ` from a singular value decomposition with one.
    """
    V: Tensor = W_aligned.double() - W_base.double()
    if rank is None:
        return (V @ V.T).div(V.norm())
    U: Tensor = torch.linalg.svd(V, full_matrices=False)[0][:, :rank]
    return torch.mm(U, U.T)


def oracle_cosine(delta: Tensor, C: Tensor) -> float:
    """Return `⟨ΔW, C ΔW⟩_F / (‖ΔW‖_F ‖C ΔW‖_F)` from dense float64 matrices."""
    projected = C @ delta.double()
    return float((delta.double() * projected).sum() / (delta.double().norm() * projected.norm()))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def change_json(path: Path, **values: object) -> None:
    """Set fields of a JSON object in a file."""
    path.write_text(json.dumps({**read_json(path), **values}), "utf-8")


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """Return everything below a directory: the content of files, the targets of links."""
    found: dict[str, bytes | str | None] = {}
    for directory, subdirectories, files in os.walk(root):
        for path in (Path(directory) / name for name in (*subdirectories, *files)):
            found[path.relative_to(root).as_posix()] = (
                str(path.readlink())
                if path.is_symlink()
                else path.read_bytes()
                if path.is_file()
                else None
            )
    return found


def blake3_of(tensor: Tensor) -> str:
    """Return the BLAKE3 of a tensor's bytes, as new records name it."""
    return blake3(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def assert_complete(out: Path, adapter: Path) -> None:
    """Check that `out` is all of the patched adapter, and no damaged part of it."""
    from safetensors.torch import load_file

    digests = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in load_file(out / FACTORS).items()
    }
    output = read_json(out / MANIFEST)["output"]
    assert digests == output["tensors"]
    assert read_json(out / CONFIG) == read_json(adapter / CONFIG)
    given, found = snapshot(adapter), snapshot(out)
    kept = given.keys() - set(output.get("left_out", ()))
    assert set(found) == {*kept, MANIFEST}
    assert {n for n in kept if found[n] != given[n]} == {FACTORS, "README.md"}


def save_safety_module(
    model: Any, path: Path, targets: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 6
) -> Path:
    """Write a safety module with random directions for layers of a model, by the end of a name.

    The leading singular values of each layer hold four fifths of the energy.
    """
    from torch import nn

    from safeproj.methods.recorded import recorded_document, write_recorded
    from safeproj.methods.salora.file import KIND
    from safeproj.names.layout import CONV1D, LINEAR

    generator = torch.Generator().manual_seed(3)
    tensors, parameters, weights = {}, [], {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        linear = isinstance(layer, nn.Linear)
        m, n = layer.weight.shape if linear else layer.weight.shape[::-1]
        values = torch.rand(rank, generator=generator).add(0.5).sort(descending=True).values
        U = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))[0]
        parameter = f"{name}.weight"
        tensors[f"{parameter}.U"], tensors[f"{parameter}.singular_values"] = U.float(), values
        parameters.append((parameter, tuple(layer.weight.shape), LINEAR if linear else CONV1D))
        energy = 1.25 * float(values.double().square().sum())
        weights[parameter] = {"shape": [m, n], "rank": rank, "energy": energy}
    inputs = {
        "aligned": {"source": "org/aligned", "revision": "abc", "sha256": {"files": {}}},
        "data": {"source": "safety.jsonl", "sha256": "0" * 64, "rows": 3, "positions": 70},
    }
    options = {"targets": list(targets), "rank": rank}
    config = model.config.to_dict()
    document = recorded_document(KIND, options, inputs, config, parameters, weights, by_torch=True)
    write_recorded(path, KIND, arrays_of(tensors).items(), lambda: document)
    return path
