"""The written tokenizer.json, read by the runtime, against the T5Tokenizer that diffusers' pipelines load."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Tokenizer

from cvx_deploy.errors import CheckpointError, OutputError
from cvx_deploy.exporters.cogvideox.tokenizer import disagreement, write_tokenizer_json
from cvx_deploy.pipeline.tokenizer import Tokenizer

LENGTH = 226
TEXT = (
    "a the panda plays guitar in bamboo forest sunlight through leaves video of cat running fast camera pans slowly "
    "golden hour café naïve Ünïcode 123 4567 hello, world! it's n't don't we're . ? , ' 老虎 <pad>"
)
WORDS = TEXT.split()


def train() -> bytes:
    """Train a T5-shaped sentencepiece model on a few hundred made-up sentences."""
    pick = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(pick.choices(WORDS, k=8)) for _ in range(300)]), model_writer=model,
        model_type="unigram", vocab_size=120, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def added(content: str) -> dict[str, Any]:
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": content, "special": True} | dict.fromkeys(flags, False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``tokenizer`` folder with the four files that CogVideoX checkpoints have."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tokenizer"
    folder.mkdir()
    model = train()
    (folder / "spiece.model").write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    extra = {f"<extra_id_{i}>": size + 99 - i for i in range(100)}
    basic = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "added_tokens_decoder": {str(i): added(token) for i, token in enumerate(basic.values())}
        | {str(i): added(token) for token, i in extra.items()},
        "additional_special_tokens": list(extra),
        "clean_up_tokenization_spaces": True,
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": LENGTH,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        **basic,
    }
    special = {key: added(token) for key, token in basic.items()} | {"additional_special_tokens": list(extra)}
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special), ("added_tokens", extra)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> T5Tokenizer:
    tokenizer: T5Tokenizer = T5Tokenizer.from_pretrained(checkpoint, local_files_only=True)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return written(checkpoint)


def written(folder: Path) -> Tokenizer:
    """Write the folder's tokenizer.json beside it and open it as the runtime does."""
    write_tokenizer_json(folder, folder.parent / "tokenizer.json")
    return Tokenizer(folder.parent / "tokenizer.json", LENGTH)


def diffusers_tokens(reference: T5Tokenizer, prompt: str) -> tuple[list[list[int]], str]:
    """Return ids and the text cut off, by the calls of the CogVideoX pipelines' ``_get_t5_prompt_embeds``."""
    settings = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "add_special_tokens": True}
    ids = reference([prompt], **settings).input_ids
    whole = reference([prompt], padding="longest").input_ids
    cut = len(whole[0]) >= len(ids[0]) and whole != ids
    return ids, reference.batch_decode([whole[0][LENGTH - 1 : -1]])[0] if cut else ""


pieces = st.sampled_from(
    [*WORDS, "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>", "  ", "\n", "\t", "😀", "ﬁ", " .", " n't"]
)
prompts = st.text() | st.lists(pieces).map(" ".join) | st.lists(pieces, min_size=150, max_size=400).map("".join)


@settings(deadline=None)
@given(prompt=prompts)
@example("")
@example(" ")
@example("  a panda,   plays\n\nguitar \t")
@example("a</s>b <extra_id_0> c<extra_id_99>x <pad> <unk>")
@example("😀 naïve ﬁ Å \uff46\uff55\uff4c\uff4c \u200b\u00a0\x00 \u0301")
@example("a " * (LENGTH - 1))
@example("a " * LENGTH)
@example("hello , world ! it 's do n't , ' . we 're I 'm I 've ? " * 40)
def test_ids_and_cut_text_are_those_of_diffusers(tokenizer: Tokenizer, reference: T5Tokenizer, prompt: str) -> None:
    ids, cut = diffusers_tokens(reference, prompt)
    tokens = tokenizer.encode(prompt)
    assert tokens.ids.tolist() == ids
    assert tokens.cut == cut


