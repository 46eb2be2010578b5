"""What the adapter's directory and the names in it say."""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.collection import Member
from safeproj.adapter.interface import CONFIG, MANIFEST, SIGNATURE
from safeproj.adapter.write import leads_out
from safeproj.errors import SafeprojError
from safeproj.gate.policy import Policy
from safeproj.gate.toolfiles import GIT_CONFIG, is_left_by_a_tool, runs_programs
from safeproj.gate.weights import found
from safeproj.records.checks import Finding
from safeproj.records.rules import Level
from safeproj.storage.filekind import (
    EMPTY,
    SCRIPT,
    WEIGHT_ENDINGS,
    FileKind,
    Group,
    kind_in,
)
from safeproj.storage.source import Folder, HubFolder, LocalFolder, file_sha256
from safeproj.storage.trainingstate import is_named_as_state, is_state
from safeproj.text import first_line, shorten

STATE_PLACES = re.compile(r"|(.+/)?(checkpoint-\d+|last-checkpoint|global_step\d+)")
"""Directories in which trainers leave what they keep: the adapter's, and its checkpoints."""

MAX_STATE = 1 << 20
"""Bytes of such a file; an optimizer's may have `STATE_GROWTH` times the adapter's beside."""

STATE_GROWTH = 16

MAX_JSON = 64 << 20
"""Bytes of a JSON file that is looked into; a larger one is data, and no loader's config."""

