"""A Hugging Face Hub on the loopback interface: the endpoints that `huggingface_hub` reads from.

It answers over HTTP as the public Hub does: information and file lists per revision, `resolve`
URLs with commit and entity tag, byte ranges, large files through a redirect to a storage host of
another origin (which refuses a bearer token, as signed URLs do), and the error codes for what is
missing, gated or private. It offers no Xet storage. It notes every request, and does what networks
and storage hosts do wrong (`Fault`).
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mmap import mmap
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from tests import hub_uploads

Content = bytes | mmap
"""A file."""

CHUNK = 256 << 10
"""Bytes that are sent at a time."""

LARGE = (".safetensors", ".bin")
"""Files that the storage host serves."""

STALL_SECONDS = 15
"""How long a request of a stalled Hub waits before its connection is closed without an answer."""

HINT = "unauthenticated; You are sending unauthenticated requests to the Hub; set a token"
"""What the public Hub sends along with answers to requests without a token."""

_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(resolve|storage)/(?P<revision>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(?P<first>\d+)-(?P<last>\d*)")


@dataclass(frozen=True)
class Request:
    """One request and its answer.

    Attributes:
        method: of HTTP.
        path: as sent, without the query.
        repo: the repository, None where the path names none.
        revision: the revision in the path, None where it names none.
        file: the file in the path, None where it names none.
        range: the `Range` header.
        token: the bearer token.
        status: of the answer.
        sent: bytes of the answer's body.
    """

    method: str
    path: str
    repo: str | None
    revision: str | None
    file: str | None
    range: str | None
    token: str | None
    status: int
    sent: int

    @property
    def downloads(self) -> bool:
        """Whether it was answered with a file, all of it."""
        return self.method == "GET" and self.file is not None and self.status == HTTPStatus.OK


@dataclass
class Fault:
    """What goes wrong with answers of the storage host that are about a part of a file.

    Attributes:
        kind: `reset`: the connection breaks in the middle; `wrong range`: another `Content-Range`;
            `whole`: all of the file with status 200; `changed`: another `ETag`; `short`: half of
            the body; `long`: a byte too many; `trickle`: a byte every fifth of a second; `busy`:
            429 with `Retry-After`; `unavailable`: 503; `moved`: a redirect to a third host;
            `expired`: the signatures of all addresses so far are no longer valid.
        times: how many answers.
        after: how many answers are right before them.
        met: how many there were.
    """

    kind: str
    times: int = 1
    after: int = 0
    met: int = 0


@dataclass
class Repository:
    """A model repository: `commits` maps a commit to its files, `refs` a name to a commit."""

    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """Return the commit that a branch, tag or commit names, None if there is none."""
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """The server: it listens from its creation until `close`.

    Attributes:
        requests: all requests so far, in the order in which they were answered.
        fault: what the storage host does wrong.
        signature: that of the addresses of the storage host which are valid.
        delay: seconds before an answer begins.
        rate: bytes per second of all bodies together, None for no bound.
        uploads: what was written to it.
        hint: the `X-HF-Warning` header of answers to requests without a token.
        trouble: `stall` to answer nothing at all, `unavailable` to answer 503 to everything.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fault: Fault | None = None
        self.signature = 0
        self.delay = 0.0
        self.rate: float | None = None
        self.hint: str | None = None
        self.trouble: Literal["stall", "unavailable"] | None = None
        self.closing = threading.Event()
        self.uploads = hub_uploads.Uploads()
        self._repositories: dict[str, Repository] = {}
        self._tokens: dict[str, frozenset[str]] = {}
        self._lock, self._sent_until = threading.Lock(), 0.0
        self._main, self._storage, self._third = (_Listener(self) for _ in range(3))

    @property
    def url(self) -> str:
        """What belongs into `HF_ENDPOINT`."""
        return self._main.url

    @property
    def storage_url(self) -> str:
        """Where large files are; another origin than `url`."""
        return self._storage.url

    def close(self) -> None:
        """Stop listening."""
        self.closing.set()
        self._main.stop()
        self._storage.stop()
        self._third.stop()

    def wrong(self) -> str:
        """Return what goes wrong with the next answer about a part of a file, empty if nothing."""
        with self._lock:
            fault = self.fault
            if fault is None:
                return ""
            fault.met += 1
            return fault.kind if fault.after < fault.met <= fault.after + fault.times else ""

    def wait(self, count: int) -> None:
        """Wait until so many more bytes may be sent."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._sent_until = max(self._sent_until, now) + count / self.rate
            wait = self._sent_until - now
        time.sleep(max(0.0, wait))

    @property
    def leaked(self) -> list[Request]:
        """Requests with a token to another host than the Hub's."""
        return [r for r in self.requests if r.token is not None and "/storage/" in r.path]

    def publish(
        self,
        repo: str,
        files: Path | Mapping[str, Content],
        revision: str = "main",
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit a directory of files to a branch or tag and return the commit.

        A file that is too large for the memory can be mapped.
        """
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        digest = hashlib.sha1(f"{repo}@{revision}".encode())
        for name, content in files.items():
            digest.update(f"{name} {_etag(name, content)}".encode())
        repository = self._repositories.setdefault(repo, Repository())
        repository.commits[digest.hexdigest()] = dict(files)
        repository.refs[revision] = digest.hexdigest()
        repository.private, repository.gated = private, gated
        return digest.hexdigest()

    def grant(self, token: str, *repos: str) -> None:
        """Make a token valid; it opens these private or gated repositories."""
        self._tokens[token] = frozenset(repos)

    def downloads(self, repo: str) -> list[str]:
        """Return the files of a repository that were sent whole, in that order."""
        return [r.file for r in self.requests if r.repo == repo and r.downloads and r.file]

    def touched(self, repo: str) -> set[str]:
        """Return the files of a repository that any request was about."""
        return {r.file for r in self.requests if r.repo == repo and r.file}

    def _find(self, repo: str, revision: str | None, token: str | None) -> _Found | _Refusal:
        """Look up a revision as the owner of the token sees it."""
        if token is not None and token not in self._tokens:
            return _Refusal(
                HTTPStatus.UNAUTHORIZED, None, "Invalid credentials in Authorization header"
            )
        repository = self._repositories.get(repo)
        granted = token is not None and repo in self._tokens[token]
        if repository is None or (repository.private and not granted):
            if token is None:
                return _Refusal(
                    HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password."
                )
            return _Refusal(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        commit = repository.commit("main" if revision is None else revision)
        if commit is None:
            return _Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return _Found(repository, commit, locked=repository.gated and not granted)


@contextmanager
def running() -> Iterator[Hub]:
    """Run a Hub for the duration of a block."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


@dataclass(frozen=True)
class _Found:
    repository: Repository
    commit: str
    locked: bool

    @property
    def files(self) -> dict[str, Content]:
        return self.repository.commits[self.commit]

    def info(self, repo: str) -> dict[str, object]:
        """Return what the Hub says about the repository at this commit."""
        return {
            "id": repo,
            "modelId": repo,
            "sha": self.commit,
            "private": self.repository.private,
            "gated": "auto" if self.repository.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(self.files)],
        }

    def tree(self) -> list[dict[str, object]]:
        """Return the list of all files with sizes and object ids."""
        found: list[dict[str, object]] = []
        for name, content in sorted(self.files.items()):
            size, etag = len(content), _etag(name, content)
            entry = {"type": "file", "path": name, "size": size, "oid": etag}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
            found.append(entry)
        return found


