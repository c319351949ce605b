"""What a model will take: for every precision, memory by stage, whether it fits, and how long a step takes at best."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from cvx_deploy.engines.gpus import GpuModel
from cvx_deploy.engines.tensorrt.memory import build_memory
from cvx_deploy.errors import ShapeError
from cvx_deploy.estimate.memory import (
    NETWORKS,
    PRECISIONS,
    WORKSPACE,
    Native,
    Needs,
    NetworkName,
    PrecisionName,
    cpu_peak,
    gpu_needs,
    tiled,
    weight_bytes,
)
from cvx_deploy.estimate.speed import Speed, speed
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import Limits, Model
from cvx_deploy.families.registry import FAMILIES
from cvx_deploy.measure.units import columns, size_text, time_text
from cvx_deploy.shape import Shape

_PHASES: Final[dict[str, tuple[NetworkName, ...]]] = {
    "text": ("text_encoder",),
    "transformer": ("modulation", "transformer"),
    "vae": ("vae_decoder",),
}
"""Networks that a run within a limit of memory has loaded together; see `runtime.trt`."""
_BUNDLE = 6 << 20  # graphs and tokenizer; benchmarks/results/export.json


@dataclass(frozen=True)
class Option:
    """One precision.

    Attributes:
        needs: Of each network, on a GPU.
        tiled: Of each network, when the VAE decodes tile by tile.
        build: Host memory that the largest build takes.
        engines: Bytes of the engines on disk.
        speed: The least time; None where no GPU is named, or it has no units for a type.
    """

    precision: PrecisionName
    needs: dict[NetworkName, Needs]
    tiled: dict[NetworkName, Needs]
    build: int
    engines: int
    speed: Speed | None

    @property
    def residencies(self) -> dict[str, int]:
        """Bytes at the largest stage for every way of running it, the plainest first."""
        return {
            "all resident": _all_resident(self.needs),
            "one stage at a time": max(_phases(self.needs).values()),
            "all resident, VAE tiled": _all_resident(self.tiled),
            "one stage at a time, VAE tiled": max(_phases(self.tiled).values()),
        }

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each stage with its own networks alone, the VAE's tiled too."""
        return {**_phases(self.needs), "vae, tiled": _phases(self.tiled)["vae"]}

    def residency(self, vram: int) -> str | None:
        """Return the plainest way that fits into that much memory; None where there is none."""
        return next((name for name, size in self.residencies.items() if size <= vram), None)


def _all_resident(needs: dict[NetworkName, Needs]) -> int:
    """Every network's weights; all compute in one block, and the caches are there while decoding."""
    weights = sum(one.weights for one in needs.values())
    return WORKSPACE + weights + max(one.activations + one.state for one in needs.values())


def _phases(needs: dict[NetworkName, Needs]) -> dict[str, int]:
    return {name: _all_resident({network: needs[network] for network in parts}) for name, parts in _PHASES.items()}


