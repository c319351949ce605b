"""Make the README's animated picture: prompts, and the videos the packaged miniature makes of them.

python benchmarks/miniature/gallery.py [--output docs/miniature.gif]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run

PROMPTS = (
    "a red circle moves to the right",
    "a large blue square that shrinks",
    "a yellow triangle moving up on a dark background",
    "on a white background, a small purple disc drifts to the left",
)
SCALE = 4
MARGIN = 12
TEXT_HEIGHT = 44
FRAME_MS = 125
# Frames the last one is held for, before the videos begin again.
HOLD = 5


def videos_of_prompts(seed: int, guidance_scale: float) -> NDArray[np.float32]:
    """Make one video a prompt in the default number of steps: (videos, frames, height, width, 3) in [0, 1]."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "videos.npy"
        run(
            OrtBackend(Bundle.open(miniature("mini"))),
            RunRequest(PROMPTS, output, seed=seed, guidance_scale=guidance_scale),
        )
        return np.load(output)


def page(frames: NDArray[np.float32]) -> Image.Image:
    """Lay one frame of each video, (videos, height, width, 3), side by side above their prompts."""
    side = frames.shape[1] * SCALE
    picture = Image.new("RGB", (len(frames) * (side + MARGIN) + MARGIN, side + TEXT_HEIGHT + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for index, (frame, prompt) in enumerate(zip(frames, PROMPTS, strict=True)):
        x = MARGIN + index * (side + MARGIN)
        pixels = Image.fromarray((frame * 255).round().astype(np.uint8))
        picture.paste(pixels.resize((side, side), Image.Resampling.BICUBIC), (x, MARGIN))
        draw.multiline_text((x, side + MARGIN + 6), _wrapped(prompt, font, side), "black", font, spacing=3)
    return picture


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a text into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def write_gallery(videos: NDArray[np.float32], output: Path) -> None:
    """Write the animation, one palette for all of it, so that still parts do not flicker."""
    pages = [page(frames) for frames in videos.transpose(1, 0, 2, 3, 4)]
    strip = np.concatenate([np.asarray(picture) for picture in pages])
    palette = Image.fromarray(strip).quantize(255, Image.Quantize.MEDIANCUT)
    small = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pages]
    small += [small[-1]] * HOLD
    small[0].save(output, save_all=True, append_images=small[1:], duration=FRAME_MS, loop=0, optimize=True)


def main() -> None:
    """Read the command line and make the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/miniature.gif"))
    parser.add_argument("--seed", type=int, default=0, help="of the first video; the next has one more")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="at 6 colours and shapes swell")
    arguments = parser.parse_args()
    write_gallery(videos_of_prompts(arguments.seed, arguments.guidance_scale), arguments.output)


if __name__ == "__main__":
    main()
