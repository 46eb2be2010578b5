"""The covariance-weighted correction through the installed command, and back through PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from safeproj.lm.data import Data, random_data, read_data
from tests.conformance.oracle import save, updates
from tests.methods.covariance import oracle
from tests.methods.salora.models import build
from tests.report.test_schemas import validator
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_refused,
    change_json,
    read_json,
    safeproj,
    snapshot,
)

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-lm"
DATA = EXAMPLE / "data"
PREFIX = "base_model.model."
ARCHITECTURES = ("llama", "qwen2", "gpt2")


class Place(NamedTuple):
    """A model with a tokenizer, data, and statistics of it."""

    model: Any
    aligned: Path
    safety: Path
    task: Path
    safety_stats: Path
    task_stats: Path

    def data(self, path: Path) -> Data:
        return read_data(path, AutoTokenizer.from_pretrained(str(self.aligned)))

    def moments(self, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return `H`, and `S` with its ridge, of each layer, as the files hold them."""
        H, S = stored(self.safety_stats), stored(self.task_stats)
        return {name: H[name] for name in names}, {name: oracle.ridged(S[name]) for name in names}


def stored(path: Path) -> dict[str, Tensor]:
    """Return the moment (n, n) of each layer in a file, in float64."""
    with safe_open(path, framework="pt") as file:
        weights = json.loads(file.metadata()["safeproj"])["weights"]
    tensors, found = load_file(path), {}
    for name, each in weights.items():
        matrix = tensors[each["tensor"]].double()
        is_product = each["tensor"].endswith(".rows")
        found[name.removesuffix(".weight")] = matrix.T @ matrix if is_product else matrix
    return found


