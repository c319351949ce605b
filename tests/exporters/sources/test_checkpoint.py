"""A checkpoint is read by its configs and headers alone; what is missing, damaged or another model's is named."""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cvx_deploy.bundle.opened import HASHES
from cvx_deploy.bundle.safetensors import read_header
from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint, sensible_config
from cvx_deploy.families.cogvideox.models import MODELS
from tests.conftest import Tiny

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_every_model_is_read_for_what_it_is(tiny: Tiny, model_name: str) -> None:
    checkpoint = Checkpoint(tiny(model_name))
    assert checkpoint.traits == MODELS[model_name].traits
    checkpoint.require_model(model_name)
    checkpoint.require_model("a name of one's own")


def test_every_tensor_is_where_safetensors_finds_it(tiny: Tiny, model_name: str) -> None:
    root = tiny(model_name)
    checkpoint = Checkpoint(root)
    for component in ("text_encoder", "transformer", "vae"):
        tensors = checkpoint.tensors(component)
        for file in {tensor.file for tensor in tensors.values()}:
            data = (root / file).read_bytes()
            for name, tensor in load_file(root / file).items():
                ours = tensors[name]
                assert ours.shape == tuple(tensor.shape)
                assert {"F16": torch.float16, "BF16": torch.bfloat16}[ours.dtype] == tensor.dtype
                theirs = tensor.view(-1).view(torch.uint8).numpy().tobytes()
                assert data[ours.offset : ours.offset + ours.nbytes] == theirs


def test_another_models_checkpoint_is_named(tiny: Tiny) -> None:
    with pytest.raises(WrongModelError, match=r"is a 2b checkpoint, asked for 5b. fix: use --model 2b"):
        Checkpoint(tiny("2b")).require_model("5b")


def test_a_checkpoint_like_no_published_model_is_told_to_take_its_own_name(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", patch_size_t=2)
    edit(folder / "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
    with pytest.raises(WrongModelError, match=r"is not a 5b checkpoint.*use --model with a name of your own"):
        Checkpoint(folder).require_model("5b")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("model_index.json", {}, "something without a name"),
        ("config.json", {"_class_name": "CogVideoXTransformer3DModel"}, "CogVideoXTransformer3DModel"),
        ("config.json", {"model_type": "llama"}, "llama"),
    ],
)
def test_a_folder_that_is_another_models_is_named(
    tmp_path: Path, name: str, content: dict[str, str], found: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(WrongModelError, match=f"holds {found}, not a CogVideoX pipeline. fix: use .*5b-i2v"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("component", ["transformer", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_part_that_is_another_models_is_named(folder: Path, component: str) -> None:
    edit(folder / "model_index.json", **{component: ["diffusers", "Other"]})
    with pytest.raises(WrongModelError, match=f"model_index.json says that the {component} is a Other, not a"):
        Checkpoint(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"there is no checkpoint folder {tmp_path}/nothing"):
        Checkpoint(tmp_path / "nothing")


CONFIGS = [
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("file", CONFIGS)
def test_a_missing_config_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{folder / file} is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("file", CONFIGS)
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000], ids=repr)
def test_a_config_that_is_no_json_object_is_named(folder: Path, file: str, text: bytes) -> None:
    (folder / file).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{folder / file} (is not readable JSON|holds no JSON object)"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        *(("transformer", key) for key in ("in_channels", "patch_size", "sample_frames", "max_text_seq_length")),
        *(("vae", key) for key in ("block_out_channels", "scaling_factor", "temporal_compression_ratio")),
        ("text_encoder", "d_model"),
    ],
)
@pytest.mark.parametrize("value", ["x", 0, -1, []], ids=repr)
def test_a_config_whose_number_makes_no_sense_is_named(folder: Path, component: str, key: str, value: object) -> None:
    edit(folder / component / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"{folder}/{component}/config.json is damaged: .*{key}"):
        Checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    name = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"the weight file {folder / name} is missing"):
        Checkpoint(folder).tensors("transformer")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_weights_are_never_loaded(folder: Path, suffix: str) -> None:
    (folder / VAE).unlink()
    (folder / "vae" / f"diffusion_pytorch_model{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"only pickled weights .*never loaded: a pickle can run any code"):
        Checkpoint(folder).tensors("vae")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map_is_named(folder: Path, index: dict[str, object]) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the index of .*transformer has no weight_map"):
        Checkpoint(folder).tensors("transformer")


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/hostname", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(folder: Path, name: str) -> None:
    index = {"weight_map": {"x": name}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside it. fix: do not use this checkpoint"):
        Checkpoint(folder).tensors("transformer")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NO_ENTRIES: list[object] = [None, [], {}, ENTRY | {"dtype": "F33"}]


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"", b"\0" * 7, struct.pack("<Q", 2**63), struct.pack("<Q", 50) + b"{}", safetensors(b"{")),
        *(safetensors(b"[]"), safetensors(b"\xff\xff"), safetensors(b"[" * 100_000)),
        *(safetensors({"x": value}, bytes(8)) for value in NO_ENTRIES),
        *(safetensors({"x": ENTRY | {"data_offsets": o}}, bytes(8)) for o in ([8, 0], [-8, 0], [0], ["a", "b"], None)),
        *(safetensors({"x": ENTRY | {"shape": shape}}, bytes(8)) for shape in ([3], ["a"], None, 2)),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_header_that_makes_no_sense_is_named(folder: Path, damaged: bytes) -> None:
    (folder / VAE).write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"{folder / VAE} is truncated or damaged: its header makes no sense"):
        Checkpoint(folder).tensors("vae")


