"""Score videos against their captions: the share that shows the caption's colour, shape and motion.

    python benchmarks/miniature/score.py --bundle DIR [--count N] [--steps N] [--guidance-scale G] [--output FILE]
    python benchmarks/miniature/score.py --checkpoint DIR ...

Videos are made from a bundle on its engine, or with diffusers from a checkpoint, as the reference to compare with: from
the same captions, images and seeds. `score` judges any videos.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from captions import captions_of, meaning_of
from judge import verdict_on
from numpy.typing import NDArray
from PIL import Image
from world import FRAMES, SIDE, Scene, random_scenes, videos_of

ATTRIBUTES = ("shape", "colour", "motion")
_HELD_OUT_SEED = 31_337
# Normal quantile of a two-sided 95% interval.
_Z = 1.959964


@dataclass(frozen=True)
class Share:
    """How many of how many were right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """The share that was right, in [0, 1]."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval of the share."""
        n, p = self.total, self.share
        middle = p + _Z**2 / (2 * n)
        half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return (middle - half) / (1 + _Z**2 / n), (middle + half) / (1 + _Z**2 / n)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{100 * self.share:.1f}% ({self.right} of {self.total}, 95% interval {100 * low:.1f} to {100 * high:.1f})"
        )


@dataclass(frozen=True)
class Score:
    """How well videos show what their captions say.

    Attributes:
        shape: Videos that show the caption's shape; `colour` and `motion` likewise; `all` three at once.
        first_frame_psnr: Mean PSNR in dB of the first frame against the given image; None without images.
    """

    shape: Share
    colour: Share
    motion: Share
    all: Share
    first_frame_psnr: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the counts, shares and intervals as plain JSON values."""
        shares = {name: getattr(self, name) for name in (*ATTRIBUTES, "all")}
        table = {name: asdict(s) | {"share": s.share, "interval": s.interval} for name, s in shares.items()}
        return table | {"first_frame_psnr": self.first_frame_psnr}

    def __str__(self) -> str:
        lines = [f"{name}: {getattr(self, name)}" for name in ("all", *ATTRIBUTES)]
        if self.first_frame_psnr is not None:
            lines.append(f"first frame: {self.first_frame_psnr:.2f} dB")
        return "\n".join(lines)


def score(videos: NDArray[np.floating], captions: list[str], images: NDArray[np.floating] | None = None) -> Score:
    """Judge each video against what its caption says.

    Args:
        videos: (videos, frames, height, width, 3) in [0, 1].
        captions: One of this world's grammar for each video.
        images: The first frames that image-to-video was given, (videos, height, width, 3) in [0, 1].
    """
    right = np.array([_right(video, caption) for video, caption in zip(videos, captions, strict=True)])
    columns = (*right.T, right.all(axis=1))
    shape, colour, motion, together = (Share(int(column.sum()), len(videos)) for column in columns)
    psnr = (
        None
        if images is None
        else float(np.mean([_psnr(v[0], image) for v, image in zip(videos, images, strict=True)]))
    )
    return Score(shape, colour, motion, together, first_frame_psnr=psnr)


def _right(video: NDArray[np.floating], caption: str) -> list[bool]:
    """Whether the shape, the colour and the motion are the caption's."""
    said, seen = meaning_of(caption), verdict_on(video)
    return [getattr(seen, attribute) == said[attribute] for attribute in ATTRIBUTES]


def _psnr(frame: NDArray[np.floating], image: NDArray[np.floating]) -> float:
    return float(-10 * np.log10(max(np.square(frame.astype(np.float64) - image).mean(), 1e-12)))


def held_out_examples(count: int) -> tuple[list[Scene], list[str]]:
    """Scenes of combinations never trained on and a caption for each, the same ones every time."""
    scenes = random_scenes((_HELD_OUT_SEED,), count, "held-out")
    return scenes, captions_of(scenes, (_HELD_OUT_SEED, 1))


@dataclass(frozen=True)
class Sampling:
    """How videos are made; the defaults are the CogVideoX pipelines' own."""

    steps: int = 50
    guidance_scale: float = 6.0
    batch: int = 10


