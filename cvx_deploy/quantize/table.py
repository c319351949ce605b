"""The calibration table: what a network's activations looked like, for the scales of static quantization.

One safetensors file. For every observed tensor, named by its place in the checkpoint's modules
(``transformer_blocks.0.attn1.to_q`` for what that linear takes; ``transformer_blocks.0.attn1.query``, ``key`` and
``value`` for what attention takes), it holds ``PLACE.amax``, float32 ``(channels,)``: the largest magnitude of each
channel over every sample. Where it was asked for, ``PLACE.moments`` joins it, for the transformer's linears, once for
those that take the same input: float32 ``(stretches, size, size)``, the mean of the products of every two channels of a
stretch of them, over the tokens of video and, at a tenth of their weight, of text. Whole, the 5b's moments would take
30 GB; by stretches of 256 they take 0.93.

Its metadata says, as JSON under the one key ``calibration``, what was observed and how.
Tables of version 1 held a percentile of every place, too, which nothing used; they are read without it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import MOST_STEPS, Factor, Positive
from cvx_deploy.errors import CalibrationError
from cvx_deploy.families.cogvideox.models import Traits
from cvx_deploy.files import staged_file
from cvx_deploy.precision import Precision
from cvx_deploy.reading import check_regular, reading
from cvx_deploy.shape import Shape
from cvx_deploy.terminal import safe

SCHEMA_VERSION = 2
_READ = (1, SCHEMA_VERSION)
_KEY = "calibration"
_LARGEST = 1 << 30  # bytes; a full-size model's table has some 20 MB, with second moments 0.95 GB
_STRETCH = 256  # channels whose second moments are known together
_AGAIN = "calibrate again; run: cvx-deploy quantize --help"


@dataclass(frozen=True)
class Conditions:
    """How a table came to be.

    Attributes:
        checkpoint: A digest of the weights that were observed.
        traits: The architecture.
        shape: The video size.
        prompts: SHA-256 of the prompts' text, and `prompt_count` how many there were.
        steps: Of the sampler; `observed` are the indices of those whose activations were recorded.
        guidance_scale: 1 observes the conditional branch alone.
        compute: What the model computed in.
        tools: Versions of the programs that made it.
        second_moments: Whether they were observed, too.
    """

    schema_version: int
    checkpoint: str
    traits: Traits
    shape: Shape
    prompts: str
    prompt_count: Positive
    steps: Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]
    observed: tuple[Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)], ...]
    guidance_scale: Factor
    seed: int
    compute: Precision
    tools: dict[str, str]
    second_moments: bool = False


@dataclass(frozen=True)
class CalibrationTable:
    """Statistics of a transformer's activations.

    Attributes:
        amax: By place, float32 ``(channels,)``.
        moments: By place, float32 ``(stretches, size, size)``; of none unless they were asked for.
    """

    conditions: Conditions
    amax: Mapping[str, NDArray[np.float32]]
    moments: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, values in (*self.amax.items(), *self.moments.items()):
            if not np.isfinite(values).all():
                raise CalibrationError(
                    f"the activations of {place} were not numbers while they were observed",
                    fix="check the checkpoint's weights, then calibrate again in bf16 or fp32",
                )

    def write(self, path: Path) -> None:
        """Write the table, replacing an earlier one when whole."""
        from safetensors.numpy import save

        tensors = {f"{place}.amax": np.ascontiguousarray(channels) for place, channels in self.amax.items()}
        tensors |= {f"{place}.moments": np.ascontiguousarray(values) for place, values in self.moments.items()}
        text = json.dumps(asdict(self.conditions), sort_keys=True)
        with staged_file(path) as temporary:
            temporary.write_bytes(save(dict(sorted(tensors.items())), {_KEY: text}))

    @classmethod
    def read(cls, path: Path) -> "CalibrationTable":
        """Read a table.

        Raises:
            CalibrationError: There is none, it is damaged, of another schema version, or holds what is no number.
        """
        from safetensors import safe_open

        if not path.exists():
            raise CalibrationError(f"there is no calibration table {path}", fix=_AGAIN)
        check_regular(path, CalibrationError, fix=_AGAIN, limit=_LARGEST)
        with reading(path, CalibrationError, fix=_AGAIN), safe_open(path, "np") as file:
            conditions = _conditions(path, (file.metadata() or {}).get(_KEY))
            names = [name for name in file.keys() if name.endswith(".amax")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
            _check_tensors(tensors)
            moments = _moments(file, tensors)
            if conditions.schema_version < SCHEMA_VERSION:
                _check_percentiles(file, names)
            return cls(
                replace(conditions, schema_version=SCHEMA_VERSION),
                {name.removesuffix(".amax"): tensor for name, tensor in tensors.items()},
                moments,
            )

    def as_dict(self) -> dict[str, object]:
        """Return how it came to be, and by place the largest value."""
        places = {place: float(self.amax[place].max()) for place in sorted(self.amax)}
        return {"conditions": asdict(self.conditions), "places": places}

    def require(self, traits: Traits, checkpoint: str, shape: Shape, any_shape: bool) -> None:
        """Raise CalibrationError unless the table was made from this checkpoint at this shape.

        Args:
            traits: Of the checkpoint.
            checkpoint: Its digest.
            shape: What is to be quantized.
            any_shape: Whether statistics of another shape will do.
        """
        mine = self.conditions
        if mine.traits != traits or mine.checkpoint != checkpoint:
            raise CalibrationError(
                "the calibration table is of another model, or of other weights", fix="calibrate this checkpoint"
            )
        if mine.shape != shape and not any_shape:
            raise CalibrationError(
                f"the calibration table was made at {mine.shape}, the export is for {shape}",
                fix=f"calibrate at {shape}, or accept these statistics with --calibration-any-shape",
            )


def _check_tensors(tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError unless there are ranges, each of one channel or more, in float32."""
    if not tensors:
        raise ValueError("it holds no ranges")
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or tensor.ndim != 1 or not tensor.size:
            raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
        if (tensor < 0).any():
            raise ValueError(f"{name} is negative, and is to be a magnitude")


