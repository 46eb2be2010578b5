"""Fine-tune a LoRA adapter on JSON lines, with the stock Trainer and PEFT.

    python -m lab.real.train --model SRC --data FILE --targets NAMES --out DIR

These recipes have not been run; only ``--dry-run`` has. ``run.py --train`` calls this.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.real.sources import SEED
from safeproj.errors import SafeprojError
from safeproj.text import printable

BATCH, ACCUMULATED = 8, 4
"""Samples in a step on the device, and how many such steps make one of the optimizer."""

MAX_LENGTH = 512
"""Tokens of a sample; the rest is cut off."""

RANK = 16
LEARNING_RATE = 1e-4
EPOCHS = 1.0


def train(model: str, data: Path, targets: Sequence[str], out: Path, dtype: str) -> None:
    """Write an adapter for a model.

    Args:
        model: SRC, a directory or Hub repository.
        data: JSON lines with prompt and response, or chats.
        targets: the layers that are adapted, by the last part of their names.
        out: its directory.
        dtype: what the model runs in; the adapter is float32.

    Raises:
        SafeprojError: the model or the data cannot be used.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    from safeproj.lm.data import read_data
    from safeproj.lm.models import load_model, load_tokenizer
    from safeproj.storage.source import open_folder

    if out.exists():
        raise SafeprojError(f"--out {out}: is there already; expected a new directory")
    set_seed(SEED)
    folder = open_folder(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    samples = read_data(data, tokenizer, max_length=MAX_LENGTH)
    loaded = load_model(folder, "auto", dtype)
    loaded.config.use_cache = False
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(loaded, config)
    with tempfile.TemporaryDirectory(prefix="safeproj-") as directory:
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(
                output_dir=directory,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=ACCUMULATED,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                bf16=dtype == "bfloat16" and loaded.device.type == "cuda",
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=SEED,
            ),
            train_dataset=samples.rows(),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
        written = Path(directory) / "adapter"
        adapted.save_pretrained(str(written))
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(written, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="SRC")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--targets", required=True, metavar="NAMES")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        train(options.model, options.data, options.targets.split(","), options.out, options.dtype)
    except SafeprojError as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error.message)}\n")


if __name__ == "__main__":
    main()
