"""What every precision does to the trained miniature: captions, videos, latents, networks, sizes and speed.

    python benchmarks/quantization.py --work DIR

Every precision makes the same videos as fp32, from the same seeds, with ONNX Runtime on the CPU; fp8 runs there as a
reference, so its speed says nothing. What is done is kept in DIR, and the command goes on where it was stopped. Results
go to benchmarks/results/quantization.{json,md}, and into the table of docs/quantization.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent / "miniature"))

from captions import captions_of
from report import conditions, write
from score import held_out_examples, score
from skimage.metrics import structural_similarity
from world import random_scenes

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.observe import ObservedBackend, Observer
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint, shapes_of
from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest, calibrate
from cvx_deploy.exporters.quantization.quantized import Quantizing
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.precision import SCHEMES
from cvx_deploy.progress import Progress, RichProgress
from cvx_deploy.quantize.recipe import Recipe

TOOLS = ("onnxruntime", "torch", "torchao", "diffusers", "numpy", "scikit-image")
PRECISIONS = (
    "fp32",
    "int8/fp32",
    "int8wo/fp32",
    "int4wo/fp32",
    "int4wo/fp32+moments",
    "int4wo/fp32+moments+64",
    "int4wo/fp32+moments+but-last",
    "fp8/fp32",
    "fp8/fp32+attention",
)
"""After a plus, what else: second moments, groups of 64 in place of those that int4wo has, the last block as it is,
or fp8 in attention, too."""
RESULTS = Path(__file__).parent / "results" / "quantization"
DOCS = Path(__file__).parents[1] / "docs" / "quantization.md"
_CALIBRATION_SEED, _CALIBRATION_PROMPTS = (7, 7), 16
_LAST_BLOCK = "transformer_blocks.7"
_TRACED = 8  # videos whose latents are compared step by step
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"

Videos = NDArray[np.float32]  # (videos, frames, height, width, 3) in [0, 1]


@dataclass(frozen=True)
class Outcome:
    """What one precision does; errors are against fp32.

    Attributes:
        right: Videos whose shape, colour and motion are the caption's, of `count`.
        psnr: Of a video against fp32's, in dB, the median; `psnr_quartiles` its spread, likewise `ssim`.
        drift: Relative L2 distance of the latents from fp32's before each step, the mean over some videos.
        transformer: Cosine and relative L2 error of one run on fp32's own inputs, the worst over the steps.
        text_encoder: Likewise, the worst over some captions.
        weight_bytes: Of the transformer's and the text encoder's weight files, as this precision stores them.
        seconds: A video, the median over all; None where other work disturbed it.
    """

    precision: str
    count: int
    right: int
    psnr: float | None
    psnr_quartiles: tuple[float, float] | None
    ssim: float | None
    drift: tuple[float, ...]
    transformer: tuple[float, float]
    text_encoder: tuple[float, float]
    weight_bytes: int
    seconds: float | None


class Recorder(Observer):
    """Keeps what networks take and put out."""

    def __init__(self, backend: OrtBackend) -> None:
        self._backend = backend
        self.kept: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def before(self, role: str, inputs: Mapping[str, Any]) -> None:
        """Keep what a network is given."""
        self.kept.setdefault(role, []).append((self._on_host(inputs), {}))

    def after(self, role: str, outputs: Mapping[str, Any]) -> None:
        """Keep what it has put out."""
        self.kept[role][-1][1].update(self._on_host(outputs))

    def _on_host(self, tensors: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        host = self._backend.to_host
        return {
            name: np.array(value if isinstance(value, np.ndarray) else host(value)) for name, value in tensors.items()
        }


def bundle_of(precision: str, work: Path, progress: Progress) -> Bundle:
    """Export the miniature in a precision, unless it is there."""
    scheme, *more = precision.split("+")
    output = work / precision.replace("/", "-")
    if output.is_dir():
        return Bundle.open(output)
    checkpoint = miniature("mini")
    recipe = Recipe.parse(scheme, "fp32")
    static = recipe.transformer.scheme is not None and SCHEMES[recipe.transformer.scheme].activations is not None
    table = _table(checkpoint, work, progress) if static or "moments" in more else None
    exclude = (_LAST_BLOCK,) if "but-last" in more else None
    quantizing = Quantizing(table, attention="attention" in more, exclude=exclude)
    request = ExportRequest("mini", checkpoint, precision=scheme, quantizing=quantizing, copy_weights=True)
    smaller = {"int4wo": replace(SCHEMES["int4wo"], group=64)} if "64" in more else {}
    with mock.patch.dict(SCHEMES, smaller):
        return bundle_from_checkpoint(request, output, progress)


def _table(checkpoint: Path, work: Path, progress: Progress) -> Path:
    """Calibrate on captions of scenes that the model is not judged on."""
    place = work / "calibration.safetensors"
    if not place.is_file():
        scenes = random_scenes(_CALIBRATION_SEED, _CALIBRATION_PROMPTS, "held-out")
        prompts = tuple(captions_of(scenes, (*_CALIBRATION_SEED, 1)))
        (shape,) = shapes_of(ExportRequest("mini", checkpoint), Checkpoint(checkpoint))
        request = CalibrationRequest(Checkpoint(checkpoint), shape, prompts, steps=20, second_moments=True)
        calibrate(request, place, progress)
    return place


def videos_of(bundle: Bundle, captions: list[str], steps: int, folder: Path, progress: Progress) -> Iterator[float]:
    """Make one video a caption into `folder`, those that are missing; yield the seconds each took."""
    backend = OrtBackend(bundle, reference=True)
    folder.mkdir(exist_ok=True)
    with progress.task(folder.name, len(captions)) as advance:
        for seed, caption in enumerate(captions):
            video, noted = folder / f"{seed}.npy", folder / f"{seed}.seconds"
            if not noted.is_file():
                start = time.perf_counter()
                run(backend, RunRequest((caption,), video, steps=steps, seed=seed))
                noted.write_text(str(time.perf_counter() - start))
            yield float(noted.read_text())
            advance(1)


def recorded(bundle: Bundle, captions: list[str], steps: int, work: Path) -> list[Recorder]:
    """Make some of the videos again, and keep what the networks took and put out."""
    recorders = []
    for seed, caption in enumerate(captions[:_TRACED]):
        backend = OrtBackend(bundle, reference=True)
        recorder = Recorder(backend)
        run(ObservedBackend(backend, recorder), RunRequest((caption,), work / "traced.npy", steps=steps, seed=seed))
        recorders.append(recorder)
    return recorders


def drift(reference: list[Recorder], found: list[Recorder]) -> tuple[float, ...]:
    """Return the latents' mean relative distance before each step."""

    def latents(recorder: Recorder) -> NDArray[Any]:
        return np.stack([given["hidden_states"][0] for given, _ in recorder.kept["transformer"]])

    distances = [
        [_relative(a, b) for a, b in zip(latents(mine), latents(yours), strict=True)]
        for mine, yours in zip(reference, found, strict=True)
    ]
    return tuple(np.mean(distances, axis=0).tolist())


