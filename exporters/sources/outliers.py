"""Outliers as papers report them, planted in random weights: without them every scheme looks better than it is.

- A few channels of what enters attention and the feed-forward network are 8 to 64 times as large as the rest, the same
  ones in all blocks and for all tokens (LLM.int8(), arXiv:2208.07339: up to 20 times; SmoothQuant, arXiv:2211.10438:
  up to 100). The weights that meet them are smaller by the root of that, so that channels matter in both
  (SVDQuant, arXiv:2411.05007).
- How large they are depends on the timestep, through adaLN's scales (Q-DiT, arXiv:2406.17343; ViDiT-Q,
  arXiv:2406.02540).
- A few channels inside the feed-forward network are near zero but for few tokens, where they are very large (massive
  activations, arXiv:2402.17762; for T5, what overflows in fp16, transformers' issue 5651).

How many channels, and how large within those limits, is this file's choice.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Channels = Literal["residual", "value", "hidden"]
Factors = NDArray[np.float32]

_ONE_IN: Final = 512  # channels, and never fewer than two
_LEAST, _MOST = 8.0, 64.0
_MASSIVE: Final = 24.0  # times what a channel inside a feed-forward network is otherwise
_SELDOM: Final = -2.0 * _MASSIVE  # its bias, two standard deviations: one token in 44 gets past it
_BY_TIMESTEP: Final = 4.0  # times what adaLN's scales vary otherwise

# By component and the end of a weight's name: the axis that has outliers, in which channels, and to which power.
_RULES: Final[dict[str, tuple[tuple[str, int, Channels, float], ...]]] = {
    "transformer": (
        (".norm1.norm.weight", 0, "residual", 1),
        (".norm2.norm.weight", 0, "residual", 1),
        (".attn1.to_q.weight", 1, "residual", -0.5),
        (".attn1.to_k.weight", 1, "residual", -0.5),
        (".attn1.to_v.weight", 1, "residual", -0.5),
        (".attn1.to_v.weight", 0, "value", 1),
        (".attn1.to_v.bias", 0, "value", 1),
        (".attn1.to_out.0.weight", 1, "value", -0.5),
        (".ff.net.0.proj.weight", 1, "residual", -0.5),
        (".ff.net.0.proj.weight", 0, "hidden", 1),
        (".ff.net.2.weight", 1, "hidden", -0.5),
    ),
    "text_encoder": (
        (".layer_norm.weight", 0, "residual", 1),
        (".SelfAttention.q.weight", 1, "residual", -0.5),
        (".SelfAttention.k.weight", 1, "residual", -0.5),
        (".SelfAttention.v.weight", 1, "residual", -0.5),
        (".DenseReluDense.wi_0.weight", 1, "residual", -0.5),
        (".DenseReluDense.wi_1.weight", 1, "residual", -0.5),
        (".DenseReluDense.wi_1.weight", 0, "hidden", 1),
        (".DenseReluDense.wo.weight", 1, "hidden", -0.5),
    ),
}
_BLOCKS: Final = ("transformer_blocks.", "encoder.block.")


@dataclass(frozen=True)
class Outliers:
    """What a tensor's values are multiplied by, and then moved by, along its axes; None where nothing is.

    Attributes:
        rows: Along the first axis.
        columns: Along the second.
        moved: Along the first axis, what is added.
    """

    rows: Factors | None = None
    columns: Factors | None = None
    moved: Factors | None = None

    def plant(self, values: NDArray[np.float32], start: int, width: int) -> None:
        """Change values in place: those of a tensor whose rows have `width` elements, from its element `start` on."""
        row, column = np.divmod(np.arange(start, start + len(values)), width)
        if self.rows is not None:
            values *= self.rows[row]
        if self.columns is not None:
            values *= self.columns[column]
        if self.moved is not None:
            values += self.moved[row]


def outliers_of(component: str, name: str, shape: tuple[int, ...], seed: int) -> Outliers | None:
    """Return the outliers of one tensor; None for a tensor that has none.

    Args:
        component: transformer, text_encoder or vae; the last has none.
        name: The tensor's in the checkpoint.
        shape: Its own.
        seed: With the component it decides which channels they are.
    """
    if not name.startswith(_BLOCKS) or component not in _RULES:
        return None
    key = f"{seed}/{component}/outliers"
    axes: dict[int, Factors] = {
        axis: _factors(channels, shape[axis], key) ** np.float32(power)
        for end, axis, channels, power in _RULES[component]
        if name.endswith(end)
    }
    if name.endswith((".norm1.linear.weight", ".norm2.linear.weight")):
        axes[0] = _scales(shape[0], key)
    moved = _moved(shape[0], key) if name.endswith(".ff.net.0.proj.bias") else None
    return Outliers(axes.get(0), axes.get(1), moved) if axes or moved is not None else None


def _factors(channels: Channels, size: int, key: str) -> Factors:
    """Return a factor for each of `size` channels: one but for the outliers."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{key}/{channels}".encode()).digest()))
    chosen = generator.choice(size, max(2, size // _ONE_IN), replace=False)
    factors = np.ones(size, np.float32)
    spread = np.exp(generator.uniform(np.log(_LEAST), np.log(_MOST), len(chosen)))
    factors[chosen] = _MASSIVE if channels == "hidden" else spread
    return factors


def _scales(rows: int, key: str) -> Factors:
    """Return the factors for adaLN's linear layer: shift, scale and gate of the video's tokens, then of the text's."""
    factors = np.ones((6, rows // 6), np.float32)
    factors[(1, 4), :] = np.where(_factors("residual", rows // 6, key) > 1, _BY_TIMESTEP, 1)
    return factors.reshape(-1)


def _moved(size: int, key: str) -> Factors:
    return np.where(_factors("hidden", size, key) > 1, np.float32(_SELDOM), np.float32(0))
