"""What engines are measured against: diffusers' own pipeline, stage by stage on the clock."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.reference.longer_rope import rope_of
from cvx_deploy.measure.baselines import Baseline
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.given import ImageLike, image_pixels
from cvx_deploy.media.write import open_writer
from cvx_deploy.pipeline.report import RunReport, Span
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.timing import Trace

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def has_cuda() -> bool:
    """Whether this PyTorch can use a GPU here."""
    return torch.cuda.is_available()


class EagerPipeline:
    """A checkpoint in diffusers.

    Args:
        checkpoint: Its folder.
        bundle: The bundle it is compared with, for precision and shape.
        way: As it is, through ``torch.compile``, or with linear layers quantized by torchao.
        device: cpu or cuda.
    """

    def __init__(self, checkpoint: Path, bundle: Bundle, way: Baseline, device: str) -> None:
        self._bundle, self._device = bundle, device
        dtype, variant = _DTYPES[bundle.network("transformer").precision], bundle.manifest.provenance.get("variant")
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._pipeline: Any = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype, variant=variant).to(
            device
        )
        self._pipeline.set_progress_bar_config(disable=True)
        transformer = self._pipeline.transformer
        if way in ("int8", "fp8"):
            _quantize(transformer, way)
        if way != "eager":
            for block in transformer.transformer_blocks:  # one compilation for all, as diffusers advises
                block.compile()

    def make(self, request: RunRequest) -> Trace:
        """Make one video, and say when what was done."""
        start, report = time.monotonic(), RunReport()
        with report.stage("text encoder"):
            embeds = self._embeds(request)
        frames, steps = self._sample(request, embeds, report)
        shape = self._bundle.shape
        video = VideoFormat(shape.frames, shape.height, shape.width, self._bundle.manifest.fps, videos=1)
        assert request.output is not None
        with report.stage("write video"), open_writer(request.output, video) as writer:
            writer.write(np.clip(frames, 0, 1).astype(np.float32))
        return Trace(start, time.monotonic(), tuple(report.spans), tuple(steps))

    def _embeds(self, request: RunRequest) -> dict[str, Any]:
        positive, negative = self._pipeline.encode_prompt(
            request.prompts[0],
            request.negative_prompt,
            request.guidance_scale > 1,
            max_sequence_length=self._bundle.manifest.text_length,
            device=torch.device(self._device),
        )
        self._wait()
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def _sample(self, request: RunRequest, embeds: dict[str, Any], report: RunReport) -> tuple[Any, list[float]]:
        """Denoise and decode; the transformer's first call ends the encoding of an image, its last step denoising."""
        shape, steps, begun = self._bundle.shape, list[float](), list[float]()

        def step_done(_: Any, __: int, ___: int, tensors: dict[str, Any]) -> dict[str, Any]:
            self._wait()
            steps.append(time.monotonic())
            return tensors

        image = {} if request.image is None else {"image": self._image(request.image)}
        hook = self._pipeline.transformer.register_forward_pre_hook(lambda *_: begun.append(time.monotonic()))
        start = time.monotonic()
        with rope_of(self._bundle):
            made = self._pipeline(
                **embeds,
                **image,
                height=shape.height,
                width=shape.width,
                num_frames=shape.frames,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="np",
                callback_on_step_end=step_done,
            )
        hook.remove()
        if image:
            report.spans.append(Span("vae encode", start, begun[0]))
        report.spans.append(Span("transformer", begun[0] if image else start, steps[-1]))
        report.spans.append(Span("vae decode", steps[-1], time.monotonic()))
        return made.frames[0], steps

    def _image(self, image: ImageLike) -> torch.Tensor:
        pixels = image_pixels(image, self._bundle.shape.height, self._bundle.shape.width)
        return torch.from_numpy(pixels[:, :, 0] / 2 + 0.5)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _quantize(transformer: Any, way: Baseline) -> None:
    """Quantize the linear layers, activations too, with torchao."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    config = Float8DynamicActivationFloat8WeightConfig if way == "fp8" else Int8DynamicActivationInt8WeightConfig
    quantize_(transformer, config())
