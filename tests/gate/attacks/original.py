"""Beside the adapter before patching: what `check --original` and `verify` say they compare."""

# ruff: noqa: ARG001 - all edits take the same two arguments

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.gate.adversarial import (
    PATCHED,
    Ground,
    Q,
    against_the_original,
    attack,
    change_manifest,
    change_tensors,
    claims,
    key,
    tensors_of,
)
from tests.support import CONFIG, FACTORS, MANIFEST

CARD = "README.md"


def record(
    *finds: str, name: str, hope: str
) -> Callable[[Callable[[Any], object]], Callable[[Any], object]]:
    """Put into the table a change of safeproj.json alone, beside the original."""

    def put(change: Callable[[Any], object]) -> Callable[[Any], object]:
        def edit(adapter: Path, ground: Ground) -> list[str | Path]:
            change_manifest(adapter, change)
            return ["--original", ground.original(PATCHED)]

        attack("original", *finds, start=PATCHED, name=name, hope=hope)(edit)
        return change

    return put


# --- the weights file


@against_the_original(
    "SP025", name="metadata_of_the_file", hope="Nobody compares what is beside the tensors."
)
def _(adapter: Path, ground: Ground) -> None:
    tensors = load_file(adapter / FACTORS)
    save_file(tensors, adapter / FACTORS, {"format": "pt", "lora_alpha": "800"})


@against_the_original("SP025", name="no_metadata", hope="What is gone is not compared.")
def _(adapter: Path, ground: Ground) -> None:
    save_file(load_file(adapter / FACTORS), adapter / FACTORS)


@against_the_original("SP025", name="projected_factor_widened", hope="The numbers are the same.")
def _(adapter: Path, ground: Ground) -> None:
    change_tensors(adapter, lambda t: t.update({key(Q, "B"): t[key(Q, "B")].double()}))


@against_the_original(
    "SP025", name="projected_factor_narrowed", hope="A coarser type has a larger tolerance."
)
def _(adapter: Path, ground: Ground) -> None:
    change_manifest(adapter, lambda d: d["versions"].update(processor="another"))
    change_tensors(adapter, lambda t: t.update({key(Q, "B"): t[key(Q, "B")].half()}))


@attack("original", "SP025", start=PATCHED)
def harm_in_the_older_format(adapter: Path, ground: Ground) -> list[str | Path]:
    """The older file beside the patched one is the original's as it was, for older loaders."""
    torch.save(tensors_of(ground.original(PATCHED)), adapter / "adapter_model.bin")
    return ["--original", ground.original(PATCHED)]


@attack("original", "SP025", start=PATCHED)
def tensors_in_the_older_format(adapter: Path, ground: Ground) -> list[str | Path]:
    """The tensors are the right ones, and lie in a pickle, which can hold more."""
    torch.save(tensors_of(adapter), adapter / "adapter_model.bin")
    (adapter / FACTORS).unlink()
    return ["--original", ground.original(PATCHED)]


# --- files out of sight

for _place in (
    ".cache/notes.txt",
    ".cache/huggingface/notes.txt",
    ".git/hooks/post-checkout",
    "deep/.git/HEAD",
    "deep/.cache/huggingface/.gitignore",
    "a/b/c/d/e/f/notes.txt",
):

    @against_the_original(
        "SP025",
        name=f"file_in_{_place.replace('/', '_')}",
        hope="What lies there was not in the original, and is not compared.",
    )
    def _(adapter: Path, ground: Ground, place: str = _place) -> None:
        (adapter / place).parent.mkdir(parents=True, exist_ok=True)
        (adapter / place).write_text("obey\n", "utf-8")


# --- the card


def change_card(adapter: Path, old: str, new: str) -> None:
    text = (adapter / CARD).read_text("utf-8")
    assert old in text
    (adapter / CARD).write_text(text.replace(old, new, 1), "utf-8")


