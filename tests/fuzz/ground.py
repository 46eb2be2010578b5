"""Valid inputs of every kind that the command reads: what the campaign mutates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.adapter.test_gguf import converted, write_gguf
from tests.adapter.test_mlx import as_mlx
from tests.fuzz import mutate, readers
from tests.support import (
    CONFIG,
    FACTORS,
    MANIFEST,
    moved,
    save_adapter,
    save_safety_module,
    tiny_llama,
)

WORDS = 40
"""Size of the tiny model's vocabulary."""

POLICY = """\
threshold = 0.2
max-below = "10%"
coverage = 1.0
max-scaling = 64
evidence = "recorded"
format-of-nothing = 1
"""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: what it is.
        source: the file or directory that a case has a copy of.
        file: the one in it that is mutated; empty if the source is a file.
        mutators: what mutates it.
        commands: arguments of the command, where `{}` is the copy and `{out}` a new path.
        reader: an independent reader that must agree where the command ends with 0.
        weight: how often it is taken, relative to others.
    """

    name: str
    source: Path
    file: str
    mutators: Sequence[mutate.Mutator]
    commands: Sequence[Sequence[str]]
    reader: readers.Reader | None = None
    weight: int = 10


def tokenizer(folder: Path) -> None:
    """Write a tokenizer of words beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))]
    found = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def rows(path: Path, *names: str) -> Path:
    """Write JSON lines of prompts and responses."""
    lines = (
        {name: " ".join(f"w{3 + (i * 7 + j * len(name)) % 30}" for j in range(3)) for name in names}
        for i in range(4)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def build(root: Path, run: Callable[[Sequence[str]], int]) -> tuple[Kind, ...]:
    """Write the valid inputs below a directory and return their kinds.

    Args:
        root: an empty directory.
        run: runs the command and returns its exit code.
    """
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": WORDS}
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=1, **size)
    other = moved(model)
    base, aligned = root / "base", root / "aligned"
    model.save_pretrained(base, max_shard_size="8KB")
    other.save_pretrained(aligned)
    tokenizer(aligned)
    pickled = root / "pickled"
    pickled.mkdir()
    shutil.copy(aligned / "config.json", pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")

    adapter = save_adapter(other, root / "adapter")
    in_pickle = Path(shutil.copytree(adapter, root / "in_pickle"))
    (in_pickle / FACTORS).unlink()
    torch.save(load_file(adapter / FACTORS), in_pickle / "adapter_model.bin")
    mlx = as_mlx(adapter, root / "mlx", num_layers=1)
    (root / "gguf").mkdir()
    gguf = write_gguf(
        root / "gguf" / "adapter.gguf", converted(adapter, {"attn_q": 2, "attn_k": 1})
    )
    rich = save_adapter(
        other, root / "rich", target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        use_dora=False, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3},
    )  # fmt: skip
    dora = save_adapter(other, root / "dora", use_dora=True, use_rslora=True)

    pair = ["--base", str(base), "--aligned", str(aligned)]
    patched, alignment, module = root / "patched", root / "alignment", root / "module"
    alignment.mkdir()
    module.mkdir()
    data = rows(root / "data.jsonl", "prompt", "response")
    statistics, others = root / "statistics.safetensors", root / "others.safetensors"
    task = rows(root / "task.jsonl", "prompt", "answer", "response")
    made = (
        ["patch", *pair, "--adapter", str(adapter), "--out", str(patched), "--all"],
        ["align", *pair, "--out", str(alignment / "a.safetensors")],
        ["stats", "--aligned", str(aligned), "--data", str(data), "--out", str(statistics)],
        ["stats", "--aligned", str(aligned), "--data", str(task), "--out", str(others)],
    )
    for arguments in made:
        assert run(arguments) == 0, arguments
    save_safety_module(other, module / "m.safetensors")
    policy = root / "policy.toml"
    policy.write_text(POLICY.replace("format-of-nothing = 1\n", ""), "utf-8")
    prompts = rows(root / "prompts.jsonl", "prompt")
    adapters = root / "adapters.txt"
    adapters.write_text(f"# two\n{adapter}\n{mlx}\n", "utf-8")

    report = ["--format", "json"]
    on_adapter = (
        ["inspect", *pair, "--adapter", "{}", *report],
        ["patch", *pair, "--adapter", "{}", "--out", "{out}", "--all", *report],
        ["check", *pair, "{}", "--threshold", str(readers.THRESHOLD), *report],
    )
    given = ["--adapter", str(adapter)]
    as_base = (["inspect", "--base", "{}", "--aligned", str(aligned), *given, *report],)
    as_aligned = (
        ["inspect", "--base", str(base), "--aligned", "{}", *given, *report],
        ["patch", "--base", str(base), "--aligned", "{}", *given, "--out", "{out}", *report],
    )
    on_record = (
        ["check", *pair, "{}", "--threshold", "0.95", *report],
        ["verify", "{}", "--original", str(adapter), *pair, *report],
        ["inspect", *pair, "--adapter", "{}", *report],
    )
    with_module = (["patch", "--safety-module", "{}", *given, "--out", "{out}", *report],)
    with_file = (
        ["inspect", "--alignment", "{}", *given, *report],
        ["check", "--alignment", "{}", str(adapter), *report],
    )
    correction = ["patch", "--safety-data", "{}", "--task-data", str(others), *given]
    with_statistics = ([*correction, "--out", "{out}", *report],)
    sets = ["eval", "--model", str(aligned), "--max-new-tokens", "2", "--device", "cpu", *report]
    text, tensors = mutate.flip, mutate.safetensors
    document, carried = mutate.json_file, mutate.safetensors_metadata
    anything = mutate.replace_all
    peft = readers.peft(base, aligned)
    return (
        Kind("PEFT tensors", adapter, FACTORS, (tensors, tensors, text, anything), on_adapter, peft,
             30),
        Kind("PEFT config", adapter, CONFIG, (document, document, document, text), on_adapter, peft,
             30),
        Kind("rich PEFT config", rich, CONFIG, (document,), on_adapter, None, 20),
        Kind("rich PEFT tensors", rich, FACTORS, (tensors,), on_adapter, None, 20),
        Kind("DoRA tensors", dora, FACTORS, (tensors,), on_adapter, None),
        Kind(
            "PEFT pickle", in_pickle, "adapter_model.bin",
            (mutate.torch_file, mutate.torch_file, text, anything), on_adapter,
            readers.pickled("adapter_model.bin"), 20,
        ),
        Kind("MLX tensors", mlx, "adapters.safetensors", (tensors, text), on_adapter,
             readers.opened("adapters.safetensors")),
        Kind("MLX config", mlx, CONFIG, (document,), on_adapter),
        Kind("GGUF", gguf.parent, gguf.name, (mutate.gguf, mutate.gguf, text), on_adapter,
             readers.gguf(gguf.name), 20),
        Kind("model card", adapter, "README.md", (mutate.lines_of_text, text), on_adapter[1:]),
        Kind("record", patched, MANIFEST, (document, document, text), on_record, None, 25),
        Kind("patched tensors", patched, FACTORS, (tensors,), on_record, None),
        Kind("patched config", patched, CONFIG, (document,), on_record, None),
        Kind("checkpoint tensors", aligned, "model.safetensors", (tensors, text), as_aligned,
             readers.opened("model.safetensors"), 15),
        Kind("checkpoint config", aligned, "config.json", (document,), as_aligned),
        Kind("checkpoint index", base, "model.safetensors.index.json", (document, text), as_base,
             None, 15),
        Kind("checkpoint pickle", pickled, "pytorch_model.bin", (mutate.torch_file, text), as_base,
             readers.pickled("pytorch_model.bin"), 15),
        Kind("alignment file", alignment / "a.safetensors", "", (tensors, carried, text), with_file,
             readers.opened(""), 20),
        Kind("safety module", module / "m.safetensors", "", (tensors, carried, text), with_module,
             readers.opened(""), 20),
        Kind("statistics", statistics, "", (tensors, carried), with_statistics, readers.opened("")),
        Kind("policy", policy, "", (mutate.lines_of_text, text),
             (["check", *pair, str(adapter), "--policy", "{}", *report],)),
        Kind("list of adapters", adapters, "", (mutate.lines_of_text, text),
             (["inspect", *pair, "--adapter", "{}", *report],), None, 5),
        Kind("data", data, "", (mutate.json_lines, text),
             (["stats", "--aligned", str(aligned), "--data", "{}", "--out", "{out}.safetensors"],),
             None, 3),
        Kind("prompts", prompts, "", (mutate.json_lines, text), ([*sets, "--harmful", "{}"],),
             None, 3),
        Kind("tokenizer", aligned, "tokenizer_config.json", (document,),
             (["eval", "--model", "{}", *sets[3:], "--harmful", str(prompts)],), None, 2),
    )  # fmt: skip
