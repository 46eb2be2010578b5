"""Fixtures that several tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import typer.testing

from safeproj import SafeLora
from tests.support import moved, save_adapter, tiny_llama

LONGEST = (
    "tests/e2e/test_readme.py::test_the_demonstration",
    "tests/e2e/test_readme.py::test_commands_print_what_the_pages_show[docs/covariance.md]",
    "tests/fuzz/",
    "tests/engine/test_cluster.py",
    "tests/examples/test_salora_training.py",
    "tests/repair/test_command.py",
    "tests/e2e/test_python_docs.py",
    "tests/e2e/test_readme.py::test_commands_print_what_the_pages_show[README.md]",
    "tests/e2e/test_salora_docs.py",
    "tests/e2e/test_readme.py::test_commands_print_what_the_pages_show[docs/sweep.md]",
    "tests/examples/test_evidence.py::test_the_example_again",
    "tests/examples/test_real_pair.py",
)
"""The longest tests: others run beside them, and none of them is begun last."""


def pytest_configure() -> None:
    """Look for no garbage among what imports leave: that takes seconds and finds little.

    What a developer's environment says of colours says nothing here.
    """
    gc.disable()
    for name in ("NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)


def pytest_collection_finish() -> None:
    """Look for garbage among what tests leave, and in nothing that was there before them."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, and leave out what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device; there is none")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(reason)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@dataclass(frozen=True)
class Trio:
    """A base and an aligned checkpoint, and an adapter, on disk; tests must not change them."""

    base: Path
    aligned: Path
    adapter: Path
    base_model: Any
    aligned_model: Any

    @property
    def method(self) -> SafeLora:
        """Safe LoRA with both."""
        return SafeLora(str(self.base), str(self.aligned))

    @property
    def arguments(self) -> list[str]:
        """The three options of the command."""
        return [
            "--base",
            str(self.base),
            "--aligned",
            str(self.aligned),
            "--adapter",
            str(self.adapter),
        ]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch use one thread: the models are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def one_command() -> Iterator[None]:
    """Let `CliRunner` make the command once: that takes longer than most commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A tiny float32 Llama pair, sharded differently, and a q+v adapter."""
    root = tmp_path_factory.mktemp("trio")
    base = tiny_llama()
    aligned = moved(base)
    base.save_pretrained(root / "base", max_shard_size="20KB")
    aligned.save_pretrained(root / "aligned", max_shard_size="35KB")
    save_adapter(aligned, root / "adapter")
    return Trio(root / "base", root / "aligned", root / "adapter", base, aligned)