def test_cut_text_is_left_as_it_is_when_the_config_says_so(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path, clean_up_tokenization_spaces=False)
    prompt = "a panda , " * LENGTH
    cut = diffusers_tokens(T5Tokenizer.from_pretrained(folder, local_files_only=True), prompt)[1]
    assert written(folder).encode(prompt).cut == cut
    assert " , " in cut


def test_a_folder_saved_by_transformers_5_gives_the_same_ids(
    tokenizer: Tokenizer, reference: T5Tokenizer, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer" / "spiece.model").exists()
    prompt = "a panda 😀 plays <extra_id_3> guitar , café"
    tokens = written(tmp_path / "tokenizer").encode(prompt)
    assert tokens.ids.tolist() == tokenizer.encode(prompt).ids.tolist()


def test_twin_a_vocabulary_with_two_pieces_swapped_disagrees(
    checkpoint: Path, reference: T5Tokenizer, tmp_path: Path
) -> None:
    folder = changed(checkpoint, tmp_path)
    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "spiece.model").read_bytes())
    panda, cat = (next(p for p in model.pieces if p.piece == f"\u2581{word}") for word in ("panda", "cat"))
    panda.piece, cat.piece = cat.piece, panda.piece
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    assert written(folder).encode("the panda").ids.tolist() != diffusers_tokens(reference, "the panda")[0]


def changed(checkpoint: Path, tmp_path: Path, **config: object) -> Path:
    """Copy the checkpoint's folder, with some keys of its tokenizer_config.json set otherwise."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def drop_last_pieces(path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    del model.pieces[-10:]
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("spiece.model", Path.unlink, r"holds neither spiece\.model nor tokenizer\.json"),
        ("tokenizer_config.json", Path.unlink, r"tokenizer_config\.json is missing"),
        ("spiece.model", lambda path: path.write_bytes(path.read_bytes()[:500]), "is damaged"),
        ("spiece.model", drop_last_pieces, r"names token \d+, the vocabulary has \d+ tokens"),
        ("tokenizer_config.json", lambda path: path.write_text("{"), "is damaged"),
        ("tokenizer.json", lambda path: path.write_text('{"version": "1.0"}'), "is damaged"),
    ],
)
def test_a_harmed_folder_is_refused_with_a_fix(
    checkpoint: Path, tmp_path: Path, name: str, harm: Callable[[Path], object], message: str
) -> None:
    folder = changed(checkpoint, tmp_path)
    harm(folder / name)
    with pytest.raises(CheckpointError, match=f"{message}.* fix: download the checkpoint's tokenizer folder again"):
        write_tokenizer_json(folder, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("padding_side", "left"), ("truncation_side", "left"), ("split_special_tokens", True), ("pad_token", "</s>")],
)
def test_settings_that_t5_does_not_have_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = changed(checkpoint, tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key}.* where T5 has"):
        write_tokenizer_json(folder, tmp_path / "tokenizer.json")


def test_of_two_vocabularies_the_one_transformers_reads_is_written_and_a_note_says_so(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "tokenizer"))
    assert disagreement(folder) is None
    write_tokenizer_json(folder, folder / "tokenizer.json")
    assert disagreement(folder) is None, "the two are of the same vocabulary"
    other = json.loads((folder / "tokenizer.json").read_text())
    first, second = other["model"]["vocab"][10:12]
    other["model"]["vocab"][10:12] = [[second[0], first[1]], [first[0], second[1]]]
    (folder / "tokenizer.json").write_text(json.dumps(other))
    assert "tokenizer.json and spiece.model differ; the first is read" in str(disagreement(folder))
    write_tokenizer_json(folder, tmp_path / "written.json")
    ours, theirs = json.loads((tmp_path / "written.json").read_text()), T5Tokenizer.from_pretrained(folder)
    assert ours["model"]["vocab"][10][0] == second[0] == theirs.convert_ids_to_tokens(10)


def test_a_folder_that_is_not_there_is_never_looked_up_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is missing"):
        write_tokenizer_json(Path("google/t5-v1_1-xxl"), tmp_path / "tokenizer.json")


def test_a_place_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*nowhere"):
        write_tokenizer_json(checkpoint, tmp_path / "nowhere" / "tokenizer.json")
