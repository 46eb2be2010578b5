"""Arrays of numbers as files hold them: dtypes, their names, and conversions.

Arrays on the host are numpy's; bfloat16 and the float8 kinds come from `ml_dtypes`. Where a GPU
computes they are torch's, and what both have in common is the array API standard: formulas are
written once, against what `namespace` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy

if TYPE_CHECKING:
    from torch import Tensor

DType: TypeAlias = numpy.dtype[Any]
Array: TypeAlias = numpy.ndarray[Any, DType]
"""An array on the host."""

AnyArray: TypeAlias = Any
"""An array on the host, or torch's on a GPU: any that follows the array API standard."""

RUN = 2048
"""Numbers whose squares are added up in float32."""

FLOAT32 = numpy.dtype(numpy.float32)
FLOAT64 = numpy.dtype(numpy.float64)

_FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What safeproj computes with."""

_BFLOAT16_INFINITY = 0x7F80


quiet = numpy.errstate(all="ignore")
"""Decorates functions in which values that are not finite are looked for, or mean something."""


@cache
def dtype_of(name: str) -> DType | None:
    """Return the dtype that torch and `ml_dtypes` call so, None where there is none.

    >>> dtype_of("bfloat16"), dtype_of("quint8")
    (dtype(bfloat16), None)
    """
    if name == "bool":
        return numpy.dtype(numpy.bool_)
    found = getattr(ml_dtypes, name, None) or getattr(numpy, name, None)
    return None if found is None else numpy.dtype(found)


def is_float(dtype: DType) -> bool:
    """Tell whether safeproj computes with numbers of a dtype."""
    return dtype.name in _FLOATS


def promoted(*dtypes: DType) -> DType:
    """Return the smallest of the floating-point dtypes that holds the numbers of all of these.

    >>> promoted(dtype_of("bfloat16"), dtype_of("float16"))
    dtype('float32')
    """
    if len(set(dtypes)) == 1:
        return dtypes[0]
    wide = [each for each in dtypes if each.itemsize > FLOAT32.itemsize]
    return max([FLOAT32, *wide], key=lambda dtype: dtype.itemsize)


def cast(array: Array, dtype: DType) -> Array:
    """Return a copy in another dtype, rounded to nearest; what is too large becomes infinite."""
    with numpy.errstate(all="ignore"):
        return array.astype(dtype)


def double(array: Array) -> Array:
    """Return the numbers in float64, a view where they are that already."""
    return array.astype(FLOAT64, copy=False)


def single(array: Array) -> Array:
    """Return the numbers in float32, a view where they are that already."""
    with numpy.errstate(over="ignore"):
        return array.astype(FLOAT32, copy=False)


def is_finite(array: AnyArray) -> bool:
    """Tell whether no number is NaN or infinite."""
    xp = namespace(array)
    if xp is numpy and array.dtype.name == "bfloat16" and array.flags.c_contiguous:
        bits = array.view(numpy.uint16) & _BFLOAT16_INFINITY
        return not bool((bits == _BFLOAT16_INFINITY).any())
    return bool(xp.isfinite(array).all())


def norm(array: Array) -> float:
    """Return `‖·‖_F`, summed in float64."""
    return float(numpy.linalg.norm(double(array)))


def sum_of_squares(array: AnyArray) -> AnyArray:
    """Return `‖·‖_F²` where the array is, in float32 over at most `RUN` numbers and then wider.

    Adding up all of it in float32, one after another, would lose digits.
    """
    xp = namespace(array)
    if xp is not numpy:
        return xp.sum(array * array)  # in pairs
    if not array.flags.c_contiguous:
        array = array.T
    flat = array.reshape(-1)
    whole = len(flat) // RUN * RUN
    runs = flat[:whole].reshape(-1, RUN)
    found = numpy.vecdot(runs, runs).sum(dtype=FLOAT64)
    return found + numpy.vecdot(flat[whole:], flat[whole:])


def inner(one: AnyArray, other: AnyArray) -> AnyArray:
    """Return `⟨·, ·⟩_F` of two arrays of one shape, summed likewise."""
    xp = namespace(one)
    if xp is not numpy:
        return xp.sum(one * other)
    flat, flat_other = (numpy.ascontiguousarray(each).reshape(-1) for each in (one, other))
    whole = len(flat) // RUN * RUN
    runs, runs_other = (each[:whole].reshape(-1, RUN) for each in (flat, flat_other))
    found = numpy.vecdot(runs, runs_other).sum(dtype=FLOAT64)
    return found + numpy.vecdot(flat[whole:], flat_other[whole:])


def joined(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Return arrays one after another, in the smallest dtype that holds the numbers of all."""
    if len(arrays) == 1:
        return arrays[0]
    dtype = promoted(*(each.dtype for each in arrays))
    return numpy.concatenate([each.astype(dtype, copy=False) for each in arrays], axis=axis)


def bytes_of(array: Array) -> memoryview:
    """Return an array's numbers as they are stored."""
    return numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).data


def namespace(array: AnyArray) -> Any:
    """Return the functions of the array API standard for an array of numpy or torch."""
    if isinstance(array, numpy.ndarray | numpy.generic):
        return numpy
    from array_api_compat import torch

    return torch


def on_device(array: Array, like: AnyArray) -> AnyArray:
    """Return numbers of the host where another array is, in their own dtype."""
    if isinstance(like, numpy.ndarray):
        return array
    return to_torch(array).to(like.device)


def to_host(array: AnyArray) -> Array:
    """Return the numbers of an array of numpy or torch on the host."""
    return array if isinstance(array, numpy.ndarray) else from_torch(array)


def to_torch(array: Array) -> Tensor:
    """Return a tensor of the same memory, where torch can have it so."""
    import torch

    dtype = getattr(torch, array.dtype.name)
    array = numpy.require(array, requirements=["C", "W"])
    return torch.from_numpy(array.reshape(-1).view(numpy.uint8)).view(dtype).view(array.shape)


def from_torch(tensor: Tensor) -> Array:
    """Return an array of the same memory, where the tensor is on the host and dense."""
    import torch

    dtype = dtype_of(str(tensor.dtype).removeprefix("torch."))
    assert dtype is not None
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # whatever the strides of dimensions of one
    found: Array = flat.view(torch.uint8).numpy().view(dtype).reshape(tuple(tensor.shape))
    return found
