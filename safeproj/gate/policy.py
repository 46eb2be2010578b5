"""The policy of the gate: what passes. Read from safeproj.toml, pyproject.toml, and options."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.gate.demands import TEMPLATE as BEHAVIOUR
from safeproj.gate.demands import Demands, demands
from safeproj.methods.interface import Method
from safeproj.methods.registry import method_of
from safeproj.methods.safe_lora.method import PROJECTORS
from safeproj.plan.select import DEFAULT_THRESHOLD
from safeproj.records.checks import Evidence
from safeproj.records.rules import RULES
from safeproj.storage.nearby import read_given_text
from safeproj.storage.source import Src, StrPath
from safeproj.text import first_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POLICY_FILE = "safeproj.toml"
PYPROJECT = "pyproject.toml"

ALLOWANCES = {
    "full-weight-changes": "SP004",
    "unknown-tensors": "SP005",
    "unmatched-modules": "SP006",
    "dora-magnitudes": "SP007",
    "empty-updates": "SP008",
    "other-weights": "SP014",
    "other-base-model": "SP018",
    "imports": "SP019",
    "missing-provenance": "SP020",
    "conditional-updates": "SP043",
    "unjudged-settings": "SP044",
    "unmeasured-behaviour": "SP045",
    "training-state": "SP050",
}
"""What a policy may allow, and the rule that it turns into a note."""

ALLOWED = frozenset(
    {
        "empty-updates",
        "missing-provenance",
        "other-base-model",
        "imports",
        "unjudged-settings",
        "unmeasured-behaviour",
    }
)
"""What the default policy allows."""

ROLES = ("base", "aligned", "alignment", "safety-module", "safety-data", "task-data")
"""What a policy may pin."""

READERS = ("vllm", "sglang", "llama.cpp", "ollama", "openvino", "peft-0.11")
"""Programs that a policy may name; `safeproj.gate.readers` says what they make of an adapter."""

DEFAULT_PROJECTOR = PROJECTORS[0]
"""That of a policy that says nothing of it."""

SETTINGS = ("projector", "rank", "energy", "mu")
"""Fields that say how a method scores."""

LIMITS = ("max-scaling", "max-size", "max-outside", "max-unseen", "max-cast-change")
"""Fields that bound how far updates go, each a number of more than 0."""

_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}|[^@\s]+@[^@\s]+", re.ASCII)
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?)%", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Override:
    """Another threshold for some modules.

    Attributes:
        modules: regular expression, searched for in the module's name.
        threshold: theirs.
    """

    modules: str
    threshold: float


@dataclasses.dataclass(frozen=True)
class Policy:
    """What passes. Every field is one of safeproj.toml, with hyphens for underscores.

    Attributes:
        threshold: a module at or below it, and not projected, counts against the adapter.
        max_below: how many modules may do so: a number, or a share of the scored ones (`"10%"`).
        overrides: thresholds for modules by name; the last that matches counts.
        coverage: the share of the adapted modules that must have been scored.
        max_scaling: largest `s` by which the config may scale an update.
        max_size: largest `‖ΔW‖_F / ‖V‖_F`: the update relative to what alignment moved.
        max_outside: the same of `ΔW` less its best multiple of `C ΔW`: what points elsewhere.
        max_unseen: the same of the part of `ΔW` in output directions that alignment left alone.
        max_cast_change: largest `‖ΔW' - ΔW‖_F / ‖ΔW‖_F` of an update `ΔW'` whose factors are cast
            to another dtype, as servers do.
        evidence: the least that shows that a module was projected.
        projector: which `C` is scored with, `approx` or `exact`; not for a safety module.
        rank: of the exact projector, or how many directions of a safety module are used.
        energy: of the exact projector, in place of a rank.
        mu: of the covariance-weighted correction; its default if None.
        allow: names of `ALLOWANCES` that are allowed.
        ignore: ids of rules that are left out.
        readers: programs, names of `READERS`, that must read the adapter as it was scored.
        identities: role to what must be checked against: `org/name@commit`, or `sha256:` with the
            digest that `safeproj check` names.
        public_key: file with the key that the directory must be signed by.
        behaviour: what evaluations must show, and which count.
        file: where the policy came from, None for the defaults.

    Raises:
        SafeprojError: a value is out of range.
    """

    threshold: float = DEFAULT_THRESHOLD
    max_below: int | str = 0
    overrides: tuple[Override, ...] = ()
    coverage: float = 1.0
    max_scaling: float = 64.0
    max_size: float = 25.0
    max_outside: float = 20.0
    max_unseen: float = 0.1
    max_cast_change: float = 0.05
    evidence: Evidence = Evidence.recorded
    projector: str = DEFAULT_PROJECTOR
    rank: int | None = None
    energy: float | None = None
    mu: float | None = None
    allow: frozenset[str] = ALLOWED
    ignore: frozenset[str] = frozenset()
    readers: tuple[str, ...] = ()
    identities: Mapping[str, str] = dataclasses.field(default_factory=dict)
    public_key: StrPath | None = None
    behaviour: Demands = dataclasses.field(default_factory=Demands)
    file: str | None = None

    def __post_init__(self) -> None:
        if self.public_key is not None:
            object.__setattr__(self, "public_key", os.fspath(self.public_key))
        _require_share("threshold", self.threshold)
        _require_share("coverage", self.coverage)
        for name in LIMITS:
            value = getattr(self, name.replace("-", "_"))
            if not 0.0 < value < math.inf:
                raise SafeprojError(f"{name} must be a number of more than 0, found {value}")
        _below(self.max_below)
        for override in self.overrides:
            _require_share(
                f"the threshold of the override {override.modules!r}", override.threshold
            )
            try:
                re.compile(override.modules)
            except re.error as error:
                raise SafeprojError(
                    f"the override {override.modules!r} is not a regular expression: {error}"
                ) from error
        _require_known("allow", self.allow, ALLOWANCES)
        _require_known("ignore", self.ignore, RULES)
        for id_ in self.ignore:
            if not RULES[id_].can_be_ignored:
                raise SafeprojError(f"ignore: {id_} {RULES[id_].name} is never a pass")
        _require_known("projector", [self.projector], PROJECTORS)
        _require_known("readers", self.readers, READERS)
        _require_known("identities", self.identities, ROLES)
        for role, identity in self.identities.items():
            if not _IDENTITY.fullmatch(identity):
                raise SafeprojError(
                    f"identities: {role} is {identity!r}; expected org/name@commit or sha256: and "
                    "64 hexadecimal digits"
                )

    def method(self, given: Method) -> Method:
        """Return a method with the settings that the policy has.

        Raises:
            SafeprojError: they do not go with it.
        """
        found = {"rank": self.rank, "energy": self.energy, "mu": self.mu}
        own: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        if self.projector != DEFAULT_PROJECTOR:
            own["projector"] = self.projector
        # Rank and energy belong to the projector.
        before = given.sources if {"projector", "rank", "energy"} & own.keys() else given.given
        return method_of({**before, **own}, given.name, is_whole=True)

    def threshold_of(self, module: str) -> float:
        """Return the threshold of a module."""
        found = [o.threshold for o in self.overrides if re.search(o.modules, module)]
        return found[-1] if found else self.threshold

    def may_be_below(self, scored: int) -> int:
        """Return how many of so many scored modules may be at or below their threshold."""
        count, share = _below(self.max_below)
        return count if share is None else math.floor(share * scored + 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as safeproj.toml has it, and `file`."""
        return {
            "file": self.file,
            "threshold": self.threshold,
            "max-below": self.max_below,
            "overrides": [dataclasses.asdict(override) for override in self.overrides],
            "coverage": self.coverage,
            **{name: getattr(self, name.replace("-", "_")) for name in LIMITS},
            "evidence": self.evidence.value,
            "projector": self.projector,
            "rank": self.rank,
            "energy": self.energy,
            "mu": self.mu,
            "allow": {name: name in self.allow for name in ALLOWANCES},
            "ignore": sorted(self.ignore),
            "readers": list(self.readers),
            "identities": dict(self.identities),
            "public-key": self.public_key,
            "behaviour": self.behaviour.to_dict(),
        }


