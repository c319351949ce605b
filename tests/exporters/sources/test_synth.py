"""Synthetic checkpoints: diffusers takes them for real ones, and their bytes depend on the seed alone."""

import hashlib
import json
import logging
import re
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import T5EncoderModel, T5Tokenizer

from cvx_deploy.errors import OutputError, WrongModelError
from cvx_deploy.exporters.sources import synth, weights
from cvx_deploy.exporters.sources.synth_configs import (
    Scale,
    spiece_model,
    text_encoder_config,
    tokenizer_files,
    transformer_config,
    vae_config,
)
from cvx_deploy.families.cogvideox.models import MODELS, Traits
from cvx_deploy.progress import Advance, SilentProgress

NAMES = list(MODELS)
CLASSES = {
    "text_encoder": T5EncoderModel,
    "transformer": CogVideoXTransformer3DModel,
    "vae": AutoencoderKLCogVideoX,
}
PROMPT = "A panda, dressed in a small red jacket, plays the guitar in a bamboo forest."


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("synth")
    return {name: synth.synthesize(name, "tiny", root / name) for name in NAMES}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Networks this small lose time on threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@contextmanager
def library_warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def config_of(checkpoint: Path, component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / component / "config.json").read_text())
    return config


def pipeline_from(checkpoint: Path) -> Any:
    image_to_video = "i2v" in checkpoint.name
    pipeline = (CogVideoXImageToVideoPipeline if image_to_video else CogVideoXPipeline).from_pretrained(
        checkpoint, dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video_from(pipeline: Any, prompt: str = PROMPT, output_type: str = "np") -> Any:
    # Two steps; 9 frames are one VAE chunk and, in 1.5, one latent frame of padding.
    extra: dict[str, Any] = {}
    if isinstance(pipeline, CogVideoXImageToVideoPipeline):
        pixels = np.linspace(0, 255, 80 * 112 * 3).reshape(80, 112, 3).astype(np.uint8)
        extra["image"] = Image.fromarray(pixels)
    return pipeline(
        prompt=prompt,
        height=80,
        width=112,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        **extra,
    ).frames[0]


def is_varied(video: np.ndarray) -> bool:
    """(frames, height, width, 3) in [0, 1] varies in space and time, and few values are clipped."""
    assert np.isfinite(video).all()
    clipped = ((video <= 0) | (video >= 1)).mean()
    return bool(video.std(axis=(1, 2)).mean() > 0.02 and video.std(axis=0).mean() > 0.02 and clipped < 0.1)


def file_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def loading_problems(checkpoint: Path, component: str) -> list[str]:
    _, info = CLASSES[component].from_pretrained(
        checkpoint / component, output_loading_info=True, low_cpu_mem_usage=False
    )
    return [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_a_tiny_checkpoint_without_a_warning(checkpoints: dict[str, Path], name: str) -> None:
    with library_warnings() as messages:
        pipeline_from(checkpoints[name])
        assert [loading_problems(checkpoints[name], component) for component in CLASSES] == [[], [], []]
    assert messages == []


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_a_layer_without_weights_is_a_loading_problem(tmp_path: Path, component: str) -> None:
    checkpoint = synth.synthesize("2b", "tiny", tmp_path / "2b")
    config = config_of(checkpoint, component)
    config["num_layers"] += 1
    (checkpoint / component / "config.json").write_text(json.dumps(config))
    assert loading_problems(checkpoint, component) != []


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_video_varies_and_seldom_clips(checkpoints: dict[str, Path], name: str) -> None:
    video = video_from(pipeline_from(checkpoints[name]))
    assert video.shape == (9, 80, 112, 3)
    assert is_varied(video)


def test_a_video_without_the_last_weights_does_not_vary(checkpoints: dict[str, Path]) -> None:
    pipeline = pipeline_from(checkpoints["5b"])
    pipeline.vae.decoder.conv_out.conv.weight.zero_()
    assert not is_varied(video_from(pipeline))


def test_the_prompt_matters(checkpoints: dict[str, Path]) -> None:
    pipeline = pipeline_from(checkpoints["5b"])
    one, other = (video_from(pipeline, prompt, "latent") for prompt in (PROMPT, "a red circle moves to the right"))
    assert (one - other).std() > 0.02 * one.std()


def test_the_default_video_of_2b_has_a_first_and_a_steady_vae_chunk(checkpoints: dict[str, Path]) -> None:
    assert config_of(checkpoints["2b"], "transformer")["sample_frames"] == 17
    vae = AutoencoderKLCogVideoX.from_pretrained(checkpoints["2b"] / "vae", dtype=torch.float32)
    assert vae.decode(torch.zeros(1, 16, 5, 2, 2)).sample.shape == (1, 3, 17, 16, 16)


def test_vae_tiles_are_several_uneven_and_join_to_the_same_size(checkpoints: dict[str, Path]) -> None:
    config = config_of(checkpoints["2b"], "transformer")
    height, width = config["sample_height"], config["sample_width"]
    vae = AutoencoderKLCogVideoX.from_pretrained(checkpoints["2b"] / "vae", dtype=torch.float32)
    latents = torch.randn(1, 16, 1, height, width, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents).sample
    vae.enable_tiling()
    tiled = vae.decode(latents).sample
    assert tiled.shape == whole.shape == (1, 3, 1, 8 * height, 8 * width)
    assert not torch.allclose(tiled, whole)
    assert vae.encode(whole).latent_dist.mean.shape == latents.shape
    steps = int(vae.tile_latent_min_height * 5 / 6), int(vae.tile_latent_min_width * 4 / 5)
    assert all(size > 1.5 * step for size, step in zip((height, width), steps, strict=True))
    assert width % steps[1]


@pytest.mark.parametrize("name", NAMES)
def test_token_grids_are_odd_and_not_square(checkpoints: dict[str, Path], name: str) -> None:
    config = config_of(checkpoints[name], "transformer")
    tokens = config["sample_height"] // 2, config["sample_width"] // 2
    assert [count % 2 for count in tokens] == [1, 1]
    assert tokens[0] != tokens[1]
    latent_frames = (config["sample_frames"] - 1) // 4 + 1
    assert latent_frames % (config.get("patch_size_t") or 2) == 1


@pytest.mark.parametrize("scale", ["tiny", "wide", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_traits_and_constants_are_the_models_own(name: str, scale: Scale) -> None:
    model = MODELS[name]
    assert Traits.from_transformer_config(transformer_config(model, scale), model.traits.task) == model.traits
    vae = vae_config(model, scale)
    assert vae["scaling_factor"] == model.scaling_factor
    assert vae.get("invert_scale_latents", False) == model.invert_scale_latents
    assert text_encoder_config(model, scale)["d_model"] == transformer_config(model, scale)["text_embed_dim"]


@pytest.mark.parametrize("name", NAMES)
def test_written_scheduler_and_pipeline_are_the_models_own(checkpoints: dict[str, Path], name: str) -> None:
    model = MODELS[name]
    pipeline = pipeline_from(checkpoints[name])
    assert type(pipeline.scheduler).__name__.lower() == f"cogvideox{model.scheduler}scheduler"
    assert pipeline.scheduler.config.snr_shift_scale == model.snr_shift_scale
    assert isinstance(pipeline, CogVideoXImageToVideoPipeline) == (model.traits.task == "image-to-video")


@pytest.mark.parametrize(
    ("name", "transformer"),
    [
        # 5b-I2V's learned positions are a buffer, so they are no parameters: 54.6 M more are stored.
        ("2b", 1_693_783_872),
        ("5b", 5_570_283_072),
        ("5b-i2v", 5_570_479_680),
        ("1.5-5b", 5_570_676_352),
        ("1.5-5b-i2v", 5_571_594_880),
    ],
)
def test_full_networks_have_the_published_sizes(name: str, transformer: int) -> None:
    counts = {
        component: sum(p.numel() for p in network.parameters()) for component, network in networks(name, "full").items()
    }
    assert counts == {"transformer": transformer, "text_encoder": 4_762_310_656, "vae": 215_583_907}


def networks(name: str, scale: Scale) -> dict[str, torch.nn.Module]:
    model = MODELS[name]
    configs = {
        "transformer": transformer_config(model, scale),
        "text_encoder": text_encoder_config(model, scale),
        "vae": vae_config(model, scale),
    }
    return {component: synth.network_on_meta(component, config) for component, config in configs.items()}


def tensor_shapes(name: str, scale: Scale) -> dict[str, torch.Size]:
    return {
        f"{component}/{tensor}": value.shape
        for component, network in networks(name, scale).items()
        for tensor, value in network.state_dict().items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_wide_networks_are_the_full_ones_without_the_layers_after_the_second(name: str) -> None:
    later = re.compile(r"(transformer_blocks|encoder\.block)\.(?![01]\.)")
    full = tensor_shapes(name, "full")
    kept = {tensor: shape for tensor, shape in full.items() if not later.search(tensor)}
    assert tensor_shapes(name, "wide") == kept
    assert len(kept) < len(full)


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_checkpoint_is_a_few_megabytes(checkpoints: dict[str, Path], name: str) -> None:
    assert sum(len(content) for content in file_bytes(checkpoints[name]).values()) < 4_000_000


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    first = file_bytes(checkpoints["1.5-5b-i2v"])
    again = file_bytes(synth.synthesize("1.5-5b-i2v", "tiny", tmp_path / "again"))
    other = file_bytes(synth.synthesize("1.5-5b-i2v", "tiny", tmp_path / "other", seed=1))
    assert first == again
    changed = {path for path in first if first[path] != other[path]}
    assert changed == {path for path in first if path.endswith(".safetensors")} | {"SHA256SUMS"}


def test_sharding_does_not_change_values(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_shard(state: dict[str, torch.Tensor], *, filename_pattern: str, max_shard_size: int) -> Any:
        return split_torch_state_dict_into_shards(
            state, filename_pattern=filename_pattern, max_shard_size=100 * max_shard_size
        )

    monkeypatch.setattr(weights, "split_torch_state_dict_into_shards", one_shard)
    whole = synth.synthesize("2b", "tiny", tmp_path / "whole") / "transformer"
    assert not list(whole.glob("*.index.json"))
    tensors = load_file(whole / "diffusion_pytorch_model.safetensors")
    shards = sorted((checkpoints["2b"] / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    sharded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert sharded.keys() == tensors.keys()
    assert all(torch.equal(sharded[name], tensors[name]) for name in tensors)


def indexes(ours: Path, saved: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the index of `ours`, and the one save_pretrained writes to `saved` for it with the same sharding.

    The latter is in float32 and so twice the size, because not every part takes the type it is asked for.
    """
    (path,) = ours.glob("*.index.json")
    index: dict[str, Any] = json.loads(path.read_text())
    network = CLASSES[ours.name].from_pretrained(ours, dtype=torch.float32, low_cpu_mem_usage=False)
    network.float().save_pretrained(saved, max_shard_size=index["metadata"]["total_size"])
    return index, json.loads((saved / path.name).read_text())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_tensor_names_are_those_of_save_pretrained(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, component: str
) -> None:
    index, saved = indexes(checkpoints[name] / component, tmp_path)
    assert index["weight_map"].keys() == saved["weight_map"].keys()
    assert 2 * index["metadata"]["total_size"] == saved["metadata"]["total_size"]
    stored = {path.name: set(load_file(path)) for path in (checkpoints[name] / component).glob("*.safetensors")}
    assert len(stored) > 1
    assert {(key, file) for file, keys in stored.items() for key in keys} == set(index["weight_map"].items())


@pytest.mark.parametrize("name", NAMES)
def test_transformer_shards_are_those_of_save_pretrained(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    # The text encoder's are those of transformers 4, which wrote the originals: version 5 sorts tensors by name.
    index, saved = indexes(checkpoints[name] / "transformer", tmp_path)
    assert index["weight_map"] == saved["weight_map"]


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_weight_files_have_the_published_type_and_pytorch_metadata(checkpoints: dict[str, Path], name: str) -> None:
    expected = {"float16": "F16", "bfloat16": "BF16"}[MODELS[name].dtype]
    for path in checkpoints[name].rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {expected}  # noqa: SIM118
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_values_have_the_spread_their_place_asks_for(checkpoints: dict[str, Path]) -> None:
    def spread(component: str, name: str) -> tuple[float, float]:
        folder = checkpoints["5b-i2v"] / component
        tensors = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
        return tensors[name].float().mean().item(), tensors[name].float().std().item()

    linear = "transformer_blocks.0.ff.net.2.weight"
    norm = "transformer_blocks.0.norm1.norm.weight"
    assert spread("transformer", linear) == pytest.approx((0, (4 * 80) ** -0.5), rel=0.05, abs=0.002)
    assert spread("transformer", norm) == pytest.approx((1, 0.05), rel=0.02, abs=0.01)
    assert spread("transformer", "patch_embed.pos_embedding") == pytest.approx((0, 0.02), abs=0.001)
    assert spread("text_encoder", "shared.weight") == pytest.approx((0, 1), abs=0.05)
    multiplier = "decoder.mid_block.resnets.0.norm1.conv_y.conv"
    assert spread("vae", f"{multiplier}.bias") == pytest.approx((1, 0.02), abs=0.02)
    assert spread("vae", f"{multiplier}.weight")[1] < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_sha256sums_lists_every_weight_file(checkpoints: dict[str, Path], name: str) -> None:
    root = checkpoints[name]
    lines = (root / "SHA256SUMS").read_text().splitlines()
    listed = {path: digest for digest, path in (line.split("  ") for line in lines)}
    weights = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}
    assert listed == {path: hashlib.sha256(content).hexdigest() for path, content in weights.items()}
    altered = {
        path: hashlib.sha256(content[:-1] + bytes([content[-1] ^ 1])).hexdigest() for path, content in weights.items()
    }
    assert not set(listed.values()) & set(altered.values())


def test_the_tokenizer_is_a_t5_tokenizer_that_knows_plain_english(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["2b"] / "tokenizer"
    tokenizer = T5Tokenizer.from_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids = tokenizer(PROMPT).input_ids
    assert ids == [*pieces.encode(PROMPT), 1]
    assert 2 not in ids
    assert tokenizer.model_max_length == 226
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    vocabulary = config_of(checkpoints["2b"], "text_encoder")["vocab_size"]
    first, last = tokenizer.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"])
    assert first == pieces.get_piece_size()
    assert last == first + 99 == len(tokenizer) - 1 < vocabulary
    assert len(ids) < len(PROMPT)


@pytest.mark.parametrize("scale", ["wide", "full"])
def test_the_full_tokenizer_has_t5s_identifiers(tmp_path: Path, scale: Scale) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece_model(scale))
    for file, content in tokenizer_files(scale).items():
        (tmp_path / file).write_text(json.dumps(content))
    tokenizer = T5Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [32000, 32099]
    assert text_encoder_config(MODELS["2b"], scale)["vocab_size"] == 32128
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece_model("tiny"))
    assert tokenizer(PROMPT).input_ids == [*pieces.encode(PROMPT), 1]


class Watched(SilentProgress):
    """Keeps what it is told, and interrupts the work half-way when asked to."""

    def __init__(self, interruption: type[BaseException] | None = None) -> None:
        self.interruption = interruption
        self.total = 0
        self.done: list[int] = []

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        self.total = total or 0
        yield self.advance

    def advance(self, amount: int) -> None:
        self.done.append(amount)
        if self.interruption is not None and sum(self.done) > self.total / 2:
            raise self.interruption


def test_progress_rises_to_the_bytes_of_all_weights(tmp_path: Path) -> None:
    watched = Watched()
    root = synth.synthesize("5b", "tiny", tmp_path / "5b", progress=watched)
    weights = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    assert watched.total == sum(watched.done) == weights
    assert len(watched.done) > 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    watched = Watched(interruption)
    with pytest.raises(interruption):
        synth.synthesize("2b", "tiny", tmp_path / "2b", progress=watched)
    assert watched.done
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "2b").mkdir()
    (tmp_path / "2b" / "mine").write_text("kept")
    with pytest.raises(OutputError, match=r"already exists.*fix: "):
        synth.synthesize("2b", "tiny", tmp_path / "2b")
    assert file_bytes(tmp_path) == {"2b/mine": b"kept"}


@pytest.mark.parametrize(("scale", "needed"), [("wide", r"1,71\d,\d+,\d+"), ("full", r"13,3\d\d,\d+,\d+")])
def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: Scale, needed: str
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(OutputError, match=rf"{needed} bytes are to be written .* 1,000,000,000 are free"):
        synth.synthesize("2b", scale, tmp_path / "2b")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file, not a folder"):
        synth.synthesize("2b", "tiny", tmp_path / "file" / "2b")


def test_an_unknown_model_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(WrongModelError, match=r"'3b'.*2b, 5b, 5b-i2v, 1\.5-5b, 1\.5-5b-i2v"):
        synth.synthesize("3b", "tiny", tmp_path / "3b")
