"""The parity ladder: its rungs, what was found on each, and which is the first to fail."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cvx_deploy.errors import ParityError
from cvx_deploy.measure.difference import Difference, VideoDifference
from cvx_deploy.parity.divergence import Layer
from cvx_deploy.parity.reduction import Reduction

RungName = Literal["eager", "own-type", "onnx", "rewritten", "quantized", "engine"]
Level = Literal["networks", "trajectory", "video"]
SCHEMA_VERSION = 1

MEANING: dict[RungName, str] = {
    "eager": "diffusers in float32, what all else is held against",
    "own-type": "diffusers in the type the checkpoint is stored in: the noise floor",
    "onnx": "the graphs as traced, without rewrites",
    "rewritten": "the rewritten graphs",
    "quantized": "the quantized graphs",
    "engine": "what the engine runs",
}


@dataclass(frozen=True)
class NetworkResult:
    """One run of one network.

    Attributes:
        case: What it was given, such as batch 2, timestep 999.
        worst: Of its outputs the one that is furthest off; None where it did not run.
        broken: Which limits it breaks, or why it did not run.
    """

    network: str
    shape: str
    case: str
    worst: Difference | None
    broken: tuple[str, ...]

    @property
    def subject(self) -> str:
        """What was compared, in words."""
        return f"{self.network} at {self.shape}, {self.case}"


@dataclass(frozen=True)
class TrajectoryResult:
    """The latents of a whole run.

    Attributes:
        drift: Relative L2 error after each step.
    """

    shape: str
    drift: tuple[float, ...]
    broken: tuple[str, ...]

    @property
    def subject(self) -> str:
        """What was compared, in words."""
        return f"latents at {self.shape}"


@dataclass(frozen=True)
class VideoResult:
    """A whole video; `difference` is None where it was not made."""

    shape: str
    difference: VideoDifference | None
    broken: tuple[str, ...]

    @property
    def subject(self) -> str:
        """What was compared, in words."""
        return f"video at {self.shape}"


@dataclass(frozen=True)
class ForecastResult:
    """A video with steps forecast, against the same engine's video of all steps; see `cvx_deploy.parity.forecast`.

    Attributes:
        steps: What was run and what forecast, in words; None where it was not made, as `difference`.
    """

    shape: str
    difference: VideoDifference | None
    steps: str | None
    broken: tuple[str, ...]

    def __str__(self) -> str:
        if self.difference is None:
            return f"--fast at {self.shape}: {'; '.join(self.broken)}"
        one = self.difference
        figures = f"PSNR {one.psnr:.1f} dB, SSIM {one.ssim:.5f}, flicker {one.flicker:.1e}"
        return f"--fast at {self.shape}, against the engine's own full run: {figures} ({self.steps})"


Result = NetworkResult | TrajectoryResult | VideoResult


@dataclass
class Rung:
    """One form of the model, held against eager float32.

    Attributes:
        precision: Which row of the thresholds it is held against; None for those that are measured and not judged.
        runs_on: What ran it.
        skipped: Why it was left out; empty where it was not.
        notes: What of it was left out, and why.
    """

    name: RungName
    precision: str | None
    runs_on: str
    skipped: str = ""
    notes: list[str] = field(default_factory=list)
    networks: list[NetworkResult] = field(default_factory=list)
    trajectories: list[TrajectoryResult] = field(default_factory=list)
    videos: list[VideoResult] = field(default_factory=list)

    @property
    def results(self) -> tuple[Result, ...]:
        """Everything that was compared."""
        return (*self.networks, *self.trajectories, *self.videos)

    @property
    def failures(self) -> tuple[Result, ...]:
        """What breaks a limit."""
        return tuple(result for result in self.results if result.broken)


@dataclass(frozen=True)
class Divergence:
    """The layers at which a network first differs, going through its blocks in order."""

    network: str
    shape: str
    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        named = ", ".join(f"{layer.name} ({layer.relative_l2:.1e})" for layer in self.layers)
        return f"{self.network} first differs at {named}"


@dataclass(frozen=True)
class Parity:
    """What a check found.

    Attributes:
        conditions: Versions, machine, seed, steps: all that the figures depend on.
        divergence: Where the networks part that the first failing rung fails in.
        reduced: The smallest pieces of those networks that still show it, where they were asked for.
        forecasts: What forecasting steps does to a video of each shape, where that was asked for; no parity.
    """

    bundle: str
    checkpoint: str
    engine: str
    level: Level
    precision: str
    conditions: dict[str, Any]
    rungs: tuple[Rung, ...]
    divergence: tuple[Divergence, ...] = ()
    reduced: tuple[Reduction, ...] = ()
    forecasts: tuple[ForecastResult, ...] = ()

    @property
    def first_failing(self) -> Rung | None:
        """The first rung that fails."""
        return next((rung for rung in self.rungs if rung.failures), None)

    @property
    def error(self) -> ParityError | None:
        """What is wrong, naming the first rung that fails and the layers that differ first."""
        rung = self.first_failing
        if rung is None:
            return self._forecast_error
        first = rung.failures[0]
        place = f"; {'; '.join(map(str, self.divergence))}" if self.divergence else ""
        what = f"{self.bundle} fails at the rung {rung.name} ({MEANING[rung.name]}): {first.subject}: {first.broken[0]}"
        return ParityError(what + place, fix=_fix(rung.name, self.bundle, self.checkpoint))

    @property
    def _forecast_error(self) -> ParityError | None:
        strayed = next((one for one in self.forecasts if one.broken), None)
        if strayed is None:
            return None
        what = (
            f"every rung of {self.bundle} that was tried holds, but its videos do not stand --fast: at {strayed.shape}"
        )
        return ParityError(f"{what} {strayed.broken[0]}", fix=_FORECAST_FIX)

    @property
    def verdict(self) -> str:
        """What a person is told: that all is well, what is wrong, and what was not tried."""
        error = self.error
        skipped = next((rung.skipped for rung in self.rungs if rung.name == "engine"), "")
        if error is not None:
            return f"{error.what}. {error.fix}"
        return (
            f"every rung that was tried holds. Skipped: the rung engine, {skipped}" if skipped else "every rung holds"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; what is not finite becomes null."""
        rung = self.first_failing
        values = {key: value for key, value in asdict(self).items() if key != "rungs"}
        head = {
            "schema_version": SCHEMA_VERSION,
            "passed": self.error is None,
            "first_failing": rung.name if rung else None,
            "skipped": {rung.name: rung.skipped for rung in self.rungs if rung.skipped},
        }
        return {
            key: _finite(value) for key, value in {**head, **values, "rungs": list(map(asdict, self.rungs))}.items()
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for rung in self.rungs:
            if rung.skipped:
                yield f"skipped  {rung.name}: {rung.skipped}"
                continue
            verdict = "FAILED" if rung.failures else "ok"
            yield f"{verdict:<8} {rung.name}: {MEANING[rung.name]} ({rung.runs_on})"
            yield from (f"         {line}" for line in (*summaries(rung), *rung.notes))
            for result in rung.failures:
                yield f"         {result.subject}: {'; '.join(result.broken)}"
        yield from map(str, (*self.divergence, *self.reduced))
        yield from (f"{'FAILED' if one.broken else 'ok':<8} {one}" for one in self.forecasts)
        if self.error is None:  # what is wrong is said on stderr
            yield self.verdict


def summaries(rung: Rung) -> Iterator[str]:
    """Yield a line for each network, and one each for the latents and the video."""
    for name in dict.fromkeys(result.network for result in rung.networks):
        found = [result.worst for result in rung.networks if result.network == name and result.worst is not None]
        if found:
            worst = max(found, key=lambda difference: difference.relative_l2)
            yield (
                f"{name}: relative L2 {worst.relative_l2:.1e}, max {worst.max_abs:.1e}, "
                f"1 - cosine {1 - worst.cosine:.1e} in {len(found)} runs"
            )
    for trajectory in rung.trajectories:
        if trajectory.drift:
            yield f"latents at {trajectory.shape}: drift {max(trajectory.drift):.1e} in {len(trajectory.drift)} steps"
    for video in rung.videos:
        if video.difference is not None:
            one = video.difference
            yield f"video at {video.shape}: PSNR {one.psnr:.1f} dB, SSIM {one.ssim:.5f}, flicker {one.flicker:.1e}"


_FORECAST_FIX = "run it without --fast, or find its own steps to run: cvx-deploy calibrate-cache --help"
_FIXES: dict[RungName, str] = {
    "eager": "check the checkpoint: its own networks give no numbers",
    "own-type": "check the checkpoint: its own networks give no numbers",
    "onnx": "report this with the checkpoint's configs: the trace is wrong",
    "engine": "run it with another --engine, or at another precision",
    "quantized": "quantize fewer layers, or in another precision",
}


def _fix(rung: RungName, bundle: str, checkpoint: str) -> str:
    again = f"the bundle and {checkpoint} do not belong together: export it again to {bundle}"
    return _FIXES.get(rung, again)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
