"""Which layers or blocks of the transformer suffer from quantization: what each alone does to the output.

The transformer's inputs are recorded from a sampled video at an early, a middle and a late step. Its reference output
comes from the model in its own type. Then one place after the other computes as the exported graph would, with the
same scales and rounding, and the blocks after it run again; the blocks before it have not changed. The error is that
of the transformer's output: relative L2 norm, and peak signal-to-noise ratio over the reference's range.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import quantize_affine

from cvx_deploy.errors import RecipeError
from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest, encode, sampler
from cvx_deploy.exporters.quantization.observe import Observations
from cvx_deploy.exporters.quantization.quantized_weights import LayerWeights, as_float8
from cvx_deploy.files import staged_file
from cvx_deploy.precision import SCHEMES
from cvx_deploy.progress import Progress
from cvx_deploy.quantize.recipe import NetworkPrecision, Recipe
from cvx_deploy.quantize.table import CalibrationTable

SCHEMA_VERSION = 1
_BLOCKS = "transformer_blocks"


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one place alone does to the transformer's output.

    Attributes:
        place: A layer, or a block.
        relative_l2: The error's norm over the output's, the mean over the steps.
        psnr: In dB over the output's range, the mean over the steps.
        by_step: `relative_l2` at each of the recorded steps.
    """

    place: str
    relative_l2: float
    psnr: float
    by_step: tuple[float, ...]


