"""Whatever is wrong with what a user gives: one clear line, exit code 1, nothing left behind, nothing good lost."""

import hashlib
import json
import os
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from cvx_deploy.bundle.opened import MANIFEST
from cvx_deploy.exporters.networks import contracts_for
from cvx_deploy.files import staged_directory
from tests.command import TELLING, Outcome, content, cvx, signalled, spawn, wait_for
from tests.conftest import Exported, Tiny
from tests.untraced import without_tracing

Json = Any
Damage = Callable[[Path], object]

VAE = "vae/diffusion_pytorch_model.safetensors"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
TEXT_SHARD = "text_encoder/model-00001-of-00003.safetensors"
LATENTS = (3, 16, 10, 14)  # of the tiny 5b at its own shape


def edit(path: Path, change: Callable[[Json], object]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def flip(path: Path) -> None:
    """Alter the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Truncate a file."""
    os.truncate(path, path.stat().st_size // 2)


def in_turn(*steps: Damage) -> Damage:
    """Do several kinds of damage, one after the other."""

    def damage(path: Path) -> None:
        for step in steps:
            step(path)

    return damage


# --- export ---


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))


@pytest.fixture
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    without_tracing(monkeypatch)


def refused_export(root: Path, *words: object, model: str = "5b", checkpoint: Path | None = None) -> str:
    """Export to a new place and over an earlier bundle, see that both are as they were, and return the error."""
    place = ["--checkpoint", checkpoint or root / "checkpoint", "--model", model]
    earlier = root / "engines" / "earlier"
    earlier.mkdir(parents=True, exist_ok=True)
    (earlier / MANIFEST).write_text("an earlier bundle")
    before = content(root)
    lines = [
        cvx("export", *place, *words, "--output", output).failure()
        for output in (root / "new" / "folders" / "bundle", earlier)
    ]
    assert lines[0] == lines[1]
    assert content(root) == before
    return lines[0]


def drop_tensor(root: Path) -> None:
    tensors = load_file(root / TEXT_SHARD)
    tensors.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    save_file(tensors, root / TEXT_SHARD)


DAMAGED_CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "there is no checkpoint folder {root}. fix: name one with --checkpoint"),
    "an empty folder": (in_turn(shutil.rmtree, Path.mkdir), "{root}/model_index.json is missing"),
    "a file": (in_turn(shutil.rmtree, Path.touch), "there is no checkpoint folder {root}"),
    "no config": (lambda root: (root / "vae/config.json").unlink(), "{root}/vae/config.json is missing"),
    "a cut config": (lambda root: cut(root / "vae/config.json"), "{root}/vae/config.json is not readable JSON"),
    "a config without sizes": (
        lambda root: edit(root / "transformer/config.json", lambda config: config.update(patch_size=0)),
        "{root}/transformer/config.json is damaged: Expected `int` >= 1 - at `$.patch_size`",
    ),
    "no shard": (lambda root: (root / SHARD).unlink(), "the weight file {root}/" + SHARD + " is missing"),
    "a cut shard": (lambda root: cut(root / SHARD), "{root}/" + SHARD + " has 213,648 bytes, its header speaks of"),
    "an empty shard": (lambda root: os.truncate(root / SHARD, 0), "{root}/" + SHARD + " is truncated or damaged"),
    "an altered header": (
        lambda root: (root / VAE).write_bytes(b"\xff" + (root / VAE).read_bytes()[1:]),
        "{root}/" + VAE + " is truncated or damaged: its header makes no sense",
    ),
    "altered weights": (
        lambda root: flip(root / SHARD),
        "{root}/" + SHARD + " was altered: its SHA-256 is not the one",
    ),
    "pickled weights only": (
        lambda root: (root / VAE).rename(root / "vae/diffusion_pytorch_model.bin"),
        "{root}/vae has only pickled weights (diffusion_pytorch_model.bin), which are never loaded",
    ),
    "no tokenizer": (
        lambda root: shutil.rmtree(root / "tokenizer"),
        "{root}/tokenizer/tokenizer_config.json is missing",
    ),
    "a cut tokenizer": (lambda root: cut(root / "tokenizer/spiece.model"), "{root}/tokenizer is damaged"),
    "a text encoder with too few rows": (
        lambda root: edit(root / "text_encoder/config.json", lambda config: config.update(vocab_size=549)),
        "{root}/tokenizer has 550 tokens, and vocab_size of the text encoder is 549, which must be no less",
    ),
    "components that do not fit": (
        lambda root: edit(root / "text_encoder/config.json", lambda config: config.update(d_model=7)),
        "{root}: text_embed_dim of the transformer is ",
    ),
    "another pipeline": (
        lambda root: edit(root / "model_index.json", lambda index: index.update(_class_name="FluxPipeline")),
        "{root} holds FluxPipeline, not a CogVideoX pipeline. fix: use a checkpoint of one of 2b, 5b, ",
    ),
    "another model's part": (
        lambda root: edit(root / "model_index.json", lambda index: index.update(vae=["diffusers", "AutoencoderKL"])),
        "{root}/model_index.json says that the vae is a AutoencoderKL, not a AutoencoderKLCogVideoX",
    ),
    "a scheduler of another kind": (
        lambda root: edit(root / "scheduler/scheduler_config.json", lambda config: config.update(beta_schedule="?")),
        "scheduler config: beta_schedule is '?'",
    ),
}


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_a_damaged_or_foreign_checkpoint_is_one_clear_line(checkpoint: Path, damage: str) -> None:
    spoil, what = DAMAGED_CHECKPOINTS[damage]
    spoil(checkpoint)
    line = refused_export(checkpoint.parent)
    assert line.startswith("error: " + what.format(root=checkpoint))


