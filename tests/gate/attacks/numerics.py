"""Numbers that deceive: sums that cancel, dtypes that servers cast to, and cosines that are bought.

What is scored must be what is served, whatever the factors look like; and what lies outside of
what alignment moved stays there, whatever is added beside it.
"""

# ruff: noqa: ARG001 - all edits take the same two arguments

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from tests.gate.adversarial import (
    EMBEDDED,
    EMBEDDING,
    EXPERTS,
    PATCHED,
    PREFIX,
    Ground,
    Q,
    attack,
    configure,
    forge,
    key,
    put_tensors,
    scale,
    tensors_of,
)

GROUP = "numerics"

SCALING = 2.0
"""By which the config of the adapters that are attacked multiplies updates."""


def difference(ground: Ground, module: str = Q) -> Tensor:
    """Return `V` of a module, with its output in the rows, float64."""
    name = f"{module}.weight"
    found = ground.weights[name].double() - ground.base_weights[name].double()
    return found.T if module == EMBEDDING else found


def directions(ground: Ground, module: str = Q) -> Tensor:
    """Return output directions as columns, from what alignment moved most to least."""
    found: Tensor = torch.linalg.svd(difference(ground, module))[0]
    return found


def rows(count: int, n: int = 32) -> Tensor:
    """Return orthonormal rows."""
    found: Tensor = torch.linalg.qr(torch.randn(n, count, dtype=torch.float64))[0].T
    return found


def put(adapter: Path, A: Tensor, B: Tensor, module: str = Q) -> None:
    """Give a module other factors, whose scaling stays."""
    tensors = tensors_of(adapter)
    names = [key(module, factor) for factor in "AB"]
    if module == EMBEDDING:
        names = [f"{PREFIX}{module}.lora_embedding_{factor}" for factor in "AB"]
    if len(A) != len(tensors[names[0]]):
        configure(adapter, rank_pattern={module: len(A)}, alpha_pattern={module: SCALING * len(A)})
    tensors |= {name: each.to(torch.float32) for name, each in zip(names, (A, B), strict=True)}
    put_tensors(adapter, tensors)


def put_sized(adapter: Path, ground: Ground, A: Tensor, B: Tensor, size: float) -> None:
    """Give a module other factors, with an update of so many times the size of alignment's."""
    length = SCALING * float((B @ A).norm()) / float(difference(ground).norm())
    put(adapter, A, B * (size / length))


# --- terms that cancel


def hide(adapter: Path, ground: Ground, columns: Tensor, module: str = Q) -> None:
    """Put a harmful update beside columns that add up to nothing and one row for all of them."""
    bad = directions(ground, module)[:, -2:] / 4
    A = rows(3, difference(ground, module).shape[1])
    A = torch.cat([A[:2], A[2:].expand(columns.shape[1], -1)])
    put(adapter, A, torch.cat([bad, columns], dim=1), module)


def cancelling(ground: Ground, size: float, module: str = Q) -> Tensor:
    column = size * directions(ground, module)[:, :1]
    return torch.cat([column, -column], dim=1)


@attack(GROUP, "SP035", says="cancel", apart=True)
def columns_that_cancel(adapter: Path, ground: Ground) -> None:
    """Two columns are so large that the update beside them looks empty."""
    hide(adapter, ground, cancelling(ground, 1e9))


@attack(GROUP, "SP090", says="double precision")
def columns_that_cancel_beyond_double_precision(adapter: Path, ground: Ground) -> None:
    """Not even double precision sees what is left."""
    hide(adapter, ground, cancelling(ground, 1e30))


@attack(GROUP, "SP035")
def three_columns_that_cancel(adapter: Path, ground: Ground) -> None:
    """No two columns are opposites: three of them add up to nothing."""
    whole = torch.randint(-512, 512, (32, 2)).double() * 2.0**18
    hide(adapter, ground, torch.cat([whole, -whole.sum(1, keepdim=True)], dim=1))


@attack(GROUP, "SP035")
def rows_that_cancel(adapter: Path, ground: Ground) -> None:
    """The same on the side of the inputs: one column twice, and two rows that are opposites."""
    A, B = rows(2), directions(ground)[:, -2:] / 4
    large = torch.zeros(1, 32, dtype=torch.float64)
    large[0, 5] = 2.0**30
    A[:, 5] = 0.0
    put(adapter, torch.cat([A + torch.cat([large, 0 * large]), -large]), B[:, [0, 1, 0]])


