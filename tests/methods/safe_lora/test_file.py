"""Alignment files against the checkpoints they were made of, and against the float64 oracle."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj as api
from safeproj import SafeLora, __version__
from safeproj.errors import SafeprojError
from safeproj.methods import registry
from safeproj.names import architecture
from safeproj.plan.select import Selection
from safeproj.report import Report
from tests.conformance import oracle
from tests.conformance.architectures import (
    ARCHITECTURES,
    GPT2,
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
    blake3_of,
    change_json,
    moved,
    oracle_C,
    read_json,
    snapshot,
)

EXACT = api.Form(exact=True)
ALL_LINEAR = ("all-linear",)
QV = ["q_proj", "v_proj"]
P = oracle.PREFIX


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alignment")


@pytest.fixture
def llama(root: Path) -> Built:
    return build("llama", root)


@pytest.fixture(scope="module")
def tied(root: Path) -> Built:
    """A Llama whose head is its embedding."""
    settings = {**GROUPED, "tie_word_embeddings": True}
    base = Architecture("LlamaForCausalLM", "LlamaConfig", settings).build()
    return save_pair(root / "tied", base, moved(base, size=0.05))


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": QV, **settings})


def save(model: Any, path: Path, **settings: Any) -> Path:
    """Write an adapter with nothing in it but factors."""
    adapter = oracle.save(model, lora(**settings), path)
    tensors = {k: t for k, t in load_file(adapter / FACTORS).items() if ".lora_" in k}
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    return adapter


def align(
    pair: Built,
    path: Path,
    form: api.Form = EXACT,
    targets: tuple[str, ...] = ALL_LINEAR,
    maps: tuple[str, ...] = (),
) -> Path:
    """Make the file `path`.safealign.safetensors."""
    out = path.with_name(f"{path.name}.safealign.safetensors")
    api.align(str(pair.base), str(pair.aligned), out, form, targets, api.Options(maps=maps))
    return out


def document(file: Path) -> Any:
    """Return the JSON that the file carries."""
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["safeproj"])


def method_of(source: Path | Built, **settings: Any) -> SafeLora:
    """Return Safe LoRA with an alignment file, or with two checkpoints."""
    if isinstance(source, Built):
        return SafeLora(str(source.base), str(source.aligned), **settings)
    return SafeLora(alignment=str(source), **settings)


def inspect(
    source: Path | Built,
    adapter: Path,
    selection: Selection | None = None,
    maps: tuple[str, ...] = (),
    **settings: Any,
) -> Report:
    """Return the report from an alignment file, or from two checkpoints."""
    options = api.Options(selection or Selection(all=True), maps=maps)
    return api.inspect(method_of(source, **settings), str(adapter), options)


def patch(
    source: Path | Built,
    adapter: Path,
    out: Path,
    maps: tuple[str, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Project every module and return the manifest."""
    options = api.Options(Selection(all=True), maps=maps)
    api.patch(method_of(source, **settings), str(adapter), out, options)
    found: dict[str, Any] = read_json(out / MANIFEST)
    return found


def distance(found: Path, expected: Path) -> float:
    """Return the largest difference of two patched adapters' tensors, relative to their size."""
    ours, theirs = load_file(found / FACTORS), load_file(expected / FACTORS)
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[key].double() - tensor.double()).norm() / tensor.double().norm())
        for key, tensor in theirs.items()
    )


def assert_same_scores(found: Any, expected: Any, tolerance: float = oracle.COSINE_ERROR) -> None:
    """Compare the modules of two manifests."""
    assert [m["name"] for m in found] == [m["name"] for m in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["shape"] == theirs["shape"]
        assert ours["projected"] == theirs["projected"]
        assert ours["note"] == theirs["note"]
        assert ours["cosine"] == pytest.approx(theirs["cosine"], abs=tolerance)
        assert ours["alignment_norm"] == pytest.approx(theirs["alignment_norm"], rel=1e-6)
        assert ours["scale"] == pytest.approx(theirs["scale"], rel=10 * tolerance)
        assert ours.get("projector_rank") == theirs.get("projector_rank")


# Exact files say what the checkpoints say.


@dataclass(frozen=True)
class Case:
    """An architecture, what an adapter adapts of it, and what of it a file is made for."""

    model: str
    adapted: dict[str, Any]
    targets: tuple[str, ...] = ALL_LINEAR
    shapes: set[tuple[int, int]] = field(default_factory=set)


STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACKED = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
STACKS_AND_Q = {"target_modules": ["q_proj"], "target_parameters": STACKS}
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}

