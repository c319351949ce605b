"""A checkpoint's ``tokenizer/`` folder to one ``tokenizer.json``, which the runtime reads without transformers.

diffusers' CogVideoX pipelines load that folder as transformers' ``T5Tokenizer``; the file written is that object's own
backend, so it yields the same ids for every text.
"""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders
from transformers import T5Tokenizer

from cvx_deploy.errors import CheckpointError, OutputError
from cvx_deploy.reading import SMALL, check_regular, reading
from cvx_deploy.terminal import no_foreign_lines

_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("spiece.model", "tokenizer.json")
_FIX = "download the checkpoint's tokenizer folder again"

# What the runtime takes for granted, because T5 always has it so.
_T5_SETTINGS = {"pad_token_id": 0, "padding_side": "right", "truncation_side": "right", "split_special_tokens": False}

# What transformers replaces in decoded text when the config sets clean_up_tokenization_spaces, in its order.
_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def write_tokenizer_json(tokenizer_dir: Path, destination: Path) -> int:
    """Write the tokenizer of a diffusers checkpoint as one ``tokenizer.json``.

    Args:
        tokenizer_dir: The checkpoint's ``tokenizer`` folder: ``tokenizer_config.json`` and ``spiece.model`` or
            ``tokenizer.json``. It is read locally; nothing is downloaded and no code in it is run.
        destination: The file to write.

    Returns:
        How many tokens it knows.

    Raises:
        CheckpointError: A file is missing or damaged, or the tokenizer is not T5's.
        OutputError: `destination` cannot be written.
    """
    tokenizer = _load(tokenizer_dir)
    with reading(tokenizer_dir, CheckpointError, fix=_FIX), no_foreign_lines():
        backend = _plain(tokenizer)
    try:
        destination.write_text(backend.to_str(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error.strerror}", fix="choose another --output") from error
    return len(tokenizer)


def _plain(tokenizer: T5Tokenizer) -> Tokenizer:
    """Return a tokenizer's backend, without what the runtime does itself, and with what transformers does besides."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the caller may use the object on
    backend.no_truncation()
    backend.no_padding()
    if tokenizer.clean_up_tokenization_spaces:
        clean_up = [decoders.Replace(text, text.strip()) for text in _CLEAN_UP]
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(), *clean_up])
    return backend


def disagreement(folder: Path) -> str | None:
    """Return a note where ``spiece.model`` and ``tokenizer.json`` have other tokens; transformers reads the latter."""
    if not all((folder / name).is_file() for name in _VOCABULARIES):
        return None
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            if file.name != "tokenizer.json":
                (Path(place) / file.name).symlink_to(file.resolve())
        same = _load(Path(place)).get_vocab() == _load(folder).get_vocab()
    return (
        None
        if same
        else f"note: {folder}: tokenizer.json and spiece.model differ; the first is read, as in transformers"
    )


def _load(folder: Path) -> T5Tokenizer:
    # transformers makes up a tokenizer of its own when there is no vocabulary, so look before asking it.
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder / _CONFIG} is missing", fix=_FIX)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{folder} holds neither {' nor '.join(_VOCABULARIES)}", fix=_FIX)
    for name in (_CONFIG, *_VOCABULARIES):
        if (folder / name).is_file():
            check_regular(folder / name, CheckpointError, fix=_FIX, limit=SMALL)
    with reading(folder, CheckpointError, fix=_FIX), no_foreign_lines():
        tokenizer: T5Tokenizer = T5Tokenizer.from_pretrained(str(folder.resolve()), local_files_only=True)
        _check(folder, tokenizer)
    return tokenizer


def _check(folder: Path, tokenizer: T5Tokenizer) -> None:
    for key, wanted in _T5_SETTINGS.items():
        if getattr(tokenizer, key) != wanted:
            raise CheckpointError(
                f"{folder}: {key} is {getattr(tokenizer, key)!r}, where T5 has {wanted!r}",
                fix=f"use the tokenizer of a CogVideoX checkpoint, or mend {_CONFIG}",
            )
    # A vocabulary cut short between two of its pieces still loads, but then the config names tokens beyond its end.
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    last = max(map(int, config.get("added_tokens_decoder", {})), default=0)
    if last >= len(tokenizer):
        raise CheckpointError(
            f"{folder} is damaged: {_CONFIG} names token {last}, the vocabulary has {len(tokenizer)} tokens", fix=_FIX
        )