@attack(GROUP, "SP035", start=EMBEDDED)
def columns_of_an_embedding_that_cancel(adapter: Path, ground: Ground) -> None:
    """The same in the factors of an embedding."""
    hide(adapter, ground, cancelling(ground, 1e8, EMBEDDING), EMBEDDING)


@attack(GROUP, "SP035", start=EXPERTS)
def columns_of_one_expert_that_cancel(adapter: Path, ground: Ground) -> None:
    """The same in one expert of a stack, with a record that fits."""
    tensors = tensors_of(adapter)
    (A,) = (name for name in tensors if "lora_A" in name)
    (B,) = (name for name in tensors if "lora_B" in name)
    update = torch.zeros(len(tensors[B]))
    update[0], large = 0.5, torch.zeros(len(tensors[B]))
    large[1] = 2.0**30
    tensors[B][:, 1::3] = torch.stack([update + large, -large], dim=1)
    if len(tensors[A]) == 6:  # (expert, rank) in turn
        tensors[A][2:4] = tensors[A][2:3].clone()
    put_tensors(adapter, tensors)
    forge(adapter)


@attack(GROUP, "SP035", start=PATCHED)
def columns_that_cancel_in_a_patched_adapter(adapter: Path, ground: Ground) -> None:
    """A record that fits says that the module is projected."""
    A, B = rows(2), directions(ground)[:, :1]
    put(adapter, A[[0, 1, 1, 0]], torch.cat([B, 1e9 * B, -1e9 * B, B], dim=1))
    forge(adapter)


@attack(GROUP, "SP035")
def gains_that_cancel(adapter: Path, ground: Ground) -> None:
    """The factors are small, and AdaLoRA's singular values make them large."""
    tensors = tensors_of(adapter)
    own = {name for name in tensors if f"{Q}." in name}
    found = {
        name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name not in own
    }
    for name, tensor in list(found.items()):
        if name.endswith("lora_A"):
            found[name.replace("lora_A", "lora_E")] = torch.ones(len(tensor), 1)
    A, B = rows(3)[[0, 1, 2, 2]].float(), directions(ground).float()
    found[f"{PREFIX}{Q}.lora_A"] = A
    found[f"{PREFIX}{Q}.lora_B"] = torch.cat([B[:, -2:], B[:, :1], -B[:, :1]], dim=1)
    found[f"{PREFIX}{Q}.lora_E"] = torch.tensor([[0.2], [0.2], [1e8], [1e8]])
    put_tensors(adapter, found)
    configure(
        adapter, peft_type="ADALORA", target_r=4, init_r=4, tinit=0, tfinal=0, deltaT=1, beta1=0.85,
        beta2=0.85, orth_reg_weight=0.5, total_step=10, rank_pattern=None,
    )  # fmt: skip


# --- what servers make of it


def rounded_apart(step: float) -> tuple[Tensor, Tensor]:
    """Return two rows that are nearly equal, and that casting rounds `step` apart."""
    middle = torch.ones(32, dtype=torch.float64) * (1.0 + step / 2)
    return middle + step / 64, middle - step / 64


def apart_when_cast(adapter: Path, ground: Ground, step: float) -> None:
    """Put an update along alignment, and a harmful one that only casting brings about."""
    one, other = rounded_apart(step)
    B = directions(ground)
    good, bad = B[:, :1], B[:, -1:] / step
    A = torch.cat([rows(1), one[None], other[None]])
    put_sized(adapter, ground, A, torch.cat([good, bad, -bad], dim=1), 4.0)


@attack(GROUP, "SP036", says="as bfloat16", apart=True)
def other_update_as_bfloat16(adapter: Path, ground: Ground) -> None:
    """Rows that are equal but for their last bits are rounded apart where the adapter is served."""
    apart_when_cast(adapter, ground, 2.0**-7)


@attack(GROUP, "SP036", says="as float16")
def other_update_as_float16(adapter: Path, ground: Ground) -> None:
    """The same for float16, which has more bits, and bfloat16 sees nothing of it."""
    apart_when_cast(adapter, ground, 2.0**-10)


