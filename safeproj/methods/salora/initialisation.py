"""Task-specific initialisation: `A_0`, `B_0`, and the frozen weight that makes up for them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeproj.adapter.files import check_values, read_safetensors, write_safetensors
from safeproj.adapter.peft_config import PREFIX
from safeproj.errors import SafeprojError
from safeproj.lm.data import Batch
from safeproj.lm.layers import MEMORY, OnBatch, plain_weight
from safeproj.lm.live import active_adapter
from safeproj.methods.salora.constraint import constrain, lora_layers, set_weight
from safeproj.methods.salora.directions import output_directions
from safeproj.methods.salora.formulas import initial_factors, without
from safeproj.methods.salora.module import RANK, SafetyModule
from safeproj.storage.arrays import from_torch, to_torch
from safeproj.storage.source import LocalFolder, StrPath

INITIAL = "salora_init.safetensors"
"""The file beside an adapter that keeps its initial factors, named as in the adapter."""

METHOD = "salora"
"""`init_lora_weights` of an adapter that belongs to `W_0`. PEFT refuses to put such an adapter on
the model as it is, which would compute something else; `attach` and `fold` are the ways."""

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

_MARK = "_safeproj_shifted"
"""Set on LoRA layers whose frozen weight is `W_0`."""


@dataclass(frozen=True)
class Initial:
    """The factors that training started from: `W_0 = W - s · C_S B_0 A_0`.

    Attributes:
        A: path of a layer to `A_0` (r, n).
        B: path of a layer to `C_S B_0` (m, r).
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return them by the names that an adapter has for its factors."""
        found = {}
        for name in self.A:
            found[f"{PREFIX}{name}{LORA_A}"] = self.A[name]
            found[f"{PREFIX}{name}{LORA_B}"] = self.B[name]
        return found

    def save(self, directory: StrPath) -> None:
        """Write them beside an adapter, as `salora_init.safetensors`."""
        tensors = {name: from_torch(tensor) for name, tensor in self.tensors().items()}
        write_safetensors(Path(directory) / INITIAL, {"format": "pt"}, tensors)

    @staticmethod
    def load(place: StrPath) -> Initial:
        """Return what `save` wrote to a directory, or to the file itself.

        Raises:
            SafeprojError: it cannot be read, or holds something else.
        """
        path = Path(place) / INITIAL if Path(place).is_dir() else Path(place)
        _, tensors = read_safetensors(LocalFolder(path.parent, os.fspath(place)), path.name)
        check_values(str(path), tensors)
        factors: dict[str, dict[str, Tensor]] = {LORA_A: {}, LORA_B: {}}
        for key, tensor in tensors.items():
            suffix = LORA_A if key.endswith(LORA_A) else LORA_B
            if not (key.startswith(PREFIX) and key.endswith(suffix) and tensor.ndim == 2):
                raise SafeprojError(f"{path}: {key} is no initial factor of an adapter")
            factors[suffix][key[len(PREFIX) : -len(suffix)]] = to_torch(tensor)
        A, B = factors[LORA_A], factors[LORA_B]
        if A.keys() != B.keys() or any(A[name].shape[0] != B[name].shape[1] for name in A):
            raise SafeprojError(f"{path}: its factors do not come in pairs that fit; make it again")
        return Initial(A, B)


def initialise(
    peft_model: Any,
    module: SafetyModule,
    batches: Iterable[Batch],
    *,
    task_rank: int = RANK,
    adapter_name: str | None = None,
    memory: int = MEMORY,
    on_batch: OnBatch | None = None,
) -> Initial:
    """Set the adapter's factors and the frozen weights to SaLoRA's start (section 3.2).

    `B_0 = U_t U_tᵀ U_W S_W^{1/2}` and `A_0 = S_W^{1/2} V_Wᵀ`, with `U_t` (m, d_s) the top right
    singular vectors of the outputs on task data, and `W_0 = W - s · C_S B_0 A_0`: with `constrain`
    the function of the model is the one before, up to the rounding of `W_0` to its dtype. The
    stored `B` is `C_S B_0`.

    Args:
        peft_model: a `PeftModel` with a fresh LoRA adapter on linear layers; its base weights are
            changed in place.
        module: the safety module, cut to the rank that `constrain` is given.
        batches: samples of the task, as for `safety_module`.
        task_rank: d_s.
        adapter_name: which adapter; the active one if None.
        memory: as for `safety_module`.
        on_batch: as for `safety_module`.

    Returns:
        The initial factors, which `fold` needs to serve the adapter on the unmodified model.

    Raises:
        SafeprojError: a layer cannot be initialised, or was before.
    """
    adapter = adapter_name or active_adapter(peft_model)
    layers = dict(lora_layers(peft_model, adapter))
    module.require({n: (each.out_features, each.in_features) for n, each in layers.items()})
    _check(peft_model, layers, adapter)
    with peft_model.disable_adapter():
        found = output_directions(
            peft_model.get_base_model(),
            {name: layer.get_base_layer() for name, layer in layers.items()},
            batches,
            task_rank,
            memory=memory,
            on_batch=on_batch,
        )
    A, B = {}, {}
    for name, layer in layers.items():
        W = plain_weight(layer.get_base_layer())
        assert W is not None  # `_check`
        try:
            U_t = found[name].U.to(W.device)
            A_0, B_0 = initial_factors(W.detach(), U_t, layer.r[adapter])
        except ValueError as error:
            raise SafeprojError(f"{name}: {error}") from error
        stored = layer.lora_A[adapter].weight.dtype
        A[name] = A_0.to(stored).cpu()
        B[name] = without(module.directions[name].U.double(), B_0.cpu()).to(stored)
    initial = Initial(A, B)
    shift(peft_model, initial, adapter)
    for name, layer in layers.items():
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(A[name])
        set_weight(layer.lora_B[adapter], B[name])
    peft_model.peft_config[adapter].init_lora_weights = METHOD
    return initial


def attach(
    model: Any,
    directory: StrPath,
    module: SafetyModule,
    *,
    rank: int | None = None,
    initial: Initial | None = None,
    trainable: bool = True,
) -> Any:
    """Return a `PeftModel` with an adapter that belongs to `W_0`, constrained.

    Its frozen weights become `W_0 = W - s · C_S B_0 A_0`.

    Args:
        model: the aligned model; its weights are changed in place.
        directory: the adapter, as `safeproj salora init` wrote it or as it was saved in training.
        module: the safety module that it was initialised with.
        rank: as for `constrain`.
        initial: the initial factors, where they are not in the directory.
        trainable: whether it is to be trained on.

    Raises:
        SafeprojError: the adapter was not initialised so, or does not fit.
    """
    from peft import PeftConfig, PeftModel

    directory = os.fspath(directory)
    config: Any = PeftConfig.from_pretrained(directory)
    if getattr(config, "init_lora_weights", None) != METHOD:
        raise SafeprojError(
            f"{directory}: its config does not have init_lora_weights {METHOD!r}; expected an "
            "adapter that `safeproj salora init` made, or one trained from it"
        )
    initial = initial or Initial.load(directory)
    config.init_lora_weights = True  # PEFT knows how to do that; the factors are loaded anyway
    peft_model: Any = PeftModel.from_pretrained(
        model, directory, config=config, is_trainable=trainable
    )
    config.init_lora_weights = METHOD
    shift(peft_model, initial, active_adapter(peft_model))
    constrain(peft_model, module, rank=rank)
    return peft_model


def shift(peft_model: Any, initial: Initial, adapter: str) -> None:
    """Turn the frozen weights `W` into `W_0 = W - s · C_S B_0 A_0`.

    Raises:
        SafeprojError: the initial factors are those of another adapter, or the weights cannot be
            changed.
    """
    layers = dict(lora_layers(peft_model, adapter))
    _check(peft_model, layers, adapter)
    if layers.keys() != initial.A.keys():
        raise SafeprojError("the initial factors are not those of the layers of this adapter")
    for name, layer in layers.items():
        W = plain_weight(layer.get_base_layer())
        assert W is not None
        A, B = initial.A[name].double(), initial.B[name].double()
        if (*B.shape[:1], *A.shape[1:]) != tuple(W.shape) or A.shape[0] != B.shape[1]:
            raise SafeprojError(
                f"{name}: the initial factors are {list(B.shape)} and {list(A.shape)}, and the "
                f"weight is {list(W.shape)}"
            )
        with torch.no_grad():
            W.copy_(W.double() - layer.scaling[adapter] * (B @ A).to(W.device))
        setattr(layer, _MARK, True)


def _check(peft_model: Any, layers: dict[str, Any], adapter: str) -> None:
    """Refuse what the initialisation would break, before anything is changed."""
    if len(peft_model.peft_config) > 1:
        raise SafeprojError(
            "the model has several adapters, and the initialisation changes the weights that all "
            "of them belong to; load one"
        )
    embedding = peft_model.get_base_model().get_input_embeddings()
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if getattr(layer, _MARK, False):
            raise SafeprojError(f"{name}: is initialised already; load the model again")
        if layer.merged:
            raise SafeprojError(f"{name}: the adapter is merged into its weight; unmerge it first")
        if plain_weight(base) is None:
            raise SafeprojError(
                f"{name}: its weight is stored as {base.weight.dtype}, or not in memory; the "
                "initialisation changes it, load the model in float32, bfloat16 or float16"
            )
        if embedding is not None and base.weight is embedding.weight:
            raise SafeprojError(
                f"{name}: shares its weight with the embedding, which the initialisation would "
                "change; leave it out of target_modules"
            )
        if adapter in getattr(layer, "use_dora", {}) and layer.use_dora[adapter]:
            raise SafeprojError(
                f"{name}: is DoRA, whose update is no B A; initialise without use_dora"
            )
