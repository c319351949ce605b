"""A checkpoint and prompts in, a calibration table out: diffusers' own sampler, watched.

The text encoder and the transformer are streamed block by block from the checkpoint, so that the 5B takes a few GB. A
prompt is sampled from its seeded noise to the end, both guidance branches, and observed at early, middle and late
steps. After every prompt the ranges so far are kept beside the output, and a calibration that was stopped goes on
after the last whole prompt.
"""

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import T5Tokenizer

from cvx_deploy.bounds import LARGEST_FACTOR
from cvx_deploy.errors import CalibrationError, OutputError
from cvx_deploy.exporters.quantization.observe import Observations, observed
from cvx_deploy.exporters.reference.eager import device, eager_network, own_precision
from cvx_deploy.exporters.reference.streamed import streamed_network
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing.contract import TORCH_DTYPES
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Advance, Progress
from cvx_deploy.quantize.prompts import digest_of
from cvx_deploy.quantize.table import SCHEMA_VERSION, CalibrationTable, Conditions
from cvx_deploy.shape import Shape

_TOOLS = ("torch", "torchao", "diffusers", "transformers")


@dataclass(frozen=True)
class CalibrationRequest:
    """What to observe.

    Attributes:
        checkpoint: The model; adapters are not merged, as they change the ranges little.
        shape: The video size.
        prompts: Each makes one video.
        steps: Of the sampler.
        guidance_scale: 1 samples the conditional branch alone.
        seed: Of the first prompt's noise; the next one's is one more.
        image: The first frame of every video, for image-to-video models; None for smooth colours made from the seed.
        compute: The type to compute in; None for the checkpoint's own, and fp32 in place of fp16 on a CPU.
        second_moments: Whether to observe what int4wo's rounding takes: the transformer's inputs' second moments.
    """

    checkpoint: Checkpoint
    shape: Shape
    prompts: tuple[str, ...]
    steps: int = 10
    guidance_scale: float = 6.0
    seed: int = 0
    image: Path | None = None
    compute: Precision | None = None
    second_moments: bool = False

    def __post_init__(self) -> None:
        self.checkpoint.limits.check(self.shape)
        if self.steps < 1:
            raise CalibrationError(f"{self.steps} steps leave nothing to observe", fix="use --steps 10")
        if not 0 <= self.guidance_scale <= LARGEST_FACTOR:  # a NaN fails this too
            raise CalibrationError(f"guidance scale {self.guidance_scale}", fix="use --guidance-scale 6")
        if self.image is not None and self.checkpoint.traits.task != "image-to-video":
            raise CalibrationError("this model takes no image", fix="leave --image out")

    @property
    def precision(self) -> Precision:
        """The type computed in."""
        own = own_precision(self.checkpoint)
        return self.compute or ("fp32" if own == "fp16" and device().type == "cpu" else own)

    @property
    def observed(self) -> tuple[int, ...]:
        """The steps that are observed: the first, the middle and the last."""
        return tuple(sorted({0, self.steps // 2, self.steps - 1}))

    def conditions(self, done: int) -> Conditions:
        """Return what the table says of itself after `done` prompts."""
        return Conditions(
            SCHEMA_VERSION,
            checkpoint_digest(self.checkpoint),
            self.checkpoint.traits,
            self.shape,
            digest_of(self.prompts),
            done,
            self.steps,
            self.observed,
            self.guidance_scale,
            self.seed,
            self.precision,
            {tool: importlib.metadata.version(tool) for tool in _TOOLS},
            self.second_moments,
        )


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the transformer's weight files: their names and hashes, adapters left out."""
    digest = hashlib.sha256()
    for file in checkpoint.weight_files("transformer"):
        digest.update(f"{checkpoint.weight_file(file).sha256}  {file}\n".encode())
    return digest.hexdigest()


def calibrate(request: CalibrationRequest, output: Path, progress: Progress) -> CalibrationTable:
    """Observe the model at work, and write the table to `output`.

    Raises:
        CalibrationError: Activations stopped being numbers.
        CheckpointError, MediaError, OutputError: As each says.
    """
    if output.is_dir():
        raise OutputError(f"{output} is a folder", fix="name a file with --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    conditions = request.conditions(0)
    observations = Observations()
    done = _resume(partial, conditions, observations, progress)
    with torch.inference_mode():
        embeds = list(encode(request, observations, done, progress))
        with sampler(request, observations) as sampling:
            left = len(request.prompts) - done
            with progress.task("calibrate", left * request.steps) as advance:
                for index in range(done, len(request.prompts)):
                    sampling.sample(index, embeds[index - done], advance)
                    _table(replace(conditions, prompt_count=index + 1), observations).write(partial)
    table = _table(request.conditions(len(request.prompts)), observations)
    table.write(output)
    partial.unlink(missing_ok=True)
    return table


def _table(conditions: Conditions, observations: Observations) -> CalibrationTable:
    return CalibrationTable(conditions, dict(observations.amax), dict(observations.moments))


def _resume(partial: Path, conditions: Conditions, observations: Observations, progress: Progress) -> int:
    """Take over what an earlier, stopped calibration of the same conditions observed; return its prompts."""
    if not partial.is_file():
        return 0
    try:
        table = CalibrationTable.read(partial)
    except CalibrationError as error:
        progress.note(f"{error.what}; starting anew")
        return 0
    done = table.conditions.prompt_count
    if replace(table.conditions, prompt_count=0) != conditions:
        progress.note(f"{partial} is of a calibration under other conditions; starting anew")
        return 0
    observations.merge(table.amax)
    observations.merge_moments(table.moments)
    progress.note(f"going on after {done} prompts that were observed before")
    return done


def encode(
    request: CalibrationRequest, observations: Observations, done: int, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the embeddings of every prompt that is left, and of the empty one, and observe the text encoder."""
    checkpoint, dtype = request.checkpoint, TORCH_DTYPES[request.precision]
    network = streamed_network(checkpoint, "text_encoder", dtype, device())
    tokenizer = T5Tokenizer.from_pretrained(checkpoint.root / "tokenizer")
    pipeline: Any = diffusers.CogVideoXPipeline(tokenizer, network, None, None, None)
    layers = checkpoint.family.layers.quantizable("text_encoder", checkpoint.tensors("text_encoder"))
    length = checkpoint.configs["transformer"]["max_text_seq_length"]
    observations.seen = True
    left = request.prompts[done:]
    with (
        observed(network, layers, "text_encoder/", observations),
        progress.task("encode prompts", len(left)) as advance,
    ):
        options = {"max_sequence_length": length, "device": device(), "do_classifier_free_guidance": False}
        negative = pipeline.encode_prompt("", **options)[0]
        for prompt in left:
            yield pipeline.encode_prompt(prompt, **options)[0], negative
            advance(1)
    observations.seen = False


class Sampler:
    """diffusers' pipeline on a streamed transformer."""

    def __init__(self, request: CalibrationRequest, observations: Observations) -> None:
        self._request, self._observations = request, observations
        checkpoint, precision = request.checkpoint, request.precision
        self.transformer = streamed_network(checkpoint, "transformer", TORCH_DTYPES[precision], device())
        vae = eager_network(checkpoint, "vae", precision)
        config = checkpoint.configs["scheduler"]
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        self._image = _image(request) if checkpoint.traits.task == "image-to-video" else None
        kind: Any = diffusers.CogVideoXPipeline if self._image is None else diffusers.CogVideoXImageToVideoPipeline
        self._pipeline = kind(None, None, vae, self.transformer, scheduler)
        self._pipeline.set_progress_bar_config(disable=True)
        self._step = 0
        self._advance: Advance = lambda _: None
        self.transformer.register_forward_pre_hook(self._begin)
        self.transformer.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._observations.seen = self._step in self._request.observed

    def _end(self, *_: object) -> None:
        self._observations.seen = False
        self._step += 1
        self._advance(1)

    def sample(self, index: int, embeds: tuple[torch.Tensor, torch.Tensor], advance: Advance) -> None:
        """Sample one prompt's latents."""
        self._step, self._advance = 0, advance
        request = self._request
        positive, negative = embeds
        self._pipeline(
            num_frames=request.shape.frames,
            height=request.shape.height,
            width=request.shape.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed + index),
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            output_type="latent",
            **({} if self._image is None else {"image": self._image}),
        )

    def record(self, embeds: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, Any]]:
        """Sample the first prompt, and return what the transformer took at the observed steps."""
        recorded: list[dict[str, Any]] = []

        def take(_: Any, __: Any, given: dict[str, Any]) -> None:
            if self._step in self._request.observed:
                recorded.append(dict(given))

        handle = self.transformer.register_forward_pre_hook(take, with_kwargs=True)
        self.sample(0, embeds, lambda _: None)
        handle.remove()
        return recorded


@contextlib.contextmanager
def sampler(request: CalibrationRequest, observations: Observations) -> Iterator[Sampler]:
    """Yield diffusers' pipeline, its transformer observed."""
    sampling, checkpoint = Sampler(request, observations), request.checkpoint
    layers = checkpoint.family.layers.quantizable("transformer", checkpoint.tensors("transformer"))
    text = checkpoint.configs["transformer"]["max_text_seq_length"] if request.second_moments else None
    with observed(sampling.transformer, layers, "", observations, text):
        yield sampling


def _image(request: CalibrationRequest) -> Image.Image:
    """Return the first frame of every video, of the shape's size."""
    size = (request.shape.width, request.shape.height)
    if request.image is not None:
        from cvx_deploy.media.read import load_image

        pixels = load_image(request.image, size[1], size[0])[0, :, 0].transpose(1, 2, 0)
        return Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8))
    colours = np.random.default_rng(request.seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
