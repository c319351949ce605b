"""Safetensors files written tensor by tensor: the header first, and the bytes hashed on their way to the disk.

The format (https://github.com/huggingface/safetensors#format) needs every tensor's place before the first one, so a
file is planned from names, types and shapes, and its values are asked for one at a time. Nothing holds more than one.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from cvx_deploy.bundle.safetensors import StoredTensor
from cvx_deploy.progress import Advance

TORCH_TYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
TYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_TYPES.items()}
FULL_SHARD_BYTES: Final = 5_000_000_000
_PIECE: Final = 1 << 22
_WEIGHTS_NAME: Final = {
    "text_encoder": "model{suffix}.safetensors",
    "transformer": "diffusion_pytorch_model{suffix}.safetensors",
    "vae": "diffusion_pytorch_model{suffix}.safetensors",
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(tensors: Iterable[PlannedTensor]) -> bytes:
    """Return the safetensors header with its length before it, padded to 8 bytes so that tensors start aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def stored_tensors(file: str, tensors: Iterable[PlannedTensor]) -> dict[str, StoredTensor]:
    """Return where each tensor of a planned file lies in it, under the name the file will have."""
    planned = list(tensors)
    stored, offset = {}, len(header_of(planned))
    for tensor in planned:
        stored[tensor.name] = StoredTensor(file, TYPE_NAMES[tensor.dtype], tensor.shape, offset, tensor.nbytes)
        offset += tensor.nbytes
    return stored


def write_safetensors(
    path: Path,
    tensors: Iterable[PlannedTensor],
    value_of: Callable[[PlannedTensor], torch.Tensor],
    advance: Advance = lambda _: None,
) -> str:
    """Write a safetensors file whose values are made one after the other, and return its SHA-256.

    Args:
        path: A new file; its folder is made when it is not there.
        tensors: What it holds, in order.
        value_of: Makes a tensor of the planned type and shape.
        advance: Told the bytes of each piece written.
    """
    planned = list(tensors)
    return write_hashed(path, _pieces(planned, value_of), advance)


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview], advance: Advance = lambda _: None) -> str:
    """Write a new file and return its SHA-256; `advance` is told the bytes of each piece."""
    digest = hashlib.sha256()
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _pieces(
    planned: list[PlannedTensor], value_of: Callable[[PlannedTensor], torch.Tensor]
) -> Iterator[bytes | memoryview]:
    yield header_of(planned)
    for tensor in planned:
        value = value_of(tensor)
        assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape), tensor
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]


def load_tensor(path: Path, stored: StoredTensor) -> torch.Tensor:
    """Read one tensor of a weight file into memory, in its own type."""
    raw = np.fromfile(path, np.uint8, stored.nbytes, offset=stored.offset)
    return torch.from_numpy(raw).view(TORCH_TYPES[stored.dtype]).reshape(stored.shape)


def split_into_shards(
    component: str, state: dict[str, torch.Tensor], limit: int
) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """Divide a network among weight files as ``save_pretrained`` does.

    Args:
        component: text_encoder, transformer or vae.
        state: Its tensors by name; meta tensors will do.
        limit: Bytes of a file.

    Returns:
        File name to the names of its tensors in file order; and the index by path, empty where one file is enough.
    """
    name = _WEIGHTS_NAME[component]
    split = split_torch_state_dict_into_shards(state, filename_pattern=name, max_shard_size=limit)
    files = {file: sorted(names) for file, names in split.filename_to_tensors.items()}
    if not split.is_sharded:
        return files, {}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return files, {f"{component}/{name.format(suffix='')}.index.json": as_json(index)}


def as_json(content: object) -> bytes:
    """Return the text of one of a checkpoint's small files."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
