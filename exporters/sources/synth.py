"""Write a checkpoint of a published model with seeded random weights, of any scale, without holding it in memory.

It has the files, names, types and shapes of the original, so whatever reads a real checkpoint can be tried on it. Names
and shapes come from the diffusers and transformers classes themselves, built on the meta device. Values are drawn block
by block, each from its own seed, on two threads, and go straight through SHA-256 to the disk.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cvx_deploy.errors import WrongModelError
from cvx_deploy.exporters.sources.outliers import Outliers, outliers_of
from cvx_deploy.exporters.sources.synth_configs import (
    Config,
    Scale,
    model_index,
    scheduler_config,
    spiece_model,
    text_encoder_config,
    tokenizer_files,
    transformer_config,
    vae_config,
)
from cvx_deploy.exporters.sources.weights import (
    FULL_SHARD_BYTES,
    PlannedTensor,
    as_json,
    header_of,
    split_into_shards,
    write_hashed,
)
from cvx_deploy.families.cogvideox.models import MODELS, Model
from cvx_deploy.files import require_space, staged_directory, sums_of
from cvx_deploy.progress import Progress, SilentProgress

# Elements drawn from one seed: 4 MB in float32. Part of what a seed means, so a change here changes every checkpoint.
BLOCK: Final = 1 << 20
THREADS: Final = 2

# What multiplies 1/sqrt(fan_in), by the end of a weight's name. SpatialNorm multiplies by conv_y, whose bias is one,
# and adds conv_b: both see latents whose spread is above one. conv_out makes pixels, which should seldom leave [-1, 1].
_GAINS: Final = {
    ".conv_y.conv.weight": 0.1,
    ".conv_b.conv.weight": 0.3,
    "decoder.conv_out.conv.weight": 0.6,
}


@dataclass(frozen=True)
class RandomTensor:
    """A tensor to be drawn: its name in the checkpoint, its shape, and its normal distribution."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be written: its component (a folder), its name, and its tensors in file order."""

    component: str
    filename: str
    dtype: torch.dtype
    tensors: tuple[RandomTensor, ...]

    @property
    def path(self) -> str:
        """Path inside the checkpoint."""
        return f"{self.component}/{self.filename}"

    @cached_property
    def header(self) -> bytes:
        """The safetensors header with its length before it, padded to 8 bytes so that tensors start aligned."""
        return header_of(PlannedTensor(tensor.name, self.dtype, tensor.shape) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """All that a checkpoint will hold: small files by path, with their content, and weight files."""

    small: dict[str, bytes]
    weights: tuple[ShardFile, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.nbytes for file in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, ``SHA256SUMS`` included."""
        sums = sums_of({file.path: "0" * 64 for file in self.weights})
        return self.weight_bytes + len(sums) + sum(map(len, self.small.values()))


def synthesize(
    like: str,
    scale: Scale,
    output: Path,
    *,
    seed: int = 0,
    outliers: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of the model `like` with random weights to `output`, all of it or nothing.

    Linear and convolution weights are N(0, 1/fan_in), biases N(0, 0.02^2), norm weights N(1, 0.05^2), so that signals
    neither vanish nor saturate and videos vary. ``SHA256SUMS`` in the root holds the hash of every weight file.

    Args:
        like: A name in `cvx_deploy.families.cogvideox.models.MODELS`.
        scale: ``full`` for the original sizes; ``wide`` for their width in two blocks, so that what happens at the real
            width can be tried on a small machine; ``tiny`` for a few megabytes of the same topology.
        output: A folder that does not exist yet, or is empty.
        seed: Together with component and tensor name it decides every value; order and sharding do not matter.
        outliers: Whether weights and activations have outliers as trained models have them; see `outliers`.
        progress: Shows the weight bytes written.

    Returns:
        `output`.

    Raises:
        WrongModelError: `like` is none of the published models.
        OutputError: `output` exists, cannot be written, or the disk has too little room.
    """
    progress = progress or SilentProgress()
    plan = _plan(_model(like), scale)
    with staged_directory(output, replace=False) as folder:
        require_space(folder.parent, plan.nbytes)
        for path, content in plan.small.items():
            write_hashed(folder / path, [content])
        with ThreadPoolExecutor(THREADS) as pool, progress.task("write weights", plan.weight_bytes) as advance:
            hashes = {
                file.path: write_hashed(folder / file.path, _chunks(file, seed, outliers, pool), advance)
                for file in plan.weights
            }
        write_hashed(folder / "SHA256SUMS", [sums_of(dict(sorted(hashes.items())))])
    return output


def network_on_meta(component: str, config: Config) -> torch.nn.Module:
    """Build the class a component's config is for, without memory for its weights.

    Args:
        component: ``text_encoder``, ``transformer`` or ``vae``.
        config: The content of its ``config.json``.
    """
    network: torch.nn.Module
    with torch.device("meta"):
        if component == "text_encoder":
            network = T5EncoderModel(T5Config.from_dict(config))
        elif component == "transformer":
            network = CogVideoXTransformer3DModel.from_config(config)
        else:
            network = AutoencoderKLCogVideoX.from_config(config)
    return network


def _model(like: str) -> Model:
    if like not in MODELS:
        raise WrongModelError(f"no model is called {like!r}", fix=f"use one of {', '.join(MODELS)}")
    return MODELS[like]


def _plan(model: Model, scale: Scale) -> Plan:
    small = {
        "model_index.json": as_json(model_index(model)),
        "scheduler/scheduler_config.json": as_json(scheduler_config(model)),
        "tokenizer/spiece.model": spiece_model(scale),
    }
    small |= {f"tokenizer/{name}": as_json(content) for name, content in tokenizer_files(scale).items()}
    weights: list[ShardFile] = []
    for component, config in (
        ("text_encoder", text_encoder_config(model, scale)),
        ("transformer", transformer_config(model, scale)),
        ("vae", vae_config(model, scale)),
    ):
        small[f"{component}/config.json"] = as_json(config)
        files, index = _sharded(component, network_on_meta(component, config), getattr(torch, model.dtype), scale)
        small |= index
        weights += files
    return Plan(small, tuple(weights))


def _sharded(
    component: str, network: torch.nn.Module, dtype: torch.dtype, scale: Scale
) -> tuple[list[ShardFile], dict[str, bytes]]:
    """Split a network into weight files as ``save_pretrained`` does; the index is by path, and empty for one file."""
    tied = getattr(network, "_tied_weights_keys", None) or {}
    state = {name: tensor.to(dtype) for name, tensor in network.state_dict().items() if name not in tied}
    total = sum(tensor.nbytes for tensor in state.values())
    # Tiny networks are cut in two or three, so that readers meet shards; the VAE is one file in every original.
    limit = total // 2 if scale == "tiny" and component != "vae" else FULL_SHARD_BYTES
    shards, index = split_into_shards(component, state, limit)
    files = [
        ShardFile(
            component,
            filename,
            dtype,
            tuple(_random_tensor(network, name, tuple(state[name].shape)) for name in names),
        )
        for filename, names in shards.items()
    ]
    return files, index


def _random_tensor(network: torch.nn.Module, name: str, shape: tuple[int, ...]) -> RandomTensor:
    owner, _, leaf = name.rpartition(".")
    if leaf == "pos_embedding":
        return RandomTensor(name, shape, 0.0, 0.02)
    if leaf == "bias":
        return RandomTensor(name, shape, 1.0 if name.endswith(".conv_y.conv.bias") else 0.0, 0.02)
    if isinstance(network.get_submodule(owner), torch.nn.Embedding):
        return RandomTensor(name, shape, 0.0, 0.1 if owner.endswith("relative_attention_bias") else 1.0)
    if len(shape) == 1:
        return RandomTensor(name, shape, 1.0, 0.05)
    gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
    if isinstance(network, T5EncoderModel) and name.endswith(".q.weight"):
        # T5 does not divide attention scores by sqrt(d_kv): its query weights do.
        gain = network.config.d_kv**-0.5
    return RandomTensor(name, shape, 0.0, gain / math.sqrt(math.prod(shape[1:])))


def random_state(network: torch.nn.Module, component: str, seed: int, outliers: bool) -> dict[str, torch.Tensor]:
    """Return a network's weights as a checkpoint with this seed would have them, in float32."""
    state = {}
    for name, like in network.state_dict().items():
        tensor = _random_tensor(network, name, tuple(like.shape))
        planted = outliers_of(component, name, tensor.shape, seed) if outliers else None
        key = f"{seed}/{component}/{name}"
        blocks = [_draw(tensor, block, key, torch.float32, planted) for block in range(-(-tensor.size // BLOCK))]
        state[name] = torch.from_numpy(np.concatenate(blocks)).view(torch.float32).reshape(tensor.shape)
    return state


def _chunks(file: ShardFile, seed: int, outliers: bool, pool: ThreadPoolExecutor) -> Iterator[bytes | memoryview]:
    """Yield a weight file piece by piece, drawing a few blocks ahead on `pool`."""
    yield file.header
    pending: deque[Future[memoryview]] = deque()
    for tensor in file.tensors:
        planted = outliers_of(file.component, tensor.name, tensor.shape, seed) if outliers else None
        key = f"{seed}/{file.component}/{tensor.name}"
        for block in range(-(-tensor.size // BLOCK)):
            if len(pending) == 2 * THREADS:
                yield pending.popleft().result()
            pending.append(pool.submit(_draw, tensor, block, key, file.dtype, planted))
    while pending:
        yield pending.popleft().result()


def _draw(tensor: RandomTensor, block: int, key: str, dtype: torch.dtype, planted: Outliers | None) -> memoryview:
    """Draw one block of a tensor and return its bytes in `dtype`, little-endian."""
    entropy = int.from_bytes(hashlib.sha256(key.encode()).digest())
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([entropy, block])))
    values = generator.standard_normal(min(BLOCK, tensor.size - block * BLOCK), dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    if planted is not None:
        planted.plant(values, block * BLOCK, math.prod(tensor.shape[1:]))
    return torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().data