@dataclass(frozen=True)
class _Refusal:
    status: HTTPStatus
    code: str | None
    message: str


class _Listener(ThreadingHTTPServer):
    """One origin, with a thread of its own."""

    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def shutdown_request(self, request: Any) -> None:
        """Close a connection at once: one that is to be reset must not be ended in order before."""
        self.close_request(request)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._upload()

    def do_PUT(self) -> None:
        self._upload()

    def _upload(self) -> None:
        """Answer what is written; `tests.hub_uploads` says what."""
        body = self._body()
        self._request: dict[str, str | None] = dict.fromkeys(("repo", "revision", "file"))
        status, found = hub_uploads.answer(self.server.hub, self.path, body, self._token)
        headers = {"Content-Type": "application/json"}
        if "error" in found:
            headers["X-Error-Message"] = found["error"]
        self._send(status, json.dumps(found).encode(), headers)

    def _body(self) -> bytes:
        """Return the body of a request, which may come in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _respond(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        found = api or file
        self._request = {
            "repo": unquote(found["repo"]) if found else None,
            "revision": unquote(found["revision"]) if found and found["revision"] else None,
            "file": unquote(file["file"]) if file else None,
        }
        if hub.trouble == "stall":
            hub.closing.wait(STALL_SECONDS)
            self._note(0, 0)
            self.close_connection = True
        elif hub.trouble == "unavailable":
            self._refuse(_Refusal(HTTPStatus.SERVICE_UNAVAILABLE, None, "Service unavailable"))
        elif self.server.url != hub.url and file:
            self._serve_storage(*map(unquote, file.group("repo", "revision", "file")))
        elif api:
            self._serve_api(api["what"] == "tree")
        elif file:
            self._serve_file(*map(unquote, file.group("repo", "revision", "file")))
        else:
            self._refuse(_Refusal(HTTPStatus.NOT_FOUND, None, "Not found"))

    def _serve_api(self, tree: bool) -> None:
        repo, revision = str(self._request["repo"]), self._request["revision"]
        found = self.server.hub._find(repo, revision, self._token)
        if isinstance(found, _Refusal):
            self._refuse(found)
            return
        answer = found.tree() if tree else found.info(repo)
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _serve_file(self, repo: str, revision: str, file: str) -> None:
        found = self.server.hub._find(repo, revision, self._token)
        if isinstance(found, _Refusal):
            self._refuse(found)
        elif found.locked:
            known = self._token is not None
            status = HTTPStatus.FORBIDDEN if known else HTTPStatus.UNAUTHORIZED
            self._refuse(_Refusal(status, "GatedRepo", f"Access to model {repo} is restricted."))
        elif file not in found.files:
            self._refuse(
                _Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found"),
                {"X-Repo-Commit": found.commit},
            )
        else:
            content = found.files[file]
            headers = {"X-Repo-Commit": found.commit, "ETag": f'"{_etag(file, content)}"'}
            if file.endswith(LARGE):
                headers["X-Linked-Etag"] = headers.pop("ETag")
                headers["X-Linked-Size"] = str(len(content))
                headers["Location"] = (
                    f"{self.server.hub.storage_url}/{repo}/storage/{found.commit}/"
                    f"{quote(file)}?signature={self.server.hub.signature}"
                )
                self._send(HTTPStatus.FOUND, b"", headers)
            else:
                self._send_content(content, headers)

    def _serve_storage(self, repo: str, commit: str, file: str) -> None:
        if "Authorization" in self.headers:
            # A signed URL is all the authentication there is; the token must not leave the Hub.
            self._refuse(_Refusal(HTTPStatus.BAD_REQUEST, None, "Only one auth mechanism allowed"))
            return
        hub = self.server.hub
        wrong = hub.wrong() if self.server is hub._storage and "Range" in self.headers else ""
        if wrong == "expired":
            hub.signature += 1
        if urlsplit(self.path).query != f"signature={hub.signature}":
            self._refuse(_Refusal(HTTPStatus.FORBIDDEN, None, "Request has expired"))
        elif wrong == "unavailable":
            self._refuse(_Refusal(HTTPStatus.SERVICE_UNAVAILABLE, None, "Slow down"))
        elif wrong == "busy":
            headers = {"Retry-After": "1"}
            self._refuse(_Refusal(HTTPStatus.TOO_MANY_REQUESTS, None, "Slow down"), headers)
        elif wrong == "moved":
            self._send(HTTPStatus.FOUND, b"", {"Location": f"{hub._third.url}{self.path}"})
        else:
            content = hub._repositories[repo].commits[commit][file]
            etag = "another" if wrong == "changed" else _etag(file, content)
            self._send_content(content, {"ETag": f'"{etag}"'}, wrong)

    def _send_content(self, content: Content, headers: Mapping[str, str], wrong: str = "") -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        part = _RANGE.fullmatch(self.headers.get("Range", "").strip())
        if part is None or wrong == "whole":
            self._send(HTTPStatus.OK, content, headers)
            return
        first = int(part["first"])
        last = min(int(part["last"] or len(content)), len(content) - 1)
        if first > last:
            headers["Content-Range"] = f"bytes */{len(content)}"
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
            return
        moved = 1 if wrong == "wrong range" else 0
        headers["Content-Range"] = f"bytes {first + moved}-{last + moved}/{len(content)}"
        body = content[first : last + 1]
        if wrong == "short":
            body = body[: len(body) // 2]
        elif wrong == "long":
            body += b"+"
        self._send(HTTPStatus.PARTIAL_CONTENT, body, headers, wrong)

    def _refuse(self, refusal: _Refusal, headers: Mapping[str, str] | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Message": refusal.message}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        headers["Content-Type"] = "application/json"
        self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _send(
        self, status: HTTPStatus, body: Content, headers: Mapping[str, str], wrong: str = ""
    ) -> None:
        time.sleep(self.server.hub.delay)
        sent = 0 if self.command == "HEAD" else len(body)
        self._note(status, sent)  # before the client can act on the answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.hub.hint is not None and self._token is None:
            self.send_header("X-HF-Warning", self.server.hub.hint)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if sent:
            self._send_body(memoryview(body), wrong)

    def _send_body(self, body: memoryview, wrong: str) -> None:
        hub = self.server.hub
        try:
            if wrong == "reset":
                self.wfile.write(body[: len(body) // 2])
                linger = struct.pack("ii", 1, 0)  # what is closed so is reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                return
            step = 1 if wrong == "trickle" else CHUNK
            for at in range(0, len(body), step):
                if wrong == "trickle" and hub.closing.wait(0.2):
                    return
                hub.wait(len(body[at : at + step]))
                self.wfile.write(body[at : at + step])
        except OSError:  # the client has seen enough
            self.close_connection = True

    @property
    def _token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    def _note(self, status: int, sent: int) -> None:
        self.server.hub.requests.append(
            Request(
                method=self.command,
                path=urlsplit(self.path).path,
                **self._request,
                range=self.headers.get("Range"),
                token=self._token,
                status=status,
                sent=sent,
            )
        )


def _etag(name: str, content: Content) -> str:
    """Return the object id: SHA-256 of a large file, git's SHA-1 of a small one."""
    if isinstance(content, mmap):  # which would take long
        return hashlib.sha256(f"{name} {len(content)}".encode() + content[: 1 << 20]).hexdigest()
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
