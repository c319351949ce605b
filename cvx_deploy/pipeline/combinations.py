"""Which of a run's options go with which, as data: those that would be ignored are refused."""

from collections.abc import Collection
from dataclasses import dataclass

from cvx_deploy.errors import PromptError


@dataclass(frozen=True)
class Rule:
    """What must, or must not, be given beside an option.

    Attributes:
        option: A field of `RunRequest`, or the name of an option of the command.
        beside: The other options: without one of them it means nothing, or with them.
        why: What makes them meaningless together, or apart.
    """

    option: str
    beside: tuple[str, ...]
    why: str


MEANINGLESS_BESIDE = (
    Rule(
        "from_latents",
        (
            *("prompts", "negative_prompt", "image", "video", "strength", "steps", "guidance_scale", "dynamic_cfg"),
            *("scheduler", "seed", "num_videos", "save_latents", "prompt_cache"),
            *("cache", "cache_speedup", "cache_tolerance", "fast", "overlap", "freenoise", "loop"),
        ),
        "the latents are finished, and only decoded",
    ),
    Rule("image", ("video",), "a video starts from one of them"),
    Rule("fast", ("cache", "cache_speedup", "cache_tolerance"), "it is a choice of these"),
    Rule("resume", ("cache", "fast"), "what forecasts rest on is not kept"),
    Rule("latents", ("video", "freenoise"), "both say where to start"),
    Rule("loop", ("image", "video"), "a loop has no first frame"),
    Rule("prompt_embeds", ("prompts",), "the embeddings are what a prompt is made into"),
    Rule(
        "latents_dtype",
        ("cache", "cache_speedup", "cache_tolerance", "fast"),
        "it repeats a pipeline of diffusers, which runs every step",
    ),
    Rule("each_seed", ("seed",), "every video has a seed of its own"),
)
"""Beside `option`, each of `beside` would be ignored."""

MEANINGLESS_WITHOUT = (
    Rule("strength", ("video",), "it says how much of a video is remade"),
    Rule("cache_speedup", ("cache",), "it says how much work a fixed cache saves"),
    Rule("cache_tolerance", ("cache",), "it says how far an adaptive cache may stray"),
    Rule("negative_prompt_embeds", ("prompt_embeds",), "they are a pair"),
)
"""Unless one of `beside` is given, `option` would be ignored."""


def check_combination(given: Collection[str]) -> None:
    """Raise PromptError where one of the options that are given would be ignored."""
    for rule in MEANINGLESS_BESIDE:
        extra = [option for option in rule.beside if option in given]
        if rule.option in given and extra:
            words = f"{_flag(extra[0])} beside {_flag(rule.option)}"
            raise PromptError(f"{words} means nothing: {rule.why}", fix=f"leave out {' and '.join(map(_flag, extra))}")
    for rule in MEANINGLESS_WITHOUT:
        if rule.option in given and not set(rule.beside) & set(given):
            needed = " or ".join(map(_flag, rule.beside))
            raise PromptError(
                f"{_flag(rule.option)} means nothing without {needed}: {rule.why}",
                fix=f"add {needed}, or leave {_flag(rule.option)} out",
            )


_PYTHON_ONLY = frozenset({"latents", "prompt_embeds", "negative_prompt_embeds"})


def _flag(option: str) -> str:
    if option in _PYTHON_ONLY:
        return option
    return "--prompt" if option == "prompts" else "--" + option.replace("_", "-")
