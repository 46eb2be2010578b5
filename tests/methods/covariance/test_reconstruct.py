"""The correction layer by layer, against float64 least squares on a model with merged weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from safeproj.errors import SafeprojError
from safeproj.lm.data import Data, read_data
from safeproj.lm.layers import MEMORY
from safeproj.lm.passes import Pass
from safeproj.methods.covariance.formulas import Reconstruction
from safeproj.methods.covariance.reconstruct import reconstructed
from tests.conformance.oracle import save, updates
from tests.methods.covariance import oracle
from tests.methods.covariance.test_command import head, lora
from tests.methods.salora.models import build
from tests.report.test_schemas import validator
from tests.support import FACTORS, MANIFEST, assert_refused, read_json, safeproj, snapshot

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-lm"
MU = 0.6


class Case:
    """A model with a tokenizer and data, and an adapter on it.

    Attributes:
        model: the aligned model.
        safety: the safety data.
        task: the task data.
    """

    def __init__(self, root: Path, architecture: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(EXAMPLE / "aligned"))
        self.model = build(architecture, vocab_size=len(tokenizer))
        self.aligned = root / "aligned"
        self.model.save_pretrained(str(self.aligned))
        tokenizer.save_pretrained(str(self.aligned))
        self.files = [
            head(EXAMPLE / "data" / f"{name}.jsonl", root / f"{name}.jsonl", 16)
            for name in ("safety", "task")
        ]
        self.safety, self.task = (read_data(path, tokenizer) for path in self.files)

    def given(self, adapter: Path, out: Path) -> list[str | Path]:
        safety, task = self.files
        return [
            "--aligned", self.aligned, "--safety-data", safety, "--task-data", task,
            "--adapter", adapter, "--out", out, "--reconstruct", "--mu", str(MU),
        ]  # fmt: skip

    def seen(self, name: str, deltas: Mapping[str, Tensor], data: Data) -> Tensor:
        """Return what a layer reads (N, n) in the model with these updates merged."""
        merged = copy.deepcopy(self.model).double()
        layers = dict(merged.named_modules())
        with torch.no_grad():
            for layer, delta in deltas.items():
                is_turned = isinstance(layers[layer], Conv1D)
                layers[layer].weight.add_(delta.T if is_turned else delta)
        return oracle.inputs(merged, [name], [each.tokens for each in data.samples])[name]

    def weight(self, name: str) -> Tensor:
        layer = self.model.get_submodule(name)
        found: Tensor = layer.weight.detach().double()
        return found.T if isinstance(layer, Conv1D) else found

    def expected(
        self, order: Sequence[Sequence[str]], trained: Mapping[str, Tensor], B: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the corrected updates: each layer by least squares over all its inputs."""
        current = dict(trained)
        for group in order:
            x = self.seen(group[0], current, self.safety)
            x0 = self.seen(group[0], {}, self.safety)
            s = self.seen(group[0], current, self.task)
            s0 = self.seen(group[0], trained, self.task)
            rho = float(oracle.ridged(oracle.moment(s))[0, 0] - oracle.moment(s)[0, 0])
            found = {}
            for name in group:
                W, delta = self.weight(name), trained[name]
                # Three blocks of rows, each weighted by the root of what the objective has it by.
                rows = torch.cat(
                    [
                        x / len(x) ** 0.5,
                        s * (MU / len(s)) ** 0.5,
                        torch.eye(x.shape[1], dtype=torch.float64) * (MU * rho) ** 0.5,
                    ]
                )
                wanted = torch.cat(
                    [
                        (x0 - x) @ W.T / len(x) ** 0.5,
                        (s0 @ (W + delta).T - s @ W.T) * (MU / len(s)) ** 0.5,
                        delta.T * (MU * rho) ** 0.5,
                    ]
                )
                # The best update of any rank, then the best of the form B A'.
                free = torch.linalg.lstsq(rows, wanted).solution.T
                basis = torch.linalg.qr(B[name]).Q
                found[name] = basis @ (basis.T @ free)
            current.update(found)
        return current


