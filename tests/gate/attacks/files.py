"""What lies beside an adapter, under whatever name: models, code, second configs, odd modes."""

# ruff: noqa: ARG001 - all edits take the same two arguments

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import py_compile
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from tests.gate.adversarial import PATCHED, PLAIN, Ground, attack, tensors_of
from tests.support import CONFIG, FACTORS, MANIFEST, read_json

# --- weights under any name


def harmful(ground: Ground) -> bytes:
    """Return the content of a harmful adapter's weights file."""
    return (ground.bad / FACTORS).read_bytes()


def raw(ground: Ground) -> bytes:
    """Return numbers without a header, as memory has them."""
    return b"".join(t.numpy().tobytes() for t in tensors_of(ground.bad).values())


def pickled(ground: Ground) -> bytes:
    return pickle.dumps({n: t.tolist() for n, t in tensors_of(ground.bad).items()}, 4)


def torch_zip(ground: Ground) -> bytes:
    found = io.BytesIO()
    torch.save(tensors_of(ground.bad), found)
    return found.getvalue()


def tarred(ground: Ground) -> bytes:
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w") as file:
        entry = tarfile.TarInfo("model.safetensors")
        entry.size = len(harmful(ground))
        file.addfile(entry, io.BytesIO(harmful(ground)))
    return found.getvalue()


def zipped_behind(start: bytes) -> Callable[[Ground], bytes]:
    def make(ground: Ground) -> bytes:
        found = io.BytesIO()
        with zipfile.ZipFile(found, "w") as file:
            file.writestr("model.safetensors", harmful(ground))
        return start + found.getvalue()

    return make


def starting(start: bytes) -> Callable[[Ground], bytes]:
    """Return what makes a file of some format from its first bytes and numbers."""
    return lambda ground: start + raw(ground)


GGUF = starting(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
HDF5 = b"\x89HDF\r\n\x1a\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

HIDDEN: dict[str, Callable[[Ground], bytes]] = {
    "notes.md": harmful,
    "LICENSE": harmful,
    ".gitattributes": harmful,
    "model.sft": harmful,
    "model.safetensors.bak": harmful,
    "training_args.bin": harmful,
    "trainer_state.json": harmful,
    "ggml-adapter-model": GGUF,
    "tokenizer.model": GGUF,
    "chat_template.jinja": GGUF,
    "model.ggml": starting(b"tjgg\x03\0\0\0"),
    "weights.dat": raw,
    "model.onnx_data": raw,
    "variables/variables.data-00000-of-00001": raw,
    "events.out.tfevents.1": raw,
    "model.pdparams": pickled,
    "model.joblib": pickled,
    "protocol-0.txt": lambda ground: pickle.dumps(raw(ground)[:4000].hex(), 0),
    "model.pt2": torch_zip,
    "__0_0.distcp": torch_zip,
    "model.keras": zipped_behind(b""),
    "card.md": zipped_behind(b"# A model card\n"),
    "logo.png": zipped_behind(PNG + bytes(200)),
    "model.nemo": tarred,
    "model.safetensors.gz": lambda ground: gzip.compress(harmful(ground)),
    "model.bz2": lambda ground: bz2.compress(harmful(ground)),
    "model.xz": lambda ground: lzma.compress(harmful(ground)),
    "model.z": lambda ground: zlib.compress(harmful(ground)),
    "model.zst": starting(b"\x28\xb5\x2f\xfd"),
    "model.lz4": starting(b"\x04\x22\x4d\x18"),
    "model.7z": starting(b"7z\xbc\xaf\x27\x1c\0\4"),
    "model.hdf5": starting(HDF5),
    "figure.png": starting((PNG + bytes(1024))[:1024] + HDF5),
    "model.tflite": starting(b"\x1c\0\0\0TFL3"),
    "saved_model.pb": starting(b"\x08\x01\x12\x06"),
    "flax_model": starting(b"\x81\xa6params\x81\xa6kernel\xc7"),
    "weights.db": starting(b"SQLite format 3\0"),
    "weights.parquet": starting(b"PAR1"),
    "text-first.rst": lambda ground: b"A long text. " * 20_000 + raw(ground),
    ".git/config": GGUF,
    ".git/objects/ab/" + "0" * 38: harmful,
    ".cache/huggingface/download/model.metadata": harmful,
    "deep/.git/model": harmful,
}

for _place, _make in HIDDEN.items():

    @attack(
        "hidden",
        "SP014",
        name=f"weights_in_{_place.replace('/', '_')}",
        hope="A list of endings does not have this one, and what it names loads it.",
        says="weights",
    )
    def _(
        adapter: Path, ground: Ground, place: str = _place, make: Callable[..., bytes] = _make
    ) -> None:
        (adapter / place).parent.mkdir(parents=True, exist_ok=True)
        (adapter / place).write_bytes(make(ground))


@attack("hidden", "SP014", says="lfs")
def weights_among_the_objects_of_lfs(adapter: Path, ground: Ground) -> None:
    """LFS keeps files under their digests, so that any digest looks like its own."""
    content = harmful(ground)
    digest = hashlib.sha256(content).hexdigest()
    place = adapter / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4]
    place.mkdir(parents=True)
    (place / digest).write_bytes(content)


