"""Numbers that deceive: what is projected and scored where terms cancel, casts, bought cosines."""

# ruff: noqa: ARG001 - all ways take the same two arguments

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import safeproj as package
from safeproj.engine import Task, Update
from safeproj.errors import SafeprojError
from safeproj.gate.policy import Policy
from safeproj.methods.covariance.detail import Acting
from safeproj.methods.covariance.formulas import Correction
from safeproj.methods.covariance.score import corrected
from safeproj.methods.covariance.sources import Moments, StoredMoment
from safeproj.methods.interface import Method
from safeproj.report import Check, Outcome
from safeproj.storage.arrays import from_torch, to_torch
from tests.conftest import Trio
from tests.gate.adversarial import change_manifest, configure, key, put_tensors, tensors_of
from tests.methods.covariance import oracle
from tests.methods.covariance.test_formulas import drawn, moment
from tests.methods.test_factors import exact, nearly
from tests.support import FACTORS, oracle_C, oracle_cosine, save_safety_module

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-lm"
ALL = package.Options(selection=package.Selection(all=True))


@pytest.fixture
def hidden(trio: Trio, tmp_path: Path) -> Path:
    """The trio's adapter with columns beside two of its updates that cancel.

    In one by pairs, in the other all of them: that update is exactly zero.
    """
    adapter = Path(shutil.copytree(trio.adapter, tmp_path / "hidden"))
    tensors = tensors_of(adapter)
    for module, kept in ((Q, 2), (V, 0)):
        A, B = tensors[key(module, "A")], tensors[key(module, "B")]
        large = 1e9 * B[:, 2:3]
        tensors[key(module, "A")] = torch.cat([A[:3], A[2:3]])
        tensors[key(module, "B")] = torch.cat([B[:, :2], large, -large], dim=1)
        tensors[key(module, "B")][:, kept:2] = 0.0
    put_tensors(adapter, tensors)
    return adapter


def update(adapter: Path, module: str) -> Tensor:
    tensors = tensors_of(adapter)
    return exact(tensors[key(module, "A")], tensors[key(module, "B")])


def weights(trio: Trio, module: str) -> tuple[Tensor, Tensor]:
    name = f"{module}.weight"
    aligned, base = (model.state_dict()[name] for model in (trio.aligned_model, trio.base_model))
    return aligned, base


def safe_lora(trio: Trio, tmp_path: Path) -> tuple[Method, Tensor]:
    return trio.method, oracle_C(*weights(trio, Q))


def exactly(trio: Trio, tmp_path: Path) -> tuple[Method, Tensor]:
    return replace(trio.method, projector="exact", rank=5), oracle_C(*weights(trio, Q), 5)


def from_a_file(trio: Trio, tmp_path: Path) -> tuple[Method, Tensor]:
    file = tmp_path / "all.safealign.safetensors"
    targets = ("q_proj", "v_proj")
    package.align(str(trio.base), str(trio.aligned), file, package.Form(rank=32), targets)
    return package.SafeLora(alignment=str(file)), oracle_C(*weights(trio, Q))


def salora(trio: Trio, tmp_path: Path) -> tuple[Method, Tensor]:
    from safetensors.torch import load_file

    file = save_safety_module(trio.aligned_model, tmp_path / "m.safety.safetensors")
    U = load_file(file)[f"{Q}.weight.U"].double()
    return package.Salora(str(file)), torch.eye(len(U), dtype=torch.float64) - U @ U.T


WAYS = [safe_lora, exactly, from_a_file, salora]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_update_beside_columns_that_cancel_is_projected(
    trio: Trio, hidden: Path, tmp_path: Path, way: Callable[..., tuple[Method, Tensor]]
) -> None:
    method, C = way(trio, tmp_path)
    out = tmp_path / "out"
    report = package.patch(method, str(hidden), out, ALL)
    modules = {module.name: module for module in report.modules}
    before, after = update(hidden, Q), update(out, Q)
    assert modules[Q].cosine == pytest.approx(oracle_cosine(before, C), abs=2e-6)
    assert modules[Q].projected
    assert modules[Q].scale == pytest.approx(float((C @ before).norm() / before.norm()), rel=1e-5)
    # The terms of the update are 1e9 times as large as it, so double precision keeps 7 digits.
    assert float((after - C @ before).norm() / (C @ before).norm()) < 1e-5
    assert not bool(update(hidden, V).any())
    assert modules[V].cosine is None
    assert torch.equal(tensors_of(out)[key(V, "B")], tensors_of(hidden)[key(V, "B")])


