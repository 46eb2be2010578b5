"""FP8 and MXFP4 mean what transformers makes of them; every other quantisation is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from safeproj.checkpoint import Checkpoint, Reader, open_checkpoint
from safeproj.checkpoint.codes import lay
from safeproj.checkpoint.expression import Chunk, Item, Joined, Stacked, Stored, matrix
from safeproj.checkpoint.hashes import HASHES
from safeproj.checkpoint.interface import TensorInfo
from safeproj.checkpoint.quantised import leftover_method
from safeproj.errors import SafeprojError
from tests.checkpoint.reading import BLOCKS, digests, hashed, random, read, save

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

BLOCK_CONFIG = {"quant_method": "fp8", "weight_block_size": [4, 4]}
"""As DeepSeek-V3's, with blocks that fit a test."""


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return positive scales over several orders of magnitude, as in published models."""
    return random(*shape, seed=5).exp().mul(1e-3).to(dtype)


def spread(s: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Return a scale for each number, each block's repeated over what of it there is."""
    s = s.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return s[..., : shape[-2], : shape[-1]]


def meant(codes: Tensor, s: Tensor) -> Tensor:
    """Return the numbers, computed in float64 and rounded once."""
    return (codes.double() * s.double()).float()


# --- FP8: what it means


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_blocks_with_scales_mean_what_transformers_makes_of_them(
    tmp_path: Path, end: str, rows: int
) -> None:
    W = random(12, 20)
    settings = SimpleNamespace(weight_block_size=(4, 4), scale_fmt="float")
    quantise: Any = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    stored = quantise.convert({"x.weight": W})
    codes, s = stored["x.weight"], stored["x.weight_scale_inv"]
    assert codes.dtype == E4M3
    source = save(tmp_path, {"x.weight": codes, f"x.{end}": s}, quantization_config=BLOCK_CONFIG)
    checkpoint = open_checkpoint(source)

    found = read(checkpoint.weight("x.weight"), rows)

    assert checkpoint.describe("x.weight") == TensorInfo("F32", (12, 20), quantised="F8_E4M3")
    assert checkpoint.weight("x.weight").dtype == "F32"
    dequantise: Any = Fp8Dequantize(None)
    expected = dequantise.convert({"weight": codes, "weight_scale_inv": s})["weight"]
    assert torch.equal(found, expected)
    assert (found - W).abs().max() < 0.07 * W.abs().max()  # three bits of mantissa


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("columns", [1, 3, 256])
def test_every_byte_means_what_torch_says(tmp_path: Path, dtype: torch.dtype, columns: int) -> None:
    codes = torch.arange(256).repeat(3).to(torch.uint8).view(dtype).view(-1, columns)
    source = save(tmp_path, {"x.weight": codes, "x.weight_scale": torch.ones(1)})
    weight = open_checkpoint(source).weight("x.weight")

    for rows in BLOCKS:
        found, expected = read(weight, rows), codes.float()
        assert torch.equal(found.isnan(), expected.isnan())
        bits, wanted = (
            each.masked_fill(expected.isnan(), 0.0).view(torch.int32) for each in (found, expected)
        )
        assert torch.equal(bits, wanted)  # infinities and the sign of zero included


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    # weight, scales, block
    "a scalar": ((9, 7), (), (9, 7)),
    "one number": ((9, 7), (1,), (9, 7)),
    "one number as a matrix": ((9, 7), (1, 1), (9, 7)),
    "a row each": ((9, 7), (9, 1), (1, 7)),
    "a row each, as a vector": ((9, 7), (9,), (1, 7)),
    "a column each": ((9, 7), (1, 7), (9, 1)),
    "whole blocks": ((8, 12), (2, 3), (4, 4)),
    "blocks that do not come out even": ((9, 7), (3, 2), (4, 4)),
    "less than a block": ((3, 2), (1, 1), (4, 4)),
    "more columns than rows of blocks": ((5, 21), (2, 6), (4, 4)),
    "groups within a row": ((9, 12), (9, 2), (1, 6)),
    "a stack of blocks": ((3, 9, 7), (3, 3, 2), (4, 4)),
    "a stack, a number each": ((3, 9, 7), (3, 1, 1), (9, 7)),
    "a stack, a row each": ((3, 9, 7), (3, 9, 1), (1, 7)),
    "a stack, a column each": ((3, 9, 7), (3, 1, 7), (9, 1)),
    "a stack with one number": ((3, 9, 7), (), (9, 7)),
}


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_lie_over_a_weight_in_every_published_way(
    tmp_path: Path, layout: str, rows: int
) -> None:
    shape, scale_shape, block = LAYOUTS[layout]
    codes, s = random(*shape).to(E4M3), scales(*scale_shape)
    name = "experts.gate_up_proj" if len(shape) == 3 else "x.weight"
    source = save(tmp_path, {name: codes, f"{name}_scale_inv": s}, quantization_config=BLOCK_CONFIG)
    checkpoint = open_checkpoint(source)

    found = read(checkpoint.weight(name), rows)

    assert checkpoint.describe(name).shape == shape
    each = s.reshape(9, 1) if scale_shape == (9,) else s.reshape(1, 1) if s.numel() == 1 else s
    expected = meant(codes, spread(each, shape, block))
    assert torch.equal(found, expected.view(-1, shape[-1]))


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    block=st.tuples(st.integers(1, 140), st.integers(1, 140)),
)
@settings(max_examples=300, deadline=None)
def test_blocks_of_the_configured_size_cover_each_number_once(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    counts = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    grid = lay("s", shape, counts, block)
    assert grid is not None
    assert (grid.rows, grid.scale_rows, grid.block) == (shape[0], counts[0], block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scales_may_have_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, s = random(9, 7).to(E4M3), scales(9, 1, dtype=dtype)
    source = save(tmp_path, {"x.weight": codes, "x.weight_scale": s})

    assert torch.equal(read(open_checkpoint(source).weight("x.weight")), meant(codes, s.float()))


@pytest.mark.parametrize("named", [True, False])
def test_scales_that_are_bytes_are_powers_of_two(tmp_path: Path, named: bool) -> None:
    exponents = torch.arange(0, 255).to(torch.uint8)[:, None]
    codes = random(255, 32).to(E4M3)
    s = exponents.view(torch.float8_e8m0fnu) if named else exponents
    source = save(tmp_path, {"x.weight": codes, "x.weight_scale_inv": s})

    found = read(open_checkpoint(source).weight("x.weight"))

    powers = torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64)[:, None]
    assert torch.equal(found, meant(codes, powers))


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": BLOCK_CONFIG},
        {"text_config": {"quantization_config": BLOCK_CONFIG}},
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"block_structure": [4, 4]}}},
            }
        },
        {
            "compression_config": {
                "quant_method": "compressed-tensors",
                "format": "naive-quantized",
                "config_groups": {"group_0": {"weights": {"block_structure": "4x4"}}},
            }
        },
    ],
)
def test_the_size_of_blocks_is_in_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    codes, s = random(9, 7).to(E4M3), scales(3, 2)
    source = save(tmp_path, {"x.weight": codes, "x.weight_scale": s}, **config)

    found = read(open_checkpoint(source).weight("x.weight"), 2)

    assert torch.equal(found, meant(codes, spread(s, (9, 7), (4, 4))))


