"""Every method on full fine-tunes against float64 oracles, through transformers' own loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from safeproj import (
    Covariance,
    Form,
    FullModel,
    Merge,
    Method,
    Options,
    SafeLora,
    Salora,
    Selection,
    align,
    inspect,
    patch,
)
from safeproj.methods import differences, whole
from tests.methods.covariance import oracle as covariance
from tests.methods.covariance.test_command import stored
from tests.methods.salora import oracle as salora
from tests.methods.salora.models import build
from tests.support import moved, oracle_C, oracle_cosine, read_json, save_safety_module

ODD: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 51,
        "hidden_size": 36,
        "intermediate_size": 77,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "gpt2": {"vocab_size": 51, "n_embd": 36, "n_head": 3, "n_inner": 77},
}
"""Sizes that are no powers of two, and not square."""

COSINE = 2e-5
"""Of sums in float32 over some hundred numbers."""


@dataclass(frozen=True)
class Models:
    """A base, an aligned and a fine-tuned model, on disk and as they were saved."""

    root: Path
    base: dict[str, Tensor]
    aligned: dict[str, Tensor]
    tuned: dict[str, Tensor]
    model: Any

    @property
    def subject(self) -> FullModel:
        return FullModel(self.root / "tuned", self.root / "aligned")

    def matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer's weights (m, n) in the base, aligned and fine-tuned model, in float64."""
        turned = isinstance(self.model.get_submodule(name), Conv1D)
        found = (each[f"{name}.weight"].double() for each in (self.base, self.aligned, self.tuned))
        base, aligned, tuned = (each.T if turned else each for each in found)
        return base, aligned, tuned

    @property
    def layers(self) -> list[str]:
        """The linear layers, without a head that is tied."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and not (name == "lm_head" and self.model.config.tie_word_embeddings)
        ]


@pytest.fixture(
    scope="module",
    params=[(a, d) for a in ODD for d in (torch.float32, torch.bfloat16)],
    ids=lambda each: f"{each[0]}-{str(each[1]).removeprefix('torch.')}",
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    architecture, dtype = request.param
    root = tmp_path_factory.mktemp(architecture)
    base = build(architecture, **ODD[architecture])
    aligned = moved(base, 0.05)
    tuned = moved(aligned, 0.02, seed=3)
    with torch.no_grad():  # one weight was frozen
        frozen = "h.0.attn.c_proj" if architecture == "gpt2" else "layers.0.self_attn.o_proj"
        for (name, one), other in zip(tuned.named_parameters(), aligned.parameters(), strict=True):
            if f"{frozen}.weight" in name:
                one.copy_(other)
    saved = {}
    for name, model in (("base", base), ("aligned", aligned), ("tuned", tuned)):
        model.to(dtype).save_pretrained(root / name, max_shard_size="30KB")
        saved[name] = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return Models(root, saved["base"], saved["aligned"], saved["tuned"], tuned)


def check(
    models: Models,
    method: Method,
    out: Path,
    remade: Callable[[str, Tensor], Tensor],
    selection: Selection | None = None,
    cosine: float = COSINE,
    scored: Callable[[str, Tensor], Tensor] | None = None,
) -> Any:
    """Patch, and check every cosine and every weight that transformers loads; return the record.

    Args:
        models: the models.
        method: what is done.
        out: where.
        remade: makes `ΔW'` of a layer's name and `ΔW`, in float64.
        selection: of modules.
        cosine: how far cosines may be off.
        scored: makes what cosines are of, where that is another one.
    """
    report = patch(method, models.subject, out, Options(selection=selection or Selection()))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    changed = set()
    for module in report.modules:
        _, aligned, tuned = models.matrices(module.name)
        delta = tuned - aligned
        size = float(delta.norm() / aligned.norm())
        assert module.detail["relative_change"] == pytest.approx(size, rel=1e-5)
        if not bool(delta.any()):
            assert module.cosine is None
            assert not module.projected
            continue
        new = remade(module.name, delta)
        other = new if scored is None else scored(module.name, delta)
        expected = float((delta * other).sum() / (delta.norm() * other.norm()))
        assert module.cosine == pytest.approx(expected, abs=cosine)
        assert module.scale == pytest.approx(float(new.norm() / delta.norm()), rel=1e-4)
        if not module.projected:
            continue
        changed.add(f"{module.name}.weight")
        found = loaded[f"{module.name}.weight"]
        assert_written(found, aligned + new, models, module.name)
    for name, tensor in models.tuned.items():
        if name not in changed:
            assert torch.equal(loaded[name], tensor), name
    assert len(changed) == report.projected > 0
    assert {module.name for module in report.modules} <= set(models.layers)
    return report


def assert_written(found: Tensor, want: Tensor, models: Models, name: str) -> None:
    """Check that a weight is what is wanted but for rounding to its dtype, and float32 sums."""
    want = want.T if isinstance(models.model.get_submodule(name), Conv1D) else want
    rounding = torch.finfo(found.dtype).eps / 2
    allowed = rounding * 1.01 * want.abs() + 2e-6 * want.abs().max()
    assert bool(((found.double() - want).abs() <= allowed).all()), name


def test_safe_lora(models: Models, tmp_path: Path) -> None:
    def remade(name: str, delta: Tensor) -> Tensor:
        base, aligned, _ = models.matrices(name)
        return oracle_C(aligned, base) @ delta

    method = SafeLora(models.root / "base", models.root / "aligned")
    report = check(models, method, tmp_path / "out", remade, Selection(layers=6))
    assert {module.name for module in report.modules} == set(models.layers)
    scored = [m for m in report.modules if m.cosine is not None]
    for module in scored:
        base, aligned, tuned = models.matrices(module.name)
        expected = oracle_cosine(tuned - aligned, oracle_C(aligned, base))
        assert module.cosine == pytest.approx(expected, abs=COSINE)
    lowest = sorted(scored, key=lambda module: module.cosine)[:6]
    assert {m.name for m in lowest} == {m.name for m in report.modules if m.projected}


def test_weights_of_many_blocks(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are where a weight is larger than a block, and not kept between passes."""
    monkeypatch.setattr(whole, "BLOCK", 4 * 36 * 5)
    monkeypatch.setattr(differences, "CPU_HOLD", 0)

    def remade(name: str, delta: Tensor) -> Tensor:
        base, aligned, _ = models.matrices(name)
        return oracle_C(aligned, base) @ delta

    method = SafeLora(models.root / "base", models.root / "aligned")
    check(models, method, tmp_path / "out", remade, Selection(all=True))


