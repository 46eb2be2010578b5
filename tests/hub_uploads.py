"""What the loopback Hub answers to uploads: repositories, branches, LFS batches and commits.

It is the protocol of `huggingface_hub` without Xet storage: a repository is made, each file is said
to be regular or large, large ones are put into the storage host by signed URLs, and a commit names
all of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")

_CREATE, _YAML = "/api/repos/create", "/api/validate-yaml"
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_STORED = re.compile(r"/upload/(?P<oid>[0-9a-f]{64})")
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit|branch)/(?P<revision>.+)"
)

Answer = tuple[HTTPStatus, dict[str, Any]]


@dataclass
class Uploads:
    """What was uploaded.

    Attributes:
        trouble: `storage` to take no large file, `commit` to refuse the commit.
        stored: large files by their SHA-256.
        pull_requests: what commits with `create_pr` held.
    """

    trouble: Literal["storage", "commit"] | None = None
    stored: dict[str, bytes] = field(default_factory=dict)
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)


def answer(hub: Any, path: str, body: bytes, token: str | None) -> Answer:
    """Return the answer to a POST or PUT.

    Args:
        hub: the `Hub`.
        path: with the query.
        body: of the request.
        token: the bearer token.
    """
    place, query = urlsplit(path).path, parse_qs(urlsplit(path).query)
    stored = _STORED.fullmatch(place)
    if stored:
        return _store(hub, stored["oid"], body, token)
    if place == _YAML:
        return HTTPStatus.OK, {"warnings": [], "errors": []}
    given = {} if place.startswith("/api/models") and "/commit/" in place else json.loads(body)
    found = _BATCH.fullmatch(place) or _API.fullmatch(place)
    repo = unquote(found["repo"]) if found else "/".join(
        filter(None, (given.get("organization"), given.get("name")))
    )  # fmt: skip
    if token is None or repo not in hub._tokens.get(token, ()):
        return HTTPStatus.FORBIDDEN, {"error": "You don't have the rights to write here"}
    if place == _CREATE:
        return _create(hub, repo, given)
    if repo not in hub._repositories:
        return HTTPStatus.NOT_FOUND, {"error": "Repository not found"}
    if _BATCH.fullmatch(place):
        return HTTPStatus.OK, _batch(hub, given)
    assert found is not None
    if found["what"] == "preupload":
        return HTTPStatus.OK, {"files": [_mode(each["path"]) for each in given["files"]]}
    revision = unquote(found["revision"])
    if found["what"] == "branch":
        return _branch(hub, repo, revision)
    return _commit(hub, repo, revision, body, is_pull_request="create_pr" in query)


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def _create(hub: Any, repo: str, given: dict[str, Any]) -> Answer:
    if repo in hub._repositories:
        return HTTPStatus.CONFLICT, {"url": f"{hub.url}/{repo}", "error": "exists"}
    is_private = given.get("private") is True or given.get("visibility") == "private"
    hub.publish(repo, {".gitattributes": b""}, private=is_private)
    return HTTPStatus.OK, {"url": f"{hub.url}/{repo}", "name": repo}


def _branch(hub: Any, repo: str, branch: str) -> Answer:
    repository = hub._repositories[repo]
    if branch in repository.refs:
        return HTTPStatus.CONFLICT, {"error": "exists"}
    repository.refs[branch] = repository.refs["main"]
    return HTTPStatus.OK, {}


def _batch(hub: Any, given: dict[str, Any]) -> dict[str, Any]:
    objects = []
    for each in given["objects"]:
        action = {"upload": {"href": f"{hub.storage_url}/upload/{each['oid']}", "header": {}}}
        objects.append({**each, "authenticated": True, "actions": action})
    return {"transfer": "basic", "objects": objects}


def _store(hub: Any, oid: str, body: bytes, token: str | None) -> Answer:
    if token is not None:
        return HTTPStatus.BAD_REQUEST, {"error": "Only one auth mechanism allowed"}
    if hub.uploads.trouble == "storage":
        return HTTPStatus.FORBIDDEN, {"error": "the signed URL has expired"}
    assert hashlib.sha256(body).hexdigest() == oid
    hub.uploads.stored[oid] = body
    return HTTPStatus.OK, {}


def _commit(hub: Any, repo: str, revision: str, body: bytes, *, is_pull_request: bool) -> Answer:
    if hub.uploads.trouble == "commit":
        return HTTPStatus.BAD_REQUEST, {"error": "the commit was refused"}
    repository = hub._repositories[repo]
    commit = repository.commit(revision)
    if commit is None:
        return HTTPStatus.NOT_FOUND, {"error": f"Invalid rev id: {revision}"}
    files = dict(repository.commits[commit])
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.uploads.stored[value["oid"]]
    if is_pull_request:
        hub.uploads.pull_requests.append(files)
        url = f"{hub.url}/{repo}/discussions/1"
        return HTTPStatus.OK, {
            "commitUrl": f"{hub.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40,
            "pullRequestUrl": url,
        }  # fmt: skip
    oid = hub.publish(repo, files, revision, private=repository.private, gated=repository.gated)
    return HTTPStatus.OK, {
        "commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True,
    }  # fmt: skip