@dataclass(frozen=True)
class SensitivityReport:
    """A ranking, the most sensitive place first, and what to leave out.

    Attributes:
        precision: The scheme and the type that were judged.
        timesteps: At which the transformer was judged.
        psnr_of_all: In dB, with everything quantized.
        min_psnr: What was asked for; None for a ranking only.
        exclude: The fewest places, by the ranking, without which the target is reached.
        psnr: In dB, with all but those quantized.
    """

    precision: str
    timesteps: tuple[int, ...]
    ranking: tuple[Sensitivity, ...]
    psnr_of_all: float
    min_psnr: float | None
    exclude: tuple[str, ...]
    psnr: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; ``export --exclude`` reads ``exclude``. A PSNR without any error is None."""
        values = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for told in (values, *values["ranking"]):
            told.update({key: None for key, value in told.items() if value == math.inf})
        return values


def sensitivity(
    request: CalibrationRequest,
    precision: NetworkPrecision,
    table: CalibrationTable | None,
    progress: Progress,
    *,
    by: str = "block",
    min_psnr: float | None = None,
) -> SensitivityReport:
    """Rank the places of the transformer by what quantizing each alone does to its output.

    Args:
        request: The model, and the video whose steps are judged: its first prompt's.
        precision: The scheme.
        table: The activations' ranges, where the scheme needs them.
        progress: Shows the places done.
        by: block or layer: what a place is.
        min_psnr: In dB: exclude the most sensitive places until the output is as good as this.
    """
    tensors = request.checkpoint.tensors("transformer")
    layers = request.checkpoint.family.layers.quantizable("transformer", tensors)
    weights = LayerWeights("transformer", tensors, request.checkpoint.place, precision, layers, table)
    unseen = Observations()
    with torch.inference_mode(), sampler(request, unseen) as sampling:
        (embeds, *_) = encode(replace(request, prompts=request.prompts[:1]), unseen, 0, progress)
        judge = _Judge(sampling.transformer, sampling.record(embeds), weights)
        places = _places(layers, by)
        found = []
        with progress.task("sensitivity", len(places)) as advance:
            for place, own in places.items():
                found.append(judge.sensitivity(place, own))
                advance(1)
        ranking = sorted(found, key=lambda one: -one.relative_l2)
        with progress.task("exclusions"):
            everything = judge.psnr(layers)
            exclude = _fewest([one.place for one in ranking], places, judge, min_psnr, everything)
            left = [layer for place, own in places.items() if place not in exclude for layer in own]
            psnr = judge.psnr(left) if exclude else everything
    return SensitivityReport(
        str(precision), judge.timesteps, tuple(ranking), everything, min_psnr, tuple(exclude), psnr
    )


def check_scheme(text: str, request: CalibrationRequest) -> NetworkPrecision:
    """Return the transformer's precision that a word such as int8 names.

    Raises:
        RecipeError: It quantizes nothing.
    """
    precision = Recipe.parse(text, request.precision).transformer
    if precision.scheme is None:
        raise RecipeError(f"{text} quantizes nothing that could be judged", fix="use int8, int8wo, int4wo or fp8")
    return precision


def draw(report: SensitivityReport, path: Path) -> Path:
    """Draw the errors at every recorded step, in the network's order, and what is excluded."""
    from matplotlib.figure import Figure

    ranking = sorted(
        report.ranking, key=lambda one: [int(word) if word.isdigit() else word for word in one.place.split(".")]
    )
    figure = Figure(figsize=(max(6.0, 0.22 * len(ranking)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, timestep in enumerate(report.timesteps):
        axes.plot([one.by_step[index] for one in ranking], marker="o", markersize=3, label=f"timestep {timestep}")
    for index, one in enumerate(ranking):
        if one.place in report.exclude:
            axes.axvspan(index - 0.5, index + 0.5, color="tab:red", alpha=0.15)
    axes.set_xticks(
        range(len(ranking)), [one.place.removeprefix(f"{_BLOCKS}.") for one in ranking], rotation=90, fontsize=7
    )
    axes.set_ylabel("relative L2 error of the output")
    axes.set_title(
        f"{report.precision}: each place quantized alone" + (", excluded ones in red" if report.exclude else "")
    )
    axes.set_yscale("log")
    axes.legend()
    with staged_file(path) as temporary:
        figure.savefig(temporary, format="svg")
    return path


def _places(layers: list[str], by: str) -> dict[str, list[str]]:
    if by == "layer":
        return {layer: [layer] for layer in layers}
    places: dict[str, list[str]] = {}
    for layer in layers:
        places.setdefault(".".join(layer.split(".")[:2]), []).append(layer)
    return places


def _fewest(
    ranked: list[str], places: dict[str, list[str]], judge: "_Judge", target: float | None, everything: float
) -> list[str]:
    """Return the shortest head of the ranking without which the target is reached, found by halving."""
    if target is None or everything >= target:
        return []
    least, most = 1, len(ranked)
    while least < most:
        middle = (least + most) // 2
        left = [layer for place in ranked[middle:] for layer in places[place]]
        least, most = (least, middle) if judge.psnr(left) >= target else (middle + 1, most)
    return ranked[:most]


class _Judge:
    """Runs the transformer with some layers quantized, and compares its output with the reference.

    Attributes:
        timesteps: Of the recorded inputs.
    """

    def __init__(self, transformer: Any, inputs: list[dict[str, Any]], weights: LayerWeights) -> None:
        self._transformer, self._inputs, self._weights = transformer, inputs, weights
        self.timesteps = tuple(int(given["timestep"].reshape(-1)[0]) for given in inputs)
        self._before: list[list[Any]] = []
        self._reference = [self._observe(given) for given in inputs]

    def _observe(self, given: dict[str, Any]) -> torch.Tensor:
        """Return the output, and keep what every block put out."""
        kept: list[Any] = []
        blocks = self._transformer.get_submodule(_BLOCKS)
        handles = [block.register_forward_hook(lambda _, __, output: kept.append(output)) for block in blocks]
        try:
            return self._run(given)
        finally:
            self._before.append(kept)
            for handle in handles:
                handle.remove()

    def _run(self, given: dict[str, Any]) -> torch.Tensor:
        output: torch.Tensor = self._transformer(**given)[0]
        return output.float()

    def sensitivity(self, place: str, layers: list[str]) -> Sensitivity:
        """Judge some layers of one block alone."""
        first = int(layers[0].split(".")[1])
        with computing_quantized(self._transformer, layers, self._weights):
            errors = [self._error(index, first) for index in range(len(self._inputs))]
        relative = tuple(error for error, _ in errors)
        return Sensitivity(place, _mean(relative), _mean([psnr for _, psnr in errors]), relative)

    def psnr(self, layers: list[str]) -> float:
        """Return how good the output is with all of these layers quantized, in dB."""
        with computing_quantized(self._transformer, layers, self._weights):
            return _mean([self._error(index, 0)[1] for index in range(len(self._inputs))])

    def _error(self, index: int, first: int) -> tuple[float, float]:
        """Return relative L2 norm and PSNR when the blocks before `first` are as they were."""
        blocks = self._transformer.get_submodule(_BLOCKS)
        kept = self._before[index][first - 1] if first else None
        short = blocks if kept is None else torch.nn.ModuleList([_Kept(kept), *blocks[first:]])
        self._transformer.transformer_blocks = short
        try:
            output = self._run(self._inputs[index])
        finally:
            self._transformer.transformer_blocks = blocks
        reference = self._reference[index]
        error = (output - reference).square().mean().sqrt().item()
        if error == 0:
            return 0.0, math.inf
        extent = (reference.max() - reference.min()).item()
        return error / reference.square().mean().sqrt().item(), 20 * math.log10(extent / error)


class _Kept(torch.nn.Module):
    """Stands for blocks whose output is known."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return it."""
        return self._output


@contextlib.contextmanager
def computing_quantized(transformer: Any, layers: list[str], weights: LayerWeights) -> Iterator[None]:
    """Let layers of a network compute as the exported graph would, for the block."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            module = transformer.get_submodule(layer)
            forward = _fake(module, layer, weights)
            module.forward = forward
            stack.callback(module.__dict__.pop, "forward")
        yield


def _fake(module: Any, layer: str, weights: LayerWeights) -> Any:
    scheme = weights.scheme
    scale = weights.activation_scale(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        values, weight_scale = weights.quantized(layer)
        groups = weight_scale.float().reshape(-1, values.shape[1])
        weight = values.float() * groups.repeat_interleave(values.shape[0] // len(groups), 0)
        if scale is not None:
            smoothed = x * weights.smoother(layer).to(x) if scheme.smooth else x
            x = _rounded(smoothed.float(), scale, scheme.activations).to(x.dtype)
        output: torch.Tensor = torch.nn.functional.linear(x, weight.T.to(x), module.bias)
        return output

    return forward


def _rounded(x: torch.Tensor, scale: float, dtype: str | None) -> torch.Tensor:
    """Quantize and dequantize a tensor with one scale, as QuantizeLinear and DequantizeLinear do."""
    factor = torch.tensor(scale, device=x.device)
    if dtype == "FLOAT8E4M3FN":
        return as_float8(x, factor).float() * factor
    largest = int(SCHEMES["int8"].largest)
    zero = torch.zeros((), dtype=torch.int32, device=x.device)
    in_int8: torch.Tensor = quantize_affine(x, tuple(x.shape), factor, zero, torch.int8, -largest - 1, largest)
    return in_int8.float() * factor


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)