def head(source: Path, path: Path, rows: int) -> Path:
    """Write the first rows of a JSON lines file."""
    lines = source.read_text("utf-8").splitlines()[:rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def make(root: Path, architecture: str) -> Place:
    """Save a model with the example's tokenizer, and make statistics for it.

    Of the safety data there are fewer positions than inputs of a layer, of the task data more.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(EXAMPLE / "aligned"))
    model = build(architecture, vocab_size=len(tokenizer))
    aligned = root / "aligned"
    model.save_pretrained(str(aligned))
    tokenizer.save_pretrained(str(aligned))
    safety = head(DATA / "safety.jsonl", root / "safety.jsonl", 1)
    task = head(DATA / "task.jsonl", root / "task.jsonl", 20)
    place = Place(
        model,
        aligned,
        safety,
        task,
        root / "safety.stats.safetensors",
        root / "task.stats.safetensors",
    )
    for data, out in ((safety, place.safety_stats), (task, place.task_stats)):
        result = safeproj("stats", "--aligned", aligned, "--data", data, "--out", out)
        assert result.returncode == 0, result.stderr
        assert result.stderr.startswith(f"wrote {out} (")
    return place


@pytest.fixture(scope="module", params=ARCHITECTURES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make(tmp_path_factory.mktemp("llama"), "llama")


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    defaults = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **settings})


def patch(place: Place, adapter: Path, out: Path, *options: str | Path) -> Any:
    """Correct an adapter by the statistics, which must succeed; return the manifest."""
    result = safeproj("patch", *given(place, adapter, out), *options)
    assert result.returncode == 0, result.stderr
    return read_json(out / MANIFEST)


def given(place: Place, adapter: Path, out: Path | None = None) -> list[str | Path]:
    stats = ["--safety-data", place.safety_stats, "--task-data", place.task_stats]
    return [*stats, "--adapter", adapter, *(() if out is None else ("--out", out))]


def check(place: Place, adapter: Path, out: Path, mu: float, manifest: Any) -> None:
    """Check every update, as PEFT computes it, and every score against the oracle."""
    before, after = updates(place.model, adapter), updates(place.model, out)
    H, S = place.moments(list(before))
    assert [module["name"] for module in manifest["modules"]]
    assert {module["name"] for module in manifest["modules"]} == set(before)
    for module in manifest["modules"]:
        name = module["name"]
        delta, found = before[name].matrix.double(), after[name].matrix.double()
        expected = oracle.corrected(delta, H[name], S[name], mu)
        if module["projected"]:
            # lora_A is stored in float32, and what is left of it may be small.
            assert float((found - expected).norm() / delta.norm()) < 1e-6, name
        else:
            assert torch.equal(found, delta)
        assert module["cosine"] == pytest.approx(max(oracle.cosine(delta, expected), 0.0), abs=1e-4)
        ratios = (module["safety_ratio"], module["safety_ratio_after"])
        wanted = [oracle.ratio(each, H[name], S[name]) for each in (delta, expected)]
        assert ratios == pytest.approx(wanted, rel=1e-3)
        assert module["alignment_norm"] is None


SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {".*(v_proj|c_attn)": 1}, "alpha_pattern": {".*o_proj": 2}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_updates_are_what_the_oracle_says(
    place: Place, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = save(place.model, lora(**settings), tmp_path / "adapter")
    manifest = patch(place, adapter, tmp_path / "out", "--mu", "0.5")
    check(place, adapter, tmp_path / "out", 0.5, manifest)
    validator("manifest").validate(manifest)
    assert manifest["method"] == "covariance"
    assert manifest["projector"] == {"kind": "covariance", "mu": 0.5}
    assert manifest["selection"]["mode"] == "all"
    assert manifest["summary"]["pdst"] is None


def test_moments_are_those_of_what_layers_read(place: Place) -> None:
    for data, path in ((place.safety, place.safety_stats), (place.task, place.task_stats)):
        samples = [each.tokens for each in place.data(data).samples]
        found = stored(path)
        for name, rows in oracle.inputs(place.model, list(found), samples).items():
            expected = oracle.moment(rows)
            assert float((found[name] - expected).norm() / expected.norm()) < 1e-5, name


def test_only_lora_A_changes(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    manifest = patch(llama, adapter, tmp_path / "out")
    before, after = (load_file(path / FACTORS) for path in (adapter, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_A." in name}
    assert set(manifest["output"]["projected"]) == changed
    assert {after[name].dtype for name in after} == {torch.float32}
    assert read_json(adapter / CONFIG) == read_json(tmp_path / "out" / CONFIG)


def test_adalora(llama: Place, tmp_path: Path) -> None:
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=4, target_r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], total_step=10
    )
    adapter = save(llama.model, config, tmp_path / "adapter")
    manifest = patch(llama, adapter, tmp_path / "out", "--mu", "2")
    check(llama, adapter, tmp_path / "out", 2.0, manifest)


def test_the_bias_of_lora_B_stays_and_is_named(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(lora_bias=True), tmp_path / "adapter")
    manifest = patch(llama, adapter, tmp_path / "out")
    check(llama, adapter, tmp_path / "out", 0.3, manifest)
    named = {item["tensor"] for item in manifest["unprojected"]}
    assert named == {key for key in load_file(adapter / FACTORS) if key.endswith("B.bias")}


def test_dora_keeps_its_magnitudes(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(use_dora=True), tmp_path / "adapter")
    manifest = patch(llama, adapter, tmp_path / "out")
    check(llama, adapter, tmp_path / "out", 0.3, manifest)
    assert any("DoRA" in text for text in manifest["warnings"])


def test_low_precision_is_rounded_once(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    tensors = {name: each.bfloat16() for name, each in load_file(adapter / FACTORS).items()}
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    patch(llama, adapter, tmp_path / "kept")
    patch(llama, adapter, tmp_path / "wide", "--dtype", "float32")
    kept, wide = (load_file(tmp_path / name / FACTORS) for name in ("kept", "wide"))
    for name in (name for name in kept if ".lora_A." in name):
        assert kept[name].dtype == torch.bfloat16
        assert torch.equal(kept[name], wide[name].bfloat16())


@pytest.mark.parametrize("mode", ["threshold", "layers", "include", "exclude"])
def test_selections(llama: Place, tmp_path: Path, mode: str) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    everything = patch(llama, adapter, tmp_path / "all")
    cosines = {module["name"]: module["cosine"] for module in everything["modules"]}
    lowest = sorted(cosines, key=lambda name: cosines[name])
    middle = (cosines[lowest[4]] + cosines[lowest[5]]) / 2
    options = {
        "threshold": ["--threshold", str(middle)],
        "layers": ["--layers", "5"],
        "include": ["--include", r"mlp"],
        "exclude": ["--exclude", r"mlp"],
    }[mode]
    manifest = patch(llama, adapter, tmp_path / "out", *options)
    projected = {module["name"] for module in manifest["modules"] if module["projected"]}
    wanted = {
        "threshold": set(lowest[:5]),
        "layers": set(lowest[:5]),
        "include": {name for name in cosines if "mlp" in name},
        "exclude": {name for name in cosines if "mlp" not in name},
    }[mode]
    assert projected == wanted


def test_data_gives_what_statistics_of_it_give(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    from_stats = patch(llama, adapter, tmp_path / "stats")
    result = safeproj(
        "patch", "--method", "covariance", "--aligned", llama.aligned,
        "--safety-data", llama.safety, "--task-data", llama.task,
        "--adapter", adapter, "--out", tmp_path / "data",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    stats, data = (load_file(tmp_path / name / FACTORS) for name in ("stats", "data"))
    assert all(torch.equal(stats[name], data[name]) for name in stats)
    manifest = read_json(tmp_path / "data" / MANIFEST)
    assert manifest["inputs"]["safety_data"]["source"] == str(llama.safety)
    assert manifest["inputs"]["safety_data"]["data"] == "safety.jsonl"
    for role in ("safety_data", "task_data"):
        found, expected = (each["inputs"][role] for each in (manifest, from_stats))
        assert found["sha256"]["data"] == expected["sha256"]["data"]
        assert found["blake3"]["tensors"] == expected["blake3"]["tensors"]


def test_without_task_data_random_tokens_stand_for_it(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    result = safeproj(
        "patch", "--aligned", llama.aligned, "--safety-data", llama.safety,
        "--adapter", adapter, "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert manifest["inputs"]["task_data"]["source"] == "random tokens"
    before, after = updates(llama.model, adapter), updates(llama.model, tmp_path / "out")
    H, _ = llama.moments(list(before))
    tokenizer = AutoTokenizer.from_pretrained(str(llama.aligned))
    samples = [each.tokens for each in random_data(tokenizer).samples]
    special = set(tokenizer.all_special_ids)
    assert all(not set(tokens[1:]) & special for tokens in samples)
    seen = oracle.inputs(llama.model, list(before), samples)
    for name, update in before.items():
        S = oracle.ridged(oracle.moment(seen[name]))
        expected = oracle.corrected(update.matrix, H[name], S, 0.3)
        found = after[name].matrix.double()
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_many_adapters_in_one_run(llama: Place, tmp_path: Path) -> None:
    for seed in (1, 2):
        save(llama.model, lora(), tmp_path / "in" / f"a{seed}", seed=seed)
        patch(llama, tmp_path / "in" / f"a{seed}", tmp_path / f"one{seed}")
    (tmp_path / "many").mkdir()
    result = safeproj("patch", *given(llama, tmp_path / "in", tmp_path / "many"))
    assert result.returncode == 0, result.stderr
    for seed in (1, 2):
        one = load_file(tmp_path / f"one{seed}" / FACTORS)
        many = load_file(tmp_path / "many" / f"a{seed}" / FACTORS)
        # Their factors are corrected side by side, which may change the order of sums.
        assert all(torch.allclose(one[name], many[name], rtol=1e-5, atol=1e-7) for name in one)


@pytest.mark.parametrize("format_", ["table", "markdown", "json", "html"])
def test_inspect_shows_the_ratio(llama: Place, tmp_path: Path, format_: str) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    result = safeproj("inspect", *given(llama, adapter), "--format", format_)
    assert result.returncode == 0, result.stderr
    if format_ == "json":
        found = json.loads(result.stdout)
        validator("report").validate(found)
        assert {"safety_ratio", "safety_ratio_after"} <= found["modules"][0].keys()
        assert found["summary"]["safety_ratio"]["mean"] > 0
    else:
        assert "ratio" in result.stdout
        assert "mu 0.3" in result.stdout


def test_the_card_says_what_was_done(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    patch(llama, adapter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "corrected the updates of 14 of 14 adapted modules" in card
    assert "`safety.stats.safetensors`" in card or "safety data `" in card
    assert str(tmp_path) not in card


def test_a_gate_takes_the_record_and_the_computation(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    out = tmp_path / "out"
    patch(llama, adapter, out, "--mu", "0.1")
    stats = given(llama, adapter)[:4]
    options = (*stats, "--mu", "0.1", "--threshold", "0.999", "--format", "json")
    before = safeproj("check", adapter, *options)
    assert before.returncode == 1, before.stdout
    checked = safeproj("check", out, *options)
    assert checked.returncode == 0, checked.stdout
    again = safeproj("check", out, *options, "--original", adapter, "--evidence", "recomputed")
    assert again.returncode == 0, again.stdout
    verified = safeproj("verify", out, "--original", adapter, *stats)
    assert verified.returncode == 0, verified.stdout
    assert "14 recomputed" in verified.stdout
    other = safeproj("check", out, *stats, "--threshold", "0.999", "--format", "json")
    assert other.returncode == 1  # another mu than is recorded
    assert "SP022" in other.stdout


def test_a_gate_finds_a_factor_that_was_changed_afterwards(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    out = tmp_path / "out"
    patch(llama, adapter, out)
    before, after = (load_file(path / FACTORS) for path in (adapter, out))
    name = next(name for name in after if ".lora_A." in name)
    save_file(
        {**after, name: (before[name] + after[name]) / 2}, out / FACTORS, metadata={"format": "pt"}
    )
    found = safeproj("verify", out, "--original", adapter, *given(llama, adapter)[:4])
    assert found.returncode == 1
    assert "SP024" in found.stdout
    other = {**after, name.replace("lora_A", "lora_B"): after[name.replace("lora_A", "lora_B")] * 2}
    save_file(other, out / FACTORS, metadata={"format": "pt"})
    found = safeproj("verify", out, "--original", adapter, *given(llama, adapter)[:4])
    assert found.returncode == 1
    assert "SP025" in found.stdout


def test_a_gate_needs_statistics(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    result = safeproj(
        "check", adapter, "--aligned", llama.aligned, "--safety-data", llama.safety
    )  # fmt: skip
    assert_refused(result, "statistics are needed", "safeproj stats")


def test_the_file_says_what_it_was_made_of(llama: Place) -> None:
    with safe_open(llama.safety_stats, framework="pt") as file:
        record = json.loads(file.metadata()["safeproj"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert record["schema"] == "safeproj.statistics/1"
    assert record["inputs"]["data"]["source"] == "safety.jsonl"
    sample = llama.data(llama.safety).samples[0]
    assert record["inputs"]["data"]["positions"] == len(sample.tokens)
    assert len(record["weights"]) == 14
    assert len(tensors) == 8
    assert str(llama.aligned) not in json.dumps(record)
    assert all(name.endswith(".rows") for name in tensors)  # fewer positions than inputs
    assert all(
        name.endswith(".moment") for name in load_file(llama.task_stats) if "down" not in name
    )


def test_the_same_run_writes_the_same_file(llama: Place, tmp_path: Path) -> None:
    out = tmp_path / "again.stats.safetensors"
    safeproj("stats", "--aligned", llama.aligned, "--data", llama.safety, "--out", out)
    assert out.read_bytes() == llama.safety_stats.read_bytes()


def test_targets_and_random_tokens(llama: Place, tmp_path: Path) -> None:
    out = tmp_path / "q.stats.safetensors"
    result = safeproj(
        "stats", "--aligned", llama.aligned, "--random-tokens", "7", "--targets", "q_proj",
        "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "7 samples" in result.stderr
    assert {name.split(".")[4] for name in load_file(out)} == {"q_proj"}


# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "covariance"], ["--method covariance needs --safety-data"]),
        (["--safety-data", "x.jsonl"], ["--aligned"]),
        (["--safety-data", "x.stats.safetensors"], ["--aligned"]),
        (["--safety-data", "x.jsonl", "--base", "b", "--aligned", "a"], ["--base and --aligned"]),
        (["--task-data", "x.jsonl", "--aligned", "a"], ["--safety-data"]),
        (["--base", "b", "--aligned", "a", "--mu", "1"], ["--mu goes with --safety-data"]),
        (["--safety-data", "x.jsonl", "--aligned", "a", "--rank", "3"], ["--mu"]),
        (
            ["--safety-data", "x.jsonl", "--aligned", "a", "--method", "salora"],
            ["--method salora needs --safety-module"],
        ),
        (["--safety-data", "x.jsonl", "--aligned", "a", "--mu", "0"], ["--mu must be", "0.0"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_options_that_do_not_go_together(
    options: list[str], words: list[str], tmp_path: Path
) -> None:
    result = safeproj("patch", *options, "--adapter", "x", "--out", tmp_path / "out")
    assert_refused(result, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["embed_tokens", "lm_head"])
def test_what_statistics_do_not_hold_is_refused_by_name(
    llama: Place, tmp_path: Path, kind: str
) -> None:
    adapter = save(llama.model, lora(target_modules=["q_proj", kind]), tmp_path / "adapter")
    result = safeproj("patch", *given(llama, adapter, tmp_path / "out"))
    assert_refused(result, kind, "--exclude")
    assert not (tmp_path / "out").exists()
    manifest = patch(llama, adapter, tmp_path / "out", "--exclude", kind)
    assert sum(module["projected"] for module in manifest["modules"]) == 2


def test_data_that_is_none_is_refused(llama: Place, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "how do i"}\n', "utf-8")
    result = safeproj(
        "patch", "--aligned", llama.aligned, "--safety-data", bad,
        "--adapter", adapter, "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(result, "--safety-data", "bad.jsonl:1", "'response' is missing")
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(llama: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama.aligned, other)
    change_json(other / "config.json", rms_norm_eps=1e-3)
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    result = safeproj("patch", *given(llama, adapter, tmp_path / "out"), "--aligned", other)
    assert_refused(result, "statistics of another model")
    task = tmp_path / "task.stats.safetensors"
    safeproj("stats", "--aligned", other, "--data", llama.task, "--out", task)
    result = safeproj(
        "patch", "--safety-data", llama.safety_stats, "--task-data", task,
        "--adapter", adapter, "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(result, "statistics of different models")


def test_an_adapter_of_another_size_is_refused(llama: Place, tmp_path: Path) -> None:
    larger = build("llama", hidden_size=48)
    adapter = save(larger, lora(), tmp_path / "adapter")
    result = safeproj("patch", *given(llama, adapter, tmp_path / "out"))
    assert_refused(result, "shapes do not fit")


def rewritten(path: Path, source: Path, change: Any) -> Path:
    """Write a copy of statistics with other tensors or another record."""
    with safe_open(source, framework="pt") as file:
        record = json.loads(file.metadata()["safeproj"])
    tensors = load_file(source)
    change(record, tensors)
    save_file(tensors, path, metadata={"format": "pt", "safeproj": json.dumps(record)})
    return path


def _first(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if "q_proj" in name or "k_proj" in name)


def _nan(_: Any, tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors)][0, 0] = torch.nan


def _zero(_: Any, tensors: dict[str, Tensor]) -> None:
    for each in tensors.values():
        each.zero_()


def _negative(_: Any, tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors)].fill_diagonal_(-1e6)
    tensors[_first(tensors)][0, 0] = 1e9


DAMAGES = {
    "nan": (_nan, "NaN or Inf"),
    "zero": (_zero, "S is zero"),
    "no moment": (_negative, "not positive definite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_are_refused(llama: Place, tmp_path: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    damaged = rewritten(tmp_path / "damaged.stats.safetensors", llama.task_stats, change)
    before = snapshot(tmp_path)
    result = safeproj(
        "patch", "--safety-data", llama.safety_stats, "--task-data", damaged,
        "--adapter", adapter, "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(result, words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--data or --random-tokens"]),
        (["--data", "x", "--random-tokens", "3"], ["--data or --random-tokens"]),
        (["--random-tokens", "0"], ["0 rows"]),
        (["--random-tokens", "3", "--targets", "nothing"], ["--targets nothing"]),
        (["--random-tokens", "3", "--memory", "0"], ["--memory"]),
        (["--random-tokens", "3", "--batch-size", "0"], ["--batch-size"]),
    ],
    ids=["neither", "both", "none", "targets", "memory", "batch size"],
)
def test_stats_refuses(llama: Place, tmp_path: Path, options: list[str], words: list[str]) -> None:
    out = tmp_path / "x.stats.safetensors"
    result = safeproj("stats", "--aligned", llama.aligned, "--out", out, *options)
    assert_refused(result, *words)
    assert not list(tmp_path.iterdir())


def test_stats_replaces_only_statistics(llama: Place, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    options = ("--aligned", llama.aligned, "--random-tokens", "3", "--out", out)
    save_file({"x": torch.zeros(1)}, out)
    assert_refused(safeproj("stats", *options), "exists")
    assert_refused(safeproj("stats", *options, "--overwrite"), "no statistics")
    shutil.copyfile(llama.task_stats, out)
    assert safeproj("stats", *options, "--overwrite").returncode == 0
