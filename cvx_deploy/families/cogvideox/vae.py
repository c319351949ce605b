"""How the VAE of CogVideoX is cut: into chunks of frames, and into tiles."""

from dataclasses import dataclass

from cvx_deploy.bounds import Positive, PositiveFactor
from cvx_deploy.errors import ShapeError
from cvx_deploy.shape import Shape


@dataclass(frozen=True)
class Vae:
    """What the runtime must know of the VAE.

    Attributes:
        scaling_factor: Latents are multiplied by it on their way into the transformer.
        invert_scale_latents: Image latents are divided by it instead.
        latent_channels: Channels of a latent frame.
        spatial: Pixels a latent spans in height and in width.
        temporal: Frames a latent frame spans.
        tile_height: Tile size in pixels when tiling is on; `tile_width` likewise.
    """

    scaling_factor: PositiveFactor
    invert_scale_latents: bool
    latent_channels: Positive
    spatial: Positive
    temporal: Positive
    tile_height: Positive
    tile_width: Positive


_OVERLAP_HEIGHT = 1 / 6  # diffusers' AutoencoderKLCogVideoX.tile_overlap_factor_height


_OVERLAP_WIDTH = 1 / 5


@dataclass(frozen=True)
class VaeHalf:
    """The encoder's or the decoder's two networks.

    Attributes:
        first: The first chunk's network.
        following: The steady chunk's.
        downscale: Input pixels or latents to one latent: 8 for the encoder, 1 for the decoder.
    """

    first: str
    following: str
    downscale: int


def encoder(vae: Vae) -> VaeHalf:
    """Return the encoder's networks."""
    return VaeHalf("vae_encoder", "vae_encoder_next", vae.spatial)


DECODER = VaeHalf("vae_decoder_first", "vae_decoder_next", 1)


def planes(vae: Vae, half: VaeHalf, shape: Shape, tiled: bool) -> list[tuple[int, int]]:
    """Return the heights and widths, in latents, that a half works at: the frame's, or each of its tiles' once."""
    height, width = shape.height, shape.width
    if not tiled:
        return [(height // vae.spatial, width // vae.spatial)]
    scale = vae.spatial if half.downscale == 1 else 1
    grid = Grid.of(vae, half, height // scale, width // scale)
    rows, columns = (
        sorted({min(axis.tile, length // scale - start) // half.downscale for start in axis.starts})
        for axis, length in ((grid.rows, height), (grid.columns, width))
    )
    return [(row, column) for row in rows for column in columns]


def check_tiles(vae: Vae, half: VaeHalf, shape: Shape) -> None:
    """Make sure that diffusers' tiles join to the frame again.

    diffusers takes strides, overlaps and what it keeps of a tile each as a whole number of pixels or of latents; for
    some tile sizes these do not go together, and its frames then come out larger or smaller.

    Raises:
        ShapeError: They do not join to this shape's frames.
    """
    decodes = half.downscale == 1
    scale = vae.spatial if decodes else 1
    grid = Grid.of(vae, half, shape.height // scale, shape.width // scale)
    for name, axis, size in (("height", grid.rows, shape.height), ("width", grid.columns, shape.width)):
        cuts = [min(axis.tile, size // scale - start) for start in axis.starts]
        made = [cut * vae.spatial if decodes else cut // vae.spatial for cut in cuts]
        joined = sum(min(axis.keep, length) for length in made)
        if joined != (size if decodes else size // vae.spatial) or any(cut % half.downscale for cut in cuts):
            raise ShapeError(
                f"tiles of {vae.tile_height}x{vae.tile_width} do not join to a {name} of {size}, in diffusers neither",
                fix="leave out --vae-tiling",
            )


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
class Grid:
    """The tiles of diffusers' ``tiled_encode`` and ``tiled_decode``; one when the clip is no larger than a tile."""

    rows: _Axis
    columns: _Axis

    @classmethod
    def of(cls, vae: Vae, half: VaeHalf, height: int, width: int) -> "Grid":
        """Cut a clip of that height and width, in the half's input."""
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
