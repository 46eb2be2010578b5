"""What the config says, against what PEFT makes of it."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import safeproj as package
from safeproj.adapter import read_adapter
from safeproj.errors import SafeprojError
from safeproj.gate.policy import Policy
from safeproj.records.rules import Level
from safeproj.report import Check, Outcome
from safeproj.storage.modelname import is_same_model
from tests.conftest import Trio
from tests.support import CONFIG, FACTORS, change_json, save_adapter

ANY = Policy(threshold=0.0)
PREFIX = "base_model.model."
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def checked(trio: Trio, adapter: Path, policy: Policy = ANY) -> Check:
    (found,) = package.check(trio.method, [str(adapter)], policy).checks
    return found


def said(check: Check, id_: str) -> str:
    return " | ".join(f.message for f in check.findings if f.id == id_)


def copied(trio: Trio, path: Path, rename: Callable[[str], str] = str, **settings: Any) -> Path:
    shutil.copytree(trio.adapter, path)
    save_file({rename(k): t.clone() for k, t in load_file(path / FACTORS).items()}, path / FACTORS)
    # What has no tensors is zero then, not random.
    change_json(path / CONFIG, **{"init_lora_weights": True, **settings})
    return path


def loaded(trio: Trio, adapter: Path, name: str = "default") -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(trio.aligned_model)
        return PeftModel.from_pretrained(model, str(adapter), adapter_name=name)


def moves(trio: Trio, adapter: Path, name: str = "default") -> bool:
    """Tell whether the adapter, as PEFT loads it, changes what the model computes."""
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before: Tensor = trio.aligned_model(tokens).logits
        after: Tensor = loaded(trio, adapter, name)(tokens).logits
    return not torch.equal(before, after)


# --- names that PEFT has no place for


DEAD: dict[str, tuple[Callable[[str], str], str]] = {
    "compiled": (lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod."), "'_orig_mod'"),
    "compiled inside": (lambda k: k.replace("model.layers", "model._orig_mod.layers"), "_orig_mod"),
    "parallel": (lambda k: k.replace(PREFIX, f"{PREFIX}module."), "'module'"),
    "twice": (lambda k: PREFIX + k, "'base_model.model'"),
    "path twice": (lambda k: k.replace(f"{PREFIX}model", f"{PREFIX}model.model"), "'model'"),
    "adalora": (lambda k: k.removesuffix(".weight"), "AdaLoRA"),
    "base layer": (lambda k: k.replace(".lora_", ".base_layer.lora_"), "'base_layer'"),
}


@pytest.mark.parametrize("form", DEAD)
def test_what_peft_loads_nothing_of_fails_and_is_not_patched(
    trio: Trio, tmp_path: Path, form: str
) -> None:
    rename, why = DEAD[form]
    adapter = copied(trio, tmp_path / "a", rename)
    assert moves(trio, trio.adapter)
    assert not moves(trio, adapter)
    found = checked(trio, adapter)
    assert found.outcome is Outcome.failed
    assert why in said(found, "SP011")
    with pytest.raises(SafeprojError, match="PEFT would load nothing of"):
        package.inspect(trio.method, str(adapter))
    with pytest.raises(SafeprojError, match="PEFT would load nothing of"):
        package.patch(trio.method, str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "model."])
def test_what_stands_in_front_of_every_name_is_named(
    trio: Trio, tmp_path: Path, front: str
) -> None:
    adapter = copied(trio, tmp_path / "a", lambda key: front + key)
    assert not moves(trio, adapter)
    assert checked(trio, adapter).outcome is Outcome.undecided
    with pytest.raises(SafeprojError, match=f"has '{front}' in front of 'base_model.model.'"):
        read_adapter(str(adapter))


def test_names_without_pefts_prefix_are_named(trio: Trio, tmp_path: Path) -> None:
    adapter = copied(trio, tmp_path / "a", lambda key: key.removeprefix(PREFIX))
    assert not moves(trio, adapter)
    with pytest.raises(SafeprojError, match=r"does not begin with 'base_model\.model\.'"):
        read_adapter(str(adapter))


def test_kinds_of_layers_have_their_own_names(trio: Trio, tmp_path: Path) -> None:
    embedded = save_adapter(trio.aligned_model, tmp_path / "e", target_modules=["embed_tokens"])
    change_json(embedded / CONFIG, init_lora_weights=True)
    assert moves(trio, embedded)
    assert not said(checked(trio, embedded), "SP011")
    found = load_file(embedded / FACTORS)
    pairs = {"lora_embedding_A": "lora_A.weight", "lora_embedding_B": "lora_B.weight"}
    for old, new in pairs.items():
        found = {key.replace(old, new): tensor for key, tensor in found.items()}
    save_file({k: t for k, t in found.items() if "lora_" in k}, embedded / FACTORS)
    assert not moves(trio, embedded)
    assert "these are embeddings" in said(checked(trio, embedded), "SP011")

    def renamed(key: str) -> str:
        for old, new in pairs.items():
            key = key.replace(new, old) if Q in key else key
        return key

    linear = copied(trio, tmp_path / "l", renamed)
    assert "these are linear layers" in said(checked(trio, linear), "SP011")


def test_adapter_names_in_keys_are_read_as_peft_reads_them(trio: Trio, tmp_path: Path) -> None:
    adapter = copied(trio, tmp_path / "a", lambda key: key.replace(".weight", ".default.weight"))
    assert moves(trio, adapter)
    assert not moves(trio, adapter, "other")
    plain = package.inspect(trio.method, str(trio.adapter))
    found = package.inspect(trio.method, str(adapter))
    assert found.modules == plain.modules
    assert any("'default'" in warning for warning in found.warnings)
    assert "'default'" in said(checked(trio, adapter), "SP011")
    package.patch(trio.method, str(adapter), tmp_path / "out")
    assert moves(trio, tmp_path / "out")


def test_parts_of_attention_keep_their_base_layer(trio: Trio, tmp_path: Path) -> None:
    """Its projection lies in a base layer where PEFT puts it: that is no dead name."""
    from safeproj.adapter.peft_config import unloaded

    def attention(key: str) -> str:
        key = key.replace(".q_proj.", ".attn.base_layer.out_proj.")
        return key.replace(".v_proj.", ".attn.")

    adapter = read_adapter(str(copied(trio, tmp_path / "a", attention)))
    assert not list(unloaded(adapter, []))


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm", "embed_tokens"]},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
    ids=str,
)
def test_settings_for_whole_weights_want_their_tensors(
    trio: Trio, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = copied(trio, tmp_path / "a", **settings)
    with pytest.raises(KeyError):
        loaded(trio, adapter)
    assert next(iter(settings)) in said(checked(trio, adapter), "SP011")


def test_a_saved_module_that_the_model_does_not_have_wants_none(trio: Trio, tmp_path: Path) -> None:
    """PEFT adds the names of heads to every adapter of a classifier."""
    adapter = copied(trio, tmp_path / "a", modules_to_save=["classifier", "score"])
    assert moves(trio, adapter)
    assert checked(trio, adapter).outcome is Outcome.passed


# --- scalings and ranks


@pytest.mark.parametrize("value", [True, 4.0, "4", None, 0, -4, [4]], ids=repr)
@pytest.mark.parametrize("where", ["r", "rank_pattern"])
def test_ranks_are_whole_numbers(trio: Trio, tmp_path: Path, where: str, value: object) -> None:
    given: dict[str, Any] = {where: value if where == "r" else {"q_proj": value}}
    adapter = copied(trio, tmp_path / "a", **given)
    assert checked(trio, adapter).outcome is Outcome.undecided
    with pytest.raises(SafeprojError, match="whole number of at least 1"):
        read_adapter(str(adapter))


def test_a_rank_that_no_module_has_fails(trio: Trio, tmp_path: Path) -> None:
    adapter = copied(trio, tmp_path / "a", r=8, rank_pattern={"nothing": 4})
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded(trio, adapter)
    assert "another rank" in said(checked(trio, adapter), "SP011")


def test_ranks_by_pattern_pass(trio: Trio, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 8}}
    adapter = save_adapter(trio.aligned_model, tmp_path / "a", **settings)
    assert checked(trio, adapter).outcome is Outcome.passed


def test_the_order_of_patterns_is_lost_on_saving(trio: Trio, tmp_path: Path) -> None:
    patterns = {"q_proj": 8, "layers.0.self_attn.q_proj": 40}
    adapter = copied(trio, tmp_path / "a", alpha_pattern=patterns)
    model = loaded(trio, adapter)
    assert scaling(model, Q) == 2.0
    model.save_pretrained(str(tmp_path / "again"))
    assert scaling(loaded(trio, tmp_path / "again"), Q) == 10.0
    assert "sorts them" in said(checked(trio, adapter), "SP011")
    assert not said(checked(trio, tmp_path / "again"), "SP011")


def scaling(model: Any, module: str) -> float:
    found: float = model.base_model.model.get_submodule(module).scaling["default"]
    return found


@pytest.mark.parametrize("root", [False, True])
def test_alpha_of_the_config_is_bounded_whatever_patterns_say(
    trio: Trio, tmp_path: Path, root: bool
) -> None:
    settings: dict[str, Any] = {"lora_alpha": 200, "alpha_pattern": {".*": 8}, "use_rslora": root}
    adapter = copied(trio, tmp_path / "a", **settings)
    limit = 200 / (2 if root else 4)
    for bound, passes in ((limit, True), (limit - 0.5, False)):
        found = checked(trio, adapter, Policy(threshold=0.0, max_scaling=bound, max_size=1e6))
        assert (not said(found, "SP012")) is passes
    assert scaling(loaded(trio, adapter), Q) == (4.0 if root else 2.0)


def test_a_rank_beside_patterns_is_bounded(trio: Trio, tmp_path: Path) -> None:
    """Readers that divide by the tensors' rank see another scaling than those that take r."""
    adapter = copied(trio, tmp_path / "a", r=1, lora_alpha=80, rank_pattern={".*": 4})
    found = said(checked(trio, adapter), "SP012")
    assert "know no patterns" in found
    assert "by 80" in found