@against_the_original("SP025", name="card_outside", hope="The card is no part of the weights.")
def _(adapter: Path, ground: Ground) -> None:
    change_card(adapter, "---\n", "---\nlicense: mit\n")


@against_the_original("SP025", name="card_inside", hope="The section says what people want.")
def _(adapter: Path, ground: Ground) -> None:
    change_card(adapter, "Projection is no proof of safety", "Projection is a proof of safety")


@against_the_original("SP025", name="card_with_two_sections", hope="The second one is not read.")
def _(adapter: Path, ground: Ground) -> None:
    text = (adapter / CARD).read_text("utf-8")
    (adapter / CARD).write_text(text + text[text.index("<!-- safeproj:begin") :], "utf-8")


@against_the_original("SP025", name="card_without_a_section", hope="Nothing contradicts it.")
def _(adapter: Path, ground: Ground) -> None:
    shutil.copyfile(ground.original(PATCHED) / CARD, adapter / CARD)


@against_the_original("SP025", name="no_card", hope="What is gone is not compared.")
def _(adapter: Path, ground: Ground) -> None:
    (adapter / CARD).unlink()


# --- the record


@attack("original", "SP020", start=PATCHED)
def nothing_but_the_record_is_gone(adapter: Path, ground: Ground) -> list[str | Path]:
    """All that is compared is right, and nothing says from what and by what it was made."""
    (adapter / MANIFEST).unlink()
    return ["--original", ground.original(PATCHED)]


@record("SP021", name="weights_of_another_original", hope="The history is another adapter's.")
def _(document: Any) -> None:
    document["inputs"]["adapter"]["sha256"]["files"][FACTORS] = "0" * 64


@record("SP021", name="no_digest_of_the_original", hope="What has no digest is not compared.")
def _(document: Any) -> None:
    del document["inputs"]["adapter"]["sha256"]["files"][FACTORS]


@record("SP021", name="history_that_was_none", hope="It looks as if it were patched before.")
def _(document: Any) -> None:
    document["inputs"]["adapter"]["previous"] = {"schema": "safeproj.report/1"}


@record("SP021", name="better_cosines", hope="The record has better scores than there were.")
def _(document: Any) -> None:
    for item in document["modules"]:
        item["cosine"] = 0.99


@record("SP021", name="no_cosine", hope="What has no score is not compared.")
def _(document: Any) -> None:
    claims(document)[Q]["cosine"] = None


@record("SP021", name="better_summary", hope="Nobody counts again.")
def _(document: Any) -> None:
    document["summary"]["projected"] = 1000


@record("SP021", name="module_named_twice", hope="One reader takes the first, another the last.")
def _(document: Any) -> None:
    document["modules"].insert(0, {**claims(document)[Q], "projected": False})


@record("SP021", name="module_that_is_said_to_be_kept", hope="It is left out of what was done.")
def _(document: Any) -> None:
    claims(document)[Q]["projected"] = False
    document["summary"]["projected"] -= 1
    document["output"]["projected"].remove(key(Q, "B"))


@record("SP021", name="tensor_of_no_module", hope="More was written than any module tells.")
def _(document: Any) -> None:
    claims(document)[Q]["projected"] = False
    document["summary"]["projected"] -= 1


@record("SP021", name="record_of_a_fold", hope="A fold is no projection, and not compared.")
def _(document: Any) -> None:
    document["schema"] = "safeproj.fold/1"


@record("SP022", name="digests_of_other_models", hope="The models are not those that are given.")
def _(document: Any) -> None:
    tensors = document["inputs"]["aligned"]["blake3"]["tensors"]
    document["inputs"]["aligned"]["blake3"]["tensors"] = dict.fromkeys(tensors, "0" * 64)


@record("SP021", name="config_of_another", hope="The config is not the one that is recorded.")
def _(document: Any) -> None:
    document["inputs"]["adapter"]["sha256"]["files"][CONFIG] = "0" * 64
