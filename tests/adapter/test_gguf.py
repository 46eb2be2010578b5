"""Adapters of llama.cpp: files written with the gguf package as its converter lays them out.

The layout here is written from the definition in llama.cpp's converters, not from safeproj.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeproj.adapter import read_adapter
from safeproj.errors import SafeprojError
from tests.adapter.llamacpp import LAYER, finish, permute, write_adapter, write_tensor
from tests.adapter.llamacpp import renamed as renamed_usually
from tests.adapter.oracle import check, patch, scores, trio_weights
from tests.conftest import Trio
from tests.support import (
    FACTORS,
    assert_refused,
    change_json,
    deltas,
    moved,
    read_json,
    safeproj,
    save_adapter,
    snapshot,
)

EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
HEADS = {"attn_q": 4, "attn_k": 2}
"""Of `tiny_llama`."""

SCALE = 2.0
"""Of PEFT's adapters here: alpha / r."""


def renamed(module: str) -> str:
    """Return llama.cpp's name of a module."""
    other = next((name for name in OTHERS if module.endswith(name)), None)
    return (
        renamed_usually(module) if other is None else f"blk.{module.split('.')[2]}.{OTHERS[other]}"
    )


def unpermute(rows: Tensor, heads: int) -> Tensor:
    found = torch.empty_like(rows)
    found[permute(torch.arange(len(rows)), heads)] = rows
    return found


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    architecture: str = "llama",
    values: Mapping[str, Any] | None = None,
    alignment: int | None = None,
) -> Path:
    """Write tensors with the gguf package, and metadata of every type."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_string("general.name", "Ünï")
    writer.add_array("general.tags", ["a", "bc"])
    writer.add_array("adapter.alora.invocation_tokens", [1, 2, 3])
    writer.add_bool("test.yes", True)
    writer.add_uint64("test.large", 2**63)
    writer.add_float64("test.third", 1 / 3)
    for key, value in (values or {}).items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        write_tensor(writer, name, tensor)
    finish(writer)
    return path


def converted(peft: Path, heads: Mapping[str, int] = HEADS) -> dict[str, Tensor]:
    """Return a PEFT adapter's factors with llama.cpp's names and order of rows."""
    found = {}
    for key, tensor in load_file(peft / FACTORS).items():
        module, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        name = renamed(module)
        if name == "token_embd" and kind == "embedding_A":
            tensor = tensor.T
        if kind == "B.weight" and name.rpartition(".")[2] in heads:
            tensor = permute(tensor, heads[name.rpartition(".")[2]])
        found[f"{name}.weight.lora_{kind.removesuffix('.weight')[-1].lower()}"] = tensor
    return found


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Return the tensors, as the gguf package reads them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        found[tensor.name] = data
    return found


def values(path: Path) -> list[tuple[str, Any]]:
    """Return the metadata in order, without the counts."""
    fields = gguf.GGUFReader(path).fields.items()
    return [(key, f.contents()) for key, f in fields if not key.startswith("GGUF.")]


def updates(path: Path, names: Mapping[str, str], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Return `ΔW` of each module from a file, in the model's order of rows.

    Args:
        path: the file.
        names: llama.cpp's name of each module to its name in the model.
        heads: what is permuted.
    """
    tensors = read_gguf(path)
    found = {}
    for stem, name in names.items():
        a, b = (tensors[f"{stem}.weight.lora_{side}"].double() for side in "ab")
        delta = b @ (a.T if stem == "token_embd" else a)
        leaf = stem.rpartition(".")[2]
        found[name] = SCALE * (unpermute(delta, heads[leaf]) if leaf in heads else delta)
    return found


def module_names(model: Any, peft: Path) -> dict[str, str]:
    return {renamed(module): module for module in deltas(model, peft)}


