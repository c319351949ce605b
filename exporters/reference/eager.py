"""diffusers' and transformers' own networks with a checkpoint's weights: what every other form is held against.

Weights are mapped, and copied only where their type changes. One network is held at a time.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from numpy.typing import NDArray
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.safetensors import StoredTensor
from cvx_deploy.exporters.cogvideox.vae import VaeChunk
from cvx_deploy.exporters.reference.longer_rope import rope_of
from cvx_deploy.exporters.sources.checkpoint import Checkpoint, sensible_config
from cvx_deploy.exporters.sources.weights import TORCH_TYPES
from cvx_deploy.exporters.tracing.contract import TORCH_DTYPES
from cvx_deploy.precision import Precision

Arrays = dict[str, NDArray[Any]]
_OWN: dict[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_COMPONENTS = {"text": "text_encoder", "modulation": "transformer", "transformer": "transformer", "vae": "vae"}
_T5_TABLE = ("shared.weight", "encoder.embed_tokens.weight")


def own_precision(checkpoint: Checkpoint) -> Precision:
    """Return the type that most of the transformer's bytes are stored in; float64 counts as fp32."""
    stored: Counter[str] = Counter()
    for tensor in checkpoint.tensors("transformer").values():
        stored[tensor.dtype] += tensor.nbytes
    return _OWN.get(TORCH_TYPES[stored.most_common(1)[0][0]], "fp32")


def device() -> torch.device:
    """Return where eager networks run: a GPU where PyTorch has one, and there in full float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def eager_network(checkpoint: Checkpoint, component: str, precision: Precision) -> Any:
    """Return a network as ``from_pretrained`` makes it: text_encoder, transformer or vae."""
    network, dtype = bare_network(checkpoint, component), TORCH_DTYPES[precision]
    weights = dict(eager_weights(checkpoint, component, dtype, set(network.state_dict())))
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False).to(device())


def bare_network(checkpoint: Checkpoint, component: str) -> Any:
    """Return a network whose weights are not loaded: its parameters are on the meta device, its buffers real."""
    config = {key: value for key, value in checkpoint.configs[component].items() if not key.startswith("_")}
    with sensible_config(checkpoint.place(component)), _without_weights():
        return _MAKERS[component](config)


_MAKERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text_encoder": lambda config: T5EncoderModel(T5Config(**config)),
    "transformer": CogVideoXTransformer3DModel.from_config,
    "vae": AutoencoderKLCogVideoX.from_config,
}


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Let modules be made with parameters that take no memory; their buffers are real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        bare = None if parameter is None else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, bare)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def eager_weights(
    checkpoint: Checkpoint, component: str, dtype: torch.dtype, wanted: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a network that are wanted, in its own names, mapped where they are stored in that type."""
    stored = checkpoint.tensors(component)
    for name in sorted(wanted):
        known = name if name in stored or name not in _T5_TABLE else next(key for key in _T5_TABLE if key in stored)
        if known not in stored:
            continue  # load_state_dict names all that are missing
        # T5's feed-forward overflows in float16: transformers keeps this layer in float32 there.
        wide = component == "text_encoder" and ".wo." in name and dtype == torch.float16
        yield name, _mapped(checkpoint, stored[known]).to(torch.float32 if wide else dtype)


def _mapped(checkpoint: Checkpoint, stored: StoredTensor) -> torch.Tensor:
    place = checkpoint.place(stored.file)
    raw: NDArray[np.uint8] = np.memmap(place, np.uint8, "c", offset=stored.offset, shape=(stored.nbytes,))
    if stored.offset % TORCH_TYPES[stored.dtype].itemsize:
        raw = np.array(raw)
    return torch.from_numpy(raw).view(TORCH_TYPES[stored.dtype]).reshape(stored.shape)


