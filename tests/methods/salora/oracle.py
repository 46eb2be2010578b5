"""The formulas of METHODS.md section 2 in float64, written out as they stand there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


def outputs(model: Any, layer: nn.Module, W: Tensor, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return `Y = X Wᵀ` (N, m): a layer's inputs at all response positions, times its weight."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    rows = []
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            x = seen.pop().double()
            rows.append(x[batch["labels"] != IGNORED])
    hook.remove()
    return torch.mm(torch.cat(rows), W.double().T)


def top_right_singular_vectors(Y: Tensor, rank: int) -> Tensor:
    """Return `U` (m, rank)."""
    U: Tensor = torch.linalg.svd(Y.double(), full_matrices=False)[2][:rank].T
    return U


def span(U: Tensor) -> Tensor:
    """Return the orthogonal projector onto the columns of `U`, which tells their span."""
    return U.double() @ U.double().T


def C_S(U: Tensor) -> Tensor:
    """Return `I - U Uᵀ` (m, m)."""
    return torch.eye(U.shape[0], dtype=torch.float64) - span(U)


def start(W: Tensor, U_t: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `A_0` and `B_0`, as the paper writes them."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = torch.diag(S[:rank].sqrt())
    return root @ Vh[:rank], span(U_t) @ U[:, :rank] @ root


def weight(layer: nn.Module) -> Tensor:
    """Return the weight (m, n) of an `nn.Linear` or a `Conv1D`."""
    W: Any = layer.weight
    found: Tensor = W.detach() if isinstance(layer, nn.Linear) else W.detach().T
    return found


def random_batches(
    vocabulary: int, count: int = 3, size: int = 4, length: int = 12, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of random tokens with responses of several lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (size, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
        starts = torch.randint(1, length // 2, (size, 1), generator=generator)
        place = torch.arange(length)
        mask = (place < lengths).long()
        labels = torch.where((place >= starts) & (place < lengths), ids, IGNORED)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found
