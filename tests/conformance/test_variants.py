"""Every kind of tensor that PEFT writes, one by one, through the command and the oracle."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeproj import SafeLora, SafeprojError, project
from tests.conformance import oracle
from tests.conformance.architectures import (
    ARCHITECTURES,
    GPT2,
    GROUPED,
    LOCAL,
    Architecture,
    Built,
    build,
    save_pair,
)
from tests.conformance.live import assert_same_in_memory
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    assert_refused,
    change_json,
    moved,
    oracle_C,
    oracle_cosine,
    read_json,
    safeproj,
)

QV = ["q_proj", "v_proj"]
P = oracle.PREFIX


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.fixture
def llama(root: Path) -> Built:
    return build("llama", root)


@pytest.fixture(scope="module")
def tied(root: Path) -> Built:
    """A Llama whose head is its embedding, so that no head is stored."""
    settings = {**GROUPED, "tie_word_embeddings": True}
    base = Architecture("LlamaForCausalLM", "LlamaConfig", settings).build()
    pair = save_pair(root / "tied", base, moved(base))
    assert not any("lm_head" in name for name in stored_names(pair.aligned))
    return pair


def stored_names(checkpoint: Path) -> set[str]:
    return {name for file in checkpoint.glob("*.safetensors") for name in load_file(file)}


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": QV, **settings})


def run(
    pair: Built, config: Any, path: Path, *options: str, host: Any = None, **expected: Any
) -> dict[str, Any]:
    """Save an adapter, patch it, check it with the oracle, and do the same in memory."""
    model = oracle.written(oracle.adapted(host or pair.aligned_model, config), path / "adapter")
    found = patched(pair, path / "adapter", path / "out", *options, host=host, **expected)
    assert_same_in_memory(pair, model, path / "out", own=host is None)
    return found


def patched(
    pair: Built, adapter: Path, out: Path, *options: str, **expected: Any
) -> dict[str, Any]:
    """Patch an adapter and check the result with the oracle."""
    oracle.patch(pair, adapter, out, *(options or ("--all",)))
    return oracle.check(pair, adapter, out, **expected)


def inspect(pair: Built, adapter: Path) -> Any:
    return safeproj(
        "inspect", "--base", pair.base, "--aligned", pair.aligned, "--adapter", adapter
    )  # fmt: skip


def names(manifest: dict[str, Any]) -> list[str]:
    return [module["name"] for module in manifest["modules"]]


def listed(manifest: dict[str, Any]) -> dict[str, float | None]:
    return {item["parameter"]: item["relative_change"] for item in manifest["unprojected"]}


def edit(adapter: Path, **tensors: Tensor) -> None:
    """Replace tensors of an adapter, by their names without PEFT's prefix."""
    before = load_file(adapter / FACTORS)
    changes = {P + key: tensor for key, tensor in tensors.items()}
    assert changes.keys() <= before.keys()
    save_file({**before, **changes}, adapter / FACTORS, metadata={"format": "pt"})


# The settings of a LoRA on linear layers.

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern of targets": {"target_modules": r".*\.1\..*\.(o|down)_proj"},
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rsLoRA": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {r"layers\.[1-9]\..*q_proj": 1, "up_proj": 4},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 9, "k_proj": 2},
        "use_rslora": True,
    },
    "aLoRA": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(llama: Built, tmp_path: Path, settings: dict[str, Any]) -> None:
    manifest = run(llama, lora(**settings), tmp_path)
    assert not manifest["warnings"]
    assert not manifest["unprojected"]
    assert manifest["summary"]["projected"] == len(manifest["modules"])


def test_velora_and_monteclora_keep_what_they_need_for_training(
    llama: Built, tmp_path: Path
) -> None:
    from peft.tuners.lora.config import MontecloraConfig, VeloraConfig

    run(llama, lora(velora_config=VeloraConfig(num_groups=2)), tmp_path / "velora")
    monteclora = MontecloraConfig(num_samples=2, buffer_size=2)
    run(llama, lora(monteclora_config=monteclora), tmp_path / "monteclora")


