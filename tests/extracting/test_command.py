"""Full fine-tunes as adapters, through the command and as PEFT loads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conformance.architectures import Built, build
from tests.conformance.oracle import updates
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_refused,
    read_json,
    safeproj,
    snapshot,
)

RANK = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extract")


def tuned(model: Any, size: float = 0.02, low: float = 0.1, seed: int = 4) -> Any:
    """Return a fine-tune: a change of rank 3 and some of full rank, and norms that moved."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                m, n = parameter.shape
                parameter.add_(low * torch.randn(m, 3) @ torch.randn(3, n))
            parameter.add_(size * torch.randn_like(parameter))
    return model


def save(model: Any, path: Path, **settings: Any) -> Path:
    model.save_pretrained(path, **settings)
    return path


def extract(model: Path, aligned: Path, out: Path, *options: str) -> Any:
    """Run the command, which must succeed, and return its report."""
    result = safeproj(
        "extract", "--model", model, "--aligned", aligned, "--out", out, "--format", "json",
        *(options or ("--rank", str(RANK))),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def change(name: str, model: Any, aligned: Any) -> Tensor:
    """Return `W_ft - W_aligned` (m, n), float64."""
    layers = dict(model.named_modules())
    weights = (dict(each.named_modules())[name].weight for each in (model, aligned))
    found, before = (each.detach().double() for each in weights)
    delta: Tensor = found - before
    return delta.T if type(layers[name]).__name__ == "Conv1D" else delta


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_the_adapter_is_the_best_of_its_rank(root: Path, tmp_path: Path, name: str) -> None:
    pair = build(name, root)
    model = tuned(pair.aligned_model)
    found = save(model, tmp_path / "model", max_shard_size="20KB")
    report = extract(found, pair.aligned, tmp_path / "out")
    loaded = updates(pair.aligned_model, tmp_path / "out")
    modules = {each["name"]: each for each in report["modules"]}
    linear = [each for each in loaded if not each.endswith("lm_head")]
    assert sorted(modules) == sorted(linear)
    for path, module in modules.items():
        delta = change(path, model, pair.aligned_model)
        S = torch.linalg.svdvals(delta)
        error = float((loaded[path].matrix - delta).norm() / delta.norm())
        assert error <= 1.01 * float(S[RANK:].norm() / S.norm()), path
        assert module["relative_error"] == pytest.approx(error, rel=1e-3), path
        assert module["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert module["shape"] == list(delta.shape)
        assert loaded[path].rank == module["rank"] == RANK
    squares = [(each["relative_error"] * each["norm"]) ** 2 for each in modules.values()]
    whole = [each["norm"] ** 2 for each in modules.values()]
    total = (sum(squares) / sum(whole)) ** 0.5
    assert report["summary"]["relative_error"] == pytest.approx(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_adapter_is_found_again(root: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """To the rounding of the checkpoint."""
    from peft import PeftModel

    pair = build("llama", root)
    torch.manual_seed(5)
    model, aligned = (copy.deepcopy(pair.aligned_model).to(dtype) for _ in range(2))
    with torch.no_grad():
        for path, layer in model.named_modules():
            if path.endswith(("q_proj", "down_proj")):
                m, n = layer.weight.shape
                layer.weight.add_((torch.randn(m, 2) @ torch.randn(2, n)).to(dtype))
    places = save(model, tmp_path / "model"), save(aligned, tmp_path / "aligned")
    report = extract(*places, tmp_path / "out", "--rank", "2")
    assert {each["kind"] for each in report["modules"]} == {"q_proj", "down_proj"}
    assert report["left_out"] == []
    largest = max(each["relative_error"] for each in report["modules"])
    assert largest < (1e-5 if dtype is torch.float32 else 0.05)
    if dtype is torch.float32:
        tokens = torch.arange(8)[None]
        loaded = PeftModel.from_pretrained(aligned, str(tmp_path / "out"))
        with torch.no_grad():
            assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-3)


def test_what_the_adapter_does_not_hold_is_listed(root: Path, tmp_path: Path) -> None:
    pair = build("llama", root)
    model = tuned(pair.aligned_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(pair.aligned_model.get_input_embeddings().weight)
    found = save(model, tmp_path / "model")
    report = extract(found, pair.aligned, tmp_path / "out", "--rank", "4", "--targets", "q_proj")
    before, after = pair.aligned_model.state_dict(), model.state_dict()
    listed = {each["tensor"]: each["relative_change"] for each in report["left_out"]}
    wanted = {
        name: float((after[name].double() - before[name].double()).norm() / before[name].norm())
        for name in before
        if "q_proj" not in name and not torch.equal(before[name], after[name])
    }
    assert listed == pytest.approx(wanted, rel=1e-6)
    assert "model.norm.weight" in listed
    assert "model.embed_tokens.weight" not in listed
    warning = next(each for each in report["warnings"] if "does not hold" in each)
    assert warning.startswith(f"{len(wanted)} tensors")
    assert {each["kind"] for each in report["modules"]} == {"q_proj"}


def test_small_weights_have_smaller_ranks(root: Path, tmp_path: Path) -> None:
    pair = build("llama", root)
    model = tuned(pair.aligned_model)
    report = extract(save(model, tmp_path / "m"), pair.aligned, tmp_path / "out", "--rank", "20")
    loaded = updates(pair.aligned_model, tmp_path / "out")
    config = read_json(tmp_path / "out" / CONFIG)
    ranks = {each["name"]: min(20, *each["shape"]) for each in report["modules"]}
    assert {name: loaded[name].rank for name in ranks} == ranks
    smaller = {name: rank for name, rank in ranks.items() if rank < 20}
    assert config["rank_pattern"] == config["alpha_pattern"] == smaller
    assert smaller
    for name in smaller:
        delta = change(name, model, pair.aligned_model)
        assert float((loaded[name].matrix - delta).norm() / delta.norm()) < 1e-6


def test_it_can_be_projected_and_pass_the_gate(root: Path, tmp_path: Path) -> None:
    pair = build("llama", root)
    found = save(tuned(pair.aligned_model, low=0.02), tmp_path / "model")
    extract(found, pair.aligned, tmp_path / "out")
    models = ["--base", str(pair.base), "--aligned", str(pair.aligned)]
    loose = ["--threshold", "0", "--max-size", "1e9", "--max-outside", "1e9"]
    loose += ["--max-unseen", "1e9", "--ignore", "SP013"]
    checked = safeproj("check", tmp_path / "out", *models, *loose)
    assert checked.returncode == 0, checked.stdout
    assert "SP021" not in checked.stdout
    patched = safeproj("patch", tmp_path / "out", *models, "--all", "--out", tmp_path / "safe")
    assert patched.returncode == 0, patched.stderr
    assert "patched before" not in patched.stderr
    verified = safeproj("verify", tmp_path / "safe", "--original", tmp_path / "out", *models)
    assert verified.returncode == 0, verified.stdout
    record = read_json(tmp_path / "out" / MANIFEST)
    assert record["schema"] == "safeproj.extract/1"
    assert record["inputs"]["model"]["blake3"]["tensors"]
    assert str(tmp_path) not in json.dumps(record)
    tensors = load_file(tmp_path / "out" / FACTORS)
    tensors = {key: 2 * each for key, each in tensors.items()}
    save_file(tensors, tmp_path / "out" / FACTORS, metadata={"format": "pt"})
    checked = safeproj("check", tmp_path / "out", *models, *loose)
    assert checked.returncode == 1
    assert "SP021" in checked.stdout


def test_the_result_depends_on_no_workers(root: Path, tmp_path: Path) -> None:
    pair = build("llama", root)
    found = save(tuned(pair.aligned_model), tmp_path / "model", max_shard_size="9KB")
    for workers in ("1", "2"):
        options = ("--rank", "4", "--workers", workers)
        extract(found, pair.aligned, tmp_path / workers, *options)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


# --- what cannot be extracted


@pytest.fixture
def pair(root: Path) -> Built:
    return build("llama", root)


def refused(model: Path, pair: Built, out: Path, *options: str | Path) -> Any:
    rank = () if "--rank" in options else ("--rank", "4")
    before = snapshot(out.parent)
    result = safeproj(
        "extract", "--model", model, "--aligned", pair.aligned, "--out", out, *rank, *options
    )
    assert snapshot(out.parent) == before
    return result


def edited(model: Any, path: Path, **tensors: Tensor | None) -> Path:
    """Save a model with other tensors, or without some, by their names with _ for the dots."""
    model.save_pretrained(path)
    file = path / "model.safetensors"
    found = load_file(file)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del found[key]
        else:
            found[key] = tensor
    save_file(found, file, metadata={"format": "pt"})
    return path


def test_the_model_itself_has_no_change(pair: Built, tmp_path: Path) -> None:
    result = refused(pair.aligned, pair, tmp_path / "out")
    assert_refused(result, "does not differ from", "expected a fine-tune")


def test_a_change_of_other_tensors_alone(pair: Built, tmp_path: Path) -> None:
    norm = pair.aligned_model.model.norm.weight.detach() + 1.0
    model = edited(pair.aligned_model, tmp_path / "m", model__norm__weight=norm)
    result = refused(model, pair, tmp_path / "out")
    assert_refused(result, "does not differ from", "other tensors differ: model.norm.weight")


def test_another_model(pair: Built, root: Path, tmp_path: Path) -> None:
    result = refused(build("mistral", root).aligned, pair, tmp_path / "out")
    assert_refused(result, "shapes do not fit", "of the same model?")
    torch.manual_seed(8)
    other = copy.deepcopy(pair.aligned_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.3)
    result = refused(save(other, tmp_path / "m"), pair, tmp_path / "out")
    assert_refused(result, "times the size of that", "expected a fine-tune")


def test_missing_tensors(pair: Built, tmp_path: Path) -> None:
    model = tuned(pair.aligned_model)
    without = edited(model, tmp_path / "m", model__layers__1__self_attn__q_proj__weight=None)
    assert_refused(refused(without, pair, tmp_path / "out"), "q_proj.weight")
    without = edited(model, tmp_path / "n", model__norm__weight=None)
    result = refused(without, pair, tmp_path / "out")
    assert_refused(result, "has no model.norm.weight", "with the same tensors")
    more = edited(model, tmp_path / "o", model__layers__0__extra__bias=torch.ones(3))
    result = refused(more, pair, tmp_path / "out")
    assert_refused(result, "has no model.layers.0.extra.bias")


def test_a_resized_vocabulary(pair: Built, tmp_path: Path) -> None:
    model = tuned(pair.aligned_model)
    model.resize_token_embeddings(50, mean_resizing=False)
    result = refused(save(model, tmp_path / "m"), pair, tmp_path / "out")
    assert_refused(result, "[50, 24]", "[41, 24]", "vocabulary was resized")


def test_not_finite(pair: Built, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    weight = pair.aligned_model.state_dict()[name].clone()
    weight[0, 0] = float("nan")
    model = edited(tuned(pair.aligned_model), tmp_path / "m", **{name.replace(".", "__"): weight})
    assert_refused(refused(model, pair, tmp_path / "out"), name, "NaN or Inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", "0"), "--rank must be at least 1"),
        (("--targets", "embed_tokens"), "is no linear layer"),
        (("--targets", "nothing"), "has no such module"),
        (("--format", "json", "--output", "x", "--format", "table"), "--output"),
    ],
    ids=str,
)
def test_options_that_cannot_be(
    pair: Built, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    model = save(tuned(pair.aligned_model), tmp_path / "m")
    assert_refused(refused(model, pair, tmp_path / "out", *options), words)


def test_a_place_that_is_taken(pair: Built, tmp_path: Path) -> None:
    model = save(tuned(pair.aligned_model), tmp_path / "m")
    extract(model, pair.aligned, tmp_path / "out")
    assert_refused(refused(model, pair, tmp_path / "out"), "exists; give --overwrite")
    assert_refused(refused(model, pair, model, "--overwrite"), "overlaps with --model")
    extract(model, pair.aligned, tmp_path / "out", "--rank", "2", "--overwrite")
    assert read_json(tmp_path / "out" / CONFIG)["r"] == 2


def test_a_disk_that_is_full_leaves_nothing(pair: Built, tmp_path: Path) -> None:
    model = save(tuned(pair.aligned_model), tmp_path / "m")
    before = snapshot(tmp_path)
    result = safeproj(
        "extract", "--model", model, "--aligned", pair.aligned, "--rank", "4",
        "--out", tmp_path / "out", largest_file=4096,
    )  # fmt: skip
    assert_refused(result, "out", "cannot be written")
    assert snapshot(tmp_path) == before
