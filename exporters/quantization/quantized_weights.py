"""A component's weights in, one safetensors file out, in which its linear layers are in 8 or 4 bits.

Tensors are read, quantized and written one at a time, in the order of their names, so that the full-size networks need
little memory. What is not quantized is copied as it is: a quantized network needs nothing of its checkpoint.

Scales and rounding to 8 bits are torchao's; to 4 bits, where more is to be lost, see `rounding`. Scales are rounded to
the type the network computes in before weights are divided by them, so that the graph dequantizes with exactly the
numbers the weights were rounded for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

from cvx_deploy.bundle.safetensors import StoredTensor
from cvx_deploy.bundle.schema import WeightFile
from cvx_deploy.errors import CalibrationError, CheckpointError
from cvx_deploy.exporters.quantization.rounding import least_error_step, rounded_by_moments, to_nearest
from cvx_deploy.exporters.sources.checkpoint import DerivedTensors
from cvx_deploy.exporters.sources.weights import (
    TORCH_TYPES,
    PlannedTensor,
    load_tensor,
    stored_tensors,
    write_safetensors,
)
from cvx_deploy.exporters.tracing.contract import TORCH_DTYPES
from cvx_deploy.precision import SCHEMES, Scheme
from cvx_deploy.progress import Progress
from cvx_deploy.quantize.layers import leader
from cvx_deploy.quantize.placement import SMOOTHER, WEIGHT_SCALE, Placement, group_size
from cvx_deploy.quantize.recipe import NetworkPrecision
from cvx_deploy.quantize.table import CalibrationTable

_TYPES = {"INT8": torch.int8, "FLOAT8E4M3FN": torch.float8_e4m3fn}
ALPHA = 0.7
"""SmoothQuant's strength: how much of an outlier moves into the weights; docs/quantization.md has why."""
_ATTENTION = ("query", "key", "value")