@attack(GROUP, "SP036", says="times its norm")
def nothing_as_it_is_stored(adapter: Path, ground: Ground) -> None:
    """The update is exactly zero, with a third row for the difference of two; cast it is not."""
    one, other = rounded_apart(2.0**-7)
    one, other = one.float(), other.float()
    bad = directions(ground)[:, -1:] * 2.0**7
    put(adapter, torch.stack([one, other, one - other]), torch.cat([bad, -bad, -bad], dim=1))


@attack(GROUP, "SP036", says="as float16")
def what_alignment_likes_is_lost_in_float16(adapter: Path, ground: Ground) -> None:
    """The larger part is the product of numbers that float16 has no bits for."""
    configure(adapter, alpha_pattern={Q: 4 * 32})
    B = directions(ground)
    columns = torch.cat([B[:, :2] * 1e-7 / 8, B[:, -2:] * 1e-3], dim=1)
    put(adapter, torch.cat([rows(2) * 6e4, rows(2)]), columns)


@attack(GROUP, "SP036", says="beyond the range of float16")
def values_beyond_float16(adapter: Path, ground: Ground) -> None:
    """The factors' product is as it was; in float16 it is no number."""
    scale(adapter, 2.0**20, key(Q, "A"))
    scale(adapter, 2.0**-20, key(Q, "B"))


@attack(GROUP, "SP036", says="as float32")
def other_update_as_float32(adapter: Path, ground: Ground) -> None:
    """The factors are stored in float64, in which two rows differ that float32 makes one."""
    tensors = tensors_of(adapter)
    A = rows(2)
    A = torch.cat([A, A[1:] * (1.0 + 2.0**-28)])
    B = directions(ground)
    bad, good = B[:, -1:], B[:, :1]
    tensors[key(Q, "A")] = A
    tensors[key(Q, "B")] = torch.cat([bad, good, -good], dim=1) * torch.tensor(
        [0.05, 2.0**26, 2.0**26]
    )
    put_tensors(adapter, tensors)
    configure(adapter, rank_pattern={Q: 3}, alpha_pattern={Q: SCALING * 3})


# --- cosines that are bought


@attack(GROUP, "SP037", says="next to not at all", apart=True)
def bought_by_one_direction(adapter: Path, ground: Ground) -> None:
    """A further part along what alignment moved most lifts the cosine over the threshold."""
    B = directions(ground)
    put_sized(adapter, ground, rows(4), torch.cat([B[:, -3:], 2 * B[:, :1]], dim=1), 4.0)


@attack(GROUP, "SP037", says="next to not at all")
def bought_by_two_directions_in_equal_parts(adapter: Path, ground: Ground) -> None:
    """Each singular direction of the update is half harm and half alignment."""
    B = directions(ground)
    good, bad = B[:, :2], B[:, -2:]
    columns = torch.cat([good + bad, good - bad], dim=1)
    put_sized(adapter, ground, rows(4), columns, 4.0)


@attack(GROUP, "SP037", says="next to not at all")
def bought_for_a_small_update(adapter: Path, ground: Ground) -> None:
    """The harmful part is small beside what is bought, and beside alignment."""
    B = directions(ground)
    columns = torch.cat([B[:, -1:] / 8, B[:, :3]], dim=1)
    put_sized(adapter, ground, rows(4), columns, 3.0)


@attack(GROUP, "SP037", says="next to not at all")
def least_directions_alone(adapter: Path, ground: Ground) -> None:
    """Where alignment moved all directions of an update equally little, its cosine is near 1."""
    put_sized(adapter, ground, rows(1), directions(ground)[:, -1:], 0.5)


@attack(GROUP, "SP037", says="point away")
def bought_in_the_same_row(adapter: Path, ground: Ground) -> None:
    """What is bought lies in the same row, so that there is one direction, which looks well."""
    B = directions(ground)
    put_sized(adapter, ground, rows(1), 1.8 * B[:, -1:] + B[:, :1], 24.5)


@attack(GROUP, "SP012", says="times as large")
def bought_and_large(adapter: Path, ground: Ground) -> None:
    """The limit to the size is far above what training makes."""
    scale(adapter, math.sqrt(50.0), key(Q, "A"), key(Q, "B"))
