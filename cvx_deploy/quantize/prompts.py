"""The prompts that activations are calibrated with: those that are shipped, or the user's."""

import hashlib
from pathlib import Path

from cvx_deploy.errors import PromptError
from cvx_deploy.reading import read_whole, reading

SHIPPED = Path(__file__).with_name("prompts.txt")


def read_prompts(path: Path = SHIPPED, count: int | None = None) -> tuple[str, ...]:
    """Return the first `count` prompts of a file, a line each; empty lines count for nothing.

    Raises:
        PromptError: The file cannot be read, or has fewer prompts.
    """
    fix = "name a text file, a prompt a line"
    content = read_whole(path, PromptError, fix=fix)
    with reading(path, PromptError, fix=fix):
        lines = content.decode("utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise PromptError(f"{path} holds no prompts", fix="write a prompt a line, or leave --prompts out")
    if count is not None and not 1 <= count <= len(prompts):
        raise PromptError(f"{path} holds {len(prompts)} prompts, asked for {count}", fix="ask for fewer, or write more")
    return prompts[:count]


def digest_of(prompts: tuple[str, ...]) -> str:
    """Return the SHA-256 of prompts, a line each."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
