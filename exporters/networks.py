"""The networks a checkpoint is traced into: each model family has a folder beside this file that says which."""

from collections.abc import Callable
from typing import Final

from cvx_deploy.exporters.cogvideox.networks import contracts_for as cogvideox
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.quantize.recipe import Recipe
from cvx_deploy.shape import Shape

_FAMILIES: Final[dict[str, Callable[[Checkpoint, Shape, Recipe], list[NetworkContract]]]] = {"cogvideox": cogvideox}


def contracts_for(checkpoint: Checkpoint, shape: Shape, recipe: Recipe) -> list[NetworkContract]:
    """Return the contracts of every network that a shape needs."""
    return _FAMILIES[checkpoint.family.name](checkpoint, shape, recipe)