def find_policy(given: StrPath | None, checked: Iterable[Src] = ()) -> Policy:
    """Return the policy of a file, or of the current directory's, or the default.

    Args:
        given: the file; if None, `safeproj.toml`, or a `pyproject.toml` with `[tool.safeproj]`.
        checked: the SRC of what is checked, as for `safeproj.check`.

    Raises:
        SafeprojError: it cannot be read, has a field or value that is none of a policy, or lies in
            a directory of adapters without having been given.
    """
    for path in [Path(POLICY_FILE), Path(PYPROJECT)] if given is None else [Path(given)]:
        if given is None and not path.is_file():
            continue
        table = _table(path, required=given is not None)
        if table is not None:
            if given is None:
                _require_outside(path, checked)
            return _parsed(path, table)
    return Policy()


def _require_outside(path: Path, checked: Iterable[Src]) -> None:
    """Refuse a policy that what is checked brings along: it would let itself pass, or others."""
    from safeproj.adapter import FORMATS
    from safeproj.adapter.interface import CONFIG

    beside = [each.name.casefold() for each in path.absolute().parent.iterdir()]
    places = (*path.absolute().parents, *path.resolve().parents)  # it may be a link out of it
    inside = next((place for place in places if (place / CONFIG).is_file()), None)
    if inside is None and any(kind.is_weights(name) for kind in FORMATS for name in beside):
        inside = path.absolute().parent
    if inside is not None:
        raise SafeprojError(
            f"{path}: lies in the adapter {inside.name}, which cannot say what passes; give "
            "--policy, with this file if you trust it"
        )
    directories = {each for source in _all_sources(checked) for each in _directories(source)}
    inside = next((place for place in places if place in directories), None)
    if inside is not None:
        raise SafeprojError(
            f"{path}: lies in {inside.name or inside}, which is checked and cannot say what "
            "passes; give --policy, with this file if you trust it"
        )


