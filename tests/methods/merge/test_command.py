"""Merging with a safe adapter through the command, as PEFT loads the result."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conformance.architectures import ARCHITECTURES, Built, build
from tests.conformance.oracle import save, updates
from tests.methods.merge import oracle
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_refused,
    change_json,
    oracle_C,
    oracle_cosine,
    read_json,
    safeproj,
)

ERROR = 1e-6
"""Relative to `‖ΔW'‖`: factors are written in float32, 6e-8 per rounding."""

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture
def llama(root: Path) -> Built:
    return build("llama", root)


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": QV, **settings})


def both(pair: Built, path: Path, own: dict[str, Any], safe: dict[str, Any]) -> tuple[Path, Path]:
    """Save an adapter and a safe one, with other factors."""
    return (
        save(pair.aligned_model, lora(**own), path / "adapter"),
        save(pair.aligned_model, lora(**safe), path / "safe", seed=7),
    )


def models(pair: Built) -> list[str]:
    return ["--base", str(pair.base), "--aligned", str(pair.aligned)]


def patch(adapter: Path, safe: Path, out: Path, *options: str | Path) -> Any:
    """Run the command, which must succeed, and return the record."""
    result = safeproj("patch", adapter, "--safe-adapter", safe, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return read_json(out / MANIFEST)


def check(
    pair: Built,
    adapter: Path,
    safe: Path,
    out: Path,
    *,
    weight: float = 0.2,
    rank: int | None = None,
    chosen: set[str] | None = None,
) -> None:
    """Compare every update of the result, as PEFT runs it, with the oracle.

    Args:
        pair: the models.
        adapter: what was patched.
        safe: the safe adapter.
        out: the result.
        weight: `λ`.
        rank: of the best approximation, None where the result is exact.
        chosen: the modules that were merged, all if None.
    """
    before, other, after = (updates(pair.aligned_model, each) for each in (adapter, safe, out))
    reported = {module["name"]: module for module in read_json(out / MANIFEST)["modules"]}
    assert reported.keys() == before.keys() == after.keys()
    for name, update in before.items():
        module, is_chosen = reported[name], chosen is None or name in chosen
        assert module["projected"] is is_chosen, name
        W_base, W_aligned = update.weight(pair.base_model), update.weight(pair.aligned_model)
        cosine = oracle_cosine(update.matrix, oracle_C(W_aligned, W_base))
        assert module["cosine"] == pytest.approx(cosine, abs=2e-6), name
        if not is_chosen:
            assert torch.equal(after[name].matrix, update.matrix), name
            assert after[name].rank == update.rank, name
            continue
        wanted = oracle.merged(update.matrix, other[name].matrix if name in other else None, weight)
        error = 0.0
        if rank is not None:
            wanted, error = oracle.best(wanted, rank)
        assert module["merge_error"] == pytest.approx(error, abs=ERROR), name
        off = float((after[name].matrix - wanted).norm() / wanted.norm())
        assert off <= ERROR, (name, off)
        change = float((wanted - update.matrix).norm() / update.matrix.norm())
        assert module["merge_change"] == pytest.approx(change, rel=1e-5), name
        assert module["scale"] == pytest.approx(float(wanted.norm() / update.matrix.norm()))
        own = other[name].rank if name in other else 0
        assert after[name].rank == module["written_rank"] == (rank or update.rank + own), name


# --- exactly

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same settings": ({}, {}),
    "other ranks and scalings": ({}, {"r": 5, "lora_alpha": 3}),
    "rsLoRA": ({"use_rslora": True}, {"r": 2}),
    "of rsLoRA": ({"r": 4, "lora_alpha": 8}, {"r": 2, "use_rslora": True}),
    "all linear layers": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "embeddings and heads": (
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "r": 2},
    ),
    "modules that one of both has": (
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["q_proj", "k_proj"]},
    ),
    "patterns": (
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {r"layers\.[1-9]\..*q_proj": 1, "up_proj": 4},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 9, "k_proj": 2},
            "use_rslora": True,
        },
        {"target_modules": ["q_proj", "k_proj", "up_proj"], "alpha_pattern": {"q_proj": 1}},
    ),
}


@pytest.mark.parametrize(("own", "safe"), CASES.values(), ids=CASES)
def test_an_exact_merge_is_the_formula(
    llama: Built, tmp_path: Path, own: dict[str, Any], safe: dict[str, Any]
) -> None:
    adapter, other = both(llama, tmp_path, own, safe)
    patch(adapter, other, tmp_path / "out", *models(llama), "--all")
    check(llama, adapter, other, tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_conv1d_and_convolutions(root: Path, tmp_path: Path, name: str) -> None:
    pair = build(name, root)
    targets = {"gpt2": ["c_attn", "c_fc"], "whisper": ["conv1", "conv2", "fc1"]}[name]
    own = {"target_modules": targets, "fan_in_fan_out": name == "gpt2"}
    adapter, other = both(pair, tmp_path, own, {**own, "r": 2})
    patch(adapter, other, tmp_path / "out", *models(pair), "--all", "--weight", "0.5")
    check(pair, adapter, other, tmp_path / "out", weight=0.5)


def test_bfloat16_is_rounded_once(llama: Built, tmp_path: Path) -> None:
    adapter, other = both(llama, tmp_path, {}, {"r": 2})
    for place in (adapter, other):
        tensors = {key: each.bfloat16() for key, each in load_file(place / FACTORS).items()}
        save_file(tensors, place / FACTORS, metadata={"format": "pt"})
    patch(adapter, other, tmp_path / "out", *models(llama), "--all")
    before, safe, after = (load_file(p / FACTORS) for p in (adapter, other, tmp_path / "out"))
    s, s_safe = 5 / 3, 5 / 2
    for key, B in before.items():
        assert after[key].dtype == torch.bfloat16
        if "lora_A" in key:
            assert torch.equal(after[key], torch.cat([B, safe[key]])), key
        else:
            wanted = torch.cat([0.8 * B.double(), 0.2 * s_safe / s * safe[key].double()], dim=1)
            assert torch.equal(after[key], wanted.float().bfloat16()), key


def test_the_biases_of_lora_B_are_merged(llama: Built, tmp_path: Path) -> None:
    settings = {"lora_bias": True}
    adapter, other = both(llama, tmp_path, settings, {**settings, "r": 2})
    patch(adapter, other, tmp_path / "out", *models(llama), "--all")
    check(llama, adapter, other, tmp_path / "out")
    places = (adapter, other, tmp_path / "out")
    before, safe, after = (updates(llama.aligned_model, place) for place in places)
    for name, update in before.items():  # PEFT scales the bias, too
        s, s_safe = 5 / 3, 5 / 2
        biases = [each[name].bias for each in (before, safe, after)]
        own, its, found = (each.double() for each in biases if each is not None)
        wanted = 0.8 * s * own + 0.2 * s_safe * its
        assert torch.allclose(s * found, wanted, rtol=1e-5), update.parameter


@pytest.mark.parametrize("options", [["--layers", "1"], ["--threshold", "0.12"], []], ids=str)
def test_modules_are_chosen_by_the_cosine_of_safe_lora(
    llama: Built, tmp_path: Path, options: list[str]
) -> None:
    adapter, other = both(llama, tmp_path, {}, {"r": 4})
    result = safeproj("inspect", adapter, *models(llama), "--format", "json")
    assert result.returncode == 0, result.stderr
    cosines = {each["name"]: each["cosine"] for each in json.loads(result.stdout)["modules"]}
    ranked = sorted(cosines, key=lambda name: cosines[name])
    chosen = {name for name in ranked if cosines[name] <= 0.35}
    if options:
        at_most = float(options[1]) if options[0] == "--threshold" else -1.0
        chosen = {name for name in ranked if cosines[name] <= at_most} or {ranked[0]}
        if options[0] == "--threshold":
            options = ["--threshold", str(cosines[ranked[1]])]
            chosen = set(ranked[:2])
    patch(adapter, other, tmp_path / "out", *models(llama), *options)
    check(llama, adapter, other, tmp_path / "out", chosen=chosen)
    before, after = (load_file(place / FACTORS) for place in (adapter, tmp_path / "out"))
    for key, tensor in before.items():
        if not any(name in key for name in chosen):
            assert torch.equal(after[key], tensor), key


def test_an_alignment_file_chooses_likewise(llama: Built, tmp_path: Path) -> None:
    adapter, other = both(llama, tmp_path, {}, {})
    file = tmp_path / "x.safealign.safetensors"
    made = safeproj("align", *models(llama), "--exact", "--out", file)
    assert made.returncode == 0, made.stderr
    patch(adapter, other, tmp_path / "out", "--alignment", file, "--all")
    check(llama, adapter, other, tmp_path / "out")


def test_all_modules_of_one_rank_need_no_patterns(llama: Built, tmp_path: Path) -> None:
    """Some readers know none: what most modules have is what the config says of all."""
    adapter, other = both(llama, tmp_path, {"lora_alpha": 6}, {"r": 5})
    patch(adapter, other, tmp_path / "out", *models(llama), "--all")
    config = read_json(tmp_path / "out" / CONFIG)
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    given = read_json(adapter / CONFIG)
    changed = {key for key in given if given[key] != config[key]}
    assert changed == {"r", "lora_alpha"}
    assert given.keys() == config.keys()


# --- without models


def test_without_models_all_modules_are_merged(llama: Built, tmp_path: Path) -> None:
    adapter, other = both(llama, tmp_path, {}, {"r": 2})
    manifest = patch(adapter, other, tmp_path / "out", "--weight", "0.7")
    places = (adapter, other, tmp_path / "out")
    before, safe, after = (updates(llama.aligned_model, place) for place in places)
    assert manifest["selection"] == {"mode": "all"}
    for module in manifest["modules"]:
        name = module["name"]
        delta = before[name].matrix
        wanted = oracle.merged(delta, safe[name].matrix, 0.7)
        assert float((after[name].matrix - wanted).norm() / wanted.norm()) <= ERROR
        cosine = float((delta * wanted).sum() / (delta.norm() * wanted.norm()))
        assert module["cosine"] == pytest.approx(cosine, abs=1e-9)
        assert module["alignment_norm"] is None


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_without_models_nothing_is_chosen_by_a_cosine(
    llama: Built, tmp_path: Path, command: str
) -> None:
    """And a gate has nothing to look at: the cosine of an update and its merge is near 1."""
    adapter, other = both(llama, tmp_path, {}, {})
    given = ["--threshold", "0.5"] if command == "inspect" else []
    result = safeproj(command, adapter, "--safe-adapter", other, *given)
    assert_refused(result, "chosen by Safe LoRA's cosine", "give --base and --aligned")


# --- the best approximation


@pytest.mark.parametrize("rank", [None, 1, 5])
def test_the_best_approximation_of_a_rank(llama: Built, tmp_path: Path, rank: int | None) -> None:
    adapter, other = both(llama, tmp_path, {}, {"r": 4})
    wanted = ["--merge-form", "low-rank"] if rank is None else ["--merge-rank", str(rank)]
    manifest = patch(adapter, other, tmp_path / "out", *models(llama), "--all", *wanted)
    check(llama, adapter, other, tmp_path / "out", rank=rank or 3)
    assert any("best approximation" in each for each in manifest["warnings"])
    if rank is None:
        assert (tmp_path / "out" / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()


def test_a_rank_that_holds_all_of_it_loses_nothing(llama: Built, tmp_path: Path) -> None:
    adapter, other = both(llama, tmp_path, {}, {"r": 4})
    manifest = patch(
        adapter, other, tmp_path / "out", *models(llama), "--all", "--merge-rank", "100"
    )
    check(llama, adapter, other, tmp_path / "out")
    assert {module["merge_error"] for module in manifest["modules"]} == {0.0}
    assert not any("approximation" in each for each in manifest["warnings"])


def test_experts_keep_their_rank(root: Path, tmp_path: Path) -> None:
    """All experts of a stack lie in one tensor, of one rank."""
    pair = build("granitemoe", root)
    stacks = ARCHITECTURES["granitemoe"].stacks(pair.aligned_model)
    own = {"target_modules": ["q_proj"], "target_parameters": stacks[:1]}
    adapter, other = both(pair, tmp_path, own, own)
    refused = safeproj(
        "patch", adapter, "--safe-adapter", other, *models(pair), "--all", "--out", tmp_path / "x"
    )
    assert_refused(refused, "shares its tensors", "--merge-form low-rank")
    assert not (tmp_path / "x").exists()
    patch(adapter, other, tmp_path / "out", *models(pair), "--all", "--merge-form", "low-rank")
    check(pair, adapter, other, tmp_path / "out", rank=3)


# --- factor by factor, as the reference code


def test_factors_one_by_one_are_what_peft_merges(llama: Built, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter, other = both(llama, tmp_path, {}, {"lora_alpha": 2})
    manifest = patch(
        adapter, other, tmp_path / "out", *models(llama), "--all", "--merge-form", "factor-wise"
    )
    model = PeftModel.from_pretrained(copy.deepcopy(llama.aligned_model), str(adapter)).double()
    model.load_adapter(str(other), "safe")
    model = model.double()
    model.add_weighted_adapter(["default", "safe"], [0.8, 0.2], "merged", combination_type="linear")
    before, safe, after = (
        updates(llama.aligned_model, place) for place in (adapter, other, tmp_path / "out")
    )
    layers = dict(model.named_modules())
    for module in manifest["modules"]:
        name = module["name"]
        wanted = layers[f"base_model.model.{name}"].get_delta_weight("merged").detach()
        found = after[name].matrix
        assert float((found - wanted).norm() / wanted.norm()) <= ERROR, name
        exact = oracle.merged(before[name].matrix, safe[name].matrix, 0.2)
        error = float((wanted - exact).norm() / exact.norm())
        assert module["merge_error"] == pytest.approx(error, rel=1e-5), name
        assert error > 0.1
    assert any("cross terms" in each for each in manifest["warnings"])


# --- what cannot be merged

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], tuple[str, ...]]] = {
    "DoRA": ({"use_dora": True}, {}, [], ("is DoRA", "--exclude")),
    "a safe DoRA": ({}, {"use_dora": True}, [], ("is DoRA", "expected a plain LoRA")),
    "ranks that differ": (
        {},
        {"r": 2},
        ["--merge-form", "factor-wise"],
        ("rank 3", "and 2 in", "equal ranks"),
    ),
    "a bias without a place": ({}, {"lora_bias": True}, [], ("has a bias", "none in")),
    "no module of both": (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["up_proj"]},
        [],
        ("changes none of the 2 modules",),
    ),
    "a portable one": ({}, {}, ["--portable"], ("--portable needs one rank",)),
    "a rank of no approximation": (
        {},
        {},
        ["--merge-rank", "2", "--merge-form", "exact"],
        ("--merge-rank goes with --merge-form low-rank",),
    ),
    "a weight of nothing": ({}, {}, ["--weight", "0"], ("--weight must lie in (0, 1]",)),
}


@pytest.mark.parametrize(("own", "safe", "options", "words"), SETTINGS.values(), ids=SETTINGS)
def test_what_cannot_be_merged_is_refused(
    llama: Built,
    tmp_path: Path,
    own: dict[str, Any],
    safe: dict[str, Any],
    options: list[str],
    words: tuple[str, ...],
) -> None:
    adapter, other = both(llama, tmp_path, own, safe)
    out = tmp_path / "out"
    result = safeproj(
        "patch", adapter, "--safe-adapter", other, *models(llama), "--all", "--out", out, *options
    )
    assert_refused(result, *words)
    assert not out.exists()


def test_a_safe_adapter_of_another_model_is_refused(
    llama: Built, root: Path, tmp_path: Path
) -> None:
    adapter = save(llama.aligned_model, lora(), tmp_path / "adapter")
    wide = build("mistral", root)
    other = save(wide.aligned_model, lora(), tmp_path / "safe")
    options = ["--safe-adapter", str(other), "--out", str(tmp_path / "out")]
    assert_refused(safeproj("patch", adapter, *options), "shapes do not fit", "same model")
    assert_refused(safeproj("patch", adapter, *options, *models(llama)), "shapes do not fit")
    missing = ["--safe-adapter", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert_refused(safeproj("patch", adapter, *missing), "none")
    assert not (tmp_path / "out").exists()


def test_a_head_with_more_rows_than_its_weight_is_refused(llama: Built, tmp_path: Path) -> None:
    """The rows beyond would get another `A`, and there is nothing to choose them by."""
    host = copy.deepcopy(llama.aligned_model)
    host.resize_token_embeddings(44, mean_resizing=False)
    targets = ["q_proj", "lm_head"]
    adapter = save(host, lora(target_modules=targets), tmp_path / "adapter", change_copies=False)
    other = save(host, lora(target_modules=targets), tmp_path / "safe", seed=7)
    options = ["--safe-adapter", str(other), *models(llama), "--all"]
    options += ["--out", str(tmp_path / "out")]
    refused = safeproj("patch", adapter, *options)
    assert_refused(refused, "lm_head has other rows than the weight", "--exclude")
    result = safeproj("patch", adapter, *options, "--exclude", "lm_head")
    assert result.returncode == 0, result.stderr


def test_other_formats_keep_their_rank(llama: Built, tmp_path: Path) -> None:
    from tests.adapter.test_mlx import as_mlx, mlx_updates

    own, other = both(llama, tmp_path, {"r": 4, "lora_alpha": 8}, {"r": 2})
    adapter = as_mlx(own, tmp_path / "mlx")
    options = ["--safe-adapter", str(other), *models(llama), "--all"]
    options += ["--out", str(tmp_path / "out")]
    refused = safeproj("patch", adapter, *options)
    assert_refused(refused, "only adapters of PEFT", "--merge-form low-rank")
    result = safeproj("patch", adapter, *options, "--merge-form", "low-rank")
    assert result.returncode == 0, result.stderr
    found = mlx_updates(tmp_path / "out", 2.0)
    before, safe = (updates(llama.aligned_model, place) for place in (own, other))
    for name, update in before.items():
        wanted = oracle.best(oracle.merged(update.matrix, safe[name].matrix, 0.2), 4)[0]
        assert float((found[name] - wanted).norm() / wanted.norm()) <= ERROR, name


def test_a_safe_adapter_may_be_of_another_format(llama: Built, tmp_path: Path) -> None:
    from tests.adapter.test_mlx import as_mlx

    adapter, other = both(llama, tmp_path, {}, {"r": 4, "lora_alpha": 8})
    mlx = as_mlx(other, tmp_path / "mlx")
    patch(adapter, mlx, tmp_path / "out", *models(llama), "--all")
    check(llama, adapter, other, tmp_path / "out")


# --- the gate


@pytest.mark.parametrize(
    "options",
    [[], ["--layers", "1"], ["--merge-rank", "4"], ["--merge-form", "low-rank", "--weight", "1"]],
    ids=str,
)
def test_the_gate_takes_what_was_merged(llama: Built, tmp_path: Path, options: list[str]) -> None:
    own = {"target_modules": ["q_proj", "up_proj"]}
    adapter, other = both(llama, tmp_path, own, {"r": 2})
    out, given = tmp_path / "out", ["--safe-adapter", str(other), *models(llama)]
    patch(adapter, other, out, *models(llama), *(options or ["--all"]))
    verified = safeproj("verify", out, "--original", adapter, *given)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    settings = [each for each in options if "--layers" not in options]
    checked = safeproj(
        "check", out, "--original", adapter, *given, *settings, "--threshold", "0.01"
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_gate_tells_what_was_not(llama: Built, tmp_path: Path) -> None:
    adapter, other = both(llama, tmp_path, {}, {"r": 2})
    out, given = tmp_path / "out", ["--safe-adapter", str(other), *models(llama)]
    patch(adapter, other, out, *models(llama), "--layers", "2")
    another = save(llama.aligned_model, lora(r=2), tmp_path / "another", seed=9)
    result = safeproj(
        "check", out, "--safe-adapter", another, *models(llama), "--threshold", "0.99"
    )
    assert result.returncode == 1
    assert "the safe adapter in safeproj.json is another one" in result.stdout
    result = safeproj("verify", out, "--original", adapter, "--safe-adapter", another,
                      *models(llama))  # fmt: skip
    assert result.returncode == 1
    assert "SP024" in result.stdout
    change_json(out / CONFIG, lora_alpha=100)  # which would undo the weight of both
    result = safeproj("verify", out, "--original", adapter, *given)
    assert result.returncode == 1
    assert f"{CONFIG} differs from the original's" in result.stdout