class EagerBackend:
    """Runs the networks of a bundle as diffusers and transformers do; see `runtime.backend.Backend`.

    Args:
        bundle: What its networks are called, take and put out. Its graphs and weights are not looked at.
        checkpoint: Whose weights they have.
        precision: What they compute in.
    """

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, precision: Precision) -> None:
        self.bundle = bundle
        self._checkpoint, self._precision = checkpoint, precision

    @contextlib.contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator["EagerSession"]:
        """Load a network for the block; it runs at any size."""
        component = _COMPONENTS[role.partition("_")[0]]
        yield EagerSession(self.bundle, role, eager_network(self._checkpoint, component, self._precision))

    def to_device(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the values: a session brings them to the device."""
        return array

    def to_host(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return the values."""
        return tensor


class EagerSession:
    """One eager network in the role of a bundle's."""

    def __init__(self, bundle: Bundle, role: str, network: Any) -> None:
        self._bundle, self._role, self._network = bundle, role, network
        self._described = bundle.network(role)

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the network once."""
        tensors = {name: _tensor(array).to(device()) for name, array in inputs.items()}
        with torch.inference_mode():
            outputs = _RUNS[self._role.partition("_")[0]](self, tensors)
        names = [spec.name for spec in self._described.outputs]
        return {name: value.float().cpu().numpy() for name, value in zip(names, outputs, strict=True)}

    def modules(self) -> Iterator[tuple[str, Any]]:
        """Yield every module within it with the name that its trace has."""
        roots = {"encoder": self._network} if self._role == "text_encoder" else {"model": self._network}
        if self._role.startswith("vae"):
            roots = dict(zip(("coder", "before", "after"), self._vae_parts(), strict=True))
        for first, root in roots.items():
            if root is not None:
                yield from ((f"{first}.{name}" if name else first, module) for name, module in root.named_modules())

    def _vae_parts(self) -> tuple[Any, Any, Any]:
        """Return the coder, and what stands before and after it."""
        if self._role.startswith("vae_encoder"):
            return self._network.encoder, None, self._network.quant_conv
        return self._network.decoder, self._network.post_quant_conv, None

    def text_encoder(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the prompt embeddings."""
        return (self._network(inputs["input_ids"])[0],)

    def modulation(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return every norm's rows ``(1, rows, D)``."""
        model, dtype = self._network, self._network.dtype
        embedding = model.time_embedding(model.time_proj(inputs["timestep"]).to(dtype))
        if model.ofs_embedding is not None:
            embedding = embedding + model.ofs_embedding(model.ofs_proj(inputs["ofs"]).to(dtype))
        rows = [norm.linear(norm.silu(embedding)) for norm in _norms(model)]
        return (torch.cat(rows, dim=-1).reshape(1, -1, model.norm_out.linear.out_features // 2),)

    def transformer(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the prediction, with the norms' projections replaced by the rows that are given."""
        model, dtype, shape = self._network, self._network.dtype, self._bundle.shape
        hidden = inputs["hidden_states"].to(dtype)
        rows = inputs["modulation"].to(dtype).flatten(1)
        rotary = None
        if model.config.use_rotary_positional_embeddings:
            pipeline: Any = CogVideoXPipeline(None, None, None, model, None)
            pipeline.vae_scale_factor_spatial = self._bundle.manifest.vae.spatial
            with rope_of(self._bundle):
                rotary = pipeline._prepare_rotary_positional_embeddings(
                    shape.height, shape.width, hidden.shape[1], hidden.device
                )
        with _given_rows(model, rows):
            zero = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            ofs = None if model.ofs_embedding is None else zero[:1].float()
            text = inputs["encoder_hidden_states"].to(dtype)
            return (model(hidden, text, zero, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0],)

    def vae(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return a chunk's output and the state for the next one."""
        described = self._described
        names = tuple(spec.name.removeprefix("cache.") for spec in described.inputs[1:])
        chunk = VaeChunk(*self._vae_parts(), names, keep_cache=len(described.outputs) > 1)
        output: tuple[torch.Tensor, ...] = chunk(*(inputs[spec.name] for spec in described.inputs))
        return output


_RUNS: dict[str, Callable[[EagerSession, dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]] = {
    "text": EagerSession.text_encoder,
    "modulation": EagerSession.modulation,
    "transformer": EagerSession.transformer,
    "vae": EagerSession.vae,
}


def _norms(model: Any) -> list[Any]:
    """Return every norm with a projection, in the order of the modulation's rows."""
    return [*(norm for block in model.transformer_blocks for norm in (block.norm1, block.norm2)), model.norm_out]


@contextlib.contextmanager
def _given_rows(model: Any, rows: torch.Tensor) -> Iterator[None]:
    """Let every norm's projection put out its part of ``rows (1, all)``, whatever it is given."""
    with contextlib.ExitStack() as stack:
        start = 0
        for norm in _norms(model):
            part = rows[:, start : start + norm.linear.out_features]
            start += norm.linear.out_features
            handle = norm.linear.register_forward_hook(lambda *_, part=part: part)
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class EagerRequest:
    """What video diffusers' pipeline is to make: a few words of `runtime.pipeline.RunRequest`; `video` is a folder."""

    prompt: str
    steps: int
    seed: int
    guidance_scale: float
    image: Path | None = None
    video: Path | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class EagerVideo:
    """A video that diffusers' pipeline made, and what its networks took on the way.

    Attributes:
        input_ids: (2, S), the negative prompt's first.
        prompt_embeds: (2, S, D).
        timesteps: Of each step.
        hidden_states: What the transformer took at each step, (2, F, C, H, W).
        latents: The finished ones without padding, (1, F, C, H, W), scaled.
        pixels: What the VAE's encoder took, (1, 3, 1, H, W), where there was an image.
        frames: (n, H, W, 3) in [0, 1].
    """

    input_ids: NDArray[np.int64]
    prompt_embeds: NDArray[np.float32]
    timesteps: tuple[int, ...]
    hidden_states: tuple[NDArray[np.float32], ...]
    latents: NDArray[np.float32]
    pixels: NDArray[np.float32] | None
    frames: NDArray[np.float32]


def eager_video(
    bundle: Bundle, checkpoint: Checkpoint, precision: Precision, wish: EagerRequest, encoded: EagerVideo | None = None
) -> EagerVideo:
    """Run diffusers' pipeline at a bundle's shape: text encoder, transformer and decoder one after the other.

    Args:
        bundle: Whose shape.
        checkpoint: Whose weights.
        precision: What it computes in.
        wish: What to make.
        encoded: A video of the same prompt and precision, whose embeddings are taken.
    """
    with torch.inference_mode():
        if encoded is None:
            ids, embeds = _encode(bundle, checkpoint, precision, wish)
        else:
            ids, embeds = (
                encoded.input_ids,
                torch.from_numpy(encoded.prompt_embeds).to(device(), TORCH_DTYPES[precision]),
            )
        steps, hidden, latents, pixels = _denoise(bundle, checkpoint, precision, wish, embeds)
        pipeline: Any = CogVideoXPipeline(None, None, eager_network(checkpoint, "vae", precision), None, None)
        pixel_values = pipeline.decode_latents(latents)
        frames = pipeline.video_processor.postprocess_video(video=pixel_values, output_type="np")[0]
    return EagerVideo(ids, _array(embeds), steps, hidden, _array(latents), pixels, frames.astype(np.float32))


def _encode(
    bundle: Bundle, checkpoint: Checkpoint, precision: Precision, wish: EagerRequest
) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Return token ids and embeddings of the empty negative prompt and of the prompt."""
    network = eager_network(checkpoint, "text_encoder", precision)
    seen: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    tokenizer = T5Tokenizer.from_pretrained(checkpoint.root / "tokenizer")
    pipeline: Any = CogVideoXPipeline(tokenizer, network, None, None, None)
    length = bundle.manifest.text_length
    positive, negative = pipeline.encode_prompt(wish.prompt, "", True, max_sequence_length=length, device=device())
    ids: NDArray[np.int64] = torch.cat(seen[::-1]).cpu().numpy()
    return ids, torch.cat([negative, positive])


def _denoise(
    bundle: Bundle, checkpoint: Checkpoint, precision: Precision, wish: EagerRequest, embeds: torch.Tensor
) -> tuple[tuple[int, ...], tuple[NDArray[Any], ...], torch.Tensor, NDArray[Any] | None]:
    """Return the timesteps, the transformer's inputs, the finished latents, and what was encoded of an image."""
    vae, transformer = (eager_network(checkpoint, name, precision) for name in ("vae", "transformer"))
    config = checkpoint.configs["scheduler"]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    steps: list[int] = []
    hidden: list[NDArray[Any]] = []
    pixels: list[NDArray[Any]] = []

    def take(_: Any, __: Any, given: dict[str, torch.Tensor]) -> None:
        steps.append(int(given["timestep"][0]))
        hidden.append(_array(given["hidden_states"]))

    transformer.register_forward_pre_hook(take, with_kwargs=True)
    vae.encoder.register_forward_pre_hook(lambda _, arguments: pixels.append(_array(arguments[0])))
    pipeline: Any = _pipeline_of(wish)(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with rope_of(bundle):
        latents: torch.Tensor = pipeline(
            **_call(bundle, wish), prompt_embeds=embeds[1:], negative_prompt_embeds=embeds[:1], output_type="latent"
        ).frames
    kept = -(-bundle.shape.frames // bundle.manifest.vae.temporal)
    return tuple(steps), tuple(hidden), latents[:, latents.shape[1] - kept :], pixels[0] if pixels else None


def clip_names(frames: int) -> list[str]:
    """Return the names of a clip's frames in its folder, in order."""
    return [f"{index}.png" for index in range(frames)]


def _pipeline_of(wish: EagerRequest) -> Any:
    if wish.video is not None:
        return CogVideoXVideoToVideoPipeline
    return CogVideoXPipeline if wish.image is None else CogVideoXImageToVideoPipeline


def _call(bundle: Bundle, wish: EagerRequest) -> dict[str, Any]:
    from PIL import Image

    shape = bundle.shape
    source: dict[str, Any] = {"num_frames": shape.frames}
    if wish.image is not None:
        source["image"] = Image.open(wish.image)
    if wish.video is not None:
        frames = [Image.open(wish.video / name) for name in clip_names(shape.frames)]
        source = {"video": frames, "strength": wish.strength}
    return {
        "height": shape.height,
        "width": shape.width,
        "num_inference_steps": wish.steps,
        "guidance_scale": wish.guidance_scale,
        "generator": torch.Generator().manual_seed(wish.seed),
        **source,
    }


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return values as a tensor; float32 stands for bfloat16, which PyTorch does not take from NumPy."""
    wide = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    return torch.from_numpy(np.ascontiguousarray(wide))


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().float().cpu().numpy()