def test_the_exact_projector(models: Models, tmp_path: Path) -> None:
    def remade(name: str, delta: Tensor) -> Tensor:
        base, aligned, _ = models.matrices(name)
        return oracle_C(aligned, base, rank=5) @ delta

    method = SafeLora(models.root / "base", models.root / "aligned", projector="exact", rank=5)
    check(models, method, tmp_path / "out", remade, Selection(all=True))


@pytest.mark.parametrize("form", [Form(exact=True), Form(rank=7)], ids=["exact", "eigenpairs"])
def test_an_alignment_file(models: Models, tmp_path: Path, form: Form) -> None:
    file = tmp_path / "model.safealign.safetensors"
    align(models.root / "base", models.root / "aligned", file, form)

    def remade(name: str, delta: Tensor) -> Tensor:
        base, aligned, _ = models.matrices(name)
        C = oracle_C(aligned, base)
        if form.rank is None:
            return C @ delta
        values, vectors = torch.linalg.eigh(C)
        U = vectors[:, -form.rank :]
        found: Tensor = U @ (values[-form.rank :, None] * (U.T @ delta))
        return found

    report = check(models, SafeLora(alignment=file), tmp_path / "out", remade, Selection(all=True))
    assert "lm_head" not in {module.name for module in report.modules}
    kept = {each.parameter: each.kind for each in report.unprojected}
    if not models.model.config.tie_word_embeddings:
        assert "does not hold" in kept["lm_head.weight"]
    for module in report.modules if form.rank is not None else ():
        if module.cosine is None:
            continue
        base, aligned, tuned = models.matrices(module.name)
        low, high = module.bounds
        assert low <= oracle_cosine(tuned - aligned, oracle_C(aligned, base)) <= high