@pytest.mark.export
def test_a_missing_tensor_is_one_clear_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cvx_deploy.exporters.export.contracts_for", lambda *words, **more: contracts_for(*words, **more)[:1]
    )
    drop_tensor(checkpoint)
    before = content(checkpoint.parent)
    words = ["--model", "5b", "--checkpoint", checkpoint, "--output", checkpoint.parent / "bundle"]
    line = cvx("export", *words).failure()
    assert "text_encoder has no tensor encoder.block.0.layer.0.SelfAttention.q.weight. fix: " in line
    assert content(checkpoint.parent) == before


@pytest.mark.usefixtures("_untraced")
def test_another_models_checkpoint_is_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    line = refused_export(tmp_path, checkpoint=tiny("2b"))
    assert line == f"error: {tiny('2b')} is a 2b checkpoint, asked for 5b. fix: use --model 2b."


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize(
    ("model", "words", "what"),
    [
        ("5b", ["--height", "90"], "height 90 is not a multiple of 16. fix: use --height 80 or 96."),
        ("5b", ["--width", "0"], "width 0 is not a multiple of 16. fix: use --width 16."),
        ("5b", ["--frames", "10"], "10 frames: the VAE decodes 8k or 8k + 1 frames. fix: use --frames 9 or 16."),
        ("5b", ["--frames", "0"], "0 frames: the VAE decodes 8k or 8k + 1 frames. fix: use --frames 1."),
        ("5b", ["--frames", "-3"], "-3 frames: the VAE decodes 8k or 8k + 1 frames. fix: use --frames 1."),
        (
            *("5b-i2v", ["--height", "96"]),
            "height 96: the learned positions of this model exist for 80x112 only. fix: use --height 80.",
        ),
        (
            *("1.5-5b", ["--width", "128"]),
            "width 128: the rotary table of this model ends at 112. fix: use --width 112.",
        ),
    ],
)
def test_a_shape_the_model_cannot_do_is_one_clear_line(
    tiny: Tiny, tmp_path: Path, model: str, words: list[str], what: str
) -> None:
    assert refused_export(tmp_path, *words, model=model, checkpoint=tiny(model)) == f"error: {what}"


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("file", "file is a file, not a folder"),
        ("file/bundle", "file is a file, not a folder"),
        ("photos", "photos already exists and is not empty"),
        ("x" * 300, "File name too long"),
        ("/proc/bundle", "cannot write /proc/bundle"),
    ],
)
def test_an_output_folder_that_cannot_be_written_is_one_clear_line(
    tiny: Tiny, tmp_path: Path, output: str, what: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("mine too")
    before = content(tmp_path)
    words = ["export", "--model", "5b", "--checkpoint", tiny("5b"), "--output", tmp_path / output]
    assert what in cvx(*words).failure()
    assert content(tmp_path) == before


@pytest.mark.usefixtures("_untraced")
def test_a_disk_that_runs_full_during_an_export_is_one_clear_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("cvx_deploy.exporters.export.place_file", full)
    words = ["--model", "5b", "--checkpoint", tiny("5b"), "--copy-weights", "--output", tmp_path / "bundle"]
    assert "bundle: No space left on device (somewhere). fix: make room" in cvx("export", *words).failure()
    assert content(tmp_path) == {}


@pytest.mark.usefixtures("_untraced")
def test_a_folder_name_that_is_no_text_is_one_clear_line(checkpoint: Path) -> None:
    odd = checkpoint.rename(checkpoint.parent / os.fsdecode(b"odd\xff"))
    before = content(checkpoint.parent)
    words = ["--model", "5b", "--checkpoint", odd, "--output", checkpoint.parent / "bundle"]
    assert "is not UTF-8. fix: use a name" in cvx("export", *words).failure()
    assert content(checkpoint.parent) == before


@pytest.mark.usefixtures("_untraced")
def test_two_exports_into_one_folder_at_once_are_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    words = ["export", "--model", "5b", "--checkpoint", tiny("5b"), "--output", target]
    with staged_directory(target, replace=True) as staging:
        before = content(tmp_path)
        line = cvx(*words).failure()
        assert content(tmp_path) == before
        (staging / MANIFEST).write_text("the first one's")
    assert line == (
        f"error: another process is writing {target}. fix: wait until it ends, or choose another output folder."
    )
    assert content(tmp_path) == {"bundle": "folder", "bundle/bundle.json": b"the first one's"}
    assert cvx(*words).code == 0  # now that the first is done


@pytest.mark.parametrize("output", ["place", "place/inside"])
def test_synth_into_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path, output: str) -> None:
    (tmp_path / "place").touch()
    before = content(tmp_path)
    line = cvx("synth", "--like", "5b", "--output", tmp_path / output).failure()
    assert line.startswith(f"error: {tmp_path}/place is a file, not a folder. fix: ")
    assert content(tmp_path) == before


