"""Common GPUs: what they can compute and move at most.

The figures were entered from memory of the makers' papers and data sheets and are unverified: nobody has held them
against those papers, or against a measurement. Check the row of a GPU before a decision hangs on it.

Peaks are dense (without 2:4 sparsity) at boost clock, in TFLOP/s, and for half types and fp8 those with float32
accumulation, which GeForce cards run at half the rate. The papers, all NVIDIA's: the architectures Turing T4 (2018),
Ampere A100 (2020), Ampere GA102 (2021), Ada (2023), Hopper H100 (2023), RTX Blackwell (2025) and RTX PRO Blackwell
(2025), and the data sheets of A10G's sibling A10, H100 NVL, H200, L4, L40S and RTX 6000 Ada. Where a paper lists only
the larger cards of a family, figures follow from cores, clock and the family's rate. Cloud and board makers may clock
lower; no kernel reaches a peak.
"""

import difflib
import re
from dataclasses import dataclass

from cvx_deploy.errors import EngineError

_GB = 1024**3


@dataclass(frozen=True)
class GpuModel:
    """One GPU.

    Attributes:
        compute_capability: Such as sm89.
        memory: Bytes.
        bandwidth: Bytes a second between memory and chip.
        float16: TFLOP/s, float32 accumulation; the other types likewise, None where the chip has no such unit.
        float32: TFLOP/s outside of tensor cores.
    """

    name: str
    compute_capability: str
    memory: int
    bandwidth: float
    float16: float
    bfloat16: float | None
    int8: float
    float8: float | None
    float32: float

    def peak(self, dtype: str) -> float | None:
        """Return FLOP/s for a type that is multiplied; None where the GPU has no unit for it, or it is not listed."""
        peaks = {
            "float16": self.float16,
            "bfloat16": self.bfloat16,
            "int8": self.int8,
            "float8": self.float8,
            "float32": self.float32,
        }
        peak = peaks.get(dtype)
        return None if peak is None else peak * 1e12


def _gpu(
    name: str, capability: int, memory: float, bandwidth: int, half: float, int8: float, fp8: float | None, fp32: float
) -> GpuModel:
    """Return a GPU from its data sheet's figures: memory in GB, bandwidth in GB/s."""
    bfloat16 = half if capability >= 80 else None
    return GpuModel(name, f"sm{capability}", round(memory * _GB), bandwidth * 1e9, half, bfloat16, int8, fp8, fp32)


GPUS: tuple[GpuModel, ...] = (
    #    name                 sm   GB   GB/s   half    int8     fp8    fp32
    _gpu("T4", 75, 16, 320, 65, 130, None, 8.1),
    _gpu("A100 40GB", 80, 40, 1555, 312, 624, None, 19.5),
    _gpu("A100 80GB", 80, 80, 2039, 312, 624, None, 19.5),
    _gpu("A10G", 86, 24, 600, 70, 140, None, 35),
    _gpu("RTX 3090", 86, 24, 936, 71, 284, None, 35.6),
    _gpu("RTX 4060 Ti 16GB", 89, 16, 288, 44.1, 176.5, 88.2, 22.1),
    _gpu("RTX 4070", 89, 12, 504, 58.3, 233.2, 116.6, 29.1),
    _gpu("RTX 4080", 89, 16, 717, 97.5, 389.9, 194.9, 48.7),
    _gpu("RTX 4090", 89, 24, 1008, 165.2, 660.6, 330.3, 82.6),
    _gpu("RTX 6000 Ada", 89, 48, 960, 364.2, 728.5, 728.5, 91.1),
    _gpu("L4", 89, 24, 300, 121, 242, 242, 30.3),
    _gpu("L40S", 89, 48, 864, 362, 733, 733, 91.6),
    _gpu("H100 PCIe", 90, 80, 2039, 756, 1513, 1513, 51),
    _gpu("H100 NVL", 90, 93.6, 3938, 835, 1671, 1671, 60),
    _gpu("H100 SXM", 90, 80, 3352, 989, 1979, 1979, 67),
    _gpu("H200 NVL", 90, 131.3, 4800, 835, 1671, 1671, 60),
    _gpu("H200", 90, 131.3, 4800, 989, 1979, 1979, 67),  # 141 GB of a thousand to the power of three
    _gpu("RTX 5070 Ti", 120, 16, 896, 87.9, 351.5, 175.8, 43.9),
    _gpu("RTX 5080", 120, 16, 960, 112.6, 450.2, 225.1, 56.3),
    _gpu("RTX 5090", 120, 32, 1792, 209.5, 838, 419, 104.8),
    _gpu("RTX PRO 6000 Blackwell", 120, 96, 1792, 503.8, 1007.6, 1007.6, 126),
)

# What drivers and shops add to a name.
_NOISE = re.compile(
    r"80gb hbm3|-sxm\d|-pcie(?=-)|nvidia|geforce|quadro|tesla|graphics|generation|workstation|server|edition|[^a-z0-9]"
)


def gpu_named(name: str) -> GpuModel:
    """Return the GPU a name means: ``rtx4090``, ``RTX 4090`` and ``NVIDIA GeForce RTX 4090`` are the same.

    A name that fits the beginning of several (``a100``) means the one listed last, the larger.

    Raises:
        EngineError: None fits; names the closest ones.
    """
    wanted = _plain(name)
    known = {_plain(gpu.name): gpu for gpu in GPUS}
    for spelling in (wanted, f"rtx{wanted}"):
        fits = [gpu for plain, gpu in known.items() if plain == spelling]
        fits = fits or [gpu for plain, gpu in known.items() if wanted and _begins(plain, spelling)]
        if fits:
            return fits[-1]
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    listed = ", ".join(known[plain].name for plain in close) or ", ".join(gpu.name for gpu in GPUS)
    raise EngineError(f"no figures are known for a GPU called {name}", fix=f"name one of these: {listed}")


def _plain(name: str) -> str:
    return _NOISE.sub("", name.lower())


def _begins(plain: str, spelling: str) -> bool:
    """Whether a name is a spelling and its maker's suffix: a100 begins a10080gb, 5070 does not begin 5070ti."""
    rest = plain.removeprefix(spelling)
    return plain != rest and re.match(r"(\d+gb|sxm|pcie|ada|blackwell)", rest) is not None
