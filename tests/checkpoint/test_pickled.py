"""`pytorch_model.bin`: what it reads is what was saved, and it never runs what a file contains."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from safeproj.checkpoint import Reader, open_checkpoint
from safeproj.checkpoint.interface import TensorInfo
from safeproj.checkpoint.pickled import INDEX, SINGLE
from safeproj.errors import SafeprojError
from tests.checkpoint.reading import BLOCKS, digests, hashed, random, read
from tests.support import read_json, tiny_llama

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def single(folder: Path, content: object) -> str:
    """Write a checkpoint of one `.bin` file and return its SRC."""
    torch.save(content, folder / SINGLE)
    return str(folder)


def sharded(folder: Path, tensors: dict[str, Tensor], size: str = "20KB") -> str:
    """Write `.bin` shards with an index, as the Hub's library does, and return the SRC."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=size, safe_serialization=False)
    assert len(list(folder.glob("*.bin"))) > 1
    return str(folder)


# --- reading


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_it_was_saved(tmp_path: Path, name: str, rows: int) -> None:
    W = random(13, 6, dtype=DTYPES[name])
    checkpoint = open_checkpoint(single(tmp_path, {"other": torch.ones(3), "w": W}))
    weight = checkpoint.weight("w")

    assert checkpoint.describe("w") == TensorInfo(name, (13, 6))
    assert (weight.dtype, weight.shape, weight.label) == (name, (13, 6), "w")
    assert weight.source == str(tmp_path / SINGLE)
    assert torch.equal(read(weight, rows), W)


def test_a_model_in_shards_is_read_as_the_model_has_it(tmp_path: Path) -> None:
    tensors = dict(tiny_llama().state_dict())
    checkpoint = open_checkpoint(sharded(tmp_path, tensors))

    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.describe(name).shape == tuple(tensor.shape)
        found = read(checkpoint.weight(name), 7)
        assert torch.equal(found, tensor if tensor.dim() > 1 else tensor[:, None])


@pytest.mark.parametrize("rows", BLOCKS)
def test_tensors_that_do_not_lie_row_by_row_are_read_right(tmp_path: Path, rows: int) -> None:
    tensors = {
        "turned": random(6, 13).T,
        "every second column": random(13, 12)[:, ::2],
        "one row, repeated": random(1, 6).expand(13, 6),
        "a part": random(20, 6)[4:17],
        "a turned stack": random(5, 4, 3).transpose(1, 2),
        "permuted": random(3, 4, 5).permute(2, 1, 0),
    }
    checkpoint = open_checkpoint(single(tmp_path, tensors))
    for name, tensor in tensors.items():
        found = read(checkpoint.weight(name), rows)
        assert torch.equal(found, tensor.reshape(-1, tensor.shape[-1])), name


def test_tied_tensors_and_parameters_are_ordinary(tmp_path: Path) -> None:
    W = random(8, 6)
    source = single(tmp_path, {"embed": torch.nn.Parameter(W), "head": W, "half": W[:4]})
    checkpoint = open_checkpoint(source)

    assert (tmp_path / SINGLE).stat().st_size < 2 * W.nbytes + 2000
    for name, expected in {"embed": W, "head": W, "half": W[:4]}.items():
        found = read(checkpoint.weight(name), 3)
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_a_tensor_can_be_seen_with_other_columns(tmp_path: Path) -> None:
    W = random(6, 3, 2, 2)
    checkpoint = open_checkpoint(single(tmp_path, {"kernel": W, "turned": W.transpose(0, 1)}))

    assert torch.equal(read(checkpoint.weight("kernel", 12), 4), W.flatten(1))
    turned = W.transpose(0, 1)
    assert torch.equal(read(checkpoint.weight("turned", 24), 2), turned.flatten(1))
    # The same reader may see one tensor in two ways.
    reader = Reader()
    assert torch.equal(read(checkpoint.weight("turned", 24), 2, reader), turned.flatten(1))
    assert torch.equal(read(checkpoint.weight("turned", 2), 2, reader), turned.reshape(-1, 2))


@pytest.mark.parametrize("rows", BLOCKS)
def test_the_digest_is_that_of_the_rows(tmp_path: Path, rows: int) -> None:
    W = random(13, 6)
    checkpoint = open_checkpoint(single(tmp_path, {"w": W, "turned": W.T}))

    for name, tensor in {"w": W, "turned": W.T.contiguous()}.items():
        assert digests(checkpoint.weight(name), rows) == hashed({name: tensor})