@pytest.mark.parametrize("change", [-1, -1000, 1])
def test_a_file_of_another_length_than_its_header_says_is_named(folder: Path, change: int) -> None:
    data = (folder / VAE).read_bytes()
    (folder / VAE).write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(
        CheckpointError, match=r"VAE has .* bytes, its header speaks of .*: truncated or altered".replace("VAE", VAE)
    ):
        Checkpoint(folder).tensors("vae")


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_no_damage_to_a_header_is_more_than_a_stated_failure(tmp_path: Path, data: st.DataObject) -> None:
    good = bytearray(safetensors({"a": ENTRY, "__metadata__": {"format": "pt"}}, bytes(8)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    path = tmp_path / "some.safetensors"
    path.write_bytes(good[:cut])
    try:
        tensors = read_header(path, path.name)
    except CheckpointError:
        return
    assert all(math.prod(tensor.shape) <= cut for tensor in tensors.values())


def test_a_float8_tensor_is_read_as_one(folder: Path) -> None:
    (folder / VAE).write_bytes(safetensors({"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}, b"abc"))
    assert Checkpoint(folder).tensors("vae")["x"].dtype == "F8_E4M3"


def test_a_carried_hash_younger_than_its_file_is_trusted(folder: Path) -> None:
    told: list[int] = []
    entry = Checkpoint(folder).weight_file(VAE, told.append)
    assert told == []
    assert entry.sha256 == hashlib.sha256((folder / VAE).read_bytes()).hexdigest()
    assert (entry.size, entry.mtime_ns) == ((folder / VAE).stat().st_size, (folder / VAE).stat().st_mtime_ns)


def test_an_altered_file_does_not_pass_its_carried_hash(folder: Path) -> None:
    data = bytearray((folder / VAE).read_bytes())
    data[-1] ^= 1
    (folder / VAE).write_bytes(data)
    assert Checkpoint(folder).tensors("vae")  # the header is as it was
    with pytest.raises(
        CheckpointError, match=f"{folder / VAE} was altered: its SHA-256 is not the one in .*SHA256SUMS"
    ):
        Checkpoint(folder).weight_file(VAE)


def test_a_touched_file_with_its_old_content_passes(folder: Path) -> None:
    os.utime(folder / VAE)
    told: list[int] = []
    Checkpoint(folder).weight_file(VAE, told.append)
    assert sum(told) == (folder / VAE).stat().st_size


def test_without_carried_hashes_files_are_hashed(folder: Path) -> None:
    (folder / HASHES).unlink()
    assert Checkpoint(folder).weight_file(VAE).sha256 == hashlib.sha256((folder / VAE).read_bytes()).hexdigest()


def test_hashes_in_the_forms_that_sha256sum_writes_are_read(folder: Path) -> None:
    digest = hashlib.sha256((folder / VAE).read_bytes()).hexdigest()
    (folder / HASHES).write_text(f"\n{digest.upper()} *{VAE}\n")
    assert Checkpoint(folder).weight_file(VAE).sha256 == digest


@pytest.mark.parametrize("text", [b"abc\n", b"12 vae/x\n", b"\xff\xfe\n", b"0" * 64 + b"\n"])
def test_carried_hashes_that_are_none_are_named(folder: Path, text: bytes) -> None:
    (folder / HASHES).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{folder / HASHES} is damaged"):
        Checkpoint(folder).weight_file(VAE)


@pytest.mark.parametrize(
    ("fixed", "table", "name"),
    [(False, False, "2b"), (False, False, "5b"), (True, False, "5b-i2v"), (False, True, "1.5-5b")],
)
def test_limits_come_from_the_configs(tiny: Tiny, fixed: bool, table: bool, name: str) -> None:
    limits = Checkpoint(tiny(name)).limits
    assert (limits.spatial, limits.temporal) == (16, 4)
    assert (limits.sample_height, limits.sample_width) == (80, 112)
    assert (limits.fixed_size, limits.table_size) == (fixed, table)


@pytest.mark.parametrize("raised", [KeyError("x"), TypeError("y"), UnboundLocalError("z")])
def test_what_a_config_makes_the_libraries_raise_becomes_one_stated_failure(tmp_path: Path, raised: Exception) -> None:
    def build() -> None:
        with sensible_config(tmp_path):
            raise raised

    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json: {type(raised).__name__}") as failure:
        build()
    assert failure.value.__cause__ is raised


def test_a_stated_failure_and_an_interrupt_pass_through_as_they_are(tmp_path: Path) -> None:
    def build(raised: BaseException) -> Callable[[], None]:
        def inner() -> None:
            with sensible_config(tmp_path):
                raise raised

        return inner

    with pytest.raises(WrongModelError, match="what"):
        build(WrongModelError("what", fix="how"))()
    with pytest.raises(KeyboardInterrupt):
        build(KeyboardInterrupt())()