def network_error(bundle: Bundle, role: str, reference: list[Recorder]) -> tuple[float, float]:
    """Return the worst cosine and the worst relative error of a network on fp32's own inputs."""
    backend = OrtBackend(bundle, reference=True)
    cosines, errors = [], []
    kept = reference[0].kept[role] if role == "transformer" else [one for each in reference for one in each.kept[role]]
    batch = len(next(iter(kept[0][0].values())))
    with backend.load(role, {"batch": batch}) as session:
        for given, expected in kept:
            for name, value in session.run(given).items():
                cosines.append(_cosine(expected[name], backend.to_host(value)))
                errors.append(_relative(expected[name], backend.to_host(value)))
    return min(cosines), max(errors)


def _relative(expected: NDArray[Any], found: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def _cosine(expected: NDArray[Any], found: NDArray[Any]) -> float:
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def psnr_of(expected: Videos, found: Videos) -> float:
    """Return the PSNR of one video, in dB."""
    return float(-10 * np.log10(max(np.square(found.astype(np.float64) - expected).mean(), 1e-12)))


def ssim_of(expected: Videos, found: Videos) -> float:
    """Return the structural similarity, the mean over a video's frames."""
    pairs = zip(expected, found, strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]))


def outcome_of(precision: str, count: int, steps: int, work: Path, progress: Progress) -> Outcome:
    """Judge one precision; fp32's videos must be there for the others."""
    bundle = bundle_of(precision, work, progress)
    _, captions = held_out_examples(count)
    folder = work / f"videos-{bundle.path.name}"
    seconds = list(videos_of(bundle, captions, steps, folder, progress))
    videos, reference = (
        np.stack([np.load(place / f"{seed}.npy") for seed in range(count)]) for place in (folder, work / "videos-fp32")
    )
    straight = recorded(bundle_of("fp32", work, progress), captions, steps, work)
    plain = precision == "fp32"
    psnr = [psnr_of(a, b) for a, b in zip(reference, videos, strict=True)]
    quartiles = np.percentile(psnr, (25, 75)).round(2).tolist()
    verdict = score(videos, captions).to_json()
    files = [entry for name, entry in bundle.manifest.weights.items() if not name.startswith("vae")]
    return Outcome(
        precision,
        count,
        int(verdict["all"]["right"]),
        None if plain else float(np.median(psnr)),
        None if plain else (quartiles[0], quartiles[1]),
        None if plain else float(np.median([ssim_of(a, b) for a, b in zip(reference, videos, strict=True)])),
        () if plain else drift(straight, recorded(bundle, captions, steps, work)),
        network_error(bundle, "transformer", straight),
        network_error(bundle, "text_encoder", straight),
        sum(entry.size for entry in files),
        float(np.median(seconds)),
    )


