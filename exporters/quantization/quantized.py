"""Which of a checkpoint's components an export quantizes, and what comes of each."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy.bundle.schema import Quantization
from cvx_deploy.errors import CalibrationError, RecipeError
from cvx_deploy.exporters.quantization.calibrate import checkpoint_digest
from cvx_deploy.exporters.quantization.quantized_weights import LayerWeights, quantize_component
from cvx_deploy.exporters.sources.checkpoint import Checkpoint, DerivedTensors
from cvx_deploy.exporters.sources.lora import MERGED
from cvx_deploy.files import sha256_of
from cvx_deploy.precision import SCHEMES, SchemeName
from cvx_deploy.progress import Progress
from cvx_deploy.quantize.layers import without
from cvx_deploy.quantize.placement import Placement
from cvx_deploy.quantize.recipe import NetworkPrecision, Recipe
from cvx_deploy.quantize.table import CalibrationTable
from cvx_deploy.shape import Shape


@dataclass(frozen=True)
class Quantizing:
    """How to quantize, beside the recipe.

    Attributes:
        calibration: The table with the activations' ranges, for schemes that quantize activations, and their second
            moments, for better rounding to 4 bits.
        any_shape: Whether a table that was made at another video size will do.
        exclude: Layers, or modules that hold some, to leave as they are; None for the most sensitive blocks.
        attention: Whether attention is to multiply in E4M3.
    """

    calibration: Path | None = None
    any_shape: bool = False
    exclude: tuple[str, ...] | None = None
    attention: bool = False

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError for what this recipe has no use for."""
        schemes = [precision.scheme for precision in (recipe.text_encoder, recipe.transformer) if precision.scheme]
        if self.attention and recipe.transformer.scheme is None:
            raise RecipeError(
                f"attention can be quantized beside the layers only, and {recipe} leaves the transformer's as they are",
                fix="choose a --precision such as fp8, or leave out --quantize-attention",
            )
        if self.exclude and not schemes:
            raise RecipeError(f"{recipe} quantizes nothing, so nothing can be excluded", fix="leave out --exclude")
        if self.calibration and not self._reads_ranges(recipe) and not _in_groups(recipe):
            raise RecipeError(f"{recipe} needs no calibration table", fix="leave out --calibration")

    def check_table(self, recipe: Recipe, table: CalibrationTable) -> None:
        """Raise CalibrationError for a table that is given for its second moments, and has none."""
        if not self._reads_ranges(recipe) and not table.moments:
            raise CalibrationError(
                f"{self.calibration} has no second moments, which are all that {recipe} takes of it",
                fix="calibrate again with cvx-deploy quantize --second-moments, or leave out --calibration",
            )

    def _reads_ranges(self, recipe: Recipe) -> bool:
        schemes = (recipe.text_encoder.scheme, recipe.transformer.scheme)
        return self.attention or any(scheme and SCHEMES[scheme].activations for scheme in schemes)


def _in_groups(recipe: Recipe) -> bool:
    """Whether the transformer's weights are kept in 4 bits."""
    return recipe.transformer.scheme is not None and SCHEMES[recipe.transformer.scheme].group is not None


@dataclass(frozen=True)
class QuantizedComponent:
    """A component's weights in fewer bits, where Q/DQ nodes go in its graph, and what the manifest says of it."""

    made: DerivedTensors
    placement: Placement
    entry: Quantization


def quantize_components(
    quantizing: Quantizing,
    recipe: Recipe,
    checkpoint: Checkpoint,
    shapes: Collection[Shape],
    folder: Path,
    progress: Progress,
) -> dict[str, QuantizedComponent]:
    """Write the weights of every component that the recipe quantizes into `folder`.

    Raises:
        CalibrationError: The table is missing, or another checkpoint's, or was made at another video size.
        RecipeError: What is excluded is not there.
    """
    components = [name for name in ("text_encoder", "transformer") if recipe.of(name).scheme is not None]
    table = None if quantizing.calibration is None else CalibrationTable.read(quantizing.calibration)
    if table is not None:
        quantizing.check_table(recipe, table)
        for shape in shapes:
            table.require(checkpoint.traits, checkpoint_digest(checkpoint), shape, quantizing.any_shape)
    its = checkpoint.family.layers
    layers = {name: its.quantizable(name, checkpoint.tensors(name)) for name in components}
    if quantizing.exclude is None:
        excluded = {name: its.sensitive(name, _scheme(recipe, name), layers[name]) for name in components}
    else:
        excluded = _excluded(quantizing.exclude, layers)
    made = {}
    for name in components:
        if quantizing.exclude is None and excluded[name]:
            progress.note(_spared(excluded[name], recipe.of(name)))
        attention = quantizing.attention and name == "transformer"
        weights = LayerWeights(
            name,
            checkpoint.tensors(name),
            checkpoint.place,
            recipe.of(name),
            without(layers[name], excluded[name]),
            table,
            attention,
        )
        if table is not None and name == "transformer" and _in_groups(recipe) and not weights.by_moments:
            progress.note(f"{quantizing.calibration} has no second moments: {recipe.transformer} rounds to nearest")
        placement = weights.placement()
        entry = _entry(weights, excluded[name], quantizing)
        made[name] = QuantizedComponent(quantize_component(weights, folder, progress), placement, entry)
    if "transformer" in made:
        (folder / MERGED).unlink(missing_ok=True)  # the quantized file holds what adapters changed
    return made


def _scheme(recipe: Recipe, component: str) -> SchemeName:
    scheme = recipe.of(component).scheme
    assert scheme is not None
    return scheme


def _spared(places: tuple[str, ...], precision: NetworkPrecision) -> str:
    return (
        f"{', '.join(places)} stay in {precision.compute}: the last blocks suffer most from {precision.scheme}; "
        "--exclude chooses others, --exclude none quantizes all"
    )


def _excluded(places: tuple[str, ...], layers: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Divide the excluded places among the components; one that fits none stays with all, which refuse it."""

    def within(place: str, name: str) -> bool:
        return any(layer == place or layer.startswith(f"{place}.") for layer in layers[name])

    nowhere = {place for place in places if not any(within(place, name) for name in layers)}
    return {name: tuple(place for place in places if place in nowhere or within(place, name)) for name in layers}


def _entry(weights: LayerWeights, excluded: tuple[str, ...], quantizing: Quantizing) -> Quantization:
    scheme, table = weights.precision.scheme, quantizing.calibration
    assert scheme is not None
    calibrated = weights.scheme.activations is not None or weights.attention or weights.by_moments
    calibration = (str(table.absolute()), sha256_of(table)) if calibrated and table is not None else None
    return Quantization(scheme, len(weights.layers), excluded, weights.attention, calibration)
