"""What the activations of a network look like while it runs: the ranges of every linear layer's and attention's inputs.

A range is the largest magnitude of each channel, as a symmetric MinMax observer's. Second moments say what channels do
together.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from cvx_deploy.errors import CalibrationError
from cvx_deploy.quantize.layers import leader
from cvx_deploy.quantize.table import stretch_size

ATTENTION = ("query", "key", "value")
_TEXT_SHARE = 0.1  # what the tokens of the prompt weigh beside those of the video; docs/quantization.md has why


class Observations:
    """Ranges by place, over everything observed so far.

    Attributes:
        seen: Whether what runs now is observed.
        amax: Of every place the largest magnitude of each channel.
        moments: Of places that `take_moments` was called for, the sum of their second moments over all calls.
    """

    def __init__(self) -> None:
        self.seen = False
        self.amax: dict[str, NDArray[np.float32]] = {}
        self.moments: dict[str, NDArray[np.float32]] = {}

    def take(self, place: str, tensor: torch.Tensor) -> None:
        """Observe a tensor ``(..., channels)``.

        Raises:
            CalibrationError: It holds what is no number.
        """
        channels = tensor.detach().reshape(-1, tensor.shape[-1])
        amax: NDArray[np.float32] = channels.abs().amax(0).float().cpu().numpy()
        if not np.isfinite(amax).all():
            raise CalibrationError(
                f"the activations of {place} stopped being numbers",
                fix="check the checkpoint's weights with cvx-deploy verify, or calibrate with --compute fp32",
            )
        self.merge({place: amax})

    def take_moments(self, place: str, tensor: torch.Tensor, text: int) -> None:
        """Observe which channels of a tensor are large together.

        Args:
            place: Where.
            tensor: ``(batch, tokens, channels)``, the prompt's tokens first.
            text: How many those are.
        """
        seen = tensor.detach()
        moments = _TEXT_SHARE * _second_moments(seen[:, :text]) + _second_moments(seen[:, text:])
        self.merge_moments({place: moments.cpu().numpy()})

    def merge_moments(self, moments: Mapping[str, NDArray[np.float32]]) -> None:
        """Add second moments that were observed before."""
        for place, values in moments.items():
            self.moments[place] = self.moments[place] + values if place in self.moments else values

    def merge(self, amax: Mapping[str, NDArray[np.float32]]) -> None:
        """Add what was observed before."""
        for place, channels in amax.items():
            self.amax[place] = np.maximum(self.amax[place], channels) if place in self.amax else channels


def _second_moments(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of the products of channels, by stretches of them: ``(stretches, size, size)``."""
    size = stretch_size(tensor.shape[-1])
    channels = tensor.reshape(-1, tensor.shape[-1] // size, size).transpose(0, 1).float()
    return channels.transpose(1, 2) @ channels / channels.shape[1]


@contextlib.contextmanager
def observed(
    network: torch.nn.Module, layers: list[str], prefix: str, observations: Observations, text: int | None = None
) -> Iterator[None]:
    """Observe the inputs of linear layers, and of attention, while the block lasts and `observations.seen` is set.

    Args:
        network: Whose modules the layers are.
        layers: Their names; those that take the same input have its ranges each.
        prefix: What stands before their names in the table.
        observations: Where the ranges go.
        text: To observe second moments, too: how many tokens of what comes in are the prompt's.
    """
    with contextlib.ExitStack() as stack:
        sharing: dict[str, list[str]] = {}
        for layer in layers:
            sharing.setdefault(leader(layer), []).append(layer)
        for first, alike in sharing.items():
            module = network.get_submodule(first)
            alike.sort(key=lambda layer: layer != first)
            stack.callback(module.register_forward_pre_hook(_watch(prefix, alike, observations, text)).remove)
        attention = _Attention(observations)
        for block in sorted({layer.partition(".attn1.")[0] for layer in layers if ".attn1." in layer}):
            module = network.get_submodule(f"{block}.attn1")
            stack.callback(module.register_forward_pre_hook(attention.entering(f"{block}.attn1")).remove)
        stack.enter_context(attention)
        yield


def _watch(prefix: str, layers: list[str], observations: Observations, text: int | None) -> Any:
    def watch(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if observations.seen:
            first, *others = (f"{prefix}{layer}" for layer in layers)
            observations.take(first, given[0])
            for other in others:
                observations.merge({other: observations.amax[first]})
            if text is not None:
                observations.take_moments(first, given[0], text)

    return watch


class _Attention(TorchFunctionMode):
    """Observes what scaled dot product attention takes: query, key and value after their norms and positions."""

    def __init__(self, observations: Observations) -> None:
        super().__init__()
        self._observations = observations
        self._place = ""

    def entering(self, place: str) -> Any:
        """Return a hook that says where attention is computed from now on."""

        def enter(*_: object) -> None:
            self._place = place

        return enter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self._observations.seen and self._place:
            for part, tensor in zip(ATTENTION, args, strict=False):
                self._observations.take(f"{self._place}.{part}", tensor)
        return func(*args, **(kwargs or {}))