def test_without_a_config_blocks_are_those_of_deepseek(tmp_path: Path) -> None:
    codes, s = random(150, 300).to(E4M3), scales(2, 3)
    source = save(tmp_path, {"x.weight": codes, "x.weight_scale_inv": s})

    found = read(open_checkpoint(source).weight("x.weight"), 64)

    assert torch.equal(found, meant(codes, spread(s, (150, 300), (128, 128))))


def test_other_tensors_are_passed_through(tmp_path: Path) -> None:
    W = random(9, 7, dtype=torch.bfloat16)
    tensors = {"x.weight": W, "x.weight_scale": torch.ones(1), "n": torch.ones(3)}
    checkpoint = open_checkpoint(save(tmp_path, tensors, quantization_config=BLOCK_CONFIG))

    assert set(checkpoint.names) == set(tensors)
    assert checkpoint.describe("x.weight") == TensorInfo("BF16", (9, 7))
    assert torch.equal(read(checkpoint.weight("x.weight"), 2), W)


def test_a_bin_file_may_hold_fp8_too(tmp_path: Path) -> None:
    codes, s = random(9, 7).to(E4M3), scales(9, 1)
    exponents = torch.full((3, 2), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    torch.save(
        {"x.weight": codes, "x.weight_scale": s, "y.weight": codes, "y.weight_scale": exponents},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}'
    )
    checkpoint = open_checkpoint(str(tmp_path))

    assert torch.equal(read(checkpoint.weight("x.weight"), 2), meant(codes, s))
    assert torch.equal(read(checkpoint.weight("y.weight"), 2), meant(codes, torch.tensor(2.0**-7)))


