"""Signatures of adapter directories, in OpenSSF's format, made and verified with a key pair.

A signature covers every file of the directory, hidden ones too, but for itself and for a `.git` at
the top: git changes that with each command, and committing the signature would break it. Nothing
that loads an adapter reads `.git`; what is there, hooks for instance, nobody vouches for. Links and
special files are refused: what they lead to lies elsewhere, or is no content.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.adapter import FORMATS
from safeproj.adapter.interface import CONFIG, SIGNATURE
from safeproj.errors import SafeprojError, install
from safeproj.storage.mistaken import require_real
from safeproj.storage.nearby import nearby
from safeproj.storage.publish import AppearedError, appeared
from safeproj.storage.wholefile import write_file
from safeproj.text import first_line, is_text, printable, shorten

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from model_signing import hashing, manifest

EXCEPT = (SIGNATURE, ".git")
"""What a signature does not cover, at the top of the directory only."""

MAX_SIGNATURE = 16 << 20
"""Bytes of a signature: it takes about 250 for each file, and a larger one only fills memory."""

MAX_KEY = 1 << 20
"""Bytes of a key file: keys have a few hundred; more is a mistake in the command line."""

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_EXPECTED = "expected a PEM file with an elliptic curve key (P-256, P-384 or P-521)"


class _InvalidError(Exception):
    """Why a directory has no valid signature, or can have none."""


def require_library() -> None:
    """Import what signatures need.

    Raises:
        SafeprojError: it is not installed.
    """
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        missing = getattr(error, "name", None) or ""
        # Another module that is missing tells that the extra is there, but not complete.
        why = "" if missing.startswith("model_signing") else f" ({first_line(error)})"
        raise SafeprojError(f"signatures need model-signing{why}; {install('sign')}") from error


def covered_files(directory: Path) -> list[Path]:
    """Return the files of a directory that a signature covers, sorted.

    Raises:
        SafeprojError: it holds what cannot be signed, such as a link.
    """
    try:
        return _files(directory)
    except _InvalidError as error:
        raise SafeprojError(f"{directory}: {error}") from error
    except OSError as error:
        raise SafeprojError(f"{directory}: {_unreadable(error)}") from error


def sign(
    directory: Path, private_key: Path, password: str | None = None, overwrite: bool = False
) -> Path:
    """Sign every file of an adapter directory; the signature appears complete or not at all.

    Args:
        directory: the adapter directory.
        private_key: a PEM file with a key on the curve P-256, P-384 or P-521.
        password: what decrypts the key.
        overwrite: whether a signature that is there may be replaced.

    Returns:
        The signature's path.

    Raises:
        SafeprojError: the directory or the key cannot be used, or the signature not be written; one
            that was there is as it was.
    """
    require_library()
    from model_signing import signing

    place = directory / SIGNATURE
    _check_signable(directory, place, overwrite)
    _check_private_key(directory, private_key, password)
    root = directory.resolve()
    # The library hands the password on as it is, and cryptography takes only bytes.
    secret: Any = _encoded(password)
    try:
        signer = signing.Config()
        signer.use_elliptic_key_signer(private_key=private_key, password=secret)
        signer.set_hashing_config(_hashing_of_all_files())
        # Made elsewhere: a file in the directory would be signed, or be left behind by a crash.
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / SIGNATURE
            signer.sign(root, made)
            content = made.read_bytes()
        look = (lambda: _check_signable(directory, place, overwrite)) if overwrite else None
        write_file(place, content, look)
    except AppearedError as error:
        raise SafeprojError(appeared(str(place))) from error
    except (_InvalidError, ValueError) as error:
        raise SafeprojError(f"{directory}: cannot be signed: {first_line(error)}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SafeprojError(
            f"{directory}: cannot be signed ({reason}); nothing was written"
        ) from error
    return place


def verify_signature(directory: Path, public_key: Path) -> str | None:
    """Return why a directory's signature is not valid for exactly the files it has.

    Files that the signature itself says to leave out count nevertheless: one that was made with the
    library's own exceptions, such as `.gitignore`, is valid only where no such file is.

    Args:
        directory: the directory, with its signature in `model.sig`.
        public_key: a PEM file with the public key of whom the user trusts.

    Returns:
        One line; None if the signature is valid.

    Raises:
        SafeprojError: the key cannot be used, or the library is not installed.
    """
    require_library()
    key = _public_key(directory, public_key)
    try:
        _verify(directory.resolve(), public_key, key)
    except _InvalidError as error:
        return str(error)
    except OSError as error:
        return _unreadable(error)
    return None


def _verify(root: Path, public_key: Path, key: EllipticCurvePublicKey) -> None:
    from model_signing import verifying

    document = _document(root / SIGNATURE)
    _check_signer(document, key)
    files = _hashing_of_all_files()
    verifier = verifying.Config()
    verifier.use_elliptic_key_verifier(public_key=public_key).set_hashing_config(files)
    try:
        verifier.verify(root, root / SIGNATURE)
    except (_InvalidError, OSError):
        raise
    except Exception as error:
        # What the signature holds comes from anywhere, and the library raises what its parsers do.
        if files.found is None:
            raise _InvalidError(
                f"{SIGNATURE} is damaged, or its content was changed after it was signed "
                f"({_short(error)})"
            ) from error
        raise _InvalidError(_difference(files.found, document)) from error


def _document(path: Path) -> Any:
    """Return the JSON of a signature."""
    if not os.path.lexists(path):
        raise _InvalidError(f"{SIGNATURE} is missing")
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _InvalidError(f"{SIGNATURE} is no regular file")
    with path.open("rb") as file:
        content = file.read(MAX_SIGNATURE + 1)
    if len(content) > MAX_SIGNATURE:
        raise _InvalidError(f"{SIGNATURE} is larger than any signature ({MAX_SIGNATURE >> 20} MiB)")
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise _InvalidError(f"{SIGNATURE} is no signature: not JSON ({_short(error)})") from error


def _check_signer(document: Any, key: EllipticCurvePublicKey) -> None:
    """Refuse a signature that names another key, or none, on which the library would print."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        named = document["verificationMaterial"]["publicKey"]["hint"]
    except (KeyError, TypeError, IndexError) as error:
        raise _InvalidError(f"{SIGNATURE} is no signature that was made with a key") from error
    if not named:
        raise _InvalidError(f"{SIGNATURE} names no key; expected one that safeproj sign made")
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if named != hashlib.sha256(pem).hexdigest():
        raise _InvalidError(f"{SIGNATURE} was made with another key")


