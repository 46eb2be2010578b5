"""What several formats share: tensors in and out of safetensors files, and checks of values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safeproj import tensorfile
from safeproj.errors import SafeprojError, first_line, printable

if TYPE_CHECKING:
    from torch import Tensor

    from safeproj.adapter.record import AdaptedModule


def read_safetensors(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """Return the metadata and all tensors of a file, in the file's order.

    Raises:
        SafeprojError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = tensorfile.read_header(path)
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SafeprojError(
            f"{printable(str(path))}: cannot be read ({first_line(error)}); if its name is no "
            "text, rename it"
        ) from error
    return header.metadata, {name: loaded[name] for name in header.tensors}


def write_safetensors(
    path: Path, metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write the tensors in the given order and return the SHA-256 of each."""
    codes = {torch_name: code for code, (torch_name, _) in tensorfile.DTYPES.items()}
    codes |= {torch_name: code for code, torch_name in tensorfile.OTHER_DTYPES.items()}
    layout, digests = {}, {}
    for name, tensor in tensors.items():
        code = codes[str(tensor.dtype).removeprefix("torch.")]
        layout[name] = (code, tuple(tensor.shape), tensor.nbytes)

    def data() -> Iterator[memoryview]:
        for name, tensor in tensors.items():
            view = bytes_of(tensor)
            digests[name] = hashlib.sha256(view).hexdigest()
            yield view

    tensorfile.write(path, metadata, layout, data())
    tensorfile.read_header(path)
    return digests


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's values as they are stored."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def check_values(
    source: str, tensors: Mapping[str, Tensor], full_changes: Collection[str] = ()
) -> None:
    """Refuse tensors that are no floating-point numbers, or not finite.

    Args:
        source: the SRC, for messages.
        tensors: all tensors of an adapter.
        full_changes: those that are only copied.

    Raises:
        SafeprojError: one cannot be used.
    """
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        wide = tensor.is_floating_point() and tensor.element_size() >= 2
        if not wide and key in full_changes and dtype in tensorfile.OTHER_DTYPES.values():
            continue  # such as a counter of a module that is saved whole
        if not wide:
            raise SafeprojError(
                f"{source}: {key} has dtype {dtype}; expected float64, float32, float16 or bfloat16"
            )
        if not bool(tensor.isfinite().all()):
            raise SafeprojError(
                f"{source}: {key} has NaN or Inf; the adapter is damaged or its training diverged"
            )


def finite_number(what: str, value: object) -> float:
    """Return a number that a file holds.

    Raises:
        SafeprojError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SafeprojError(f"{what} is {value!r}; expected a number")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise SafeprojError(f"{what} is not finite; expected a number")
    return found


def dora_warnings(modules: Iterable[AdaptedModule]) -> Iterator[str]:
    """Yield what to know about modules with a magnitude, if there are any."""
    dora = [module.name for module in modules if module.dora]
    if dora:
        yield (
            f"{len(dora)} modules are DoRA: the direction's update is projected, the magnitude "
            "is kept"
        )
