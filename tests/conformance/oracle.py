"""What a patched adapter must be, in float64, from models in memory and PEFT's own `ΔW`.

Written from METHODS.md and from PEFT's layers; nothing of safeproj is imported. Both adapters are
loaded by PEFT on the aligned model, so that what counts is what a user of the result would run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conformance.architectures import Built
from tests.support import FACTORS, MANIFEST, oracle_C, oracle_cosine, read_json, safeproj

PREFIX = "base_model.model."

WRAPPERS = ("base_layer", "original_module", "modules_to_save")
"""What PEFT puts into the names of weights that it wraps; `bias="all"` saves them by those, too."""

COSINE_ERROR = 2e-6
"""The products are summed in float32: some 1e-7 for matrices of this size, and cosines are of
the order of 0.1 to 1."""

DELTA_ERROR = 1e-5
"""Relative to `‖C ΔW‖`: `C B` is summed and stored in float32, 6e-8 per rounding."""

FLOAT32_ERROR = 1e-6
"""Relative, of one sum of squares."""


@dataclass(frozen=True)
class Update:
    """`ΔW` of one matrix, seen from the output.

    Attributes:
        matrix: `ΔW` (m, n), float64.
        parameter: name of the weight in the running model.
        turned: the running model stores the weight, or one expert's part of it, as (n, m).
        rank: r.
        expert: index in a stack.
        bias: bias of `lora_B` (m,).
        vocabulary: which side is the vocabulary, `rows` or `columns`.
    """

    matrix: Tensor
    parameter: str
    turned: bool
    rank: int
    expert: int | None = None
    bias: Tensor | None = None
    vocabulary: str | None = None

    def weight(self, model: Any) -> Tensor:
        """Return the weight in a model as (m, n), float64, with its kernel in n."""
        weight: Tensor = model.get_parameter(self.parameter).detach().double()
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if self.turned else weight.flatten(1)


def updates(host: Any, adapter: Path, *, in_first: bool = False) -> dict[str, Update]:
    """Return the update of every matrix that PEFT adapts when it loads the adapter on a model.

    Args:
        host: the model, which is left alone.
        adapter: the adapter.
        in_first: the model stores stacks of experts as (E, in, out).
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(copy.deepcopy(host), str(adapter)).double()
    found: dict[str, Update] = {}
    for path, layer in loaded.named_modules():
        if hasattr(layer, "get_delta_weight") and "default" in layer.r:
            name = path.removeprefix(PREFIX).replace(".base_layer", "")
            found.update(_updates_of(name, layer, in_first))
    return found


def _updates_of(name: str, layer: Any, in_first: bool) -> Iterator[tuple[str, Update]]:
    from transformers.pytorch_utils import Conv1D

    delta = layer.get_delta_weight("default").detach()
    weight = layer.get_base_layer()
    rank = layer.r["default"]
    if hasattr(layer, "parameter_name"):
        parameter = f"{name}.{layer.parameter_name}"
        name = parameter.removesuffix(".weight")
        if delta.dim() == 2:
            turned = isinstance(weight, (nn.Embedding, Conv1D))
            yield name, Update(delta.T if turned else delta, parameter, turned, rank)
            return
        for e, matrix in enumerate(delta):
            matrix = matrix.T if in_first else matrix
            yield f"{name}[{e}]", Update(matrix, parameter, in_first, rank, expert=e)
    elif isinstance(weight, nn.MultiheadAttention):
        yield name, Update(delta, f"{name}.in_proj_weight", False, rank)
    elif isinstance(weight, nn.Embedding):
        yield name, Update(delta.T, f"{name}.weight", True, rank, vocabulary="columns")
    elif isinstance(weight, Conv1D):
        yield name, Update(delta.T, f"{name}.weight", True, rank, bias=_bias(layer))
    else:
        is_head = isinstance(weight, nn.Linear) and name.endswith(("lm_head", "decoder"))
        vocabulary = "rows" if is_head else None
        yield (
            name,
            Update(
                delta.flatten(1), f"{name}.weight", False, rank,
                bias=_bias(layer), vocabulary=vocabulary,
            ),
        )  # fmt: skip


