"""Which models the recipes are about: a TOML file for each, read and checked.

These recipes have not been run; only ``--dry-run`` has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from safeproj.errors import SafeprojError
from safeproj.text import first_line

FOLDER = Path(__file__).resolve().parent / "models"

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of one number, by dtype."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a model.

    Attributes:
        id: of the Hub repository, or a local directory.
        revision: the commit, None where it is not known.
        stored: the dtype of its files, which the size of the download follows from.
    """

    id: str
    revision: str | None
    stored: str

    @property
    def source(self) -> str:
        """What the command is given as SRC."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def is_local(self) -> bool:
        """Tell whether nothing has to be downloaded."""
        return Path(self.id).is_dir()


@dataclass(frozen=True)
class Recipe:
    """A base and an aligned model of one architecture.

    Attributes:
        key: what `--model` calls it.
        name: for people.
        licence: of the weights, as their publisher names it.
        dtype: what the model runs in.
        chat: whether prompts go through the aligned model's chat template.
        targets: the layers that get an adapter.
        parameters: how many the model has, as it was published.
        base: the unaligned checkpoint.
        aligned: the aligned one.
        config: `model_type`, and dimensions as transformers' config of that architecture has them.
    """

    key: str
    name: str
    licence: str
    dtype: str
    chat: bool
    targets: tuple[str, ...]
    parameters: int
    base: Checkpoint
    aligned: Checkpoint
    config: Mapping[str, Any]


def keys() -> list[str]:
    """Return the names of the recipes that are here."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(model: str) -> Recipe:
    """Return the recipe of a name, or in a TOML file of the same form.

    Raises:
        SafeprojError: there is none, or it cannot be used.
    """
    path = FOLDER / f"{model}.toml" if model in keys() else Path(model)
    if path.suffix != ".toml" or not path.is_file():
        raise SafeprojError(
            f"--model {model}: no such recipe; expected {', '.join(keys())}, or a TOML file like "
            "those in lab/real/models"
        )
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SafeprojError(f"--model {model}: cannot be read ({first_line(error)})") from error
    return Recipe(
        key=path.stem,
        name=_field(model, found, "name", str),
        licence=_field(model, found, "licence", str),
        dtype=_dtype(model, found, "dtype"),
        chat=_field(model, found, "chat", bool),
        targets=tuple(map(str, _field(model, found, "targets", list))),
        parameters=_field(model, found, "parameters", int),
        base=_checkpoint(model, found, "base"),
        aligned=_checkpoint(model, found, "aligned"),
        config=_field(model, found, "config", dict),
    )


def _checkpoint(model: str, found: Mapping[str, Any], name: str) -> Checkpoint:
    part = _field(model, found, name, dict)
    stored = _dtype(model, part, "stored")
    revision = _field(model, part, "revision", str) if "revision" in part else None
    return Checkpoint(_field(model, part, "id", str), revision, stored)


def _dtype(model: str, found: Mapping[str, Any], name: str) -> str:
    value: str = _field(model, found, name, str)
    if value not in BYTES:
        raise SafeprojError(f"--model {model}: {name!r} is {value}; expected {', '.join(BYTES)}")
    return value


def _field(model: str, found: Mapping[str, Any], name: str, kind: type) -> Any:
    value = found.get(name)
    if type(value) is not kind:
        raise SafeprojError(
            f"--model {model}: {name!r} is {type(value).__name__}; expected {kind.__name__}, as in "
            "lab/real/models"
        )
    return value
