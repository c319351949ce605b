"""Latents to pixels and back, a chunk at a time, tile by tile when asked, with diffusers' chunks, tiles and blending.

One video at a time (diffusers' sliced encoding and decoding): every norm in the VAE looks at one sample alone, so a
batch would change nothing but memory. The causal caches that one chunk hands to the next never leave the engine.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle import Vae
from cvx_deploy.errors import ShapeError
from cvx_deploy.models import Shape
from cvx_deploy.progress import Advance
from cvx_deploy.runtime.backend import Backend, DeviceTensor, Session
from cvx_deploy.runtime.noise import Generator

Clip = NDArray[np.float32]  # (B, C, F, H, W) with B = 1, of pixels in [-1, 1] or of latents

_OVERLAP_HEIGHT = 1 / 6  # diffusers' AutoencoderKLCogVideoX.tile_overlap_factor_height
_OVERLAP_WIDTH = 1 / 5


@dataclass(frozen=True)
class Half:
    """The encoder's or the decoder's two networks.

    Attributes:
        first: The first chunk's network.
        following: The steady chunk's.
        downscale: Input pixels or latents to one latent: 8 for the encoder, 1 for the decoder.
    """

    first: str
    following: str
    downscale: int


def encoder(vae: Vae) -> Half:
    """Return the encoder's networks."""
    return Half("vae_encoder", "vae_encoder_next", vae.spatial)


DECODER = Half("vae_decoder_first", "vae_decoder_next", 1)


def count_chunks(backend: Backend, half: Half, frames: int) -> int:
    """Return how many chunks a clip of `frames` (latent frames for the decoder) is worked through in."""
    if not backend.bundle.has(half.following):
        return 1
    return 1 + (frames - _frames(backend, half.first)) // _frames(backend, half.following)


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of a clip: a Gaussian of unscaled latents, `mean` and `deviation` (1, C, f, h, w)."""

    mean: Clip
    deviation: Clip

    def sample(self, generator: Generator) -> Clip:
        """Draw latents (1, C, f, h, w), with one draw of `generator`, as diffusers' ``retrieve_latents`` does."""
        latents: Clip = self.mean + self.deviation * generator.randn(self.mean.shape)
        return latents


def encode(backend: Backend, pixels: Clip, *, tiled: bool, advance: Advance) -> Posterior:
    """Encode a clip.

    Args:
        backend: Where the networks run.
        pixels: (1, 3, F, H, W) in [-1, 1].
        tiled: Whether to work tile by tile.
        advance: Called with 1 after every chunk.
    """
    half = encoder(backend.bundle.manifest.vae)
    pieces = _tiled(backend, half, pixels, advance) if tiled else _chunks(backend, half, pixels, advance)
    mean, log_variance = np.split(np.concatenate(list(pieces), axis=2), 2, axis=1)
    return Posterior(mean, np.exp(0.5 * np.clip(log_variance, -30.0, 20.0)))


def decode(backend: Backend, latents: Clip, *, tiled: bool, advance: Advance) -> Iterator[Clip]:
    """Yield pixels (1, 3, n, H, W), about in [-1, 1], as chunks of the unscaled latents (1, C, f, h, w) decode.

    Tiled, there is one chunk, at the end: a tile is worked through to its last frame before the next begins, so that
    the caches of one tile alone are held.
    """
    return (_tiled if tiled else _chunks)(backend, DECODER, latents, advance)


def count_tiles(backend: Backend, half: Half, height: int, width: int) -> int:
    """Return how many tiles diffusers cuts a clip of that height and width (in the half's input) into."""
    grid = _Grid.of(backend.bundle.manifest.vae, half, height, width)
    return len(grid.rows.starts) * len(grid.columns.starts)


