"""The installed command as users and scripts see it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeproj import __version__
from tests.conftest import Trio
from tests.support import (
    assert_refused,
    blake3_of,
    change_json,
    installed,
    needs_terminal,
    on_terminal,
    read_json,
    safeproj,
    save_adapter,
)


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; sys.argv = ['safeproj', '--help']\n"
        "from safeproj.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "inspect" in found.stdout
    assert found.stdout.splitlines()[-1] == "False False"


def test_version() -> None:
    assert installed("--version").stdout == f"safeproj {__version__}\n"


def test_python_m_is_the_same_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "safeproj", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"safeproj {__version__}\n"


def test_inspect_prints_the_report_on_stdout_and_nothing_on_stderr(trio: Trio) -> None:
    result = installed("inspect", *trio.arguments)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "q_proj" in result.stdout
    assert "tau: projects" in result.stdout


def test_a_report_that_is_piped_looks_alike_everywhere(trio: Trio) -> None:
    narrow, wide = (safeproj("inspect", *trio.arguments, env={"COLUMNS": n}) for n in ("40", "300"))
    assert narrow.stdout == wide.stdout


def test_json_goes_to_a_file_if_wanted(trio: Trio, tmp_path: Path) -> None:
    result = safeproj(
        "inspect", *trio.arguments, "--format", "json", "--output", tmp_path / "report.json",
        "--threshold", "0.7",
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "")
    found = read_json(tmp_path / "report.json")
    assert found["selection"] == {"mode": "threshold", "threshold": 0.7}
    for module in found["modules"]:
        assert module["projected"] is (module["cosine"] <= 0.7)
    assert [module["name"] for module in found["modules"]] == [
        f"model.layers.{layer}.self_attn.{kind}"
        for layer in (0, 1)
        for kind in ("q_proj", "v_proj")
    ]


def test_dry_run_does_everything_but_the_writing(trio: Trio, tmp_path: Path) -> None:
    arguments = ["patch", *trio.arguments, "--out", str(tmp_path / "out"), "--all"]
    dry = safeproj(*arguments, "--dry-run", "--format", "json")
    assert dry.returncode == 0
    assert "nothing written" in dry.stderr
    assert list(tmp_path.iterdir()) == []
    wet = safeproj(*arguments, "--format", "json")
    assert wet.stdout == dry.stdout


def test_overwrite_replaces_an_adapter(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["patch", *trio.arguments, "--out", str(out), "--overwrite"]
    assert safeproj(*arguments, "--layers", "1").returncode == 0
    (out / "stale").write_text("from the first run")
    assert safeproj(*arguments, "--layers", "2").returncode == 0
    assert len(read_json(out / "safeproj.json")["output"]["projected"]) == 2
    assert not (out / "stale").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_the_same_run_writes_the_same_files(trio: Trio, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        out = tmp_path / name
        assert installed("patch", *trio.arguments, "--out", out, "--all").returncode == 0
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]


def test_include_and_exclude_leave_modules_unread(trio: Trio, tmp_path: Path) -> None:
    result = safeproj(
        "patch", *trio.arguments, "--out", tmp_path / "out", "--all", "--include", "layers.1",
        "--exclude", "v_proj$", "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    modules = {module["name"]: module for module in json.loads(result.stdout)["modules"]}
    assert len(modules) == 4
    projected = [name for name, module in modules.items() if module["projected"]]
    assert projected == ["model.layers.1.self_attn.q_proj"]
    assert modules["model.layers.0.self_attn.q_proj"]["cosine"] is None
    assert "--include" in modules["model.layers.0.self_attn.q_proj"]["note"]


def test_layers_zero_projects_nothing(trio: Trio, tmp_path: Path) -> None:
    result = safeproj("patch", *trio.arguments, "--out", tmp_path / "out", "--layers", "0")
    assert result.returncode == 0
    before = load_file(trio.adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_more_layers_than_modules_is_said(trio: Trio) -> None:
    result = safeproj("inspect", *trio.arguments, "--layers", "9")
    assert result.returncode == 0
    assert "--layers 9: only 4 modules" in result.stderr


def test_quiet_says_nothing_on_stderr(trio: Trio) -> None:
    assert safeproj("inspect", *trio.arguments, "--layers", "9", "-q").stderr == ""


def test_a_module_without_alignment_is_kept_and_named(trio: Trio, tmp_path: Path) -> None:
    aligned = tmp_path / "aligned"
    name = "model.layers.1.self_attn.q_proj"
    trio.aligned_model.save_pretrained(aligned)
    tensors = load_file(aligned / "model.safetensors")
    tensors[f"{name}.weight"] = trio.base_model.get_submodule(name).weight.detach().clone()
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})

    result = safeproj(
        "patch", "--base", trio.base, "--aligned", aligned, "--adapter", trio.adapter,
        "--out", tmp_path / "out", "--all",
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert f"no alignment signal (base and aligned are equal there) and are kept: {name}" in (
        result.stderr
    )
    modules = {m["name"]: m for m in read_json(tmp_path / "out" / "safeproj.json")["modules"]}
    assert modules[name]["cosine"] is None
    assert modules[name]["projected"] is False
    assert sum(module["projected"] for module in modules.values()) == 3


def test_an_untrained_module_is_an_empty_update(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", init_lora_weights=True)
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--out", tmp_path / "out", "--all", "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    modules = json.loads(result.stdout)["modules"]
    assert all("empty update" in module["note"] for module in modules)
    assert not any(module["projected"] for module in modules)


def test_a_bias_that_stays_beside_an_empty_update_is_listed(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", lora_bias=True)
    file = adapter / "adapter_model.safetensors"
    tensors = {k: t * ("lora_B.weight" not in k) for k, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    biases = [key for key in tensors if key.endswith(".lora_B.bias")]
    listed = json.loads(result.stdout)["unprojected"]
    assert sorted(item["tensor"] for item in listed) == sorted(biases)
    assert "4 tensors change weights or biases directly" in result.stderr


def test_patching_a_patched_adapter_is_warned_about(trio: Trio, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert safeproj("patch", *trio.arguments, "--out", first, "--all").returncode == 0
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", first,
        "--out", second, "--all",
    )  # fmt: skip
    assert "was patched before" in result.stderr
    previous = read_json(second / "safeproj.json")["inputs"]["adapter"]["previous"]
    assert previous == read_json(first / "safeproj.json")


def test_the_manifest_has_the_digests_of_what_was_read(trio: Trio, tmp_path: Path) -> None:
    assert safeproj("patch", *trio.arguments, "--out", tmp_path / "out").returncode == 0
    inputs = read_json(tmp_path / "out" / "safeproj.json")["inputs"]
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = trio.base_model.get_parameter(name).detach()
    assert inputs["base"]["blake3"]["tensors"][name] == blake3_of(weight)
    for role, root in (("base", trio.base), ("aligned", trio.aligned), ("adapter", trio.adapter)):
        assert inputs[role]["sha256"]["files"]
        for file, digest in inputs[role]["sha256"]["files"].items():
            assert digest == hashlib.sha256((root / file).read_bytes()).hexdigest()


def test_full_weight_changes_are_listed(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", modules_to_save=["lm_head"])
    file, key = adapter / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = load_file(file)
    tensors[key] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["unprojected"]
    assert found["tensor"] == key
    assert found["relative_change"] == pytest.approx(0.5)
    assert "lm_head.weight (modules_to_save, changed by 0.5)" in result.stderr


def test_adapters_below_another_are_named(trio: Trio, tmp_path: Path) -> None:
    """As PEFT writes a model of several adapters: the default one, the others below it."""
    adapter = tmp_path / "both"
    shutil.copytree(trio.adapter, adapter)
    shutil.copytree(trio.adapter, adapter / "other")
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter,
        "--threshold", "0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "other/adapter_model.safetensors" in result.stderr
    assert "not looked at" in result.stderr


def test_a_quantization_config_that_is_left_over_is_warned_about(
    trio: Trio, tmp_path: Path
) -> None:
    aligned = tmp_path / "aligned"
    shutil.copytree(trio.aligned, aligned)
    change_json(aligned / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    plain, left = (
        safeproj("inspect", "--base", trio.base, "--aligned", each, "--adapter", trio.adapter,
                 "--format", "json")
        for each in (trio.aligned, aligned)
    )  # fmt: skip
    assert left.returncode == 0, left.stderr
    found = json.loads(left.stdout)
    assert found["modules"] == json.loads(plain.stdout)["modules"]
    assert [text for text in found["warnings"] if "aligned" in text and "gptq" in text]
    assert not plain.stderr


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_of_a_mutated_base_are_converted(trio: Trio, tmp_path: Path, init: str) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter", init_lora_weights=init)
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter
    )
    assert result.returncode == 0, result.stderr
    assert f"init_lora_weights is '{init}'" in result.stderr
    assert "converted" in result.stderr


def test_rounding_to_a_short_dtype_is_warned_about(trio: Trio, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(trio.aligned_model, adapter)
    tiny = {
        key: (tensor * 1e-7 if "lora_B" in key else tensor)
        for key, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(tiny, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    arguments = [
        "patch", "--base", str(trio.base), "--aligned", str(trio.aligned),
        "--adapter", str(adapter), "--all", "--out",
    ]  # fmt: skip
    lossy = safeproj(*arguments, tmp_path / "float16", "--dtype", "float16")
    assert lossy.returncode == 0, lossy.stderr
    assert "use --dtype float32" in lossy.stderr
    assert safeproj(*arguments, tmp_path / "keep").stderr.count("warning") == 0


def test_verbose_shows_a_traceback(trio: Trio) -> None:
    result = installed(
        "inspect", "--base", trio.base, "--aligned", trio.base, "--adapter", trio.adapter, "-v"
    )
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "same model" in result.stderr.splitlines()[-1]


@needs_terminal
def test_a_terminal_shows_progress_and_colours(trio: Trio) -> None:
    code, shown = on_terminal("inspect", *trio.arguments, columns=120)
    assert code == 0
    assert "modules" in shown
    assert "\x1b[" in shown


def renamed(folder: Path, out: Path, *names: tuple[str, str]) -> Path:
    """Copy a checkpoint into one file, with other names for its tensors."""
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        for key, tensor in load_file(shard).items():
            for old, new in names:
                tensors[key.replace(old, new)] = tensor.clone()
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    shutil.copy(folder / "config.json", out)
    return out


def test_map_says_what_the_checkpoint_calls_a_weight(trio: Trio, tmp_path: Path) -> None:
    aligned = renamed(trio.aligned, tmp_path / "aligned", ("model.layers.", "blocks/"))
    arguments = [*trio.arguments, "--aligned", str(aligned)]
    refused = safeproj("inspect", *arguments)
    assert_refused(refused, str(aligned), "no weight for model.layers.0.", "--map")

    maps = ("--map", "model.layers.*=blocks/*", "--map", "model.layers.*=model.layers.*")
    result = safeproj("inspect", *arguments, *maps, "--format", "json")

    assert result.returncode == 0, result.stderr
    expected = safeproj("inspect", *trio.arguments, "--format", "json")
    assert json.loads(result.stdout)["modules"] == json.loads(expected.stdout)["modules"]


def test_two_weights_that_may_be_meant_are_listed(trio: Trio, tmp_path: Path) -> None:
    both = ("model.layers.", "model.model.layers."), ("model.layers.", "llm.model.layers.")
    aligned = renamed(trio.aligned, tmp_path / "aligned", *both)
    (aligned / "config.json").unlink()  # no architecture tells
    result = safeproj("inspect", *trio.arguments, "--aligned", aligned)
    first = "layers.0.self_attn.q_proj.weight"
    assert_refused(result, f"llm.model.{first}", f"model.model.{first}", "--map")


def test_profile_says_where_the_time_went(trio: Trio, tmp_path: Path) -> None:
    result = safeproj("patch", *trio.arguments, "--out", tmp_path / "out", "--profile", "--quiet")
    assert result.returncode == 0, result.stderr
    head, *lines, engine = result.stderr.splitlines()
    assert head.split() == ["phase", "seconds", "peak", "MB"]
    phases = {line[:16].strip(): [float(number) for number in line[16:].split()] for line in lines}
    assert list(phases) == ["import", "read adapter", "match", "fetch", "score", "decide", "write"]
    assert all(seconds >= 0 for seconds, *_ in phases.values())
    for word in ("GB read at", "GB/s effective", "workers", "reading", "hashing", "computing"):
        assert word in engine