# --- run ---


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """A copy of a bundle that a test may damage, and of its checkpoint beside it."""
    original = exported("5b")
    folder = Path(shutil.copytree(original.path, tmp_path / "bundle"))
    shutil.copytree(original.manifest.checkpoint, tmp_path / "checkpoint")
    edit(folder / MANIFEST, lambda raw: raw.update(checkpoint=str(tmp_path / "checkpoint")))
    return folder


@pytest.fixture(scope="module")
def whole(exported: Exported) -> Path:
    """A bundle that no test changes."""
    return exported("5b").path


@pytest.fixture
def from_image(bundle: Path) -> Path:
    """A bundle that says it starts from an image; its networks are never reached."""
    edit(bundle / MANIFEST, lambda raw: raw["traits"].update(task="image-to-video"))
    return bundle


def refused_run(bundle: Path, root: Path, *words: object, output: str | None = None) -> str:
    """Run over an earlier video and into a new folder, see that all is as it was, and return the error."""
    (root / "earlier.npy").write_text("an earlier video")
    before = content(root)
    few = () if "--from-latents" in words else ("--steps", "1")
    lines = [
        cvx("run", "--bundle", bundle, "--output", place, *few, "--threads", "1", *words).failure()
        for place in ([output] if output else [root / "earlier.npy", root / "new" / "video.mp4"])
    ]
    assert len(set(lines)) == 1
    assert content(root) == before
    return lines[0]


PROMPT = ("--prompt", "a red circle")


