"""Make the prompt files of a run: fetch the public files, convert them, keep refusals as pairs.

    python -m lab.real.prompts fetch --out DIR [--from DIR] [--chat] [--train-file FILE]
    python -m lab.real.prompts pairs --responses FILE --out FILE

These recipes have not been run; only ``--dry-run`` has. ``run.py`` calls both. ``--from`` takes
the public files from a folder, for machines without a network; ``sources.py`` has their names.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import random
import shutil
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.real.sources import FEWEST_PAIRS, FILES, SEED, SOURCES, WITH_RESPONSE, Source
from safeproj.errors import SafeprojError
from safeproj.storage.wholefile import replace_file
from safeproj.text import first_line, printable, shorten

Row = dict[str, str]
"""`prompt`, and `response` where the source has one."""

TIMEOUT = 60.0
"""Seconds without a byte after which a download ends."""


def obtain(out: Path, given: Path | None) -> dict[str, Path]:
    """Return where the public files are, by source; those that are missing are fetched.

    Args:
        out: where they are put, and looked for.
        given: a folder that has them all, None for the network.

    Raises:
        SafeprojError: one cannot be fetched, or is not in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for key, source in SOURCES.items():
        path = found[key] = out / source.file
        if given is not None:
            if not (given / source.file).is_file():
                raise SafeprojError(
                    f"--from {given}: no {source.file}; expected the file of {source.address}"
                )
            shutil.copyfile(given / source.file, path)
        elif not path.is_file():
            replace_file(path, _download(source))
    return found


def read_rows(source: Source, path: Path) -> list[Row]:
    """Return the rows of a public file that are used, in order.

    Raises:
        SafeprojError: it is not of the expected format, or lacks a column.
    """
    try:
        text = path.read_text("utf-8-sig")
        rows = _parsed(path, text)
    except (ValueError, csv.Error) as error:
        raise SafeprojError(
            f"{path}: cannot be read as {path.suffix} ({first_line(error)})"
        ) from error
    wanted = {*source.prompt, *source.columns, *source.keep}
    wanted |= {source.response} if source.response else set()
    for row in rows:
        missing = sorted(wanted - row.keys())
        if missing:
            raise SafeprojError(
                f"{path}: no column {shorten(missing)}; found {shorten(map(str, row), 8)}; the "
                "file may have changed: see lab/real/sources.py"
            )
    kept = [row for row in rows if all(row[name] == value for name, value in source.keep.items())]
    found = [_row(source, row) for row in kept]
    return [row for row in found if all(row.values())]