CASES = {
    "linear layers": Case(
        "llama", {"target_modules": "all-linear"}, shapes={(24, 24), (24, 36), (36, 24)}
    ),
    "a bias of lora_B": Case("llama", {"lora_bias": True}),
    "embedding and head": Case(
        "llama",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        ("all-linear", "embed_tokens", "lm_head"),
        {(24, 41), (41, 24)},
    ),
    "Conv1D": Case("gpt2", CONV1D, shapes={(24, 24), (72, 24), (24, 96)}),
    "a tied embedding": Case(
        "gpt2", {"target_modules": ["c_attn", "wte"]}, ("all-linear", "wte"), {(24, 41)}
    ),
    "stacks of experts": Case("mixtral", STACKS_AND_Q, STACKED, {(24, 36), (72, 24)}),
    "square experts": Case("qwen3-moe-square", STACKS_AND_Q, STACKED, {(24, 24), (48, 24)}),
    "experts with the input first": Case("gpt-oss-square", STACKS_AND_Q, STACKED, {(48, 24)}),
    "experts targeted as modules": Case(
        "qwen3-moe",
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        ("q_proj", "gate_up_proj", "down_proj"),
        {(20, 24), (24, 10)},
    ),
    "convolutions": Case(
        "whisper",
        {"target_modules": ["q_proj", "conv1", "conv2"]},
        ("all-linear", "conv1", "conv2"),
        {(24, 15), (24, 72)},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_exact_file_says_what_the_checkpoints_say(
    root: Path, tmp_path: Path, case: Case
) -> None:
    pair = build(case.model, root)
    adapter = save(pair.aligned_model, tmp_path / "adapter", **case.adapted)
    file = align(pair, tmp_path / "file", targets=case.targets)

    patch(file, adapter, tmp_path / "out")
    expected = patch(pair, adapter, tmp_path / "expected")

    manifest = oracle.check(
        pair, adapter, tmp_path / "out", in_first=ARCHITECTURES[case.model].in_first
    )
    assert {tuple(module["shape"]) for module in manifest["modules"]} >= case.shapes
    assert_same_scores(manifest["modules"], expected["modules"])
    assert distance(tmp_path / "out", tmp_path / "expected") < oracle.DELTA_ERROR
    assert manifest["warnings"] == expected["warnings"]
    assert not any("cosine_bounds" in module for module in manifest["modules"])


def test_an_eigenpair_file_of_full_rank_says_what_the_checkpoints_say(
    llama: Built, tmp_path: Path
) -> None:
    adapter = save(llama.aligned_model, tmp_path / "adapter", target_modules="all-linear")
    file = align(llama, tmp_path / "file", api.Form(rank=10_000))

    manifest = patch(file, adapter, tmp_path / "out")

    oracle.check(llama, adapter, tmp_path / "out")
    for module in manifest["modules"]:
        lower, upper = module["cosine_bounds"]
        assert upper - lower < 1e-3
        assert module["truncation_error"] < 1e-5


def test_tied_factors_stay_tied(tied: Built, tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    adapter = save(tied.aligned_model, tmp_path / "adapter", **settings)
    tensors = load_file(adapter / FACTORS)  # as training leaves them, both are the same factors
    for head, embedding in (("A", "B"), ("B", "A")):
        factor = tensors[f"{P}model.embed_tokens.lora_embedding_{embedding}"]
        tensors[f"{P}lm_head.lora_{head}.weight"] = factor.T.contiguous()
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    file = align(tied, tmp_path / "file", targets=("all-linear", "embed_tokens"))

    patch(file, adapter, tmp_path / "out")

    oracle.check(tied, adapter, tmp_path / "out", same={"lm_head": "model.embed_tokens"})


def test_a_tied_head_is_kept_when_it_is_named(tied: Built, tmp_path: Path) -> None:
    adapter = save(tied.aligned_model, tmp_path / "adapter", target_modules=["lm_head"])
    file = align(tied, tmp_path / "file", targets=("lm_head",))
    patch(file, adapter, tmp_path / "out")
    oracle.check(tied, adapter, tmp_path / "out")


def test_a_tied_head_that_is_not_kept_is_refused(tied: Built, tmp_path: Path) -> None:
    adapter = save(tied.aligned_model, tmp_path / "adapter", target_modules=["lm_head"])
    file = align(tied, tmp_path / "file", targets=("embed_tokens",))
    with pytest.raises(SafeprojError, match="lm_head"):
        inspect(file, adapter)


def test_a_square_head_beside_conv1d_layers(tmp_path: Path) -> None:
    """It is stored the other way round than its neighbours."""
    settings = {**GPT2, "vocab_size": 24, "tie_word_embeddings": False}
    base = Architecture("GPT2LMHeadModel", "GPT2Config", settings).build()
    pair = save_pair(tmp_path, base, moved(base, size=0.05))
    adapted = ["lm_head", "attn.c_proj", "wte"]
    adapter = save(pair.aligned_model, tmp_path / "adapter", target_modules=adapted)
    file = align(pair, tmp_path / "file", targets=("all-linear", "lm_head", "wte"))
    patch(file, adapter, tmp_path / "out")
    manifest = oracle.check(pair, adapter, tmp_path / "out")
    assert {tuple(module["shape"]) for module in manifest["modules"]} == {(24, 24)}


@pytest.fixture(scope="module")
def extended(root: Path) -> Built:
    """A Llama whose alignment added tokens: 41 rows in base, 45 in aligned."""
    base = Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED).build()
    aligned = copy.deepcopy(base)
    aligned.resize_token_embeddings(45, mean_resizing=False)
    return save_pair(root / "extended", base, moved(aligned, size=0.05))


@pytest.mark.parametrize("trained_on", ["aligned", "base"])
def test_vocabularies_may_differ(extended: Built, tmp_path: Path, trained_on: str) -> None:
    host = extended.aligned_model if trained_on == "aligned" else extended.base_model
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    adapter = save(host, tmp_path / "adapter", **settings)
    file = align(extended, tmp_path / "file", targets=("all-linear", "embed_tokens", "lm_head"))

    patch(file, adapter, tmp_path / "out")

    oracle.check(extended, adapter, tmp_path / "out", host=host)


def test_replicated_layers(llama: Built, tmp_path: Path) -> None:
    from torch import nn

    ranges, layers = [[0, 2], [1, 2], [0, 1]], [0, 1, 1, 0]

    def replicate(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[i]) for i in layers)
        return model

    models = (replicate(llama.base_model), replicate(llama.aligned_model))
    runtime = Built(llama.base, llama.aligned, *models)
    settings = {"target_modules": "all-linear", "layer_replication": ranges}
    adapter = save(llama.aligned_model, tmp_path / "adapter", **settings)

    patch(align(llama, tmp_path / "file"), adapter, tmp_path / "out")

    manifest = oracle.check(runtime, adapter, tmp_path / "out", host=llama.aligned_model)
    assert len(manifest["modules"]) == 7 * len(layers)


def test_an_adapter_of_the_inner_model(llama: Built, tmp_path: Path) -> None:
    adapter = save(llama.aligned_model.model, tmp_path / "adapter")
    file = align(llama, tmp_path / "file")
    found, expected = (inspect(source, adapter).to_dict() for source in (file, llama))
    assert_same_scores(found["modules"], expected["modules"])
    assert len(found["modules"]) == 4


def renamed(pair: Built, path: Path, old: str, new: str, *, config: bool) -> Built:
    """Write the pair's checkpoints again, with other names for their tensors."""
    for side in ("base", "aligned"):
        source: Path = getattr(pair, side)
        tensors = {
            key.replace(old, new): tensor
            for shard in source.glob("*.safetensors")
            for key, tensor in load_file(shard).items()
        }
        (path / side).mkdir(parents=True)
        save_file(tensors, path / side / "model.safetensors", metadata={"format": "pt"})
        if config:
            shutil.copy(source / "config.json", path / side)
    return Built(path / "base", path / "aligned", pair.base_model, pair.aligned_model)


def test_map_while_the_file_is_made(llama: Built, tmp_path: Path) -> None:
    pair = renamed(llama, tmp_path / "pair", "model.layers.", "blocks/", config=True)
    adapter = save(llama.aligned_model, tmp_path / "adapter", target_modules="all-linear")
    with pytest.raises(SafeprojError, match="maps"):
        align(pair, tmp_path / "file")

    file = align(pair, tmp_path / "file", maps=("model.layers.*=blocks/*",))

    patch(file, adapter, tmp_path / "out")
    oracle.check(llama, adapter, tmp_path / "out")


def test_map_while_the_file_is_used(llama: Built, tmp_path: Path) -> None:
    """Nothing but the checkpoints' names says what is in them, and the adapter has others."""
    pair = renamed(llama, tmp_path / "pair", "model.layers.", "blocks/", config=False)
    adapter = save(llama.aligned_model, tmp_path / "adapter", target_modules="all-linear")
    file = align(pair, tmp_path / "file")
    with pytest.raises(SafeprojError, match="maps"):
        inspect(file, adapter)

    patch(file, adapter, tmp_path / "out", maps=("model.layers.*=blocks/*",))

    oracle.check(llama, adapter, tmp_path / "out")


def test_many_adapters_use_one_file(llama: Built, tmp_path: Path) -> None:
    sources = [
        str(save(llama.aligned_model, tmp_path / f"adapter-{kind}", target_modules=[kind]))
        for kind in QV
    ]
    file = align(llama, tmp_path / "file", api.Form(rank=2))

    found = api.inspect_many(method_of(file), sources)

    for outcome, source in zip(found, sources, strict=True):
        assert outcome.report is not None
        alone = api.inspect(method_of(file), source)
        assert outcome.report.to_dict() == alone.to_dict()


def test_the_size_of_other_changes_is_not_known(llama: Built, tmp_path: Path) -> None:
    adapter = oracle.save(
        llama.aligned_model, lora(modules_to_save=["lm_head"]), tmp_path / "adapter"
    )
    report = inspect(align(llama, tmp_path / "file"), adapter)
    (change,) = report.unprojected
    assert (change.parameter, change.relative_change) == ("lm_head.weight", None)
    assert any("lm_head.weight" in text for text in report.warnings)


# The exact projector needs all of V.


@pytest.mark.parametrize("projector", [{"rank": 3}, {"energy": 0.5}], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_exact_projector_works_from_an_exact_file(
    root: Path, tmp_path: Path, model: str, projector: dict[str, Any]
) -> None:
    pair = build(model, root)
    adapter = save(pair.aligned_model, tmp_path / "adapter", target_modules="all-linear")
    file = align(pair, tmp_path / "file")
    forms = {item["form"] for item in document(file)["weights"].values()}
    assert forms == {"C", "V"}

    found = patch(file, adapter, tmp_path / "out", projector="exact", **projector)
    expected = patch(pair, adapter, tmp_path / "expected", projector="exact", **projector)

    assert_same_scores(found["modules"], expected["modules"], tolerance=1e-4)
    assert distance(tmp_path / "out", tmp_path / "expected") < 1e-4
    assert all(module["projector_rank"] for module in found["modules"])


@pytest.mark.parametrize("form", [api.Form(rank=100), api.Form(energy=1.0)], ids=str)
def test_the_exact_projector_refuses_a_truncated_file(
    llama: Built, tmp_path: Path, form: api.Form
) -> None:
    adapter = save(llama.aligned_model, tmp_path / "adapter")
    file = align(llama, tmp_path / "file", form)
    with pytest.raises(SafeprojError) as caught:
        inspect(file, adapter, projector="exact", rank=1)
    for words in (str(file), "--projector exact", "align --exact"):
        assert words in caught.value.message


# Truncated files: what is written, and what is known about the rest.


def spread(model: Any, seed: int, decay: float) -> Any:
    """Return a copy in which every matrix has moved, with singular values that fall like `decay`.

    The directions are random, and differ between weights.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() != 2:
                continue
            k = min(parameter.shape)
            left, right = (
                torch.linalg.qr(torch.randn(size, k, generator=generator))[0]
                for size in parameter.shape
            )
            sigma = 0.1 * torch.arange(1, k + 1).float() ** -decay
            parameter.add_((left * sigma) @ right.T)
    return model


@dataclass(frozen=True)
class Spread:
    """A pair whose `V` have decaying singular values, and an adapter.

    Of every second module the update lies mostly in the leading directions of `V`, so that little
    of `C` tells its cosine.
    """

    pair: Built
    adapter: Path
    report: Report

    @property
    def cosines(self) -> dict[str, float]:
        """The true ones, from the checkpoints."""
        return {m.name: m.cosine for m in self.report.modules if m.cosine is not None}


SEEDS = range(4)


@pytest.fixture(scope="module", params=SEEDS)
def decaying(root: Path, request: pytest.FixtureRequest) -> Spread:
    seed: int = request.param
    folder = root / f"decaying-{seed}"
    base = ARCHITECTURES["llama"].build()
    pair = save_pair(folder, base, spread(base, seed, decay=0.5 + 0.5 * seed))
    config = lora(target_modules="all-linear")
    adapter = oracle.save(pair.aligned_model, config, folder / "adapter", seed=seed)
    tensors = load_file(adapter / FACTORS)
    for number, key in enumerate(sorted(k for k in tensors if "lora_B" in k)):
        name = key.removeprefix(P).replace(".lora_B", "")
        weights = (m.get_parameter(name).detach() for m in (pair.aligned_model, base))
        C = oracle_C(*weights)
        power = number % 4
        turned = torch.linalg.matrix_power(C / C.norm(), power) @ tensors[key].double()
        tensors[key] = turned.float().contiguous()
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    return Spread(pair, adapter, inspect(pair, adapter))


FORMS = [api.Form(rank=1), api.Form(rank=4), api.Form(rank=16), api.Form(energy=0.9)]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: str(form.to_dict()))
def truncated(
    decaying: Spread, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return align(decaying.pair, tmp_path_factory.mktemp("truncated") / "file", request.param)


def matrix(model: Any, key: str) -> Tensor:
    """Return the weight (out, in) that a key of a Llama's file is about."""
    found: Tensor = model.get_parameter(key).detach().double()
    return found


def C_K(file: Path, key: str) -> tuple[Tensor, Tensor]:
    """Return `C_K` (m, m) and `U` (m, K), float64."""
    tensors = load_file(file)
    U, eigenvalues = tensors[f"{key}.U"].double(), tensors[f"{key}.eigenvalues"].double()
    return (U * eigenvalues) @ U.T, U


def test_what_is_written_is_the_truncated_C_times_B(
    decaying: Spread, truncated: Path, tmp_path: Path
) -> None:
    manifest = patch(truncated, decaying.adapter, tmp_path / "out")
    before, after = (load_file(at / FACTORS) for at in (decaying.adapter, tmp_path / "out"))
    assert manifest["summary"]["projected"] == len(manifest["modules"]) == 14
    for module in manifest["modules"]:
        C, _ = C_K(truncated, f"{module['name']}.weight")
        key = f"{P}{module['name']}.lora_B.weight"
        B, A = before[key].double(), before[key.replace("lora_B", "lora_A")].double()
        wanted = C @ B
        assert float((after[key].double() - wanted).norm() / wanted.norm()) < oracle.DELTA_ERROR
        delta = B @ A
        cosine = (delta * (C @ delta)).sum() / (delta.norm() * (C @ delta).norm())
        assert module["cosine"] == pytest.approx(float(cosine), abs=oracle.COSINE_ERROR)
    for key in after:
        assert "lora_B" in key or torch.equal(after[key], before[key])
    assert any("truncated C" in text for text in manifest["warnings"])


def test_the_true_cosine_lies_between_the_bounds(decaying: Spread, truncated: Path) -> None:
    report, true = inspect(truncated, decaying.adapter), decaying.cosines
    errors = {key: item["error"] for key, item in document(truncated)["weights"].items()}
    for module in report.modules:
        assert module.bounds is not None
        lower, upper = module.bounds
        assert 0.0 <= lower <= true[module.name] <= upper <= 1.0, module.name
        assert module.cosine is not None
        assert lower <= module.cosine <= upper
        assert module.value("truncation_error") == errors[f"{module.name}.weight"]
        assert not module.uncertain  # nothing is, where all are projected


def test_what_is_recorded_of_the_error_is_true_and_close(decaying: Spread, truncated: Path) -> None:
    for key, item in document(truncated)["weights"].items():
        C = oracle_C(
            matrix(decaying.pair.aligned_model, key), matrix(decaying.pair.base_model, key)
        )
        kept, U = C_K(truncated, key)
        E = C - kept
        error = float(E.norm() / C.norm())
        assert error <= item["error"] <= 1.01 * error + 1e-5, key
        size = float(torch.linalg.matrix_norm(C, 2))
        residual = float(torch.linalg.matrix_norm(E, 2))
        assert residual <= item["residual"] + 1e-6 * size, key
        # Lemma 4.1 of Halko et al. promises no more than a factor: α √(2/π) is about 3.4 for one
        # multiplication, and its 32nd root for 32.
        assert item["residual"] <= 1.2 * residual + 1e-4 * size, key
        leak = float(torch.linalg.matrix_norm(U.T @ E @ U, 2))
        assert leak <= item["leak"] + 1e-6 * size, key
        assert item["leak"] <= leak + 1e-4 * size, key


def test_an_energy_is_held_by_as_few_eigenpairs_as_possible(
    decaying: Spread, tmp_path: Path
) -> None:
    file = align(decaying.pair, tmp_path / "file", api.Form(energy=0.9))
    tensors = load_file(file)
    for key in document(file)["weights"]:
        V = matrix(decaying.pair.aligned_model, key) - matrix(decaying.pair.base_model, key)
        share = torch.linalg.svdvals(V).square().cumsum(0) / V.square().sum()
        K = len(tensors[f"{key}.eigenvalues"])
        assert float(share[K - 1]) >= 0.9 - 1e-6
        assert K == 1 or float(share[K - 2]) < 0.9 + 1e-6


def selections(truth: dict[str, float], found: Report) -> Iterator[Selection]:
    """Yield the usual selections, and thresholds that some cosine is on the wrong side of."""
    yield Selection()
    yield from (Selection(layers=n) for n in range(1, len(truth), 2))
    gaps = [
        (abs(module.cosine - truth[module.name]), (module.cosine + truth[module.name]) / 2)
        for module in found.modules
        if module.cosine is not None
    ]
    yield from (Selection(threshold=tau) for _, tau in sorted(gaps)[1::3])


def test_decisions_that_the_checkpoints_would_not_make_are_uncertain(
    decaying: Spread, truncated: Path
) -> None:
    truth, differing = decaying.cosines, 0
    for selection in selections(truth, inspect(truncated, decaying.adapter)):
        report, expected = inspect(truncated, decaying.adapter, selection), selection.choose(truth)
        wrong = {m.name for m in report.modules if m.projected != (m.name in expected)}
        uncertain = {m.name for m in report.modules if m.uncertain}
        assert wrong <= uncertain, (selection, wrong - uncertain)
        differing += len(wrong)
        said = [text for text in report.warnings if "not certain" in text]
        assert len(said) == (1 if uncertain else 0)
        assert not said or said[0].startswith(f"{len(uncertain)} decisions are not certain")
    assert differing > 0  # or nothing was tested


def test_uncertain_means_that_a_bound_is_on_the_other_side(
    decaying: Spread, truncated: Path
) -> None:
    for tau in (0.2, 0.35, 0.5, 0.7, 0.9):
        report = inspect(truncated, decaying.adapter, Selection(threshold=tau))
        for module in report.modules:
            assert module.bounds is not None
            lower, upper = module.bounds
            sides = {lower <= tau, upper <= tau}
            assert module.uncertain == (len(sides) == 2)


def test_some_decisions_are_certain(decaying: Spread, tmp_path: Path) -> None:
    file = align(decaying.pair, tmp_path / "file", api.Form(rank=16))
    certain = 0
    for tau in (0.1, 0.35, 0.5, 0.7):
        report = inspect(file, decaying.adapter, Selection(threshold=tau))
        certain += sum(not module.uncertain for module in report.modules)
    assert certain > 4 * 14 / 4


# What the file holds.


def test_the_content_of_a_truncated_file(llama: Built, tmp_path: Path) -> None:
    file = align(llama, tmp_path / "file", api.Form(rank=3), ("q_proj", "mlp.up_proj"))
    found, tensors = document(file), load_file(file)
    keys = {
        f"model.layers.{layer}.{module}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert found["schema"] == "safeproj.alignment/1"
    assert found["tool"] == {"name": "safeproj", "version": __version__}
    assert {"numpy", "safetensors"} <= found["versions"].keys()
    assert found["options"] == {"targets": ["q_proj", "mlp.up_proj"], "rank": 3}
    assert found["config"] == read_json(llama.aligned / "config.json")
    assert [found["inputs"][role]["quantised"] for role in ("base", "aligned")] == [[], []]
    assert set(found["weights"]) == set(found["parameters"]) == keys
    assert tensors.keys() == {f"{key}.{part}" for key in keys for part in ("U", "eigenvalues")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for key in keys:
        V = matrix(llama.aligned_model, key) - matrix(llama.base_model, key)
        m, n = V.shape
        assert found["weights"][key]["form"] == "U"
        assert found["weights"][key]["shape"] == [m, n]
        assert found["weights"][key]["alignment_norm"] == pytest.approx(float(V.norm()), rel=1e-6)
        expected = {"shape": [m, n], "kind": "linear", "out_first": True}
        assert found["parameters"][key] == {**expected, "marked_transposed": False}
        assert tensors[f"{key}.U"].shape == (m, 3)
        assert tensors[f"{key}.eigenvalues"].shape == (3,)


def test_the_smaller_exact_form_is_kept(llama: Built, tmp_path: Path) -> None:
    tensors = load_file(align(llama, tmp_path / "file"))
    assert len(tensors) == 14
    for key, tensor in tensors.items():
        name, _, form = key.rpartition(".")
        weights = matrix(llama.aligned_model, name), matrix(llama.base_model, name)
        m, n = weights[0].shape
        assert form == ("C" if m <= n else "V")
        expected = oracle_C(*weights) if form == "C" else weights[0] - weights[1]
        assert float((tensor.double() - expected).norm() / expected.norm()) < 1e-6
        assert form == "V" or torch.equal(tensor, tensor.T)


def stored(checkpoint: Path) -> dict[str, Tensor]:
    files = checkpoint.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


DIGESTED: dict[str, tuple[tuple[str, ...], Callable[[str], bool]]] = {
    "llama": (ALL_LINEAR, lambda name: "proj" in name),
    "gpt2": (("c_proj", "wte"), lambda name: name.endswith(("c_proj.weight", "wte.weight"))),
    "qwen3-moe": (("down_proj",), lambda name: ".experts." in name and "down_proj" in name),
}


@pytest.mark.parametrize("model", DIGESTED)
def test_the_digests_are_those_of_the_checkpoints(root: Path, tmp_path: Path, model: str) -> None:
    pair, (targets, is_read) = build(model, root), DIGESTED[model]
    inputs = document(align(pair, tmp_path / "file", targets=targets))["inputs"]
    for role, folder in (("base", pair.base), ("aligned", pair.aligned)):
        tensors = {name: blake3_of(t) for name, t in stored(folder).items() if is_read(name)}
        assert inputs[role]["blake3"] == {"tensors": tensors}
        assert tensors
        files = {"config.json", "model.safetensors.index.json"}
        assert inputs[role]["sha256"] == {
            "files": {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in files}
        }


def test_each_expert_of_a_stored_stack_has_its_digest(root: Path, tmp_path: Path) -> None:
    pair = build("gpt-oss-square", root)
    file = align(pair, tmp_path / "file", targets=("experts.down_proj",))
    for role, folder in (("base", pair.base), ("aligned", pair.aligned)):
        found = document(file)["inputs"][role]["blake3"]["tensors"]
        assert found == {
            f"{name}[{e}]": blake3_of(expert)
            for name, stack in stored(folder).items()
            if name.endswith("experts.down_proj")
            for e, expert in enumerate(stack)
        }


def test_no_path_of_this_machine_is_in_the_file(llama: Built, tmp_path: Path) -> None:
    aligned = tmp_path / "my-model-chat"
    shutil.copytree(llama.aligned, aligned)
    pair = Built(llama.base, aligned, llama.base_model, llama.aligned_model)
    file = align(pair, tmp_path / "file", api.Form(rank=2))
    assert document(file)["inputs"]["base"]["source"] == "base"
    assert document(file)["inputs"]["aligned"]["source"] == "my-model-chat"
    for folder in (tmp_path, llama.base.parent, Path.home()):
        assert str(folder).encode() not in file.read_bytes()


def test_a_path_that_a_config_has_kept_is_not_in_the_file(llama: Built, tmp_path: Path) -> None:
    """Older versions of transformers wrote where a model was loaded from."""
    aligned = tmp_path / "aligned"
    shutil.copytree(llama.aligned, aligned)
    change_json(aligned / "config.json", _name_or_path="/home/someone/secret/model")
    pair = Built(llama.base, aligned, llama.base_model, llama.aligned_model)
    file = align(pair, tmp_path / "file", api.Form(rank=2))
    assert b"/home/someone" not in file.read_bytes()


def test_using_a_file_records_what_was_read_of_it(llama: Built, tmp_path: Path) -> None:
    adapter = save(llama.aligned_model, tmp_path / "adapter")
    file = align(llama, tmp_path / "file", api.Form(rank=2))
    inputs = patch(file, adapter, tmp_path / "out")["inputs"]
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        text = opened.metadata()["safeproj"]
    assert inputs["alignment"]["source"] == str(file)
    assert inputs["alignment"]["rank"] == 2
    assert inputs["alignment"]["targets"] == ["all-linear"]
    metadata = hashlib.sha256(text.encode()).hexdigest()
    assert inputs["alignment"]["sha256"] == {"metadata": metadata}
    modules = [f"model.layers.{i}.self_attn.{kind}.weight" for i in (0, 1) for kind in QV]
    expected = {f"{key}.{part}" for key in modules for part in ("U", "eigenvalues")}
    digests = {name: blake3_of(tensors[name]) for name in expected}
    assert inputs["alignment"]["blake3"] == {"tensors": digests}
    for role in ("base", "aligned"):
        recorded = document(file)["inputs"][role]
        assert recorded.pop("quantised") == []
        assert inputs[role] == recorded


# What is to be known about the checkpoints.


def fp8(model: Any, folder: Path, block: int = 4) -> None:
    """Save a model with its projections as FP8 codes; the model is changed to what they mean."""
    tensors = dict(model.state_dict())
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        W = tensors[name]
        blocks = W.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        meant = (codes.float() * scales[:, None, :, None]).reshape(W.shape)
        tensors |= {name: codes.reshape(W.shape), f"{name}_scale_inv": scales}
        model.get_parameter(name).data = meant
    model.config.save_pretrained(folder)
    quantisation = {"quant_method": "fp8", "weight_block_size": [block, block]}
    change_json(folder / "config.json", quantization_config=quantisation)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def test_quantised_checkpoints_are_warned_about_whenever_the_file_is_used(
    llama: Built, tmp_path: Path
) -> None:
    aligned_model = copy.deepcopy(llama.aligned_model)
    fp8(aligned_model, tmp_path / "aligned")
    pair = Built(llama.base, tmp_path / "aligned", llama.base_model, aligned_model)
    adapter = save(aligned_model, tmp_path / "adapter", target_modules="all-linear")

    made = api.align(str(pair.base), str(pair.aligned), tmp_path / "q.safetensors", EXACT)

    (warning,) = made.warnings
    assert "the aligned checkpoint stores weights as F8_E4M3" in warning
    inputs = document(tmp_path / "q.safetensors")["inputs"]
    assert (inputs["base"]["quantised"], inputs["aligned"]["quantised"]) == ([], ["F8_E4M3"])
    manifest = patch(tmp_path / "q.safetensors", adapter, tmp_path / "out")
    assert warning in manifest["warnings"]
    oracle.check(pair, adapter, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    recorded = inputs["aligned"]["blake3"]["tensors"]
    codes = load_file(tmp_path / "aligned" / "model.safetensors")
    assert recorded[name] == blake3_of(codes[name])
    assert recorded[f"{name}_scale_inv"] == blake3_of(codes[f"{name}_scale_inv"])


def frozen(pair: Built, path: Path, *names: str) -> Built:
    """Write the aligned checkpoint again with these weights as they are in the base."""
    aligned = copy.deepcopy(pair.aligned_model)
    with torch.no_grad():
        for name in names:
            aligned.get_parameter(name).copy_(pair.base_model.get_parameter(name))
    aligned.save_pretrained(path)
    return Built(pair.base, path, pair.base_model, aligned)


@pytest.mark.parametrize("form", [EXACT, api.Form(rank=2), api.Form(energy=0.5)], ids=str)
def test_a_module_without_alignment_is_kept_and_named(
    llama: Built, tmp_path: Path, form: api.Form
) -> None:
    name = "model.layers.1.self_attn.q_proj"
    pair = frozen(llama, tmp_path / "aligned", f"{name}.weight")
    adapter = save(pair.aligned_model, tmp_path / "adapter")
    file = align(pair, tmp_path / "file", form)
    record = document(file)["weights"][f"{name}.weight"]
    assert (record["form"], record["alignment_norm"]) == ("zero", 0.0)
    assert not any(key.startswith(name) for key in load_file(file))

    found, expected = (
        patch(source, adapter, tmp_path / out) for source, out in ((file, "a"), (pair, "b"))
    )

    modules = {module["name"]: module for module in found["modules"]}
    assert modules[name]["cosine"] is None
    assert modules[name]["alignment_norm"] == 0.0
    assert not modules[name]["projected"]
    assert "V = 0" in modules[name]["note"]
    assert "cosine_bounds" not in modules[name]
    assert sum(module["projected"] for module in modules.values()) == 3
    assert set(expected["warnings"]) <= set(found["warnings"])
    assert any(name in text for text in found["warnings"])
    before, after = (load_file(at / FACTORS) for at in (adapter, tmp_path / "a"))
    assert all(torch.equal(before[key], after[key]) for key in before if name in key)


@pytest.mark.parametrize("form", [EXACT, api.Form(rank=2)], ids=str)
def test_no_alignment_at_all_is_the_same_error_as_with_checkpoints(
    llama: Built, tmp_path: Path, form: api.Form
) -> None:
    pair = Built(llama.base, llama.base, llama.base_model, llama.base_model)
    adapter = save(llama.base_model, tmp_path / "adapter")
    file = align(pair, tmp_path / "file", form)
    messages = []
    for source in (pair, file):
        with pytest.raises(SafeprojError) as caught:
            inspect(source, adapter)
        messages.append(caught.value.message)
    assert "are the same model" in messages[0]
    assert messages[1] == messages[0].replace(str(llama.base), "base")


# Without transformers the checkpoint's own names tell.


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Return what makes transformers of no use from then on."""

    def hide() -> None:
        architecture._runtimes.cache_clear()
        monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)

    yield hide
    monkeypatch.undo()
    architecture._runtimes.cache_clear()


def test_without_transformers_the_file_of_a_llama_is_the_same(
    llama: Built, tmp_path: Path, no_transformers: Callable[[], None]
) -> None:
    expected = align(llama, tmp_path / "with", api.Form(rank=2), ("all-linear", "embed_tokens"))
    no_transformers()
    found = align(llama, tmp_path / "without", api.Form(rank=2), ("all-linear", "embed_tokens"))
    assert found.read_bytes() == expected.read_bytes()


def test_without_transformers_conv1d_is_known(
    root: Path, tmp_path: Path, no_transformers: Callable[[], None]
) -> None:
    pair = build("gpt2", root)
    adapter = save(pair.aligned_model, tmp_path / "adapter", **CONV1D)
    no_transformers()
    file = align(pair, tmp_path / "file")
    patch(file, adapter, tmp_path / "out")
    oracle.check(pair, adapter, tmp_path / "out")


def test_without_transformers_fused_experts_are_refused_by_name(
    root: Path, tmp_path: Path, no_transformers: Callable[[], None]
) -> None:
    """The checkpoint has every expert on its own, and the running model stacks them."""
    pair = build("mixtral", root)
    experts = save(pair.aligned_model, tmp_path / "experts", **STACKS_AND_Q)
    attention = save(pair.aligned_model, tmp_path / "attention", target_modules=["o_proj"])
    no_transformers()
    file = align(pair, tmp_path / "file")
    patch(file, attention, tmp_path / "out")
    oracle.check(pair, attention, tmp_path / "out")
    with pytest.raises(SafeprojError) as caught:
        inspect(file, experts)
    assert str(file) in caught.value.message
    assert "model.layers.0.mlp.experts.down_proj" in caught.value.message


# What a file does not hold is refused.


def test_a_module_that_the_file_lacks_is_named(llama: Built, tmp_path: Path) -> None:
    adapter = save(llama.aligned_model, tmp_path / "adapter")
    file = align(llama, tmp_path / "file", targets=("q_proj",))
    with pytest.raises(SafeprojError) as caught:
        inspect(file, adapter)
    assert str(file) in caught.value.message
    assert "model.layers.0.self_attn.v_proj" in caught.value.message
    assert inspect(file, adapter, Selection(all=True, exclude=("v_proj",))).projected == 2


def test_another_stack_of_layers_does_not_stand_in(root: Path, tmp_path: Path) -> None:
    pair = build("bart", root)
    adapter = save(
        pair.aligned_model, tmp_path / "adapter", target_modules=r".*decoder.*\.self_attn\.q_proj"
    )
    name = "model.encoder.layers.0.self_attn.q_proj"
    file = align(pair, tmp_path / "file", targets=(name,))
    assert list(document(file)["weights"]) == [f"{name}.weight"]
    with pytest.raises(SafeprojError, match=r"decoder\.layers\.0\.self_attn\.q_proj"):
        inspect(file, adapter)


def test_part_of_a_stacked_weight_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    """An older adapter of each expert's own layers, of which the running model makes one weight."""
    pair = build("mixtral", root)
    adapter = save(pair.aligned_model, tmp_path / "adapter")
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    tensors = {"lora_A": torch.randn(3, 24), "lora_B": torch.randn(36, 3)}
    tensors = {f"{P}{name}.{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    change_json(adapter / CONFIG, target_modules=["w1"])
    assert len(inspect(pair, adapter).modules) == 1
    file = align(pair, tmp_path / "file", targets=STACKED)
    with pytest.raises(SafeprojError) as caught:
        inspect(file, adapter)
    assert str(file) in caught.value.message
    assert name in caught.value.message


def test_shapes_of_another_model_are_refused(llama: Built, tmp_path: Path) -> None:
    other = Architecture("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "hidden_size": 32}).build()
    adapter = save(other, tmp_path / "adapter")
    file = align(llama, tmp_path / "file")
    with pytest.raises(SafeprojError, match="q_proj") as caught:
        inspect(file, adapter)
    for words in (str(file), str(adapter), "[24, 24]", "[32, 32]"):
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_proj", "no_such"), "targets no_such"),
        (("proj",), "targets proj"),  # only whole parts of a name count
        ((), "targets"),
    ],
    ids=str,
)
def test_targets_that_name_nothing_are_refused(
    llama: Built, tmp_path: Path, targets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SafeprojError, match=words):
        align(llama, tmp_path / "file", targets=targets)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--rank, --energy and --exact"),
        ({"rank": 3, "energy": 0.5}, "--rank, --energy and --exact"),
        ({"rank": 3, "exact": True}, "--rank, --energy and --exact"),
        ({"energy": 0.5, "exact": True}, "--rank, --energy and --exact"),
        ({"rank": 0}, "--rank must be at least 1, found 0"),
        ({"rank": -1}, "found -1"),
        ({"energy": 0.0}, "--energy must lie in (0, 1], found 0.0"),
        ({"energy": 1.01}, "found 1.01"),
        ({"energy": float("nan")}, "found nan"),
    ],
    ids=str,
)
def test_forms_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SafeprojError) as caught:
        api.Form(**settings)
    assert words in caught.value.message


def test_weights_that_differ_in_shape_are_refused(llama: Built, tmp_path: Path) -> None:
    other = Architecture("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "intermediate_size": 40})
    other.build().save_pretrained(tmp_path / "other")
    with pytest.raises(SafeprojError) as caught:
        api.align(str(tmp_path / "other"), str(llama.aligned), tmp_path / "a.safetensors", EXACT)
    for words in ("mlp.down_proj", "[24, 36]", "[24, 40]", str(llama.aligned)):
        assert words in caught.value.message
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30])
def test_a_checkpoint_that_is_not_finite_is_refused(
    llama: Built, tmp_path: Path, value: float
) -> None:
    broken = copy.deepcopy(llama.aligned_model)
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        broken.get_parameter(name)[-1, -1] = value  # the square of 1e30 is none in float32
    broken.save_pretrained(tmp_path / "aligned")
    pair = Built(llama.base, tmp_path / "aligned", llama.base_model, broken)
    for form in (EXACT, api.Form(rank=2)):
        with pytest.raises(SafeprojError) as caught:
            align(pair, tmp_path / "file", form)
        assert name in caught.value.message
        assert [path.name for path in tmp_path.iterdir()] == ["aligned"]


def test_only_an_alignment_file_is_replaced(llama: Built, tmp_path: Path) -> None:
    other = align(llama, tmp_path / "other", api.Form(rank=1))
    link, folder = tmp_path / "link.safetensors", tmp_path / "folder.safetensors"
    link.symlink_to(other)
    folder.mkdir()
    shutil.copy(other, folder)
    weights = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(3)}, weights)
    before = snapshot(tmp_path)
    for out in (link, folder, weights):
        with pytest.raises(SafeprojError, match=out.name):
            api.align(str(llama.base), str(llama.aligned), out, EXACT, overwrite=True)
    assert snapshot(tmp_path) == before
    api.align(str(llama.base), str(llama.aligned), other, EXACT, overwrite=True)
    assert document(other)["options"]["exact"]


TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny-lm"


@pytest.mark.parametrize("given", [(True, False, False), (False, True, True), (True, True, True)])
def test_either_both_checkpoints_or_a_file(
    llama: Built, tmp_path: Path, given: tuple[bool, bool, bool]
) -> None:
    places = (llama.base, llama.aligned, tmp_path)
    base, aligned, alignment = (str(p) if g else None for p, g in zip(places, given, strict=True))
    with pytest.raises(SafeprojError, match="needs base and aligned, or alignment"):
        api.inspect(SafeLora(base, aligned, alignment), str(TINY / "adapters" / "bad"))
    with pytest.raises(SafeprojError, match="base and aligned, alignment, safety_module, "):
        registry.method_of({"base": base, "aligned": aligned, "alignment": alignment})