def test_a_safety_module(models: Models, tmp_path: Path) -> None:
    targets = tuple({name.rpartition(".")[2] for name in models.layers} - {"lm_head"})
    file = save_safety_module(
        models.model, tmp_path / "model.safety.safetensors", targets=targets, rank=6
    )
    U = {k.removesuffix(".weight.U"): v for k, v in load_file(file).items() if k.endswith(".U")}

    def remade(name: str, delta: Tensor) -> Tensor:
        return salora.C_S(U[name][:, :4]) @ delta

    report = check(models, Salora(file, rank=4), tmp_path / "out", remade)
    for module in report.modules:
        if module.cosine is None:
            continue
        _, aligned, tuned = models.matrices(module.name)
        inside = float((U[module.name][:, :4].double().T @ (tuned - aligned)).norm())
        share = (inside / float((tuned - aligned).norm())) ** 2
        assert module.detail["safety_share"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("mu", [0.3, 5.0])
@pytest.mark.parametrize("positions", [9, 400], ids=["few", "many"])
def test_statistics(models: Models, tmp_path: Path, mu: float, positions: int) -> None:
    files = [
        save_statistics(models.model, tmp_path / f"{name}.stats.safetensors", seed, positions)
        for seed, name in enumerate(("safety", "task"))
    ]
    H, S = (stored(file) for file in files)
    S = {name: covariance.ridged(each) for name, each in S.items()}

    def remade(name: str, delta: Tensor) -> Tensor:
        return covariance.corrected(delta, H[name], S[name], mu)

    method = Covariance(safety_data=files[0], task_data=files[1], mu=mu)
    report = check(models, method, tmp_path / "out", remade)
    for module in report.modules:
        if module.cosine is None:
            continue
        _, aligned, tuned = models.matrices(module.name)
        name, delta = module.name, tuned - aligned
        ratio = covariance.ratio(delta, H[name], S[name])
        assert module.detail["safety_ratio"] == pytest.approx(ratio, rel=1e-4)
        after = covariance.ratio(remade(name, delta), H[name], S[name])
        assert module.detail["safety_ratio_after"] == pytest.approx(after, rel=1e-3)


def save_statistics(model: Any, path: Path, seed: int, positions: int) -> Path:
    """Write statistics of random inputs for all linear layers, which share none."""
    from safeproj.methods.covariance.file import KIND
    from safeproj.methods.recorded import recorded_document, write_recorded
    from safeproj.names.layout import CONV1D, LINEAR
    from tests.support import arrays_of

    generator = torch.Generator().manual_seed(seed)
    tensors, parameters, weights = {}, [], {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | Conv1D) or name == "lm_head":
            continue
        linear = isinstance(layer, nn.Linear)
        m, n = layer.weight.shape if linear else layer.weight.shape[::-1]
        X = torch.randn(positions, n, generator=generator) / positions**0.5
        is_whole = positions >= n
        tensor = f"{name}.weight.{'moment' if is_whole else 'rows'}"
        tensors[tensor] = X.T @ X if is_whole else X
        layout = LINEAR if linear else CONV1D
        parameters.append((f"{name}.weight", tuple(layer.weight.shape), layout))
        trace = float(X.square().sum())
        weights[f"{name}.weight"] = {"shape": [m, n], "tensor": tensor, "trace": trace}
    inputs = {
        "aligned": {"source": "org/aligned", "revision": "abc", "sha256": {"files": {}}},
        "data": {"source": "data.jsonl", "sha256": "0" * 64, "rows": 3, "positions": positions},
    }
    options = {"targets": ["all-linear"], "positions": "all"}
    config = model.config.to_dict()
    document = recorded_document(KIND, options, inputs, config, parameters, weights, by_torch=True)
    write_recorded(path, KIND, arrays_of(tensors).items(), lambda: document)
    return path


def safe_lora(models: Models, name: str, delta: Tensor) -> Tensor:
    """Return what Safe LoRA makes of a change, by whose cosine weights are chosen."""
    base, aligned, _ = models.matrices(name)
    return oracle_C(aligned, base) @ delta


@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_the_safety_vector(models: Models, tmp_path: Path, gamma: float) -> None:
    def remade(name: str, delta: Tensor) -> Tensor:
        base, aligned, _ = models.matrices(name)
        return delta + gamma * (aligned - base)

    method = Merge(models.root / "base", models.root / "aligned", weight=gamma)
    report = check(
        models, method, tmp_path / "out", remade, scored=lambda *of: safe_lora(models, *of)
    )
    assert report.selection["mode"] == "all"
    assert report.projector == {
        "kind": "merge", "form": "safety-vector", "weight": gamma, "chosen_by": "approx"
    }  # fmt: skip
    assert {module.name for module in report.modules} == set(models.layers)
    found = [m for m in report.modules if m.cosine is not None]
    for module in found:
        base, aligned, tuned = models.matrices(module.name)
        change = gamma * float((aligned - base).norm() / (tuned - aligned).norm())
        assert module.detail["merge_change"] == pytest.approx(change, rel=1e-4)


@pytest.fixture(scope="module")
def safe(models: Models) -> dict[str, Tensor]:
    """Another fine-tune of the aligned model, beside the others."""
    aligned = AutoModelForCausalLM.from_pretrained(models.root / "aligned", dtype="auto")
    dtype = next(aligned.parameters()).dtype
    found = moved(aligned.float(), 0.01, seed=11).to(dtype)
    found.save_pretrained(models.root / "safe")
    return {name: each.detach().clone() for name, each in found.state_dict().items()}


@pytest.mark.parametrize("deciding", ["pair", "file", "nothing"])
def test_another_fine_tune(
    models: Models, safe: dict[str, Tensor], tmp_path: Path, deciding: str
) -> None:
    def remade(name: str, delta: Tensor) -> Tensor:
        _, aligned, _ = models.matrices(name)
        other = safe[f"{name}.weight"].double()
        turned = isinstance(models.model.get_submodule(name), Conv1D)
        return 0.7 * delta + 0.3 * ((other.T if turned else other) - aligned)

    given: dict[str, Any] = {"safe_model": models.root / "safe", "weight": 0.3}
    selection = Selection(layers=6)
    if deciding == "pair":
        given |= {"base": models.root / "base", "aligned": models.root / "aligned"}
    elif deciding == "file":
        file = tmp_path / "model.safealign.safetensors"
        align(models.root / "base", models.root / "aligned", file, Form(exact=True))
        given |= {"alignment": file}
    else:
        selection = Selection()
    scored = None if deciding == "nothing" else lambda *of: safe_lora(models, *of)
    report = check(models, Merge(**given), tmp_path / "out", remade, selection, scored=scored)
    document = read_json(tmp_path / "out" / "safeproj.json")
    assert document["inputs"]["safe_model"]["source"] == str(models.root / "safe")
    read = document["inputs"]["safe_model"]["blake3"]["tensors"]
    names = {f"{m.name}.weight" for m in report.modules if m.cosine is not None}
    assert {name.rpartition(".")[2] for name in read} == {"weight"}
    assert len(read) >= len(names)
    scores = [m.cosine for m in report.modules if m.projected]
    others = [m.cosine for m in report.modules if not m.projected and m.cosine is not None]
    if deciding != "nothing":
        assert len(scores) == 6
        assert max(scores) <= min(others)


def test_inspect_scores_as_patch_does(models: Models, tmp_path: Path) -> None:
    method = SafeLora(models.root / "base", models.root / "aligned")
    options = Options(selection=Selection(layers=2))
    one = inspect(method, models.subject, options)
    other = patch(method, models.subject, tmp_path / "out", options)
    assert one.modules == other.modules
    assert one.unprojected == other.unprojected


def test_results_do_not_depend_on_workers(models: Models, tmp_path: Path) -> None:
    method, outs = SafeLora(models.root / "base", models.root / "aligned"), []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        patch(method, models.subject, out, Options(selection=Selection(all=True), workers=workers))
        outs.append(out)
    for path in outs[0].glob("*.safetensors"):
        assert path.read_bytes() == (outs[1] / path.name).read_bytes()


def test_torch_computes_the_same(models: Models, tmp_path: Path) -> None:
    method = SafeLora(models.root / "base", models.root / "aligned")
    one, other = (
        inspect(method, models.subject, Options(device=device)) for device in ("cpu", "torch")
    )
    for first, second in zip(one.modules, other.modules, strict=True):
        assert first.cosine == pytest.approx(second.cosine, abs=COSINE)
    out = tmp_path / "out"
    options = Options(selection=Selection(all=True), device="torch")
    report = patch(method, models.subject, out, options)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for module in report.modules:
        if module.projected:
            base, aligned, tuned = models.matrices(module.name)
            want = aligned + oracle_C(aligned, base) @ (tuned - aligned)
            assert_written(loaded[f"{module.name}.weight"], want, models, module.name)


def test_the_record_has_the_digests_of_what_was_read(models: Models, tmp_path: Path) -> None:
    from tests.support import blake3_of

    patch(SafeLora(models.root / "base", models.root / "aligned"), models.subject, tmp_path / "out")
    inputs = read_json(tmp_path / "out" / "safeproj.json")["inputs"]
    index = json.loads((models.root / "tuned" / "model.safetensors.index.json").read_text())
    for role, folder in (("model", "tuned"), ("aligned", "aligned"), ("base", "base")):
        index = json.loads((models.root / folder / "model.safetensors.index.json").read_text())
        tensors = inputs[role]["blake3"]["tensors"]
        assert len(tensors) == len(models.layers)
        for name, digest in tensors.items():
            with safe_open(models.root / folder / index["weight_map"][name], "pt") as file:
                assert blake3_of(file.get_tensor(name)) == digest
