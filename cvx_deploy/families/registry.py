"""The model families there are, and the published models of all of them."""

from typing import Final

from cvx_deploy.families.cogvideox.family import COGVIDEOX
from cvx_deploy.families.cogvideox.models import Model
from cvx_deploy.families.family import Family

FAMILIES: Final[dict[str, Family]] = {family.name: family for family in (COGVIDEOX,)}
MODELS: Final[dict[str, Model]] = {name: model for family in FAMILIES.values() for name, model in family.models.items()}


def family_that_runs(pipeline: object) -> Family | None:
    """Return the family that a pipeline class of diffusers is of, or None when none is."""
    return next((family for family in FAMILIES.values() if pipeline in family.pipelines), None)