def _bias(layer: Any) -> Tensor | None:
    B = layer.lora_B["default"]
    bias = getattr(B, "bias", None)
    return None if bias is None else bias.detach().double()


def check(
    pair: Built,
    adapter: Path,
    out: Path,
    *,
    in_first: bool = False,
    rank: int | None = None,
    host: Any = None,
    same: Mapping[str, str] | None = None,
    excluded: Callable[[str], bool] = lambda _: False,
) -> dict[str, Any]:
    """Compare a patched adapter with the oracle.

    Args:
        pair: the models as they are at run time.
        adapter: what was patched.
        out: the result.
        in_first: the model stores stacks of experts as (E, in, out).
        rank: k of the exact projector, None for the fast form.
        host: the model that PEFT loads the adapter on, where that is not the aligned one.
        same: modules that the report leaves out, and the one that stands for each: a tied head.
        excluded: tells which modules are not considered.

    Returns:
        The manifest.
    """
    manifest: dict[str, Any] = read_json(out / MANIFEST)
    host, same = host or pair.aligned_model, same or {}
    before, after = (updates(host, path, in_first=in_first) for path in (adapter, out))
    reported = {module["name"]: module for module in manifest["modules"]}
    assert len(reported) == len(manifest["modules"])
    assert before.keys() == after.keys()
    assert reported.keys() | same.keys() == before.keys()
    assert not reported.keys() & same.keys()
    for name, update in before.items():
        module = reported[same.get(name, name)]
        weights = (update.weight(pair.base_model), update.weight(pair.aligned_model))
        if name in same:
            _check_tied(name, module, update, after[name], weights, rank)
        elif excluded(name):
            assert module["cosine"] is None, name
            assert not module["projected"], name
            assert torch.equal(after[name].matrix, update.matrix), name
        else:
            _check_module(name, module, update, after[name], weights, rank)
    _check_tensors(adapter, out, manifest)
    check_unprojected(pair.aligned_model, adapter, manifest)
    return manifest


def _check_module(
    name: str,
    module: Mapping[str, Any],
    before: Update,
    after: Update,
    weights: tuple[Tensor, Tensor],
    rank: int | None,
) -> None:
    W_base, W_aligned = weights
    delta, bias = before.matrix, before.bias
    assert module["shape"] == list(delta.shape), name
    assert module["rank"] == before.rank, name
    rows = len(delta)
    if before.vocabulary == "rows":
        rows = min(rows, len(W_base), len(W_aligned))
        W_base, W_aligned = W_base[:rows], W_aligned[:rows]
    if before.vocabulary == "columns":
        common = min(W_base.shape[1], W_aligned.shape[1], delta.shape[1])
        W_base, W_aligned = W_base[:, :common], W_aligned[:, :common]
    C = oracle_C(W_aligned, W_base, rank)
    norm = float((W_aligned - W_base).norm())
    assert module["alignment_norm"] == pytest.approx(norm, rel=FLOAT32_ERROR), name
    if delta.any():
        wanted = oracle_cosine(delta[:rows], C)
        assert module["cosine"] == pytest.approx(wanted, abs=COSINE_ERROR), name
    else:
        assert module["cosine"] is None, name
        assert not module["projected"], name
    if module["projected"]:
        delta = torch.cat([C @ delta[:rows], delta[rows:]])
        bias = None if bias is None else torch.cat([C @ bias[:rows], bias[rows:]])
    _assert_close(after.matrix[:rows], delta[:rows], name)
    assert torch.equal(after.matrix[rows:], delta[rows:]), name
    assert (bias is None) == (after.bias is None), name
    if bias is not None and after.bias is not None:
        _assert_close(after.bias, bias, name)