def table_of(outcomes: list[Outcome]) -> list[str]:
    """Return the table, as Markdown."""
    lines = [
        "| precision | right of captions | PSNR, dB | SSIM | drift, last step | transformer, cosine | relative error "
        "| T5, relative error | weights, MB | s a video |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        psnr = (
            ""
            if one.psnr is None or one.psnr_quartiles is None
            else f"{one.psnr:.1f} ({one.psnr_quartiles[0]:.1f} to {one.psnr_quartiles[1]:.1f})"
        )
        ssim = "" if one.ssim is None else f"{one.ssim:.3f}"
        last = f"{one.drift[-1]:.3f}" if one.drift else ""
        speed = "reference" if one.precision.startswith("fp8") else "" if one.seconds is None else f"{one.seconds:.2f}"
        lines.append(
            f"| {one.precision} | {one.right} of {one.count} | {psnr} | {ssim} | {last} | {one.transformer[0]:.5f} | "
            f"{one.transformer[1]:.4f} | {one.text_encoder[1]:.4f} | {one.weight_bytes / 1e6:.2f} | {speed} |"
        )
    return lines


def with_table(text: str, lines: list[str]) -> str:
    """Return the docs with their table replaced."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return before + _BEGIN + "\n".join(lines) + "\n" + _END + after


def main() -> None:
    """Judge every precision, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for bundles and videos")
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="without suffix")
    parser.add_argument("--note", default="", help="what else used the machine")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    progress = RichProgress()
    outcomes = []
    for precision in dict.fromkeys(["fp32", *arguments.precisions]):
        kept = arguments.work / f"{precision.replace('/', '-')}-{arguments.count}-{arguments.steps}.json"
        if not kept.is_file():
            found = outcome_of(precision, arguments.count, arguments.steps, arguments.work, progress)
            kept.write_text(json.dumps(asdict(found)))
        outcomes.append(Outcome(**json.loads(kept.read_text())))
    calibration = f"{_CALIBRATION_PROMPTS} captions, 20 steps"
    told = conditions(
        TOOLS,
        arguments.note,
        model="mini",
        steps=arguments.steps,
        seeds=f"0 to {arguments.count - 1}",
        calibration=calibration,
    )
    lines = table_of(outcomes)
    write(arguments.output, told, {"outcomes": [asdict(one) for one in outcomes]}, lines)
    if arguments.output == RESULTS:
        DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