@attack("hidden", "SP014", says="optimizer.pt")
def a_model_as_the_state_of_an_optimizer(adapter: Path, ground: Ground) -> None:
    """What trainers keep is passed over, whatever its size."""
    torch.save({"model": torch.randn(1024, 1024)}, adapter / "optimizer.pt")


@attack("hidden", "SP050", says="training_args.bin")
def code_in_what_a_trainer_kept(adapter: Path, ground: Ground) -> None:
    """Whoever looks how an adapter was trained loads it, and runs what is in it."""
    (adapter / "training_args.bin").write_bytes(pickle.dumps(print))


@attack("hidden", "SP014")
def pointer_to_weights(adapter: Path, ground: Ground) -> None:
    """The file is a few lines of text, in whose place LFS puts the weights later."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99999\n"
    (adapter / "model.safetensors").write_text(text, "utf-8")


# --- another model, which is loaded as the base


@attack("base", "SP014", apart=True)
def a_model_of_its_own(adapter: Path, ground: Ground) -> None:
    """transformers takes the model beside an adapter for its base, not the one that is named."""
    for path in ground.starts[PLAIN].base.iterdir():
        if path.is_file() and path.name not in (CONFIG, FACTORS):
            shutil.copyfile(path, adapter / path.name)


@attack("base", "SP014", says="index")
def a_model_in_shards_of_any_name(adapter: Path, ground: Ground) -> None:
    """The index says how the shards are called, and none of their names looks like weights."""
    shutil.copyfile(ground.starts[PLAIN].base / "config.json", adapter / "config.json")
    names = list(ground.base_weights)
    parts = {"part-a": names[::2], "part-b": names[1::2]}
    for part, own in parts.items():
        (adapter / part).write_bytes(save({n: ground.base_weights[n].clone() for n in own}))
    index = {"metadata": {}, "weight_map": {n: p for p, own in parts.items() for n in own}}
    (adapter / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


@attack("base", "SP014", says="index")
def an_index_of_shards_elsewhere(adapter: Path, ground: Ground) -> None:
    """The shards lie outside the directory, where nobody looks; the index leads to them."""
    index = {"weight_map": dict.fromkeys(ground.base_weights, "../elsewhere")}
    (adapter / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")


@attack("base", "SP014")
def a_checkpoint_in_a_directory(adapter: Path, ground: Ground) -> None:
    """The model lies in a directory that a loader is told by `subfolder`."""
    shutil.copytree(ground.starts[PLAIN].base, adapter / "merged")


# --- code


@attack("code", "SP039", says="auto_map")
def config_that_brings_its_model(adapter: Path, ground: Ground) -> None:
    """A config of the model says which code of which repository makes it."""
    config = read_json(ground.starts[PLAIN].base / "config.json")
    mapping = {"AutoModelForCausalLM": "org/else--modeling.Model"}
    (adapter / "config.json").write_text(json.dumps({**config, "auto_map": mapping}), "utf-8")


@attack("code", "SP039", says="tokenizer_config")
def tokenizer_that_brings_its_class(adapter: Path, ground: Ground) -> None:
    """The tokenizer of the adapter is loaded before the model, and says which code makes it."""
    mapping = {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(mapping), "utf-8")


@attack("code", "SP039", says="processor_config")
def processor_that_brings_a_part(adapter: Path, ground: Ground) -> None:
    """The setting lies deep inside of a config."""
    inside = {"image_processor": [{"auto_map": {"AutoImageProcessor": "image.Processor"}}]}
    (adapter / "processor_config.json").write_text(json.dumps(inside), "utf-8")


@attack("code", "SP039", says="auto_map")
def setting_that_comes_twice(adapter: Path, ground: Ground) -> None:
    """One reader takes the first of two equal keys, another the last, which is empty."""
    text = '{"auto_map": {"AutoConfig": "configuration.Config"}, "auto_map": null}'
    (adapter / "config.json").write_text(text, "utf-8")


@attack("code", "SP039", says="auto_map")
def config_with_a_byte_order_mark(adapter: Path, ground: Ground) -> None:
    """A mark before the text hides that it is JSON."""
    text = '{"auto_map": {"AutoConfig": "configuration.Config"}}'
    (adapter / "config.json").write_text(text, "utf-8-sig")


@attack("code", "SP039", says="attn_implementation")
def attention_out_of_a_repository(adapter: Path, ground: Ground) -> None:
    """A config has attention computed by compiled code of somebody's repository."""
    settings = {"model_type": "llama", "attn_implementation": "org/attention@main:forward"}
    (adapter / "config.json").write_text(json.dumps(settings), "utf-8")