# --- FP8: what is read


@pytest.mark.parametrize("rows", BLOCKS)
def test_digests_are_those_of_the_stored_bytes(tmp_path: Path, rows: int) -> None:
    codes, s = random(9, 7).to(E4M3), scales(3, 2)
    tensors = {"x.weight": codes, "x.weight_scale_inv": s}
    checkpoint = open_checkpoint(save(tmp_path, tensors, quantization_config=BLOCK_CONFIG))

    assert digests(checkpoint.weight("x.weight"), rows) == hashed(tensors)


@pytest.fixture
def stack(tmp_path: Path) -> tuple[Tensor, Tensor, Checkpoint]:
    codes, s = random(4, 9, 7).to(E4M3), scales(4, 3, 2)
    tensors = {"gate_up_proj": codes, "gate_up_proj_scale_inv": s}
    checkpoint = open_checkpoint(save(tmp_path, tensors, quantization_config=BLOCK_CONFIG))
    return codes, spread(s, codes.shape, (4, 4)), checkpoint


@pytest.mark.parametrize("rows", BLOCKS)
def test_of_a_stack_only_the_item_and_its_scales_are_read(
    stack: tuple[Tensor, Tensor, Checkpoint], rows: int
) -> None:
    codes, s, checkpoint = stack
    weight = matrix(Item(Stored("gate_up_proj"), 2), checkpoint).weight

    assert torch.equal(read(weight, rows), meant(codes[2], s[2]))
    parts = {"gate_up_proj[2]": codes[2], "gate_up_proj_scale_inv[2]": scales(4, 3, 2)[2]}
    assert digests(weight, rows) == hashed(parts)


def test_one_reader_reads_many_weights_without_mixing_their_scales(
    stack: tuple[Tensor, Tensor, Checkpoint],
) -> None:
    codes, s, checkpoint = stack
    reader = Reader()
    for start in (False, True):
        for item in (3, 0, 3):
            if start:
                reader.start(HASHES)
            weight = matrix(Item(Stored("gate_up_proj"), item), checkpoint).weight
            assert torch.equal(read(weight, 2, reader), meant(codes[item], s[item]))
    reader.close()


def test_quantised_weights_are_parts_like_any_others(
    stack: tuple[Tensor, Tensor, Checkpoint], tmp_path: Path
) -> None:
    codes, s, checkpoint = stack
    W = meant(codes, s)
    gate = Chunk(Item(Stored("gate_up_proj"), 1), 0, 1, 3)
    assert torch.equal(read(matrix(gate, checkpoint).weight, 2), W[1, 3:6])

    parts = {f"{e}.{p}": random(5, 7, seed=e).to(E4M3) for e in range(2) for p in ("gate", "up")}
    each = {f"{name}_scale": scales(5, 1) for name in parts}
    apart = open_checkpoint(save(tmp_path / "apart", {**parts, **each}))
    gates, ups = (Stacked((Stored(f"0.{p}"), Stored(f"1.{p}"))) for p in ("gate", "up"))
    found = matrix(Item(Joined((gates, ups), 1), 1), apart).weight
    assert found.dtype == "F32"
    expected = [meant(parts[name], scales(5, 1)) for name in ("1.gate", "1.up")]
    assert torch.equal(read(found, 3), torch.cat(expected))


