"""Adapters that belong to what an initialisation left of the base weights, against PEFT itself.

PEFT computes the start of PiSSA and OLoRA again when it loads such an adapter, and takes it out of
the weights: what the model computes then is what the converted adapter must give on the weights as
they are, and the update of a weight is `W_res + ΔW - W`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj
from safeproj.adapter.peft_config import PLAIN_INITIALISATIONS, changed_base
from safeproj.errors import SafeprojError
from safeproj.plan.residual import PART, difference, olora, pissa
from safeproj.storage.arrays import from_torch, norm, to_torch
from tests.conformance.architectures import (
    GROUPED,
    Architecture,
    Built,
    build,
    save_pair,
)
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_refused,
    change_json,
    hosts,
    moved,
    oracle_C,
    oracle_cosine,
    read_json,
    save_safety_module,
)
from tests.support import (
    safeproj as command,
)

IDS = torch.tensor([[1, 7, 8, 9, 10, 3, 22, 5]])

KEEP = ("--threshold", "0")
"""Options of `patch` with which nothing is projected: cosines are positive."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5},
        "alpha_pattern": {"v_proj": 12},
    },
    "patterns-of-rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 6, "v_proj": 2}},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "with-an-embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "full-rank": {"r": 12},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("residual")


@pytest.fixture
def llama(root: Path) -> Built:
    return build("llama", root)


def base_of(layer: Any) -> Any:
    return layer.get_base_layer()


def trained(pair: Built, path: Path, init: Any, size: float = 0.02, **settings: Any) -> Path:
    """Save an adapter whose factors have moved from their start, and what it was beside it.

    `start` has the factors before training, as a conversion on saving needs them.
    """
    from peft import LoraConfig, get_peft_model

    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(4)
        model: Any = get_peft_model(
            copy.deepcopy(pair.aligned_model), LoraConfig(**given, init_lora_weights=init)
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(path / "start"))
        move(model, size)
        model.save_pretrained(str(path / "backup"))
        model.peft_config["default"].init_lora_weights = init
        model.save_pretrained(str(path / "adapter"))
    return path / "adapter"


def move(model: Any, size: float) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.add_(size * torch.randn_like(parameter))


def products(adapter: Path) -> dict[str, Tensor]:
    """Return `B A` by the name of `A`, float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(adapter / FACTORS).items()}
    return {
        key: tensors[key.replace("lora_A", "lora_B")] @ A
        for key, A in tensors.items()
        if "lora_A" in key
    }


def loaded(pair: Built, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(pair.aligned_model), str(adapter)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def updates(pair: Built, adapter: Path) -> dict[str, Tensor]:
    """Return by how much PEFT moves each adapted linear weight (m, n) in all, float64."""
    from peft.tuners.lora.layer import Linear

    found = {}
    for path, layer in loaded(pair, adapter).named_modules():
        if isinstance(layer, Linear):
            name = path.removeprefix("base_model.model.")
            before = pair.aligned_model.get_parameter(f"{name}.weight").detach().double()
            after = base_of(layer).weight.detach().double()
            delta = layer.get_delta_weight("default").detach().double()
            found[name] = after + delta - before
    return found


def patch(pair: Built, adapter: Path, out: Path, *options: str) -> Any:
    result = command(
        "patch", "--base", pair.base, "--aligned", pair.aligned, "--adapter", adapter,
        "--out", out, *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def check(pair: Built, adapter: Path, *options: str | Path) -> Any:
    return command("check", adapter, "--base", pair.base, "--aligned", pair.aligned, *options)


def method_of(pair: Built) -> safeproj.SafeLora:
    return safeproj.SafeLora(str(pair.base), str(pair.aligned))


def inspect(pair: Built, adapter: Path) -> Any:
    return safeproj.inspect(method_of(pair), str(adapter))


def close(found: Tensor, wanted: Tensor, scale: Tensor, error: float = 3e-6) -> bool:
    """Tell whether two are equal but for float32's rounding of something of this size."""
    return float((found.double() - wanted.double()).norm()) <= error * float(scale.double().norm())


# --- the same function


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_converted_adapter_is_what_peft_computes(
    llama: Built, tmp_path: Path, init: str, settings: dict[str, Any]
) -> None:
    adapter = trained(llama, tmp_path, init, **settings)
    patch(llama, adapter, tmp_path / "out", *KEEP)
    wanted = logits(loaded(llama, adapter))
    found = loaded(llama, tmp_path / "out")
    assert close(logits(found), wanted, wanted)
    without = logits(llama.aligned_model)
    assert not close(without, wanted, wanted, 1e-3)  # the adapter does something
    for name, update in updates(llama, adapter).items():
        weight = llama.aligned_model.get_parameter(f"{name}.weight").detach()
        layer = found.base_model.model.get_submodule(name)
        assert close(layer.get_delta_weight("default").detach(), update, weight), name