def foreign(file: str) -> Damage:
    """Put a file in that another bundle might have."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[::-1])


def rehashed(file: str, data: bytes) -> Damage:
    """Put a file in that the manifest vouches for."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(data)
        entry = {"path": file, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        network = file.removesuffix(".onnx")
        edit(
            folder / MANIFEST,
            lambda raw: (raw if file == "tokenizer.json" else raw["networks"][network]).update(
                {"tokenizer" if file == "tokenizer.json" else "file": entry}
            ),
        )

    return damage


def elsewhere(location: str) -> bytes:
    """Return a text encoder whose weights lie where its file says."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    result = onnx.helper.make_tensor_value_info("prompt_embeds", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["w"], ["prompt_embeds"])], "g", [], [result], [tensor]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


def linked(file: str) -> Damage:
    """Move a file of the bundle out and leave a link to it."""

    def damage(folder: Path) -> None:
        (folder / file).rename(folder.parent / "outside")
        (folder / file).symlink_to(folder.parent / "outside")

    return damage


def manifest(change: Callable[[Json], object]) -> Damage:
    return lambda folder: edit(folder / MANIFEST, change)


def weights_inside(path: str) -> Damage:
    return manifest(lambda raw: [entry.update(path=path, in_bundle=True) for entry in raw["weights"].values()])


DAMAGED_BUNDLES: dict[str, tuple[Damage, str]] = {
    "no bundle": (shutil.rmtree, "there is no bundle at {bundle}"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "{bundle} is not a bundle: it has no bundle.json"),
    "a cut manifest": (lambda folder: cut(folder / MANIFEST), "{bundle}/bundle.json is damaged"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "{bundle}/bundle.json has schema version None"),
    "another version": (
        manifest(lambda raw: raw.update(schema_version=9)),
        "{bundle}/bundle.json has schema version 9",
    ),
    "a wrong type": (manifest(lambda raw: raw.update(fps="8")), "{bundle}/bundle.json is damaged: Expected `int`"),
    "a missing key": (manifest(lambda raw: raw["scheduler"].pop("kind")), "{bundle}/bundle.json is damaged: Object"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "{bundle}/tokenizer.json is missing"),
    "no network": (lambda folder: (folder / "transformer.onnx").unlink(), "{bundle}/transformer.onnx is missing"),
    "a network not listed": (
        manifest(lambda raw: raw["networks"].pop("transformer")),
        "{bundle}/bundle.json is damaged: its transformer at 9x80x112 is transformer, which is not among its networks",
    ),
    "a cut network": (lambda folder: cut(folder / "transformer.onnx"), "{bundle}/transformer.onnx has "),
    "a foreign network": (foreign("transformer.onnx"), "{bundle}/transformer.onnx was altered, or belongs to another"),
    "a foreign tokenizer": (foreign("tokenizer.json"), "{bundle}/tokenizer.json was altered, or belongs to another"),
    "a network that is none": (rehashed("text_encoder.onnx", b"?"), "{bundle}/text_encoder.onnx is damaged"),
    "a tokenizer that is none": (rehashed("tokenizer.json", b"?"), "{bundle}/tokenizer.json is damaged"),
    "a network with weights above": (
        rehashed("text_encoder.onnx", elsewhere("../earlier.npy")),
        "ONNX Runtime cannot load text_encoder",
    ),
    "a network with weights anywhere": (
        rehashed("text_encoder.onnx", elsewhere("/etc/hostname")),
        "ONNX Runtime cannot load text_encoder",
    ),
    "a network above": (
        manifest(lambda raw: raw["networks"]["transformer"]["file"].update(path="../x")),
        "the manifest of {bundle} names '../x', which lies outside",
    ),
    "an absolute tokenizer": (
        manifest(lambda raw: raw["tokenizer"].update(path="/etc/hostname")),
        "the manifest of {bundle} names '/etc/hostname', which lies outside",
    ),
    "a linked network": (
        linked("vae_encoder.onnx"),
        "the manifest of {bundle} names 'vae_encoder.onnx', which lies out",
    ),
    "a linked tokenizer": (
        linked("tokenizer.json"),
        "the manifest of {bundle} names 'tokenizer.json', which lies outs",
    ),
    "weights above": (weights_inside("../x"), "the weight table of {bundle} names '../x', which lies outside"),
    "linked weights": (
        in_turn(
            lambda folder: (folder / "w").symlink_to(folder.parent / "checkpoint" / VAE),
            weights_inside("w"),
        ),
        "the weight table of {bundle} names 'w', which lies outside",
    ),
    "weights above the checkpoint": (
        manifest(lambda raw: [entry.update(path="vae/../../x") for entry in raw["weights"].values()]),
        "the weight table of {bundle} names 'vae/../../x', which lies outside",
    ),
    "no checkpoint": (lambda folder: shutil.rmtree(folder.parent / "checkpoint"), "{root}/checkpoint/text_encoder/"),
    "no weights": (lambda folder: (folder.parent / "checkpoint" / TEXT_SHARD).unlink(), "{root}/checkpoint/text_enc"),
    "cut weights": (lambda folder: cut(folder.parent / "checkpoint" / TEXT_SHARD), "{root}/checkpoint/" + TEXT_SHARD),
    "altered weights": (
        lambda folder: flip(folder.parent / "checkpoint" / TEXT_SHARD),
        "{root}/checkpoint/" + TEXT_SHARD + " was altered since the bundle {bundle} was made",
    ),
    "another interface": (
        manifest(lambda raw: raw["networks"]["text_encoder"]["outputs"][0].update(name="other")),
        "ONNX Runtime failed in text_encoder",
    ),
    "bfloat16": (
        manifest(lambda raw: raw["networks"]["transformer"].update(precision="bf16")),
        "{bundle} computes in bf16, which ONNX Runtime has",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_BUNDLES)
def test_a_damaged_or_foreign_bundle_is_one_clear_line(bundle: Path, tmp_path: Path, damage: str) -> None:
    spoil, what = DAMAGED_BUNDLES[damage]
    spoil(bundle)
    line = refused_run(bundle, tmp_path, *PROMPT)
    assert line.startswith("error: " + what.format(bundle=bundle, root=tmp_path))


def test_a_checkpoint_that_is_not_the_bundles_is_one_clear_line(whole: Path, tiny: Tiny, tmp_path: Path) -> None:
    line = refused_run(whole, tmp_path, *PROMPT, "--checkpoint", tiny("2b"))
    assert line.startswith(f"error: {tiny('2b')}/text_encoder/")
    assert "run the command again with --checkpoint DIR" in line


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--steps", "0"], "0 steps: the model has 1000. fix: use --steps between 1 and 1000."),
        (["--steps", "-4"], "-4 steps: the model has 1000. fix: use --steps between 1 and 1000."),
        (["--steps", "1001"], "1001 steps: the model has 1000. fix: use --steps between 1 and 1000."),
        (["--guidance-scale", "nan"], "guidance scale nan. fix: use --guidance-scale 6, or 1 for no guidance."),
        (["--guidance-scale", "inf"], "guidance scale inf. fix: use --guidance-scale 6, or 1 for no guidance."),
        (["--guidance-scale", "-1"], "guidance scale -1.0. fix: use --guidance-scale 6, or 1 for no guidance."),
        (
            ["--video", "clip.mp4", "--strength", "0"],
            "strength 0.0 is not above 0 and at most 1. fix: use --strength 0.8.",
        ),
        (
            ["--video", "clip.mp4", "--strength", "nan"],
            "strength nan is not above 0 and at most 1. fix: use --strength 0.8.",
        ),
        (
            ["--video", "clip.mp4", "--strength", "-0.5"],
            "strength -0.5 is not above 0 and at most 1. fix: use --strength 0.8.",
        ),
        (
            ["--video", "clip.mp4", "--strength", "1.01"],
            "strength 1.01 is not above 0 and at most 1. fix: use --strength 0.8.",
        ),
        (["--num-videos", "0"], "0 videos a prompt. fix: use --num-videos 1 or more."),
        (["--num-videos", "-2"], "-2 videos a prompt. fix: use --num-videos 1 or more."),
        (["--seed", str(2**64)], f"seed {2**64} is not an integer of 64 bits. fix: use one from 0 to 4294967295."),
        (["--seed", str(-(2**63) - 1)], "is not an integer of 64 bits. fix: use one from 0 to 4294967295."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_number_that_makes_no_sense_is_one_clear_line(
    whole: Path, tmp_path: Path, words: list[str], what: str
) -> None:
    line = refused_run(whole, tmp_path, *PROMPT, *words)
    assert line.startswith("error: ")
    assert line.endswith(what)


def test_a_strength_that_leaves_no_step_is_one_clear_line(whole: Path, tmp_path: Path) -> None:
    line = refused_run(whole, tmp_path, *PROMPT, "--video", tmp_path, "--steps", "4", "--strength", "0.2")
    assert line == "error: strength 0.2 of 4 steps leaves no step to take. fix: raise --steps or --strength."


def test_no_prompt_is_one_clear_line(whole: Path, tmp_path: Path) -> None:
    line = refused_run(whole, tmp_path)
    assert line == "error: there is no prompt. fix: give at least one with --prompt TEXT."


def test_a_prompt_that_is_no_text_is_one_clear_line(whole: Path, tmp_path: Path) -> None:
    assert "the prompt is not Unicode text" in refused_run(whole, tmp_path, "--prompt", os.fsdecode(b"caf\xe9"))


def test_an_image_for_a_text_model_is_one_clear_line(whole: Path, tmp_path: Path) -> None:
    Image.new("RGB", (112, 80)).save(tmp_path / "image.png")
    line = refused_run(whole, tmp_path, *PROMPT, "--image", tmp_path / "image.png")
    assert line.startswith("error: 5b is a text-to-video model and takes no image. fix: use an image-to-video model")


def test_no_image_for_an_image_model_is_one_clear_line(from_image: Path, tmp_path: Path) -> None:
    line = refused_run(from_image, tmp_path, *PROMPT)
    assert line == "error: 5b makes videos from an image, and none is given. fix: add --image FILE."


def test_a_video_for_an_image_model_is_one_clear_line(from_image: Path, tmp_path: Path) -> None:
    line = refused_run(from_image, tmp_path, *PROMPT, "--video", tmp_path)
    assert line.startswith("error: 5b makes videos from an image, and none is given")


def test_an_image_and_a_video_are_one_clear_line(whole: Path, tmp_path: Path) -> None:
    line = refused_run(whole, tmp_path, *PROMPT, "--video", "a", "--image", "b")
    assert line.startswith("error: --video beside --image means nothing: ")
    assert line.endswith(" fix: leave out --video.")


def bomb() -> bytes:
    """Return a PNG of a few bytes that says it has 900 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def png() -> bytes:
    import io

    file = io.BytesIO()
    Image.effect_noise((112, 80), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


BAD_MEDIA: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "text": (b"not a picture", "is damaged or not a"),
    "truncated": (png()[:3000], "is damaged"),
    "a bomb": (bomb(), "has frames of more than"),
}


@pytest.mark.parametrize("kind", BAD_MEDIA)
def test_an_image_that_cannot_be_read_is_one_clear_line(from_image: Path, tmp_path: Path, kind: str) -> None:
    data, what = BAD_MEDIA[kind]
    if data is not None:
        (tmp_path / "image.png").write_bytes(data)
    line = refused_run(from_image, tmp_path, *PROMPT, "--image", tmp_path / "image.png")
    assert line.startswith(f"error: {tmp_path}/image.png")
    assert what in line


@pytest.mark.parametrize("kind", BAD_MEDIA)
def test_a_video_that_cannot_be_read_is_one_clear_line(whole: Path, tmp_path: Path, kind: str) -> None:
    data, what = BAD_MEDIA[kind]
    if data is not None:
        (tmp_path / "clip.mp4").write_bytes(data)
    line = refused_run(whole, tmp_path, *PROMPT, "--video", tmp_path / "clip.mp4", "--strength", "1")
    assert line.startswith(f"error: {tmp_path}/clip.mp4")
    assert what in line


def test_a_video_that_is_too_short_is_one_clear_line(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(png())
    line = refused_run(whole, tmp_path, *PROMPT, "--video", tmp_path / "frames", "--strength", "1")
    assert "frames has 1 frame that can be read, and 9 are needed" in line


def test_a_url_is_one_clear_line(whole: Path, tmp_path: Path) -> None:
    line = refused_run(whole, tmp_path, *PROMPT, "--strength", "1", "--video", "https://example.com/clip.mp4")
    assert line.endswith("URLs are not fetched. fix: download it and give the local file.")


def save_zip(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, latents=np.zeros((1, *LATENTS), np.float32))


BAD_LATENTS: dict[str, tuple[Damage, str]] = {
    "missing": (lambda path: None, "cannot be read: No such file"),
    "a folder": (Path.mkdir, "is a folder, not a file"),
    "empty": (Path.touch, "holds no latents: "),
    "text": (lambda path: path.write_text("latents"), "holds no latents: "),
    "a pickle": (lambda path: np.save(path, np.array([{}], object)), "holds no latents: "),
    "an archive": (save_zip, "holds no latents: the magic string is not correct"),
    "a number": (lambda path: np.save(path, np.float32(1)), "holds no latents: it is of shape ()"),
    "truncated": (in_turn(lambda path: np.save(path, np.zeros((1, *LATENTS), np.float32)), cut), "holds no latents: "),
    "another shape": (
        lambda path: np.save(path, np.zeros((1, 3, 16, 8, 14), np.float32)),
        "latents of 9x64x112, and ",
    ),
    "other channels": (lambda path: np.save(path, np.zeros((1, 3, 8, 10, 14), np.float32)), "not float32 (videos, 3, "),
    "another type": (lambda path: np.save(path, np.zeros((1, *LATENTS))), "holds float64 of shape (1, 3, 16, 10, 14)"),
    "no videos": (
        lambda path: np.save(path, np.zeros((0, *LATENTS), np.float32)),
        "holds no latents: it is of shape (0, 3, ",
    ),
    "not numbers": (lambda path: np.save(path, np.full((1, *LATENTS), np.nan, np.float32)), "not finite numbers"),
}


@pytest.mark.parametrize("kind", BAD_LATENTS)
def test_latents_that_cannot_be_decoded_are_one_clear_line(whole: Path, tmp_path: Path, kind: str) -> None:
    spoil, what = BAD_LATENTS[kind]
    spoil(tmp_path / "latents.npy")
    line = refused_run(whole, tmp_path, "--from-latents", tmp_path / "latents.npy")
    assert line.startswith(f"error: {tmp_path}/latents.npy")
    assert what in line


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("video.mkv", "nothing here writes .mkv"),
        ("file/video.mp4", "is not a folder"),
        ("file/", "is a file"),
        ("photos/", "holds one.jpg, which is not a frame"),
        ("folder.mp4", "holds one.jpg, which is not a frame"),
        ("x" * 300 + ".mp4", "File name too long"),
        ("/proc/video.mp4", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_clear_line(
    whole: Path, tmp_path: Path, output: str, what: str
) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in ("photos", "folder.mp4"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.jpg").write_text("mine too")
    line = refused_run(whole, tmp_path, *PROMPT, output=f"{tmp_path}/{output}" if output[0] != "/" else output)
    assert what in line


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--save-latents", "{root}/latents.bin"], "latents.bin is not a .npy file. fix: use --save-latents FILE.npy"),
        (["--save-latents", "{root}/none/latents.npy"], "latents.npy cannot be written. fix: name a file in a folder"),
        (
            ["--save-latents", "{root}/same.npy", "--output", "{root}/same.npy"],
            "to hold both the video and its latents",
        ),
    ],
)
def test_latents_that_cannot_be_kept_are_one_clear_line(
    whole: Path, tmp_path: Path, words: list[str], what: str
) -> None:
    assert what in refused_run(whole, tmp_path, *PROMPT, *(word.format(root=tmp_path) for word in words))


def test_a_prompt_that_is_too_long_is_a_warning_that_names_what_was_cut(whole: Path, tmp_path: Path) -> None:
    words = ["--prompt", "circle " * 224 + "and a blue star", "--steps", "1", "--seed", "-5", "--threads", "1"]
    outcome = cvx("run", "--bundle", whole, *words, "--output", tmp_path / "video.npy", "--json")
    assert outcome.code == 0
    warnings = [line for line in outcome.err.splitlines() if line.startswith("note: the prompt")]
    assert len(warnings) == 1
    assert warnings[0].startswith("note: the prompt is longer than 226 tokens; this part was cut: ")
    assert warnings[0].endswith("blue star")
    assert json.loads(outcome.out)["seeds"] == [-5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video.npy"]


# --- signals ---


def interrupted(announcement: str, number: signal.Signals, *words: object, after: float = 0.0) -> Outcome:
    """Run a command in another process and send a signal once it has announced a task, `after` seconds into it."""
    with spawn(TELLING + "main()", *words, "--quiet") as process:
        wait_for(process, f"now: {announcement}")
        time.sleep(after)
        return signalled(process, number)


@pytest.mark.export
def test_ctrl_c_during_tracing_leaves_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "cache"))  # nothing is kept there that it could read instead
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / MANIFEST).write_text("an earlier bundle")
    before = content(tmp_path)
    words = ["export", "--model", "5b", "--checkpoint", tiny("5b"), "--output", tmp_path / "earlier"]
    outcome = interrupted("trace text_encoder", signal.SIGINT, *words, after=0.5)
    assert (outcome.code, outcome.out, outcome.err.split()) == (130, "", ["interrupted"])
    assert content(tmp_path) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_during_denoising_leaves_nothing(
    whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "earlier.npy").write_text("an earlier video")
    before = content(tmp_path)
    words = ["run", "--bundle", whole, *PROMPT, "--steps", "1000", "--threads", "1"]
    outcome = interrupted("denoise", number, *words, "--output", tmp_path / "earlier.npy", after=0.3)
    assert (outcome.code, outcome.out) == (code, "")
    assert "Traceback" not in outcome.err
    assert content(tmp_path) == before