def test_an_expert_for_arrow_is_a_plain_adapter(llama: Built, tmp_path: Path) -> None:
    plain = run(llama, lora(), tmp_path)
    change_json(tmp_path / "adapter" / CONFIG, arrow_config={"top_k": 1})
    oracle.patch(llama, tmp_path / "adapter", tmp_path / "arrow", "--all")
    assert read_json(tmp_path / "arrow" / MANIFEST)["modules"] == plain["modules"]


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_dora_magnitudes_are_kept(llama: Built, tmp_path: Path, target: str) -> None:
    manifest = run(llama, lora(use_dora=True, target_modules=[target]), tmp_path)
    assert any("DoRA" in text and "magnitude" in text for text in manifest["warnings"])
    magnitudes = [key for key in load_file(tmp_path / "out" / FACTORS) if "magnitude" in key]
    assert len(magnitudes) == len(manifest["modules"])
    assert not set(magnitudes) & set(manifest["output"]["projected"])


def test_patterns_from_the_file_are_not_run(tmp_path: Path) -> None:
    name = "a" * 60 + "b"  # (a+)+$ takes 2^60 steps to find that it does not match
    torch.manual_seed(0)
    for side in ("base", "aligned"):
        (tmp_path / side).mkdir()
        save_file({f"{name}.weight": torch.randn(6, 5)}, tmp_path / side / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONFIG).write_text("{}")
    change_json(
        adapter / CONFIG,
        peft_type="LORA",
        r=8,
        lora_alpha=8,
        target_modules="(a+)+$",
        rank_pattern={"(a+)+$": 2, "(a|a)*$": 3},
        alpha_pattern={"(a+)+$": 2},
        exclude_modules="(a+)+$",
        modules_to_save=["(a+)+$"],
        layers_pattern="(a+)+$",
    )
    factors = {"lora_A": torch.randn(2, 5), "lora_B": torch.randn(6, 2)}
    save_file({f"{P}{name}.{k}.weight": t for k, t in factors.items()}, adapter / FACTORS)
    result = safeproj(
        "patch", "--base", tmp_path / "base", "--aligned", tmp_path / "aligned",
        "--adapter", adapter, "--out", tmp_path / "out", "--all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert names(read_json(tmp_path / "out" / MANIFEST)) == [name]


# GPT-2's Conv1D: the weight is stored (in, out), whatever the config says.


@pytest.mark.parametrize("flag", [False, True])
def test_conv1d_whatever_the_saved_flag_says(root: Path, tmp_path: Path, flag: bool) -> None:
    pair = build("gpt2", root)
    config = lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    adapter = oracle.save(pair.aligned_model, config, tmp_path / "adapter")
    change_json(adapter / CONFIG, fan_in_fan_out=flag)
    manifest = patched(pair, adapter, tmp_path / "out")
    assert [24, 24] in [module["shape"] for module in manifest["modules"]]


@pytest.mark.parametrize("flag", [False, True])
def test_conv1d_and_linear_in_one_adapter(root: Path, tmp_path: Path, flag: bool) -> None:
    pair = build("gpt2", root)
    config = lora(target_modules=["attn.c_proj", "lm_head", "wte"], fan_in_fan_out=flag)
    manifest = run(pair, config, tmp_path)
    assert "lm_head" in names(manifest)


@pytest.mark.parametrize("square", [24, 30])
def test_square_head_of_a_conv1d_model(tmp_path: Path, square: int) -> None:
    settings = {**GPT2, "vocab_size": square, "tie_word_embeddings": False}
    base = Architecture("GPT2LMHeadModel", "GPT2Config", settings).build()
    pair = save_pair(tmp_path, base, moved(base))
    run(pair, lora(target_modules=["lm_head", "attn.c_proj", "wte"]), tmp_path)


# Embeddings and heads.


def test_an_embedding_alone(llama: Built, tmp_path: Path) -> None:
    manifest = run(llama, lora(target_modules=["embed_tokens"]), tmp_path)
    assert [module["shape"] for module in manifest["modules"]] == [[24, 41]]


@pytest.mark.parametrize("changed", [False, True], ids=["as it was", "changed"])
def test_copies_of_targeted_embeddings_and_heads(
    llama: Built, tmp_path: Path, changed: bool
) -> None:
    config = lora(target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapter = oracle.save(llama.aligned_model, config, tmp_path / "adapter")
    if changed:
        embedding = llama.aligned_model.model.embed_tokens.weight.detach()
        head = llama.aligned_model.lm_head.weight.detach().clone()
        head[3] *= 2
        edit(
            adapter,
            **{"model.embed_tokens.base_layer.weight": embedding * 1.5,
               "lm_head.base_layer.weight": head},
        )  # fmt: skip
    oracle.patch(llama, adapter, tmp_path / "out", "--all")
    manifest = oracle.check(llama, adapter, tmp_path / "out")
    sizes = listed(manifest)
    assert sizes.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    warned = [text for text in manifest["warnings"] if "embed_tokens" in text]
    if changed:
        assert sizes["model.embed_tokens.weight"] == pytest.approx(0.5)
        assert 0 < (sizes["lm_head.weight"] or 0) < 0.5
        assert warned
    else:
        assert set(sizes.values()) == {0.0}
        assert not manifest["warnings"]


def test_a_tied_head_alone(tied: Built, tmp_path: Path) -> None:
    assert names(run(tied, lora(target_modules=["lm_head"]), tmp_path)) == ["lm_head"]


def test_a_tied_head_and_its_embedding_with_factors_of_their_own(
    tied: Built, tmp_path: Path
) -> None:
    manifest = run(tied, lora(target_modules=["lm_head", "embed_tokens"]), tmp_path)
    assert len(manifest["modules"]) == 2


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_tied_factors_stay_tied(tied: Built, tmp_path: Path, targets: list[str]) -> None:
    config = lora(target_modules=targets, ensure_weight_tying=True)
    adapter = oracle.save(tied.aligned_model, config, tmp_path / "adapter")
    tie_factors(adapter)

    patched(tied, adapter, tmp_path / "out", same={"lm_head": "model.embed_tokens"})

    found = load_file(tmp_path / "out" / FACTORS)
    embedding = f"{P}model.embed_tokens.lora_embedding"
    assert torch.equal(found[f"{P}lm_head.lora_A.weight"], found[f"{embedding}_B"].T)
    assert torch.equal(found[f"{P}lm_head.lora_B.weight"], found[f"{embedding}_A"].T)
    updates = oracle.updates(tied.aligned_model, tmp_path / "out")
    head, embedded = updates["lm_head"].matrix, updates["model.embed_tokens"].matrix
    assert torch.allclose(head, embedded.T)


def tie_factors(adapter: Path) -> None:
    """Make both sides equal, as training does: the factors are then the same tensors."""
    tensors = load_file(adapter / FACTORS)
    A, B = (tensors[f"{P}model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    edit(
        adapter,
        **{"lm_head.lora_A.weight": B.T.contiguous(), "lm_head.lora_B.weight": A.T.contiguous()},
    )


# Vocabularies that differ.


@pytest.fixture(scope="module")
def extended(root: Path) -> Built:
    """A Llama whose alignment added tokens: 41 rows in base, 45 in aligned."""
    base = Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED).build()
    aligned = copy.deepcopy(base)
    aligned.resize_token_embeddings(45, mean_resizing=False)
    return save_pair(root / "extended", base, moved(aligned, size=0.05))


def test_added_tokens(extended: Built, tmp_path: Path) -> None:
    config = lora(target_modules=["embed_tokens", "lm_head", "q_proj"])
    manifest = run(extended, config, tmp_path)
    notes = {module["name"]: module["note"] for module in manifest["modules"]}
    for name in ("model.embed_tokens", "lm_head"):
        assert notes[name] is not None
        assert "41" in notes[name]
        assert "45" in notes[name]
    assert notes["model.layers.0.self_attn.q_proj"] is None
    before, after = (load_file(tmp_path / at / FACTORS) for at in ("adapter", "out"))
    B = f"{P}lm_head.lora_B.weight"
    assert torch.equal(before[B][41:], after[B][41:])
    assert not torch.equal(before[B][:41], after[B][:41])


def test_added_tokens_with_a_bias_of_lora_B(extended: Built, tmp_path: Path) -> None:
    manifest = run(extended, lora(target_modules=["lm_head"], lora_bias=True), tmp_path)
    assert names(manifest) == ["lm_head"]


def test_an_adapter_that_adds_tokens_itself(llama: Built, tmp_path: Path) -> None:
    larger = copy.deepcopy(llama.aligned_model)
    larger.resize_token_embeddings(44, mean_resizing=False)
    config = lora(target_modules=["embed_tokens", "lm_head", "q_proj"])
    manifest = run(llama, config, tmp_path, host=larger)
    # The rows that both have are the same, but the adapter brings three more.
    assert set(listed(manifest).values()) == {0.0}
    assert [item["added_rows"] for item in manifest["unprojected"]] == [3, 3]
    assert any("embed_tokens" in text for text in manifest["warnings"])


# Changes of whole weights: listed with their size, never silent.


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_listed(root: Path, tmp_path: Path, bias: str) -> None:
    pair = build("qwen2", root)
    manifest = run(pair, lora(bias=bias, target_modules=["q_proj", "o_proj"]), tmp_path)
    found = listed(manifest)
    leaves = {"all": {"q", "k", "v"}, "lora_only": {"q"}}[bias]
    assert found.keys() == {
        f"model.layers.{layer}.self_attn.{leaf}_proj.bias" for layer in (0, 1) for leaf in leaves
    }
    assert all(size and size > 0.01 for size in found.values())
    assert any("q_proj.bias" in text for text in manifest["warnings"])


@pytest.mark.parametrize("saved", [["lm_head", "model.norm"], ["norm"]], ids=str)
def test_modules_to_save_are_listed(llama: Built, tmp_path: Path, saved: list[str]) -> None:
    manifest = run(llama, lora(modules_to_save=saved), tmp_path)
    found = listed(manifest)
    assert "model.norm.weight" in found
    assert all(size and size > 0.01 for size in found.values())
    if saved == ["norm"]:  # PEFT compares ends of names: layer norms are meant too
        assert "model.layers.0.input_layernorm.weight" in found


TOKENS: dict[str, Any] = {
    "list": [4, 0, 40],
    "dict": {"embed_tokens": [7, 2]},
    "both sides": {"embed_tokens": [7, 2], "lm_head": [1, 3, 5]},
}


@pytest.mark.parametrize("indices", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("model", ["llama", "tied"])
def test_trainable_tokens_are_listed(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, indices: Any
) -> None:
    pair = request.getfixturevalue(model)
    manifest = run(pair, lora(trainable_token_indices=indices), tmp_path)
    found = listed(manifest)
    assert "model.embed_tokens.weight" in found
    assert all(size and size > 0.01 for size in found.values())
    assert {item["kind"] for item in manifest["unprojected"]} == {"trainable tokens"}


def test_trainable_tokens_beside_an_embedding_called_otherwise(root: Path, tmp_path: Path) -> None:
    manifest = run(build("gpt2", root), lora(target_modules=["c_attn"],
                   trainable_token_indices=[3, 1]), tmp_path)  # fmt: skip
    assert listed(manifest).keys() == {"transformer.wte.weight"}


def test_a_new_head_is_listed_without_a_size(root: Path, tmp_path: Path) -> None:
    """An adapter of a classifier, whose checkpoint is a language model."""
    pair = build("llama", root)
    classifier = Architecture(
        "LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, "num_labels": 3}
    ).build()
    manifest = run(pair, lora(task_type="SEQ_CLS"), tmp_path, host=classifier)
    assert listed(manifest) == {"score.weight": None}
    assert len(manifest["modules"]) == 4


OTHER_CLASSES = {
    "classifier on the encoder's files": ("bert", "BertForSequenceClassification", "bert"),
    "encoder on a language model's files": ("bert-mlm", "BertModel", ""),
    "inner model on a language model's files": ("llama", "LlamaModel", ""),
    "inner GPT-2 on a language model's files": ("gpt2", "GPT2Model", ""),
}


@pytest.mark.parametrize(("files", "trained", "inner"), OTHER_CLASSES.values(), ids=OTHER_CLASSES)
def test_an_adapter_of_another_class_than_the_checkpoint(
    root: Path, tmp_path: Path, files: str, trained: str, inner: str
) -> None:
    pair, architecture = build(files, root), ARCHITECTURES[files]
    models = []
    for stored in (pair.base_model, pair.aligned_model):
        model = Architecture(trained, architecture.config, architecture.settings).build()
        body = model.get_submodule(inner) if inner else model
        prefix = stored.base_model_prefix if hasattr(stored, stored.base_model_prefix) else ""
        source = stored.get_submodule(prefix) if prefix else stored
        missing = body.load_state_dict(source.state_dict(), strict=False).missing_keys
        assert all("pooler" in key for key in missing)
        models.append(model)
    config = lora(target_modules=["query", "dense"] if "bert" in files else "all-linear")
    if "bert" in files:
        config.exclude_modules = r".*pooler.*"
    adapter = oracle.save(models[1], config, tmp_path / "adapter")
    trained_pair = Built(pair.base, pair.aligned, *models)
    manifest = patched(trained_pair, adapter, tmp_path / "out")
    assert manifest["summary"]["projected"] > 0


# Replicated layers.


@pytest.mark.parametrize("ranges", [[[0, 1], [0, 1]], [[0, 2], [1, 2], [0, 1]]], ids=str)
def test_replicated_layers(llama: Built, tmp_path: Path, ranges: list[list[int]]) -> None:
    layers = [layer for start, stop in ranges for layer in range(start, stop)]

    def replicate(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.model.layers = nn.ModuleList(
            copy.deepcopy(model.model.layers[layer]) for layer in layers
        )
        return model

    config = lora(target_modules="all-linear", layer_replication=ranges)
    models = (replicate(llama.base_model), replicate(llama.aligned_model))
    runtime = Built(llama.base, llama.aligned, *models)
    manifest = run(runtime, config, tmp_path, host=llama.aligned_model)
    assert len(manifest["modules"]) == 7 * len(layers)


# Convolutions and attention, in models that no library knows.


class Convolutions(nn.Module):
    """Kernels of one, two and three dimensions, of unequal sizes."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (2, 3))
        self.point = nn.Conv2d(4, 6, 1)
        self.three = nn.Conv3d(4, 6, (1, 2, 3), groups=groups)
        self.linear = nn.Linear(5, 7)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(5, 7)


def own_pair(path: Path, base: nn.Module) -> Built:
    """Write a model that has no config.json."""
    aligned = moved(base, size=0.1)
    for side, model in (("base", base), ("aligned", aligned)):
        (path / side).mkdir(parents=True)
        save_file(model.state_dict(), path / side / "model.safetensors")
    return Built(path / "base", path / "aligned", base, aligned)


CONVOLUTIONS = ["one", "two", "point", "three", "linear"]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_convolutions(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    pair = own_pair(tmp_path, Convolutions())
    manifest = run(pair, lora(target_modules=CONVOLUTIONS, **settings), tmp_path)
    shapes = {module["name"]: module["shape"] for module in manifest["modules"]}
    assert shapes == {
        "one": [6, 12],
        "two": [6, 24],
        "point": [6, 4],
        "three": [6, 24],
        "linear": [7, 5],
    }


def test_adalora_of_a_convolution(tmp_path: Path) -> None:
    from peft import AdaLoraConfig

    torch.manual_seed(0)
    pair = own_pair(tmp_path, Convolutions())
    config = AdaLoraConfig(init_r=3, total_step=10, target_modules=["two", "point", "linear"])
    run(pair, config, tmp_path)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = own_pair(tmp_path, Convolutions(groups=2))
    config = lora(r=4, target_modules=CONVOLUTIONS)
    adapter = oracle.save(pair.aligned_model, config, tmp_path / "adapter")
    assert_refused(inspect(pair, adapter), "three", "grouped convolution")


def test_the_input_projection_of_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = own_pair(tmp_path, Attention())
    manifest = run(pair, lora(target_modules=["attn", "linear"]), tmp_path)
    shapes = {module["name"]: module["shape"] for module in manifest["modules"]}
    assert shapes == {"attn": [24, 8], "attn.out_proj": [8, 8], "linear": [7, 5]}


# Stacks of experts.


EXPERT_TARGETS: dict[str, list[str]] = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "in another order": ["experts.down_proj", "experts.gate_up_proj"],
    "the first only": ["mlp.experts.gate_up_proj"],
    "the second only": ["mlp.experts.down_proj"],
    "one layer": ["model.layers.1.mlp.experts.down_proj"],
    "router": ["mlp.gate.weight"],
    "linear layer": ["self_attn.o_proj.weight"],
}


@pytest.mark.parametrize("model", ["mixtral", "gpt-oss-square"])
@pytest.mark.parametrize("targets", EXPERT_TARGETS.values(), ids=EXPERT_TARGETS)
def test_target_parameters(root: Path, tmp_path: Path, model: str, targets: list[str]) -> None:
    pair = build(model, root)
    if model.startswith("gpt-oss") and targets == EXPERT_TARGETS["router"]:
        targets = ["mlp.router.weight"]
    config = lora(target_modules=[], target_parameters=targets)
    run(pair, config, tmp_path, in_first=ARCHITECTURES[model].in_first)


@pytest.mark.parametrize("parameter", ["attn.c_attn.weight", "attn.c_proj.weight", "wte.weight"])
def test_parameters_that_are_stored_with_the_input_first(
    root: Path, tmp_path: Path, parameter: str
) -> None:
    run(build("gpt2", root), lora(target_modules=[], target_parameters=[parameter]), tmp_path)


NAMED: dict[str, list[str]] = {
    "mixtral": ["q_proj", "w1", "w2", "w3"],
    "qwen3-moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3-moe-square": ["gate_proj", "up_proj", "down_proj"],
    "deepseek-v3": ["kv_b_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize(("model", "targets"), NAMED.items(), ids=NAMED)
def test_experts_that_are_targeted_as_the_modules_they_once_were(
    root: Path, tmp_path: Path, model: str, targets: list[str]
) -> None:
    manifest = run(build(model, root), lora(target_modules=targets), tmp_path)
    given = read_json(tmp_path / "adapter" / CONFIG)["target_parameters"]
    assert sorted(given) == ["down_proj", "gate_up_proj"]  # as PEFT rewrites them
    assert any(name.endswith("experts.gate_up_proj[2]") for name in names(manifest))


PARTLY: dict[str, tuple[tuple[str, ...], int]] = {
    "three": (("--layers", "3"), 3),
    "one of each layer": (("--all", "--include", r"gate_up_proj\[1\]"), 2),
}


@pytest.mark.parametrize(("options", "count"), PARTLY.values(), ids=PARTLY)
def test_some_of_the_experts(
    root: Path, tmp_path: Path, options: tuple[str, ...], count: int
) -> None:
    pair = build("mixtral", root)
    config = lora(r=2, target_modules=[], target_parameters=EXPERT_TARGETS["both"])

    def excluded(name: str) -> bool:
        return "--include" in options and "gate_up_proj[1]" not in name

    manifest = run(pair, config, tmp_path, *options, excluded=excluded)

    chosen = {module["name"] for module in manifest["modules"] if module["projected"]}
    assert len(chosen) == count
    before, after = (load_file(tmp_path / at / FACTORS) for at in ("adapter", "out"))
    for name in names(manifest):
        parameter, _, index = name.removesuffix("]").partition("[")
        module, _, leaf = parameter.rpartition(".")
        # The wrapper of the parameter that the model registers first is the inner one.
        wrapper = f"{module}.base_layer" if leaf == "gate_up_proj" else module
        key, e = f"{P}{wrapper}.lora_B.weight", int(index)
        experts = pair.aligned_model.config.num_local_experts
        kept = torch.equal(before[key][:, e::experts], after[key][:, e::experts])
        assert kept != (name in chosen)


@pytest.fixture(scope="module")
def gateless(root: Path) -> Built:
    """A Nemotron-H, whose experts have no gate: the shape of one stack is the other's, turned."""
    settings = {
        **GROUPED, "layers_block_type": ["moe", "attention"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "n_routed_experts": 4,
        "moe_intermediate_size": 20, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 24,
    }  # fmt: skip
    base = Architecture("NemotronHForCausalLM", "NemotronHConfig", settings).build()
    return save_pair(root / "gateless", base, moved(base))


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], ["down_proj"]], ids=str)
def test_experts_without_a_gate(gateless: Built, tmp_path: Path, targets: list[str]) -> None:
    parameters = [f"mixer.experts.{name}" for name in targets]
    manifest = run(gateless, lora(target_modules=[], target_parameters=parameters), tmp_path)
    assert len(names(manifest)) == 4 * len(targets)


def test_experts_without_a_gate_of_an_earlier_peft(gateless: Built, tmp_path: Path) -> None:
    """It stored each stack with A and B on the other sides, so the pairs change places."""
    parameters = [f"mixer.experts.{name}" for name in ("up_proj", "down_proj")]
    config = lora(target_modules=[], target_parameters=parameters)
    adapter = oracle.save(gateless.aligned_model, config, tmp_path / "adapter")
    tensors = load_file(adapter / FACTORS)
    layer = f"{P}model.layers.0.mixer.experts"
    changed = dict(tensors)
    for side in "AB":
        inner, outer = (f"{layer}{each}.lora_{side}.weight" for each in (".base_layer", ""))
        changed |= {inner: tensors[outer], outer: tensors[inner]}
    save_file(changed, adapter / FACTORS, metadata={"format": "pt"})
    change_json(adapter / CONFIG, peft_version="0.18.1")
    found = scored(gateless, adapter)
    assert len(found) == 8
    for leaf, wrapper in (("up_proj", ".base_layer"), ("down_proj", "")):
        A, B = (changed[f"{layer}{wrapper}.lora_{side}.weight"] for side in "AB")
        stacks = [
            model.get_parameter(f"model.layers.0.mixer.experts.{leaf}").detach()
            for model in (gateless.aligned_model, gateless.base_model)
        ]
        for e in range(4):
            delta = (B[:, e::4] @ A[3 * e : 3 * e + 3]).T
            wanted = oracle_cosine(delta, oracle_C(*(stack[e] for stack in stacks)))
            name = f"model.layers.0.mixer.experts.{leaf}[{e}]"
            assert found[name] == pytest.approx(wanted, abs=2e-6)


def scored(pair: Built, adapter: Path) -> dict[str, float]:
    result = safeproj(
        "inspect", "--base", pair.base, "--aligned", pair.aligned, "--adapter", adapter,
        "--format", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {m["name"]: m["cosine"] for m in json.loads(result.stdout)["modules"]}


def test_one_expert(tmp_path: Path) -> None:
    settings = {**LOCAL, "num_local_experts": 1, "num_experts_per_tok": 1}
    base = Architecture("MixtralForCausalLM", "MixtralConfig", settings).build()
    pair = save_pair(tmp_path, base, moved(base))
    config = lora(target_modules=[], target_parameters=EXPERT_TARGETS["the second only"])
    adapter = oracle.save(pair.aligned_model, config, tmp_path / "adapter")
    oracle.patch(pair, adapter, tmp_path / "out", "--all")
    before, after = (load_file(tmp_path / at / FACTORS) for at in ("adapter", "out"))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        weights = [
            m.get_parameter(f"{name}.down_proj").detach()[0]
            for m in (pair.aligned_model, pair.base_model)
        ]
        A, B = (f"{P}{name}.lora_{x}.weight" for x in "AB")
        assert tuple(before[B].shape) == (24, 3)
        wanted = oracle_C(*weights) @ before[B].double()
        assert float((after[B].double() - wanted).norm() / wanted.norm()) < 1e-5
        assert torch.equal(before[A], after[A])


# AdaLoRA.


def adalora(**settings: Any) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "lora_alpha": 5, "total_step": 8, **settings}
    )


def test_adalora_before_ranks_are_taken_away(llama: Built, tmp_path: Path) -> None:
    manifest = run(llama, adalora(target_modules=QV), tmp_path)
    assert {module["rank"] for module in manifest["modules"]} == {4}


def test_adalora_after_training(llama: Built, tmp_path: Path) -> None:
    from peft import get_peft_model

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = adalora(target_modules=QV, tinit=1, tfinal=2, deltaT=1, task_type="CAUSAL_LM")
        model: Any = get_peft_model(copy.deepcopy(llama.aligned_model), config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        tokens = torch.randint(3, 41, (2, 9))
        for step in range(8):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(str(tmp_path / "adapter"))
    masks = read_json(tmp_path / "adapter" / CONFIG)["rank_pattern"]
    assert len(masks) == 4
    manifest = patched(llama, tmp_path / "adapter", tmp_path / "out")
    ranks = {module["name"]: module["rank"] for module in manifest["modules"]}
    assert {f"{name}.lora_E": rank for name, rank in ranks.items()} == {
        key: sum(mask) for key, mask in masks.items()
    }
    assert len(set(ranks.values())) > 1


def test_adalora_module_that_lost_all_ranks(llama: Built, tmp_path: Path) -> None:
    masks = {
        "model.layers.0.self_attn.q_proj.lora_E": [False] * 4,
        "model.layers.0.self_attn.v_proj.lora_E": [True, False, True, False],
        "model.layers.1.self_attn.q_proj.lora_E": [True] * 4,
        "model.layers.1.self_attn.v_proj.lora_E": [False, False, False, True],
    }
    config = adalora(target_modules=QV)
    config.rank_pattern = masks
    model = oracle.written(oracle.adapted(llama.aligned_model, config), tmp_path / "adapter")
    manifest = patched(llama, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(SafeprojError, match=r"lora_A is made of other parameters; save the"):
        project(model, SafeLora(llama.base))
    ranks = {module["name"]: module["rank"] for module in manifest["modules"]}
    assert sorted(ranks.values()) == [0, 1, 2, 4]
    assert manifest["summary"]["projected"] == 3


def test_adalora_on_conv1d(root: Path, tmp_path: Path) -> None:
    config = adalora(target_modules=["attn.c_proj", "c_attn"], fan_in_fan_out=True)
    run(build("gpt2", root), config, tmp_path)


# Initialisations that change the base weight.


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "lora_ga", "corda", "salora", "new"])
def test_initialisations_that_change_the_base_weight_are_refused(
    llama: Built, tmp_path: Path, init: str
) -> None:
    adapter = oracle.save(llama.aligned_model, lora(), tmp_path / "adapter")
    change_json(adapter / CONFIG, init_lora_weights=init)
    what = "salora fold" if init == "salora" else "path_initial_model_for_weight_conversion"
    assert_refused(inspect(llama, adapter), f"init_lora_weights is '{init}'", what)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_initialisations_that_leave_the_base_weight_alone(
    llama: Built, tmp_path: Path, init: str | bool
) -> None:
    adapter = oracle.save(llama.aligned_model, lora(), tmp_path / "adapter")
    change_json(adapter / CONFIG, init_lora_weights=init)
    result = inspect(llama, adapter)
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_a_converted_pissa_adapter(llama: Built, tmp_path: Path) -> None:
    """Saved with `path_initial_model_for_weight_conversion`: plain factors of twice the rank."""
    from peft import get_peft_model

    model: Any = get_peft_model(copy.deepcopy(llama.aligned_model), lora(init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(
        str(tmp_path / "adapter"),
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    manifest = patched(llama, tmp_path / "adapter", tmp_path / "out")
    assert {module["rank"] for module in manifest["modules"]} == {6}
    assert not manifest["warnings"]


# What is refused, by name.


def test_kasa_is_refused(llama: Built, tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    adapter = oracle.save(llama.aligned_model, lora(kasa_config=KasaConfig()), tmp_path / "adapter")
    assert_refused(inspect(llama, adapter), "KaSA", "truncated")
    change_json(adapter / CONFIG, kasa_config=None)
    assert_refused(inspect(llama, adapter), "KaSA", "lora_diag")


def test_bd_lora_is_refused(llama: Built, tmp_path: Path) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
    adapter = oracle.save(llama.aligned_model, lora(r=4, use_bdlora=blocks), tmp_path / "adapter")
    assert_refused(inspect(llama, adapter), "BD-LoRA", "block diagonal")
    change_json(adapter / CONFIG, use_bdlora=None)
    assert_refused(inspect(llama, adapter), "expected (r, in) and (out, r)")


def test_qa_lora_is_refused(llama: Built, tmp_path: Path) -> None:
    adapter = oracle.save(llama.aligned_model, lora(), tmp_path / "adapter")
    change_json(adapter / CONFIG, use_qalora=True, qalora_group_size=4)
    assert_refused(inspect(llama, adapter), "QA-LoRA")
    change_json(adapter / CONFIG, use_qalora=False)  # A (r, in / group), which fits no weight
    tensors = load_file(adapter / FACTORS)
    grouped = {k: t[:, ::4].contiguous() if "lora_A" in k else t for k, t in tensors.items()}
    save_file(grouped, adapter / FACTORS, metadata={"format": "pt"})
    assert_refused(inspect(llama, adapter), "q_proj")


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LOHA": ("LoHaConfig", {"target_modules": QV}),
    "LOKR": ("LoKrConfig", {"target_modules": QV}),
    "VERA": ("VeraConfig", {"target_modules": ["q_proj"]}),
    "OFT": ("OFTConfig", {"target_modules": QV, "oft_block_size": 4, "r": 0}),
    "IA3": ("IA3Config", {"target_modules": QV, "feedforward_modules": []}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": [1, 2]}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_are_refused(llama: Built, tmp_path: Path, kind: str) -> None:
    import peft

    name, settings = OTHERS[kind]
    config = getattr(peft, name)(**settings)
    adapter = oracle.save(llama.aligned_model, config, tmp_path / "adapter")
    assert read_json(adapter / CONFIG)["peft_type"] == kind
    assert_refused(inspect(llama, adapter), kind, "supported are LoRA")


def test_every_other_method_of_peft_is_refused(llama: Built, tmp_path: Path) -> None:
    """Not through the command, which takes seconds to start."""
    from peft import PeftType

    import safeproj as package
    from safeproj.errors import SafeprojError

    adapter = oracle.save(llama.aligned_model, lora(), tmp_path / "adapter")
    for kind in PeftType:
        if kind.value in ("LORA", "ADALORA"):
            continue
        change_json(adapter / CONFIG, peft_type=kind.value)
        with pytest.raises(SafeprojError, match=f"'{kind.value}' is not supported"):
            package.inspect(package.SafeLora(str(llama.base), str(llama.aligned)), str(adapter))


def test_names_of_an_unknown_model_are_those_of_its_files(llama: Built, tmp_path: Path) -> None:
    """Without config.json the Llama is found all the same."""
    for side in ("base", "aligned"):
        shutil.copytree(getattr(llama, side), tmp_path / side)
        (tmp_path / side / "config.json").unlink()
    pair = Built(tmp_path / "base", tmp_path / "aligned", llama.base_model, llama.aligned_model)
    targets = ["q_proj", "embed_tokens", "lm_head"]
    run(pair, lora(target_modules=targets), tmp_path)
