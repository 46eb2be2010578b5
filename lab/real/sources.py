"""Where the prompts come from: public files, their licences, columns and what each is used for.

These recipes have not been run; only ``--dry-run`` has. Columns and licences are as the publishers'
pages or several public users of the files give them; the files themselves were not fetched here.
``prompts.py`` refuses a file that lacks a column. No text of theirs is in this repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """A public file.

    Attributes:
        file: what it is called in the data folder; the end tells its format.
        url: where it is, with `{revision}` in place of the commit.
        revision: the commit; `main` where none was found that could be pinned.
        licence: as the publisher names it.
        prompt: the columns that make the prompt, those that are empty left out.
        response: the column of the right answer, if there is one.
        columns: the columns that must be there besides.
        keep: column to the value that rows must have.
        rows: how many rows there are, or are kept, as others report it.
        size: of the file in bytes, roughly.
    """

    file: str
    url: str
    revision: str
    licence: str
    prompt: tuple[str, ...]
    response: str | None
    rows: int
    size: int
    columns: tuple[str, ...] = ()
    keep: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where the file is fetched from."""
        return self.url.format(revision=self.revision)


GITHUB = "https://raw.githubusercontent.com/"
HUB = "https://huggingface.co/datasets/"

SOURCES = {
    "advbench": Source(
        "advbench.csv",
        GITHUB + "llm-attacks/llm-attacks/{revision}/data/advbench/harmful_behaviors.csv",
        "main",
        "MIT",
        ("goal",),
        None,
        520,
        90_000,
        columns=("target",),
    ),
    "jbb": Source(
        "jbb.csv",
        HUB + "JailbreakBench/JBB-Behaviors/resolve/{revision}/data/harmful-behaviors.csv",
        "886acc352a31533ffbcf4ef22c744658688086fc",
        "MIT",
        ("Goal",),
        None,
        100,
        23_100,
    ),
    "harmbench": Source(
        "harmbench.csv",
        GITHUB + "centerforaisafety/HarmBench/{revision}/data/behavior_datasets/"
        "harmbench_behaviors_text_all.csv",
        "main",
        "MIT",
        ("Behavior",),
        None,
        200,
        194_000,
        keep={"FunctionalCategory": "standard"},
    ),
    "xstest": Source(
        "xstest.csv",
        GITHUB + "paul-rottger/xstest/{revision}/xstest_prompts.csv",
        "main",
        "CC-BY-4.0",
        ("prompt",),
        None,
        250,
        40_000,
        keep={"label": "safe"},
    ),
    "dolly": Source(
        "dolly.jsonl",
        HUB + "databricks/databricks-dolly-15k/resolve/{revision}/databricks-dolly-15k.jsonl",
        "main",
        "CC-BY-SA-3.0",
        ("instruction", "context"),
        "response",
        15_011,
        13_200_000,
    ),
    "sql": Source(
        "sql.json",
        HUB + "b-mc2/sql-create-context/resolve/{revision}/sql_create_context_v4.json",
        "9d80a6a118b838d9defc3798d659a54a2ac2ff37",
        "CC-BY-4.0",
        ("context", "question"),
        "answer",
        78_577,
        21_800_000,
    ),
}

FILE_URL = {
    "advbench": "https://github.com/llm-attacks/llm-attacks",
    "jbb": "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
    "harmbench": "https://github.com/centerforaisafety/HarmBench",
    "xstest": "https://github.com/paul-rottger/xstest",
    "dolly": "https://huggingface.co/datasets/databricks/databricks-dolly-15k",
    "sql": "https://huggingface.co/datasets/b-mc2/sql-create-context",
}
"""The pages of the publishers, where the licences are."""


@dataclass(frozen=True)
class Split:
    """How many rows of which source a file of prompts gets; no row is in two files.

    Attributes:
        source: key of `SOURCES`.
        rows: at most so many, drawn with the seed; None for all that are left.
    """

    source: str
    rows: int | None


SEED = 0
"""Of the draw of rows."""

FILES: dict[str, tuple[Split, ...]] = {
    "requests": (Split("advbench", 200),),
    "validation": (Split("advbench", 100),),
    "jbb": (Split("jbb", None),),
    "harmbench": (Split("harmbench", None),),
    "xstest_safe": (Split("xstest", None),),
    "skill": (Split("sql", 300),),
    "task": (Split("dolly", 200), Split("sql", 200)),
    "train": (Split("dolly", 2000), Split("sql", 2000)),
}
"""Files of prompts that are made, in this order: a prompt that an earlier one has is left out."""

WITH_RESPONSE = ("skill", "task", "train")
"""Those whose lines have the right response."""

HELD_OUT = ("jbb", "harmbench", "xstest_safe", "skill")
"""Those that nothing is chosen by."""

FEWEST_PAIRS = 30
"""Safety pairs below which it is not worth going on."""
