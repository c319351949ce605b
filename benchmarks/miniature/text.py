"""The miniature's text side: a sentencepiece tokenizer in T5's form, trained on captions, and a small T5 encoder."""

import io
import json
import math
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from captions import captions_of
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from world import random_scenes

# What every CogVideoX pipeline pads prompts to.
TEXT_LENGTH = 226
# Captions of this world have 14 tokens at most, their end included; one of padding must follow.
SHORT_LENGTH = 16
_VOCABULARY = 200


def save_tokenizer(folder: Path) -> None:
    """Train the tokenizer and write `spiece.model` and its configuration, as T5's, without sentinel tokens."""
    captions = captions_of(random_scenes((4_000,), 5_000, "train"), (4_001,))
    # Only what several words share can become a piece: the plurals make whole words of the singulars.
    plurals = sorted({f"{word}s" for caption in captions for word in caption.replace(",", "").split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions + plurals),
        model_writer=model,
        model_type="unigram",
        vocab_size=_VOCABULARY,
        hard_vocab_limit=False,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,-'",
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": TEXT_LENGTH}
    specials = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | specials, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """Load the tokenizer of `folder`, training it first where there is none."""
    if not (folder / "spiece.model").exists():
        save_tokenizer(folder)
    return T5Tokenizer.from_pretrained(folder)


def new_text_encoder(vocabulary: int, width: int = 64, layers: int = 2) -> T5EncoderModel:
    """Make a small T5 v1.1 encoder with starting weights from torch's global generator.

    Its table of relative positions is zero and stays so: the words of this world say the same in any order, and without
    positions all padding tokens are equal, which `padding_bias` needs.
    """
    # T5Config takes this from further arguments, which its signature does not name.
    untied: dict[str, Any] = {"tie_word_embeddings": False}
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=width // 16,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        **untied,
    )
    encoder = T5EncoderModel(config)
    positions = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    encoder.get_parameter(positions).requires_grad_(False).zero_()
    return encoder


def token_ids(tokenizer: T5Tokenizer, captions: list[str], length: int) -> Tensor:
    """Tokenize and pad as the pipelines do: int64 (captions, length)."""
    batch = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


def padding_bias(length: int, others: int = 0) -> Tensor | None:
    """Let the last of `length` text tokens stand for all the padding that a full-length prompt would have.

    The pipelines pad to 226 tokens and mask none of them. Equal keys that attention sees n times are one key whose
    score is log(n) higher, so a short prompt whose last padding token gets log(n) trains the very same function for a
    sixth of the work.

    Args:
        length: Text tokens in the batch.
        others: Tokens that follow the text in attention.

    Returns:
        What to add to attention scores, (1, 1, length + others), or None at full length.
    """
    if length == TEXT_LENGTH:
        return None
    bias = torch.zeros(1, 1, length + others)
    bias[..., length - 1] = math.log(TEXT_LENGTH - length + 1)
    return bias


def encode(text_encoder: T5EncoderModel, ids: Tensor) -> Tensor:
    """Encode token ids (B, L) without masking the padding, as the pipelines do: (B, L, d_model)."""
    bias = padding_bias(ids.shape[1])
    if bias is None:
        return text_encoder(ids)[0]
    mask = bias[:, None].expand(len(ids), 1, ids.shape[1], -1)
    return text_encoder(input_ids=ids, attention_mask=mask)[0]
