"""Safe Delta through the command: full fine-tunes and adapters, loaded again by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from safeproj.lm.data import read_data
from tests.conformance.oracle import save, updates
from tests.full.test_methods import ODD
from tests.methods.covariance import oracle as inputs_of
from tests.methods.covariance.test_command import head, lora
from tests.methods.safe_delta import oracle
from tests.methods.salora.models import build
from tests.report.test_schemas import validator
from tests.support import MANIFEST, assert_refused, moved, read_json, safeproj, snapshot

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-lm"
S = 2.0


class Case:
    """An aligned model and a full fine-tune of it, with a tokenizer and safety data."""

    def __init__(self, root: Path, architecture: str, dtype: torch.dtype) -> None:
        self.root = root
        tokenizer = AutoTokenizer.from_pretrained(str(EXAMPLE / "aligned"))
        self.data = head(EXAMPLE / "data" / "safety.jsonl", root / "safety.jsonl", 12)
        self.samples = read_data(self.data, tokenizer).samples
        sizes = {**ODD[architecture], "vocab_size": len(tokenizer)}
        self.model = build(architecture, **sizes)
        tuned = moved(self.model, 0.005, seed=3)
        for name, model in (("aligned", self.model), ("tuned", tuned)):
            model.to(dtype).save_pretrained(root / name, max_shard_size="40KB")
        tokenizer.save_pretrained(str(root / "aligned"))
        self.aligned, self.tuned = root / "aligned", root / "tuned"

    @property
    def method(self) -> list[str | Path]:
        return [*self.unnamed, "--method", "safe-delta", "--strength", str(S)]

    @property
    def unnamed(self) -> list[str | Path]:
        return ["--aligned", self.aligned, "--safety-data", self.data]

    @property
    def layers(self) -> list[str]:
        head = self.model.get_output_embeddings()
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        ]

    def seen(self, model: Any, name: str) -> Tensor:
        """Return what a layer of a model reads on the safety data, (N, n)."""
        found = inputs_of.inputs(model, [name], [each.tokens for each in self.samples])
        return found[name]


def loaded(folder: Path) -> Any:
    """Return a model as it is stored, in float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").double().eval()


def weight(model: Any, name: str) -> Tensor:
    """Return a layer's weight (m, n)."""
    layer = model.get_submodule(name)
    found: Tensor = layer.weight.detach()
    return found.T if isinstance(layer, Conv1D) else found


@pytest.fixture(
    scope="module",
    params=[(a, d) for a in ODD for d in (torch.float32, torch.bfloat16)],
    ids=lambda each: f"{each[0]}-{str(each[1]).removeprefix('torch.')}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param[0]), *request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", torch.float32)


def patch(case: Case, *options: str | Path) -> dict[str, Any]:
    result = safeproj("patch", *case.method, *options)
    assert result.returncode == 0, result.stderr
    out = Path(options[options.index("--out") + 1])
    document: dict[str, Any] = read_json(out / MANIFEST)
    validator("manifest").validate(document)
    return document


def test_each_weight_is_corrected_for_what_the_corrected_ones_before_it_make(
    case: Case, tmp_path: Path
) -> None:
    """The inputs are those of the model that was written: later layers do not change them."""
    out = tmp_path / "out"
    document = patch(case, "--model", case.tuned, "--out", out)
    aligned, tuned, found = (loaded(each) for each in (case.aligned, case.tuned, out))
    stored = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    modules = {each["name"]: each for each in document["modules"]}
    assert set(modules) == set(case.layers)
    for name in case.layers:
        W, own = weight(aligned, name), weight(tuned, name)
        want, kept = oracle.corrected(W, own, case.seen(found, name), S)
        rounding = torch.finfo(weight(stored, name).dtype).eps / 2
        off = (weight(found, name) - want).abs()
        assert bool((off <= 1.01 * rounding * want.abs() + 2e-6 * want.abs().max()).all()), name
        share = float(kept.double().mean())
        assert 0.0 < share < 0.85
        assert modules[name]["kept_share"] == pytest.approx(share, abs=1e-12)
        before, after = own - W, want - W
        cosine = float((before * after).sum() / before.norm() / after.norm())
        assert modules[name]["cosine"] == pytest.approx(
            cosine, abs=1e-2 if rounding > 1e-6 else 1e-4
        )
        assert modules[name]["projected"]
    changed = {f"{name}.weight" for name in case.layers}
    for key, tensor in tuned.state_dict().items():
        if key not in changed:
            assert torch.equal(found.state_dict()[key], tensor), key
    assert document["projector"] == {"kind": "safe-delta", "strength": S}
    assert document["inputs"]["safety_data"]["sha256"]["data"]


