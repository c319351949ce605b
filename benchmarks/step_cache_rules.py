"""Compare what is kept from step to step, and rules for which steps to run: on the miniature, closed loop, in PyTorch.

    python benchmarks/step_cache_rules.py [--count N] [--guidance-scale G] [--calls N]
                                          [--output results/step_cache_rules]

What is kept: the clean latents (x0) and the output, as `run --cache` could, or the residual of all blocks, what they
add to the embedded patches, which would take another output of the network and one more network. Rules: the built-in
mask; TeaCache's (arXiv:2411.19108) with the coefficients it publishes for CogVideoX, which looks at the embedding of
the timestep alone there and so is a mask; MagCache's (arXiv:2506.09045), whose magnitude ratios are measured here,
since none are published for CogVideoX. Each threshold is set so that as many steps are run as with the built-in mask.
"""

import argparse
import itertools
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from numpy.typing import NDArray
from report import conditions, write

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.measure.difference import psnr
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.forecast import Order
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.policy import spread
from cvx_deploy.pipeline.prompts import embed
from cvx_deploy.pipeline.schedulers import SCHEDULERS, Scheduler, SchedulerConfig, make_scheduler
from cvx_deploy.pipeline.shapes import latent_shape
from cvx_deploy.progress import SilentProgress

sys.path.insert(0, str(Path(__file__).with_name("miniature")))
from score import held_out_examples, score

TOOLS = ("torch", "diffusers", "onnxruntime", "numpy")
STEPS, FIRST = 50, 4
TEACACHE = (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03)
"""Coefficients of TeaCache4CogVideoX1.5 in github.com/ali-vilab/TeaCache for CogVideoX-2B, highest power first.

Those for the 5B (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339) make negative distances of what the
miniature's embeddings change by, and would run none between the second and the last step.
"""
Array = NDArray[np.float32]  # (videos, F, C, H, W)
Kept = Literal["x0", "output", "residual"]


@dataclass(frozen=True)
class Way:
    """What is kept from step to step, and how it is continued."""

    kept: Kept
    order: Order


class Kernel(torch.nn.Module):
    """Stands for all blocks: adds a residual that is foretold."""

    residual: torch.Tensor

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> tuple[Any, Any]:
        """Return what the last block would."""
        return hidden_states + self.residual, encoder_hidden_states