@dataclass(frozen=True)
class LayerWeights:
    """The quantizing of one component.

    Args:
        component: transformer or text_encoder.
        tensors: Its tensors in the checkpoint.
        place: Where a file that they name lies.
        precision: A scheme, and what else is computed in.
        layers: Which layers are quantized.
        table: The activations' ranges, and for 4 bits their second moments; None where the scheme quantizes weights
            only, and rounds them to nearest.
        attention: Whether attention is to multiply in E4M3.
        alpha: SmoothQuant's strength, 0 to 1.
    """

    component: str
    tensors: dict[str, StoredTensor]
    place: Callable[[str], Path]
    precision: NetworkPrecision
    layers: list[str]
    table: CalibrationTable | None = None
    attention: bool = False
    alpha: float = ALPHA
    _smoothers: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.table is None and (self.scheme.activations is not None or self.attention):
            raise CalibrationError(
                f"{self.precision.scheme} of the {self.component} needs the ranges of its activations",
                fix="run cvx-deploy quantize, and name what it writes with --calibration; int8wo and int4wo need none",
            )

    @property
    def scheme(self) -> Scheme:
        """The scheme."""
        assert self.precision.scheme is not None
        return SCHEMES[self.precision.scheme]

    @property
    def compute(self) -> torch.dtype:
        """The type of the scales."""
        return TORCH_DTYPES[self.precision.compute]

    def placement(self) -> Placement:
        """Return where Q/DQ nodes go, with the scales of activations."""
        scales = {layer: self.activation_scale(layer) for layer in self.layers}
        blocks = sorted({layer.partition(".attn1.")[0] for layer in self.layers if ".attn1." in layer})
        attention = {block: self._attention_scales(block) for block in blocks} if self.attention else {}
        return Placement(self.scheme, scales, attention)

    def activation_scale(self, layer: str) -> float | None:
        """Return the scale of a layer's input, rounded to the compute type; None for weights only."""
        if self.scheme.activations is None:
            return None
        amax = self._amax(layer)
        if self.scheme.smooth:
            amax = amax * self.smoother(layer).float()
        return self._rounded(amax.max() / self.scheme.largest).item()

    def _attention_scales(self, block: str) -> tuple[float, float, float]:
        largest = SCHEMES["fp8"].largest
        query, key, value = (
            self._rounded(self._amax(f"{block}.attn1.{part}").max() / largest).item() for part in _ATTENTION
        )
        return query, key, value

    def _amax(self, place: str) -> torch.Tensor:
        assert self.table is not None
        name = place if self.component == "transformer" else f"{self.component}/{place}"
        if name not in self.table.amax:
            raise CalibrationError(
                f"the calibration table has no ranges of {name}",
                fix="calibrate again, with the text encoder if it is to be int8 or fp8",
            )
        return torch.from_numpy(self.table.amax[name].copy())

    def _rounded(self, scale: torch.Tensor) -> torch.Tensor:
        """Round a positive scale to the compute type, and never to nothing."""
        return scale.to(self.compute).clamp(min=torch.finfo(self.compute).tiny)

    def smoother(self, layer: str) -> torch.Tensor:
        """Return what a layer's input is multiplied by, ``(in,)`` in the compute type: SmoothQuant's 1/s."""
        first = leader(layer)
        if first not in self._smoothers:
            activations = self._amax(layer)
            sharing = [other for other in self.layers if leader(other) == first]
            weights = torch.stack([self._weight(other).abs().amax(0) for other in sharing]).amax(0)
            factor = activations.clamp(min=1e-5) ** self.alpha / weights.clamp(min=1e-5) ** (1 - self.alpha)
            self._smoothers[first] = self._rounded(1 / factor.clamp(min=1e-5))
        return self._smoothers[first]

    def _weight(self, layer: str) -> torch.Tensor:
        """Return a layer's weight ``(out, in)`` in float32."""
        stored = self.tensors[f"{layer}.weight"]
        weight = load_tensor(self.place(stored.file), stored).float()
        if not weight.isfinite().all():
            raise CheckpointError(
                f"{stored.file}: {layer}.weight holds what is no number, so that it has no scale",
                fix="fetch the file again",
            )
        return weight

    def quantized(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's weight ``(in, out)``, 4 bits in int8, and its scale.

        That is ``(out,)``, by groups ``(groups, out)``.
        """
        weight = self._weight(layer)
        if self.scheme.smooth:
            weight = weight / self.smoother(layer).float()
        if self.scheme.group is not None:
            return self._in_groups(layer, weight, group_size(self.scheme, weight.shape[1]))
        largest, dtype = self.scheme.largest, _TYPES[self.scheme.weights]
        block = (1, weight.shape[1])
        if dtype == torch.float8_e4m3fn:
            scale = self._rounded(weight.abs().amax(1, keepdim=True) / largest)
            return as_float8(weight, scale.float()).T, scale[:, 0]
        limits = (-int(largest), int(largest))
        scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, dtype, *limits)
        scale = self._rounded(scale).reshape(weight.shape[0], -1)
        quantized = quantize_affine(weight, block, scale.float(), zero.reshape(scale.shape), dtype, *limits)
        return quantized.T, scale[:, 0]

    @property
    def by_moments(self) -> bool:
        """Whether rounding makes up for its errors: to 4 bits, where the table has second moments."""
        told = self.table is not None and bool(self.table.moments)
        return told and self.scheme.group is not None and self.component == "transformer"

    def _in_groups(self, layer: str, weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        limits = (-int(self.scheme.largest) - 1, int(self.scheme.largest))
        scale = self._rounded(least_error_step(weight, group, limits))
        if self.by_moments:
            values = rounded_by_moments(weight, scale.float(), self._moments(layer), limits)
        else:
            values = to_nearest(weight, scale.float().repeat_interleave(group, 1), limits)
        return values.to(torch.int8).T, scale.T

    def _moments(self, layer: str) -> torch.Tensor:
        assert self.table is not None
        first = leader(layer)
        if first not in self.table.moments:
            raise CalibrationError(
                f"the calibration table has no second moments of {first}",
                fix="calibrate again with cvx-deploy quantize --second-moments",
            )
        return torch.from_numpy(self.table.moments[first].copy())


def as_float8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Divide by a scale and round to float8 e4m3, what is beyond its largest number to that (ONNX, ``saturate``)."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (values.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)


def quantize_component(weights: LayerWeights, folder: Path, progress: Progress) -> DerivedTensors:
    """Write every tensor of a component, its layers quantized, to one file in `folder`."""
    file = f"{weights.component}.{weights.precision.scheme}.safetensors"
    planned = _plan(weights)
    total = sum(tensor.nbytes for tensor in planned)
    make = lru_cache(maxsize=1)(weights.quantized)
    with progress.task(f"quantize {weights.component}", total) as advance:
        digest = write_safetensors(folder / file, planned, lambda tensor: _value(weights, make, tensor), advance)
    stat = (folder / file).stat()
    entry = WeightFile(file, stat.st_size, digest, stat.st_mtime_ns, in_bundle=True)
    stored = stored_tensors(file, planned)
    if weights.scheme.weights == "INT4":
        stored |= {name: _as_int4(stored[name], weights.tensors[name]) for name in _weights_of(weights)}
    return DerivedTensors(folder / file, entry, stored)


def _weights_of(weights: LayerWeights) -> list[str]:
    return [f"{layer}.weight" for layer in weights.layers]


def _as_int4(packed: StoredTensor, original: StoredTensor) -> StoredTensor:
    """Say of two numbers a byte, which safetensors has no type for, what they are."""
    outputs, inputs = original.shape
    return replace(packed, dtype="I4", shape=(inputs, outputs))


def _plan(weights: LayerWeights) -> list[PlannedTensor]:
    """Return every tensor of the file; a layer's own stand together."""
    quantized, planned, smoothers = set(_weights_of(weights)), [], set()
    for name, stored in sorted(weights.tensors.items()):
        if name not in quantized:
            planned.append(PlannedTensor(name, TORCH_TYPES[stored.dtype], stored.shape))
            continue
        layer, (outputs, inputs) = name.removesuffix(".weight"), stored.shape
        if weights.scheme.weights == "INT4":
            planned.append(PlannedTensor(name, torch.uint8, (inputs * outputs // 2,)))
        else:
            planned.append(PlannedTensor(name, _TYPES[weights.scheme.weights], (inputs, outputs)))
        groups = inputs // group_size(weights.scheme, inputs)
        shape = (groups, outputs) if weights.scheme.group else (outputs,)
        planned.append(PlannedTensor(f"{layer}.{WEIGHT_SCALE}", weights.compute, shape))
        if weights.scheme.smooth and leader(layer) not in smoothers:
            smoothers.add(leader(layer))
            planned.append(PlannedTensor(f"{leader(layer)}.{SMOOTHER}", weights.compute, (inputs,)))
    return planned


def _value(
    weights: LayerWeights,
    quantized: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
    tensor: PlannedTensor,
) -> torch.Tensor:
    layer, _, kind = tensor.name.rpartition(".")
    if kind == SMOOTHER:
        return weights.smoother(layer)
    if kind == WEIGHT_SCALE:
        return quantized(layer)[1]
    if kind == "weight" and tensor.dtype in (torch.uint8, *_TYPES.values()):
        weight = quantized(layer)[0]
        return _packed(weight) if tensor.dtype == torch.uint8 else weight
    stored = weights.tensors[tensor.name]
    return load_tensor(weights.place(stored.file), stored)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Return 4-bit numbers two a byte, the first in the low half (ONNX, "4 bit integer types")."""
    halves = values.contiguous().reshape(-1, 2).view(torch.uint8) & 0xF
    return halves[:, 0] | halves[:, 1] << 4