def test_the_buffer_grows_with_the_rows_alone(stack: tuple[Tensor, Tensor, Checkpoint]) -> None:
    _, _, checkpoint = stack
    assert checkpoint.weight("gate_up_proj").row_bytes == 7 * (4 + 1)


# --- FP8: damage


def refusal(source: str, name: str, look: str = "describe") -> str:
    with pytest.raises(SafeprojError) as caught:
        checkpoint = open_checkpoint(source)
        if look == "describe":
            checkpoint.describe(name)
        else:
            read(checkpoint.weight(name), 2)
    assert str(caught.value).isprintable()
    return str(caught.value)


def assert_words(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


@pytest.mark.parametrize("look", ["describe", "weight"])
@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [
        ((9, 7), (2, 3)),
        ((9, 7), (4, 2)),
        ((9, 7), (7,)),
        ((9, 7), (2,)),
        ((9, 7), (1, 9)),
        ((9, 7), (0,)),
        ((9, 7), (3, 0)),
        ((9, 7), (1, 3, 2)),
        ((16, 8), (2, 4)),  # as if of the turned weight: it would divide the shape
        ((3, 9, 7), (3, 2)),
        ((3, 9, 7), (3,)),
        ((3, 9, 7), (2, 3, 2)),
        ((3, 9, 7), (9, 2)),
        ((9,), (9,)),
        ((2, 3, 9, 7), (2, 3, 1, 1)),
    ],
)
def test_scales_that_do_not_fit_are_refused_before_reading(
    tmp_path: Path, shape: tuple[int, ...], scale_shape: tuple[int, ...], look: str
) -> None:
    tensors = {"x.weight": random(*shape).to(E4M3), "x.weight_scale": scales(*scale_shape)}
    source = save(tmp_path, tensors, quantization_config=BLOCK_CONFIG)

    message = refusal(source, "x.weight", look)

    assert_words(message, source, "x.weight_scale has shape", str(list(scale_shape)))
    assert_words(message, str(list(shape)), "block of 4×4", "before quantisation")


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path, {"x.weight": random(9, 7).to(E5M2)})

    message = refusal(source, "x.weight")

    assert_words(message, source, "x.weight is stored as F8_E5M2", "no scales", "x.weight_scale")
    assert "before quantisation" in message


def test_fp8_with_two_sets_of_scales_is_refused(tmp_path: Path) -> None:
    s = {"x.weight_scale": scales(1), "x.weight_scale_inv": scales(1)}
    source = save(tmp_path, {"x.weight": random(9, 7).to(E4M3), **s})

    assert_words(refusal(source, "x.weight"), *s, "expected one tensor of scales")


def test_scales_of_another_kind_are_refused(tmp_path: Path) -> None:
    s = torch.ones(9, 1, dtype=torch.int32)
    source = save(tmp_path, {"x.weight": random(9, 7).to(E4M3), "x.weight_scale": s})

    assert_words(refusal(source, "x.weight"), "x.weight_scale is stored as I32", "expected scales")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    s = scales(3, 2)
    s[2, 1] = value
    tensors = {"x.weight": random(9, 7).to(E4M3), "x.weight_scale_inv": s}
    source = save(tmp_path, tensors, quantization_config=BLOCK_CONFIG)

    message = refusal(source, "x.weight", "read")

    assert_words(message, "model.safetensors", "x.weight_scale_inv has NaN or Inf", "damaged")


def test_the_kernel_of_a_convolution_in_fp8_is_refused(tmp_path: Path) -> None:
    tensors = {"x.weight": random(9, 7, 3).to(E4M3), "x.weight_scale": scales(1)}
    checkpoint = open_checkpoint(save(tmp_path, tensors))

    with pytest.raises(SafeprojError, match="cannot be read as the kernel of a convolution"):
        checkpoint.weight("x.weight", 21)


