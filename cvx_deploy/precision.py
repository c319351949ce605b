"""What networks compute in, and the schemes that keep their linear layers in fewer bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Precision = Literal["fp32", "fp16", "bf16"]


SchemeName = Literal["int8", "int8wo", "int4wo", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """One way to keep linear layers in fewer bits.

    Attributes:
        weights: The ONNX type of the weights.
        activations: That of what they are multiplied by; None leaves it as it is.
        largest: The largest magnitude in that type: scales are a channel's, or a tensor's, largest over it. Of integers
            it is symmetric (-127 to 127), so that no zero point is needed; of 4 bits -8 is used, too.
        group: How many weights along the input share a scale; None for all of an output channel.
        smooth: Whether outliers are moved from activations into weights first (SmoothQuant, arXiv:2211.10438).
    """

    weights: str
    activations: str | None
    largest: float
    group: int | None = None
    smooth: bool = False


SCHEMES: Final[Mapping[SchemeName, Scheme]] = {
    "int8": Scheme("INT8", "INT8", 127, smooth=True),
    "int8wo": Scheme("INT8", None, 127),
    "int4wo": Scheme("INT4", None, 7, group=128),
    "fp8": Scheme("FLOAT8E4M3FN", "FLOAT8E4M3FN", 448),
}
"""By name: 8-bit weights and activations, weights only, weights in 4 bits by groups, and E4M3."""