def test_what_is_patched_so_is_verified(trio: Trio, hidden: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package.patch(trio.method, str(hidden), out, ALL)
    (found,) = package.verify(str(out), str(hidden), trio.method).checks
    assert found.outcome is Outcome.passed, found.findings
    tensors = tensors_of(out)
    tensors[key(Q, "B")][:, 0] *= 1.01
    put_tensors(out, tensors)
    change_manifest(out, lambda document: document["options"].update(device="cuda:9"))
    (found,) = package.verify(str(out), str(hidden), trio.method).checks
    # Within rounding is relative to what is left, not to the terms that cancel.
    assert any("differs by" in message for message in messages(found, "SP024"))


def test_a_projection_that_cannot_be_written_beside_the_other_factor_is_refused(
    trio: Trio, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trio.adapter, tmp_path / "adapter"))
    tensors, (A, B) = tensors_of(adapter), nearly(2.0**20)
    wide, tall = torch.zeros(3, 32), torch.zeros(32, 3)
    wide[:, : A.shape[1]], tall[: len(B)] = A, B
    tensors |= {key(Q, "A"): wide, key(Q, "B"): tall}
    put_tensors(adapter, tensors)
    configure(adapter, rank_pattern={Q: 3})
    with pytest.raises(SafeprojError, match="cannot be written"):
        package.patch(trio.method, str(adapter), tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gain", [None, torch.tensor([[2.0], [0.5], [4.0], [4.0]])])
def test_the_correction_of_an_update_beside_rows_that_cancel(gain: Tensor | None) -> None:
    A, B = drawn(1, 3, 12).float(), drawn(2, 20, 3).float()
    A, B = torch.cat([A[:2], 1e9 * A[2:], -1e9 * A[2:]]), B[:, [0, 1, 2, 2]]
    X, Y, mu = drawn(3, 30, 12), drawn(4, 40, 12), 0.3
    H, S = oracle.moment(X), oracle.ridged(oracle.moment(Y))
    ungained = A if gain is None else A / gain  # a power of two: exact
    unused = StoredMoment(None, True)  # type: ignore[arg-type]
    own_gain = None if gain is None else from_torch(gain)
    update = Update(from_torch(ungained), from_torch(B), gain=own_gain)
    task = Task("w", Moments(unused, unused), (update,))
    safety, benign = (moment(from_torch, rows, whole=True) for rows in (X, Y))

    (found,) = corrected(task, Correction(mu), safety, benign)

    assert not isinstance(found, SafeprojError)
    assert found.factor is not None
    assert isinstance(found.detail, Acting)
    delta = exact(A, B)
    expected = oracle.corrected(delta, H, S, mu)
    factor = to_torch(found.factor)
    after = exact(factor if gain is None else factor * gain, B)
    assert float((after - expected).norm() / expected.norm()) < 1e-4
    cosine = float((delta * expected).sum() / (delta.norm() * expected.norm()))
    assert found.cosine == pytest.approx(cosine, abs=1e-6)
    effect = float((delta @ H * delta).sum()), float((delta @ S * delta).sum())
    assert found.detail.before.safety == pytest.approx(effect[0], rel=1e-5)
    assert found.detail.before.benign == pytest.approx(effect[1], rel=1e-5)


# --- what the gate says


def check(trio: Trio, adapter: Path, policy: Policy | None = None) -> Check:
    (found,) = package.check(trio.method, [str(adapter)], policy).checks
    return found


def messages(found: Check, rule: str) -> list[str]:
    return [finding.message for finding in found.findings if finding.id == rule]


def test_cancellation_is_found_whatever_is_allowed(trio: Trio, hidden: Path) -> None:
    from safeproj.gate.policy import ALLOWANCES

    found = check(trio, hidden, Policy(threshold=0.0, allow=frozenset(ALLOWANCES), max_size=1e9))
    assert found.outcome is Outcome.failed
    (message,) = messages(found, "SP035")
    assert Q in message
    # The other module's update is exactly zero, cast or not: that is an empty one.
    assert not [text for text in messages(found, "SP036") if "changes" in text]
    assert [V in text for text in messages(found, "SP008")] == [True]


def test_the_least_cosine_of_all_casts_counts(trio: Trio, tmp_path: Path) -> None:
    """An update along alignment as it is stored, and away from it as it is served."""
    adapter = Path(shutil.copytree(trio.adapter, tmp_path / "adapter"))
    aligned, base = weights(trio, Q)
    U = torch.linalg.svd(aligned.double() - base.double())[0]
    step = 2.0**-7
    row = torch.ones(1, 32, dtype=torch.float64) * (1.0 + step / 2)
    A = torch.cat([drawn(1, 1, 32) / math.sqrt(32), row + step / 64, row - step / 64]).float()
    bad = U[:, -1:] + 0.1 * U[:, :1]
    B = torch.cat([U[:, :1], bad / step, -bad / step], dim=1).float()
    tensors = tensors_of(adapter)
    put_tensors(adapter, {**tensors, key(Q, "A"): A, key(Q, "B"): B})
    configure(adapter, rank_pattern={Q: 3}, alpha_pattern={Q: 6})
    C = oracle_C(aligned, base)
    stored = oracle_cosine(exact(A, B), C)
    cast_A, cast_B = A.bfloat16(), B.bfloat16()
    cast = oracle_cosine(exact(cast_A, cast_B), C)
    change = float((exact(cast_A, cast_B) - exact(A, B)).norm() / exact(A, B).norm())
    assert cast < stored - 0.1

    threshold = (cast + stored) / 2
    found = check(trio, adapter, Policy(threshold=threshold, max_cast_change=1e9, max_unseen=1e9))

    (message,) = [text for text in messages(found, "SP001") if Q in text]
    assert f"cosine {cast:.4f} as bfloat16" in message
    text = messages(check(trio, adapter), "SP036")
    assert any(f"as bfloat16 the update changes by {change:.2g} times its norm" in t for t in text)


def test_factors_that_are_stored_as_they_are_served_do_not_change(
    trio: Trio, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trio.adapter, tmp_path / "adapter"))
    put_tensors(adapter, {n: t.bfloat16() for n, t in tensors_of(adapter).items()})
    assert check(trio, adapter, Policy(max_cast_change=1e-9)).outcome is Outcome.passed
    assert check(trio, trio.adapter, Policy(max_cast_change=1e-3)).outcome is Outcome.failed


