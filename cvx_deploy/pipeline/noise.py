"""Gaussian noise that equals torch's CPU generator, draw for draw, without torch.

A seed then starts the same video here and in diffusers. Followed are torch's two float32 kernels, both fed by one
Mersenne Twister: ``ATen/native/cpu/DistributionTemplates.h`` for 16 values and more, and below that
``ATen/core/DistributionsHelper.h``. On x86 torch takes the AVX2 variant of the first kernel, and this module agrees
with it to 5e-7; the variant for other machines rounds its angles otherwise, and the two differ by up to 3e-6.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import HIGHEST_SEED, LOWEST_SEED
from cvx_deploy.errors import CvxError
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.precision import Precision

_BLOCK = 16  # the vector kernel turns 16 uniforms into 16 normals, and takes over at this size
_HALF = _BLOCK // 2
_CHUNK = 2**16 * _BLOCK  # values worked on at a time: bounds the float64 temporaries to some tens of MB
_TWO_PI = np.float32(2 * math.pi)


def check_seed(seed: int) -> None:
    """Raise CvxError unless torch takes such a seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not LOWEST_SEED <= seed <= HIGHEST_SEED:
        raise CvxError(f"seed {seed!r} is not an integer of 64 bits", fix="use one from 0 to 4294967295")


@dataclass(frozen=True)
class NoiseState:
    """Where a generator stands: the Mersenne Twister's words, uint32 (624,), its place in them, and the kept value."""

    words: NDArray[np.uint32]
    position: int
    spare: float | None


class Generator:
    """A seeded stream of standard normal values, equal to ``torch.Generator("cpu")`` with that seed.

    Args:
        seed: What ``torch.Generator.manual_seed`` takes: an int from -2**63 to 2**64 - 1. As in torch, only its low 32
            bits matter.
        kept: The type that values are drawn in: torch rounds those that it draws in float32.

    Raises:
        CvxError: The seed is not such an int.
    """

    def __init__(self, seed: int, kept: Precision = "fp32") -> None:
        check_seed(seed)
        self._kept = kept
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None  # the scalar path makes two values at a time and keeps one, as torch does

    def state(self) -> NoiseState:
        """Return where it stands; later draws do not change that."""
        _, words, position, *_ = self._words.get_state(legacy=True)
        return NoiseState(np.array(words, np.uint32), int(position), self._spare)

    def restore(self, state: NoiseState) -> None:
        """Go on from where another generator stood."""
        self._words.set_state(("MT19937", state.words, state.position, 0, 0.0))
        self._spare = state.spare

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw standard normal values of `shape`: ``torch.randn(shape, generator=...)`` to within 1e-6, rounded."""
        count = math.prod(shape)
        if count < _BLOCK:
            values = np.array([self._scalar() for _ in range(count)], dtype=np.float32)
        else:
            values = self._vector(count)
        return rounded(values.reshape(shape), self._kept)

    def _vector(self, count: int) -> NDArray[np.float32]:
        values = np.empty(count, dtype=np.float32)
        for start in range(0, count, _CHUNK):
            drawn = min(_CHUNK, count - start)
            whole = drawn // _BLOCK * _BLOCK
            # In float32 torch draws uniforms for the rest too, and has no use for them; in half precision it does not.
            values[start : start + whole] = _box_muller(
                self._uniforms(drawn if self._kept == "fp32" else whole)[:whole]
            )
        if count % _BLOCK:  # the last 16 values are made anew
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values

    def _uniforms(self, count: int) -> NDArray[np.float32]:
        """Draw from [0, 1) in steps of 2**-24: the low 24 bits of one 32-bit word each."""
        words = np.frombuffer(self._words.bytes(4 * count), dtype="<u4")
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _scalar(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        turn, shrink = self._double(), self._double()
        radius = math.sqrt(-2 * math.log1p(-shrink))
        self._spare = radius * math.sin(2 * math.pi * turn)
        return radius * math.cos(2 * math.pi * turn)

    def _double(self) -> float:
        """Draw from [0, 1) in steps of 2**-53: the low 53 bits of two words, the first of them the high one."""
        high, low = np.frombuffer(self._words.bytes(8), dtype="<u4").tolist()
        return float(((high << 32 | low) & (2**53 - 1)) * 2**-53)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn uniforms, a multiple of 16 of them, into as many normals, block by block of 16.

    The angle is rounded to float32 as torch rounds it; the rest is done in float64, which lands closer to torch's
    float32 polynomials than NumPy's float32 functions do, and does not change with the machine as those do.
    """
    blocks = uniforms.reshape(-1, 2, _HALF)
    radius = np.sqrt(-2 * np.log1p(-blocks[:, 0].astype(np.float64)))
    angle = (_TWO_PI * blocks[:, 1]).astype(np.float64)
    normals = np.empty_like(blocks)
    normals[:, 0] = radius * np.cos(angle)
    normals[:, 1] = radius * np.sin(angle)
    return normals.reshape(-1)