_SCRIPTS = (
    *(".py", ".pyx", ".ipynb", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js", ".mjs", ".ts"),
    *(".rb", ".pl", ".lua", ".so", ".dll", ".dylib", ".exe", ".jar", ".service", ".desktop"),
)
_TEMPLATES = (".jinja", ".jinja2", ".j2", ".template", ".tmpl", ".modelfile")
_VOCABULARIES = (".model", ".tiktoken", ".bpe", ".vocab", ".spm")
STEERING = (*_SCRIPTS, *_TEMPLATES, *_VOCABULARIES)
STEERING_NAMES = (
    *("tokenizer", "tokenization", "special_tokens_map", "added_tokens", "vocab", "merges"),
    *("normalizer", "spiece", "sentencepiece", "source.spm", "target.spm", "tekken", "bpe"),
    *("chat_template", "template", "system", "prompt", "modelfile", "params", "generation_config"),
    *("config", "adapter_config", "modules.json", "model_index", "scheduler_config", "sentence_"),
    *("preprocessor", "processor", "image_processor", "video_p", "feature_extractor", "audio_"),
    *("quant", "hf_quant", "recipe", "requirements", "environment", "conda", "pyproject", "setup"),
    *("dockerfile", "containerfile", "makefile", "handler", "pipeline", "safeproj.toml", ".env"),
)
STEERING_PLACES = ("additional_chat_templates", "custom_generate", "hooks")
"""Ends and beginnings of names of files that steer what a model is given, or that are run; and
directories of such files."""

_DOCUMENTS = (".md", ".rst", ".txt", ".svg", ".log", ".csv", ".bib", ".cff")
_KNOWN = re.compile(
    r"licen[cs]e.*|notice.*|copying.*|authors|\.gitattributes|\.gitignore|\.gitkeep|cachedir\.tag"
    r"|(\w+_)?results\.json|trainer_(state|log)\.jsonl?|training_args\.(json|ya?ml)"
)
"""What is found beside adapters and does nothing: what people read, and how the training went."""

RUNNING = ("auto_map", "custom_pipelines", "trust_remote_code", "allow_all_kernels")
"""Settings by which a config makes loaders run code that is none of theirs."""

KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Settings that may name a repository of compiled code."""

CHANGING = (
    *("quantization_config", "compression_config", "rope_scaling", "rope_parameters", "tie_word_"),
    *("num_hidden_layers", "pruned_heads", "use_cache", "attn_implementation", "dtype"),
    *("bos_token_id", "eos_token_id", "suppress_tokens", "forced_decoder_ids", "bad_words_ids"),
    *("sequence_bias", "chat_template", "base_model", "_name_or_path"),
)
"""Beginnings of settings by which it changes what a model computes."""

_SHORT_NAME = re.compile(r"[^./\\]{1,6}~\d(\.[^./\\]{0,3})?")
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com\d|lpt\d)(\..*)?")


@dataclass(frozen=True)
class Listing:
    """All that would be published with an adapter.

    Attributes:
        folder: the adapter's.
        names: of all files, hidden ones too, and of links.
        closed: directories that cannot be listed, and why.
    """

    folder: Folder
    names: tuple[str, ...]
    closed: dict[str, str]

    @cached_property
    def local(self) -> Path | None:
        """The directory, where the files are on this machine and not in the Hub's cache."""
        folder = self.folder
        # In the Hub's cache every file is a link to a blob of the same repository.
        local = isinstance(folder, LocalFolder) and folder.revision is None
        return folder.root if isinstance(folder, LocalFolder) and local else None

    def is_file(self, name: str) -> bool:
        """Tell whether a name is that of a regular file, which can be read."""
        if self.local is None:
            return True
        return stat.S_ISREG((self.local / name).lstat().st_mode)


def listing(folder: Folder) -> Listing:
    """Return all files that would be published, but what git and the Hub's client left."""
    if isinstance(folder, LocalFolder) and folder.only is not None:
        return Listing(folder, (folder.only,), {})
    if not isinstance(folder, LocalFolder):
        return Listing(folder, tuple(sorted(folder.files)), {})
    names: list[str] = []
    closed: dict[str, str] = {}

    def note(error: OSError) -> None:
        closed[Path(error.filename).relative_to(folder.root).as_posix()] = first_line(error)

    for directory, below, files in os.walk(folder.root, onerror=note):
        place = Path(directory).relative_to(folder.root)
        links = [name for name in below if (folder.root / place / name).is_symlink()]
        below[:] = [name for name in below if name not in links]
        names += [(place / name).as_posix() for name in (*files, *links)]
    digests = _Digests(folder)
    names = [name for name in names if not is_left_by_a_tool(folder.root, name, digests)]
    return Listing(folder, tuple(sorted(names)), closed)


class _Digests:
    """Tells whether a SHA-256 is that of a file of the adapter, which git's LFS keeps twice."""

    def __init__(self, folder: LocalFolder) -> None:
        self._folder = folder

    def __contains__(self, digest: object) -> bool:
        return digest in self._found

    @cached_property
    def _found(self) -> set[str]:
        paths = [self._folder.root / name for name in self._folder.files]
        return {file_sha256(path) for path in paths if path.is_file() and not path.is_symlink()}


def about_files(adapter: Adapter, policy: Policy) -> Iterator[Finding]:
    """Yield what there is to say about the files and the names of the tensors."""
    files = listing(adapter.folder)
    yield from _about_listing(adapter, files)
    for name in files.names:
        if name not in (*adapter.weights_files, MANIFEST) and files.is_file(name):
            yield from _about_content(adapter, files, name, policy)
    yield from _about_names(adapter)


def about_member(member: Member) -> Iterator[Finding]:
    """Yield that an adapter among others is elsewhere: it may be another one by then."""
    if member.linked:
        text = f"{member.source} is, or is behind, a link out of the directory that is checked"
        yield found("SP015", text)


def about_paths(adapter: Adapter) -> Iterator[Finding]:
    """Yield files that are links, or whose names lead elsewhere, and what cannot be listed."""
    yield from _about_listing(adapter, listing(adapter.folder))


def _about_listing(adapter: Adapter, files: Listing) -> Iterator[Finding]:
    for name, why in files.closed.items():
        yield found("SP041", f"{name}/ cannot be listed ({why})", file=name)
    for name in files.names:
        yield from _about_path(files, name)
    yield from _about_modes(files)
    read = (CONFIG, MANIFEST, SIGNATURE, *adapter.weights_files)
    for name, other in _alike_files(files.names, read):
        yield found("SP016", f"the file {name!a} differs from {other!a} in looks alone", file=name)


def _about_path(files: Listing, name: str) -> Iterator[Finding]:
    parts = name.split("/")
    if leads_out(name) or ":" in name or any(_DEVICE.fullmatch(p.casefold()) for p in parts):
        yield found("SP015", f"the file name {name!a} can lead out of the adapter", file=name)
        return
    if not name.isprintable():
        text = f"the file name {name!a} has characters that are not printable"
        yield found("SP015", text, file=name)
    if files.local is None:
        return
    path = files.local / name
    if path.is_symlink():
        yield found("SP015", f"{name} is a link; expected the file itself", file=name)
    elif not files.is_file(name):
        yield found("SP015", f"{name} is no regular file", file=name)


def _about_modes(files: Listing) -> Iterator[Finding]:
    """Yield what the system keeps of files beside their content, which a copy would lose."""
    if files.local is None or os.name != "posix":
        return
    modes = {name: (files.local / name).lstat() for name in files.names if files.is_file(name)}
    for name, state in modes.items():
        if state.st_nlink > 1:
            text = f"{name} has {state.st_nlink} names (hard links): who has another can change it"
            yield found("SP040", text, file=name)
        if state.st_mode & (stat.S_ISUID | stat.S_ISGID):
            yield found("SP040", f"{name} would run with its owner's rights (setuid)", file=name)
    for bit, what in ((stat.S_IWOTH, "can be changed by everyone"), (0o111, "can be executed")):
        names = [name for name, state in modes.items() if state.st_mode & bit]
        if names:  # some file systems show all files so
            text = f"{shorten(names)} {what}"
            yield found("SP040", text, level=Level.note, file=names[0])


def _about_content(
    adapter: Adapter, files: Listing, name: str, policy: Policy
) -> Iterator[Finding]:
    """Yield what a file is that was not checked: by its bytes, and by who may open it."""
    try:
        kind, size = kind_in(files.folder, name)
        leaf = name.rpartition("/")[2].casefold().rstrip(". ")  # which some systems drop
        if is_state(name, kind):
            if kind != EMPTY:
                what = "training state" if is_named_as_state(name) else "a pickle by its name"
                text = f"{name} is {what} ({kind.name}): whoever loads it runs the code in it"
                yield found("SP050", text, policy=policy, file=name)
            if _is_only_state(adapter, name, size):
                return
        if kind.may_hold_weights or leaf.endswith(WEIGHT_ENDINGS):
            text = f"{name} holds weights that were not checked"
            if kind.may_hold_weights and kind.group is not Group.weights:
                text = f"{name} is {kind.name}: it may hold weights, which were not checked"
            yield found("SP014", text, policy=policy, file=name)
            return
        document = _json_of(files, name, kind, size)
    except SafeprojError as error:
        yield found("SP041", error.message, file=name)
        return
    own = name in adapter.format.documents
    if "weight_map" in document:
        text = f"{name} is the index of a model's weights, which were not checked"
        yield found("SP014", text, policy=policy, file=name)
    elif not own and isinstance(other := document.get("transformers_weights"), str):
        text = f"{name} sets transformers_weights to {other[:80]!a}, which was not checked"
        yield found("SP014", text, policy=policy, file=name)
    elif name == GIT_CONFIG and runs_programs(files.folder.path(name)):
        yield found("SP039", f"{name} makes git run programs", file=name)
    elif kind.group is Group.program and kind != SCRIPT:
        yield found("SP039", f"{name} is {kind.name}", file=name)
    elif not own and (running := sorted(_running(document))):
        text = f"{name} makes loaders run other code: it sets {shorten(running)}"
        yield found("SP039", text, file=name)
    elif own or name == SIGNATURE:
        return
    elif _steers(name, leaf) or kind == SCRIPT:
        settings = sorted(key for key in document if key.startswith(CHANGING))
        what = f"; it sets {shorten(settings)}" if settings else ""
        text = f"{name} can change what a model is given or runs{what}"
        yield found("SP017", text, file=name)
    elif not _is_known(leaf, kind):
        yield found("SP038", f"{name} ({kind.name}) is nothing that belongs to adapters", file=name)


def _is_only_state(adapter: Adapter, name: str, size: int) -> bool:
    """Tell whether what a trainer keeps is where it does, and too small to hold weights as well."""
    place, _, leaf = name.casefold().rpartition("/")
    if not STATE_PLACES.fullmatch(place) or not is_named_as_state(leaf) or "model" in leaf:
        return False
    limit = MAX_STATE
    if "optim" in leaf:
        limit += STATE_GROWTH * sum(tensor.nbytes for tensor in adapter.tensors.values())
    return size <= limit


def _json_of(files: Listing, name: str, kind: FileKind, size: int) -> dict[str, Any]:
    """Return the JSON object that a text is, empty if it is none.

    Whoever reads a damaged one reads nothing, so that it is judged by its name alone.
    """
    if kind.group is not Group.text:
        return {}
    if size > MAX_JSON:
        raise SafeprojError(f"{name} has {size} bytes of text; at most {MAX_JSON} are looked into")
    if isinstance(files.folder, HubFolder):
        text, _ = files.folder.head(name, MAX_JSON)
    else:
        text = files.folder.path(name).read_bytes()
    if not text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return {}
    try:
        found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_all_values)
    except RecursionError as error:
        raise SafeprojError(f"{name} is nested too deep to be looked into") from error
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _all_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object in which a key that comes twice has both values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        found |= {key: [v for k, v in pairs if k == key] for key in found}
    return found