def test_what_is_bought_does_not_lower_what_lies_outside(trio: Trio, tmp_path: Path) -> None:
    """The same harm alone, and with more and more along alignment beside it."""
    aligned, base = weights(trio, Q)
    V = aligned.double() - base.double()
    U = torch.linalg.svd(V)[0]
    rows = torch.linalg.qr(drawn(1, 32, 2))[0].T
    texts = []
    for price in (0.5, 2.0, 8.0):
        adapter = Path(shutil.copytree(trio.adapter, tmp_path / f"{price}"))
        B = torch.stack([U[:, -1], price * U[:, 0]], dim=1) * V.norm() / 2.0
        tensors = {**tensors_of(adapter), key(Q, "A"): rows.float(), key(Q, "B"): B.float()}
        put_tensors(adapter, tensors)
        configure(adapter, rank_pattern={Q: 2}, alpha_pattern={Q: 4})
        texts.append(messages(check(trio, adapter), "SP037"))
    assert [len(text) for text in texts] == [1, 1, 1]
    assert all("1 times aligned - base of the update lie in" in text[0] for text in texts), texts


def test_the_part_that_points_away_is_bounded(trio: Trio) -> None:
    """It is the norm of what no multiple of the projection explains."""
    aligned, base = weights(trio, Q)
    tensors = tensors_of(trio.adapter)
    delta = 2.0 * tensors[key(Q, "B")].double() @ tensors[key(Q, "A")].double()
    projected = oracle_C(aligned, base) @ delta
    multiple = float((delta * projected).sum() / projected.square().sum())
    expected = float((delta - multiple * projected).norm() / (aligned - base).double().norm())
    found = check(trio, trio.adapter, Policy(max_outside=expected * 0.999))
    text = [message for message in messages(found, "SP037") if Q in message]
    assert [f"{expected:.4g} times aligned - base" in message for message in text] == [True]
    assert not [
        message
        for message in messages(
            check(trio, trio.adapter, Policy(max_outside=expected * 1.001)), "SP037"
        )
        if Q in message
    ]


def test_adapters_as_they_come_out_of_training_have_none_of_these() -> None:
    adapters = [str(EXAMPLE / "adapters" / name) for name in ("bad", "mixed", "skill")]
    method = package.SafeLora(str(EXAMPLE / "base"), str(EXAMPLE / "aligned"))
    found = package.check(method, adapters)
    for each in found.checks:
        assert {finding.id for finding in each.findings} == {"SP001", "SP020"}
    assert all((EXAMPLE / "adapters" / name / FACTORS).is_file() for name in ("bad", "skill"))
