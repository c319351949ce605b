"""Encode a dataset once, with a bundle's own engines: no VAE and no text encoder is in the training process.

    python examples/finetune/prepare.py --data DIR --model NAME --output CACHE [--clips-model NAME] [--engine NAME]

What is in CACHE already, of the same clip, bucket and weights, is kept, so that a run that was cut off goes on.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from dataset import Checked, DatasetError, check_dataset, exit_with, open_bundle, require_good
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.registry import ENGINES, open_backend
from cvx_deploy.errors import ShapeError
from cvx_deploy.files import staged_file
from cvx_deploy.media.read import load_video
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.prompts import embed
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape

INDEX = "index.json"
Tensors = dict[str, NDArray[np.float32]]


def prepare(report_clips: Iterable[Checked], bundle: Bundle, clips_bundle: Bundle, output: Path, engine: str) -> None:
    """Encode clips and captions, and write the index that training reads last of all.

    Args:
        report_clips: What passed the checks.
        bundle: The model's; its text encoder and, for image-to-video, its encoder of images are used.
        clips_bundle: Whose VAE encodes whole clips; the same one for text-to-video.
        output: Folder of the cache.
        engine: What runs the networks.

    Raises:
        DatasetError: The two bundles have not the same VAE.
        ShapeError: `clips_bundle` cannot encode a bucket.
    """
    clips = list(report_clips)
    vae_digest = _same_vae(bundle, clips_bundle)
    buckets = {checked.bucket for checked in clips}
    for bucket in buckets:
        _check_encoder(clips_bundle, bucket)
    _encode_clips(clips, clips_bundle, output, engine, vae_digest)
    if bundle.manifest.traits.task == "image-to-video":
        _encode_images(clips, bundle, output, engine, vae_digest)
    _encode_prompts({"", *(checked.clip.caption for checked in clips)}, bundle, output, engine)
    index = {
        "model": bundle.manifest.model,
        "task": bundle.manifest.traits.task,
        "scaling_factor": bundle.manifest.vae.scaling_factor,
        "invert_scale_latents": bundle.manifest.vae.invert_scale_latents,
        "empty": str(_prompt_file("", bundle)),
        "clips": [_entry(checked, bundle, vae_digest) for checked in clips],
    }
    with staged_file(output / INDEX) as path:
        path.write_text(json.dumps(index, indent=1) + "\n")


def _entry(checked: Checked, bundle: Bundle, vae_digest: str) -> dict[str, Any]:
    entry = {
        "shape": str(checked.bucket),
        "latents": str(_file("clips", checked, vae_digest)),
        "prompt": str(_prompt_file(checked.clip.caption, bundle)),
    }
    if bundle.manifest.traits.task == "image-to-video":
        entry["image"] = str(_file("images", checked, vae_digest))
    return entry


def _encode_clips(clips: list[Checked], bundle: Bundle, output: Path, engine: str, vae_digest: str) -> None:
    for bucket in {checked.bucket for checked in clips}:
        lacking = [
            (checked, output / _file("clips", checked, vae_digest)) for checked in clips if checked.bucket == bucket
        ]
        lacking = [(checked, path) for checked, path in lacking if not path.exists()]
        if not lacking:
            continue
        with open_backend(engine, bundle.at(bucket)) as backend:
            for number, (checked, path) in enumerate(lacking, 1):
                pixels = load_video(checked.clip.path, bucket.frames, bucket.height, bucket.width).pixels
                _save(_encoded(backend, pixels), path)
                print(f"{bucket}: clip {number} of {len(lacking)}", flush=True)


def _encode_images(clips: list[Checked], bundle: Bundle, output: Path, engine: str, vae_digest: str) -> None:
    """Encode each clip's first frame alone, as an image-to-video run encodes the image it is given."""
    for bucket in {checked.bucket for checked in clips}:
        with open_backend(engine, bundle.at(bucket)) as backend:
            for checked in clips:
                path = output / _file("images", checked, vae_digest)
                if checked.bucket == bucket and not path.exists():
                    pixels = load_video(checked.clip.path, 1, bucket.height, bucket.width).pixels
                    _save(_encoded(backend, pixels), path)