def _texts_of(value: Any) -> str:
    """Return a text, or those of a mapping, such as one for each part of a model."""
    texts = value.values() if isinstance(value, dict) else [value]
    return " ".join(text for text in texts if isinstance(text, str))


def _running(document: Any) -> set[str]:
    """Return the settings at any depth of a config by which loaders run other code."""
    found: set[str] = set()
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found |= {key for key in RUNNING if value.get(key)}
            found |= {key for key in KERNELS if "/" in _texts_of(value.get(key))}
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _steers(name: str, leaf: str) -> bool:
    if leaf.endswith(STEERING) or leaf.startswith(STEERING_NAMES):
        return True
    return any(part in STEERING_PLACES for part in name.casefold().split("/")[:-1])


def _is_known(leaf: str, kind: FileKind) -> bool:
    if kind.group in (Group.media, Group.log):
        return True
    return leaf.endswith(_DOCUMENTS) or _KNOWN.fullmatch(leaf) is not None


def _about_names(adapter: Adapter) -> Iterator[Finding]:
    """Yield names of tensors that are made to be taken for others."""
    for key in adapter.tensors:
        if not key.isascii():
            yield found("SP016", f"{key!a} has characters outside ASCII", tensor=key)
    for key, other in _alike(adapter.tensors):
        yield found("SP016", f"{key!a} differs from {other!a} in looks alone", tensor=key)


