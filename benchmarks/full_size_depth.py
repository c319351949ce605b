"""How far a full-size bundle's networks are from eager PyTorch, block by block: `benchmarks/full_size.py` starts this.

    python benchmarks/full_size_depth.py ENGINE BUNDLE CHECKPOINT SHAPE

The reference is diffusers' and transformers' modules on the same weights: kept in bf16 and converted to float32 layer
by layer, which is exact and fits into 24 GB. Errors go to stdout as JSON: the relative L2 error of the video's residual
stream after each block, of the transformer's output, of the text encoder's and of the decoded frames.
"""

import gc
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from full_size_eager import text_encoder, transformer

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import StoredFile, TensorSpec
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.engines.spec import EngineOptions
from cvx_deploy.files import sha256_of
from cvx_deploy.pipeline import vae
from cvx_deploy.shape import Shape

TIMESTEP = 499
_ENTRY = re.compile(r"transformer_blocks\.(\d+)\.norm1\.norm/LayerNormalization")
Arrays = dict[str, np.ndarray[Any, Any]]


def instrumented(bundle: Bundle) -> tuple[Bundle, list[str]]:
    """Return the bundle with a transformer that puts the video's residual stream out as well, before each block but the
    first and after the last, and the names of these outputs."""
    network = bundle.network("transformer")
    model = onnx.ModelProto.FromString(bundle.onnx_bytes("transformer"))
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    [text] = [spec.shape[1] for spec in network.inputs if spec.name == "encoder_hidden_states"]
    taps: dict[int, str] = {}
    for node in model.graph.node:
        entry = _ENTRY.search(node.name)
        if entry and shapes[node.input[0]].dim[1].dim_value != text:
            taps[int(entry[1])] = node.input[0]
        if node.op_type == "LayerNormalization" and "norm_final" in node.name:
            taps[len(taps)] = node.input[0]
    names = [taps[place] for place in sorted(taps) if place > 0]
    specs = []
    for name in names:
        axes = tuple(axis.dim_param or axis.dim_value for axis in shapes[name].dim)
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes))
        specs.append(TensorSpec(name, "float32", axes, "BSD"))
    path = bundle.path / "transformer.residuals.onnx"
    path.write_bytes(model.SerializeToString())
    file = StoredFile(path.name, path.stat().st_size, sha256_of(path))
    networks = bundle.manifest.networks | {
        bundle.network_name("transformer"): replace(network, file=file, outputs=(*network.outputs, *specs))
    }
    return replace(bundle, manifest=replace(bundle.manifest, networks=networks)), names


def error(found: Any, expected: Any) -> float:
    """Return the relative L2 error."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def embeds_of(checkpoint: Path, ids: Any) -> Any:
    """Return what transformers' T5 says of a prompt."""
    text = text_encoder(checkpoint)
    return text(torch.from_numpy(ids))[0].float().numpy()


def prediction(checkpoint: Path, latents: Any, embeds: Any, rotary: tuple[Any, Any]) -> tuple[list[Any], Any]:
    """Return diffusers' residual stream after each block, and its output."""
    denoiser = transformer(checkpoint)
    after: list[Any] = []
    for block in denoiser.transformer_blocks:
        block.register_forward_hook(lambda _, __, out: after.append(out[0].float().numpy().copy()))
    out = denoiser(
        hidden_states=torch.from_numpy(latents),
        encoder_hidden_states=torch.from_numpy(embeds),
        timestep=torch.tensor([TIMESTEP]),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    return after, out.float().numpy()


def rotary_of(checkpoint: Path, shape: Shape) -> tuple[Any, Any]:
    """Return the positions that diffusers' pipeline gives its transformer."""
    from diffusers import CogVideoXPipeline

    config = CogVideoXTransformer3DModel.load_config(checkpoint / "transformer")
    with torch.device("meta"):
        shell = CogVideoXTransformer3DModel.from_config(config)
    pipe = CogVideoXPipeline(None, None, None, shell, None)
    return pipe._prepare_rotary_positional_embeddings(shape.height, shape.width, (shape.frames - 1) // 4 + 1, "cpu")


def main() -> None:
    """Run the networks of a bundle and of the checkpoint, one after another, and print how far they are apart."""
    engine, folder, source, size = sys.argv[1:5]
    torch.set_grad_enabled(False)
    checkpoint, shape = Path(source), Shape.parse(size)
    bundle, names = instrumented(Bundle.open(Path(folder)).at(shape))
    rng = np.random.default_rng(0)
    frames, height, width = (shape.frames - 1) // 4 + 1, shape.height // 8, shape.width // 8
    latents = rng.standard_normal((1, frames, 16, height, width), np.float32)
    ids = rng.integers(3, 100, (1, bundle.manifest.text_length))
    embeds = embeds_of(checkpoint, ids)
    gc.collect()
    rotary = rotary_of(checkpoint, shape)
    blocks, expected = prediction(checkpoint, latents, embeds, rotary)
    gc.collect()
    decoder = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    pixels = decoder.decode(torch.from_numpy(latents.transpose(0, 2, 1, 3, 4))).sample.numpy()
    del decoder
    found: dict[str, Any] = {}
    with open_backend(engine, bundle, EngineOptions(residency="phase")) as backend:
        with backend.load("text_encoder", {"batch": 1}) as session:
            ours = backend.to_host(session.run({"input_ids": ids})["prompt_embeds"])
            found["prompt_embeds"] = error(ours, embeds)
        with backend.load("modulation", {}) as session:
            rows = backend.to_host(session.run({"timestep": np.array([TIMESTEP], np.int64)})["modulation"])
        with backend.load("transformer", {"batch": 1}) as session:
            given = {"hidden_states": latents, "encoder_hidden_states": embeds, "modulation": rows}
            out = {name: backend.to_host(value) for name, value in session.run(given).items()}
            found["blocks"] = [error(out[name], block) for name, block in zip(names, blocks, strict=True)]
            found["noise_pred"] = error(out["noise_pred"], expected)
        decoded = vae.decode(backend, latents.transpose(0, 2, 1, 3, 4), tiled=False, advance=lambda _: None)
        found["frames"] = error(np.concatenate(list(decoded), axis=2), pixels)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
