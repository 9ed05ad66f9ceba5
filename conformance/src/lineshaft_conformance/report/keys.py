"""Ed25519 keys of those who sign bundles: made, read from PEM files, and named by their fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from lineshaft.errors import LineshaftError
from lineshaft_conformance.report.canonical import sha256

LARGEST = 1 << 16
"""Bytes of a key file; a key in PEM has some hundred."""


class KeyFileError(LineshaftError):
    """A key file cannot be read or written, or is not an Ed25519 key in PEM."""


def public_path(private: Path) -> Path:
    """Where `keygen` writes the public key: `signer.pem` -> `signer.pem.pub`."""
    return private.with_name(private.name + ".pub")


def keygen(path: Path) -> str:
    """Write a new private key to `path` (PEM, mode 0600) and the public key beside it; returns the fingerprint.

    Raises KeyFileError if one of the two files exists or cannot be made; then neither is left changed.
    """
    key, public = Ed25519PrivateKey.generate(), public_path(path)
    private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _create(path, private_pem, 0o600)
    try:
        _create(public, public_pem, 0o644)
    except KeyFileError:
        path.unlink()
        raise
    return fingerprint(key.public_key())


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise KeyFileError(f"{path} exists, and no key is overwritten; give another path or move it away") from error
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error}; give a path in a folder that you may write") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def raw(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def fingerprint(key: Ed25519PublicKey) -> str:
    """How a public key is named: "sha256:" and the hash of its 32 bytes."""
    return f"sha256:{sha256(raw(key))}"


def load_private(path: Path) -> Ed25519PrivateKey:
    """Raises KeyFileError."""
    key = _load(path, lambda pem: load_pem_private_key(pem, password=None), "private")
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"the key {path} is of another kind; {_wanted('private')}")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Raises KeyFileError."""
    key = _load(path, load_pem_public_key, "public")
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"the key {path} is of another kind; {_wanted('public')}")
    return key


def _load(path: Path, parse: Callable[[bytes], object], word: str) -> object:
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):
            raise ValueError(f"no file of at most {LARGEST} bytes")
        return parse(path.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"the key {path} cannot be read: {error}; {_wanted(word)}") from error


def _wanted(word: str) -> str:
    return f"give a {word} Ed25519 key in PEM, as `lineshaft conformance keygen` writes it"