def _alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each name that differs from an earlier one in case or compatible characters alone."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            yield name, other


def _alike_files(names: Iterable[str], read: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield files that some system takes for another one, or for one that loaders look for.

    Args:
        names: of the files.
        read: what loaders look for, whether it is there or not.
    """
    names = list(names)
    places = {str(parent) for name in names for parent in Path(name).parents} - {"."}
    seen = {_folded(name): name for name in read}
    for name in [*sorted(places), *names]:
        other = seen.setdefault(_folded(name), name)
        if other == name:
            other = next((each for each in read if _looks_like(name, each)), name)
        if other != name:
            yield name, other


def _folded(name: str) -> str:
    """Return a path as the most forgiving file system has it."""
    text = unicodedata.normalize("NFKC", name)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc", "Mn"))
    return "/".join(part.rstrip(". ") or part for part in text.casefold().split("/"))


def _looks_like(name: str, other: str) -> bool:
    """Tell whether a name is another one but for letters of other alphabets, or a short form."""
    if _SHORT_NAME.fullmatch(name):  # as Windows has for each long name
        return other.casefold().startswith(name.partition("~")[0].casefold())
    folded = unicodedata.normalize("NFKC", name).casefold()
    foreign = sum(not c.isascii() for c in folded)
    if not 0 < foreign < len(folded) / 2 or len(folded) != len(other):
        return False
    return all(not c.isascii() or c == d for c, d in zip(folded, other.casefold(), strict=True))
