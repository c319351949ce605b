"""The header of a safetensors file: where each tensor lies in it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvx_deploy.errors import CheckpointError
from cvx_deploy.reading import SMALL, check_regular, reading

_MAX_AXES, _MAX_AXIS = 8, 1 << 40  # of a tensor


_ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie.

    Attributes:
        file: The safetensors file, relative to the checkpoint.
        dtype: The safetensors name of its type, such as BF16.
        offset: First byte, from the start of the file.
        nbytes: Length in bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Return the tensors that a safetensors file's header names, as lying in `file`.

    Raises:
        CheckpointError: The header is damaged, or does not fit the file's length.
    """
    size = check_regular(path, CheckpointError, fix="fetch the file again")
    says = "is truncated or damaged: its header makes no sense"
    with reading(path, CheckpointError, fix="fetch the file again", says=says):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, SMALL):
                raise ValueError(f"it would have {length:,} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(file, 8 + length, entry) for name, entry in header.items()}
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, its header speaks of {end:,}: truncated or altered", fix="fetch the file again"
        )
    return tensors


def _stored_tensor(file: str, start: int, entry: dict[str, Any]) -> StoredTensor:
    first, last = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if len(shape) > _MAX_AXES or not all(0 <= size <= _MAX_AXIS for size in shape):
        raise ValueError("a tensor is of an impossible shape")
    if first < 0 or last - first != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]:
        raise ValueError("a tensor's byte range is not its shape's")
    return StoredTensor(file, str(entry["dtype"]), shape, start + first, last - first)