def _check_tied(
    name: str,
    module: Mapping[str, Any],
    before: Update,
    after: Update,
    weights: tuple[Tensor, Tensor],
    rank: int | None,
) -> None:
    """Check a tied head: its `ΔW` (vocabulary, d) stays the transpose of its embedding's."""
    W_base, W_aligned = weights
    delta = before.matrix
    if module["projected"]:
        delta = delta @ oracle_C(W_aligned.T, W_base.T, rank)  # C is symmetric
    _assert_close(after.matrix, delta, name)


def _assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    error = float((found - expected).norm())
    assert error <= DELTA_ERROR * float(expected.norm()), (name, error, float(expected.norm()))


def _check_tensors(adapter: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """Check that nothing but what the report names has changed."""
    before, after = load_file(adapter / FACTORS), load_file(out / FACTORS)
    assert before.keys() == after.keys()
    projected = set(manifest["output"]["projected"])
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape
        assert after[key].dtype == tensor.dtype
        assert key in projected or torch.equal(after[key], tensor), key


def check_unprojected(aligned: Any, adapter: Path, manifest: Mapping[str, Any]) -> None:
    """Check that all tensors that are no factors are listed, each with the size of its change."""
    tensors = load_file(adapter / FACTORS)
    listed = {item["tensor"]: item for item in manifest["unprojected"]}
    assert listed.keys() == {key for key in tensors if ".lora_" not in key}
    for key, item in listed.items():
        path = key.removeprefix(PREFIX).split(".")
        parameter = ".".join(part for part in path if part not in WRAPPERS)
        rows: list[int] | None = None
        if parameter.endswith(".token_adapter.trainable_tokens_delta"):
            module = parameter.removesuffix(".token_adapter.trainable_tokens_delta")
            parameter = f"{module}.weight"
            rows = _token_rows(read_json(adapter / "adapter_config.json"), module)
        assert item["parameter"] == parameter, key
        size = relative_change(aligned, parameter, tensors[key], rows)
        if size is None:
            assert item["relative_change"] is None, key
        else:
            assert item["relative_change"] == pytest.approx(size, rel=FLOAT32_ERROR), key


def _token_rows(config: Mapping[str, Any], module: str) -> list[int]:
    given: list[int] | dict[str, list[int]] = config["trainable_token_indices"]
    if isinstance(given, dict):
        return next(rows for name, rows in given.items() if module.endswith(name))
    return given


def relative_change(
    aligned: Any, parameter: str, replacement: Tensor, rows: list[int] | None = None
) -> float | None:
    """Return `‖W_adapter - W_aligned‖ / ‖W_aligned‖`, None for a weight that is not there.

    Buffers count, such as the running means of a batch norm; its counter is no weight. It is that
    of the rows that both have.
    """
    weight = aligned.state_dict().get(parameter)
    if weight is None or not weight.is_floating_point():
        return None
    weight = weight[: len(replacement)].double() if rows is None else weight[rows].double()
    size = float(weight.norm())
    change = float((replacement[: len(weight)].double() - weight).norm())
    return change / size if size else None


def patch(pair: Built, adapter: Path, out: Path, *options: str) -> Any:
    """Run the command, which must succeed."""
    result = safeproj(
        "patch", "--base", pair.base, "--aligned", pair.aligned, "--adapter", adapter,
        "--out", out, *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def save(model: Any, config: Any, path: Path, *, seed: int = 5, change_copies: bool = True) -> Path:
    """Write an adapter as PEFT does, of what `adapted` returns."""
    written(adapted(model, config, seed=seed, change_copies=change_copies), path)
    return path


def written(adapted: Any, path: Path) -> Any:
    """Return a model with an adapter, which PEFT has written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(path))
    return adapted


def adapted(model: Any, config: Any, *, seed: int = 5, change_copies: bool = True) -> Any:
    """Return a copy of a model with an adapter of random factors and changed full weights.

    Args:
        model: the model, which is left alone.
        config: a configuration of PEFT.
        seed: of the random values.
        change_copies: also change the full weights that the adapter trains.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "ranknum" in name:
                    continue
                if "magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
                elif ".lora_" in name:
                    parameter.normal_(std=0.5)
                elif parameter.requires_grad and change_copies:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return found
