"""Signatures of adapter directories: what makes one valid, and everything that does not."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from safeproj.adapter.interface import SIGNATURE
from safeproj.cli.sign import sign_command
from safeproj.errors import SafeprojError
from safeproj.gate import signing
from safeproj.gate.signing import sign, verify_signature
from tests.conftest import Trio
from tests.support import CONFIG, FACTORS, assert_refused, safeproj, snapshot

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
CLEAR = serialization.NoEncryption()


@dataclass(frozen=True)
class Keys:
    """A key pair on disk."""

    private: Path
    public: Path


def make_keys(folder: Path, key: Any = None, password: bytes | None = None) -> Keys:
    """Write a key pair, on P-256 unless another key is given."""
    folder.mkdir(parents=True)
    key = key or ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else CLEAR
    keys = Keys(folder / "key.pem", folder / "pub.pem")
    keys.private.write_bytes(key.private_bytes(PEM, PKCS8, encryption))
    public = key.public_key()
    keys.public.write_bytes(
        public.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture
def adapter(trio: Trio, tmp_path: Path) -> Path:
    """An adapter as it lies in a repository: with hidden files and a subdirectory."""
    place = Path(shutil.copytree(trio.adapter, tmp_path / "adapter"))
    (place / ".gitattributes").write_text("*.safetensors filter=lfs\n", "utf-8")
    (place / "eval").mkdir()
    (place / "eval" / "scores.json").write_text("{}\n", "utf-8")
    return place


@pytest.fixture
def signed(adapter: Path, keys: Keys) -> Path:
    sign(adapter, keys.private)
    return adapter


def reason(directory: Path, keys: Keys) -> str:
    """Return why the signature is not valid: one line."""
    found = verify_signature(directory, keys.public)
    assert found is not None
    assert len(found.splitlines()) == 1
    assert len(found) < 600
    return found


# What is valid.


def test_a_signed_adapter_is_valid(adapter: Path, keys: Keys) -> None:
    before = snapshot(adapter)

    place = sign(adapter, keys.private)

    assert place == adapter / SIGNATURE
    assert verify_signature(adapter, keys.public) is None
    after = snapshot(adapter)
    assert {name: after[name] for name in before} == before
    assert set(after) == {*before, SIGNATURE}


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_the_curves_of_the_format_are_taken(
    adapter: Path, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    pair = make_keys(tmp_path / "pair", ec.generate_private_key(curve))
    sign(adapter, pair.private)
    assert verify_signature(adapter, pair.public) is None


def test_the_directory_may_be_moved(signed: Path, keys: Keys, tmp_path: Path) -> None:
    assert verify_signature(signed.rename(tmp_path / "elsewhere"), keys.public) is None


def test_a_relative_directory_and_a_link_to_it_are_verified(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = signed.with_name("link")
    link.symlink_to(signed)
    monkeypatch.chdir(signed)
    assert verify_signature(Path(), keys.public) is None
    assert verify_signature(link, keys.public) is None


def test_an_encrypted_key_signs_with_its_password(adapter: Path, tmp_path: Path) -> None:
    pair = make_keys(tmp_path / "pair", password="pä ss".encode())
    sign(adapter, pair.private, "pä ss")
    assert verify_signature(adapter, pair.public) is None


def test_a_repository_may_be_signed_and_committed(adapter: Path, keys: Keys) -> None:
    git(adapter, "init", "-q")
    (adapter / ".git" / "link").symlink_to("nowhere")
    sign(adapter, keys.private)
    git(adapter, "add", ".")
    git(adapter, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "sign")

    assert verify_signature(adapter, keys.public) is None

    # Only the one at the top is left out, and only if it is one.
    (adapter / "eval" / ".git").mkdir()
    (adapter / "eval" / ".git" / "payload.bin").write_bytes(b"x")
    assert "eval/.git/payload.bin not signed" in reason(adapter, keys)


def test_a_link_in_place_of_git_is_refused(signed: Path, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "payload").mkdir()
    (signed / ".git").symlink_to(tmp_path / "payload")
    assert ".git is a link" in reason(signed, keys)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


# Tampering with the files.


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [FACTORS, CONFIG, "README.md", ".gitattributes"])
def test_a_changed_bit_is_found(signed: Path, keys: Keys, name: str) -> None:
    flip(signed / name)
    assert f"{name} changed" in reason(signed, keys)


@pytest.mark.parametrize(
    "name",
    [
        "extra.bin",
        ".hidden",
        ".gitignore",
        ".github/workflows/run.yml",
        ".cache/payload.py",
        ".cache/huggingface/x.metadata",
        "eval/extra.json",
        "eval/.git",
        "eval/model.sig",
        "deep/er/still/x",
        "pytorch_model.bin",
        ".model.sig.0.tmp",
        "model.sig.bak",
        "new\nline",
    ],
)
def test_an_added_file_is_found(signed: Path, keys: Keys, name: str) -> None:
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("x", "utf-8")
    shown = name.replace("\n", "\\n")
    assert f"{shown} not signed" in reason(signed, keys)


@pytest.mark.parametrize("name", [FACTORS, "README.md", ".gitattributes", "eval/scores.json"])
def test_a_removed_file_is_found(signed: Path, keys: Keys, name: str) -> None:
    (signed / name).unlink()
    assert f"{name} missing" in reason(signed, keys)


def test_a_renamed_file_is_found(signed: Path, keys: Keys) -> None:
    (signed / "README.md").rename(signed / "readme.md")
    found = reason(signed, keys)
    assert "README.md missing" in found
    assert "readme.md not signed" in found


def test_two_files_that_changed_places_are_found(signed: Path, keys: Keys) -> None:
    (signed / CONFIG).rename(signed / "x")
    (signed / "README.md").rename(signed / CONFIG)
    (signed / "x").rename(signed / "README.md")
    assert "README.md, adapter_config.json changed" in reason(signed, keys)


def test_many_differences_fit_on_a_line(signed: Path, keys: Keys) -> None:
    for number in range(500):
        (signed / f"{number:03}.bin").write_bytes(b"")
    assert "000.bin, 001.bin, 002.bin, and 497 more not signed" in reason(signed, keys)


@pytest.mark.parametrize("where", ["link", "eval/link", ".cache/link"])
@pytest.mark.parametrize("target", ["README.md", "eval", "nowhere", ".."])
def test_an_added_link_is_found(signed: Path, keys: Keys, where: str, target: str) -> None:
    (signed / where).parent.mkdir(exist_ok=True)
    (signed / where).symlink_to(signed / target)
    assert f"{where} is a link" in reason(signed, keys)


def test_a_file_that_became_a_link_to_the_same_content_is_found(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    (signed / FACTORS).rename(tmp_path / FACTORS)
    (signed / FACTORS).symlink_to(tmp_path / FACTORS)
    assert f"{FACTORS} is a link" in reason(signed, keys)


def test_a_pipe_is_found_and_not_waited_for(signed: Path, keys: Keys) -> None:
    os.mkfifo(signed / "pipe")
    assert "pipe is neither a file nor a directory" in reason(signed, keys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_no_pass(signed: Path, keys: Keys) -> None:
    (signed / "eval").chmod(0)
    try:
        assert "eval cannot be read" in reason(signed, keys)
    finally:
        (signed / "eval").chmod(0o755)


def test_a_name_that_is_not_utf8_is_found(signed: Path, keys: Keys) -> None:
    try:
        (signed / os.fsdecode(b"\xff.bin")).write_bytes(b"")
    except OSError:
        pytest.skip("the file system has only names in UTF-8")
    assert "is not UTF-8" in reason(signed, keys)


# Tampering with the signature.


def test_a_missing_signature_is_told(adapter: Path, keys: Keys) -> None:
    assert reason(adapter, keys) == "model.sig is missing"
    assert reason(adapter / "nowhere", keys) == "model.sig is missing"


@pytest.mark.parametrize("kind", ["directory", "link", "pipe"])
def test_a_signature_must_be_a_file(signed: Path, keys: Keys, tmp_path: Path, kind: str) -> None:
    (signed / SIGNATURE).rename(tmp_path / SIGNATURE)
    if kind == "directory":
        (signed / SIGNATURE).mkdir()
        (signed / SIGNATURE / "payload.py").write_text("x", "utf-8")
    elif kind == "link":
        (signed / SIGNATURE).symlink_to(tmp_path / SIGNATURE)
    else:
        os.mkfifo(signed / SIGNATURE)
    assert reason(signed, keys) == "model.sig is no regular file"


def test_the_signature_of_another_directory_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    flip(other / FACTORS)
    sign(other, keys.private, overwrite=True)
    shutil.copyfile(other / SIGNATURE, signed / SIGNATURE)
    assert f"{FACTORS} changed" in reason(signed, keys)


def test_the_signature_by_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    assert "made with another key" in reason(signed, make_keys(tmp_path / "other"))


def test_the_signature_by_another_key_that_names_ours_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    ours = document(signed)["verificationMaterial"]
    sign(signed, make_keys(tmp_path / "other").private, overwrite=True)
    change(signed, lambda found: found.update(verificationMaterial=ours))
    assert "changed after it was signed" in reason(signed, keys)


def document(directory: Path) -> Any:
    return json.loads((directory / SIGNATURE).read_text("utf-8"))


def change(directory: Path, edit: Callable[[Any], object]) -> None:
    found = document(directory)
    edit(found)
    (directory / SIGNATURE).write_text(json.dumps(found), "utf-8")


def payload_of(found: Any) -> Any:
    return json.loads(base64.b64decode(found["dsseEnvelope"]["payload"]))


def change_payload(directory: Path, edit: Callable[[Any], object]) -> None:
    """Change what was signed, but not the signature of it."""

    def inner(found: Any) -> None:
        payload = payload_of(found)
        edit(payload)
        text = json.dumps(payload).encode()
        found["dsseEnvelope"]["payload"] = base64.b64encode(text).decode()

    change(directory, inner)


def resign(directory: Path, keys: Keys, edit: Callable[[Any], object]) -> None:
    """Change what was signed, and sign that with the right key, as another tool could."""
    key = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    change_payload(directory, edit)

    def inner(found: Any) -> None:
        text = base64.b64decode(found["dsseEnvelope"]["payload"])
        kind = found["dsseEnvelope"]["payloadType"]
        signed = f"DSSEv1 {len(kind)} {kind} {len(text)} ".encode() + text
        made = key.sign(signed, ec.ECDSA(hashes.SHA256()))
        found["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(made).decode()

    change(directory, inner)


def test_a_changed_digest_in_the_signature_is_refused(signed: Path, keys: Keys) -> None:
    flip(signed / FACTORS)
    new = hashlib.sha256((signed / FACTORS).read_bytes()).hexdigest()

    def edit(payload: Any) -> None:
        for each in payload["predicate"]["resources"]:
            each["digest"] = new if each["name"] == FACTORS else each["digest"]

    change_payload(signed, edit)
    assert "changed after it was signed" in reason(signed, keys)


def test_a_signature_cannot_leave_files_out(signed: Path, keys: Keys) -> None:
    """The library takes such exceptions from the signature; here nothing is left out."""

    def edit(payload: Any) -> None:
        payload["predicate"]["serialization"]["ignore_paths"] += ["extra.bin", ".", "eval"]

    resign(signed, keys, edit)
    assert verify_signature(signed, keys.public) is None
    (signed / "extra.bin").write_bytes(b"x")
    assert "extra.bin not signed" in reason(signed, keys)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "eval/../../outside.bin"])
def test_a_signature_that_names_files_outside_is_refused(
    signed: Path, keys: Keys, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside.bin").write_bytes(b"x")

    def edit(payload: Any) -> None:
        payload["predicate"]["resources"][0]["name"] = name

    resign(signed, keys, edit)
    assert f"{name} missing" in reason(signed, keys)


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p["predicate"]["serialization"].update(method="shards", shard_size=10),
        lambda p: p["predicate"]["serialization"].update(method="nothing"),
        lambda p: p["predicate"].update(resources=[]),
        lambda p: p["predicate"].update(resources=None),
        lambda p: p["predicate"].pop("serialization"),
        lambda p: p["predicate"]["resources"][0].update(algorithm="none"),
        lambda p: p["predicate"]["resources"][0].update(digest="xyz"),
        lambda p: p["predicate"]["resources"][0].update(name=3),
        lambda p: p["predicate"]["resources"].append(p["predicate"]["resources"][0]),
        lambda p: p.update(predicateType="https://model_signing/Digests/v0.1"),
        lambda p: p.update(predicateType="other"),
        lambda p: p.update(subject=[]),
        lambda p: p.update(_type="other"),
        lambda p: p.clear(),
    ],
)
def test_an_authentic_signature_of_something_else_is_refused(
    signed: Path, keys: Keys, edit: Callable[[Any], object]
) -> None:
    resign(signed, keys, edit)
    assert reason(signed, keys)


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "number": b"1e999",
    "text": b'"verificationMaterial"',
    "list": b"[]",
    "object": b"{}",
    "not UTF-8": b"\xff\xfe{}",
    "zeros": bytes(4096),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b"9" * 10_000,
    "wrong material": b'{"verificationMaterial": 3}',
    "list of material": b'{"verificationMaterial": []}',
    "no hint": b'{"verificationMaterial": {"publicKey": {}}}',
    "a pickle": b"\x80\x04N.",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_signature_is_refused(signed: Path, keys: Keys, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    assert "model.sig" in reason(signed, keys)


def test_a_huge_signature_is_refused(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "MAX_SIGNATURE", 1 << 20)
    (signed / SIGNATURE).write_bytes(b" " * ((1 << 20) + 1))
    assert "larger than any signature (1 MiB)" in reason(signed, keys)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("dsseEnvelope"),
        lambda d: d.update(dsseEnvelope=None),
        lambda d: d.update(mediaType="other"),
        lambda d: d.pop("mediaType"),
        lambda d: d["dsseEnvelope"].update(signatures=[]),
        lambda d: d["dsseEnvelope"].update(signatures=[{"sig": ""}]),
        lambda d: d["dsseEnvelope"].update(signatures=[{"sig": "!!"}]),
        lambda d: d["dsseEnvelope"].update(payload=""),
        lambda d: d["dsseEnvelope"].update(payload="é"),
        lambda d: d["dsseEnvelope"].update(payload={"a": 1}),
        lambda d: d["dsseEnvelope"].update(payloadType="other"),
        lambda d: d["dsseEnvelope"].pop("payloadType"),
        lambda d: d["verificationMaterial"].update(tlogEntries="x"),
        lambda d: d["verificationMaterial"]["publicKey"].pop("hint"),
        lambda d: d["verificationMaterial"]["publicKey"].update(hint=None),
        lambda d: d["verificationMaterial"]["publicKey"].update(hint=""),
        lambda d: d["verificationMaterial"]["publicKey"].update(hint=["a"]),
        lambda d: d["verificationMaterial"].update(certificate={"rawBytes": ""}),
    ],
)
def test_a_signature_with_a_changed_field_is_refused(
    signed: Path, keys: Keys, edit: Callable[[Any], object], capfd: pytest.CaptureFixture[str]
) -> None:
    change(signed, edit)
    assert "model.sig" in reason(signed, keys)
    assert capfd.readouterr() == ("", "")  # the library prints where there is no hint


@pytest.mark.parametrize("hint", [None, ""])
def test_a_signature_that_names_no_key_is_told(signed: Path, keys: Keys, hint: str | None) -> None:
    change(signed, lambda found: found["verificationMaterial"]["publicKey"].update(hint=hint))
    assert "names no key" in reason(signed, keys)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_change_of_a_signature_ends_in_a_traceback(
    signed: Path, keys: Keys, data: st.DataObject
) -> None:
    """Cut, or with bytes replaced anywhere: a reason, or the same meaning."""
    place = signed / SIGNATURE
    original = place.read_bytes()
    start = data.draw(st.integers(0, len(original) - 1))
    end = data.draw(st.integers(start, min(start + 8, len(original))))
    new = data.draw(st.binary(max_size=8) | st.sampled_from([b'"', b"{", b"[[", b"null", b"\\u"]))
    cut = data.draw(st.booleans())
    content = original[:start] + new + (b"" if cut else original[end:])
    place.write_bytes(content)
    try:
        if verify_signature(signed, keys.public) is None:
            # Base64 and JSON write some things in several ways: what is signed is the same.
            assert payload_of(json.loads(content)) == payload_of(json.loads(original))
        else:
            assert len(reason(signed, keys).splitlines()) == 1
    finally:
        place.write_bytes(original)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_value_in_a_signature_ends_in_a_traceback(
    signed: Path, keys: Keys, data: st.DataObject
) -> None:
    original = (signed / SIGNATURE).read_bytes()

    def edit(found: Any) -> None:
        at = found
        while True:
            choices = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(choices))
            inner = at[key]
            if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
                at[key] = data.draw(_JSON)
                return
            at = inner

    try:
        if data.draw(st.booleans()):
            resign(signed, keys, edit)
        else:
            change(signed, edit)
        found = verify_signature(signed, keys.public)
        assert found is None or len(found.splitlines()) == 1
    finally:
        (signed / SIGNATURE).write_bytes(original)


# What is not signed.


def assert_not_signed(directory: Path, keys: Keys, *words: str, **options: Any) -> None:
    before = snapshot(directory) if directory.is_dir() else None
    with pytest.raises(SafeprojError) as refused:
        sign(directory, keys.private, **options)
    assert len(refused.value.message.splitlines()) == 1
    for word in words:
        assert word in refused.value.message
    if before is not None:
        assert snapshot(directory) == before


def test_a_signature_is_replaced_only_on_demand(signed: Path, keys: Keys, tmp_path: Path) -> None:
    assert_not_signed(signed, keys, "model.sig: exists", "--overwrite")
    other = make_keys(tmp_path / "other")
    sign(signed, other.private, overwrite=True)
    assert verify_signature(signed, other.public) is None


def test_a_directory_that_is_no_adapter_is_refused(trio: Trio, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_not_signed(tmp_path / "empty", keys, "is no adapter", CONFIG)
    assert_not_signed(trio.base, keys, "is no adapter")
    assert_not_signed(tmp_path / "nowhere", keys, "not an existing directory")
    assert_not_signed(trio.adapter / CONFIG, keys, "not an existing directory")


def test_links_are_not_signed(adapter: Path, keys: Keys) -> None:
    link = adapter.with_name("link")
    link.symlink_to(adapter)
    assert_not_signed(link, keys, "is a link")
    (adapter / "eval" / "link").symlink_to("scores.json")
    assert_not_signed(adapter, keys, "eval/link is a link")


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_only_a_file_is_replaced(adapter: Path, keys: Keys, tmp_path: Path, kind: str) -> None:
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"precious")
        (adapter / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    else:
        (adapter / SIGNATURE).mkdir()
    assert_not_signed(adapter, keys, f"model.sig is a {kind}", overwrite=True)


def test_a_private_key_in_the_directory_is_not_published(adapter: Path) -> None:
    inside = make_keys(adapter / "keys")
    assert_not_signed(adapter, inside, "it would be published")


def test_a_public_key_from_the_directory_is_not_trusted(signed: Path, keys: Keys) -> None:
    shutil.copyfile(keys.public, signed / "pub.pem")
    with pytest.raises(SafeprojError, match="lies in the directory"):
        verify_signature(signed, signed / "pub.pem")


@pytest.mark.parametrize(
    "step", ["os.fsync", "safeproj.storage.publish._renamed", "pathlib.Path.replace"]
)
def test_a_failure_leaves_the_old_signature(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "pathlib.Path.replace":  # where the system cannot exchange two names
        monkeypatch.setattr("safeproj.storage.publish._CALLS", {})
    monkeypatch.setattr(step, fail)
    assert_not_signed(signed, keys, "No space left on device", overwrite=True)
    monkeypatch.undo()
    assert verify_signature(signed, keys.public) is None


# Keys.


def bad_keys(folder: Path) -> dict[str, tuple[Keys, str]]:
    """Return what is not taken as a key, with what the message says."""
    rsa_key = rsa.generate_private_key(65537, 2048)
    unknown = ec.generate_private_key(ec.SECP256K1())
    good = make_keys(folder / "good")
    text, empty, large = folder / "text.pem", folder / "empty.pem", folder / "large.pem"
    text.write_text("-----BEGIN NOTHING-----\nAAAA\n-----END NOTHING-----\n", "utf-8")
    empty.write_bytes(b"")
    large.write_bytes(bytes(signing.MAX_KEY + 1))
    return {
        "RSA": (make_keys(folder / "rsa", rsa_key), "an RSA key"),
        "Ed25519": (
            make_keys(folder / "ed", ed25519.Ed25519PrivateKey.generate()),
            "an Ed25519 key",
        ),
        "curve": (make_keys(folder / "curve", unknown), "the curve secp256k1"),
        "no key": (Keys(text, text), "no usable"),
        "empty": (Keys(empty, empty), "no usable"),
        "large": (Keys(large, large), "too large"),
        "missing": (Keys(folder / "none", folder / "none"), "no such file"),
        "directory": (Keys(folder, folder), "no regular file"),
        "swapped": (Keys(good.public, good.private), "give the "),
    }


KINDS = "RSA", "Ed25519", "curve", "no key", "empty", "large", "missing", "directory", "swapped"


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_cannot_be_used_is_refused(signed: Path, tmp_path: Path, kind: str) -> None:
    bad, words = bad_keys(tmp_path / "keys")[kind]

    assert_not_signed(signed, bad, f"--private-key {bad.private}: ", words, overwrite=True)

    with pytest.raises(SafeprojError) as refused:
        verify_signature(signed, bad.public)
    assert refused.value.message.startswith(f"--public-key {bad.public}: ")
    assert words in refused.value.message


def test_a_wrong_password_is_refused(adapter: Path, keys: Keys, tmp_path: Path) -> None:
    pair = make_keys(tmp_path / "pair", password=b"right")
    assert_not_signed(adapter, pair, "is encrypted", "--password-env")
    assert_not_signed(adapter, pair, "the password is wrong", password="wrong")
    assert_not_signed(adapter, keys, "is not encrypted", password="needless")


def test_keys_of_openssl_are_taken(adapter: Path, tmp_path: Path) -> None:
    """With the commands of docs/signing.md, also where the key's file begins with its curve."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    for options in (["-noout"], []):
        run = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", *options]
        subprocess.run([*run, "-out", "key.pem"], cwd=tmp_path, check=True, capture_output=True)
        run = ["openssl", "ec", "-in", "key.pem", "-pubout", "-out", "pub.pem"]
        subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
        sign(adapter, tmp_path / "key.pem", overwrite=True)
        assert verify_signature(adapter, tmp_path / "pub.pem") is None


