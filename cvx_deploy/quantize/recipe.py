"""What each network computes in, and how it is quantized: the text after ``--precision``.

A precision is a type to compute in (``fp32``, ``fp16``, ``bf16``), or a scheme, which keeps the weights, and in some
the activations, of the linear layers in 8 or 4 bits; after a slash stands what the rest computes in, by default what
the model was published in: ``int8``, ``fp8/fp16``. There is one for all networks, or one for each:
``transformer=fp8,text_encoder=int8wo``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from cvx_deploy.errors import RecipeError
from cvx_deploy.precision import SCHEMES, Precision, SchemeName

Component = Literal["text_encoder", "transformer", "vae"]
COMPONENTS: Final = get_args(Component)


_TEXT_ENCODER: Final[Mapping[SchemeName, SchemeName]] = {
    "int8": "int8wo",
    "int8wo": "int8wo",
    "int4wo": "int8wo",
    "fp8": "int8wo",
}
"""What a scheme for all networks means for T5, which runs once a video: its memory matters, its speed does not."""


@dataclass(frozen=True)
class NetworkPrecision:
    """What one network computes in, and how its linear layers are quantized."""

    compute: Precision
    scheme: SchemeName | None = None

    def __str__(self) -> str:
        return self.compute if self.scheme is None else f"{self.scheme}/{self.compute}"


@dataclass(frozen=True)
class Recipe:
    """A precision for every network; the modulation network computes in the transformer's type, never quantized."""

    text_encoder: NetworkPrecision
    transformer: NetworkPrecision
    vae: NetworkPrecision

    @classmethod
    def parse(cls, text: str, native: Precision) -> "Recipe":
        """Read a recipe as it is typed.

        Args:
            text: See this module.
            native: What the model was published in.

        Raises:
            RecipeError: It names no precision, or one that a network cannot have.
        """
        parts = [part.strip() for part in text.split(",")]
        named = dict(part.split("=", 1) for part in parts if "=" in part)
        plain = [part for part in parts if "=" not in part]
        unknown = sorted(set(named) - set(COMPONENTS))
        if unknown or len(plain) > 1 or len(named) + len(plain) < len(parts):
            raise _refusal(text, f"it has no network {unknown[0]}" if unknown else "it names a precision twice")
        every = _precision(plain[0], native, text) if plain else NetworkPrecision(native)
        recipe = cls.for_all(every)
        own = {name: _precision(value, every.compute, text) for name, value in named.items()}
        recipe = cls(**{name: own.get(name, getattr(recipe, name)) for name in COMPONENTS})
        if recipe.vae.scheme is not None:
            raise _refusal(text, "the VAE's convolutions are not quantized")
        return recipe

    @classmethod
    def for_all(cls, precision: NetworkPrecision) -> "Recipe":
        """Return the recipe that one precision stands for."""
        compute, scheme = precision.compute, precision.scheme
        text_encoder = None if scheme is None else _TEXT_ENCODER[scheme]
        return cls(NetworkPrecision(compute, text_encoder), precision, NetworkPrecision(compute))

    def of(self, component: str) -> NetworkPrecision:
        """Return the precision of a component of the checkpoint."""
        return cast(NetworkPrecision, getattr(self, component))

    def __str__(self) -> str:
        if self == self.for_all(self.transformer):
            return str(self.transformer)
        return ",".join(f"{name}={self.of(name)}" for name in ("transformer", "text_encoder", "vae"))


def _precision(text: str, native: Precision, whole: str) -> NetworkPrecision:
    first, _, base = text.strip().partition("/")
    if base and base not in get_args(Precision):
        raise _refusal(whole, f"{base} is nothing to compute in")
    if first in get_args(Precision) and not base:
        return NetworkPrecision(cast(Precision, first))
    if first not in SCHEMES:
        raise _refusal(whole, f"there is no precision {text.strip()!r}")
    return NetworkPrecision(cast(Precision, base or native), cast(SchemeName, first))


def _refusal(text: str, why: str) -> RecipeError:
    names = ", ".join((*get_args(Precision), *SCHEMES))
    return RecipeError(
        f"the precision {text!r} makes no sense: {why}",
        fix=f"use one of {names}, with what the rest computes in as int8/fp32, or one a network: "
        "transformer=fp8,text_encoder=int8wo,vae=fp16",
    )
