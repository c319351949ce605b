"""A prompt to T5 token ids, by the bundle's ``tokenizer.json`` alone.

Padding and truncation are those of transformers' ``T5Tokenizer`` called with ``padding="max_length", truncation=True``,
as diffusers' CogVideoX pipelines call it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from cvx_deploy.errors import BundleError, PromptError
from cvx_deploy.reading import read_whole, reading
from cvx_deploy.terminal import no_foreign_lines

_MOST_GROWN = 1000
_PAD_ID = 0  # T5's; the exporter refuses a tokenizer with another
_FIX = "write the bundle anew with cvx-deploy export"


@dataclass(frozen=True)
class Tokens:
    """One prompt as the text encoder takes it.

    Attributes:
        ids: int64, (1, max_length), ended by ``</s>`` and padded with 0.
        cut: The end of the prompt that did not fit, as diffusers words it in its warning; empty when all of it did.
    """

    ids: NDArray[np.int64]  # (1, max_length)
    cut: str


class Tokenizer:
    """The T5 tokenizer of a bundle.

    Args:
        path: The bundle's ``tokenizer.json``.
        max_length: Tokens the text encoder takes, ``</s>`` among them.
        content: The file's bytes, if they have been read already.

    Raises:
        BundleError: The file is missing, damaged, or not a T5 tokenizer.
    """

    def __init__(self, path: Path, max_length: int = 226, content: bytes | None = None) -> None:
        self.max_length = max_length
        self._path = path
        self._tokenizer = _load(path, content)
        with reading(path, BundleError, fix=_FIX), no_foreign_lines():
            self._end: list[int] = self._tokenizer.encode("").ids
        if len(self._end) != 1:
            raise BundleError(f"{path} is not a T5 tokenizer: it does not end a text with one token", fix=_FIX)

    def encode(self, prompt: str) -> Tokens:
        """Turn a prompt into ids, cutting what does not fit.

        Raises:
            PromptError: The prompt holds characters that are not Unicode text (half a surrogate pair).
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not Unicode text: {error}", fix="give the prompt in UTF-8") from error
        with reading(self._path, BundleError, fix=_FIX), no_foreign_lines():
            content = self._tokenizer.encode(prompt).ids[:-1]
            kept, removed = content[: self.max_length - 1], content[self.max_length - 1 :]
            ids = np.full((1, self.max_length), _PAD_ID, dtype=np.int64)
            ids[0, : len(kept) + 1] = kept + self._end
            return Tokens(ids, self._tokenizer.decode(removed, skip_special_tokens=False))


def _check_growth(rules: Any) -> None:
    """Raise ValueError where a tokenizer's own rules would make a prompt a thousand times as long, or more."""
    grown, waiting = 1, [rules.get(part) for part in ("normalizer", "pre_tokenizer")]
    while waiting:
        rule = waiting.pop()
        if isinstance(rule, dict):
            grown *= max(len(str(rule.get("content", ""))), 1)
            waiting += rule.values()
        elif isinstance(rule, list):
            waiting += rule
        if grown > _MOST_GROWN:
            raise ValueError("its rules would make any prompt too long")


def _load(path: Path, content: bytes | None) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise BundleError(f"{path} is missing", fix=_FIX)
    content = read_whole(path, BundleError, fix=_FIX) if content is None else content
    with reading(path, BundleError, fix=_FIX), no_foreign_lines():
        _check_growth(json.loads(content))
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