@dataclass(frozen=True)
class Estimate:
    """What a model takes at a shape.

    Attributes:
        batch: 2 with guidance.
        vram: Bytes of GPU memory there are; None where that was not said.
        checkpoint: Bytes to fetch.
        cpu: The most host memory each network takes in ONNX Runtime, in fp32.
    """

    model: Model
    shape: Shape
    tokens: int
    batch: int
    steps: int
    vram: int | None
    gpu: GpuModel | None
    checkpoint: int
    cpu: dict[NetworkName, int]
    options: tuple[Option, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values: bytes and seconds."""
        return {
            "model": self.model.name,
            "shape": str(self.shape),
            "tokens": self.tokens,
            "batch": self.batch,
            "steps": self.steps,
            "vram_bytes": self.vram,
            "gpu": self.gpu.name if self.gpu else None,
            "checkpoint_bytes": self.checkpoint,
            "bundle_bytes": _BUNDLE,
            "workspace_bytes": WORKSPACE,
            "onnxruntime_fp32_peak_bytes": self.cpu,
            "precisions": {option.precision: self._values(option) for option in self.options},
        }

    def _values(self, option: Option) -> dict[str, Any]:
        return {
            "networks": {name: asdict(needs) for name, needs in option.needs.items()},
            "stage_bytes": option.phases,
            "residency_bytes": option.residencies,
            "fits": None if self.vram is None else option.residency(self.vram),
            "build_memory_bytes": option.build,
            "engines_bytes": option.engines,
            "seconds": option.speed and {**asdict(option.speed), "video": option.speed.video(self.steps)},
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        guided = "with guidance" if self.batch == 2 else "without guidance"
        yield f"{self.model.name} at {self.shape}, {guided}: {self.tokens:,} tokens; nothing was fetched or built"
        yield (
            "\nGPU memory: what there is of each, then each stage by itself, then everything at once; "
            f"stages and sums with {size_text(WORKSPACE)} that CUDA and its libraries are assumed to take"
        )
        yield from columns(list(self._memory_rows()))
        if self.gpu is not None:
            yield f"\nleast time on {self.gpu.name}, an estimate from below by its peaks and bandwidth:"
            yield from columns(list(self._time_rows()))
        yield f"\nto fetch: {size_text(self.checkpoint)}; a bundle adds {size_text(_BUNDLE)}, the weights stay"
        yield "a build's host memory and its engines on disk:"
        yield from columns(list(self._build_rows()))
        most = max(self.cpu, key=lambda name: self.cpu[name])
        yield f"\non a CPU with ONNX Runtime in fp32: {size_text(self.cpu[most])} at its peak, in {most}"

    def _memory_rows(self) -> Iterator[list[str]]:
        fits = [] if self.vram is None else [f"in {size_text(self.vram)}"]
        stages, first = list(self.options[0].phases), self.options[0]
        yield ["", "weights", "activations", "VAE state", *stages, next(iter(first.residencies)), *fits]
        for option in self.options:
            weights = sum(needs.weights for needs in option.needs.values())
            activations = max(needs.activations for needs in option.needs.values())
            sizes = [weights, activations, option.needs["vae_decoder"].state, *option.phases.values()]
            verdict = [] if self.vram is None else [option.residency(self.vram) or "no"]
            yield [option.precision, *map(size_text, (*sizes, option.residencies["all resident"])), *verdict]

    def _time_rows(self) -> Iterator[list[str]]:
        yield ["", "text encoder", "a step", "decode", f"a video of {self.steps} steps", "step by"]
        for option in self.options:
            if option.speed is None:
                yield [option.precision, "the GPU has no units for it", "", "", "", ""]
                continue
            found = option.speed
            parts = (found.text_encoder, found.step, found.decode, found.video(self.steps))
            yield [option.precision, *map(time_text, parts), found.source]

    def _build_rows(self) -> Iterator[list[str]]:
        yield ["", "host memory", "engines"]
        for option in self.options:
            yield [option.precision, size_text(option.build), size_text(option.engines)]


def plan(
    model: Model,
    shape: Shape,
    *,
    vram: int | None = None,
    gpu: GpuModel | None = None,
    guided: bool = True,
    steps: int = 50,
    compiled: dict[PrecisionName, float] | None = None,
) -> Estimate:
    """Tell what a published model takes.

    Args:
        model: Which.
        shape: The video's.
        vram: Bytes of GPU memory; None for the GPU's own.
        gpu: What the time is told for.
        guided: Whether two samples go through the transformer at every step.
        steps: Of a video.
        compiled: Seconds of a step by a compiled plan, where there is one of a precision.

    Raises:
        ShapeError: The model cannot do the shape; the nearest one that it can.
    """
    check_shape(model, shape)
    architecture, batch = FAMILIES[model.family].architecture(model), 1 + guided
    options = tuple(_option(model, architecture, shape, name, batch, gpu, compiled or {}) for name in PRECISIONS)
    encoder = architecture.vae.parameters("encoder") * 2
    published = sum(weight_bytes(architecture, _native(model)).values())
    memory = vram if vram is not None or gpu is None else gpu.memory
    return Estimate(
        model, shape, architecture.tokens(shape), batch, steps, memory, gpu, published + encoder,
        cpu_peak(architecture, shape, batch), options,
    )  # fmt: skip


def check_shape(model: Model, shape: Shape) -> None:
    """Raise ShapeError unless a published model can do a shape."""
    fixed = model.traits.positions == "rope+learned"
    table = bool(model.traits.patch_size_t)
    Limits(16, 4, model.sample_height * 8, model.sample_width * 8, fixed, table).check(shape)
    if min(shape.height, shape.width) < 16:
        raise ShapeError(f"{shape} is too small", fix="use --height and --width of 16 or more")


def _native(model: Model) -> Native:
    return "fp16" if model.dtype == "float16" else "bf16"


def _option(
    model: Model,
    architecture: Architecture,
    shape: Shape,
    precision: PrecisionName,
    batch: int,
    gpu: GpuModel | None,
    compiled: dict[PrecisionName, float],
) -> Option:
    native = _native(model)
    needs = gpu_needs(architecture, shape, precision, native, batch)
    decoder = gpu_needs(architecture, tiled(shape), precision, native, batch)["vae_decoder"]
    in_tiles: dict[NetworkName, Needs] = {**needs, "vae_decoder": decoder}
    priced = speed(architecture, shape, precision, batch, gpu, native) if gpu else None
    if priced is not None and precision in compiled:
        priced = Speed(priced.text_encoder, compiled[precision], priced.decode, "compiled plan")
    sizes = [needs[name].weights for name in NETWORKS]
    return Option(precision, needs, in_tiles, build_memory(max(sizes)), sum(sizes), priced)
