"""Several adapters in one run: what comes of each is what a run of its own gives."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj as api
from safeproj.plan.select import Selection
from tests.conformance import oracle
from tests.conformance.architectures import Built
from tests.conftest import Trio
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_complete,
    assert_refused,
    change_json,
    read_json,
    safeproj,
    save_adapter,
    snapshot,
)

CHANGED = {"adapter_model.safetensors", "adapters.safetensors", "README.md", MANIFEST}
"""The files of a patched adapter that are not copied."""

OTHERS = {"checkpoint-5/adapter_config.json", "checkpoint-5/adapter_model.safetensors"}
"""Those of another adapter inside one, which are left out."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {},
    "beta": {"r": 8, "target_modules": ["q_proj", "up_proj", "down_proj"], "use_rslora": True},
    "dora": {"r": 2, "target_modules": "all-linear", "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "runs/step-2": {"r": 3, "lora_bias": True},
    "runs/step-10": {"target_modules": ["o_proj", "q_proj"], "modules_to_save": ["norm"]},
}
"""By name: what makes each of the PEFT adapters special."""

NAMES = ["alpha", "beta", "dora", "embedding", "half", "mlx", "runs/step-2", "runs/step-10"]
"""All adapters in the order of the reports; `half` is stored in bfloat16."""

NORM = "base_model.model.model.norm.weight"
LAYERS = ("--layers", "3")


@dataclass(frozen=True)
class Run:
    """What the command did with a directory of adapters.

    Attributes:
        adapters: the directory.
        out: what it wrote.
        result: what it printed.
    """

    adapters: Path
    out: Path
    result: subprocess.CompletedProcess[str]

    @property
    def found(self) -> Any:
        """The JSON report."""
        return json.loads(self.result.stdout)


def run(command: str, trio: Trio, *arguments: str | Path, **settings: Any) -> Any:
    """Run the command on the trio's models."""
    return safeproj(
        command, "--base", trio.base, "--aligned", trio.aligned, *arguments, **settings
    )  # fmt: skip


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(adapter / FACTORS)
    change(tensors)
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    return adapter


def as_mlx(adapter: Path, out: Path) -> Path:
    """Write a PEFT adapter as mlx-lm does: its factors are turned."""
    out.mkdir()
    tensors = {mlx_key(key): tensor.T.contiguous() for key, tensor in load_file(adapter).items()}
    save_file(tensors, out / "adapters.safetensors", metadata={"format": "mlx"})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
    (out / CONFIG).write_text(json.dumps(config), "utf-8")
    return out


def mlx_key(key: str) -> str:
    name = key.removeprefix("base_model.model.").removesuffix(".weight")
    return name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b")


