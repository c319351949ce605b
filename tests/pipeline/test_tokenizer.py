"""The runtime's tokenizer against the tokenizers library's own padding and truncation, without transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from cvx_deploy.errors import BundleError, PromptError
from cvx_deploy.pipeline.tokenizer import Tokenizer

LENGTH = 12


def t5_like() -> tokenizers.Tokenizer:
    """Make a T5-shaped tokenizer: unigram pieces, words marked by U+2581, ``</s>`` at the end."""
    letters = [(mark + letter, -5.0) for mark in ("", "\u2581") for letter in "abcdehlnoprtw,.!'"]
    words = [("\u2581panda", -2.0), ("\u2581the", -1.0), ("lo", -2.5), ("\u2581", -3.0)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(special + words + letters, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    t5_like().save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path, max_length=LENGTH)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    """The library set up as transformers sets it up for ``padding="max_length", truncation=True``."""
    tokenizer = t5_like()
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")
    return tokenizer


@given(prompt=st.text() | st.lists(st.sampled_from(["the", "panda", " ", "</s>", "<pad>", "\n", "€"])).map("".join))
@example("")
@example("the panda " * 30)
def test_ids_are_padded_and_cut_as_the_library_does(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, prompt: str
) -> None:
    tokens = tokenizer.encode(prompt)
    assert tokens.ids.dtype == np.int64
    assert tokens.ids.tolist() == [library.encode(prompt).ids]


def test_a_long_prompt_keeps_its_end_token_and_tells_what_was_cut(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the " * (LENGTH - 1) + "panda panda")
    assert tokens.ids[0, -1] == 1
    assert tokens.cut == "panda panda"


@pytest.mark.parametrize(("count", "cut"), [(LENGTH - 2, ""), (LENGTH - 1, ""), (LENGTH, "the")])
def test_only_what_does_not_fit_is_cut(tokenizer: Tokenizer, count: int, cut: str) -> None:
    tokens = tokenizer.encode("the " * count)
    assert tokens.cut == cut
    assert (tokens.ids == 1).sum() == 1


def test_an_empty_prompt_is_the_end_token_and_padding(path: Path) -> None:
    assert Tokenizer(path).encode("").ids.tolist() == [[1] + [0] * 225]


def test_padding_and_truncation_left_in_the_file_do_not_count(tmp_path: Path, library: tokenizers.Tokenizer) -> None:
    library.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokenizer(tmp_path / "tokenizer.json", max_length=LENGTH + 5).encode("the " * (LENGTH + 2))
    assert (tokens.ids == 1).sum() == 1
    assert tokens.ids[0, LENGTH + 2] == 1


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"the prompt is not Unicode text: .* fix: give the prompt in UTF-8"):
        tokenizer.encode("a panda \udcff")


def test_a_missing_file_is_named_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing\. fix: .*cvx-deploy export"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:1000],
        lambda text: text.replace('"unk_id": 2', '"unk_id": 2000'),
        # the library panics here, and a panic is no Exception
        lambda text: text.replace('{\n    "type": "NFKC"', '{"type": "Precompiled", "precompiled_charsmap": "AAA"'),
    ],
    ids=["empty", "truncated", "altered", "panic"],
)
def test_a_damaged_file_is_named_with_a_fix(path: Path, tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    text = path.read_text()
    damaged = damage(text)
    assert damaged != text
    (tmp_path / "tokenizer.json").write_text(damaged)
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged: .* fix: .*cvx-deploy export"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    foreign = t5_like()
    foreign.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="is not a T5 tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_rules_that_would_make_a_prompt_a_million_times_as_long_are_refused(tmp_path: Path) -> None:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"normalizer": {"type": "Sequence", "normalizers": [rule] * 3}}))
    with pytest.raises(BundleError, match="too long"):
        Tokenizer(path)
