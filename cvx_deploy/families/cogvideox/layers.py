"""Which linear layers are quantized, and which of them take the same input.

All of a block's: attention's projections and the feed-forward network. What stands outside the blocks stays as it is:
the embeddings of patches, time and text, adaLN's modulation, ``norm_out`` and ``proj_out``.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

import msgspec

from cvx_deploy.errors import RecipeError
from cvx_deploy.precision import SCHEMES, SchemeName
from cvx_deploy.reading import read_whole, reading

_LAYERS = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"),
    "text_encoder": re.compile(r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i_[01]|o))"),
}
_SHARED = re.compile(r"(?<=to_)[kv]$|(?<=SelfAttention\.)[kv]$|(?<=wi_)1$")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
_FIRST = {"k": "q", "v": "q", "1": "0"}


def quantizable(component: str, names: Iterable[str]) -> list[str]:
    """Return the layers of a component that schemes are for, from the names of its tensors."""
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return [layer for layer in layers if _LAYERS[component].fullmatch(layer)]


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


def sensitive_places(component: str, scheme: SchemeName, layers: Iterable[str]) -> tuple[str, ...]:
    """Return the places of a component that a scheme leaves as they are, unless other exclusions are asked for."""
    if component != "transformer":
        return ()
    blocks = len({found[1] for layer in layers if (found := _BLOCK.match(layer))})
    return tuple(f"transformer_blocks.{block}" for block in spared_blocks(scheme, blocks))


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


_BLOCKS_A_SPARED: Final = 16


def spared_blocks(scheme: SchemeName, blocks: int) -> range:
    """Return which of the transformer's blocks a scheme leaves as they are, unless other exclusions are asked for.

    They are the last ones, one of 16, where activations are rounded too: what is lost there is never made up for.
    Fewer blocks than 16 are all quantized: one of them would be too much to leave out. docs/quantization.md has what
    this was measured on.
    """
    count = blocks // _BLOCKS_A_SPARED if SCHEMES[scheme].activations else 0
    return range(blocks - count, blocks)
