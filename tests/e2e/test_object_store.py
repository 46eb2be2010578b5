"""Weights in an object store: the command against an S3-compatible server process."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Trio
from tests.support import assert_refused, safeproj

pytest.importorskip("moto", reason="needs moto[server]")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs")

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "eu-west-1",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="module")
def store(trio: Trio) -> Iterator[str]:
    """The address of a server that has the models in a bucket."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        files = client(address)
        files.mkdir("models")
        for each in ("base", "aligned", "adapter"):
            files.put(str(getattr(trio, each)), f"models/{each}", recursive=True)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def client(address: str) -> Any:
    """Return a file system for the server, as another program has it."""
    return s3fs.S3FileSystem(
        key="testing",
        secret="testing",
        endpoint_url=address,
        client_kwargs={"region_name": "eu-west-1"},
        skip_instance_cache=True,
        use_listings_cache=False,
    )


@dataclass
class Line:
    """What is between the command and the server.

    Attributes:
        store: the address of the server.
        address: what the command takes for it.
        fault: what goes wrong with the answers about parts of weights.
        times: how many of them.
        ranges: those that were asked for.
    """

    store: str
    address: str = ""
    fault: str = ""
    times: int = 0
    ranges: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, path: str, asked: str) -> str:
        """Return what goes wrong with an answer."""
        with self.lock:
            self.ranges.append(asked)
            if self.times <= 0:
                return ""
            self.times -= 1
        if self.fault == "changed":
            client(self.store).pipe(path.strip("/"), b"another")
            return ""
        return self.fault


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on, and spoils answers."""

    protocol_version = "HTTP/1.1"
    line: Line

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""

    def do_GET(self) -> None:
        asked, path = self.headers.get("Range"), self.path.partition("?")[0]
        is_part = asked is not None and path.endswith(".safetensors")
        wrong = self.line.wrong(path, str(asked)) if is_part else ""
        place = self.line.store.removeprefix("http://")
        connection = http.client.HTTPConnection(place, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        status = {"unavailable": 503, "busy": 429}.get(wrong, answer.status)
        self.send_response(status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if wrong in ("unavailable", "busy"):
            content = b""
        length = int(answer.headers.get("Content-Length") or 0)
        self.send_header("Content-Length", str(length if self.command == "HEAD" else len(content)))
        self.end_headers()
        if wrong == "reset":
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)
        if wrong == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815


@pytest.fixture
def line(store: str) -> Iterator[Line]:
    line = Line(store)
    handler = type("Between", (Proxy,), {"line": line})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        line.address = f"http://127.0.0.1:{server.server_port}"
        yield line
        server.shutdown()
        thread.join()


def run(line: Line, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command on what is in the bucket."""
    inputs = [f"--{each}=s3://models/{each}" for each in ("base", "aligned", "adapter")]
    variables = {**KEYS, "AWS_ENDPOINT_URL": line.address}
    return safeproj(words[0], *inputs, "--download", "never", *words[1:], env=variables)


@pytest.fixture(scope="module")
def expected(trio: Trio) -> Any:
    result = safeproj("inspect", *trio.arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["modules"]


@pytest.mark.parametrize("fault", ["", "reset", "unavailable", "busy"])
def test_a_bucket_gives_the_scores_of_the_same_local_directories(
    line: Line, expected: Any, fault: str
) -> None:
    line.fault, line.times = fault, 2 if fault else 0
    result = run(line, "inspect", "--format", "json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["modules"] == expected
    assert line.ranges and all(re.fullmatch(r"bytes=\d+-\d+", each) for each in line.ranges)
    assert line.times == 0


def test_an_object_that_changes_ends_in_one_line(line: Line, tmp_path: Path, trio: Trio) -> None:
    line.fault, line.times = "changed", 1
    try:
        result = run(line, "patch", "--all", "--out", tmp_path / "out")
    finally:
        for each in ("base", "aligned"):
            client(line.store).put(f"{getattr(trio, each)}/", f"models/{each}/", recursive=True)
    assert_refused(result, "s3://models/", ".safetensors", "changed while it was read")
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_is_not_there_ends_in_one_line(line: Line) -> None:
    result = run(line, "inspect", "--aligned", "s3://nothing/here")
    assert_refused(result, "s3://nothing/here")


def test_an_object_store_that_is_not_there_ends_in_one_line() -> None:
    nowhere = Line("", "http://127.0.0.1:9")
    assert_refused(run(nowhere, "inspect"), "s3://models/", "could not be looked at")