def _encoded(backend: Backend, pixels: NDArray[np.float32]) -> Tensors:
    """Return the Gaussian of a clip's latents, unscaled: mean and deviation, (F, C, H, W) each."""
    posterior = vae.encode(backend, pixels, tiled=False, advance=lambda _: None)
    parts = {"mean": posterior.mean, "deviation": posterior.deviation}
    return {name: np.ascontiguousarray(part[0].transpose(1, 0, 2, 3)) for name, part in parts.items()}


def _encode_prompts(captions: set[str], bundle: Bundle, output: Path, engine: str) -> None:
    lacking = sorted(text for text in captions if not (output / _prompt_file(text, bundle)).exists())
    if not lacking:
        return
    with open_backend(engine, bundle) as backend:
        embeddings, _ = embed(backend, lacking, None, SilentProgress())
    for text, embedding in embeddings.items():
        _save({"prompt_embeds": embedding}, output / _prompt_file(text, bundle))


def _save(tensors: Tensors, path: Path) -> None:
    with staged_file(path) as partial:
        save_file(tensors, partial)


def _file(kind: str, checked: Checked, vae_digest: str) -> Path:
    made_of = repr([kind, checked.digest, str(checked.bucket), vae_digest])
    return Path(kind) / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"


def _prompt_file(caption: str, bundle: Bundle) -> Path:
    made_of = repr([caption, _weights(bundle, "text_encoder")])
    return Path("prompts") / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"


def _weights(bundle: Bundle, role: str) -> list[str]:
    """Return the hashes of the weight files of a network."""
    network = bundle.network(role)
    return sorted(str(bundle.manifest.weights[name].sha256) for name in network.weights)


def _same_vae(bundle: Bundle, clips_bundle: Bundle) -> str:
    """Return a hash of the VAE's weights, which both bundles must have."""
    ours, theirs = (_weights(each, "vae_decoder_first") for each in (bundle, clips_bundle))
    if ours != theirs:
        raise DatasetError(
            f"{clips_bundle.path} encodes with another VAE than {bundle.path} decodes with",
            fix="export it from a text-to-video checkpoint with the same vae folder",
        )
    return hashlib.sha256(repr(ours).encode()).hexdigest()


def _check_encoder(bundle: Bundle, bucket: Shape) -> None:
    """Refuse a bundle that cannot encode clips of a bucket: image-to-video ones encode single images."""
    if bundle.manifest.traits.task == "image-to-video":
        raise ShapeError(
            f"{bundle.path} encodes images, not clips",
            fix="name a text-to-video bundle with the same VAE for the clips: 5b for 5b-i2v, mini for mini-i2v",
        )
    if not bundle.at(bucket).has("vae_encoder"):
        near = bucket.frames // (2 * bundle.manifest.vae.temporal) * 2 * bundle.manifest.vae.temporal
        raise ShapeError(f"{bundle.path} cannot encode clips of {bucket}", fix=f"export it with --frames {near}")


def main() -> None:
    """Read the command line, check the dataset, and encode it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with videos/ and captions.jsonl")
    parser.add_argument("--model", required=True, help="name of the bundle to train for")
    parser.add_argument("--clips-model", help="bundle whose VAE encodes clips, for image-to-video (default: --model)")
    parser.add_argument("--engines-dir", type=Path, default=Path("engines"), help="where bundles lie by their names")
    parser.add_argument("--engine", choices=ENGINES, default="onnxruntime")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cache")
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.model, arguments.engines_dir)
    clips_bundle = open_bundle(arguments.clips_model or arguments.model, arguments.engines_dir)
    report = check_dataset(arguments.data, bundle)
    print(report)
    require_good(report)
    prepare(report.clips, bundle, clips_bundle, arguments.output, arguments.engine)


if __name__ == "__main__":
    exit_with(main)
