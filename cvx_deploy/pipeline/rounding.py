"""Latents rounded as a pipeline in half precision keeps them: float32 arrays whose values a shorter type has."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import DType, numpy_dtype
from cvx_deploy.precision import Precision

_DTYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def rounded(values: NDArray[np.floating[Any]], kept: Precision) -> NDArray[np.float32]:
    """Round values to those of a type, ties to even, as torch's ``.to`` does; too large ones become infinite.

    A float64 goes by float32, as in torch.
    """
    single = np.asarray(values, np.float32)
    if kept == "fp32":
        return single
    with np.errstate(over="ignore"):
        return single.astype(numpy_dtype(_DTYPES[kept])).astype(np.float32)


def is_kept(values: NDArray[np.float32], kept: Precision) -> bool:
    """Whether rounding would leave values as they are."""
    return np.array_equal(rounded(values, kept), values, equal_nan=True)