class Denoiser:
    """The miniature's transformer, for several captions at once, with the residual of its blocks."""

    def __init__(self, embeds: Array) -> None:
        folder = miniature("mini") / "transformer"
        self.model = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self.embeds = torch.from_numpy(embeds)
        self._blocks = self.model.transformer_blocks
        self._kernel = Kernel()
        self._in: torch.Tensor
        self.residual: torch.Tensor
        self._blocks[0].register_forward_pre_hook(self._before, with_kwargs=True)
        self._blocks[-1].register_forward_hook(self._after, with_kwargs=True)

    def _before(self, _: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._in = given["hidden_states"] if "hidden_states" in given else args[0]

    def _after(self, _: Any, args: Any, given: Any, output: tuple[Any, Any]) -> None:
        self.residual = output[0] - self._in

    def output(self, latents: Array, timestep: int, residual: torch.Tensor | None = None) -> Array:
        """Return what it says of both branches; with a residual the blocks are not run."""
        self._kernel.residual = residual  # type: ignore[assignment]
        blocks = self._blocks if residual is None else torch.nn.ModuleList([self._kernel])
        self.model.transformer_blocks = blocks
        both = torch.from_numpy(np.concatenate([latents, latents]))
        times = torch.full((len(both),), timestep, dtype=torch.int64)
        with torch.inference_mode():
            said = self.model(both, self.embeds, times, image_rotary_emb=self._rotary(latents), return_dict=False)[0]
        return np.asarray(said.numpy())

    def _rotary(self, latents: Array) -> Any:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.model.config
        if not config.use_rotary_positional_embeddings:
            return None
        grid = (latents.shape[3] // config.patch_size, latents.shape[4] // config.patch_size)
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(config.attention_head_dim, crops, grid, latents.shape[1])

    def time_embedding(self, timestep: int) -> NDArray[np.float64]:
        """Return the embedding of a timestep, which is all that TeaCache looks at in CogVideoX."""
        with torch.inference_mode():
            projected = self.model.time_proj(torch.tensor([timestep])).to(torch.float32)
            return np.asarray(self.model.time_embedding(projected).numpy(), np.float64)


@dataclass(frozen=True)
class Lab:
    """Captions, and what makes their videos."""

    bundle: Bundle
    backend: OrtBackend
    denoiser: Denoiser
    captions: list[str]
    guidance_scale: float
    kind: SchedulerKind

    @classmethod
    def of(cls, count: int, guidance_scale: float, kind: SchedulerKind) -> "Lab":
        """Open the miniature."""
        bundle = Bundle.open(miniature("mini"))
        backend = OrtBackend(bundle, threads=1)
        _, captions = held_out_examples(count)
        found, _ = embed(backend, ["", *captions], None, SilentProgress())
        embeds = np.stack([found[""]] * count + [found[caption] for caption in captions])
        return cls(bundle, backend, Denoiser(embeds), captions, guidance_scale, kind)

    def scheduler(self) -> Scheduler:
        """Return a fresh one."""
        config = {**self.bundle.manifest.scheduler["config"]}
        return make_scheduler(self.kind, SchedulerConfig.from_config(_classless(config)), STEPS)

    def latents(self, mask: tuple[bool, ...], way: Way) -> tuple[Array, list[float]]:
        """Return the finished latents, and the norm of the blocks' residual at each step that was run."""
        scheduler, draws = self.scheduler(), Draws(len(self.captions))
        latents = draws.randn((1, *latent_shape(self.bundle)[1:]))
        known: deque[tuple[int, Any]] = deque(maxlen=way.order + 1)
        ratios: list[float] = []
        before: torch.Tensor | None = None
        for index, timestep in enumerate(map(int, scheduler.timesteps)):
            if mask[index]:
                output = self.denoiser.output(latents, timestep)
                residual = self.denoiser.residual
                ratios.append(1.0 if before is None else float((residual.norm(dim=-1) / before.norm(dim=-1)).mean()))
                before = residual
                known.append((index, self._keep(way, scheduler, index, output, latents)))
            else:
                output = self._foretold(way, scheduler, index, known, latents)
            negative, positive = np.split(output, 2)
            guided = negative + np.float32(self.guidance_scale) * (positive - negative)
            latents = scheduler.step(index, guided, latents, draws)  # type: ignore[arg-type]
        return latents, ratios

    def _keep(self, way: Way, scheduler: Scheduler, index: int, output: Array, latents: Array) -> Any:
        if way.kept == "residual":
            return self.denoiser.residual
        both = np.concatenate([latents, latents])
        return output if way.kept == "output" else scheduler.original(index, output, both)

    def _foretold(self, way: Way, scheduler: Scheduler, index: int, known: Any, latents: Array) -> Array:
        place, value = known[-1]
        if len(known) == 2:
            earlier, other = known[0]
            value = value + (value - other) * ((index - place) / (place - earlier))
        if way.kept == "residual":
            return self.denoiser.output(latents, int(scheduler.timesteps[index]), value)
        both = np.concatenate([latents, latents])
        value = np.asarray(value, np.float32)
        return value if way.kept == "output" else scheduler.output_of(index, value, both)

    def frames(self, latents: Array) -> NDArray[np.float32]:
        """Decode every video."""
        scale = np.float32(1 / self.bundle.manifest.vae.scaling_factor)
        clips = (scale * clip[None].transpose(0, 2, 1, 3, 4) for clip in latents)
        pieces = (list(vae.decode(self.backend, clip, tiled=False, advance=lambda _: None)) for clip in clips)
        joined = (np.concatenate(piece, axis=2)[0].transpose(1, 2, 3, 0) for piece in pieces)
        return np.stack([np.clip(frames / 2 + 0.5, 0, 1) for frames in joined])


class Draws:
    """The noise of several videos, each of its own seed: its number."""

    def __init__(self, count: int) -> None:
        self._each = [Generator(seed) for seed in range(count)]

    def randn(self, shape: tuple[int, ...]) -> Array:
        """Draw for every video."""
        return np.concatenate([one.randn((1, *shape[1:])) for one in self._each])


def _classless(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_class_name"}


def teacache(lab: Lab) -> Callable[[float], tuple[bool, ...]]:
    """Return TeaCache's mask for a threshold."""
    embeddings = [lab.denoiser.time_embedding(int(timestep)) for timestep in lab.scheduler().timesteps]

    def mask(threshold: float) -> tuple[bool, ...]:
        run, sum_ = [True], 0.0
        for before, now in itertools.pairwise(embeddings):
            sum_ += float(np.polyval(TEACACHE, np.abs(now - before).mean() / np.abs(before).mean()))
            run.append(not sum_ < threshold)
            sum_ = 0.0 if run[-1] else sum_
        return (*run[:-1], True)

    return mask


def magcache(ratios: list[float]) -> Callable[[float], tuple[bool, ...]]:
    """Return MagCache's mask for a threshold: the first fifth is run, and at most three steps in turn are not."""

    def mask(threshold: float) -> tuple[bool, ...]:
        run: list[bool] = []
        error, product, skipped = 0.0, 1.0, 0
        for step, ratio in enumerate(ratios):
            product *= ratio
            error += abs(1 - product)
            skipped += 1
            keep = step < 0.2 * len(ratios) or not error < threshold or skipped > 3
            run.append(keep)
            error, product, skipped = (0.0, 1.0, 0) if keep else (error, product, skipped)
        return (*run[:-1], True)

    return mask


def of_calls(mask: Callable[[float], tuple[bool, ...]], calls: int) -> tuple[bool, ...]:
    """Return the mask whose calls come nearest to so many, over its thresholds."""
    every = [mask(float(threshold)) for threshold in np.geomspace(1e-5, 10, 400)]
    return min(every, key=lambda one: abs(sum(one) - calls))


def measured(lab: Lab, calls: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each rule and way."""
    everything = (True,) * STEPS
    latents, ratios = lab.latents(everything, Way("output", 0))
    full = lab.frames(latents)
    yield {"rule": "all steps", "calls": STEPS, "right": int(score(full, lab.captions).all.right)}
    built_in = tuple(action == "run" for action in spread(STEPS, calls, FIRST))
    every: tuple[tuple[Kept, Order], ...] = (("x0", 0), ("x0", 1), ("output", 0), ("output", 1))
    ways = [Way(*way) for way in (*every, ("residual", 0), ("residual", 1))]
    rules = {
        "TeaCache": of_calls(teacache(lab), calls),
        "MagCache": of_calls(magcache(ratios), calls),
    }
    asked = [("built-in", built_in, way) for way in ways]
    asked += [(name, mask, way) for name, mask in rules.items() for way in (ways[0], ways[1], Way("residual", 0))]
    for rule, mask, way in asked:
        frames = lab.frames(lab.latents(mask, way)[0])
        found = sorted(psnr(one, other) for one, other in zip(frames, full, strict=True))
        yield {
            "rule": rule,
            "kept": way.kept,
            "order": way.order,
            "calls": sum(mask),
            "median": round(statistics.median(found), 1),
            "least": round(found[0], 1),
            "right": int(score(frames, lab.captions).all.right),
            "run": " ".join(str(step) for step, run in enumerate(mask) if run),
        }


def table(found: dict[str, list[dict[str, Any]]], count: int) -> list[str]:
    """Lay the figures out as lines of Markdown."""
    lines = ["# What is kept from step to step, and which steps are run", ""]
    for title, rows in found.items():
        lines += [f"## {title}", "", "| rule | kept | continued | calls | PSNR median | least | right |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in rows:
            if "kept" not in row:
                lines.append(f"| {row['rule']} | | | {row['calls']} | | | {row['right']} of {count} |")
                continue
            how = ("repeated", "in a straight line")[row["order"]]
            figures = f"{row['calls']} | {row['median']} dB | {row['least']} dB | {row['right']} of {count}"
            lines.append(f"| {row['rule']} | {row['kept']} | {how} | {figures} |")
        lines.append("")
    return lines


def main() -> None:
    """Read the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="held-out captions")
    parser.add_argument("--guidance-scale", type=float, action="append", help="default: 2 and 6")
    parser.add_argument("--calls", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cache_rules")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for scale in arguments.guidance_scale or (2.0, 6.0):
        for kind in SCHEDULERS:
            rows = found.setdefault(f"{kind}, guidance {scale:g}", [])
            for row in measured(Lab.of(arguments.count, scale, kind), arguments.calls):
                rows.append(row)
                print(kind, scale, row, flush=True)
    told = conditions(TOOLS, "other programs ran beside it", steps=STEPS, seeds="a caption's number")
    write(arguments.output, told, {"results": found}, table(found, arguments.count))


if __name__ == "__main__":
    main()
