"""Which linear layers are quantized.

All of a block's: attention's projections and the feed-forward network. What stands outside the blocks stays as it is:
the embeddings of patches, time and text, adaLN's modulation, ``norm_out`` and ``proj_out``.
"""

import re
from collections.abc import Iterable
from typing import Final

from cvx_deploy.precision import SCHEMES, SchemeName

_LAYERS = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"),
    "text_encoder": re.compile(r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i_[01]|o))"),
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


def quantizable(component: str, names: Iterable[str]) -> list[str]:
    """Return the layers of a component that schemes are for, from the names of its tensors."""
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return [layer for layer in layers if _LAYERS[component].fullmatch(layer)]


def sensitive_places(component: str, scheme: SchemeName, layers: Iterable[str]) -> tuple[str, ...]:
    """Return the places of a component that a scheme leaves as they are, unless other exclusions are asked for."""
    if component != "transformer":
        return ()
    blocks = len({found[1] for layer in layers if (found := _BLOCK.match(layer))})
    return tuple(f"transformer_blocks.{block}" for block in spared_blocks(scheme, blocks))


_BLOCKS_A_SPARED: Final = 16


def spared_blocks(scheme: SchemeName, blocks: int) -> range:
    """Return which of the transformer's blocks a scheme leaves as they are, unless other exclusions are asked for.

    They are the last ones, one of 16, where activations are rounded too: what is lost there is never made up for.
    Fewer blocks than 16 are all quantized: one of them would be too much to leave out. docs/quantization.md has what
    this was measured on.
    """
    count = blocks // _BLOCKS_A_SPARED if SCHEMES[scheme].activations else 0
    return range(blocks - count, blocks)