def test_only_shards_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    tensors = dict(tiny_llama().state_dict())
    source = sharded(tmp_path, tensors)
    location = read_json(tmp_path / INDEX)["weight_map"]
    wanted = "model.layers.1.self_attn.q_proj.weight"
    for file in set(location.values()) - {location[wanted]}:
        (tmp_path / file).write_bytes(b"not even a file of torch")

    checkpoint = open_checkpoint(source)

    assert torch.equal(read(checkpoint.weight(wanted)), tensors[wanted])


def test_weights_can_be_sent_to_another_process(tmp_path: Path) -> None:
    W = random(500, 400)
    weight = open_checkpoint(single(tmp_path, {"w": W})).weight("w")
    sent = pickle.dumps(weight)

    assert len(sent) < 1000  # a name, not the numbers
    assert torch.equal(read(pickle.loads(sent)), W)


# --- which files count


def test_safetensors_wins_where_a_folder_has_both(tmp_path: Path) -> None:
    single(tmp_path, {"w": torch.zeros(2, 2)})
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")

    assert torch.equal(read(open_checkpoint(str(tmp_path)).weight("w")), torch.ones(2, 2))


def test_one_file_wins_over_an_index(tmp_path: Path) -> None:
    source = sharded(tmp_path, {"w": torch.zeros(100, 100), "v": torch.zeros(100, 100)})
    single(tmp_path, {"w": torch.ones(2, 2)})

    checkpoint = open_checkpoint(source)

    assert set(checkpoint.names) == {"w"}
    assert [path.name for path in checkpoint.documents] == []


def test_src_may_be_the_file_itself_whatever_its_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "step_100.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"state": 1}, tmp_path / "optimizer.bin")

    checkpoint = open_checkpoint(str(tmp_path / "step_100.bin"))

    assert checkpoint.config == {"model_type": "llama"}
    assert torch.equal(read(checkpoint.weight("w")), torch.ones(2, 3))


