"""Prompts to embeddings: tokenized, looked up among those that were kept, and the rest encoded."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend
from cvx_deploy.pipeline.prompt_cache import Embedding, PromptCache
from cvx_deploy.pipeline.tokenizer import Tokenizer
from cvx_deploy.progress import Progress


def embed(
    backend: Backend, texts: Iterable[str], cache: PromptCache | None, progress: Progress
) -> tuple[dict[str, Embedding], int]:
    """Return the embedding of every text, (S, D), and how many came from the cache.

    The text encoder is loaded only for those that did not.

    Raises:
        PromptError: A text is not Unicode.
    """
    ids = _tokenized(backend, texts, progress)
    kept = cache.read(ids) if cache is not None else {}
    encoded = {}
    for text, embedding in _encoded(backend, {text: ids[text] for text in ids if text not in kept}, progress):
        encoded[text] = embedding
        if cache is not None:
            cache.keep(text, embedding)
    return kept | encoded, len(kept)


def _encoded(
    backend: Backend, ids: dict[str, NDArray[np.int64]], progress: Progress
) -> Iterator[tuple[str, Embedding]]:
    """Yield the embedding of each text; without one nothing is loaded."""
    if not ids:
        return
    with (
        progress.task("encode prompts", len(ids)) as advance,
        backend.load("text_encoder", {"batch": 1}) as session,
    ):
        for text, tokens in ids.items():
            yield text, backend.to_host(session.run({"input_ids": tokens})["prompt_embeds"])[0]
            advance(1)


def _tokenized(backend: Backend, texts: Iterable[str], progress: Progress) -> dict[str, NDArray[np.int64]]:
    """Return each text's ids, (1, S); what did not fit is noted."""
    bundle = backend.bundle
    stored = bundle.manifest.tokenizer
    tokenizer = Tokenizer(bundle.inside(stored.path), bundle.manifest.text_length, bundle.content(stored))
    ids = {}
    for text in texts:
        tokens = tokenizer.encode(text)
        if tokens.cut:
            progress.note(
                f"note: the prompt is longer than {tokenizer.max_length} tokens; this part was cut: {tokens.cut}"
            )
        ids[text] = tokens.ids
    return ids
