"""What a ``.npy`` file says it holds, held against its length before anything is mapped or allocated."""

import math
from typing import BinaryIO, Literal

import numpy as np

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


Order = Literal["C", "F"]


def header_of(file: BinaryIO, size: int) -> tuple["np.dtype[np.generic]", tuple[int, ...], int, Order]:
    """Return the type, the shape, the first byte and the order of the array in an open file of `size` bytes.

    Raises:
        ValueError: It is no array of numbers, or its bytes are not those that its shape needs; NumPy itself raises
            further kinds.
    """
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"it is of version {version} of the format")
    shape, fortran, dtype = _READERS[version](file)
    if dtype.kind not in "fiu":
        raise ValueError(f"it holds {dtype}, not numbers")
    if not shape or any(axis < 1 for axis in shape):
        raise ValueError(f"it is of shape {shape}")
    length = math.prod(shape) * dtype.itemsize
    if file.tell() + length != size:
        raise ValueError(f"it has {size:,} bytes, where its header speaks of {file.tell() + length:,}")
    return dtype, shape, file.tell(), "F" if fortran else "C"
