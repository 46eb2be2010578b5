"""Whether what was checked against is what the policy pins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from safeproj.gate.policy import Policy
from safeproj.gate.weights import found
from safeproj.methods.interface import Method, local_path
from safeproj.records.checks import Finding
from safeproj.storage.source import file_sha256, hub_place, open_folder

_WEIGHTS = (".safetensors", ".bin")


def about_identities(
    policy: Policy, method: Method, inputs: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """Yield the pins that what was read does not meet.

    Args:
        policy: its `identities` count.
        method: what the user gave.
        inputs: of the report: role to `source`, and `revision` from the Hub.
    """
    digests: dict[str, str] = {}
    for role, pinned in policy.identities.items():
        given = inputs.get(role.replace("-", "_"))
        if given is None:
            yield found("SP031", f"{role} is pinned, and this check uses none")
        elif pinned.startswith("sha256:"):
            yield from _by_digest(role, pinned, method, digests)
        else:
            yield from _by_revision(role, pinned, given)


def _by_revision(role: str, pinned: str, given: Mapping[str, Any]) -> Iterator[Finding]:
    place = hub_place(str(given["source"]))
    repo = str(given["source"]).partition("@")[0] if place is None else place.name
    revision = given.get("revision")
    if f"{repo}@{revision}" != pinned:
        what = f"{repo}@{revision}" if revision else f"{repo}, which is local"
        yield found("SP030", f"{role} is {what}; the policy pins {pinned}")


def _by_digest(
    role: str, pinned: str, method: Method, digests: dict[str, str]
) -> Iterator[Finding]:
    source = method.sources.get(role.replace("-", "_"))
    if source is None:
        yield found("SP031", f"{role} is pinned by digest, and a file stands for it; pin the file")
    elif local_path(source) is None:
        yield found("SP031", f"{role} is on the Hub; pin it as org/name@commit")
    else:
        digest = digests.setdefault(source, f"sha256:{digest_of(source)}")
        if digest != pinned:
            yield found("SP030", f"{role} is {digest}; the policy pins {pinned}")


def digest_of(source: str) -> str:
    """Return the digest by which a local file or checkpoint is pinned.

    That of the file; of a directory with several files of weights, that of their listing as
    `sha256sum` prints it for these files in order of their names.
    """
    folder = open_folder(source)
    names = sorted(n for n in folder.files if "/" not in n and n.endswith(_WEIGHTS))
    found = {name: file_sha256(folder.path(name)) for name in names}
    if len(found) == 1:
        return next(iter(found.values()))
    listing = "".join(f"{sha256}  {name}\n" for name, sha256 in found.items())
    return hashlib.sha256(listing.encode()).hexdigest()