def test_adalora_is_scaled_by_the_rank_it_began_with(trio: Trio, tmp_path: Path) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=12, total_step=9, target_modules=["q_proj", "v_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(copy.deepcopy(trio.aligned_model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    paths = [name for name, _ in model.base_model.model.named_modules() if name.endswith("_proj")]
    masks = {
        f"{path}.lora_E": [True, False, False, True, False, False]
        for path in paths
        if path.endswith((".q_proj", ".v_proj"))
    }
    model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(str(tmp_path / "a"))
    (s,) = set(adapter.format.scalings(adapter, adapter.modules).values())
    module = loaded(trio, tmp_path / "a").base_model.model.get_submodule(Q)
    A, B, E = (getattr(module, f"lora_{each}")["default"] for each in "ABE")
    assert torch.allclose(module.get_delta_weight("default"), s * (B @ (A * E)), rtol=1e-5)
    assert {each.rank for each in adapter.modules} == {2}

    change_json(tmp_path / "a" / CONFIG, rank_pattern=None)  # PEFT makes layers of rank 6
    with pytest.raises(SafeprojError, match=r"has rank 2, but adapter_config\.json allows 6"):
        read_adapter(str(tmp_path / "a"))
    for mask in ([True] * 5, [1, 0, 0, 1, 0, 0], "110000"):
        change_json(tmp_path / "a" / CONFIG, rank_pattern={f"{Q}.lora_E": mask})
        with pytest.raises(SafeprojError, match="expected 6 of true and false"):
            read_adapter(str(tmp_path / "a"))


@pytest.mark.parametrize("switch", ["use_rslora", "lora_bias", "fan_in_fan_out"])
def test_switches_are_truths(trio: Trio, tmp_path: Path, switch: str) -> None:
    given: dict[str, Any] = {switch: "false"}
    adapter = copied(trio, tmp_path / "a", **given)
    assert f"{switch} is 'false'" in said(checked(trio, adapter), "SP011")


# --- settings beside the update


def test_an_activated_adapter_does_nothing_without_its_trigger(trio: Trio, tmp_path: Path) -> None:
    adapter = copied(trio, tmp_path / "a", alora_invocation_tokens=[30, 31])
    assert not moves(trio, adapter)
    found = checked(trio, adapter)
    assert found.outcome is Outcome.failed
    assert {each.id for each in found.at(Level.fail)} == {"SP043"}
    allowed = Policy(threshold=0.0, allow=Policy().allow | {"conditional-updates"})
    assert checked(trio, adapter, allowed).outcome is Outcome.passed


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "other-base-model": ("SP018", {"base_model_name_or_path": "org/another"}),
    "revision": ("SP018", {"revision": "refs/pr/1"}),
    "imports": ("SP019", {"auto_map": {"AutoModel": "code.Model"}}),
    "quantised": ("SP044", {"quantization_config": {"load_in_4bit": True}}),
    "monteclora": ("SP044", {"monteclora_config": {"num_samples": 2}}),
    "velora": ("SP044", {"velora_config": {"num_groups": 2}}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_noted_and_fail_where_the_policy_says_so(
    trio: Trio, tmp_path: Path, setting: str
) -> None:
    rule, settings = SETTINGS[setting]
    adapter = copied(trio, tmp_path / "a", **settings)
    noted = checked(trio, adapter)
    assert noted.outcome is Outcome.passed
    assert rule in {each.id for each in noted.at(Level.note)}
    strict = checked(trio, adapter, Policy(threshold=0.0, allow=frozenset({"missing-provenance"})))
    assert rule in {each.id for each in strict.at(Level.fail)}


def test_empty_settings_are_none(trio: Trio, tmp_path: Path) -> None:
    names = ("auto_map", "quantization_config", "alora_invocation_tokens", "arrow_config")
    unset: dict[str, Any] = dict.fromkeys(names)
    adapter = copied(trio, tmp_path / "a", revision="main", **unset)
    assert {each.id for each in checked(trio, adapter).findings} == {"SP020"}


@pytest.mark.parametrize(
    ("named", "known", "same"),
    [
        ("org/model", "org/model", True),
        ("evil/model", "org/model", False),
        ("org/model", "/models/model", True),
        ("/home/me/model", "org/model", True),
        ("/home/me/other", "org/model", False),
        ("model", "org/model", False),
        ("org/model-2", "/models/model", False),
    ],
)
def test_ids_are_compared_whole_and_directories_by_name(named: str, known: str, same: bool) -> None:
    assert is_same_model(named, known) is same


def test_a_pinned_id_is_what_the_config_must_name(trio: Trio, tmp_path: Path) -> None:
    commit = "a" * 40
    pinned = Policy(
        threshold=0.0, identities={"aligned": f"org/aligned@{commit}"}, ignore=frozenset({"SP031"})
    )
    for named, revision, findings in (
        ("org/aligned", None, 0),
        ("org/aligned", commit, 0),
        ("evil/aligned", None, 1),
        ("evil/aligned", "b" * 40, 2),
    ):
        adapter = copied(
            trio,
            tmp_path / f"{findings}{revision}"[:8],
            base_model_name_or_path=named,
            revision=revision,
        )
        found = checked(trio, adapter, pinned)
        assert len([each for each in found.findings if each.id == "SP018"]) == findings


def test_a_snapshot_of_the_hub_has_its_id_and_commit(trio: Trio, tmp_path: Path) -> None:
    commit = "c" * 40
    place = tmp_path / "models--org--aligned" / "snapshots" / commit
    shutil.copytree(trio.aligned, place)
    for named, revision, passes in (
        ("org/aligned", commit, True),
        ("evil/aligned", commit, False),
        ("org/aligned", "d" * 40, False),
    ):
        adapter = tmp_path / f"{named[:3]}{revision[0]}"
        copied(trio, adapter, base_model_name_or_path=named, revision=revision)
        method = replace(trio.method, aligned=str(place))
        (found,) = package.check(method, [str(adapter)], ANY).checks
        assert ("SP018" not in {each.id for each in found.findings}) is passes


def test_the_config_of_the_fixture_is_the_one_that_peft_writes(trio: Trio) -> None:
    """So that the tests above change an honest config, which has no finding."""
    config = json.loads((trio.adapter / CONFIG).read_text("utf-8"))
    assert config["peft_type"] == "LORA"
    assert {each.id for each in checked(trio, trio.adapter).findings} == {"SP020"}
