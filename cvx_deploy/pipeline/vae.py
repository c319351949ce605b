"""Latents to pixels and back, a chunk at a time, tile by tile when asked, with diffusers' chunks, tiles and blending.

A frame larger than the networks' own shape goes through them by windows of that shape, which overlap and fade into each
other; unlike with diffusers' tiles, frames come as their chunks decode, and the caches of every window are held.

One video at a time (diffusers' sliced encoding and decoding): every norm in the VAE looks at one sample alone, so a
batch would change nothing but memory. The causal caches that one chunk hands to the next never leave the engine.
"""

import contextlib
import math
from collections.abc import Generator as Steps
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend, DeviceTensor, Session
from cvx_deploy.families.cogvideox.vae import Grid, VaeHalf
from cvx_deploy.pipeline.axis import Axis
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Advance

Clip = NDArray[np.float32]  # (B, C, F, H, W) with B = 1, of pixels in [-1, 1] or of latents
Plane = tuple[Axis, Axis]
"""How a frame's rows and columns are cut into windows, in latents."""


def count_chunks(backend: Backend, half: VaeHalf, frames: int) -> int:
    """Return how many chunks a clip of `frames` (latent frames for the decoder) is worked through in."""
    return len(_chunks_of(backend, half, frames))


@dataclass(frozen=True)
class _Chunk:
    """What goes through a network at a time.

    Attributes:
        network: Its role.
        start: The first frame of its input; `end` the one after the last.
        skip: How many frames of its output are not new.
    """

    network: str
    start: int
    end: int
    skip: int = 0


def _chunks_of(backend: Backend, half: VaeHalf, frames: int) -> list[_Chunk]:
    """Return the chunks of a clip of so many frames; where no network follows the first, they overlap."""
    first = _frames(backend, half.first)
    if not backend.bundle.has(half.following):
        return _overlapping(backend, half, frames)
    step = _frames(backend, half.following)
    later = (_Chunk(half.following, start, start + step) for start in range(first, frames, step))
    return [_Chunk(half.first, 0, first), *later]


def _overlapping(backend: Backend, half: VaeHalf, frames: int) -> list[_Chunk]:
    """Return chunks of the first network alone, which knows no past: each takes some along, and leaves it out again.

    An odd count of latent frames is one video frame and whole latent frames after it.
    """
    network, temporal = backend.bundle.network(half.first), backend.bundle.manifest.vae.temporal
    encodes = half.downscale > 1
    first, window = _frames(backend, half.first), int((network.outputs if encodes else network.inputs)[0].shape[2])
    odd = window % 2
    latents = -(-frames // temporal) if encodes else frames
    chunks = [_Chunk(half.first, 0, first)]
    known = window
    while known < latents:
        start = min(known - max(window - 1, 1), latents - window)
        again = known - start
        begin = temporal * start if encodes else start
        chunks.append(_Chunk(half.first, begin, begin + first, again if encodes else temporal * (again - odd) + odd))
        known = start + window
    return chunks


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


def encode(
    backend: Backend,
    pixels: Clip,
    *,
    tiled: bool,
    advance: Advance,
    kept: Precision = "fp32",
    plane: Plane | None = None,
) -> Posterior:
    """Encode a clip.

    Args:
        backend: Where the networks run.
        pixels: (1, 3, F, H, W) in [-1, 1].
        tiled: Whether to work tile by tile.
        advance: Called with 1 after every chunk.
        kept: The type that latents are kept in.
        plane: The windows of frames larger than the networks' shape.
    """
    said = rounded(moments(backend, pixels, tiled=tiled, advance=advance, plane=plane), kept)
    mean, log_variance = np.split(said, 2, axis=1)
    half = rounded(0.5 * np.clip(log_variance, -30.0, 20.0), kept)
    return Posterior(mean, rounded(np.exp(half), kept), kept)


def moments(backend: Backend, pixels: Clip, *, tiled: bool, advance: Advance, plane: Plane | None = None) -> Clip:
    """Return what the encoder puts out for a clip: means, then logarithms of variances, (1, 2 C, f, h, w)."""
    half = backend.bundle.family.vae.encoder(backend.bundle.manifest.vae)
    return np.concatenate(list(_pieces(backend, half, pixels, tiled, advance, plane)), axis=2)


def decode(
    backend: Backend, latents: Clip, *, tiled: bool, advance: Advance, plane: Plane | None = None
) -> Steps[Clip, None, None]:
    """Yield pixels (1, 3, n, H, W), about in [-1, 1], as chunks of the unscaled latents (1, C, f, h, w) decode.

    Tiled, there is one chunk, at the end: a tile is worked through to its last frame before the next begins, so that
    the caches of one tile alone are held.
    """
    return _pieces(backend, backend.bundle.family.vae.decoder, latents, tiled, advance, plane)


def _pieces(
    backend: Backend, half: VaeHalf, clip: Clip, tiled: bool, advance: Advance, plane: Plane | None
) -> Steps[Clip, None, None]:
    if plane is not None:
        return _by_windows(backend, half, clip, advance, plane)
    return (_tiled if tiled else _chunks)(backend, half, clip, advance)


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
        finished: list[tuple[DeviceTensor, int]] = []
        for chunk in _chunks_of(self._backend, self._half, clip.shape[2]):
            network = self._backend.bundle.network(chunk.network)
            inputs = {network.inputs[0].name: clip[:, :, chunk.start : chunk.end], **state}
            outputs = self._load(chunk.network).run(inputs)
            state = {taken: outputs[given] for taken, given in network.state.items()}
            if finished:
                yield self._new(*finished.pop())
                advance(1)
            finished.append((outputs[network.outputs[0].name], chunk.skip))
        yield self._new(*finished.pop())
        advance(1)

    def _new(self, output: DeviceTensor, skip: int) -> Clip:
        return self._backend.to_host(output)[:, :, skip:]

    def _load(self, name: str) -> Session:
        if name not in self._loaded:
            self._loaded[name] = self._stack.enter_context(self._backend.load(name, self._sizes))
        return self._loaded[name]


def _by_windows(backend: Backend, half: VaeHalf, clip: Clip, advance: Advance, plane: Plane) -> Steps[Clip, None, None]:
    """Yield the chunks of a clip whose frames are larger than the networks' shape: each of all its windows, faded."""
    spatial = backend.bundle.manifest.vae.spatial
    fine, coarse = (spatial, 1) if half.downscale > 1 else (1, spatial)
    rows, columns = (axis.scaled(fine) for axis in plane)
    with _Sessions(backend, half, (rows.window, columns.window)) as sessions:
        runs = [
            sessions.run(clip[:, :, :, row : row + rows.window, column : column + columns.window], advance)
            for row in rows.starts
            for column in columns.starts
        ]
        for pieces in zip(*runs, strict=True):
            yield _faded(pieces, *(axis.scaled(coarse) for axis in plane))


def _faded(pieces: Sequence[Clip], rows: Axis, columns: Axis) -> Clip:
    """Return the weighted average of windows, in reading order."""
    joined = np.zeros((*pieces[0].shape[:3], rows.length, columns.length), np.float32)
    cuts = ((down, across) for down in rows.cuts() for across in columns.cuts())
    for piece, ((row, down), (column, across)) in zip(pieces, cuts, strict=True):
        joined[..., row[0] : row[-1] + 1, column[0] : column[-1] + 1] += down[:, None] * across * piece
    return joined


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
