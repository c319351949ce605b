"""Who may come in: keys that are known by their SHA-256 alone, and compared in constant time.

A key has 256 random bits, so that a plain hash of it tells nothing; a line of the file is ``NAME sha256:HEX``.
"""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.files import staged_file
from cvx_deploy.reading import read_whole

_LINE = re.compile(r"([A-Za-z0-9][\w.-]{0,63}) sha256:([0-9a-f]{64})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_FIX = "write it with cvx-deploy serve --api-keys FILE --new-key NAME"


class KeyRing:
    """The keys of a file, which is read again when it has changed.

    Raises:
        CvxError: It is missing, damaged or empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._changed()
        self._hashes = read_keys(path)
        if not self._hashes:
            raise CvxError(f"{path} holds no key, so that nobody could come in", fix=_FIX)

    def owner_of(self, key: str) -> str | None:
        """Return the name of a key; None where it is nobody's. Takes as long for any key."""
        stamp = self._changed()
        if stamp != self._stamp:
            try:
                self._hashes, self._stamp = read_keys(self._path), stamp
            except CvxError:  # it is being written, or was spoilt: those who could come in still can
                self._stamp = stamp
        digest = _hash(key)
        found: str | None = None
        for name, known in self._hashes.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _changed(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return (0, 0)
        return status.st_mtime_ns, status.st_size


def read_keys(path: Path) -> dict[str, str]:
    """Return the hashes of a file by their names."""
    text = read_whole(path, CvxError, fix=_FIX).decode("utf-8", "replace")
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None or found[1] in keys:
            raise CvxError(f"line {number} of {path} is no name and hash, or names one twice", fix=_FIX)
        keys[found[1]] = found[2]
    return keys


def add_key(path: Path, name: str) -> str:
    """Make a key, add its hash to a file that only its owner can read, and return the key.

    Raises:
        CvxError: The name cannot be one, or is there already.
    """
    if _NAME.fullmatch(name) is None:
        raise CvxError(f"{name!r} is no name for a key", fix="use letters, digits, '.', '_' and '-'")
    known = read_keys(path) if path.exists() else {}
    if name in known:
        raise OutputError(f"{path} has a key of {name}", fix="choose another name, or remove that line first")
    key = f"cvx-{secrets.token_urlsafe(32)}"
    before = path.read_bytes() if path.exists() else b""
    with staged_file(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(before + (b"\n" if before and not before.endswith(b"\n") else b""))
            file.write(f"{name} sha256:{_hash(key)}\n".encode())
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
