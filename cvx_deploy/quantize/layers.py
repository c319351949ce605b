"""Which of the layers that could be quantized are left out, and which take the same input.

Names are those of diffusers' and transformers' modules.
"""

import re
from collections.abc import Collection
from pathlib import Path

import msgspec

from cvx_deploy.errors import RecipeError
from cvx_deploy.reading import read_whole, reading

_SHARED = re.compile(r"(?<=to_)[kv]$|(?<=SelfAttention\.)[kv]$|(?<=wi_)1$")
_FIRST = {"k": "q", "v": "q", "1": "0"}


def excluded_places(words: Collection[str]) -> tuple[str, ...] | None:
    """Return the places that words name: a place each, or a JSON file with a list ``exclude`` of them.

    No words mean no choice, None; the word ``none`` alone means no places.

    Raises:
        RecipeError: A file is not there, or is not such a file; or there are places beside ``none``.
    """
    if not words:
        return None
    if "none" in words:
        if set(words) != {"none"}:
            raise RecipeError("--exclude names places and none", fix="leave out either")
        return ()
    places: list[str] = []
    for word in words:
        places += _from_file(Path(word)) if word.endswith(".json") else [word]
    return tuple(dict.fromkeys(places))


def _from_file(path: Path) -> list[str]:
    fix = "name a file that cvx-deploy quantize --sensitivity wrote"
    content = read_whole(path, RecipeError, fix=fix)
    with reading(path, RecipeError, fix=fix, says="is no list of exclusions"):
        return msgspec.json.decode(content, type=_Exclusions).exclude


class _Exclusions(msgspec.Struct):
    exclude: list[str]


def without(layers: list[str], excluded: Collection[str]) -> list[str]:
    """Return the layers that do not lie in any of the excluded places.

    Args:
        layers: Their names.
        excluded: Layers, or modules that hold some, such as ``transformer_blocks.0``.

    Raises:
        RecipeError: A place holds none of the layers, or all layers are excluded.
    """
    for place in excluded:
        if not any(_within(layer, place) for layer in layers):
            raise RecipeError(
                f"{place} cannot be excluded: it is no layer that would be quantized, and holds none",
                fix=f"name one such as {layers[0]} or {layers[0].rpartition('.')[0]}",
            )
    kept = [layer for layer in layers if not any(_within(layer, place) for place in excluded)]
    if not kept:
        raise RecipeError("every layer is excluded, so that nothing is quantized", fix="exclude less, or use bf16")
    return kept


def _within(layer: str, place: str) -> bool:
    return layer == place or layer.startswith(f"{place}.")


def leader(layer: str) -> str:
    """Return the layer that stands for all that take the same input: ``to_q`` for ``to_k`` and ``to_v``."""
    return _SHARED.sub(lambda found: _FIRST[found[0]], layer)