ORDERS = {
    "llama": (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ),
    "gpt2": (["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]),
}
STACKS = {"llama": "model.layers", "gpt2": "transformer.h"}


def order_of(architecture: str, names: Sequence[str] | None = None) -> list[list[str]]:
    """Return layers, or all, in the order in which the model runs them, by shared inputs."""
    found = [
        [f"{STACKS[architecture]}.{layer}.{kind}" for kind in kinds]
        for layer in range(2)
        for kinds in ORDERS[architecture]
    ]
    kept = [[name for name in group if names is None or name in names] for group in found]
    return [group for group in kept if group]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    found = Case(tmp_path_factory.mktemp(request.param), request.param)
    found.model.architecture = request.param
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama")


def scaled_down(adapter: Path, factor: float) -> Path:
    """Make an adapter's updates small enough that the model stays a sensible one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / FACTORS)
    for name in tensors:
        if ".lora_B." in name:
            tensors[name] = tensors[name] * factor
    save_file(tensors, adapter / FACTORS, metadata={"format": "pt"})
    return adapter


@pytest.mark.parametrize("targets", ["all-linear", "few"])
def test_each_layer_is_the_least_squares_solution(case: Case, tmp_path: Path, targets: str) -> None:
    architecture = case.model.architecture
    few = {"llama": ["v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[architecture]
    config = lora(target_modules="all-linear" if targets == "all-linear" else few)
    adapter = scaled_down(save(case.model, config, tmp_path / "adapter"), 0.1)
    result = safeproj("patch", *case.given(adapter, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    trained = {n: u.matrix.double() for n, u in updates(case.model, adapter).items()}
    found = {n: u.matrix.double() for n, u in updates(case.model, tmp_path / "out").items()}
    # The columns of ΔW span those of B, which has full rank.
    B = {n: torch.linalg.svd(delta)[0][:, :3] for n, delta in trained.items()}
    expected = case.expected(order_of(architecture, list(trained)), trained, B)
    manifest = read_json(tmp_path / "out" / MANIFEST)
    validator("manifest").validate(manifest)
    assert manifest["projector"] == {"kind": "reconstruction", "mu": MU}
    assert {module["name"] for module in manifest["modules"]} == set(trained)
    for module in manifest["modules"]:
        name = module["name"]
        # The model runs in float32, and every layer starts from what the ones before it gave.
        error = float((found[name] - expected[name]).norm() / trained[name].norm())
        assert error < 2e-3, (name, error)
        cosine = oracle.cosine(trained[name], expected[name])
        assert module["cosine"] == pytest.approx(max(cosine, 0.0), abs=5e-3)


def test_the_first_layer_is_what_the_statistics_give(llama: Case, tmp_path: Path) -> None:
    config = lora(target_modules=r"model\.layers\.0\.self_attn\.(q|k|v)_proj")
    adapter = save(llama.model, config, tmp_path / "adapter")
    assert safeproj("patch", *llama.given(adapter, tmp_path / "out")).returncode == 0
    plain = [each for each in llama.given(adapter, tmp_path / "plain") if each != "--reconstruct"]
    assert safeproj("patch", *plain).returncode == 0
    rebuilt, closed = (updates(llama.model, tmp_path / name) for name in ("out", "plain"))
    for name, update in closed.items():
        error = float((rebuilt[name].matrix - update.matrix).norm() / update.matrix.norm())
        assert error < 1e-4


def attached(case: Case, adapter: Path) -> Any:
    """Return the model of a case with an adapter on it, to be changed."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(case.model), str(adapter))


def test_the_adapter_on_the_model_is_left_as_it_was(llama: Case, tmp_path: Path) -> None:
    model = attached(llama, save(llama.model, lora(), tmp_path / "adapter"))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    calls: list[tuple[int, int]] = []
    safety, task = llama.safety.batches(8), llama.task.batches(8)
    found = reconstructed(
        model, names, safety, task, Reconstruction(1.0), lambda *call: calls.append(call)
    )
    assert list(found) == names
    assert calls[-1] == (2 * 2 * 4, 2 * 2 * 4)  # inputs, runs, batches
    assert_as_before(model, before)
    assert all(not torch.equal(A, before_A(before, name)) for name, A in found.items())


@pytest.mark.parametrize("kept", ["some", "nothing"])
def test_what_does_not_fit_into_memory_is_computed_again(
    case: Case, tmp_path: Path, kept: str
) -> None:
    adapter = save(case.model, lora(target_modules="all-linear"), tmp_path / "adapter")
    model = attached(case, adapter)
    names = [name for group in order_of(case.model.architecture) for name in group]
    data = case.safety.batches(4), case.task.batches(4)
    passes: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))

    def corrected(memory: int) -> tuple[dict[str, Tensor], int]:
        passes.clear()
        return reconstructed(model, names, *data, Reconstruction(MU), memory=memory), len(passes)

    expected, least = corrected(MEMORY)
    found, count = corrected(400_000 if kept == "some" else 0)
    inputs, batches, first = 2 * 4, 2 * 4, 1
    most = first + 2 * inputs * batches
    assert least == first + 2 * batches
    assert count == most if kept == "nothing" else least < count < most
    assert all(torch.equal(found[name], factor) for name, factor in expected.items())