def _all_sources(checked: Iterable[Src]) -> Iterator[str]:
    """Yield directories that are checked, and every adapter in them or in lists."""
    from safeproj.adapter.collection import collect

    found = collect(checked, written=False)
    yield from (source for source in found.given if Path(source).expanduser().is_dir())
    yield from (member.source for member in found.members)


def _directories(source: str) -> Iterator[Path]:
    """Yield the local directory that a SRC names, or that its file lies in."""
    path = Path(source).expanduser()
    if source.strip() and path.exists():
        for place in (path.absolute(), path.resolve()):
            yield place if place.is_dir() else place.parent


def _table(path: Path, *, required: bool) -> dict[str, Any] | None:
    text = read_given_text(path, str(path), "a policy, TOML in UTF-8")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SafeprojError(f"{path}: cannot be read as a policy ({first_line(error)})") from error
    if path.name != PYPROJECT:
        return document
    table = document.get("tool", {}).get("safeproj")
    if table is None and required:
        raise SafeprojError(f"{path}: has no [tool.safeproj]")
    if table is not None and not isinstance(table, dict):
        raise SafeprojError(f"{path}: tool.safeproj is no table")
    return table


def _parsed(path: Path, table: Mapping[str, Any]) -> Policy:
    """Return the policy that a table holds: no field is skipped, since a typo would open a gate."""
    readers = {
        "threshold": _number,
        "max-below": _count_or_share,
        "overrides": _overrides,
        "coverage": _number,
        **dict.fromkeys(LIMITS, _number),
        "evidence": _evidence,
        "projector": _string,
        "rank": _count,
        "energy": _number,
        "mu": _number,
        "ignore": _names,
        "readers": _listed,
        "identities": _strings,
        "public-key": _string,
        "behaviour": _demands,
    }
    try:
        _require_known("the policy", table, (*readers, "allow"))
        found: dict[str, Any] = {
            name.replace("-", "_"): readers[name](name, table[name])
            for name in table
            if name != "allow"
        }
        if "allow" in table:
            found["allow"] = _allowed(table["allow"], Policy().allow)
        if "public_key" in found:
            found["public_key"] = (path.parent / found["public_key"]).as_posix()
        return Policy(**found, file=path.as_posix())
    except SafeprojError as error:
        raise SafeprojError(f"{path}: {error.message}") from error


def _allowed(table: object, allowed: frozenset[str]) -> frozenset[str]:
    if not isinstance(table, dict) or not all(type(value) is bool for value in table.values()):
        raise SafeprojError("allow: expected a table of names with true or false")
    _require_known("allow", table, ALLOWANCES)
    return frozenset(name for name in ALLOWANCES if table.get(name, name in allowed))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SafeprojError(f"{name} is {value!r}; expected a number")
    if not abs(value) <= sys.float_info.max:  # NaN, and integers beyond it
        raise SafeprojError(f"{name} is {value!r}; expected a number")
    return float(value)