@pytest.fixture(scope="module")
def adapters(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters of the trio's models, and of what is none."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items(), 11):
        save_adapter(trio.aligned_model, root / name, seed=seed, **settings)
    save_adapter(
        trio.aligned_model, root / "half", seed=9, r=5, target_modules=["q_proj", "k_proj"]
    )
    change_tensors(root / "half", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    change_tensors(root / "runs" / "step-10", lambda t: t[NORM].mul_(1.5))
    as_mlx(root / "alpha" / FACTORS, root / "mlx")
    shutil.copytree(root / "beta", root / "alpha" / "checkpoint-5")
    shutil.copytree(root / "beta", root / ".cache" / "hidden")
    (root / "runs" / "logs").mkdir()
    (root / "runs" / "logs" / "train.txt").write_text("loss 0.1")
    return root


@pytest.fixture(scope="module")
def many(trio: Trio, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All of them patched in one run."""
    out = tmp_path_factory.mktemp("many") / "out"
    result = run(
        "patch", trio, "--adapter", adapters, "--out", out, *LAYERS, "--format", "json",
        "--workers", "2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return Run(adapters, out, result)


@pytest.fixture(scope="module")
def single(trio: Trio, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of them patched in a run of its own, by what the command calls for one."""
    out = tmp_path_factory.mktemp("single")
    options = api.Options(selection=Selection(layers=3))
    for name in NAMES:
        (out / name).parent.mkdir(exist_ok=True)
        adapter = str(adapters / name)
        api.patch(trio.method, adapter, out / name, options)
    return out


def weights_of(adapter: Path) -> dict[str, Tensor]:
    return load_file(next(adapter.glob("adapter*.safetensors")))


def assert_alike(found: Any, expected: Any) -> None:
    """Compare two JSON objects: numbers to what the order of a float32 sum may change."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_alike(found[key], expected[key])
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_alike(*pair)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-6)
    else:
        assert found == expected


def assert_same_adapter(found: Path, expected: Path, given: Path) -> None:
    """Compare two patched adapters: what was projected to the order of a sum, the rest exactly."""
    projected = read_json(expected / MANIFEST)["output"]["projected"]
    assert projected
    before, wanted = weights_of(given), weights_of(expected)
    for key, tensor in weights_of(found).items():
        assert tensor.dtype == wanted[key].dtype
        if key in projected:
            rounding = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
            error = float((tensor.double() - wanted[key].double()).norm())
            assert error <= rounding * float(wanted[key].double().norm()), key
        else:
            assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key
    kept = snapshot(given).keys() - CHANGED - OTHERS
    copied = {name: content for name, content in snapshot(found).items() if name not in CHANGED}
    assert copied == {n: content for n, content in snapshot(given).items() if n in kept}


# --- the same as one by one


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_that_of_a_run_of_its_own(many: Run, single: Path, name: str) -> None:
    out = many.out / name
    assert_same_adapter(out, single / name, many.adapters / name)
    found, expected = (read_json(path / MANIFEST) for path in (out, single / name))
    assert found["output"].pop("tensors").keys() == expected["output"].pop("tensors").keys()
    assert_alike(found, expected)
    if name in ADAPTERS:
        assert_complete(out, many.adapters / name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_is_what_the_formula_says(trio: Trio, many: Run, name: str) -> None:
    pair = Built(trio.base, trio.aligned, trio.base_model, trio.aligned_model)
    manifest = oracle.check(pair, many.adapters / name, many.out / name)
    assert manifest["summary"]["projected"] == 3


def test_the_exact_projector_of_several(trio: Trio, adapters: Path, tmp_path: Path) -> None:
    names = ["beta", "dora", "embedding"]
    given = [part for name in names for part in ("--adapter", adapters / name)]
    result = run(
        "patch", trio, *given, "--out", tmp_path / "out", "--all", "--projector", "exact",
        "--rank", "3", "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)["reports"]) == names
    pair = Built(trio.base, trio.aligned, trio.base_model, trio.aligned_model)
    for name in names:
        oracle.check(pair, adapters / name, tmp_path / "out" / name, rank=3)


def test_formats_lie_side_by_side(many: Run) -> None:
    peft, mlx = (weights_of(many.out / name) for name in ("alpha", "mlx"))
    assert {mlx_key(key) for key in peft} == mlx.keys()
    for key, tensor in peft.items():
        error = float((mlx[mlx_key(key)].T - tensor).norm())
        assert error <= 1e-6 * float(tensor.norm()), key


def test_the_number_of_layers_applies_to_each(many: Run) -> None:
    for name, report in many.found["reports"].items():
        assert report["selection"] == {"mode": "layers", "layers": 3}
        ranked = sorted(report["modules"], key=lambda module: float(module["cosine"]))
        assert len(ranked) > 3
        assert [module["projected"] for module in ranked[:4]] == [True, True, True, False], name
        assert report["summary"]["projected"] == 3


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_output_does_not_depend_on_workers(
    trio: Trio, many: Run, tmp_path: Path, workers: str
) -> None:
    result = run(
        "patch", trio, "--adapter", many.adapters, "--out", tmp_path / "out", *LAYERS,
        "--format", "json", "--workers", workers,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == many.result.stdout
    assert snapshot(tmp_path / "out") == snapshot(many.out)


# --- the report


def test_the_report_has_those_of_all(many: Run) -> None:
    found = many.found
    assert list(found) == ["schema", "tool", "summary", "reports", "failures"]
    assert found["schema"] == "safeproj.reports/1"
    assert found["tool"]["name"] == "safeproj"
    assert found["summary"] == {"adapters": len(NAMES), "failed": 0}
    assert found["failures"] == {}
    assert list(found["reports"]) == NAMES
    for name, report in found["reports"].items():
        assert report["schema"] == "safeproj.report/1"
        assert Path(report["inputs"]["adapter"]["source"]) == many.adapters / name
        manifest = read_json(many.out / name / MANIFEST)
        assert report["modules"] == manifest["modules"]
        assert report["warnings"] == manifest["warnings"]


def test_nothing_else_is_written(many: Run) -> None:
    assert sorted(path.name for path in many.out.iterdir()) == [
        "alpha", "beta", "dora", "embedding", "half", "mlx", "runs",
    ]  # fmt: skip
    assert sorted(path.name for path in (many.out / "runs").iterdir()) == ["step-10", "step-2"]
    # A checkpoint of its training is another adapter, which was not patched.
    assert list(snapshot(many.out / "alpha" / "checkpoint-5")) == ["README.md"]
    assert set(read_json(many.out / "alpha" / MANIFEST)["output"]["left_out"]) == OTHERS


def test_warnings_say_which_adapter_is_meant(many: Run) -> None:
    *warnings, wrote, left, after = many.result.stderr.splitlines()
    assert wrote == f"wrote {many.out} (8 of 8 adapters)"
    assert left.startswith("left: ")
    assert f"--adapter {many.out} --harmful" in after
    expected = (
        "alpha: other weights are not patched, and left out: checkpoint-5/adapter_config.json",
        "dora: 14 modules are DoRA",
        "runs/step-10: 1 tensors change",
    )
    assert len(warnings) == len(expected)
    for line, words in zip(warnings, expected, strict=True):
        assert line.startswith(f"safeproj: warning: {words}")
    for report in many.found["reports"].values():
        assert not any(text.startswith(tuple(NAMES)) for text in report["warnings"])


def test_inspect_says_the_same(trio: Trio, many: Run, tmp_path: Path) -> None:
    before = snapshot(many.adapters)
    result = run(
        "inspect", trio, "--adapter", many.adapters, *LAYERS, "--format", "json", "--quiet",
        cwd=tmp_path,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    found, wanted = json.loads(result.stdout), json.loads(many.result.stdout)
    # Each names the adapter below in its own words, and once.
    for reports, words in ((wanted, "left out"), (found, "not looked at")):
        alpha = reports["reports"]["alpha"]
        (told,) = alpha["warnings"]
        assert words in told
        assert "checkpoint-5/adapter_model.safetensors" in told
        alpha["warnings"] = []
    assert found == wanted
    assert list(tmp_path.iterdir()) == []
    assert snapshot(many.adapters) == before


def test_a_dry_run_of_a_list_as_markdown_to_a_file(
    trio: Trio, adapters: Path, tmp_path: Path
) -> None:
    """Lines are relative to the current directory; one may be a directory of adapters."""
    (tmp_path / "list.txt").write_text("# ours\n\n  runs \n\t\n# and\nbeta\n", "utf-8")
    report = tmp_path / "report.md"
    result = run(
        "patch", trio, "--adapter", tmp_path / "list.txt", "--out", tmp_path / "out", *LAYERS,
        "--dry-run", "--format", "markdown", "--output", report,
        cwd=adapters,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "")
    *_, last, left, after = result.stderr.splitlines()
    assert last == "dry run: nothing written (3 of 3 adapters)"
    assert "would stay as they are" in left
    assert after == "next: the same without --dry-run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.txt", "report.md"]
    text = report.read_text("utf-8")
    table = text.split("### `step-2`\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| `step-2`", "4", "3"],
        ["| `step-10`", "4", "3"],
        ["| `beta`", "6", "3"],
    ]
    assert text.count("\n### `") == 3
    for source in ("runs/step-2", "runs/step-10", "beta"):
        assert f"- adapter: `{source}`" in text


def test_a_directory_of_one_is_many(trio: Trio, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "beta", tmp_path / "in" / "beta")
    result = run(
        "patch", trio, "--adapter", tmp_path / "in", "--out", tmp_path / "out", *LAYERS,
        "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)["reports"]) == ["beta"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["beta"]
    assert_complete(tmp_path / "out" / "beta", adapters / "beta")


# --- adapters that cannot be used


def set_nan(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def grow(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if "lora_A" in key:
            tensors[key] = torch.ones(tensor.shape[0], tensor.shape[1] + 8)


FAILURES = {
    "config": (f"{CONFIG} not found",),
    "nan": ("NaN or Inf", "lora_A"),
    "shapes": ("shapes do not fit", "self_attn", "[32, 32]"),
    "truncated": ("not a complete safetensors file", FACTORS),
}
"""The broken adapters, and what the message about each must say."""


@pytest.fixture(scope="module")
def mixed(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good adapters, the first and the last, and four that are damaged."""
    root = tmp_path_factory.mktemp("mixed")
    for name in ("alpha", *FAILURES):
        shutil.copytree(adapters / "alpha", root / name)
    shutil.copytree(adapters / "runs" / "step-2", root / "zeta")
    (root / "config" / CONFIG).unlink()
    change_tensors(root / "nan", set_nan)
    change_tensors(root / "shapes", grow)
    path = root / "truncated" / FACTORS
    path.write_bytes(path.read_bytes()[:-1])
    return root


def assert_failures(result: Any, names: list[str]) -> None:
    """Check the lines about adapters that failed: one each, last and in order."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "safeproj: error: " in line]
    assert errors == result.stderr.splitlines()[-len(names) :]
    assert len(errors) == len(names)
    for line, name in zip(errors, names, strict=True):
        assert line.startswith(f"safeproj: error: {name}: ")
        assert "unexpected" not in line
        for word in FAILURES[name]:
            assert word in line


def test_broken_adapters_do_not_stop_the_others(
    trio: Trio, mixed: Path, single: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "out", snapshot(mixed)
    result = run("patch", trio, "--adapter", mixed, "--out", out, *LAYERS, "--format", "json")

    assert_failures(result, list(FAILURES))
    assert f"wrote {out} (2 of 6 adapters)" in result.stderr.splitlines()
    assert sorted(path.name for path in out.iterdir()) == ["alpha", "zeta"]
    for name, other in (("alpha", "alpha"), ("zeta", "runs/step-2")):
        assert_complete(out / name, mixed / name)
        assert_same_adapter(out / name, single / other, mixed / name)
    assert snapshot(mixed) == before

    found = json.loads(result.stdout)
    assert found["summary"] == {"adapters": 2, "failed": 4}
    assert list(found["reports"]) == ["alpha", "zeta"]
    assert list(found["failures"]) == list(FAILURES)
    for name, failure in found["failures"].items():
        assert Path(failure["source"]) == mixed / name
        assert f"safeproj: error: {name}: {failure['error']}" in result.stderr.splitlines()


def test_inspect_shows_broken_adapters_too(trio: Trio, mixed: Path) -> None:
    names = ("truncated", "zeta", "config", "alpha")
    given = [part for name in names for part in ("--adapter", mixed / name)]
    result = run("inspect", trio, *given, *LAYERS, "--quiet")
    assert_failures(result, ["truncated", "config"])
    assert len(result.stderr.splitlines()) == 2  # errors are said even so
    head, *rows = (line.split() for line in result.stdout.splitlines())
    assert head[:4] == ["adapter", "modules", "would", "project"]
    assert [row[:3] for row in rows[:2]] == [["zeta", "4", "3"], ["alpha", "4", "3"]]
    assert [row[:2] for row in rows[2:]] == [["failed:", "truncated:"], ["failed:", "config:"]]


@pytest.fixture(scope="module")
def hopeless(trio: Trio, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on broken adapters alone."""
    root = tmp_path_factory.mktemp("hopeless")
    given = [part for name in ("nan", "truncated") for part in ("--adapter", mixed / name)]
    result = run("patch", trio, *given, "--out", root / "out", "--format", "markdown")
    return Run(mixed, root / "out", result)


def test_nothing_is_written_where_all_are_broken(hopeless: Run) -> None:
    assert_failures(hopeless.result, ["nan", "truncated"])
    assert list(hopeless.out.parent.iterdir()) == []
    for name in ("nan", "truncated"):
        assert f"- failed: `{name}`: " in hopeless.result.stdout


def test_nothing_is_said_to_be_written_where_nothing_was(hopeless: Run) -> None:
    assert "wrote" not in hopeless.result.stderr


def test_a_list_may_name_what_is_missing(trio: Trio, adapters: Path, tmp_path: Path) -> None:
    missing = "/missing/adapter/zeta"
    (tmp_path / "list.txt").write_text(f"{missing}\n{adapters / 'beta'}\n", "utf-8")
    out = tmp_path / "out"
    result = run("patch", trio, "--adapter", tmp_path / "list.txt", "--out", out, "--all")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"safeproj: error: zeta: {missing}: no such")
    assert [path.name for path in out.iterdir()] == ["beta"]
    assert_complete(out / "beta", adapters / "beta")


# --- what is refused as a whole


@dataclass(frozen=True)
class Copies:
    """Copies of the checkpoints and of two adapters, to be damaged."""

    root: Path

    def patch(self, *arguments: str | Path) -> Any:
        return safeproj(
            "patch", "--base", "base", "--aligned", "aligned", *arguments,
            cwd=self.root, env={"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def assert_refused(self, arguments: list[str], *words: str) -> None:
        """Run `patch`, which must refuse all in one line; no file may have changed."""
        before = snapshot(self.root)
        result = self.patch(*arguments)
        assert_refused(result, *words)
        assert result.stdout == ""
        assert snapshot(self.root) == before


@pytest.fixture
def copies(trio: Trio, adapters: Path, tmp_path: Path) -> Copies:
    for source in (trio.base, trio.aligned):
        shutil.copytree(source, tmp_path / source.name)
    for name in ("alpha", "beta"):
        shutil.copytree(adapters / name, tmp_path / "runs" / name)
    return Copies(tmp_path)


def shard_of(checkpoint: Path, weight: str) -> Path:
    index = read_json(checkpoint / "model.safetensors.index.json")
    return checkpoint / str(index["weight_map"][weight])


def no_checkpoint(root: Path) -> str:
    shutil.rmtree(root / "base")
    return "base: no such file or directory"


def nan_in_a_weight(root: Path) -> str:
    name = "model.layers.1.self_attn.v_proj.weight"  # of one of the two adapters
    shard = shard_of(root / "base", name)
    tensors = load_file(shard)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    return f"{name} has NaN or Inf"


def truncated_shard(root: Path) -> str:
    shard = shard_of(root / "aligned", "model.layers.0.self_attn.q_proj.weight")  # of both
    shard.write_bytes(shard.read_bytes()[:-1])
    return "not a complete safetensors file"


@pytest.mark.parametrize(
    "damage",
    [
        no_checkpoint,
        nan_in_a_weight,
        pytest.param(
            truncated_shard,
        ),
    ],
)
def test_a_broken_checkpoint_stops_all(copies: Copies, damage: Callable[[Path], str]) -> None:
    words = damage(copies.root)
    copies.assert_refused(["--adapter", "runs", "--out", "out", "--all"], words)


def test_an_empty_list_is_refused(copies: Copies) -> None:
    (copies.root / "list.txt").write_text("# nothing yet\n\n", "utf-8")
    copies.assert_refused(
        ["--adapter", "runs/alpha", "--adapter", "list.txt", "--out", "out"],
        "list.txt: an empty list",
    )


def test_two_adapters_of_one_name_are_refused(copies: Copies) -> None:
    shutil.copytree(copies.root / "runs" / "beta", copies.root / "other" / "alpha")
    copies.assert_refused(
        ["--adapter", "runs", "--adapter", "other/alpha", "--out", "out"],
        "runs/alpha", "other/alpha", "--adapter",
    )  # fmt: skip


def test_a_name_inside_anothers_place_is_refused(copies: Copies) -> None:
    shutil.copytree(copies.root / "runs" / "beta", copies.root / "other" / "alpha" / "beta")
    copies.assert_refused(
        ["--adapter", "other", "--adapter", "runs/alpha", "--out", "out"],
        "other/alpha/beta", "runs/alpha", "inside",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("runs", ("overlaps with --adapter runs/alpha",)),
        ("runs/beta/patched", ("overlaps with --adapter runs/beta",)),
        ("missing/out", ("missing is not an existing directory", "one directory for each")),
    ],
)
def test_where_out_cannot_be(copies: Copies, out: str, words: tuple[str, ...]) -> None:
    (copies.root / "list.txt").write_text("runs\n", "utf-8")
    copies.assert_refused(["--adapter", "list.txt", "--out", out], f"--out {out}: ", *words)


def test_the_report_replaces_no_file_of_an_input_in_a_list(copies: Copies) -> None:
    (copies.root / "list.txt").write_text("runs/alpha\nruns/beta\n", "utf-8")
    output = f"runs/alpha/{CONFIG}"
    copies.assert_refused(
        ["--adapter", "list.txt", "--out", "out", "--output", output], f"--output {output}: "
    )


def test_what_is_in_the_way_of_one_adapter(copies: Copies) -> None:
    out = copies.root / "out"
    shutil.copytree(copies.root / "runs" / "beta", out / "alpha")
    change_json(out / "alpha" / CONFIG, lora_alpha=1)
    before = snapshot(out / "alpha")

    kept = copies.patch("--adapter", "runs", "--out", "out", *LAYERS)
    assert kept.returncode == 1
    *_, wrote, _, _, error = kept.stderr.splitlines()
    assert wrote == "wrote out (1 of 2 adapters)"
    assert error.startswith("safeproj: error: alpha: --out out/alpha: exists; give --overwrite")
    assert snapshot(out / "alpha") == before
    assert_complete(out / "beta", copies.root / "runs" / "beta")

    replaced = copies.patch("--adapter", "runs", "--out", "out", *LAYERS, "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    assert sorted(path.name for path in out.iterdir()) == ["alpha", "beta"]
    for name in ("alpha", "beta"):
        assert_complete(out / name, copies.root / "runs" / name)
