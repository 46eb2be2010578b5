"""Directions of a model's outputs: what they span, and how often the model runs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safeproj import SafeprojError
from safeproj.lm.layers import find_layers
from safeproj.methods.salora.directions import Directions, output_directions
from tests.methods.salora.models import TARGETS, VOCABULARY, build
from tests.methods.salora.oracle import (
    outputs,
    random_batches,
    span,
    top_right_singular_vectors,
    weight,
)

BATCHES = random_batches(VOCABULARY)


def directions(model: Any, layers: dict[str, nn.Module], rank: int, **options: Any) -> Any:
    return output_directions(model, layers, BATCHES, rank, **options)


def assert_spans_the_same(
    found: Directions, model: Any, layer: nn.Module, rank: int, tolerance: float
) -> None:
    """Compare with the singular value decomposition of the whole `Y`, where the cut has a gap."""
    Y = outputs(model, layer, weight(layer), BATCHES)
    values = torch.linalg.svdvals(Y)
    assert found.rank == rank
    assert found.positions == len(Y)
    assert found.energy == pytest.approx(float(Y.square().sum()), rel=tolerance)
    assert torch.allclose(found.singular_values.double(), values[:rank], rtol=tolerance)
    wanted = top_right_singular_vectors(Y, rank)
    assert (span(found.U) - span(wanted)).norm() < 20 * tolerance
    assert torch.allclose(found.U.T @ found.U, torch.eye(rank), atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_they_span_what_the_decomposition_of_all_outputs_does(architecture: str) -> None:
    model = build(architecture)
    layers = find_layers(model, TARGETS[architecture])
    found = directions(model, layers, 5)
    assert list(found) == list(layers)
    for name, layer in layers.items():
        assert_spans_the_same(found[name], model, layer, 5, tolerance=1e-4)


@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_a_model_in_bfloat16_gives_nearly_the_same(architecture: str) -> None:
    model = build(architecture, torch.bfloat16)
    layers = find_layers(model, TARGETS[architecture])
    for name, each in directions(model, layers, 3).items():
        Y = outputs(model, layers[name], weight(layers[name]), BATCHES)
        best = torch.linalg.svdvals(Y)[:3].square().sum()
        # Outputs are rounded to 8 bits, so directions of close values may turn; what they capture
        # of the outputs does not.
        assert float((Y @ each.U.double()).square().sum()) > 0.99 * float(best)


def test_outputs_are_taken_without_their_bias() -> None:
    model = build("qwen2")
    layer = model.model.layers[0].self_attn.k_proj
    plain = directions(model, {"k": layer}, 3)["k"]
    with torch.no_grad():
        layer.bias.add_(1000.0)  # shifts keys of all positions alike: attention does not see it
    shifted = directions(model, {"k": layer}, 3)["k"]
    assert (span(plain.U) - span(shifted.U)).norm() < 1e-4


@pytest.mark.parametrize("name", ["k_proj", "q_proj"])
def test_a_layer_gives_the_same_alone_and_with_others_that_share_its_input(name: str) -> None:
    model = build("llama")
    all_layers = find_layers(model, ["all-linear"])
    path = f"model.layers.1.self_attn.{name}"
    alone = directions(model, {path: all_layers[path]}, 4)[path]
    together = directions(model, all_layers, 4)[path]
    assert (span(alone.U) - span(together.U)).norm() < 1e-4


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_model_runs_over_the_data_once_for_each_group_of_layers(groups: int) -> None:
    model = build("llama")
    layers = find_layers(model, ["o_proj", "down_proj"])  # no shared inputs, 32 × 32 sums
    one = 8 * 32 * 32
    memory = {1: 4 * one, 2: 2 * one, 5: 1}[groups]
    passes = {1: 1, 2: 2, 5: 4}[groups]  # never less than a layer at a time
    runs: list[int] = []
    seen: list[tuple[int, int]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: runs.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = directions(
        model, layers, 4, memory=memory, on_batch=lambda done, total: seen.append((done, total))
    )
    hook.remove()
    first, *rest = runs
    assert first == 1  # one sample, which shows which layers share an input
    assert len(rest) == passes * len(BATCHES)
    assert seen[-1] == (passes * len(BATCHES), passes * len(BATCHES))
    whole = directions(model, layers, 4)
    for name in layers:
        assert torch.equal(found[name].U, whole[name].U)


def test_a_model_that_is_spread_over_devices_gives_the_same(tmp_path: Path) -> None:
    """With layers on the disk, whose weights are in memory only while they run."""
    from accelerate import dispatch_model  # type: ignore[import-untyped]

    model = build("qwen2")
    whole = directions(model, find_layers(model, ["all-linear"]), 4)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert spread.model.layers[1].self_attn.q_proj.weight.is_meta
    found = directions(spread, find_layers(spread, ["all-linear"]), 4)
    for name, each in whole.items():
        assert (span(found[name].U) - span(each.U)).norm() < 1e-3


def test_the_head_is_run_only_where_it_is_wanted() -> None:
    model = build("llama", tie_word_embeddings=False)
    runs: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda *_: runs.append(1))
    directions(model, find_layers(model, ["q_proj"]), 4)
    assert not runs
    found = directions(model, find_layers(model, ["lm_head"]), 4)
    assert runs
    assert found["lm_head"].U.shape == (VOCABULARY, 4)


def test_training_mode_comes_back_and_dropout_is_off_meanwhile() -> None:
    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    layers = find_layers(model, ["c_proj"])
    model.train()
    found, again = directions(model, layers, 4), directions(model, layers, 4)
    assert model.training
    assert all(torch.equal(found[name].U, again[name].U) for name in layers)


def test_fewer_positions_than_directions_give_as_many_as_there_are() -> None:
    model = build("llama")
    batch = {name: tensor[:1].clone() for name, tensor in BATCHES[0].items()}
    batch["labels"][0, 3:] = -100
    batch["labels"][0, 1:3] = 5
    layers = find_layers(model, ["v_proj"])
    found = output_directions(model, layers, [batch], 8)
    assert all(each.rank == 2 for each in found.values())


def test_a_cut_keeps_the_first_directions() -> None:
    model = build("llama")
    layers = find_layers(model, ["v_proj"])
    many, few = directions(model, layers, 8), directions(model, layers, 3)
    for name in layers:
        cut = many[name].cut(3)
        assert (span(cut.U) - span(few[name].U)).norm() < 1e-4
        assert cut.energy == pytest.approx(few[name].energy)


class Twice(nn.Module):
    """A linear layer over rows that are no positions, as that of an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        twice = torch.cat([hidden_states, hidden_states], dim=1)
        return self.inner(twice)[:, : hidden_states.shape[1]], None