def split(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Return the rows of each prompt file, by name.

    Sources are shuffled with the seed. A prompt is in one file only, the first of `FILES`; two that
    differ in case or white space alone count as one.
    """
    rng = random.Random(SEED)
    left = {key: rng.sample(list(found), len(found)) for key, found in rows.items()}
    taken: set[str] = set()
    files: dict[str, list[Row]] = {}
    for name, splits in FILES.items():
        files[name] = []
        for each in splits:
            count = 0
            for row in left[each.source]:
                alike = " ".join(row["prompt"].casefold().split())
                if alike not in taken and (each.rows is None or count < each.rows):
                    taken.add(alike)
                    files[name].append(row)
                    count += 1
    return files


def line(row: Row, chat: bool, with_response: bool) -> dict[str, Any]:
    """Return the JSON object of a row, as `safeproj eval` and `safeproj stats` read it."""
    kept = row if with_response else {"prompt": row["prompt"]}
    if not chat:
        return dict(kept)
    messages = [{"role": "user", "content": kept["prompt"]}]
    if with_response:
        messages.append({"role": "assistant", "content": kept["response"]})
    return {"messages": messages}


def fetch(out: Path, given: Path | None, chat: bool, train_file: Path | None) -> dict[str, int]:
    """Write the prompt files, and what they were made of, and return how many lines each has.

    Args:
        out: the folder.
        given: see `obtain`.
        chat: whether lines are chats.
        train_file: JSON lines with prompt and response that training takes besides.

    Raises:
        SafeprojError: a file cannot be had or read.
    """
    paths = obtain(out / "public", given)
    rows = {key: read_rows(SOURCES[key], path) for key, path in paths.items()}
    counts = {}
    for name, some in split(rows).items():
        if not some:
            raise SafeprojError(f"{name}: no rows are left; see lab/real/sources.py")
        lines = [line(row, chat, name in WITH_RESPONSE) for row in some]
        if name == "train" and train_file is not None:
            lines += [line(row, chat, True) for row in own_rows(train_file)]
        write_lines(out / f"{name}.jsonl", lines)
        counts[name] = len(lines)
    record = {
        key: {
            "url": SOURCES[key].address,
            "licence": SOURCES[key].licence,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": len(rows[key]),
        }
        for key, path in paths.items()
    }
    replace_file(out / "sources.json", (json.dumps(record, indent=1) + "\n").encode())
    return counts


def own_rows(path: Path) -> list[Row]:
    """Return the rows of a file of the user's.

    Raises:
        SafeprojError: a line has no prompt and response.
    """
    rows = []
    for number, text in enumerate(_text(path, "--train-file").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
            rows.append({name: str(found[name]) for name in ("prompt", "response")})
        except (ValueError, KeyError, TypeError) as error:
            raise SafeprojError(
                f"--train-file {path}:{number}: expected a JSON object with prompt and response"
            ) from error
    return rows


def pairs(responses: Path, out: Path, fewest: int = FEWEST_PAIRS) -> tuple[int, int]:
    """Write requests with the aligned model's own answers that were judged refusals.

    Args:
        responses: what `safeproj eval --responses` wrote for the model without an adapter.
        out: the file of safety pairs.
        fewest: how many pairs there have to be.

    Returns:
        How many were kept, and how many answers there were.

    Raises:
        SafeprojError: the answers cannot be read, are not judged, or too few are refusals.
    """
    lines = _text(responses, "--responses").splitlines()[1:]
    try:
        rows = [json.loads(each) for each in lines]
        judged = [(row["prompt"], row["response"], row["verdict"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise SafeprojError(
            f"--responses {responses}: not judged answers of safeproj eval ({first_line(error)})"
        ) from error
    kept = [
        _pair(prompt, answer)
        for prompt, answer, verdict in judged
        if verdict == "refused" and answer.strip()
    ]
    if len(kept) < fewest:
        raise SafeprojError(
            f"--responses {responses}: {len(kept)} of {len(judged)} answers are refusals; "
            f"expected {fewest} or more: look at them, and give --phrase for how this model refuses"
        )
    write_lines(out, kept)
    return len(kept), len(judged)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines; the file appears complete or not at all."""
    replace_file(path, "".join(json.dumps(dict(row)) + "\n" for row in rows).encode())


def _pair(prompt: Any, answer: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "response": answer}
    return {"messages": [*prompt, {"role": "assistant", "content": answer}]}


def _row(source: Source, row: Mapping[str, Any]) -> Row:
    parts = [str(row[name] or "").strip() for name in source.prompt]
    found = {"prompt": "\n\n".join(part for part in parts if part)}
    if source.response:
        found["response"] = str(row[source.response] or "").strip()
    return found


def _parsed(path: Path, text: str) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.suffix == ".json":
        found = json.loads(text)
    else:
        found = [json.loads(each) for each in text.split("\n") if each.strip()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("expected a list of objects")
    return found


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SafeprojError(f"{option} {path}: cannot be read ({first_line(error)})") from error


def _download(source: Source) -> bytes:
    """Return the content of a public file; the addresses are those of `sources.py` alone."""
    try:
        with urllib.request.urlopen(source.address, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
    except OSError as error:
        raise SafeprojError(
            f"{source.address}: cannot be fetched ({first_line(error)}); fetch it otherwise as "
            f"{source.file}, and give its folder as --from"
        ) from error
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fetched = commands.add_parser("fetch")
    fetched.add_argument("--out", type=Path, required=True)
    fetched.add_argument("--from", type=Path, dest="given")
    fetched.add_argument("--chat", action="store_true")
    fetched.add_argument("--train-file", type=Path)
    kept = commands.add_parser("pairs")
    kept.add_argument("--responses", type=Path, required=True)
    kept.add_argument("--out", type=Path, required=True)
    kept.add_argument("--fewest", type=int, default=FEWEST_PAIRS)
    options = parser.parse_args(arguments)
    try:
        if options.command == "fetch":
            counts = fetch(options.out, options.given, options.chat, options.train_file)
            print(", ".join(f"{count} {name}" for name, count in counts.items()))
        else:
            count, answers = pairs(options.responses, options.out, options.fewest)
            print(f"kept {count} of {answers} answers")
    except SafeprojError as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error.message)}\n")


if __name__ == "__main__":
    main()
