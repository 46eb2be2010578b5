"""The fixed safety module while training: a parametrisation of `lora_B`, with stock PEFT.

`y = W_0 x + s · C_S B A x` (SaLoRA, equation 4): PEFT computes `s · B A x` with whatever
`lora_B.weight` is, and a parametrisation makes that `C_S B`. The parameter that is trained stays
the same object. State dictionaries hold `lora_B.weight = C_S B` under its usual name, so that what
is saved is an ordinary adapter, and training resumes from it: a component of `B` inside the safety
subspace changes nothing, neither the function nor how `C_S B` moves from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from safeproj.errors import SafeprojError
from safeproj.lm.live import active_adapter
from safeproj.methods.salora.formulas import without
from safeproj.methods.salora.module import SafetyModule
from safeproj.text import shorten


class WithoutSafety(nn.Module):
    """`B ↦ B - U_C (U_Cᵀ B)`, or the same of a bias `b` (m,).

    Args:
        U: (m, r_s), orthonormal columns.
    """

    def __init__(self, U: Tensor) -> None:
        super().__init__()
        # No buffer: it must neither be saved with the adapter nor rounded by `model.half()`.
        self._U = {"cpu": U.float()}

    def forward(self, B: Tensor) -> Tensor:
        """Return `C_S B` in the dtype of `B`."""
        where = str(B.device)
        if where not in self._U:
            self._U[where] = self._U["cpu"].to(B.device)
        # Under autocast the products would be rounded, and C_S B would reach into U.
        with torch.autocast(B.device.type, enabled=False):
            found: Tensor = without(self._U[where], B[:, None] if B.dim() == 1 else B)
        return found[:, 0] if B.dim() == 1 else found


@dataclass(frozen=True)
class Constraint:
    """A model whose adapter is constrained; a context manager that ends it.

    Attributes:
        layers: the `lora_B` of each layer, by the layer's path.
    """

    layers: dict[str, nn.Module]

    def remove(self) -> None:
        """Make `lora_B` ordinary again; it holds `C_S B` afterwards. Twice does nothing."""
        for layer in self.layers.values():
            _release(layer)

    def __enter__(self) -> Constraint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def constrain(
    peft_model: Any,
    module: SafetyModule,
    *,
    rank: int | None = None,
    adapter_name: str | None = None,
) -> Constraint:
    """Keep the updates of an adapter out of the safety subspace, while it is trained and used.

    As a plain function, or as `with constrain(model, module):`. A second call replaces the first.

    Args:
        peft_model: a `PeftModel` with a LoRA adapter on linear layers.
        module: the safety module of its base model.
        rank: use the first directions of each layer alone.
        adapter_name: which adapter; the active one if None.

    Returns:
        What ends it: `remove()`, or the end of the `with` block.

    Raises:
        SafeprojError: the adapter changes a layer that the module does not hold, or of another
            shape or kind.
    """
    module = module.cut(rank)
    layers = dict(lora_layers(peft_model, adapter_name))
    module.require({n: (each.out_features, each.in_features) for n, each in layers.items()})
    adapter = adapter_name or active_adapter(peft_model)
    found = {name: layer.lora_B[adapter] for name, layer in layers.items()}
    for name, lora_B in found.items():
        _release(lora_B)
        _constrain(lora_B, module.directions[name].U)
    return Constraint(found)


def lora_layers(peft_model: Any, adapter_name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the path and the LoRA layer of everything that an adapter changes.

    Raises:
        SafeprojError: it has none, or one that is no linear layer.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    adapter = adapter_name or active_adapter(peft_model)
    if adapter not in peft_model.peft_config:
        raise SafeprojError(
            f"the model has no adapter {adapter!r}, but {shorten(peft_model.peft_config)}"
        )
    seen = False
    for name, layer in peft_model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter in layer.lora_A and (isinstance(layer, Linear) or _is_quantised(layer)):
            seen = True
            yield name, layer
        elif adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            raise SafeprojError(
                f"{name}: is a {type(layer).__name__}, and SaLoRA is for linear layers; leave it "
                "out of target_modules"
            )
    if not seen:
        raise SafeprojError(f"the adapter {adapter!r} has no LoRA layers")


def _is_quantised(layer: Any) -> bool:
    """Tell whether it is PEFT's layer over a quantised linear layer, which has its own class."""
    from peft.tuners.lora.layer import ParamWrapper, _ConvNd

    return isinstance(layer.get_base_layer(), nn.Linear) and not isinstance(
        layer, ParamWrapper | _ConvNd
    )


def set_weight(lora_B: Any, value: Tensor) -> None:
    """Set the `B` that is trained, constrained or not."""
    with torch.no_grad():
        if parametrize.is_parametrized(lora_B, "weight"):
            lora_B.parametrizations.weight.original.copy_(value)
        else:
            lora_B.weight.copy_(value)


_HOOKS = "_safeproj_hooks"
"""Where a constrained `lora_B` keeps the handles of its hooks."""


def _constrain(lora_B: Any, U: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(lora_B, name) is not None:
            parametrize.register_parametrization(lora_B, name, WithoutSafety(U))
    handles = [
        lora_B.register_state_dict_post_hook(_saved),
        lora_B.register_load_state_dict_pre_hook(_loaded),
    ]
    setattr(lora_B, _HOOKS, handles)


def _release(lora_B: Any) -> None:
    for handle in lora_B.__dict__.pop(_HOOKS, ()):
        handle.remove()
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(lora_B, name):
                parametrize.remove_parametrizations(lora_B, name, leave_parametrized=True)


def _saved(lora_B: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:  # noqa: ARG001
    """Give `C_S B` its usual name in a state dictionary."""
    for name in ("weight", "bias"):
        if state.pop(f"{prefix}parametrizations.{name}.original", None) is not None:
            state[prefix + name] = getattr(lora_B, name).detach()


def _loaded(lora_B: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Take what is loaded as the `B` that is trained."""
    for name in ("weight", "bias"):
        if prefix + name in state and parametrize.is_parametrized(lora_B, name):
            state[f"{prefix}parametrizations.{name}.original"] = state.pop(prefix + name)