def _moments(file: Any, ranges: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Read the second moments; raise ValueError where they are none, or not of the channels that have ranges."""
    found = {}
    for name in [name for name in file.keys() if name.endswith(".moments")]:  # noqa: SIM118
        place, values = name.removesuffix(".moments"), file.get_tensor(name)
        channels = ranges[f"{place}.amax"].size if f"{place}.amax" in ranges else 0
        size = stretch_size(channels)
        if values.dtype != np.float32 or values.shape != (channels // max(size, 1), size, size) or not channels:
            raise ValueError(f"{name} is {values.dtype} of shape {list(values.shape)}, beside {channels} ranges")
        if (np.diagonal(values, axis1=1, axis2=2) < 0).any():
            raise ValueError(f"{name} has a negative square")
        found[place] = values
    return found


def stretch_size(channels: int) -> int:
    """Return how many channels' second moments are known together: 256, or what divides another number of them."""
    return math.gcd(channels, _STRETCH)


def _check_percentiles(file: Any, names: Iterable[str]) -> None:
    """Raise ValueError unless a table of version 1 is whole: it holds one number beside each range."""
    for name in names:
        beside = f"{name.removesuffix('.amax')}.percentile"
        if list(file.get_slice(beside).get_shape()) != [1]:
            raise ValueError(f"{beside} is no one number")


def _conditions(path: Path, text: str | None) -> Conditions:
    if text is None:
        raise CalibrationError(f"{path} is no calibration table: its metadata does not say so", fix=_AGAIN)
    raw = msgspec.json.decode(text)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in _READ:
        raise CalibrationError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}", fix=_AGAIN)
    return msgspec.convert(raw, Conditions)


def describe(table: CalibrationTable) -> str:
    """Return a table in words: how it came to be, and the places with the worst outliers."""
    told = table.conditions
    steps = ", ".join(str(step + 1) for step in told.observed)
    widest = sorted(table.amax, key=lambda place: -_outlier(table, place))[:5]
    return "\n".join(
        [
            f"{told.prompt_count} prompts at {told.shape}, steps {steps} of {told.steps}, guidance scale "
            f"{told.guidance_scale:g}, seed {told.seed}, computed in {told.compute}"
            + (", with second moments" if table.moments else ""),
            f"{len(table.amax)} places; the largest channel over the one in the middle, where it is worst:",
            *(
                f"  {safe(place)}: {table.amax[place].max():.3g}, {_outlier(table, place):.1f} times"
                for place in widest
            ),
        ]
    )


def _outlier(table: CalibrationTable, place: str) -> float:
    return float(table.amax[place].max()) / max(float(np.median(table.amax[place])), 1e-9)


def describe_difference(first: CalibrationTable, second: CalibrationTable) -> tuple[dict[str, object], str]:
    """Return what differs between two tables, as values and in words; ratios are the second's over the first's."""
    mine, yours = asdict(first.conditions), asdict(second.conditions)
    differing = {key: [mine[key], yours[key]] for key in mine if mine[key] != yours[key]}
    shared = [place for place in first.amax if place in second.amax]
    ratios = {place: float(second.amax[place].max() / max(first.amax[place].max(), 1e-9)) for place in shared}
    furthest = sorted(ratios, key=lambda place: -abs(np.log(max(ratios[place], 1e-9))))
    lonely = sorted(first.amax.keys() ^ second.amax.keys())
    lines = [safe(f"{key}: {old} and {new}") for key, (old, new) in differing.items()]
    lines += [f"only in one: {safe(place)}" for place in lonely[:5]]
    lines += [f"{safe(place)}: {ratios[place]:.3f} times" for place in furthest[:5] if ratios[place] != 1]
    values: dict[str, object] = {"conditions": differing, "ratios": ratios, "only_in_one": lonely}
    return values, "\n".join(lines) or "the two tables are the same"