def videos_from_diffusers(
    checkpoint: Path, captions: list[str], images: NDArray[np.floating] | None, sampling: Sampling
) -> NDArray[np.float32]:
    """Make one video a caption with diffusers' pipeline, seed 0, 1, 2, ... in turn: (videos, F, H, W, 3) in [0, 1]."""
    # Only this function needs them: judging videos of another engine does not.
    import torch
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    kind = CogVideoXPipeline if images is None else CogVideoXImageToVideoPipeline
    pipeline = kind.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    videos = []
    for first in range(0, len(captions), sampling.batch):
        part = slice(first, min(first + sampling.batch, len(captions)))
        given = {} if images is None else {"image": torch.from_numpy(images[part]).permute(0, 3, 1, 2)}
        made = pipeline(
            prompt=captions[part],
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(part.start, part.stop)],
            output_type="np",
            **given,
        )
        videos.append(made.frames)
    return np.concatenate(videos).astype(np.float32)


def videos_from_bundle(
    bundle: Path, captions: list[str], images: NDArray[np.floating] | None, sampling: Sampling
) -> NDArray[np.float32]:
    """Make the same videos with a bundle on ONNX Runtime, one at a time."""
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend
    from cvx_deploy.pipeline.request import RunRequest
    from cvx_deploy.pipeline.run import run

    backend = OrtBackend(Bundle.open(bundle))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        request = RunRequest(
            tuple(captions), folder / "videos.npy", steps=sampling.steps, guidance_scale=sampling.guidance_scale
        )
        if images is None:
            run(backend, request)
            return np.load(folder / "videos.npy").reshape(-1, FRAMES, SIDE, SIDE, 3)
        videos = []
        for seed, (caption, image) in enumerate(zip(captions, images, strict=True)):
            Image.fromarray((image * 255).round().astype(np.uint8)).save(folder / "image.png")
            run(backend, replace(request, prompts=(caption,), image=folder / "image.png", seed=seed))
            videos.append(np.load(folder / "videos.npy"))
        return np.stack(videos)


def takes_images(folder: Path) -> bool:
    """Whether a checkpoint's or a bundle's transformer is image-to-video."""
    if (folder / "bundle.json").is_file():
        return json.loads((folder / "bundle.json").read_text())["traits"]["task"] == "image-to-video"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return config["in_channels"] == 2 * config["out_channels"]


VideoMaker = Callable[[Path, list[str], NDArray[np.floating] | None, Sampling], NDArray[np.float32]]


def score_model(folder: Path, make: VideoMaker, count: int, sampling: Sampling) -> tuple[Score, NDArray[np.float32]]:
    """Score a model on held-out captions (and first frames, when it takes them); returns the videos, too."""
    scenes, captions = held_out_examples(count)
    # As a picture file has them: bytes.
    images = (videos_of(scenes)[:, 0] * 255).round().astype(np.float32) / 255 if takes_images(folder) else None
    videos = make(folder, captions, images, sampling)
    return score(videos, captions, images), videos


def main() -> None:
    """Read the command line, score, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, help="run this bundle on ONNX Runtime")
    source.add_argument("--checkpoint", type=Path, help="run this folder in diffusers layout with diffusers")
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="sampling steps")
    parser.add_argument("--guidance-scale", type=float, default=Sampling.guidance_scale)
    parser.add_argument("--output", type=Path, help="write the score as JSON to this file")
    arguments = parser.parse_args()
    sampling = Sampling(steps=arguments.steps, guidance_scale=arguments.guidance_scale)
    make = videos_from_diffusers if arguments.bundle is None else videos_from_bundle
    result, _ = score_model(arguments.bundle or arguments.checkpoint, make, arguments.count, sampling)
    print(result)
    if arguments.output:
        engine = "diffusers" if arguments.bundle is None else "onnxruntime"
        conditions = {
            "count": arguments.count,
            "steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "engine": engine,
            "seeds": f"0 to {arguments.count - 1}",
        }
        arguments.output.write_text(json.dumps({"conditions": conditions, **result.to_json()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
