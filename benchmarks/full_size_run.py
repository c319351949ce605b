"""One video of a full-size bundle, or one of eager PyTorch: `benchmarks/full_size.py` starts this.

    python benchmarks/full_size_run.py ENGINE BUNDLE SHAPE STEPS OUTPUT
    python benchmarks/full_size_run.py eager CHECKPOINT SHAPE STEPS OUTPUT

Seconds by stage, and the memory of this process, go to stdout as JSON.
"""

import json
import sys
import time
from pathlib import Path

from startup_stages import Clock, observer_of

from cvx_deploy.measure.memory import MemoryWatch, during
from cvx_deploy.shape import Shape

PROMPT = "a panda plays guitar in a bamboo grove"


class Spans(Clock):
    """Seconds by stage, and when each began and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, float, float]] = []

    def add(self, name: str, seconds: float) -> None:
        """Add some seconds that end now."""
        super().add(name, seconds)
        now = time.monotonic()
        self.spans.append((name, now - seconds, now))


def ours(clock: Spans, engine: str, bundle: Path, shape: str, steps: int, output: Path) -> None:
    """Make a video with the runtime, as `cvx-deploy run --guidance-scale 1` does."""
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.observe import ObservedBackend
    from cvx_deploy.engines.registry import open_backend
    from cvx_deploy.engines.spec import EngineOptions
    from cvx_deploy.pipeline.request import RunRequest
    from cvx_deploy.pipeline.run import run

    with clock.measure("open and check the bundle"):
        opened = Bundle.open(bundle).at(Shape.parse(shape))
    request = RunRequest((PROMPT,), str(output), steps=steps, guidance_scale=1, seed=7)
    with open_backend(engine, opened, EngineOptions(residency="phase")) as backend:
        report = run(ObservedBackend(backend, observer_of(clock)), request)
    clock.seconds["write video"] = report.stages["write video"]


def eager(clock: Spans, checkpoint: Path, shape: str, steps: int, output: Path) -> None:
    """Make it with diffusers: weights stay in bf16, and each block's are converted as it runs."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
    from full_size_eager import text_encoder, transformer
    from transformers import AutoTokenizer

    torch.set_grad_enabled(False)
    size = Shape.parse(shape)
    with clock.measure("load text_encoder"):
        text = text_encoder(checkpoint)
    with clock.measure("run text_encoder"):
        ids = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")(
            PROMPT, padding="max_length", max_length=226, truncation=True, return_tensors="pt"
        ).input_ids
        embeds = text(ids)[0].float()
    del text
    with clock.measure("load transformer"):
        denoiser = transformer(checkpoint)
        vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
        pipe = CogVideoXPipeline.from_pretrained(
            checkpoint, transformer=denoiser, vae=vae, text_encoder=None, tokenizer=None
        )
    started = time.monotonic()
    latents = pipe(
        prompt_embeds=embeds,
        num_frames=size.frames,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).frames
    clock.add("run transformer", time.monotonic() - started)
    pipe.transformer = None
    del denoiser
    with clock.measure("run vae_decoder_first"):
        frames = pipe.decode_latents(latents)
    np.save(output.with_suffix(".npy"), frames.float().numpy())


def main() -> None:
    """Make one video, and print what it took."""
    begun = time.monotonic()
    engine, source, shape, steps, output = sys.argv[1:6]
    clock = Spans()
    with MemoryWatch(interval=0.2) as watch:
        if engine == "eager":
            eager(clock, Path(source), shape, int(steps), Path(output))
        else:
            ours(clock, engine, Path(source), shape, int(steps), Path(output))
    whole = time.monotonic() - begun
    peaks: dict[str, int] = {}
    for name, start, end in clock.spans:
        peaks[name] = max(peaks.get(name, 0), *(sample.private for sample in during(watch.samples, start, end)))
    found = {
        "seconds": clock.seconds,
        "whole": whole,
        "private_bytes": peaks,
        "peak_private_bytes": watch.private_bytes,
        "peak_resident_bytes": watch.peak_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
