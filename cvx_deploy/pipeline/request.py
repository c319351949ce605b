"""What a run is to make, and the networks that it needs."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import MOST_VIDEOS
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError, OutputError, PromptError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.pipeline.caching import CacheMode, PolicyMaker, check_cache
from cvx_deploy.pipeline.combinations import check_combination
from cvx_deploy.pipeline.noise import check_seed
from cvx_deploy.pipeline.prompt_cache import PromptCache
from cvx_deploy.pipeline.resume import ResumePoint
from cvx_deploy.pipeline.windows import Windows, plan_for
from cvx_deploy.precision import Precision

Pixels = NDArray[np.float32]
MOST_GUIDANCE = 1000.0


@dataclass(frozen=True)
class RunRequest:
    """What to make.

    Video k of the run has prompt ``prompts[k // num_videos]`` and seed ``seed + k``, so that it can be made alone
    again.

    Attributes:
        prompts: One or more, unless `prompt_embeds` are given.
        output: A file (.mp4, .webm, .gif, .npy), or a folder for PNG frames (a string that ends in a slash is one);
            None where the frames are not written.
        negative_prompt: What guidance leads away from.
        image: The first frame, for image-to-video models: a file, or pixels (1, 3, 1, H, W) in [-1, 1].
        video: A clip to start from, for text-to-video models, with `strength` in (0, 1]: how much of it is remade. A
            file or folder, or pixels (1, 3, F, H, W) in [-1, 1].
        guidance_scale: At most 1 turns guidance off, and halves the work.
        dynamic_cfg: Whether the guidance scale changes over the steps, as diffusers' ``use_dynamic_cfg``.
        scheduler: None for the checkpoint's own.
        num_videos: Videos a prompt.
        vae_tiling: Whether the VAE works tile by tile, as diffusers' ``enable_tiling``: less memory, other pixels.
        save_latents: Where to keep the finished latents, ``.npy``, float32 (videos, F, C, H, W).
        from_latents: Finished latents to decode; nothing is denoised.
        contact_sheet: Where to put a picture of some frames of each video, ``.png``.
        fps: Frames a second of the files, those between the model's own by optical flow; None for the model's own.
        each_seed: A seed for every video, in the place of `seed`.
        latents: The noise that each video starts from, float32 (videos, F, C, H, W), in the place of what its seed
            would draw; the shape is the padded one of 1.5 models.
        prompt_embeds: What the text encoder would say of each prompt, float32 (prompts, S, D), in the place of
            `prompts`; `negative_prompt_embeds` likewise of the negative prompts.
        latents_dtype: What a pipeline of diffusers keeps its latents in, and draws noise in: fp32, or fp16 or bf16 for
            the video of one in half precision.
        latents_only: Whether the run ends with the finished latents.
        cache: Which steps are forecast rather than run: by a mask known before the first step, as their outputs go, or
            as a policy of one's own says (see `pipeline.policy`); None runs all.
        cache_speedup: How many times less often a fixed cache runs the transformer; None for the default.
        cache_tolerance: How far an adaptive cache lets forecasts stray, a share of the output; None for the default.
        fast: Whether to forecast as much as docs/step-cache.md has found safe.
        windows: A video larger than the bundle's shape, or a loop, by windows of that shape.
        resume: Where an earlier run of the same request stood; its one video goes on from there.
    """

    prompts: tuple[str, ...]
    output: Path | str | None = None
    negative_prompt: str = ""
    image: Path | Pixels | None = None
    video: Path | Pixels | None = None
    strength: float = 0.8
    steps: int = 50
    guidance_scale: float = 6.0
    dynamic_cfg: bool = False
    scheduler: SchedulerKind | None = None
    seed: int = 0
    num_videos: int = 1
    vae_tiling: bool = False
    save_latents: Path | None = None
    from_latents: Path | None = None
    contact_sheet: Path | None = None
    fps: int | None = None
    each_seed: tuple[int, ...] | None = None
    latents: Pixels | None = None
    prompt_embeds: Pixels | None = None
    negative_prompt_embeds: Pixels | None = None
    latents_dtype: Precision = "fp32"
    latents_only: bool = False
    cache: CacheMode | PolicyMaker | None = None
    cache_speedup: float | None = None
    cache_tolerance: float | None = None
    fast: bool = False
    windows: Windows | None = None
    resume: ResumePoint | None = None

    def __post_init__(self) -> None:
        if not self.prompts and self.from_latents is None and self.prompt_embeds is None:
            raise PromptError("there is no prompt", fix="give at least one with --prompt TEXT")
        if not 0 < self.strength <= 1:
            raise CvxError(f"strength {self.strength} is not above 0 and at most 1", fix="use --strength 0.8")
        if not 0 <= self.guidance_scale <= MOST_GUIDANCE:  # a NaN fails this too
            raise CvxError(f"guidance scale {self.guidance_scale}", fix="use --guidance-scale 6, or 1 for no guidance")
        if self.num_videos < 1:
            raise CvxError(f"{self.num_videos} videos a prompt", fix="use --num-videos 1 or more")
        if self.num_videos * len(self.prompts) > MOST_VIDEOS:
            raise CvxError(
                f"{self.num_videos} videos of each of {len(self.prompts)} prompts are more than {MOST_VIDEOS}",
                fix="use a smaller --num-videos, and run several times with other seeds",
            )
        for index in (0, max(self.num_videos * len(self.prompts), 1) - 1):
            check_seed(self.seed + index)
        check_combination(self.given)
        check_cache(self)
        if self.save_latents is not None and self.save_latents.suffix != ".npy":
            raise OutputError(f"{self.save_latents} is not a .npy file", fix="use --save-latents FILE.npy")
        if self.contact_sheet is not None and self.contact_sheet.suffix != ".png":
            raise OutputError(f"{self.contact_sheet} is not a .png file", fix="use --contact-sheet FILE.png")
        both = self.save_latents is not None and self.output is not None
        if both and Path(str(self.save_latents)).absolute() == Path(str(self.output)).absolute():
            raise OutputError(f"{self.output} is to hold both the video and its latents", fix="name two files")
        if self.resume is not None and self.video_count > 1:
            raise CvxError(f"one video can be resumed, not {self.video_count}", fix="ask for each in a run of its own")
        if self.latents_dtype not in get_args(Precision):
            names = " or ".join(get_args(Precision))
            raise CvxError(f"latents_dtype {self.latents_dtype!r}", fix=f"use {names}")
        self._check_arrays()

    def _check_arrays(self) -> None:
        if self.each_seed is not None and len(self.each_seed) != self.video_count:
            raise CvxError(f"{len(self.each_seed)} seeds for {self.video_count} videos", fix="give one for each video")
        if self.latents is not None and len(self.latents) != self.video_count:
            raise CvxError(
                f"latents of {len(self.latents)} videos, and {self.video_count} are asked for", fix="give all of them"
            )
        given = {"prompt_embeds": self.prompt_embeds, "negative_prompt_embeds": self.negative_prompt_embeds}
        for name, embeds in given.items():
            if embeds is not None and (embeds.ndim != 3 or len(embeds) != self.prompt_count):
                raise PromptError(
                    f"{name} have the shape {embeds.shape}, not (prompts, tokens, channels)", fix="give one a prompt"
                )

    @property
    def prompt_count(self) -> int:
        """How many prompts there are, as texts or as embeddings."""
        return len(self.prompts) if self.prompt_embeds is None else len(self.prompt_embeds)

    @property
    def video_count(self) -> int:
        """How many videos are made, unless latents are only decoded."""
        return self.prompt_count * self.num_videos

    @property
    def seeds(self) -> list[int]:
        """Every video's seed."""
        return list(self.each_seed or range(self.seed, self.seed + self.video_count))

    @property
    def is_guided(self) -> bool:
        """Whether there is a second branch, of the negative prompt."""
        return self.guidance_scale > 1

    def parts_branches(self, devices: int) -> bool:
        """Whether the two branches of guidance run on two devices: those of one video, where there are so many."""
        return self.is_guided and self.video_count == 1 and devices > 1

    @property
    def given(self) -> set[str]:
        """The names of the fields that are not as they are by default."""
        changed = {field.name for field in fields(self) if _differs(getattr(self, field.name), field.default)}
        if self.windows is not None:
            changed |= {word for word in ("freenoise", "loop") if getattr(self.windows, word)}
            changed |= {"overlap"} if self.windows.overlap is not None else set()
        return changed - (set() if self.prompts else {"prompts"})


def _differs(value: object, default: object) -> bool:
    """Whether a field is not as it is by default; no default is an array, and arrays do not compare as one value."""
    return isinstance(value, np.ndarray) or value != default


def networks_needed(
    bundle: Bundle, request: RunRequest, prompt_cache: PromptCache | None = None, devices: int = 1
) -> list[tuple[str, dict[str, int]]]:
    """Return the role and the sizes of every network that a run loads, so that one that is missing is known at once."""
    batch = 2 if request.is_guided and not request.parts_branches(devices) else 1
    vae, cut, shape = bundle.manifest.vae, bundle.family.vae, bundle.shape
    halves = [cut.decoder]
    needed: list[tuple[str, dict[str, int]]] = []
    if request.from_latents is None:
        every = texts(request)
        if every and (prompt_cache is None or len(prompt_cache.read(every)) < len(every)):
            needed.append(("text_encoder", {"batch": 1}))
        needed += [("modulation", {}), ("transformer", {"batch": batch * plan_for(bundle, request.windows).at_once})]
        if request.image is not None or request.video is not None:
            halves.append(cut.encoder(vae))
    for half in halves if not request.latents_only else halves[1:]:
        if request.vae_tiling:
            cut.check_tiles(vae, half, shape)
        planes = cut.planes(vae, half, shape, request.vae_tiling)
        for role in filter(bundle.has, (half.first, half.following)):
            needed += [(role, {"latent_height": height, "latent_width": width}) for height, width in planes]
    return needed


def texts(request: RunRequest) -> list[str]:
    """Return what is to be encoded, each text once: with guidance the negative prompt, too."""
    negative = (request.negative_prompt,) if request.is_guided and request.negative_prompt_embeds is None else ()
    return list(dict.fromkeys((*negative, *(request.prompts if request.prompt_embeds is None else ()))))
