"""Every exported network against diffusers' and transformers' own modules, on the same weights and inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from numpy.typing import NDArray
from transformers import T5EncoderModel

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.errors import EngineError
from cvx_deploy.exporters.cogvideox.transformer import Grid
from cvx_deploy.measure.thresholds import THRESHOLDS
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.shape import Shape
from tests.conftest import Exported, Tiny
from tests.parity.corrupt import corrupted
from tests.tolerances import NETWORK_RELATIVE

Arrays = dict[str, NDArray[Any]]


def relative_error(found: NDArray[Any], expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    reference = expected.detach().float().numpy()
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def run(bundle: Bundle, network: str, inputs: Arrays, threads: int | None = None, **sizes: int) -> Arrays:
    """Run one network of a bundle on ONNX Runtime."""
    backend = OrtBackend(bundle, threads)
    with backend.load(network, sizes) as session:
        return {name: backend.to_host(value) for name, value in session.run(inputs).items()}


def text_encoder_error(bundle: Bundle, checkpoint: Path, batch: int) -> float:
    ids = np.random.default_rng(0).integers(0, 200, (batch, 226))
    ids[:, 100:] = 0
    found = run(bundle, "text_encoder", {"input_ids": ids}, batch=batch)["prompt_embeds"]
    eager = T5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        return relative_error(found, eager(torch.from_numpy(ids))[0])


def transformer_inputs(bundle: Bundle, batch: int) -> Arrays:
    rng = np.random.default_rng(1)
    specs = {spec.name: spec for spec in bundle.network("transformer").inputs}
    inputs: Arrays = {
        name: rng.standard_normal(specs[name].resolve({"batch": batch}), dtype=np.float32)
        for name in ("hidden_states", "encoder_hidden_states")
    }
    inputs["timestep"] = np.array([937], np.int64)
    if bundle.manifest.traits.ofs:
        inputs["ofs"] = np.array([2.0], np.float32)
    return inputs


def exported_noise(bundle: Bundle, inputs: Arrays, batch: int, threads: int | None = None) -> NDArray[Any]:
    """Run the modulation network, and the transformer with what it puts out."""
    step: Arrays = {name: inputs[name] for name in ("timestep", "ofs") if name in inputs}
    modulated = run(bundle, "modulation", step, threads)
    others = {name: array for name, array in inputs.items() if name not in step}
    return run(bundle, "transformer", others | modulated, threads, batch=batch)["noise_pred"]


def eager_transformer(checkpoint: Path) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)


def eager_noise(eager: CogVideoXTransformer3DModel, checkpoint: Path, shape: Shape, inputs: Arrays) -> torch.Tensor:
    """Run diffusers' transformer, with the rotary table its pipeline makes for the shape."""
    rotary = None
    if eager.config.use_rotary_positional_embeddings:
        pipeline = CogVideoXPipeline.from_pretrained(
            checkpoint, transformer=eager, vae=None, text_encoder=None, tokenizer=None
        )
        frames = inputs["hidden_states"].shape[1]
        rotary = pipeline._prepare_rotary_positional_embeddings(shape.height, shape.width, frames, torch.device("cpu"))
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tensors["timestep"] = tensors["timestep"].expand(len(inputs["hidden_states"]))
    with torch.no_grad():
        noise: torch.Tensor = eager(**tensors, image_rotary_emb=rotary, return_dict=False)[0]
    return noise


def transformer_error(bundle: Bundle, checkpoint: Path, batch: int) -> float:
    inputs = transformer_inputs(bundle, batch)
    found = exported_noise(bundle, inputs, batch)
    return relative_error(found, eager_noise(eager_transformer(checkpoint), checkpoint, bundle.shape, inputs))


def eager_vae(checkpoint: Path) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)


