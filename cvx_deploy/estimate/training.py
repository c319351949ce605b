"""How much memory a step of examples/finetune takes on each GPU: weights, gradients, the optimizer, activations.

Weights and all that goes with each follow from the architecture. Activations are a multiple of one tensor, tokens x
width in bf16; how many was counted on fake tensors, storage by storage, by ``benchmarks/training_step.py``, and a test
holds what follows against that and against measured steps.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from cvx_deploy.estimate.estimate import check_shape
from cvx_deploy.estimate.memory import WORKSPACE
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import Model
from cvx_deploy.families.registry import FAMILIES
from cvx_deploy.measure.units import columns, size_text
from cvx_deploy.shape import Shape

Method = Literal["lora", "full"]

# Units of activations: what each block keeps for the way back, and what comes on top of all blocks at the peak.
_KEPT: Final[dict[Method, float]] = {"lora": 21.5, "full": 23.1}
_KEPT_TOP: Final[dict[Method, float]] = {"lora": 16.2, "full": 8.0}
# With checkpointing a block keeps its input alone, and one at a time is gone through again, forth and back.
_RECOMPUTED: Final[dict[Method, float]] = {"lora": 38.6, "full": 28.1}
_ADAM, _ADAM_8BIT = 8.0, 2 + 2 * 4 / 256
"""Bytes a trained parameter: two moments in float32, or in 8 bits with a float32 scale for every 256."""


@dataclass(frozen=True)
class Way:
    """How train.py trains in bf16: those of its options that change how much memory a step takes."""

    method: Method
    checkpointing: bool = True
    eight_bit: bool = False
    ema: bool = False

    def __str__(self) -> str:
        parts = {"checkpointing": self.checkpointing, "8-bit optimizer": self.eight_bit, "averages": self.ema}
        return ", ".join([self.method, *(part for part, there in parts.items() if there)])


WAYS: Final = tuple(
    way
    for method in ("lora", "full")
    for way in (Way(method, checkpointing=False), Way(method), Way(method, eight_bit=True), Way(method, ema=True))
)


@dataclass(frozen=True)
class TrainingNeeds:
    """Bytes of a step.

    Attributes:
        weights: Frozen ones in bf16, trained ones in float32.
        gradients: In float32; `averages` likewise.
        activations: What is there beside all else at the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, without what CUDA and its libraries take."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations


def training_needs(architecture: Architecture, shape: Shape, way: Way, rank: int, batch: int = 1) -> TrainingNeeds:
    """Return what a step takes on each GPU, with a batch of so many clips."""
    transformer = architecture.transformer
    stored = transformer.parameters + transformer.modulation_parameters
    adapters = 18 * transformer.layers * transformer.width * rank  # attention: 4 of r x 2 widths; the rest: 2 of r x 5
    trained = adapters if way.method == "lora" else stored
    frozen = stored if way.method == "lora" else 0
    return TrainingNeeds(
        weights=2 * frozen + 4 * trained,
        gradients=4 * trained,
        optimizer=round((_ADAM_8BIT if way.eight_bit else _ADAM) * trained),
        averages=4 * trained if way.ema else 0,
        activations=_activations(architecture, shape, way, trained, batch),
    )


def _activations(architecture: Architecture, shape: Shape, way: Way, trained: int, batch: int) -> int:
    """Return what is beside weights, gradients and the optimizer at the peak, at the end of the way forth or back.

    At the end of the way forth there are no gradients yet, but trained weights lie rounded to bf16 beside themselves.
    """
    unit = 2 * batch * architecture.tokens(shape) * architecture.transformer.width
    layers, again = architecture.transformer.layers, _RECOMPUTED[way.method]
    if way.checkpointing:
        return round(max(again * unit, (layers + again) * unit - 4 * trained * (way.method == "full")))
    forth = (_KEPT[way.method] * layers + _KEPT_TOP[way.method]) * unit
    return round(max(again * unit, forth - 2 * trained))


@dataclass(frozen=True)
class TrainingPlan:
    """What training a model takes, for every way.

    Attributes:
        vram: Bytes of GPU memory there are; None where that was not said.
    """

    model: Model
    shape: Shape
    tokens: int
    rank: int
    vram: int | None
    needs: dict[Way, TrainingNeeds]
    more: dict[Way, int]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, in bytes."""
        return {
            "model": self.model.name,
            "shape": str(self.shape),
            "tokens": self.tokens,
            "rank": self.rank,
            "vram_bytes": self.vram,
            "workspace_bytes": WORKSPACE,
            "ways": {
                str(way): asdict(needs)
                | {"total": needs.total + WORKSPACE, "another_clip": self.more[way], "fits": self._fits(needs)}
                for way, needs in self.needs.items()
            },
        }

    def _fits(self, needs: TrainingNeeds) -> bool | None:
        return None if self.vram is None else needs.total + WORKSPACE <= self.vram

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"training {self.model.name} at {self.shape}, {self.tokens:,} tokens, by examples/finetune in bf16"
        yield (
            f"\nGPU memory of a step, one clip on each GPU, adapters of rank {self.rank}; "
            f"sums with {size_text(WORKSPACE)} that CUDA and its libraries are assumed to take"
        )
        yield from columns(list(self._rows()))

    def _rows(self) -> Iterator[list[str]]:
        fits = [] if self.vram is None else [f"in {size_text(self.vram)}"]
        parts = ("weights", "gradients", "optimizer", "averages", "activations")
        yield ["", *parts, "all", "another clip", *fits]
        for way, needs in self.needs.items():
            sizes = [*(getattr(needs, part) for part in parts), needs.total + WORKSPACE, self.more[way]]
            verdict = [] if self.vram is None else ["yes" if self._fits(needs) else "no"]
            yield [str(way), *map(size_text, sizes), *verdict]


def training_plan(model: Model, shape: Shape, rank: int, vram: int | None = None) -> TrainingPlan:
    """Tell what training a published model takes.

    Raises:
        ShapeError: The model cannot do the shape; the nearest one that it can.
    """
    check_shape(model, shape)
    architecture = FAMILIES[model.family].architecture(model)
    needs = {way: training_needs(architecture, shape, way, rank) for way in WAYS}
    more = {way: training_needs(architecture, shape, way, rank, 2).total - needs[way].total for way in WAYS}
    return TrainingPlan(model, shape, architecture.tokens(shape), rank, vram, needs, more)