def test_the_config_is_that_of_a_plain_adapter_of_twice_the_rank(
    llama: Built, tmp_path: Path
) -> None:
    adapter = trained(llama, tmp_path, "pissa", **SETTINGS["patterns"])
    result = patch(llama, adapter, tmp_path / "out", *KEEP)
    assert "init_lora_weights is 'pissa'" in result.stderr
    before, after = (read_json(tmp_path / at / CONFIG) for at in ("adapter", "out"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert (after["init_lora_weights"], after["r"], after["lora_alpha"]) == (True, 6, 10)
    assert list(after["rank_pattern"].values()) == [10]
    assert list(after["alpha_pattern"].values()) == [24]
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert manifest["inputs"]["adapter"]["converted_from"] == "pissa"
    assert list(manifest["output"]["documents"]) == [CONFIG]
    assert any("converted" in warning for warning in manifest["warnings"])
    assert "converted" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not (tmp_path / "out" / FACTORS).samefile(adapter / FACTORS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_true_update_is_scored_and_projected(llama: Built, tmp_path: Path, init: str) -> None:
    adapter = trained(llama, tmp_path, init, target_modules="all-linear")
    patch(llama, adapter, tmp_path / "out", "--all")
    reported = {m["name"]: m for m in read_json(tmp_path / "out" / MANIFEST)["modules"]}
    after = updates(llama, tmp_path / "out")
    true = updates(llama, adapter)
    assert reported.keys() == after.keys() == true.keys()
    for name, update in true.items():
        weights = (m.get_parameter(f"{name}.weight").detach()
                   for m in (llama.aligned_model, llama.base_model))  # fmt: skip
        W_aligned, W_base = weights
        C = oracle_C(W_aligned, W_base)
        assert reported[name]["cosine"] == pytest.approx(oracle_cosine(update, C), abs=2e-4), name
        assert close(after[name], C @ update, C @ W_aligned.double(), 1e-5), name
        assert reported[name]["rank"] == 6


def test_the_written_factors_do_not_cancel(llama: Built, tmp_path: Path) -> None:
    """PEFT's own conversion is a small difference of large products, which bfloat16 loses."""
    adapter = trained(llama, tmp_path, "pissa")
    patch(llama, adapter, tmp_path / "out", *KEEP)
    tensors = load_file(tmp_path / "out" / FACTORS)
    for name, A in tensors.items():
        if "lora_A" in name:
            B = tensors[name.replace("lora_A", "lora_B")].double()
            exact, rounded = B @ A.double(), B.bfloat16().double() @ A.bfloat16().double()
            assert float((rounded - exact).norm()) < 0.01 * float(exact.norm()), name


def test_a_layer_that_stores_the_input_first(root: Path, tmp_path: Path) -> None:
    pair = build("gpt2", root)
    targets: dict[str, Any] = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    adapter = trained(pair, tmp_path / "pissa", "pissa", **targets)
    patch(pair, adapter, tmp_path / "out", *KEEP)
    wanted = logits(loaded(pair, adapter))
    assert close(logits(loaded(pair, tmp_path / "out")), wanted, wanted)
    targets["target_modules"] = ["attn.c_proj"]  # square: only there do the shapes fit
    adapter = trained(pair, tmp_path / "olora", "olora", **targets)
    with pytest.raises(SafeprojError, match="as stored, which is the transpose"):
        inspect(pair, adapter)


def test_excluded_modules_are_converted_too(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "pissa")
    patch(llama, adapter, tmp_path / "out", *KEEP, "--exclude", "q_proj")
    wanted = logits(loaded(llama, adapter))
    assert close(logits(loaded(llama, tmp_path / "out")), wanted, wanted)


def test_an_adapter_that_was_not_trained_has_no_update(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "pissa", size=0.0)
    assert [module.cosine for module in inspect(llama, adapter).modules] == [None] * 4


def test_the_workers_do_not_matter(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "pissa", target_modules="all-linear")
    for workers in ("1", "3"):
        patch(llama, adapter, tmp_path / workers, "--all", "--workers", workers)
    assert (tmp_path / "1" / FACTORS).read_bytes() == (tmp_path / "3" / FACTORS).read_bytes()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_starts_are_those_of_peft_whatever_the_shape(shape: tuple[int, int]) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    for name, start in (("pissa", pissa), ("olora", olora)):
        dense = torch.nn.Linear(shape[1], shape[0], bias=False)
        W = dense.weight.detach().clone().double()
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=name)  # type: ignore[arg-type]
        layer = Linear(dense, "default", config=config, r=3, lora_alpha=6)
        own = start(from_torch(W), 3, 2.0)
        theirs = (W - base_of(layer).weight.detach().double()) / 2.0
        assert close(to_torch(own.L @ own.R), theirs, W)
        A, B = (f["default"].state_dict()["weight"].double() for f in (layer.lora_A, layer.lora_B))
        A2, B2 = map(to_torch, difference(from_torch(A + 0.1), from_torch(B), own))
        assert (A2.shape, B2.shape) == ((6, shape[1]), (shape[0], 6))
        assert close(B2 @ A2, B @ (A + 0.1) - theirs, W)


# --- where there is nothing to convert it with


def test_an_alignment_file_does_not_have_the_weights(llama: Built, tmp_path: Path) -> None:
    adapter, file = trained(llama, tmp_path, "pissa"), tmp_path / "a.safealign.safetensors"
    made = command("align", "--base", llama.base, "--aligned", llama.aligned, "--out", file)
    assert made.returncode == 0, made.stderr
    result = command("inspect", "--alignment", file, "--adapter", adapter)
    assert_refused(result, "init_lora_weights is 'pissa'", "give --base and --aligned")
    gate = command("check", adapter, "--alignment", file)
    assert gate.returncode == 1
    assert "SP010" in gate.stdout


def test_a_safety_module_does_not_have_the_weights(llama: Built, tmp_path: Path) -> None:
    file = save_safety_module(llama.aligned_model, tmp_path / "m.safety.safetensors")
    adapter = trained(llama, tmp_path, "olora")
    result = command(
        "patch", "--safety-module", file, "--adapter", adapter, "--out", tmp_path / "out"
    )  # fmt: skip
    assert_refused(result, "init_lora_weights is 'olora'", "give --base and --aligned")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_shares_what_the_start_changes(tmp_path: Path) -> None:
    settings = {**GROUPED, "tie_word_embeddings": True}
    base = Architecture("LlamaForCausalLM", "LlamaConfig", settings).build()
    pair = save_pair(tmp_path / "tied", base, moved(base))
    adapter = trained(pair, tmp_path, "pissa", target_modules=["lm_head", "q_proj"])
    with pytest.raises(SafeprojError, match="lm_head cannot be converted: shares its weight"):
        inspect(pair, adapter)


def test_layers_that_share_a_weight(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "pissa")
    change_json(adapter / CONFIG, layer_replication=[[0, 1], [0, 1]])
    with pytest.raises(SafeprojError, match="shares its weight"):
        inspect(llama, adapter)


def test_a_scaling_of_zero_has_no_start(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "pissa")
    change_json(adapter / CONFIG, lora_alpha=0)
    with pytest.raises(SafeprojError, match="scaled by 0; expected more than 0"):
        inspect(llama, adapter)


@pytest.mark.parametrize("name", PLAIN_INITIALISATIONS)
def test_names_that_leave_the_weights_alone(name: str) -> None:
    assert changed_base({"init_lora_weights": name}) is None


def test_mica_passes_the_gate(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "mica")
    assert "SP010" not in check(llama, adapter).stdout


# --- where the model is run


def test_a_model_gets_the_converted_adapter(llama: Built, tmp_path: Path) -> None:
    """As sweeps and --reconstruct put it on: from files, on the weights as they are."""
    from safeproj.lm.adapters import attach_read
    from safeproj.run.job import Job

    adapter = trained(llama, tmp_path, "pissa")
    job = Job(method_of(llama), None)
    found = job.runnable(job.read(str(adapter))).adapter
    model = attach_read(copy.deepcopy(llama.aligned_model), found)
    wanted = logits(loaded(llama, adapter))
    assert close(logits(model), wanted, wanted)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = llama.aligned_model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("init", ["pissa_niter_4", "lora_ga"])
def test_what_peft_puts_on_other_weights_is_not_measured(
    llama: Built, tmp_path: Path, init: str
) -> None:
    from safeproj.lm.adapters import attach
    from safeproj.storage.source import open_folder

    adapter = trained(llama, tmp_path, "pissa_niter_4")
    change_json(adapter / CONFIG, init_lora_weights=init)
    with pytest.raises(SafeprojError, match="other weights than it was trained on"):
        attach(copy.deepcopy(llama.aligned_model), open_folder(str(adapter)))


# --- the gate


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_gate_scores_the_true_update_and_fails(llama: Built, tmp_path: Path, init: str) -> None:
    adapter = trained(llama, tmp_path, init)
    (found,) = safeproj.check(method_of(llama), [str(adapter)]).checks
    assert "SP010" in {each.id for each in found.findings}
    assert found.report is not None
    wanted = inspect(llama, adapter).modules
    assert [each.name for each in found.report.modules] == [each.name for each in wanted]
    for one, other in zip(found.report.modules, wanted, strict=True):
        rounded = {"cosine": one.cosine, "scale": one.scale}  # casts share a product with them
        for name, value in rounded.items():
            assert value == pytest.approx(getattr(other, name), abs=1e-6), (one.name, name)
        assert dataclasses.replace(other, **rounded) == one


def test_what_was_converted_and_patched_passes_beside_its_original(
    llama: Built, tmp_path: Path
) -> None:
    adapter = trained(llama, tmp_path, "pissa")
    patch(llama, adapter, tmp_path / "out", "--all")
    for options in ((), ("--evidence", "recomputed", "--original", adapter)):
        result = check(
            llama, tmp_path / "out", "--threshold", "0.99", "--max-size", "100", *options
        )
        assert result.returncode == 0, result.stdout
    models = ("--base", llama.base, "--aligned", llama.aligned)
    result = command("verify", tmp_path / "out", "--original", adapter, *models)
    assert result.returncode == 0, result.stdout
    tensors = load_file(tmp_path / "out" / FACTORS)
    key = next(name for name in tensors if "lora_A" in name)
    tensors[key][0] *= -1
    save_file(tensors, tmp_path / "out" / FACTORS)
    result = command("verify", tmp_path / "out", "--original", adapter, *models)
    assert "SP025" in result.stdout


def test_a_config_changed_after_conversion_is_noticed(llama: Built, tmp_path: Path) -> None:
    adapter = trained(llama, tmp_path, "pissa")
    patch(llama, adapter, tmp_path / "out", "--all")
    change_json(tmp_path / "out" / CONFIG, lora_alpha=100)
    result = check(llama, tmp_path / "out", "--original", adapter)
    assert "SP021" in result.stdout
    assert "SP025" in result.stdout


# --- what says that it is plain, and is not


@pytest.mark.parametrize("what", ["start", "backup"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_of_the_weights_is_no_update(
    llama: Built, tmp_path: Path, init: str, what: str
) -> None:
    """LLaMA-Factory writes `pissa_init` and `pissa_backup` so."""
    trained(llama, tmp_path, init)
    adapter = tmp_path / what
    assert read_json(adapter / CONFIG)["init_lora_weights"] is True
    result = command(
        "patch", "--base", llama.base, "--aligned", llama.aligned, "--adapter", adapter,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(result, "are a part of the weight itself", "pissa_converted")
    assert not (tmp_path / "out").exists()
    gate = check(llama, adapter)
    assert gate.returncode == 1
    assert "SP010" in gate.stdout
    change_json(adapter / CONFIG, init_lora_weights=init)  # as the message advises
    inspect(llama, adapter)


def test_a_backup_in_which_training_moved_much(llama: Built, tmp_path: Path) -> None:
    trained(llama, tmp_path, "pissa", size=0.1)
    before, after = (products(tmp_path / name) for name in ("start", "backup"))
    moved_by = [float((after[n] - P).norm() / P.norm()) for n, P in before.items()]
    assert min(moved_by) > 0.4
    with pytest.raises(SafeprojError, match="part of the weight"):
        inspect(llama, tmp_path / "backup")


def test_what_peft_converted_is_plain(llama: Built, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trained(llama, tmp_path, "pissa")
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"
    )
    model: Any = get_peft_model(copy.deepcopy(llama.aligned_model), config)
    move(model, 0.02)
    out = tmp_path / "converted"
    start = str(tmp_path / "start")
    model.save_pretrained(str(out), path_initial_model_for_weight_conversion=start)
    assert "SP010" not in check(llama, out).stdout
    theirs, ours = (inspect(llama, path) for path in (out, tmp_path / "adapter"))
    for one, other in zip(theirs.modules, ours.modules, strict=True):
        assert one.cosine == pytest.approx(other.cosine, abs=2e-4)


HONEST: dict[str, tuple[float, int]] = {
    "small": (0.01, 4),
    "usual": (0.1, 8),
    "large": (1.0, 8),
    "huge": (10.0, 4),
    "full-rank": (0.1, 32),
}


@pytest.mark.parametrize(("size", "rank"), HONEST.values(), ids=HONEST)
def test_honest_updates_are_no_part_of_the_weights(size: float, rank: int) -> None:
    from safeproj.plan.residual import share

    torch.manual_seed(0)
    for m, n in ((64, 64), (96, 32), (32, 96)):
        shapes = (m, n), (rank, n), (m, rank)
        W, A, B = hosts(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
        s = size * norm(W) / norm(B @ A)
        assert share(W, A, B, s) < PART / 2
        assert share(W, A, B, None) < PART
        # An extracted difference that only strengthens or weakens the weight's leading part.
        start = pissa(W, min(rank, m, n), 1.0)
        for factor in (0.2, -0.2, -1.0):
            assert share(W, start.R, start.L, factor) < PART
        assert share(W, start.R, start.L, 1.0) == pytest.approx(1.0)
