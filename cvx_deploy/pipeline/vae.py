"""Latents to pixels and back, a chunk at a time, tile by tile when asked, with diffusers' chunks, tiles and blending.

One video at a time (diffusers' sliced encoding and decoding): every norm in the VAE looks at one sample alone, so a
batch would change nothing but memory. The causal caches that one chunk hands to the next never leave the engine.
"""

import contextlib
import math
from collections.abc import Generator as Steps
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend, DeviceTensor, Session
from cvx_deploy.families.cogvideox.vae import Grid, VaeHalf
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Advance

Clip = NDArray[np.float32]  # (B, C, F, H, W) with B = 1, of pixels in [-1, 1] or of latents


def count_chunks(backend: Backend, half: VaeHalf, frames: int) -> int:
    """Return how many chunks a clip of `frames` (latent frames for the decoder) is worked through in."""
    if not backend.bundle.has(half.following):
        return 1
    return 1 + (frames - _frames(backend, half.first)) // _frames(backend, half.following)


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of a clip: a Gaussian of unscaled latents, `mean` and `deviation` (1, C, f, h, w).

    Drawn latents are rounded to what is `kept`, as the deviation is.
    """

    mean: Clip
    deviation: Clip
    kept: Precision = "fp32"

    def sample(self, generator: Generator) -> Clip:
        """Draw latents (1, C, f, h, w), with one draw of `generator`, as diffusers' ``retrieve_latents`` does."""
        drawn = rounded(self.deviation * generator.randn(self.mean.shape), self.kept)
        return rounded(self.mean + drawn, self.kept)


def encode(backend: Backend, pixels: Clip, *, tiled: bool, advance: Advance, kept: Precision = "fp32") -> Posterior:
    """Encode a clip.

    Args:
        backend: Where the networks run.
        pixels: (1, 3, F, H, W) in [-1, 1].
        tiled: Whether to work tile by tile.
        advance: Called with 1 after every chunk.
        kept: The type that latents are kept in.
    """
    said = rounded(moments(backend, pixels, tiled=tiled, advance=advance), kept)
    mean, log_variance = np.split(said, 2, axis=1)
    half = rounded(0.5 * np.clip(log_variance, -30.0, 20.0), kept)
    return Posterior(mean, rounded(np.exp(half), kept), kept)


def moments(backend: Backend, pixels: Clip, *, tiled: bool, advance: Advance) -> Clip:
    """Return what the encoder puts out for a clip: means, then logarithms of variances, (1, 2 C, f, h, w)."""
    half = backend.bundle.family.vae.encoder(backend.bundle.manifest.vae)
    return np.concatenate(list((_tiled if tiled else _chunks)(backend, half, pixels, advance)), axis=2)


def decode(backend: Backend, latents: Clip, *, tiled: bool, advance: Advance) -> Steps[Clip, None, None]:
    """Yield pixels (1, 3, n, H, W), about in [-1, 1], as chunks of the unscaled latents (1, C, f, h, w) decode.

    Tiled, there is one chunk, at the end: a tile is worked through to its last frame before the next begins, so that
    the caches of one tile alone are held.
    """
    return (_tiled if tiled else _chunks)(backend, backend.bundle.family.vae.decoder, latents, advance)


def count_tiles(backend: Backend, half: VaeHalf, height: int, width: int) -> int:
    """Return how many tiles diffusers cuts a clip of that height and width (in the half's input) into."""
    grid = backend.bundle.family.vae.grid(backend.bundle.manifest.vae, half, height, width)
    return len(grid.rows.starts) * len(grid.columns.starts)


def _chunks(backend: Backend, half: VaeHalf, clip: Clip, advance: Advance) -> Steps[Clip, None, None]:
    with _Sessions(backend, half, clip.shape[3:]) as sessions:
        yield from sessions.run(clip, advance)


