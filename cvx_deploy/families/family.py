"""What the rest of the program asks of a model family: one `Family` each, in `cvx_deploy.families.registry`.

The types of what they say are CogVideoX's, until a second family shows what they have in common.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import Model, Task
from cvx_deploy.families.cogvideox.vae import Grid, Vae, VaeHalf
from cvx_deploy.families.expectation import Expectation
from cvx_deploy.precision import SchemeName
from cvx_deploy.shape import Shape


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: What a manifest calls it; its exporter is the folder of that name in ``exporters/``.
        models: Its published models, by the name people type.
        pipelines: The pipeline classes of diffusers that run it, and what each does.
        architecture: What a published model is made of.
        expectations: What its networks compile to, by the first word of their roles.
        vae: How its VAE is cut.
        layers: Which of its layers are quantized.
    """

    name: Literal["cogvideox"]
    models: Mapping[str, Model]
    pipelines: Mapping[str, Task]
    architecture: Callable[[Model], Architecture]
    expectations: Mapping[str, Expectation]
    vae: "VaeCut"
    layers: "Layers"

    def expectation(self, role: str) -> Expectation:
        """Return what the network of a role, such as vae_decoder_next, is expected to compile to."""
        return self.expectations[role.partition("_")[0]]


@dataclass(frozen=True)
class VaeCut:
    """How a family's VAE is cut into chunks of frames and into tiles.

    Attributes:
        encoder: The encoder's networks.
        decoder: The decoder's.
        grid: The tiles of a clip of some height and width, in the input of a half.
        planes: Heights and widths, in latents, that a half works at.
        check_tiles: Raises ShapeError where tiles do not join to the frame again.
    """

    encoder: Callable[[Vae], VaeHalf]
    decoder: VaeHalf
    grid: Callable[[Vae, VaeHalf, int, int], Grid]
    planes: Callable[[Vae, VaeHalf, Shape, bool], list[tuple[int, int]]]
    check_tiles: Callable[[Vae, VaeHalf, Shape], None]


@dataclass(frozen=True)
class Layers:
    """Which of a family's linear layers are quantized.

    Attributes:
        quantizable: Those of a component, from the names of its tensors.
        sensitive: The places of a component that a scheme leaves as they are, unless other exclusions are asked for.
    """

    quantizable: Callable[[str, Iterable[str]], list[str]]
    sensitive: Callable[[str, SchemeName, Iterable[str]], tuple[str, ...]]