def test_a_layer_that_sees_other_rows_than_positions_is_refused() -> None:
    model = build("llama")
    model.model.layers[0].self_attn = Twice()
    with pytest.raises(
        SafeprojError, match=r"inner: sees \[4, 24\] rows .*\[4, 12\] positions.*targets"
    ):
        directions(model, find_layers(model, ["inner"]), 4)


def test_a_layer_that_never_runs_is_refused() -> None:
    model = build("llama")
    model.model.layers[0].unused = nn.Linear(32, 32)
    with pytest.raises(SafeprojError, match=r"unused: expected to run once .* runs never"):
        directions(model, find_layers(model, ["all-linear"]), 4)


def test_a_layer_that_runs_twice_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(SafeprojError, match="runs more often"):
        directions(model, find_layers(model, ["down_proj"]), 4)


def test_outputs_that_are_zero_or_not_finite_are_refused() -> None:
    model = build("llama")
    layers = find_layers(model, ["o_proj"])
    last = model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        last.weight.zero_()
    with pytest.raises(SafeprojError, match=r"layers\.1\.self_attn\.o_proj: .*all zero"):
        directions(model, layers, 4)
    with torch.no_grad():
        last.weight.fill_(float("nan"))
    with pytest.raises(SafeprojError, match="not finite"):
        directions(model, layers, 4)


def test_data_without_responses_is_refused() -> None:
    model = build("llama")
    empty = [{**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], -100)}]
    for data in ([], empty):
        with pytest.raises(SafeprojError, match="no response positions"):
            output_directions(model, find_layers(model, ["q_proj"]), data, 4)


def test_hooks_are_gone_after_an_error() -> None:
    model = build("llama")
    layer = model.model.layers[0].self_attn.o_proj
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(SafeprojError):
        directions(model, {"o": layer}, 4)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_target_that_names_nothing_is_refused() -> None:
    model = build("llama")
    with pytest.raises(SafeprojError, match=r"targets nothing: .*it has down_proj, gate_proj"):
        find_layers(model, ["q_proj", "nothing"])
    with pytest.raises(SafeprojError, match="names nothing"):
        find_layers(model, [])


def test_all_linear_leaves_out_the_head() -> None:
    model = build("llama", tie_word_embeddings=False)
    assert "lm_head" not in find_layers(model, ["all-linear"])
    assert "lm_head" in find_layers(model, ["all-linear", "lm_head"])
