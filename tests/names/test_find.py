"""What is found by name alone, what is refused rather than guessed, and what is not imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from safeproj.checkpoint import open_checkpoint
from safeproj.checkpoint.expression import Stored
from safeproj.errors import SafeprojError
from safeproj.names import Layout, Names, architecture, operations
from safeproj.names.find import _MISLEADING
from safeproj.names.layout import known_layout
from tests.names.support import anything, build, checkpoint, exactly, save
from tests.support import change_json

Q = "layers.0.self_attn.q_proj.weight"


def plain(path: Path, tensors: Mapping[str, tuple[int, ...]], **config: object) -> Names:
    return Names(checkpoint(path, tensors, **config), architecture=False)


@pytest.mark.parametrize(
    ("parameter", "other"),
    [
        (f"model.vision_tower.encoder.{Q}", f"model.{Q}"),
        (f"model.language_model.{Q}", f"vision_tower.{Q}"),
        (f"model.encoder.{Q}", f"model.decoder.{Q}"),
        (f"model.language_model.{Q}", f"model.language_model.{Q.replace('0', '1')}"),
        (f"model.language_model.{Q}", f"model.{Q.replace('q_proj', 'k_proj')}"),
        (f"model.language_model.{Q}", f"mtp.{Q}"),
        ("roberta.encoder.layer.0.x.weight", "bert.encoder.layer.0.x.weight"),
    ],
)
def test_what_only_looks_alike_is_not_taken(tmp_path: Path, parameter: str, other: str) -> None:
    names = plain(tmp_path, {other: (4, 4)}, model_type="bert")
    with pytest.raises(SafeprojError, match=f"closest is {other}") as error:
        names.find(parameter, anything)
    assert "--map" in error.value.message


def test_the_closer_tower_is_taken(tmp_path: Path) -> None:
    tensors = {
        f"language_model.model.{Q}": (4, 4),
        f"vision_tower.vision_model.encoder.{Q}": (4, 4),
    }
    names = plain(tmp_path, tensors)
    found = names.find(f"model.language_model.{Q}", anything)
    assert found == Stored(f"language_model.model.{Q}")


def test_two_that_fit_are_refused(tmp_path: Path) -> None:
    names = plain(tmp_path, {f"model.{Q}": (4, 2), f"language_model.model.{Q}": (4, 2)})
    with pytest.raises(SafeprojError) as error:
        names.find(f"model.language_model.{Q}", exactly((4, 2)))
    message = error.value.message
    assert f"may be language_model.model.{Q} [4, 2] or model.{Q} [4, 2]" in message
    assert f"--map 'model.language_model.{Q}=language_model.model.{Q}'" in message


def test_of_two_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    names = plain(tmp_path, {f"model.{Q}": (4, 2), f"language_model.model.{Q}": (4, 3)})
    assert names.find(f"model.language_model.{Q}", exactly((4, 2))) == Stored(f"model.{Q}")


def test_an_exact_name_of_another_shape_is_not_replaced(tmp_path: Path) -> None:
    names = plain(tmp_path, {f"model.{Q}": (4, 3), f"language_model.model.{Q}": (4, 2)})
    with pytest.raises(SafeprojError, match=r"\[4, 3\], and the adapter does not fit"):
        names.find(f"model.{Q}", exactly((4, 2)))


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}],
)
def test_a_head_that_is_not_stored_is_the_embedding(tmp_path: Path, config: dict[str, Any]) -> None:
    names = plain(tmp_path, {"model.embed_tokens.weight": (9, 4)}, **config)
    assert names.find("lm_head.weight", exactly((9, 4))) == Stored("model.embed_tokens.weight")


def test_a_head_that_is_not_tied_is_missing(tmp_path: Path) -> None:
    names = plain(tmp_path, {"model.embed_tokens.weight": (9, 4)}, tie_word_embeddings=False)
    with pytest.raises(SafeprojError, match="no weight for lm_head"):
        names.find("lm_head.weight", anything)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (4, 2) for e in (0, 1, 3)}
    with pytest.raises(SafeprojError, match="expert 2 is missing"):
        plain(tmp_path, tensors).find("model.layers.0.mlp.experts.down_proj", anything)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_missing_expert_is_noticed_with_transformers_too(tmp_path: Path, lost: int) -> None:
    from safetensors.torch import load_file, save_file

    path = save(build("qwen3-moe"), tmp_path / "model")
    kept = load_file(path / "model.safetensors")
    kept = {n: t for n, t in kept.items() if f".experts.{lost}." not in n}
    save_file(kept, path / "model.safetensors")
    with pytest.raises(SafeprojError, match="is the checkpoint complete"):
        Names(open_checkpoint(str(path))).find("model.layers.0.mlp.experts.gate_up_proj", anything)


def test_experts_that_may_be_interleaved_are_not_guessed(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{leaf}_proj.weight": (4, 2)
        for e in range(2)
        for leaf in ("gate", "up")
    }
    with pytest.raises(SafeprojError, match="no weight"):
        plain(tmp_path, tensors, model_type="gpt_oss").find(
            "model.layers.0.mlp.experts.gate_up_proj", anything
        )


def test_an_operation_that_is_not_known_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(operations._OPERATIONS, "Concatenate")
    path = save(build("mixtral"), tmp_path / "model")
    with pytest.raises(SafeprojError, match="operation Concatenate, which is not supported"):
        Names(open_checkpoint(str(path))).find("model.layers.0.mlp.experts.gate_up_proj", anything)


def test_a_weight_the_architecture_has_but_the_checkpoint_lacks(tmp_path: Path) -> None:
    path = save(build("bert-base"), tmp_path / "model")
    change_json(path / "config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(SafeprojError, match=r"no weight for classifier\.weight"):
        Names(open_checkpoint(str(path))).find("classifier.weight", anything)


RUN = """
import sys
from collections.abc import Mapping
{before}
from safeproj.checkpoint import open_checkpoint
from safeproj.names import Names
names = Names(open_checkpoint({path!r}))
print(names.find({parameter!r}, lambda shape: True))
print(names.layout({parameter!r}))
print("transformers" in sys.modules and sys.modules["transformers"] is not None)
"""


def run(path: Path, parameter: str, before: str = "") -> list[str]:
    script = RUN.format(path=str(path), parameter=parameter, before=before)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_an_exact_name_does_not_import_transformers(tmp_path: Path) -> None:
    path = save(build("llama"), tmp_path / "model")
    parameter = f"model.{Q}"
    assert run(path, parameter) == [
        str(Stored(parameter)),
        "Layout(kind='linear', out_first=True, marked_transposed=False)",
        "False",
    ]


def test_transformers_is_asked_for_other_names_and_says_nothing_itself(tmp_path: Path) -> None:
    path = save(build("mixtral"), tmp_path / "model")
    assert run(path, "model.layers.0.mlp.experts.down_proj")[-1] == "True"


def test_it_works_where_transformers_cannot_be_imported(tmp_path: Path) -> None:
    path = save(build("mixtral"), tmp_path / "model")
    found = run(path, "model.layers.0.mlp.experts.down_proj", "sys.modules['transformers'] = None")
    assert found[0].startswith("Stacked(parts=(Stored(name='model.layers.0.")
    assert found[1] == str(Layout("experts", True))


@pytest.mark.parametrize("module", ["conversion_mapping", "core_model_loading"])
def test_a_version_without_what_is_used_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    architecture._runtimes.cache_clear()
    monkeypatch.setitem(sys.modules, f"transformers.{module}", None)
    given = checkpoint(tmp_path / "other", {f"model.{Q}": (4, 4)}, model_type="llama")
    assert architecture.mapping_of(given) is None
    assert Names(given).find(f"model.language_model.{Q}", anything) == Stored(f"model.{Q}")
    architecture._runtimes.cache_clear()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "no-such-model"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "llama", "num_labels": 10**9},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "detr", "backbone": "someone/weights"},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/weights"},
    ],
)
def test_a_config_that_cannot_be_used_is_not(tmp_path: Path, config: dict[str, Any]) -> None:
    given = checkpoint(tmp_path, {f"model.{Q}": (4, 4)}, **config)
    assert architecture.mapping_of(given) is None
    assert Names(given).find(f"model.language_model.{Q}", anything) == Stored(f"model.{Q}")


def test_a_config_makes_transformers_fetch_and_run_nothing(tmp_path: Path) -> None:
    path = save(
        build("llama"),
        tmp_path / "model",
        architectures=["pipeline", "os", "AutoModel", 7, "LlamaForCausalLM"],
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        auto_map={"AutoModelForCausalLM": "someone/code--model.Model"},
        quantization_config={"quant_method": "fp8"},
    )
    (path / "model.py").write_text("raise SystemExit('ran')\n", "utf-8")
    mapping = architecture.mapping_of(open_checkpoint(str(path)))
    assert mapping is not None
    assert mapping.find(f"model.{Q}") == Stored(f"model.{Q}")


def test_checkpoints_of_one_config_share_the_model(tmp_path: Path) -> None:
    architecture._runtimes.cache_clear()
    for name in ("base", "aligned"):
        path = save(build("llama"), tmp_path / name)
        assert architecture.mapping_of(open_checkpoint(str(path))) is not None
    assert architecture._runtimes.cache_info().misses == 1


def test_architectures_with_misleading_names_are_known() -> None:
    """A name in a file may belong to another weight only where `find` expects that."""
    from transformers import conversion_mapping as mapping
    from transformers.core_model_loading import GroupWeightRename, WeightConverter

    def misleads(each: Any) -> bool:
        if isinstance(each, GroupWeightRename):
            return True
        same = set(each.source_patterns) & set(each.target_patterns)
        return isinstance(each, WeightConverter) and bool(same)

    mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    every: dict[str, Any] = mapping._checkpoint_conversion_mapping_cache or {}
    assert {n for n, found in every.items() if any(map(misleads, found))} <= _MISLEADING


@pytest.mark.parametrize(
    ("config", "parameter", "expected"),
    [
        ({"model_type": "gpt2"}, "h.0.attn.c_attn.weight", Layout("conv1d", False)),
        ({"model_type": "gpt2"}, "lm_head.weight", Layout("linear", True)),
        ({"model_type": "gpt2"}, "transformer.wte.weight", Layout("embedding", False)),
        ({"model_type": "gpt_bigcode"}, "h.0.attn.c_attn.weight", Layout("linear", True)),
        ({"model_type": "jais", "auto_map": {}}, "h.0.attn.c_attn.weight", None),
        ({}, f"model.{Q}", None),
        ({"model_type": "llama"}, f"model.{Q}", Layout("linear", True)),
        (
            {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}},
            "decoder.transformer.h.0.attn.c_attn.weight",
            None,
        ),
        (
            {"model_type": "gpt_oss"},
            "model.layers.0.mlp.experts.down_proj",
            Layout("experts", False, marked_transposed=True),
        ),
        (
            {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
            "model.layers.0.feed_forward.experts.down_proj",
            Layout("experts", False),
        ),
        ({"model_type": "mixtral"}, "m.0.mlp.experts.down_proj", Layout("experts", True)),
        ({"model_type": "unheard-of"}, "m.0.mlp.experts.down_proj", None),
    ],
)
def test_layouts_without_transformers(
    config: dict[str, Any], parameter: str, expected: Layout | None
) -> None:
    assert known_layout(config, parameter) == expected


def test_transformers_tells_the_layout_of_a_decoder(tmp_path: Path) -> None:
    decoder = {"n_embd": 8, "n_layer": 1, "n_head": 2, "is_decoder": True}
    config = {
        "model_type": "vision-encoder-decoder",
        "architectures": ["VisionEncoderDecoderModel"],
        "encoder": {"model_type": "vit", "num_hidden_layers": 1},
        "decoder": {"model_type": "gpt2", "add_cross_attention": True, **decoder},
    }
    given = checkpoint(tmp_path, {"a": (1,)}, **config)
    names = Names(given)
    attention = "decoder.transformer.h.0.crossattention"
    assert names.layout(f"{attention}.q_attn.weight") == Layout("conv1d", False)
    assert names.layout("encoder.embeddings.patch_embeddings.projection.weight") == Layout(
        "conv", True
    )
