"""What a kind of network is expected to compile to."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Expectation:
    """What a compiled plan is held against.

    Attributes:
        attention: One fused kernel each; in pieces, which is noted and right; or none in the network at all.
        float32: Words in the names of layers that compute in float32 whatever the network's precision is.
    """

    attention: Literal["fused", "in pieces", "none"]
    float32: tuple[str, ...] = ()