def decoder_error(bundle: Bundle, checkpoint: Path, frames: int, *, tiled: bool = False) -> float:
    shape, spatial = bundle.shape, bundle.manifest.vae.spatial
    plane = (shape.height // spatial, shape.width // spatial)
    latents = np.random.default_rng(2).standard_normal((1, 16, frames, *plane), dtype=np.float32)
    pieces = vae.decode(OrtBackend(bundle), latents, tiled=tiled, advance=lambda _: None)
    found = np.concatenate(list(pieces), axis=2)
    eager = eager_vae(checkpoint)
    if tiled:
        eager.enable_tiling()
    with torch.no_grad():
        return relative_error(found, eager.decode(torch.from_numpy(latents)).sample)


def encoder_error(bundle: Bundle, checkpoint: Path, frames: int, *, tiled: bool = False) -> float:
    shape = bundle.shape
    pixels = np.random.default_rng(3).uniform(-1, 1, (1, 3, frames, shape.height, shape.width)).astype(np.float32)
    found = vae.encode(OrtBackend(bundle), pixels, tiled=tiled, advance=lambda _: None).sample(Generator(5))
    eager = eager_vae(checkpoint)
    if tiled:
        eager.enable_tiling()
    with torch.no_grad():
        posterior = eager.encode(torch.from_numpy(pixels)).latent_dist
    return relative_error(found, posterior.sample(torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("batch", [1, 2])
def test_text_encoder_matches_transformers(model_name: str, batch: int, tiny: Tiny, exported: Exported) -> None:
    assert text_encoder_error(exported(model_name), tiny(model_name), batch) < NETWORK_RELATIVE


@pytest.mark.parametrize("batch", [1, 2])
def test_transformer_matches_diffusers(model_name: str, batch: int, tiny: Tiny, exported: Exported) -> None:
    assert transformer_error(exported(model_name), tiny(model_name), batch) < NETWORK_RELATIVE


def test_decoder_chunks_match_diffusers(model_name: str, tiny: Tiny, exported: Exported) -> None:
    bundle = exported(model_name)
    frames = -(-bundle.shape.frames // bundle.manifest.vae.temporal)
    assert decoder_error(bundle, tiny(model_name), frames) < NETWORK_RELATIVE


@pytest.mark.parametrize(
    "frames", [1, *(pytest.param(count, marks=pytest.mark.nightly) for count in (8, 16)), 25]
)  # 1, 2, 4 and 7 latent frames; 9 and 17 are the models' own
def test_vae_matches_diffusers_at_every_kind_of_frame_count(frames: int, tiny: Tiny, exported: Exported) -> None:
    bundle = exported("2b", only="vae", frames=frames)
    assert decoder_error(bundle, tiny("2b"), -(-frames // 4)) < NETWORK_RELATIVE
    assert encoder_error(bundle, tiny("2b"), frames) < NETWORK_RELATIVE


def test_encoder_matches_diffusers_on_one_image(tiny: Tiny, exported: Exported) -> None:
    assert encoder_error(exported("1.5-5b-i2v"), tiny("1.5-5b-i2v"), 1) < NETWORK_RELATIVE


def test_tiled_decoding_and_encoding_match_diffusers(tiny: Tiny, exported: Exported) -> None:
    bundle = exported("2b")
    half = bundle.manifest.vae
    assert bundle.shape.height > half.tile_height, "the clip must not fit one tile"
    assert decoder_error(bundle, tiny("2b"), 5, tiled=True) < NETWORK_RELATIVE
    assert encoder_error(bundle, tiny("2b"), 17, tiled=True) < NETWORK_RELATIVE


def test_transformer_matches_diffusers_at_an_untrained_shape(tiny: Tiny, exported: Exported) -> None:
    for name, request in (("2b", {"frames": 9, "height": 48, "width": 176}), ("5b", {"height": 160, "width": 48})):
        bundle = exported(name, only="transformer", **request)
        assert transformer_error(bundle, tiny(name), 2) < NETWORK_RELATIVE


def test_learned_positions_give_way_to_sincos_at_another_frame_count(tiny: Tiny, exported: Exported) -> None:
    trained, other = exported("5b-i2v"), exported("5b-i2v", only="transformer", frames=17)
    assert trained.shape.frames != 17
    assert transformer_error(trained, tiny("5b-i2v"), 1) < NETWORK_RELATIVE
    assert transformer_error(other, tiny("5b-i2v"), 1) < NETWORK_RELATIVE


def test_only_the_caches_that_are_read_are_carried(exported: Exported) -> None:
    state = exported("2b").network("vae_decoder_next").state
    assert state
    assert not [name for name in state if name.endswith(("conv_y", "conv_b"))]


def test_grid_expands_to_every_token() -> None:
    grid = Grid((2, 3, 5), (1, 1, 1), "twh")
    grid.get_buffer("t").copy_(torch.tensor([[0.0], [100.0]]))
    grid.get_buffer("h").copy_(torch.arange(3.0)[:, None] * 10)
    grid.get_buffer("w").copy_(torch.arange(5.0)[:, None])
    table = grid().reshape(2, 3, 5, 3)
    assert table[1, 2, 4].tolist() == [100.0, 4.0, 20.0]


@pytest.mark.parametrize(
    ("component", "tensor", "error"),
    [
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", lambda b, c: text_encoder_error(b, c, 1)),
        ("transformer", "transformer_blocks.1.attn1.to_k.weight", lambda b, c: transformer_error(b, c, 2)),
        ("transformer", "transformer_blocks.1.norm2.linear.weight", lambda b, c: transformer_error(b, c, 2)),
        ("transformer", "norm_out.linear.bias", lambda b, c: transformer_error(b, c, 2)),
        ("vae", "decoder.up_blocks.1.resnets.0.conv1.conv.weight", lambda b, c: decoder_error(b, c, 3)),
        ("vae", "encoder.mid_block.resnets.0.conv2.conv.weight", lambda b, c: encoder_error(b, c, 9)),
    ],
)
def test_a_corrupted_weight_is_seen(
    component: str, tensor: str, error: Callable[[Bundle, Path], float], tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    bundle = exported("5b")
    assert error(bundle, tiny("5b")) < NETWORK_RELATIVE
    assert error(corrupted(bundle, component, tensor, tmp_path), tiny("5b")) > NETWORK_RELATIVE


def test_half_precision_bundles_run_and_stay_near(tiny: Tiny, exported: Exported) -> None:
    bundle = exported("5b", precision="fp16")
    errors = (
        text_encoder_error(bundle, tiny("5b"), 1),
        transformer_error(bundle, tiny("5b"), 2),
        decoder_error(bundle, tiny("5b"), 3),
    )
    for error in errors:
        assert NETWORK_RELATIVE < error < THRESHOLDS["fp16"].relative_max


def test_bfloat16_networks_are_well_typed_and_refused_on_the_cpu(exported: Exported) -> None:
    bundle = exported("5b", precision="bf16")
    for name in bundle.manifest.networks:
        model = onnx.load(bundle.onnx_path(name), load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    with pytest.raises(EngineError, match="bf16"):
        OrtBackend(bundle)