@attack("code", "SP039", says="compiled Python")
def compiled_python(adapter: Path, ground: Ground) -> None:
    """Python imports a compiled file in place of its source, which nobody can read."""
    source = adapter.parent / "handler.py"
    source.write_text("print('owned')\n", "utf-8")
    place = adapter / "__pycache__"
    place.mkdir()
    py_compile.compile(str(source), str(place / f"{sys.implementation.cache_tag}.pyc"))
    source.unlink()


@attack("code", "SP039", says="a program")
def library_in_a_text(adapter: Path, ground: Ground) -> None:
    """A library for machines has the name of a text for people."""
    shutil.copyfile(Path(sys.executable).resolve(), adapter / "CHANGES.txt")
    with (adapter / "CHANGES.txt").open("rb+") as file:
        file.truncate(100_000)


# --- names that some system takes for others

for _name, _place, _rule in (
    ("with_a_dot_behind", "adapter_config.json.", "SP016"),
    ("with_a_space_behind", "adapter_config.json ", "SP016"),
    ("in_wide_letters", "\uff41dapter_config.json", "SP016"),
    ("with_a_cyrillic_letter", "adapter_c\u043enfig.json", "SP016"),
    ("with_a_joiner", "adapter_\u200dconfig.json", "SP015"),
    ("in_its_short_form", "ADAPTE~1.JSO", "SP016"),
    ("as_a_stream", "adapter_config.json:$DATA", "SP015"),
    ("read_from_the_right", "adapter_config\u202enosj.txt", "SP015"),
):

    @attack(
        "folded",
        _rule,
        name=f"config_{_name}",
        hope="Some file system, or a reader's eye, takes a second config for the one we read.",
    )
    def _(adapter: Path, ground: Ground, place: str = _place) -> None:
        config = {**read_json(adapter / CONFIG), "lora_alpha": 1e9}
        (adapter / place).write_text(json.dumps(config), "utf-8")


@attack("folded", "SP016")
def record_in_another_case(adapter: Path, ground: Ground) -> None:
    """There is no record here, and there is one where names have no case."""
    shutil.copyfile(ground.starts[PATCHED].adapter / MANIFEST, adapter / "Safeproj.JSON")


@attack("folded", "SP016")
def directories_that_become_one(adapter: Path, ground: Ground) -> None:
    """Two directories become one where names have no case, with files of either."""
    for place in ("Images", "images"):
        (adapter / place).mkdir()
        (adapter / place / f"{place}.md").write_text("", "utf-8")


@attack("folded", "SP015")
def name_of_a_device(adapter: Path, ground: Ground) -> None:
    """Who copies the directory to Windows opens a device."""
    (adapter / "aux.md").write_text("", "utf-8")


# --- what the system keeps beside the content


@attack("modes", "SP040", says="hard links")
def weights_with_a_second_name(adapter: Path, ground: Ground) -> None:
    """The weights are changed through another name after the check; no link is to be seen."""
    outside = adapter.parent / "outside"
    shutil.copyfile(adapter / FACTORS, outside)
    (adapter / FACTORS).unlink()
    os.link(outside, adapter / FACTORS)


@attack("modes", "SP040", says="setuid")
def script_with_the_rights_of_its_owner(adapter: Path, ground: Ground) -> None:
    """Whoever unpacks the directory as root has a program that runs as root."""
    (adapter / "notes.txt").write_text("#!/bin/sh\n", "utf-8")
    (adapter / "notes.txt").chmod(0o4755)


# --- the card


@attack("card", "SP021", says="README.md")
def card_that_says_it_was_patched(adapter: Path, ground: Ground) -> None:
    """The card has the section that patching writes, and nothing was patched."""
    shutil.copyfile(ground.starts[PATCHED].adapter / "README.md", adapter / "README.md")


@attack("card", "SP021", says="README.md")
def card_that_says_so_without_markers(adapter: Path, ground: Ground) -> None:
    """The section is there for people, without the comments that tools look for."""
    text = (ground.starts[PATCHED].adapter / "README.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if "safeproj:" not in line]
    (adapter / "README.md").write_text("\n".join(lines), "utf-8")