class _Sessions:
    """The two networks of a half at one height and width, loaded as they are needed."""

    def __init__(self, backend: Backend, half: VaeHalf, plane: tuple[int, ...]) -> None:
        self._backend = backend
        self._half = half
        self._sizes = {"latent_height": plane[0] // half.downscale, "latent_width": plane[1] // half.downscale}
        self._stack = contextlib.ExitStack()
        self._loaded: dict[str, Session] = {}

    def __enter__(self) -> "_Sessions":
        return self

    def __exit__(self, *error: object) -> None:
        self._loaded.clear()
        self._stack.close()

    def run(self, clip: Clip, advance: Advance) -> Iterator[Clip]:
        """Yield the output of every chunk of a clip; a device works on the next one before it is asked for this one."""
        state: dict[str, DeviceTensor] = {}
        finished: DeviceTensor | None = None
        for name, chunk in self._cut(clip):
            network = self._backend.bundle.network(name)
            inputs = {network.inputs[0].name: chunk, **state}
            outputs = self._load(name).run(inputs)
            state = {taken: outputs[given] for taken, given in network.state.items()}
            if finished is not None:
                yield self._backend.to_host(finished)
                advance(1)
            finished = outputs[network.outputs[0].name]
        yield self._backend.to_host(finished)
        advance(1)

    def _cut(self, clip: Clip) -> Iterator[tuple[str, Clip]]:
        end = _frames(self._backend, self._half.first)
        yield self._half.first, clip[:, :, :end]
        while end < clip.shape[2]:
            start, end = end, end + _frames(self._backend, self._half.following)
            yield self._half.following, clip[:, :, start:end]

    def _load(self, name: str) -> Session:
        if name not in self._loaded:
            self._loaded[name] = self._stack.enter_context(self._backend.load(name, self._sizes))
        return self._loaded[name]


def _frames(backend: Backend, network: str) -> int:
    frames = backend.bundle.network(network).inputs[0].shape[2]
    assert isinstance(frames, int)
    return frames


def _tiled(backend: Backend, half: VaeHalf, clip: Clip, advance: Advance) -> Steps[Clip, None, None]:
    grid = backend.bundle.family.vae.grid(backend.bundle.manifest.vae, half, *clip.shape[3:])
    cuts = {
        (row, column): clip[:, :, :, y : y + grid.rows.tile, x : x + grid.columns.tile]
        for row, y in enumerate(grid.rows.starts)
        for column, x in enumerate(grid.columns.starts)
    }
    tiles: dict[tuple[int, int], Clip] = {}
    # Tiles of one size run together, so that the networks of one size alone are loaded.
    for plane in sorted({cut.shape[3:] for cut in cuts.values()}, key=math.prod, reverse=True):
        with _Sessions(backend, half, plane) as sessions:
            for place, cut in cuts.items():
                if cut.shape[3:] == plane:
                    tiles[place] = np.concatenate(list(sessions.run(cut, advance)), axis=2)
    yield _joined(tiles, grid)


def _joined(tiles: dict[tuple[int, int], Clip], grid: Grid) -> Clip:
    """Blend every tile with the one above it, then with the one to its left, and put them side by side.

    In reading order and in place, as diffusers does: a tile is blended with neighbours that are blended already.
    """
    rows = []
    for row in range(len(grid.rows.starts)):
        pieces = []
        for column in range(len(grid.columns.starts)):
            tile = tiles[row, column]
            if row > 0:
                _fade(tiles[row - 1, column], tile, grid.rows.blend, axis=3)
            if column > 0:
                _fade(tiles[row, column - 1], tile, grid.columns.blend, axis=4)
            pieces.append(tile[:, :, :, : grid.rows.keep, : grid.columns.keep])
        rows.append(np.concatenate(pieces, axis=4))
    return np.concatenate(rows, axis=3)


def _fade(before: Clip, tile: Clip, extent: int, axis: int) -> None:
    """Fade from the end of `before` into the start of `tile` along an axis, in place."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    weight = np.arange(extent, dtype=np.float32) / np.float32(max(extent, 1))
    start = np.moveaxis(tile, axis, -1)[..., :extent]
    end = np.moveaxis(before, axis, -1)[..., before.shape[axis] - extent :]
    start[...] = end * (1 - weight) + start * weight