def _count(name: str, value: object) -> int:
    if type(value) is not int:
        raise SafeprojError(f"{name} is {value!r}; expected a whole number")
    return value


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise SafeprojError(f"{name} is {value!r}; expected text")
    return value


def _listed(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SafeprojError(f"{name} is {value!r}; expected a list of text")
    return tuple(dict.fromkeys(value))


def _names(name: str, value: object) -> frozenset[str]:
    return frozenset(_listed(name, value))


def _strings(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SafeprojError(f"{name} is {value!r}; expected a table of text")
    return value


def _evidence(name: str, value: object) -> Evidence:
    kinds = [kind.value for kind in Evidence]
    if value not in kinds:
        raise SafeprojError(f"{name} is {value!r}; expected {', '.join(kinds)}")
    return Evidence(value)


def _demands(_: str, value: object) -> Demands:
    return demands(value)


def _count_or_share(name: str, value: object) -> int | str:
    if type(value) is not int and not isinstance(value, str):
        raise SafeprojError(f'{name} is {value!r}; expected a whole number or a share like "10%"')
    return value


def _overrides(name: str, value: object) -> tuple[Override, ...]:
    fields = {"modules", "threshold"}
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and item.keys() == fields for item in value
    ):
        raise SafeprojError(f"{name}: expected tables with `modules` and `threshold`, and no more")
    return tuple(
        Override(_string("modules", item["modules"]), _number("threshold", item["threshold"]))
        for item in value
    )


def changed(policy: Policy, given: Mapping[str, Any]) -> Policy:
    """Return the policy with what options say in place of its own.

    Args:
        policy: of a file, or the default.
        given: option without dashes to its value, None or empty where it is not given.

    Raises:
        SafeprojError: an option is none that a policy can have.
    """
    plain = ("threshold", "coverage", *LIMITS, *SETTINGS)
    options = {name: value for name, value in given.items() if value}
    options |= {name: given[name] for name in plain if given.get(name) is not None}
    found: dict[str, Any] = {n.replace("-", "_"): options[n] for n in plain if n in options}
    if "projector" in options and not {"rank", "energy"} & options.keys():
        found |= {"rank": None, "energy": None}  # the file's belong to the file's projector
    if "max-below" in options:
        text = options["max-below"]
        found["max_below"] = int(text) if text.isascii() and text.isdigit() else text
    if "override" in options:
        found["overrides"] = (*policy.overrides, *map(_override, options["override"]))
    if "pin" in options:
        found["identities"] = {**policy.identities, **dict(map(_pin, options["pin"]))}
    if "evidence" in options:
        found["evidence"] = _evidence("evidence", options["evidence"])
    if "public-key" in options:
        found["public_key"] = str(options["public-key"])
    for name, names in (("allow", "allow"), ("forbid", "allow"), ("ignore", "ignore")):
        _require_known(
            f"--{name}", options.get(name, ()), RULES if names == "ignore" else ALLOWANCES
        )
    found["allow"] = policy.allow.union(options.get("allow", ())) - set(options.get("forbid", ()))
    found["ignore"] = policy.ignore.union(options.get("ignore", ()))
    if "behaviour" in options:
        found["behaviour"] = demands(_table_of(options["behaviour"]), policy.behaviour)
    _require_known("--reader", options.get("reader", ()), READERS)
    found["readers"] = tuple(dict.fromkeys((*policy.readers, *options.get("reader", ()))))
    return dataclasses.replace(policy, **found)


def _override(text: str) -> Override:
    """Return the override that `RE=T` says."""
    modules, equals, threshold = text.rpartition("=")
    try:
        return Override(modules, float(threshold if equals and modules else "?"))
    except ValueError:
        raise SafeprojError(
            f"--override {text}: expected RE=T, a pattern and a threshold"
        ) from None


def _table_of(given: Iterable[str]) -> dict[str, Any]:
    """Return the table that `KEY=VALUE` say, with values of TOML or else text.

    Raises:
        SafeprojError: one is of another form.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        table = _toml(f"{key} = {value}") or _toml(f"{key} = {json.dumps(value)}")
        if not table:
            raise SafeprojError(
                f"--behaviour {text}: expected KEY=VALUE, such as max-complied=0.05"
            )
        for name, each in table.items():
            inner = isinstance(each, dict) and isinstance(found.get(name), dict)
            found[name] = {**found[name], **each} if inner else each
    return found


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError:
        return {}


def _pin(text: str) -> tuple[str, str]:
    """Return role and identity that `ROLE=IDENTITY` says."""
    role, equals, identity = text.partition("=")
    if not equals:
        raise SafeprojError(f"--pin {text}: expected ROLE=IDENTITY, such as base=org/name@commit")
    return role, identity


def _below(value: int | str) -> tuple[int, float | None]:
    """Return the number, or the share, of modules that may be at or below their threshold."""
    if isinstance(value, int):
        if value < 0:
            raise SafeprojError(f"max-below must be 0 or more, found {value}")
        return value, None
    match = _PERCENT.fullmatch(value)
    if match is None or float(match[1]) > 100.0:
        raise SafeprojError(f"max-below is {value!r}; expected a number or a share like 10%")
    return 0, float(match[1]) / 100.0


def _require_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise SafeprojError(f"{name} must lie in [0, 1], found {value}")


def _require_known(what: str, given: Any, known: Any) -> None:
    names: Sequence[str] = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}" if close else f"known are {', '.join(names)}"
            raise SafeprojError(f"{what}: {name!r} is not known; {hint}")


def write_template(path: Path) -> None:
    """Write a policy with every field, its default and what it means.

    Raises:
        SafeprojError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise SafeprojError(f"{path}: exists; edit it, or remove it first") from None
    except OSError as error:
        raise SafeprojError(f"{path}: cannot be written ({error.strerror or error})") from error


TEMPLATE = """\
# What `safeproj check` lets pass. Every field is shown with its default; each is an option too.
# `safeproj rule ID` explains a finding, such as SP001.

# A module whose update has this cosine or less with its projection counts against the adapter,
# unless it was projected (SP001).
threshold = 0.35

# How many modules may do so: a number, or a share of the scored modules such as "10%".
max-below = 0

# The share of the adapted modules that must have been scored (SP003).
coverage = 1.0

# Limits to how far updates go: the scaling s that the config sets, and the norm of an update
# relative to that of aligned - base (SP012).
max-scaling = 64.0
max-size = 25.0

# The same for the part of an update that points away from its projection, and for the part in
# output directions in which alignment moved the weight next to not at all (SP037): a further part
# along alignment lifts a cosine, and leaves these two where they are.
max-outside = 20.0
max-unseen = 0.1

# How much of an update may change where servers cast its factors to another dtype (SP036).
max-cast-change = 0.05

# What must show that a module was projected: "recorded" takes the word of safeproj.json for
# tensors with the digests it names, "signed" wants that signed by public-key as well, and
# "recomputed" wants it computed again from the adapter before patching (--original).
evidence = "recorded"

# Which projector is scored with. "exact" needs rank or energy.
projector = "approx"
# rank = 64
# energy = 0.9

# The mu of the covariance-weighted correction, with --safety-data.
# mu = 0.3

# Ids of findings to leave out, such as "SP013".
ignore = []

# Programs that must read the adapter as it was scored (SP042): "vllm", "sglang", "llama.cpp",
# "ollama", "openvino", "peft-0.11".
readers = []

# The key that the directory must be signed by, relative to this file (SP032).
# public-key = "release.pub.pem"

[allow]
full-weight-changes = false  # SP004: modules_to_save, biases, trainable tokens
unknown-tensors = false      # SP005
unmatched-modules = false    # SP006: adapted modules that the model does not have
dora-magnitudes = false      # SP007
empty-updates = true         # SP008
other-weights = false        # SP014: further weights in the directory
other-base-model = true      # SP018: the config names another model, or revision of it
imports = true               # SP019: Python code that the config names
missing-provenance = true    # SP020: no safeproj.json
conditional-updates = false  # SP043: updates that a trigger or a router switches on
unjudged-settings = true     # SP044: settings of the config that no score covers
unmeasured-behaviour = true  # SP045: no evaluation; a note of adapters that were patched
training-state = false       # SP050: what trainers keep, pickles that run code when loaded

# What must be checked against (SP030): org/name@commit on the Hub; for local directories and files
# sha256: and the digest that the finding names.
[identities]
# base = "org/base@0123456789abcdef0123456789abcdef01234567"
# aligned = "sha256:..."

# Another threshold for modules whose name matches; the last one that matches counts.
# [[overrides]]
# modules = 'layers\\.[01]\\.'
# threshold = 0.2
"""

TEMPLATE += BEHAVIOUR
