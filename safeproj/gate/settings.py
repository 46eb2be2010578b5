"""What the adapter's config says beside the update: models, code, and what switches it on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safeproj.gate.weights import Context, found
from safeproj.records.checks import Finding
from safeproj.storage.modelname import cached_id, is_same_model

MODEL_LIBRARIES = ("transformers", "diffusers", "peft")
"""Packages of which PEFT records the class that an adapter was trained on."""

CONDITIONAL = {
    "alora_invocation_tokens": "the update acts only behind this sequence of tokens",
    "invocation_string": "converters make the tokens of it behind which alone the update acts",
    "arrow_config": "a router chooses among several adapters, token by token",
}
"""Settings under which something else decides whether the update acts."""

UNJUDGED = {
    "quantization_config": "loaders may quantise the model, which was checked as it is stored",
    "monteclora_config": "the training added noise to the factors and changed their scale",
    "velora_config": "the training took the gradients from compressed inputs",
    "runtime_config": "PEFT ignores it in files; it is meant for a running model",
}
"""Settings that loaders or training heed and no score covers."""

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def about_settings(context: Context) -> Iterator[Finding]:
    """Yield what the config says of the model and the code that the adapter is loaded with."""
    config, policy = context.run.adapter.config, context.policy
    for text in _other_model(config, context):
        yield found("SP018", text, policy=policy)
    for text in _imports(config):
        yield found("SP019", text, policy=policy)
    for rule, settings in (("SP043", CONDITIONAL), ("SP044", UNJUDGED)):
        for name, what in settings.items():
            if config.get(name):
                yield found(rule, f"{name} is {_shown(config[name])}: {what}", policy=policy)


def _other_model(config: Mapping[str, Any], context: Context) -> Iterator[str]:
    """Yield what the config says of the base model that does not hold for the aligned one."""
    if "aligned" not in context.run.report.inputs:  # a method that knows no such model
        return
    aligned, known, revision = _aligned(context)
    named = config.get("base_model_name_or_path")
    if named and not (isinstance(named, str) and is_same_model(named, known)):
        yield (
            f"the config names {_shown(named)} as the base model; checked against {_shown(aligned)}"
        )
    wanted = config.get("revision")
    if wanted and wanted not in ("main", revision):
        against = "one without" if revision is None else _shown(revision)
        yield f"the config wants revision {_shown(wanted)} of the model; checked against {against}"


def _aligned(context: Context) -> tuple[str, str, str | None]:
    """Return the SRC of the aligned model, its path or whole Hub id, and its revision if known."""
    given = context.run.report.inputs["aligned"]
    source, _, asked = str(given["source"]).partition("@")
    revision = given.get("revision")
    pinned = context.policy.identities.get("aligned", "")
    cached = cached_id(source)
    if revision is not None:  # from the Hub
        return source, source, str(asked or revision)
    if not pinned.startswith("sha256:") and pinned:
        known, _, revision = pinned.partition("@")
        return source, known, revision
    if cached is not None:
        commit = Path(source).name
        return source, cached, commit if _COMMIT.fullmatch(commit) else None
    return source, str(Path(source).absolute()), None


def _imports(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what code loaders may import because the config names it."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and str(library).partition(".")[0] not in MODEL_LIBRARIES:
        yield f"auto_mapping names the module {_shown(library)}"
    core = config.get("megatron_core")  # PEFT writes its default into every config
    if core and config.get("megatron_config"):
        yield f"megatron_core names the module {_shown(core)}"
    if config.get("auto_map"):
        yield f"auto_map names code that comes with a model: {_shown(config['auto_map'])}"


def _shown(value: object) -> str:
    """Return a value of the config in few characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
