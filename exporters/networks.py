"""The networks a checkpoint is traced into: each model family has a folder beside this file that says which."""

from collections.abc import Iterable
from typing import Final, Protocol

from cvx_deploy.exporters.cogvideox import networks as cogvideox
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.quantize.recipe import Recipe
from cvx_deploy.shape import Shape


class _Networks(Protocol):
    def contracts_for(
        self, checkpoint: Checkpoint, shape: Shape, recipe: Recipe, *, riflex: bool = False
    ) -> list[NetworkContract]: ...

    def check_longer(self, checkpoint: Checkpoint, shapes: Iterable[Shape]) -> None: ...


_FAMILIES: Final[dict[str, _Networks]] = {"cogvideox": cogvideox}


def contracts_for(
    checkpoint: Checkpoint, shape: Shape, recipe: Recipe, *, riflex: bool = False
) -> list[NetworkContract]:
    """Return the contracts of every network that a shape needs; with `riflex` for one longer than trained."""
    return _FAMILIES[checkpoint.family.name].contracts_for(checkpoint, shape, recipe, riflex=riflex)


def check_longer(checkpoint: Checkpoint, shapes: Iterable[Shape]) -> None:
    """Raise ShapeError where `riflex` would change nothing."""
    _FAMILIES[checkpoint.family.name].check_longer(checkpoint, shapes)