def planes(vae: Vae, half: Half, shape: Shape, *, tiled: bool) -> list[tuple[int, int]]:
    """Return the heights and widths, in latents, that a half works at: the frame's, or each of its tiles' once."""
    height, width = shape.height, shape.width
    if not tiled:
        return [(height // vae.spatial, width // vae.spatial)]
    scale = vae.spatial if half.downscale == 1 else 1
    grid = _Grid.of(vae, half, height // scale, width // scale)
    rows, columns = (
        sorted({min(axis.tile, length // scale - start) // half.downscale for start in axis.starts})
        for axis, length in ((grid.rows, height), (grid.columns, width))
    )
    return [(row, column) for row in rows for column in columns]


def check_tiles(vae: Vae, half: Half, shape: Shape) -> None:
    """Make sure that diffusers' tiles join to the frame again.

    diffusers takes strides, overlaps and what it keeps of a tile each as a whole number of pixels or of latents; for
    some tile sizes these do not go together, and its frames then come out larger or smaller.

    Raises:
        ShapeError: They do not join to this shape's frames.
    """
    decodes = half.downscale == 1
    scale = vae.spatial if decodes else 1
    grid = _Grid.of(vae, half, shape.height // scale, shape.width // scale)
    for name, axis, size in (("height", grid.rows, shape.height), ("width", grid.columns, shape.width)):
        cuts = [min(axis.tile, size // scale - start) for start in axis.starts]
        made = [cut * vae.spatial if decodes else cut // vae.spatial for cut in cuts]
        joined = sum(min(axis.keep, length) for length in made)
        if joined != (size if decodes else size // vae.spatial) or any(cut % half.downscale for cut in cuts):
            raise ShapeError(
                f"tiles of {vae.tile_height}x{vae.tile_width} do not join to a {name} of {size}, in diffusers neither",
                fix="leave out --vae-tiling",
            )


def _chunks(backend: Backend, half: Half, clip: Clip, advance: Advance) -> Iterator[Clip]:
    with _Sessions(backend, half, clip.shape[3:]) as sessions:
        yield from sessions.run(clip, advance)


class _Sessions:
    """The two networks of a half at one height and width, loaded as they are needed."""

    def __init__(self, backend: Backend, half: Half, plane: tuple[int, ...]) -> None:
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


@dataclass(frozen=True)
class _Axis:
    """How one axis is cut into tiles, in the half's input, and joined again, in its output.

    Attributes:
        starts: Where the tiles begin, in input lengths.
        tile: Input length of a tile; the last may be shorter.
        blend: Output length over which a tile fades into the one before it.
        keep: Output length a tile adds.
    """

    starts: tuple[int, ...]
    tile: int
    blend: int
    keep: int

    @classmethod
    def of(cls, length: int, tile_input: int, tile_output: int, overlap: float) -> "_Axis":
        stride = int(tile_input * (1 - overlap))
        if stride < 1:
            raise ShapeError(f"tiles of {tile_output} do not overlap and go on", fix="leave out --vae-tiling")
        blend = int(tile_output * overlap)
        return cls(tuple(range(0, length, stride)), tile_input, blend, tile_output - blend)


@dataclass(frozen=True)
class _Grid:
    """The tiles of diffusers' ``tiled_encode`` and ``tiled_decode``; one when the clip is no larger than a tile."""

    rows: _Axis
    columns: _Axis

    @classmethod
    def of(cls, vae: Vae, half: Half, height: int, width: int) -> "_Grid":
        pixels = (vae.tile_height, vae.tile_width)
        latents = (vae.tile_height // vae.spatial, vae.tile_width // vae.spatial)
        tile, result = (latents, pixels) if half.downscale == 1 else (pixels, latents)
        if height <= tile[0] and width <= tile[1]:
            scale = vae.spatial
            whole = (height * scale, width * scale) if half.downscale == 1 else (height // scale, width // scale)
            return cls(_Axis((0,), height, 0, whole[0]), _Axis((0,), width, 0, whole[1]))
        return cls(
            _Axis.of(height, tile[0], result[0], _OVERLAP_HEIGHT), _Axis.of(width, tile[1], result[1], _OVERLAP_WIDTH)
        )


def _tiled(backend: Backend, half: Half, clip: Clip, advance: Advance) -> Iterator[Clip]:
    grid = _Grid.of(backend.bundle.manifest.vae, half, *clip.shape[3:])
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


def _joined(tiles: dict[tuple[int, int], Clip], grid: _Grid) -> Clip:
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