def test_the_rest_keeps_its_values_and_is_run_with_them(llama: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = patch(llama, "--model", llama.tuned, "--include", "down_proj", "--out", out)
    aligned, tuned, found = (loaded(each) for each in (llama.aligned, llama.tuned, out))
    corrected = {each["name"] for each in document["modules"] if each["projected"]}
    assert corrected == {name for name in llama.layers if "down_proj" in name}
    for name in llama.layers:
        if name not in corrected:
            assert torch.equal(weight(found, name), weight(tuned, name))
            continue
        want, _ = oracle.corrected(
            weight(aligned, name), weight(tuned, name), llama.seen(found, name), S
        )
        torch.testing.assert_close(weight(found, name), want, rtol=0, atol=1e-6)
    assert "weight of no linear layer that is run" in str(document["unprojected"])


def test_verify_does_it_again(llama: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patch(llama, "--model", llama.tuned, "--out", out)
    given = [*llama.method, "--model", out, "--original", llama.tuned]
    result = safeproj("verify", *given)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(llama.layers)} projected weights are equal bit for bit" in result.stdout

    (shard,) = [p for p in out.glob("*.safetensors") if any("q_proj" in k for k in load_file(p))][
        :1
    ]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert safeproj("verify", *given).returncode == 1


def test_check_scores_a_model_and_believes_its_record(llama: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patch(llama, "--model", llama.tuned, "--out", out)
    before = safeproj("check", *llama.method, "--model", llama.tuned, "--format", "json")
    assert before.returncode == 1, before.stderr
    assert "full-weight-changes" in before.stdout
    after = safeproj("check", *llama.method, "--model", out)
    assert f"{len(llama.layers)} recorded" in after.stdout, after.stdout + after.stderr


def changes(case: Case, adapter: Path) -> dict[str, Tensor]:
    """Return the update of each layer, (m, n), as PEFT loads it."""
    return {name: each.matrix for name, each in updates(case.model, adapter).items()}


def merged(case: Case, adapter: Path) -> Any:
    """Return the model with an adapter merged in float64."""
    model = loaded(case.aligned)
    with torch.no_grad():
        for name, delta in changes(case, adapter).items():
            layer = model.get_submodule(name)
            layer.weight.add_(delta.T if isinstance(layer, Conv1D) else delta)
    return model


@pytest.mark.parametrize("rank", [None, 9])
def test_an_adapter_is_the_best_one_of_what_its_weights_become(
    case: Case, tmp_path: Path, rank: int | None
) -> None:
    """Its inputs are those of the model with the adapter that was written."""
    out = tmp_path / "out"
    adapter = save(case.model, lora(target_modules="all-linear"), tmp_path / "adapter")
    more: Sequence[str] = () if rank is None else ("--delta-rank", str(rank))
    document = patch(case, "--adapter", adapter, "--out", out, "--strength", "300", *more)
    assert document["projector"] == {"kind": "safe-delta", "strength": 300.0, "form": "low-rank"}
    aligned, with_it = loaded(case.aligned), merged(case, out)
    trained, written = changes(case, adapter), changes(case, out)
    for module in document["modules"]:
        name, r = module["name"], rank or 3
        W, X = weight(aligned, name), case.seen(with_it, module["name"])
        q, kept = oracle.corrected(W, W + trained[name], X, 300.0)
        want = q - W
        values = torch.linalg.svdvals(want)
        error = float(values[r:].norm() / values.norm())
        # Subspace iteration ends where a step gains next to nothing; factors are float32.
        off = float((want - written[name]).norm() / want.norm())
        assert off == pytest.approx(error, rel=1e-3, abs=1e-5), name
        assert module["delta_error"] == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert module["kept_share"] == pytest.approx(float(kept.double().mean()), abs=1e-9)
        assert 0.0 < module["kept_share"] < 0.85
        before, after = trained[name], written[name]
        cosine = float((before * after).sum() / before.norm() / after.norm())
        assert module["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert module["written_rank"] == r
    worst = max(each["delta_error"] for each in document["modules"])
    told = [each for each in document["warnings"] if "a larger --delta-rank differs less" in each]
    assert bool(told) == (worst > 0.1)


def test_what_an_adapter_does_not_hold_is_told(llama: Case, tmp_path: Path) -> None:
    """Most entries of a large change are left out, and those that are kept have no low rank."""
    adapter, out = save(llama.model, lora(), tmp_path / "adapter"), tmp_path / "out"
    document = patch(llama, "--adapter", adapter, "--out", out, "--strength", "20000")
    (told,) = [each for each in document["warnings"] if "best approximation" in each]
    worst = max(each["delta_error"] for each in document["modules"])
    assert f"differs from it by up to {worst:.0%}; a larger --delta-rank differs less" in told


def test_an_adapter_is_left_to_a_gate_that_does_not_run_it(llama: Case, tmp_path: Path) -> None:
    adapter, out = save(llama.model, lora(), tmp_path / "adapter"), tmp_path / "out"
    result = safeproj("check", *llama.method, adapter)
    assert result.returncode == 2
    assert "Safe Delta runs the model with the adapter, which a gate does not" in result.stdout
    patch(llama, "--adapter", adapter, "--out", out)
    refused = safeproj("verify", *llama.method, out, "--original", adapter)
    assert_refused(refused, "Safe Delta runs the model with the adapter, which a gate does not")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "0.3"], "--threshold and --layers do not go with Safe Delta"),
        (["--layers", "3"], "--threshold and --layers do not go with Safe Delta"),
        (["--strength", "0"], "--strength must be a number of more than 0, found 0.0"),
        (["--delta-rank", "3"], "--delta-rank is for adapters; leave it out with --model"),
        (["--mu", "3"], "--mu goes with --safety-data"),
        (["--task-data", "x"], "--method safe-delta needs --aligned and --safety-data"),
        (["--safety-data", "s.stats.safetensors"], "statistics of the aligned model"),
        (["--safety-data", "nothing.jsonl"], "nothing.jsonl"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_what_does_not_go(llama: Case, tmp_path: Path, options: list[str], words: str) -> None:
    before = snapshot(tmp_path)
    result = safeproj(
        "patch", *llama.method, "--model", llama.tuned, "--out", tmp_path / "out", *options
    )
    assert_refused(result, words)
    assert snapshot(tmp_path) == before


def test_it_has_to_be_named(llama: Case) -> None:
    result = safeproj("inspect", *llama.unnamed, "--strength", "1", "--model", llama.tuned)
    assert_refused(result, "--strength goes with --method safe-delta, for Safe Delta")


def test_what_is_no_number_is_told(llama: Case, tmp_path: Path) -> None:
    broken = moved(llama.model, 0.005, seed=3).float()
    with torch.no_grad():
        broken.get_input_embeddings().weight[:, 1] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    result = safeproj(
        "patch", *llama.method, "--model", tmp_path / "broken", "--out", tmp_path / "out"
    )
    assert_refused(result, "what it reads on the safety data is not finite")
    assert not (tmp_path / "out").exists()


def test_a_sweep_says_that_it_tries_none(llama: Case, tmp_path: Path) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    prompts: list[str | Path] = [
        "--harmful",
        llama.data,
        "--skill",
        EXAMPLE / "data" / "task.jsonl",
    ]
    result = safeproj("sweep", adapter, *llama.unnamed, "--method", "safe-delta", *prompts)
    assert_refused(result, "no sweep tries Safe Delta")