@pytest.mark.parametrize("size", [[0, 128], [128], "all", [128, -1], {"m": 128}, [1.5, 2]])
def test_a_block_size_that_is_none_is_refused(tmp_path: Path, size: object) -> None:
    tensors = {"x.weight": random(9, 7).to(E4M3), "x.weight_scale": scales(9, 1)}
    config = {"quant_method": "fp8", "weight_block_size": size}
    source = save(tmp_path, tensors, quantization_config=config)

    assert_words(refusal(source, "x.weight"), source, "config.json", "two positive numbers")


# --- MXFP4


def packed(E: int = 3, out: int = 10, groups: int = 2) -> dict[str, Tensor]:
    """Return blocks and scales as gpt-oss has them, with every code and every scale."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (E, out, groups, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(100, 140, (E, out, groups), generator=generator, dtype=torch.uint8)
    return {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": exponents}


NAME = "mlp.experts.down_proj"
GPT_OSS = {"quantization_config": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", BLOCKS)
def test_mxfp4_means_what_transformers_makes_of_it(
    tmp_path: Path, rows: int, dtype: torch.dtype
) -> None:
    tensors = packed()
    checkpoint = open_checkpoint(save(tmp_path, tensors, **GPT_OSS))
    # (E, in, out), as the running model has it
    expected = convert_moe_packed_tensors(*tensors.values(), dtype=dtype)

    found = read(checkpoint.weight(NAME), rows)

    info = checkpoint.describe(NAME)
    assert info == TensorInfo("F32", (3, 10, 64), turned=True, quantised="MXFP4")
    assert NAME in checkpoint.names
    assert set(tensors) < set(checkpoint.names)
    assert torch.equal(found.to(dtype).view(3, 10, 64).transpose(1, 2), expected)
    assert torch.equal(found.to(dtype).float(), found)  # neither dtype loses anything


def test_mxfp4_is_right_for_every_byte_and_every_scale(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    exponents = torch.arange(255).to(torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    tensors = dict(zip(packed(), (blocks, exponents), strict=True))
    checkpoint = open_checkpoint(save(tmp_path, tensors, **GPT_OSS))

    found = read(checkpoint.weight(NAME), 7)

    expected = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)[0].T
    assert torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize("rows", BLOCKS)
def test_an_expert_in_mxfp4_is_read_alone(tmp_path: Path, rows: int) -> None:
    tensors = packed()
    checkpoint = open_checkpoint(save(tmp_path, tensors, **GPT_OSS))
    blocks, exponents = tensors.values()

    found = matrix(Item(Stored(NAME), 1), checkpoint)

    expected = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)[1]
    assert found.transposed
    assert found.weight.label == f"{NAME}[1]"
    assert torch.equal(read(found.weight, rows).T, expected)
    parts = {f"{NAME}_blocks[1]": blocks[1], f"{NAME}_scales[1]": exponents[1]}
    assert digests(found.weight, rows) == hashed(parts)


def test_blocks_without_scales_and_scales_without_blocks_are_ordinary_tensors(
    tmp_path: Path,
) -> None:
    tensors = {"num_blocks": torch.ones(2), "x_scales": torch.ones(2)}
    checkpoint = open_checkpoint(save(tmp_path, tensors))

    assert set(checkpoint.names) == set(tensors)


@pytest.mark.parametrize(
    ("blocks", "exponents"),
    [
        ((3, 10, 2, 16), (3, 10, 3)),
        ((3, 10, 2, 16), (3, 10)),
        ((3, 10, 2, 8), (3, 10, 2)),
        ((3, 10, 32), (3, 10)),
        ((2, 16), (2,)),
        ((16,), ()),
    ],
)
def test_mxfp4_of_the_wrong_shape_is_refused(
    tmp_path: Path, blocks: tuple[int, ...], exponents: tuple[int, ...]
) -> None:
    shapes = dict(zip(packed(), (blocks, exponents), strict=True))
    tensors = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes.items()}
    source = save(tmp_path, tensors, **GPT_OSS)

    for look in ("describe", "weight"):
        message = refusal(source, NAME, look)
        assert_words(message, source, *packed(), str(list(blocks)), str(list(exponents)))
        assert_words(message, "are not MXFP4", "before quantisation")


def test_mxfp4_of_the_wrong_dtype_is_refused(tmp_path: Path) -> None:
    tensors = packed()
    tensors[f"{NAME}_scales"] = tensors[f"{NAME}_scales"].float()

    assert_words(refusal(save(tmp_path, tensors), NAME), "F32", "are not MXFP4")


def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    tensors = packed()
    tensors[f"{NAME}_scales"][1, 2, 1] = 255
    source = save(tmp_path, tensors, **GPT_OSS)

    message = refusal(source, NAME, "read")

    assert_words(message, "model.safetensors", f"{NAME}_scales has NaN or Inf")


def test_shards_that_end_early_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path, packed(), **GPT_OSS)
    weight = open_checkpoint(source).weight(NAME)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])

    with pytest.raises(SafeprojError, match="truncated while reading"):
        read(weight)
    with pytest.raises(SafeprojError, match="not a complete safetensors file"):
        open_checkpoint(source)


# --- everything else


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "int-quantized"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "\x1b[2J"}, "\\x1b[2J"),
        ({"quant_method": ["fp8"]}, "['fp8']"),
        ({"bits": 4}, "an unnamed method"),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_methods_that_are_not_supported_are_refused_on_opening(
    tmp_path: Path, settings: dict[str, object], word: str, inner: bool
) -> None:
    config = {"quantization_config": settings}
    tensors = {"w": random(9, 7), "codes": torch.ones(9, 7, dtype=torch.uint8)}
    source = save(tmp_path, tensors, **({"text_config": config} if inner else config))

    with pytest.raises(SafeprojError) as caught:
        open_checkpoint(source)

    assert str(caught.value).isprintable()
    assert_words(str(caught.value), source, "quantised with", word, "config.json")
    assert_words(str(caught.value), "supported are FP8 and MXFP4", "before quantisation", "QLoRA")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("layers.0.q_proj.weight.absmax", "bitsandbytes (4 bits)"),
        ("layers.0.q_proj.SCB", "bitsandbytes (8 bits)"),
        ("layers.0.q_proj.qweight", "GPTQ or AWQ"),
        ("layers.0.q_proj.qzeros", "GPTQ or AWQ"),
        ("layers.0.q_proj.weight_packed", "compressed-tensors"),
    ],
)
def test_names_give_away_a_method_that_no_config_names(
    tmp_path: Path, name: str, method: str
) -> None:
    source = save(tmp_path, {"w": random(9, 7), name: torch.zeros(3)})

    with pytest.raises(SafeprojError) as caught:
        open_checkpoint(source)

    assert_words(str(caught.value), source, name, method, "before quantisation")


@pytest.mark.parametrize("settings", [None, {}, {"quant_method": "fp8"}])
def test_a_checkpoint_that_is_not_quantised_is_opened(
    tmp_path: Path, settings: dict[str, object] | None
) -> None:
    checkpoint = open_checkpoint(save(tmp_path, {"w": random(9, 7)}, quantization_config=settings))

    assert torch.equal(read(checkpoint.weight("w")), random(9, 7))


# --- what only the config says


LEFTOVERS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "torchao": {"quant_method": "torchao"},
}


@pytest.mark.parametrize("settings", LEFTOVERS.values(), ids=LEFTOVERS)
def test_a_config_that_is_left_over_is_no_quantisation(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    W = random(9, 7)
    positions = {"position_ids": torch.arange(4)[None]}
    source = save(tmp_path, {"x.weight": W, **positions}, quantization_config=settings)
    checkpoint = open_checkpoint(source)
    assert torch.equal(read(checkpoint.weight("x.weight"), 4), W)
    assert leftover_method(checkpoint) == settings["quant_method"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, E4M3], ids=str)
def test_codes_of_a_method_that_is_not_supported_are_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {"x.weight": random(9, 7), "y.weight": torch.ones(9, 7).to(dtype)}
    source = save(tmp_path, tensors, quantization_config=LEFTOVERS["torchao"])
    with pytest.raises(SafeprojError, match="quantised with torchao"):
        open_checkpoint(source)