@pytest.fixture(scope="module")
def all_linear(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter on all linear layers, in PEFT's form and in a folder of its own as GGUF."""
    root = tmp_path_factory.mktemp("gguf")
    peft = save_adapter(trio.aligned_model, root / "peft", target_modules="all-linear")
    (root / "lora").mkdir()
    return peft, write_gguf(root / "lora" / "my-lora.gguf", converted(peft))


def test_the_permutation_is_the_converters() -> None:
    """As in llama.cpp's `LlamaModel.permute`, with numbers that its users publish."""
    assert permute(torch.arange(12), 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("options", [["--all"], ["--layers", "5"]], ids=" ".join)
def test_the_same_adapter_in_both_forms(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path, options: list[str]
) -> None:
    peft, adapter = all_linear
    names = module_names(trio.aligned_model, peft)
    before = updates(adapter, names, HEADS)
    for name, delta in deltas(trio.aligned_model, peft).items():
        assert torch.allclose(before[name], delta, atol=1e-6)

    out = tmp_path / "out"
    manifest = patch(trio, adapter, out, *options)

    after = updates(out / adapter.name, names, HEADS)
    check(manifest, before, after, trio_weights(trio, before))
    in_peft, in_gguf = (scores(trio.base, trio.aligned, path) for path in (peft, adapter))
    assert in_gguf == pytest.approx(in_peft, rel=1e-6)


@pytest.mark.parametrize("as_folder", [False, True], ids=["the file", "its folder"])
def test_what_is_not_projected_is_kept(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path, as_folder: bool
) -> None:
    adapter = tmp_path / "in" / "my-lora.gguf"
    adapter.parent.mkdir()
    adapter.write_bytes(all_linear[1].read_bytes())
    (adapter.parent / "config.json").write_text("{}")
    out = tmp_path / "out"
    manifest = patch(trio, adapter.parent if as_folder else adapter, out, "--layers", "1")

    beside = {"config.json"} if as_folder else set()
    assert set(snapshot(out)) == {adapter.name, "README.md", "safeproj.json", *beside}
    assert b"safeproj:begin" in (out / "README.md").read_bytes()
    assert values(out / adapter.name) == values(adapter)
    before, after = read_gguf(adapter), read_gguf(out / adapter.name)
    assert list(before) == list(after)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == manifest["output"]["projected"]
    assert len(changed) == 1
    sizes = {path.stat().st_size for path in (adapter, out / adapter.name)}
    assert len(sizes) == 1
    assert manifest["inputs"]["adapter"]["sha256"]["files"].keys() == {adapter.name}


@pytest.mark.parametrize("alignment", [None, 8, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nothing_projected_gives_the_same_bytes(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path, dtype: str, alignment: int | None
) -> None:
    tensors = {k: t.to(getattr(torch, dtype)) for k, t in converted(all_linear[0]).items()}
    tensors = {k: tensors[k] for k in sorted(tensors, reverse=True)}
    adapter = write_gguf(tmp_path / "lora.gguf", tensors, alignment=alignment)
    manifest = patch(trio, adapter, tmp_path / "out", "--threshold", "0")
    assert manifest["output"]["projected"] == []
    assert (tmp_path / "out" / adapter.name).read_bytes() == adapter.read_bytes()


def test_dtype_changes_the_projected_tensors_only(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = {key: tensor.half() for key, tensor in converted(all_linear[0]).items()}
    adapter = write_gguf(tmp_path / "lora.gguf", tensors)
    manifest = patch(trio, adapter, tmp_path / "out", "--layers", "3", "--dtype", "float32")
    projected = set(manifest["output"]["projected"])
    assert len(projected) == 3
    converted_too = {key.replace("lora_b", "lora_a") for key in projected}
    assert set(manifest["output"]["converted"]) == converted_too
    for key, tensor in read_gguf(tmp_path / "out" / adapter.name).items():
        changed = key in projected | converted_too
        assert tensor.dtype == (torch.float32 if changed else torch.float16)
        assert key in projected or torch.equal(tensor, tensors[key].to(tensor.dtype))
    assert values(tmp_path / "out" / adapter.name) == values(adapter)


def test_only_what_patch_wrote_is_replaced(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    patch(trio, all_linear[1], out, "--layers", "1")
    patch(trio, all_linear[1], out, "--all", "--overwrite")
    assert read_json(out / "safeproj.json")["selection"]["mode"] == "all"
    (out / "safeproj.json").unlink()
    result = safeproj(
        "patch", "--base", trio.base, "--aligned", trio.aligned, "--adapter", all_linear[1],
        "--out", out, "--all", "--overwrite",
    )  # fmt: skip
    assert_refused(result, f"--out {out}", "is no adapter")


def test_a_patched_adapter_can_lie_beside_the_file(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = tmp_path / "lora.gguf"
    adapter.write_bytes(all_linear[1].read_bytes())
    patch(trio, adapter, tmp_path / "out", "--all")
    assert (tmp_path / "out" / "lora.gguf").exists()


def test_a_converted_file_beside_a_peft_adapter_is_left_out(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(trio.aligned_model, tmp_path / "adapter")
    (adapter / "adapter-F32-LoRA.gguf").write_bytes(all_linear[1].read_bytes())
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    assert "left out: adapter-F32-LoRA.gguf" in " ".join(manifest["warnings"])
    assert not (tmp_path / "out" / "adapter-F32-LoRA.gguf").exists()
    assert (tmp_path / "out" / FACTORS).exists()


def test_an_embedding_and_a_head(trio: Trio, tmp_path: Path) -> None:
    peft = save_adapter(
        trio.aligned_model, tmp_path / "peft", target_modules=["embed_tokens", "lm_head"]
    )
    tensors = {k: t for k, t in load_file(peft / FACTORS).items() if "base_layer" not in k}
    save_file(tensors, peft / FACTORS, metadata={"format": "pt"})
    adapter = write_gguf(tmp_path / "lora.gguf", converted(peft))
    assert read_gguf(adapter)["token_embd.weight.lora_a"].shape == (50, 4)
    names = {"output": "lm_head", "token_embd": "model.embed_tokens"}
    before = updates(adapter, names, HEADS)
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    after = updates(tmp_path / "out" / adapter.name, names, HEADS)
    check(manifest, before, after, trio_weights(trio, before))
    assert scores(trio.base, trio.aligned, adapter) == pytest.approx(
        scores(trio.base, trio.aligned, peft), rel=1e-6
    )


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "in stacks"])
def test_experts(tmp_path: Path, fused: bool) -> None:
    models = Path(__file__).parents[1] / "fixtures" / "models" / "tiny-mixtral"
    experts = "model.layers.0.block_sparse_moe.experts"
    stored = {side: load_file(models / side / "model.safetensors") for side in ("base", "aligned")}
    sources = {}
    for side, tensors in stored.items():
        sources[side] = tmp_path / side
        sources[side].mkdir()
        (sources[side] / "config.json").write_bytes((models / side / "config.json").read_bytes())
        written = dict(tensors)
        if fused:  # as transformers 5 may save it
            for name, parts in {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]}.items():
                rows = [
                    torch.cat([written.pop(f"{experts}.{e}.{p}.weight") for p in parts])
                    for e in range(3)
                ]
                written[f"model.layers.0.mlp.experts.{name}"] = torch.stack(rows)
        save_file(written, sources[side] / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(3)
    factors: dict[str, Tensor] = {}
    before: dict[tuple[int, str], Tensor] = {}
    for part, name in EXPERTS.items():
        out, inner = stored["base"][f"{experts}.0.{part}.weight"].shape
        A, B = torch.randn(3, 2, inner), torch.randn(3, out, 2)
        factors |= {f"blk.0.{name}.weight.lora_a": A, f"blk.0.{name}.weight.lora_b": B}
        before |= {(e, part): B[e].double() @ A[e].double() for e in range(3)}
    adapter = write_gguf(tmp_path / "lora.gguf", factors)

    result = safeproj(
        "patch", "--base", sources["base"], "--aligned", sources["aligned"],
        "--adapter", adapter, "--out", tmp_path / "out", "--layers", "4",
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    manifest = read_json(tmp_path / "out" / "safeproj.json")
    after = read_gguf(tmp_path / "out" / adapter.name)
    known = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    keys = {}
    for module in manifest["modules"]:
        *_, expert, leaf = module["name"].split(".")
        keys[module["name"]] = (int(expert), known.get(leaf, leaf))
    assert sorted(keys.values()) == sorted(before)
    check(
        manifest,
        {name: before[key] for name, key in keys.items()},
        {
            name: after[f"blk.0.{EXPERTS[part]}.weight.lora_b"][e].double()
            @ after[f"blk.0.{EXPERTS[part]}.weight.lora_a"][e].double()
            for name, (e, part) in keys.items()
        },
        {
            name: (
                stored["aligned"][f"{experts}.{e}.{part}.weight"],
                stored["base"][f"{experts}.{e}.{part}.weight"],
            )
            for name, (e, part) in keys.items()
        },
    )


def test_norms_are_listed(trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path) -> None:
    """mergekit puts them into adapters, and the converter keeps them."""
    norm = torch.ones(32)
    tensors = {**converted(all_linear[0]), "blk.0.attn_norm.weight": norm}
    adapter = write_gguf(tmp_path / "lora.gguf", tensors)
    manifest = patch(trio, adapter, tmp_path / "out", "--all")
    assert [item["parameter"] for item in manifest["unprojected"]] == [
        "model.layers.0.input_layernorm.weight"
    ]
    assert torch.equal(read_gguf(tmp_path / "out" / adapter.name)["blk.0.attn_norm.weight"], norm)


def test_a_rank_of_one_may_have_lost_its_dimension(trio: Trio, tmp_path: Path) -> None:
    """ggml counts no last dimensions of 1: `lora_a` (1, in) may be written with one dimension."""
    torch.manual_seed(4)
    A, B = torch.randn(1, 32), torch.randn(32, 1)
    name = "blk.0.attn_v.weight"
    two = write_gguf(tmp_path / "2.gguf", {f"{name}.lora_a": A, f"{name}.lora_b": B[:16]})
    one = write_gguf(tmp_path / "1.gguf", {f"{name}.lora_a": A[0], f"{name}.lora_b": B[:16]})
    assert scores(trio.base, trio.aligned, one) == scores(trio.base, trio.aligned, two)
    patch(trio, one, tmp_path / "out", "--all")
    assert read_gguf(tmp_path / "out" / "1.gguf")[f"{name}.lora_a"].shape == (32,)


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie4_5": ("Ernie4_5", {}),
    "glm4": ("Glm4", {"head_dim": 8, "pad_token_id": 0}),
    "gpt-oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "hunyuan-dense": ("HunYuanDenseV1", {"head_dim": 8}),
    "lfm2": ("Lfm2", {"layer_types": ["full_attention"], "block_auto_adjust_ff_dim": False}),
    "nemotron": ("Nemotron", {"head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
}
"""Architectures whose rows the converter leaves where they are, by transformers' names."""

OTHERS = {
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.out_proj": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
"""What some of these call a layer, and llama.cpp's name of it."""


@pytest.mark.parametrize("architecture", PLAIN)
def test_rows_that_stay_where_they_are(tmp_path: Path, architecture: str) -> None:
    import transformers

    kind, settings = PLAIN[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, **settings,
    )  # fmt: skip
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    aligned = moved(base)
    for model, name in ((base, "base"), (aligned, "aligned")):
        model.save_pretrained(tmp_path / name)
    targets = [n for n, m in aligned.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = [name for name in targets if "layers" in name and not name.endswith("router")]
    peft = save_adapter(aligned, tmp_path / "peft", target_modules=targets)
    adapter = write_gguf(tmp_path / "lora.gguf", converted(peft, {}), architecture)
    found = scores(tmp_path / "base", tmp_path / "aligned", adapter)
    assert len(found) >= 2 * 4
    assert found == pytest.approx(scores(tmp_path / "base", tmp_path / "aligned", peft), rel=1e-6)


@pytest.mark.parametrize("config", ["sections", "none"])
def test_glm4_with_sections_is_in_another_order(trio: Trio, tmp_path: Path, config: str) -> None:
    """The converter reorders q and k where the rotary embedding has sections, as in GLM-4.1V."""
    tensors = {
        "blk.0.attn_k.weight.lora_a": torch.ones(4, 32),
        "blk.0.attn_k.weight.lora_b": torch.ones(16, 4),
    }
    adapter = write_gguf(tmp_path / "lora.gguf", tensors, "glm4")
    for side, model in (("base", trio.base_model), ("aligned", trio.aligned_model)):
        model.save_pretrained(tmp_path / side)
        if config == "none":
            (tmp_path / side / "config.json").unlink()
        else:
            rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            change_json(tmp_path / side / "config.json", rope_parameters=rope)
    result = safeproj(
        "inspect", "--base", tmp_path / "base", "--aligned", tmp_path / "aligned",
        "--adapter", adapter,
    )  # fmt: skip
    assert_refused(result, str(adapter), "blk.0.attn_k.weight", "another order")


@pytest.mark.parametrize("stem", ["attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down"])
def test_a_model_that_a_vision_language_model_wraps(tmp_path: Path, stem: str) -> None:
    """The table has several paths for a tensor, and none of them with the wrapper's name."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=50,
    )  # fmt: skip
    base = Gemma3ForCausalLM(config)
    models = {"base": base, "aligned": moved(base)}
    module = next(name for name, short in LAYER.items() if short == stem)
    for side, model in models.items():
        model.save_pretrained(tmp_path / side)
        stored = load_file(tmp_path / side / "model.safetensors")
        wrapped = {f"language_model.{name}": tensor for name, tensor in stored.items()}
        tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
        wrapped[tower] = torch.ones(48, 32)
        save_file(wrapped, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / side / "config.json").unlink()
    path = f"model.layers.0.{module}"
    peft = save_adapter(models["aligned"], tmp_path / "peft", target_modules=[path])
    adapter = write_gguf(tmp_path / "lora.gguf", converted(peft, {}), "gemma3")
    found = scores(tmp_path / "base", tmp_path / "aligned", adapter)
    assert found == pytest.approx(scores(tmp_path / "base", tmp_path / "aligned", peft), rel=1e-6)
    assert {name.partition(" ")[0] for name in found} == {path}


@pytest.mark.parametrize("alpha", [8.0, 0.0, None])
def test_the_scale_is_1_where_there_is_no_alpha(
    all_linear: tuple[Path, Path], tmp_path: Path, alpha: float | None
) -> None:
    """As llama.cpp has it, see test_llamacpp.py."""
    adapter = read_adapter(str(write_adapter(tmp_path / "a.gguf", converted(all_linear[0]), alpha)))
    found = adapter.format.scalings(adapter, adapter.modules)
    assert set(found.values()) == {2.0 if alpha else 1.0}


def inspect(trio: Trio, adapter: Path) -> Any:
    return safeproj("inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", adapter)


def test_without_the_package(trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "gguf.py").write_text("raise ImportError('no gguf')")
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", trio.aligned, "--adapter", all_linear[1],
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert_refused(result, str(all_linear[1]), "pip install '.[gguf]'")


def test_two_files(trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(all_linear[1].read_bytes())
    result = inspect(trio, tmp_path)  # a directory of two adapters
    assert result.returncode == 0, result.stderr
    assert {"a", "b"} <= {line.split()[0] for line in result.stdout.splitlines()}
    with pytest.raises(SafeprojError, match=r"a\.gguf, b\.gguf.*pass the file itself"):
        read_adapter(str(tmp_path))


def test_heads_that_the_config_does_not_tell(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path
) -> None:
    aligned = tmp_path / "aligned"
    trio.aligned_model.save_pretrained(aligned)
    change_json(aligned / "config.json", num_attention_heads=3)
    result = safeproj(
        "inspect", "--base", trio.base, "--aligned", aligned, "--adapter", all_linear[1]
    )
    assert_refused(result, "blk.0.attn_q.weight.lora_b", "num_attention_heads = 3", "32 rows")


FILES: dict[str, tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]] = {
    "a model": ({"type": "model"}, {}, ("general.type is 'model'", "expected 'adapter'")),
    "a control vector": ({"adapter": "control"}, {}, ("adapter.type is 'control'", "'lora'")),
    "an unknown architecture": (
        {"architecture": "falcon"},
        {},
        ("architecture 'falcon' is not supported", "llama", "PEFT adapter"),
    ),
    "half a pair": (
        {},
        {"blk.0.attn_q.weight.lora_a": torch.ones(4, 32)},
        ("blk.0.attn_q.weight.lora_a stands alone",),
    ),
    "another tensor": ({}, {"blk.0.attn_q.weight": torch.ones(4, 32)}, ("is no tensor of a LoRA",)),
    "an unknown name": (
        {},
        {
            "blk.0.what.weight.lora_a": torch.ones(4, 9),
            "blk.0.what.weight.lora_b": torch.ones(9, 4),
        },
        ("blk.0.what is no weight of llama",),
    ),
    "factors that do not fit": (
        {},
        {
            "blk.0.attn_v.weight.lora_a": torch.ones(4, 32),
            "blk.0.attn_v.weight.lora_b": torch.ones(16, 5),
        },
        ("do not fit", "[4, 32]", "[16, 5]"),
    ),
    "not finite": (
        {},
        {
            "blk.0.attn_v.weight.lora_a": torch.full((4, 32), torch.nan),
            "blk.0.attn_v.weight.lora_b": torch.ones(16, 4),
        },
        ("blk.0.attn_v.weight.lora_a", "NaN"),
    ),
    "whole numbers": (
        {},
        {
            "blk.0.attn_v.weight.lora_a": torch.ones((4, 32), dtype=torch.int8),
            "blk.0.attn_v.weight.lora_b": torch.ones(16, 4),
        },
        ("blk.0.attn_v.weight.lora_a", "type I8", "F32, F16 or BF16"),
    ),
    "very many blocks": (
        {},
        {
            "blk.99999.attn_v.weight.lora_a": torch.ones(4, 32),
            "blk.99999.attn_v.weight.lora_b": torch.ones(16, 4),
        },
        ("block 99999",),
    ),
    "nothing": ({}, {}, ("no lora_a/lora_b pair",)),
}


@pytest.mark.parametrize(("settings", "tensors", "words"), FILES.values(), ids=FILES)
def test_refused(
    trio: Trio,
    tmp_path: Path,
    settings: dict[str, str],
    tensors: dict[str, Tensor],
    words: tuple[str, ...],
) -> None:
    adapter = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(adapter, settings.get("architecture", "llama"))
    writer.add_type(settings.get("type", "adapter"))
    writer.add_string("adapter.type", settings.get("adapter", "lora"))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    finish(writer)
    assert_refused(inspect(trio, adapter), str(adapter), *words)


def test_quantised_factors(trio: Trio, tmp_path: Path) -> None:
    adapter = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    kind = gguf.GGMLQuantizationType.Q8_0
    for side, shape in (("a", (4, 32)), ("b", (32, 32))):
        data = gguf.quants.quantize(np.ones(shape, dtype=np.float32), kind)
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", data, raw_dtype=kind)
    finish(writer)
    assert_refused(inspect(trio, adapter), "has the type Q8_0", "F32, F16 or BF16", "--outtype f32")


def overwritten(data: bytes, at: int, code: str, value: int) -> bytes:
    return data[:at] + struct.pack(code, value) + data[at + struct.calcsize(code) :]


def offset_of(data: bytes, tensor: str) -> int:
    """Return where a tensor's dimensions are written."""
    return data.index(tensor.encode()) + len(tensor)


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "magic only": lambda data: data[:4],
    "another magic": lambda data: b"GGML" + data[4:],
    "version 1": lambda data: overwritten(data, 4, "<I", 1),
    "version 9": lambda data: overwritten(data, 4, "<I", 9),
    "big-endian": lambda data: overwritten(data, 4, ">I", 3),
    "counts cut off": lambda data: data[:20],
    "too many tensors": lambda data: overwritten(data, 8, "<Q", 2**63),
    "too many values": lambda data: overwritten(data, 16, "<Q", 2**63),
    "a long key": lambda data: overwritten(data, 24, "<Q", 2**62),
    "a long array": lambda data: overwritten(
        data, data.index(b"invocation_tokens") + 17 + 8, "<Q", 2**63
    ),
    "an unknown type of value": lambda data: overwritten(
        data, data.index(b"general.name") + 12, "<I", 77
    ),
    "text that is none": lambda data: data.replace("Ünï".encode(), b"\xff\xfe123"),
    "two values of one key": lambda data: data.replace(b"general.name", b"general.type"),
    "many dimensions": lambda data: overwritten(
        data, offset_of(data, "attn_q.weight.lora_a"), "<I", 9
    ),
    "a huge dimension": lambda data: overwritten(
        data, offset_of(data, "blk.0.attn_q.weight.lora_a") + 4, "<Q", 2**60
    ),
    "an empty dimension": lambda data: overwritten(
        data, offset_of(data, "blk.0.attn_q.weight.lora_a") + 4, "<Q", 0
    ),
    "a wrong offset": lambda data: overwritten(
        data, offset_of(data, "blk.0.attn_q.weight.lora_b") + 4 + 16 + 4, "<Q", 0
    ),
    "a name that steers terminals": lambda data: data.replace(b"blk.0.attn_q", b"blk.0.\x1b[31m."),
    "the data cut off": lambda data: data[:-3000],
    "the header cut off": lambda data: data[:600],
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(
    all_linear: tuple[Path, Path], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    given, adapter = all_linear[1].read_bytes(), tmp_path / "lora.gguf"
    adapter.write_bytes(damage(given))
    assert adapter.read_bytes() != given
    with pytest.raises(SafeprojError) as error:
        read_adapter(str(adapter))
    assert str(error.value).startswith(str(adapter))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["another magic", "too many values", "the data cut off"])
def test_damaged_files_end_the_command_in_one_line(
    trio: Trio, all_linear: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    adapter = tmp_path / "lora.gguf"
    adapter.write_bytes(DAMAGED[name](all_linear[1].read_bytes()))
    assert_refused(inspect(trio, adapter), str(adapter), "GGUF file", "fetch it again")


def test_reading_needs_no_more_than_the_file(all_linear: tuple[Path, Path], tmp_path: Path) -> None:
    """Every prefix of a file ends in the one error: none hangs, none raises another."""
    data = all_linear[1].read_bytes()
    adapter = tmp_path / "lora.gguf"
    for length in [*range(0, 2000, 7), *range(2000, len(data) - 64, 997)]:
        adapter.write_bytes(data[:length])
        with pytest.raises(SafeprojError):
            read_adapter(str(adapter))