def test_ctrl_c_during_decoding_leaves_no_part_of_a_video(whole: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((500, *LATENTS), np.float32))
    (tmp_path / "earlier.npy").write_text("an earlier video")
    before = content(tmp_path)
    words = ["run", "--bundle", whole, "--from-latents", tmp_path / "latents.npy", "--threads", "1"]
    outcome = interrupted("decode", signal.SIGINT, *words, "--output", tmp_path / "earlier.npy", after=1.0)
    assert (outcome.code, outcome.out, outcome.err.split()) == (130, "", ["interrupted"])
    assert content(tmp_path) == before


# An export that is killed must be a real one, but it need not trace: it announces its first network and waits.
WAITING_EXPORT = """
import sys, time
from cvx_deploy.exporters import export

def wait(contract, checkpoint, path, *options):
    path.write_bytes(b"half a network")
    print("now: half way", file=sys.stderr, flush=True)
    time.sleep(60)

export._write_network = wait
from cvx_deploy.cli import main
main()
"""


def test_after_a_kill_a_run_uses_the_old_bundle_and_an_export_sweeps_up(
    tiny: Tiny, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    words = ["export", "--model", "5b", "--checkpoint", tiny("5b"), "--output"]
    with spawn(WAITING_EXPORT, *words, bundle) as process:
        wait_for(process, "half way")
        assert f"another process is writing {bundle}" in cvx(*words, bundle).failure()
        process.kill()
    left = {path.name for path in set(tmp_path.iterdir()) - before}
    assert left == {f".bundle.tmp-{process.pid}", ".bundle.lock"}

    latents = tmp_path / "latents.npy"
    np.save(latents, np.zeros((1, *LATENTS), np.float32))
    run = ["run", "--from-latents", latents, "--output", tmp_path / "video.npy", "--bundle"]
    assert cvx(*run, bundle).code == 0

    # Where there was no old bundle, what the killed process left does not pass for one.
    none = tmp_path / "none"
    (tmp_path / f".bundle.tmp-{process.pid}").rename(tmp_path / f".none.tmp-{process.pid}")
    (tmp_path / ".bundle.lock").rename(tmp_path / ".none.lock")
    assert cvx(*run, none).failure().startswith(f"error: there is no bundle at {none}. fix: run: cvx-deploy export")

    without_tracing(monkeypatch)
    assert cvx(*words, none).code == 0
    assert cvx(*words, bundle).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "none", "checkpoint", "latents.npy", "video.npy"}
    assert cvx("inspect", "--bundle", none).code == 0
