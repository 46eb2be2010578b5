"""Second moments of what layers read, against a run without padding, hook by hook."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from safeproj.errors import SafeprojError
from safeproj.lm.data import Data, Sample
from safeproj.lm.layers import find_layers
from safeproj.methods.covariance.moments import InputMoment, input_moments
from tests.methods.covariance import oracle
from tests.methods.salora.models import TARGETS, VOCABULARY, build

ARCHITECTURES = ("llama", "qwen2", "gpt2", "phi3")


def data(rows: int, seed: int = 0, longest: int = 9) -> Data:
    """Return samples of different lengths, so that batches are padded."""
    rng = random.Random(seed)
    samples = []
    for _ in range(rows):
        length = rng.randint(2, longest)
        tokens = tuple(rng.randrange(3, VOCABULARY) for _ in range(length))
        samples.append(Sample(tokens, rng.randrange(1, length)))
    return Data("data", "0" * 64, tuple(samples), 0)


def matrices(moments: list[InputMoment]) -> dict[str, torch.Tensor]:
    """Return each layer's moment (n, n), in float64."""
    found = {}
    for each in moments:
        matrix = each.matrix.double()
        for name in each.layers:
            found[name] = matrix if each.whole else matrix.T @ matrix
    return found


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_prompts_and_responses_apart(positions: str) -> None:
    model, samples = build("llama"), data(12)
    layers = find_layers(model, ["down_proj"])
    moments = list(input_moments(model, layers, samples.batches(4), positions=positions))
    for name, found in matrices(moments).items():
        kept = []
        for sample in samples.samples:
            rows = oracle.inputs(model, [name], [sample.tokens])[name]
            kept.append(rows[: sample.start] if positions == "prompt" else rows[sample.start :])
        expected = oracle.moment(torch.cat(kept))
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("rows", [3, 40], ids=["fewer-positions-than-inputs", "more"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_a_run_sample_by_sample(architecture: str, rows: int) -> None:
    model, samples = build(architecture), data(rows)
    layers = find_layers(model, TARGETS[architecture])
    moments = list(input_moments(model, layers, samples.batches(4)))
    seen = oracle.inputs(model, list(layers), [sample.tokens for sample in samples.samples])
    found = matrices(moments)
    assert found.keys() == layers.keys()
    for name, rows_seen in seen.items():
        expected = oracle.moment(rows_seen)
        # Padding changes the order of sums in the model's float32 by a few units in the last place.
        assert float((found[name] - expected).norm() / expected.norm()) < 1e-5
    positions = sum(len(sample.tokens) for sample in samples.samples)
    for each in moments:
        assert each.positions == positions
        assert each.whole == (positions >= each.matrix.shape[1])
        assert each.trace == pytest.approx(float(found[each.layers[0]].trace()), rel=1e-5)


def test_layers_that_read_one_input_share_a_moment() -> None:
    model = build("llama")
    layers = find_layers(model, ["all-linear"])
    groups = [each.layers for each in input_moments(model, layers, data(5).batches())]
    kinds = {frozenset(name.rpartition(".")[2] for name in names) for names in groups}
    assert kinds == {
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"o_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
    }
    assert len(groups) == 8  # of two layers


def test_a_small_memory_gives_the_same_in_more_passes() -> None:
    model, samples = build("llama"), data(30)
    layers = find_layers(model, ["all-linear"])
    calls: list[tuple[int, int]] = []
    whole = list(input_moments(model, layers, samples.batches()))
    parts = list(
        input_moments(
            model,
            layers,
            samples.batches(),
            memory=1,
            on_batch=lambda done, total: calls.append((done, total)),
        )
    )
    assert calls[-1] == (8 * 4, 8 * 4)  # eight inputs, four batches
    for one, other in zip(whole, parts, strict=True):
        assert one.layers == other.layers
        assert torch.equal(one.matrix, other.matrix)


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_the_model_is_left_as_it_was(target: str) -> None:
    model = build("llama").train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    list(input_moments(model, find_layers(model, [target]), data(3).batches()))
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_are_refused_by_name() -> None:
    model = build("mixtral")
    layer = torch.nn.Linear(32, 32)
    model.model.layers[0].unused = layer
    with pytest.raises(SafeprojError, match="unused: expected to run once"):
        list(input_moments(model, {"model.layers.0.unused": layer}, data(3).batches()))


def test_inputs_that_are_not_finite_are_refused() -> None:
    model: Any = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5:].fill_(float("inf"))
    with pytest.raises(SafeprojError, match="zero or not finite"):
        list(input_moments(model, find_layers(model, ["q_proj"]), data(3).batches()))