def test_what_was_read_to_understand_the_tensors_is_listed(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(100, 100), "v": torch.zeros(100, 100)}
    source = sharded(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{}")

    assert open_checkpoint(source).documents == (tmp_path / "config.json", tmp_path / INDEX)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("model-Q4_K_M.gguf", "GGUF is quantised or renamed"),
        ("consolidated.00.pth", "save it as safetensors"),
        ("model.pt", "save it as safetensors"),
        ("flax_model.msgpack", "a Flax checkpoint"),
        ("tf_model.h5", "a TensorFlow checkpoint"),
        ("weights.npz", "save_pretrained"),
    ],
)
def test_other_formats_are_refused_with_advice(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")

    message = refusal(str(tmp_path))

    assert file in message
    assert "model.safetensors" in message
    assert SINGLE in message
    assert advice in message


# --- damage


def refusal(source: str) -> str:
    """Return the one line with which opening a checkpoint and describing its tensors ends."""
    with pytest.raises(SafeprojError) as caught:
        checkpoint = open_checkpoint(source)
        for name in checkpoint.names:
            checkpoint.describe(name)
    message = str(caught.value)
    assert message.isprintable()
    assert "weights_only" not in message  # torch's own text says how to run the code after all
    return message


class Touch:
    """Creates a file while it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    trap = Touch(marker)
    pickle.loads(pickle.dumps(trap)).close()
    assert marker.exists()  # the trap works
    marker.unlink()
    source = single(tmp_path, {"w": torch.ones(2, 2), "trap": trap})

    message = refusal(source)

    assert not marker.exists()
    assert str(tmp_path / SINGLE) in message
    assert "needs code to run, which is refused" in message
    assert "safetensors" in message


def test_a_file_from_before_torch_1_6_is_refused_with_advice(tmp_path: Path) -> None:
    content = {"w": torch.ones(2, 2)}
    torch.save(content, tmp_path / SINGLE, _use_new_zipfile_serialization=False)

    message = refusal(str(tmp_path))

    assert str(tmp_path / SINGLE) in message
    assert "before 1.6" in message
    assert "save it again" in message


CONTENTS: dict[str, tuple[object, str]] = {
    "sparse": ({"w": torch.ones(4, 32).to_sparse()}, "w is no ordinary tensor"),
    "without data": ({"w": torch.ones(4, 32, device="meta")}, "w is no ordinary tensor"),
    "larger than its file": ({"w": torch.ones(1).expand(10**8, 10**6)}, "w is no ordinary tensor"),
    "not a tensor": ({"w": torch.ones(2), "note": "text"}, "names to tensors and nothing else"),
    "nested": ({"state_dict": {"w": torch.ones(2)}}, "names to tensors and nothing else"),
    "a list": ([torch.ones(2)], "names to tensors and nothing else"),
    "numbers for names": ({1: torch.ones(2)}, "names to tensors and nothing else"),
    "not printable": ({"\x1b]0;renamed\x07": torch.ones(2)}, "not printable"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_with_something_else_than_tensors_is_refused(tmp_path: Path, case: str) -> None:
    content, word = CONTENTS[case]

    message = refusal(single(tmp_path, content))

    assert str(tmp_path / SINGLE) in message
    assert word in message


def test_a_dtype_that_cannot_be_read_is_described_by_its_name(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(4, 4, dtype=dtype) for dtype in (torch.int8, torch.complex64)}
    checkpoint = open_checkpoint(single(tmp_path, tensors))

    for name in tensors:
        assert checkpoint.describe(name).dtype == name.removeprefix("torch.")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def become_text(path: Path) -> None:
    path.write_text("PyTorch\n")


def become_a_damaged_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x02e.")  # appends to a list that is not there


def compress(path: Path) -> None:
    """Deflate the zip's members: mapped into memory, their bytes would not be the numbers."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


def shorten_a_storage(path: Path) -> None:
    """Keep the zip valid, but hold fewer numbers than the pickle says."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in sorted(members.items(), key=lambda item: "/data/" in item[0]):
            file.writestr(name, content[:16] if "/data/" in name else content)


@pytest.mark.parametrize(
    "damage",
    [truncate, become_text, become_a_damaged_pickle, compress, shorten_a_storage],
    ids=lambda function: function.__name__,
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    source = single(tmp_path, {"w": torch.zeros(300, 300)})
    damage(tmp_path / SINGLE)

    message = refusal(source)

    assert str(tmp_path / SINGLE) in message
    assert "cannot be loaded as plain tensors" in message


# --- the index, which both encodings have


@pytest.fixture(params=["safetensors", "bin"])
def indexed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in shards, in a folder of its own."""
    tiny = tmp_path / "tiny"
    if request.param == "bin":
        sharded(tiny, dict(tiny_llama().state_dict()))
    else:
        tiny_llama().save_pretrained(tiny, max_shard_size="20KB")
    return tiny


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def locate(folder: Path, file: str) -> Path:
    """Let the index say that a file holds the weight, and return the one that does."""
    index = next(folder.glob("*.index.json"))
    content = read_json(index)
    shard = folder / str(content["weight_map"][WEIGHT])
    content["weight_map"][WEIGHT] = file
    index.write_text(json.dumps(content), "utf-8")
    return shard


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_points_outside_of_the_folder_is_refused(
    indexed: Path, absolute: bool
) -> None:
    outside = indexed.parent / "outside"
    shutil.copy(locate(indexed, str(outside) if absolute else "../outside"), outside)
    checkpoint = open_checkpoint(str(indexed))

    for look in (checkpoint.describe, checkpoint.weight):
        with pytest.raises(SafeprojError) as caught:
            look(WEIGHT)
        for word in (str(indexed), "outside", WEIGHT, "no such file"):
            assert word in str(caught.value)


def test_an_index_that_names_the_wrong_file_is_refused(indexed: Path) -> None:
    content = read_json(next(indexed.glob("*.index.json")))["weight_map"]
    other = next(file for file in content.values() if file != content[WEIGHT])
    locate(indexed, other)

    with pytest.raises(SafeprojError, match=f"says that {other} holds {WEIGHT}, but it does not"):
        open_checkpoint(str(indexed)).describe(WEIGHT)


def test_a_missing_shard_is_refused(indexed: Path) -> None:
    shard = locate(indexed, "")
    locate(indexed, shard.name)
    shard.unlink()

    with pytest.raises(SafeprojError, match=f"{shard.name} holds {WEIGHT}, but the folder has no"):
        open_checkpoint(str(indexed)).describe(WEIGHT)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("weight_map:\n  - none\n", "is not JSON"),
        ("[]", "expected a JSON object"),
        ('{"metadata": {}}', "weight_map"),
        (json.dumps({"weight_map": {WEIGHT: 3}}), "maps tensor names to file names"),
        (json.dumps({"weight_map": {"\x1b[2J": "x.bin"}}), "not printable"),
    ],
)
def test_an_unusable_index_is_refused(indexed: Path, content: str, word: str) -> None:
    next(indexed.glob("*.index.json")).write_text(content, "utf-8")

    message = refusal(str(indexed))

    assert str(indexed) in message
    assert word in message


def test_the_two_encodings_say_the_same(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "safetensors")
    (tmp_path / "bin").mkdir()
    pickled = open_checkpoint(single(tmp_path / "bin", model.state_dict()))
    reference = open_checkpoint(str(tmp_path / "safetensors"))

    assert set(pickled.names) == set(reference.names)
    for name in reference.names:
        assert pickled.describe(name) == reference.describe(name)
        assert digests(pickled.weight(name)) == digests(reference.weight(name))
