"""Files that `torch.save` wrote, read as plain tensors and nothing else.

Such a file is a zip of a pickle and the tensors' bytes. It is loaded with torch's restricted
unpickler, which runs no code, and mapped into memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.errors import SafeprojError
from safeproj.tensorfile import require_printable

if TYPE_CHECKING:
    from torch import Tensor

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file starts that torch before 1.6 wrote: its magic number, pickled."""


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `torch.save` wrote, mapped into memory.

    Raises:
        SafeprojError: it cannot be read, is in the format before torch 1.6, or holds anything but
            a mapping of names to ordinary tensors.
    """
    return _as_tensors(path, _loaded(path))


def read_nested_pickle(path: Path, inside: str) -> tuple[dict[str, Tensor], bool]:
    """Return the same of a file that may have its tensors, alone, below one name, and whether so.

    Raises:
        SafeprojError: as for `read_pickle`.
    """
    found = _loaded(path)
    nested = isinstance(found, dict) and found.keys() == {inside}
    nested = nested and isinstance(found[inside], dict)
    return _as_tensors(path, found[inside] if nested else found), nested


def _loaded(path: Path) -> Any:
    import torch

    _refuse_legacy(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise errors of nearly every type
        # Not the error's own text: it advises to switch weights_only off.
        raise SafeprojError(
            f"{path}: cannot be loaded as plain tensors ({type(error).__name__}): truncated or "
            "damaged, or it needs code to run, which is refused; fetch it again, or save it as "
            "safetensors"
        ) from error


def _as_tensors(path: Path, found: Any) -> dict[str, Tensor]:
    import torch

    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise SafeprojError(
            f"{path}: expected a mapping of names to tensors and nothing else; save it as "
            "safetensors"
        )
    require_printable(str(path), found)
    _refuse_unusual(path, found)
    return {name: tensor.detach() for name, tensor in found.items()}


def _refuse_legacy(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as error:
        raise SafeprojError(f"{path}: cannot be read ({error.strerror})") from error
    if start == _LEGACY:
        raise SafeprojError(
            f"{path}: in the format that torch had before 1.6, which cannot be read in parts; load "
            "it with a current torch and save it again, best as safetensors"
        )


def _refuse_unusual(path: Path, tensors: dict[str, Tensor]) -> None:
    import torch

    limit = path.stat().st_size  # a few bytes can describe a tensor that no memory holds
    for name, tensor in tensors.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.numel() * tensor.element_size() > limit
        ):
            raise SafeprojError(
                f"{path}: {name} is no ordinary tensor that the file holds (layout "
                f"{tensor.layout}, device {tensor.device}, shape {list(tensor.shape)}); expected "
                "dense tensors on the CPU"
            )
