"""diffusers with the temporal frequency that RIFLEx lowers, to hold a bundle against that was exported with it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers.models import embeddings

from cvx_deploy.bundle.opened import Bundle


@contextmanager
def rope_of(bundle: Bundle) -> Iterator[None]:
    """Let diffusers make rotary tables as a bundle's transformer has them, for the block."""
    riflex = bundle.network("transformer").riflex
    if riflex is None:
        yield
        return
    plain = embeddings.get_1d_rotary_pos_embed
    widths: list[int] = []

    def changed(dim: int, pos: Any, *more: Any, **words: Any) -> Any:
        cos, sin = plain(dim, pos, *more, **words)
        widths.append(dim)
        if dim != min(widths):  # time has fewer channels than height and width, and comes first
            return cos, sin
        angle = torch.as_tensor(pos, dtype=torch.float32) * (0.9 * 2 * math.pi / riflex.tokens)
        place = 2 * (riflex.component - 1)
        cos[:, place : place + 2], sin[:, place : place + 2] = angle.cos()[:, None], angle.sin()[:, None]
        return cos, sin

    with mock.patch.object(embeddings, "get_1d_rotary_pos_embed", changed):
        yield
