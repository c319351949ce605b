"""Prompt embeddings kept in a folder, so that the text encoder is loaded for new prompts alone.

An entry is named by the hash of all that it depends on. It is a ``.npy`` file, float32 (S, D), with the SHA-256 of its
bytes after it: NumPy reads it as it is, and a damaged one is known.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import OutputError
from cvx_deploy.files import staged_file
from cvx_deploy.pipeline.npy import header_of
from cvx_deploy.progress import Progress
from cvx_deploy.reading import read_whole, reading

Embedding = NDArray[np.float32]
"""Of one text, (S, D)."""

_ROLE, _OUTPUT = "text_encoder", "prompt_embeds"
_HEADER = 1024  # the most bytes of a header; NumPy writes 128
_DIGEST_SIZE = hashlib.sha256().digest_size


@dataclass(frozen=True)
class EncoderKey:
    """Everything that decides what becomes of a text.

    Attributes:
        graph: SHA-256 of the text encoder's ONNX file.
        weights: Plain name to SHA-256, of the weight files it draws from.
        tokenizer: SHA-256 of the tokenizer's file.
        text_length: Tokens a text is padded or cut to.
        engine: What computes it, and that one's version: each rounds in its own way.
    """

    graph: str
    weights: dict[str, str]
    tokenizer: str
    precision: str
    text_length: int
    engine: tuple[str, str]

    @classmethod
    def of(cls, bundle: Bundle, engine: str, version: str) -> "EncoderKey":
        """Return the key of a bundle's text encoder on an engine."""
        manifest, network = bundle.manifest, bundle.network(_ROLE)
        weights = {name: manifest.weights[name].sha256 for name in network.weights}
        tokenizer, length = manifest.tokenizer.sha256, manifest.text_length
        return cls(network.file.sha256, weights, tokenizer, network.precision, length, (engine, version))

    def digest(self, text: str) -> str:
        """Return the hash that names a text's entry."""
        # Its JSON is ASCII, so that what is no Unicode text has a hash as well; the tokenizer refuses it.
        return hashlib.sha256(json.dumps([asdict(self), text], sort_keys=True).encode()).hexdigest()


class PromptCache:
    """The embeddings in a folder, of one bundle's text encoder on one engine.

    Args:
        folder: Where they are; made when it is not there.
        bundle: Whose text encoder.
        engine: What computes embeddings that are not there.
        version: Of the engine.
        progress: Told of entries that are damaged, or cannot be kept.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: Path, bundle: Bundle, engine: str, version: str, progress: Progress) -> None:
        _check_folder(folder)
        self._folder, self._progress = folder, progress
        self._key = EncoderKey.of(bundle, engine, version)
        spec = next(spec for spec in bundle.network(_ROLE).outputs if spec.name == _OUTPUT)
        self._shape = spec.resolve({"batch": 1})[1:]  # (S, D)

    def read(self, texts: Iterable[str]) -> dict[str, Embedding]:
        """Return the embeddings that are there; a damaged one is removed, and counts as none."""
        found = {text: self._read(self._path(text)) for text in texts}
        return {text: embedding for text, embedding in found.items() if embedding is not None}

    def keep(self, text: str, embedding: Embedding) -> None:
        """Write an embedding; where that fails the run goes on, and says so. One that is not finite is not kept."""
        if not np.isfinite(embedding).all():
            return
        buffer = io.BytesIO()
        np.save(buffer, embedding, allow_pickle=False)
        content = buffer.getvalue()
        try:
            with staged_file(self._path(text)) as staging:
                staging.write_bytes(content + hashlib.sha256(content).digest())
        except OutputError as error:
            self._progress.note(f"note: a prompt's embedding cannot be kept for the next run: {error.what}")

    def _path(self, text: str) -> Path:
        return self._folder / f"{self._key.digest(text)}.npy"

    def _read(self, path: Path) -> Embedding | None:
        if not os.path.lexists(path):
            return None
        fix = "remove it"
        largest = math.prod(self._shape) * np.dtype(np.float32).itemsize + _HEADER + _DIGEST_SIZE
        try:
            content = read_whole(path, OutputError, fix=fix, limit=largest)
            with reading(path, OutputError, fix=fix):
                return _embedding(content, self._shape)
        except OutputError as error:
            self._progress.note(f"note: a prompt's embedding is computed again: {error.what}")
            _remove(path)
            return None


def _remove(path: Path) -> None:
    """Make room for an entry, whatever stands in its place; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_folder(folder: Path) -> None:
    """Make the folder, and try it: permission bits do not stop root, and mounts differ."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"the prompt cache {folder} cannot be written: {reason}", fix="name another folder with --prompt-cache DIR"
        ) from error


def _embedding(content: bytes, shape: tuple[int, ...]) -> Embedding:
    """Return the array in an entry's bytes, or raise ValueError."""
    array, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if hashlib.sha256(array).digest() != digest:
        raise ValueError("it is damaged")
    dtype, found, start, order = header_of(io.BytesIO(array), len(array))
    if dtype != np.float32 or found != shape or order != "C":
        raise ValueError(f"it holds {dtype} of shape {found}, not float32 {shape}")
    embedding: Embedding = np.frombuffer(array, np.float32, offset=start).reshape(shape)
    if not np.isfinite(embedding).all():
        raise ValueError("it holds what is no number")
    return embedding