def test_an_error_in_a_run_is_told_and_leaves_nothing_behind(llama: Case, tmp_path: Path) -> None:
    model = attached(llama, save(llama.model, lora(), tmp_path / "adapter"))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    safety, task = llama.safety.batches(8), llama.task.batches(8)
    task[-1]["input_ids"][0, 0] = 10_000
    with pytest.raises(SafeprojError, match="10000"):
        reconstructed(model, ["model.layers.1.self_attn.v_proj"], safety, task, Reconstruction(MU))
    assert_as_before(model, before)


def assert_as_before(model: Any, state: Mapping[str, Tensor]) -> None:
    """Check that a model has its weights, no hooks, and nothing that still runs it."""
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Pass)]


def before_A(state: Mapping[str, Tensor], name: str) -> Tensor:
    return state[f"base_model.model.{name}.lora_A.default.weight"]


def test_an_update_that_is_zero_stays(llama: Case, tmp_path: Path) -> None:
    adapter = scaled_down(save(llama.model, lora(), tmp_path / "adapter"), 0.0)
    result = safeproj("patch", *llama.given(adapter, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert all(module["cosine"] is None for module in manifest["modules"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--safety-data", "s.stats.safetensors"], ["--safety-data is a file of statistics"]),
        (["--safety-data", "s.jsonl"], ["--task-data is missing"]),
        (["--base", "b"], ["--reconstruct goes with --safety-data"]),
        (
            ["--safety-data", "s.jsonl", "--task-data", "t.jsonl", "--layers", "3"],
            ["--layers", "--include"],
        ),
    ],
    ids=["statistics", "no task data", "safe lora", "layers"],
)
def test_it_needs_data(llama: Case, tmp_path: Path, options: list[str], words: list[str]) -> None:
    adapter = save(llama.model, lora(), tmp_path / "adapter")
    before = snapshot(tmp_path)
    result = safeproj(
        "patch", "--aligned", llama.aligned, "--adapter", adapter, "--out", tmp_path / "out",
        "--reconstruct", *options,
    )  # fmt: skip
    assert_refused(result, *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("settings", [{"use_dora": True}], ids=["dora"])
def test_what_is_no_plain_lora_is_refused(
    llama: Case, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = save(llama.model, lora(**settings), tmp_path / "adapter")
    result = safeproj("patch", *llama.given(adapter, tmp_path / "out"))
    assert_refused(result, "plain LoRA")
    assert not (tmp_path / "out").exists()


def test_many_adapters_are_refused(llama: Case, tmp_path: Path) -> None:
    for seed in (1, 2):
        save(llama.model, lora(), tmp_path / "in" / f"a{seed}", seed=seed)
    (tmp_path / "out").mkdir()
    result = safeproj("patch", *llama.given(tmp_path / "in", tmp_path / "out"))
    assert_refused(result, "--reconstruct goes with one adapter")


@pytest.mark.parametrize("mu", [0.0, -1.0, float("nan")])
def test_mu_is_positive(mu: float) -> None:
    with pytest.raises(ValueError, match="mu must be"):
        Reconstruction(mu)
