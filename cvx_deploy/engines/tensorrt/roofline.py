"""A roofline: how fast a GPU could run a compiled plan at best.

Every kernel takes as long as its arithmetic at the GPU's peak, or as its traffic at full bandwidth, whichever is longer
(Williams, Waterman, Patterson: Roofline, 2009). It is an estimate from below. Real kernels reach neither peak, caches
save some traffic, launches cost time, and kernels of different streams may overlap.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from cvx_deploy.engines.gpus import GpuModel
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.kernels import Kernel, Kind
from cvx_deploy.errors import EngineError

Bound = Literal["arithmetic", "bandwidth"]
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class KernelTime:
    """The least time of one kernel.

    Attributes:
        seconds: None where its traffic, or the arithmetic of a gemm, attention or convolution, is not known.
        bound: Which of the two it waits for.
    """

    name: str
    kind: Kind
    block: str | None
    seconds: float | None
    bound: Bound | None


@dataclass(frozen=True)
class Roofline:
    """The least time of a plan on one GPU; an estimate."""

    gpu: GpuModel
    kernels: tuple[KernelTime, ...]

    @property
    def seconds(self) -> float:
        """The sum over all kernels that could be priced."""
        return sum(kernel.seconds or 0.0 for kernel in self.kernels)

    @property
    def unpriced(self) -> dict[str | None, int]:
        """How many kernels of each block the sums leave out."""
        return Counter(kernel.block for kernel in self.kernels if kernel.seconds is None)

    @property
    def by_kind(self) -> dict[Kind, float]:
        """Seconds for each kind of kernel."""
        return _summed((kernel.kind, kernel.seconds) for kernel in self.kernels)

    @property
    def by_block(self) -> dict[str | None, float]:
        """Seconds for each block; None for what is in no block."""
        return _summed((kernel.block, kernel.seconds) for kernel in self.kernels)


def roofline(plan: CompiledPlan, gpu: GpuModel) -> Roofline:
    """Price every kernel of a plan.

    Raises:
        EngineError: A kernel multiplies in a type that the GPU has no units for.
    """
    return Roofline(
        gpu, tuple(_price(kernel, block, gpu) for kernel, block in zip(plan.kernels, plan.blocks, strict=True))
    )


def _price(kernel: Kernel, block: str | None, gpu: GpuModel) -> KernelTime:
    seconds, bound = _least_time(kernel, gpu)
    return KernelTime(kernel.name, kernel.kind, block, seconds, bound)


def _least_time(kernel: Kernel, gpu: GpuModel) -> tuple[float | None, Bound | None]:
    if kernel.traffic is None:
        return None, None
    moving = kernel.traffic / gpu.bandwidth
    if not kernel.computes:
        return moving, "bandwidth"
    peak = gpu.peak(kernel.operand_type)
    if peak is None:
        raise EngineError(
            f"{gpu.name} has no units for {kernel.operand_type}, which {kernel.name} multiplies",
            fix="name a GPU that has them, or build the network in another precision",
        )
    if kernel.flops is None:
        return None, None
    computing = kernel.flops / peak
    return (computing, "arithmetic") if computing > moving else (moving, "bandwidth")


def _summed(parts: Iterable[tuple[_Key, float | None]]) -> dict[_Key, float]:
    sums: dict[_Key, float] = {}
    for key, seconds in parts:
        sums[key] = sums.get(key, 0.0) + (seconds or 0.0)
    return sums