def _difference(found: manifest.Manifest, document: Any) -> str:
    """Return how the files differ from those of an authentic signature."""
    try:
        payload = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
        method = payload["predicate"]["serialization"]["method"]
        resources = payload["predicate"]["resources"]
        algorithms = {resource["algorithm"] for resource in resources}
        signed = {str(resource["name"]): str(resource["digest"]) for resource in resources}
    except (KeyError, TypeError, ValueError):
        return f"the files are not those that {SIGNATURE} was made of"
    if method != "files" or algorithms - {"sha256"}:
        return (
            f"{SIGNATURE} describes the content otherwise than by SHA-256 of each file; expected "
            "one that safeproj sign made"
        )
    here = {each.identifier: each.digest.digest_hex for each in found.resource_descriptors()}
    kinds = {
        "changed": {name for name in here if name in signed and here[name] != signed[name]},
        "missing": signed.keys() - here.keys(),
        "not signed": here.keys() - signed.keys(),
    }
    parts = [f"{shorten(sorted(names))} {kind}" for kind, names in kinds.items() if names]
    return f"the files are not those that were signed: {'; '.join(parts)}"


def _hashing_of_all_files() -> Any:
    """Return a hashing configuration of the library that leaves out nothing but `EXCEPT`."""
    from model_signing import hashing

    class AllFiles(hashing.Config):
        """Hashes what `_files` finds, whatever a signature says about files to leave out."""

        found: manifest.Manifest | None = None

        def hash(
            self,
            model_path: hashing.PathLike,
            *,
            files_to_hash: Iterable[hashing.PathLike] | None = None,
        ) -> manifest.Manifest:
            del files_to_hash
            root = Path(os.fsdecode(model_path))
            self.found = super().hash(root, files_to_hash=_files(root))
            return self.found

        def add_ignored_paths(
            self, *, model_path: hashing.PathLike, paths: Iterable[hashing.PathLike]
        ) -> None:
            """Add none: these come from the signature."""

    files = AllFiles()  # type: ignore[no-untyped-call]
    # Recorded in the signature, so that the command of the library leaves out the same.
    return files.set_ignored_paths(paths=EXCEPT, ignore_git_paths=False)


def _files(root: Path) -> list[Path]:
    """Return all files below a directory but `EXCEPT`; refuse what is neither file nor directory.

    The library's own search passes over directories that cannot be read, and looks into `.git`.
    """
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise error

    for directory, subdirectories, names in os.walk(root, onerror=fail):
        for name in (*subdirectories, *names):
            path = Path(directory) / name
            relative = path.relative_to(root).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise _InvalidError(f"{printable(relative)} is a link, which no signature covers")
            if relative == SIGNATURE and stat.S_ISDIR(mode):
                raise _InvalidError(f"{SIGNATURE} is a directory")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _InvalidError(f"{printable(relative)} is neither a file nor a directory")
            if not is_text(relative):
                raise _InvalidError(f"the file name {printable(relative)} is not UTF-8; rename it")
            if stat.S_ISREG(mode) and relative not in EXCEPT:
                found.append(path)
        if Path(directory) == root:
            subdirectories[:] = [name for name in subdirectories if name not in EXCEPT]
    return sorted(found)