# The library.


@pytest.mark.parametrize("missing", ["model_signing", "OpenSSL"])
def test_without_the_extra_one_line_says_what_to_install(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (
        lambda: sign(signed, keys.private, overwrite=True),
        lambda: verify_signature(signed, keys.public),
    ):
        with pytest.raises(SafeprojError, match="signatures need model-signing") as refused:
            call()
        assert refused.value.message.endswith(
            "; install it with `pip install '.[sign]'` in a clone of safeproj"
        )
        assert ("OpenSSL" in refused.value.message) == (missing == "OpenSSL")


def model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_library_s_command_verifies_our_signature(signed: Path, keys: Keys) -> None:
    """The command of docs/signing.md."""
    (signed / ".git").mkdir()
    (signed / ".git" / "HEAD").write_text("ref: refs/heads/main\n", "utf-8")
    line: list[str | Path] = [
        "verify",
        "key",
        signed,
        "--signature",
        signed / SIGNATURE,
        "--public_key",
        keys.public,
    ]
    line += ["--no-ignore-git-paths"]
    shown = " ".join(str(each) for each in line)
    shown = shown.replace(str(signed), "my-adapter").replace(str(keys.public), "pub.pem")
    page = Path(__file__).parents[2] / "docs" / "signing.md"
    assert f"python -m model_signing {shown}\n" in page.read_text("utf-8")

    good = model_signing(*line)
    flip(signed / CONFIG)
    bad = model_signing(*line)

    assert (good.returncode, bad.returncode) == (0, 1), good.stderr
    assert CONFIG in bad.stderr


def test_we_verify_a_signature_of_the_library_s_command(adapter: Path, keys: Keys) -> None:
    made = model_signing(
        *("sign", "key", adapter, "--signature", adapter / SIGNATURE),
        *("--private_key", keys.private),
    )
    assert made.returncode == 0, made.stderr
    # Of its own accord the library leaves out the files of git, wherever they came from.
    assert ".gitattributes not signed" in reason(adapter, keys)
    (adapter / ".gitattributes").unlink()
    assert verify_signature(adapter, keys.public) is None


def test_the_library_is_quiet_and_asks_no_network(
    adapter: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no connection is wanted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    sign(adapter, keys.private)
    assert verify_signature(adapter, keys.public) is None
    assert capfd.readouterr() == ("", "")


# The command.


def run_sign(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    app = typer.Typer()
    app.command("sign")(sign_command)
    return CliRunner().invoke(app, [str(each) for each in arguments], env=env)


def test_the_command_signs_and_says_so(adapter: Path, keys: Keys) -> None:
    number = sum(path.is_file() for path in adapter.rglob("*"))

    result = run_sign(adapter, "--private-key", keys.private)

    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == f"signed {adapter} ({number} files, model.sig)\n"
    assert verify_signature(adapter, keys.public) is None


def test_the_command_is_quiet_on_demand(adapter: Path, keys: Keys) -> None:
    result = run_sign(adapter, "--private-key", keys.private, "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert verify_signature(adapter, keys.public) is None


def test_the_command_takes_the_password_from_the_environment(adapter: Path, tmp_path: Path) -> None:
    pair = make_keys(tmp_path / "pair", password=b"secret")
    line: list[str | Path] = [
        adapter,
        "--private-key",
        pair.private,
        "--password-env",
        "KEY_PASSWORD",
    ]

    without = run_sign(*line, env={"KEY_PASSWORD": ""})
    wrong = run_sign(*line, env={"KEY_PASSWORD": "wrong"})
    right = run_sign(*line, env={"KEY_PASSWORD": "secret"})

    assert [each.exit_code for each in (without, wrong, right)] == [2, 2, 0]
    assert "--password-env KEY_PASSWORD: no such environment variable" in without.stderr
    assert "the password is wrong" in wrong.stderr
    assert "secret" not in right.output
    assert verify_signature(adapter, pair.public) is None


def test_the_command_replaces_only_on_demand(signed: Path, keys: Keys) -> None:
    before = snapshot(signed)
    refused = run_sign(signed, "--private-key", keys.private)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("safeproj: error: ")
    assert len(refused.stderr.splitlines()) == 1
    assert snapshot(signed) == before
    assert run_sign(signed, "--private-key", keys.private, "--overwrite").exit_code == 0


def test_the_installed_command_signs(adapter: Path, keys: Keys) -> None:
    result = safeproj("sign", adapter, "--private-key", keys.private)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert verify_signature(adapter, keys.public) is None
    again = safeproj("sign", adapter, "--private-key", keys.private)
    assert_refused(again, "model.sig: exists", "--overwrite")


def test_verify_needs_no_model_for_a_signature(trio: Trio, tmp_path: Path, keys: Keys) -> None:
    out = tmp_path / "out"
    assert safeproj("patch", *trio.arguments, "--all", "--out", out).returncode == 0
    unsigned = safeproj("verify", out, "--public-key", keys.public)
    assert (unsigned.returncode, unsigned.stderr) == (1, "")
    assert "SP032 bad-signature" in unsigned.stdout

    sign(out, keys.private)
    done = safeproj("verify", out, "--public-key", keys.public)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the signature is valid for every file" in done.stdout
    pair = ("--base", trio.base, "--aligned", trio.aligned)
    both = ("--original", trio.adapter, "--public-key", keys.public, *pair)
    assert safeproj("verify", out, *both).returncode == 0  # the original has no signature

    (out / "added").touch()
    assert safeproj("verify", out, "--public-key", keys.public).returncode == 1
    refused = safeproj("verify", out, "--public-key", keys.public, *pair)
    assert refused.returncode == 2
    assert "nothing is scored without --original" in refused.stderr
