"""How far results may be from eager PyTorch in fp32, by precision, with the reasons. Every parity check reads it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cvx_deploy.bundle.schema import Network


@dataclass(frozen=True)
class Thresholds:
    """The limits of one precision.

    Attributes:
        relative_max: Largest error of a network's output over its largest value.
        relative_l2: L2 norm of that error over the output's.
        cosine: Least cosine of the angle between the two.
        drift: Largest relative L2 error of the latents after any step, from the same noise.
        psnr: Least PSNR in dB of the whole video.
        ssim: Least structural similarity of its frames.
        flicker: Largest error of the change from frame to frame, mean over the pixels in [0, 1].
        reason: Why these.
    """

    relative_max: float
    relative_l2: float
    cosine: float
    drift: float
    psnr: float
    ssim: float
    flicker: float
    reason: str


_FP16 = Thresholds(
    relative_max=2e-2,
    relative_l2=1e-2,
    cosine=1 - 1e-4,
    drift=5e-2,
    psnr=35.0,
    ssim=0.97,
    flicker=5e-3,
    reason="11 bits a product and a sum, over tens of layers",
)
_BF16 = Thresholds(
    relative_max=1e-1,
    relative_l2=5e-2,
    cosine=1 - 2e-3,
    drift=2e-1,
    psnr=25.0,
    ssim=0.85,
    flicker=2e-2,
    reason="8 bits a product, over tens of layers; eager bfloat16 is as far from float32",
)
_INT8 = Thresholds(
    relative_max=2e-1,
    relative_l2=1e-1,
    cosine=1 - 5e-3,
    drift=3e-1,
    psnr=20.0,
    ssim=0.75,
    flicker=3e-2,
    reason="activations of 8 bits besides: their outliers set the scale that all others are rounded by",
)

THRESHOLDS: dict[str, Thresholds] = {
    "fp32": Thresholds(
        relative_max=2e-5,
        relative_l2=1e-5,
        cosine=1 - 1e-9,
        drift=1e-4,
        psnr=70.0,
        ssim=0.9999,
        flicker=1e-4,
        reason="float32 sums in another order, hundreds of layers deep; guidance multiplies the error of a step by "
        "about ten. 8-bit rounding alone is 59 dB",
    ),
    "tf32": replace(_FP16, reason="a GPU's tensor cores round the factors of float32 products to 10 bits"),
    "fp16": _FP16,
    "bf16": _BF16,
    "int8wo": replace(_BF16, reason="weights of 8 bits with a scale a row round as coarsely as bfloat16"),
    "int4wo": Thresholds(
        relative_max=3e-1,
        relative_l2=2e-1,
        cosine=1 - 2e-2,
        drift=4e-1,
        psnr=17.0,
        ssim=0.6,
        flicker=4e-2,
        reason="weights of 4 bits: 15 values for each group of 128, each a tenth off on average",
    ),
    "int8": _INT8,
    "fp8": replace(
        _INT8, reason="4 bits a factor, with an exponent: a relative error of 3% each, which sums average out"
    ),
}
"""By precision; a result is held against its own, a finer one's results pass a coarser one's limits."""


@dataclass(frozen=True)
class ForecastLimits:
    """How far a video whose steps are half forecast may be from that of the same seed whose steps were all run.

    That is no parity: the full run is the engine's own.

    Attributes:
        psnr: Least PSNR in dB; `ssim` likewise, and `flicker` at most, as in `Thresholds`.
        reason: Why these.
    """

    psnr: float
    ssim: float
    flicker: float
    reason: str


FORECAST: dict[str, ForecastLimits] = {
    "ddim": ForecastLimits(
        46.0, 0.99, 3e-3, reason="of 100 videos of the miniature nine in ten are at 54 dB or better: it draws nothing"
    ),
    "dpm": ForecastLimits(
        20.0, 0.6, 2e-2, reason="each step draws noise: where an error meets it early, the video goes another way"
    ),
}
"""By scheduler, for ``--fast``."""


def row_of(network: Network) -> str:
    """Return which row a network is held against: its scheme's, or that of what it computes in."""
    return network.precision if network.quantization is None else network.quantization.scheme


def coarsest(rows: Iterable[str]) -> str:
    """Return the row with the widest limits: a whole run is as good as its worst network."""
    return min(rows, key=lambda row: THRESHOLDS[row].psnr)