def _check_signable(directory: Path, place: Path, overwrite: bool) -> None:
    """Refuse a directory that is no adapter, or whose signature may not be replaced."""
    if directory.is_symlink():
        raise SafeprojError(f"{directory}: is a link; give the directory that it leads to")
    if not directory.is_dir():
        raise SafeprojError(f"{directory}: not an existing directory; expected an adapter's")
    files = covered_files(directory)
    names = [path.name for path in files if path.parent == directory]
    if not any(kind.is_adapter(names) for kind in FORMATS):
        raise SafeprojError(
            f"{directory}: is no adapter (it has no {CONFIG}); only an adapter directory is signed"
        )
    if os.path.lexists(place) and not overwrite:
        raise SafeprojError(f"{place}: exists; give --overwrite to replace the signature")


def _read_key(directory: Path, path: Path, option: str) -> bytes:
    """Return the content of a key file; it is read twice, so it must be a regular file.

    Raises:
        SafeprojError: it cannot be read, or is a file of the adapter.
    """
    where = f"{option} {path}"
    try:
        if not path.is_file():
            kind = "no regular file" if path.exists() else f"no such file{nearby(path)}"
            raise SafeprojError(f"{where}: {kind}; {_EXPECTED}")
        with path.open("rb") as file:
            content = file.read(MAX_KEY + 1)
    except OSError as error:
        raise SafeprojError(f"{where}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_KEY:
        raise SafeprojError(f"{where}: too large for a key; {_EXPECTED}")
    require_real(where, content)
    if directory.resolve() in path.resolve().parents:
        private = option == "--private-key"
        why = "it would be published with it" if private else "it says nothing about where it is"
        advice = "move it away" if private else "give the key of whom you trust, from elsewhere"
        raise SafeprojError(f"{where}: lies in the directory {directory}, {why}; {advice}")
    return content


def _check_private_key(directory: Path, path: Path, password: str | None) -> None:
    """Refuse a file that holds no private key that the library signs with."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    where = f"--private-key {path}"
    content = _read_key(directory, path, "--private-key")
    if b"-----BEGIN PUBLIC KEY-----" in content:
        raise SafeprojError(f"{where}: holds a public key; give the private one")
    try:
        key = serialization.load_pem_private_key(content, _encoded(password))
    except TypeError as error:
        # Which of the two it is, cryptography tells only in words.
        if password:
            raise SafeprojError(f"{where}: is not encrypted; leave out --password-env") from error
        raise SafeprojError(
            f"{where}: is encrypted; name the environment variable of its password with "
            "--password-env"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = " or the password is wrong" if password is not None else ""
        raise SafeprojError(f"{where}: holds no usable private key{wrong}; {_EXPECTED}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SafeprojError(f"{where}: holds {_kind(key)}; {_EXPECTED}")
    _check_curve(key.curve, where)


def _encoded(password: str | None) -> bytes | None:
    """Return the bytes that an environment variable held."""
    return None if password is None else password.encode(errors="surrogateescape")


def _public_key(directory: Path, path: Path) -> EllipticCurvePublicKey:
    """Return the public key that a file holds."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    where = f"--public-key {path}"
    content = _read_key(directory, path, "--public-key")
    if b"PRIVATE KEY-----" in content:
        raise SafeprojError(f"{where}: holds a private key; give the public one")
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SafeprojError(f"{where}: holds no usable public key; {_EXPECTED}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise SafeprojError(f"{where}: holds {_kind(key)}; {_EXPECTED}")
    _check_curve(key.curve, where)
    return key


def _check_curve(curve: Any, where: str) -> None:
    if curve.name not in _CURVES:
        raise SafeprojError(f"{where}: holds a key on the curve {curve.name}; {_EXPECTED}")


def _kind(key: object) -> str:
    """Return what kind of key it is: RSA, Ed25519, DSA and so on."""
    name = type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey")
    return f"an {name} key" if name[:1] in "AEIORX" else f"a {name} key"


def _unreadable(error: OSError) -> str:
    name = Path(os.fsdecode(error.filename)).name if error.filename else "a file"
    return f"{printable(name)} cannot be read ({error.strerror or type(error).__name__})"


def _short(error: BaseException) -> str:
    """Return the kind of an error and the beginning of its text, which may quote the signature."""
    text = printable(first_line(error))
    return f"{type(error).__name__}: {text[:100]}" if text else type(error).__name__
