"""What each network is given in a parity check: what it took in a run of diffusers' pipeline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, numpy_dtype
from cvx_deploy.engines.backend import Backend

if TYPE_CHECKING:
    from cvx_deploy.exporters.reference.eager import EagerVideo

Arrays = dict[str, NDArray[Any]]
_OFS = np.array([2.0], np.float32)  # the constant that the 1.5 image-to-video pipeline feeds


@dataclass(frozen=True)
class Case:
    """One run of a network.

    Attributes:
        label: What is particular to it.
        sizes: Its symbolic sizes.
        inputs: In float32 or int64, whatever the network's own types are.
    """

    label: str
    sizes: dict[str, int]
    inputs: Arrays


Expected = dict[str, list[tuple[Case, Arrays]]]
"""By role, what has been run so far, and what came out."""


def roles(bundle: Bundle) -> list[str]:
    """Return the roles of a shape in an order in which none needs what a later one puts out."""
    return [role for role in CASES if bundle.has(role)]


def text_encoder_cases(bundle: Bundle, video: "EagerVideo", _: Expected) -> Iterator[Case]:
    """Yield the prompt, and the prompt with the negative one."""
    yield Case("batch 1", {"batch": 1}, {"input_ids": video.input_ids[1:]})
    yield Case("batch 2", {"batch": 2}, {"input_ids": video.input_ids})


def modulation_cases(bundle: Bundle, video: "EagerVideo", _: Expected) -> Iterator[Case]:
    """Yield the first and the last timestep."""
    ofs = {"ofs": _OFS} if bundle.manifest.traits.ofs else {}
    for timestep in _ends(video):
        step = {"timestep": np.array([video.timesteps[timestep]], np.int64)}
        yield Case(f"timestep {video.timesteps[timestep]}", {}, step | ofs)


def transformer_cases(bundle: Bundle, video: "EagerVideo", expected: Expected) -> Iterator[Case]:
    """Yield the first and the last step, each with guidance and without."""
    for batch in (2, 1):
        for step, (_, modulation) in zip(_ends(video), expected["modulation"], strict=True):
            inputs = {
                "hidden_states": video.hidden_states[step][2 - batch :],
                "encoder_hidden_states": video.prompt_embeds[2 - batch :],
                **modulation,
            }
            yield Case(f"batch {batch}, timestep {video.timesteps[step]}", {"batch": batch}, inputs)


def _ends(video: "EagerVideo") -> list[int]:
    return sorted({0, len(video.timesteps) - 1})


def encoder_cases(bundle: Bundle, video: "EagerVideo", _: Expected) -> Iterator[Case]:
    """Yield the first chunk of the image, or of the video that diffusers made."""
    yield _chunk(bundle, "vae_encoder", encoder_clip(video), 0, {})


def encoder_clip(video: "EagerVideo") -> NDArray[np.float32]:
    """Return pixels ``(1, 3, F, H, W)`` in [-1, 1]: the image that was encoded, or else the finished video."""
    if video.pixels is not None:
        return video.pixels
    return 2 * video.frames.transpose(3, 0, 1, 2)[None] - 1


def decoder_cases(bundle: Bundle, video: "EagerVideo", _: Expected) -> Iterator[Case]:
    """Yield the first chunk of the finished latents."""
    yield _chunk(bundle, "vae_decoder_first", decoder_clip(bundle, video), 0, {})


def decoder_clip(bundle: Bundle, video: "EagerVideo") -> NDArray[np.float32]:
    """Return the finished latents as the decoder takes them, ``(1, C, f, h, w)``."""
    scale = np.float32(1 / bundle.manifest.vae.scaling_factor)
    return (scale * video.latents).transpose(0, 2, 1, 3, 4)


def next_encoder_cases(bundle: Bundle, video: "EagerVideo", expected: Expected) -> Iterator[Case]:
    """Yield the second chunk, with the state of the first."""
    yield _second(bundle, "vae_encoder", "vae_encoder_next", encoder_clip(video), expected)


def next_decoder_cases(bundle: Bundle, video: "EagerVideo", expected: Expected) -> Iterator[Case]:
    """Yield the second chunk, with the state of the first."""
    yield _second(bundle, "vae_decoder_first", "vae_decoder_next", decoder_clip(bundle, video), expected)


CASES: dict[str, Callable[[Bundle, "EagerVideo", Expected], Iterator[Case]]] = {
    "text_encoder": text_encoder_cases,
    "modulation": modulation_cases,
    "transformer": transformer_cases,
    "vae_encoder": encoder_cases,
    "vae_encoder_next": next_encoder_cases,
    "vae_decoder_first": decoder_cases,
    "vae_decoder_next": next_decoder_cases,
}


def _second(bundle: Bundle, first: str, following: str, clip: NDArray[np.float32], expected: Expected) -> Case:
    [(_, before)] = expected[first]
    start = _frames(bundle.network(first))
    state = {taken: before[given] for taken, given in bundle.network(first).state.items()}
    return _chunk(bundle, following, clip, start, state)


def _chunk(bundle: Bundle, role: str, clip: NDArray[np.float32], start: int, state: Arrays) -> Case:
    network = bundle.network(role)
    spatial, shape = bundle.manifest.vae.spatial, bundle.shape
    sizes = {"latent_height": shape.height // spatial, "latent_width": shape.width // spatial}
    end = start + _frames(network)
    return Case(f"frames {start} to {end - 1}", sizes, {network.inputs[0].name: clip[:, :, start:end], **state})


def _frames(network: Network) -> int:
    frames = network.inputs[0].shape[2]
    assert isinstance(frames, int)
    return frames


def run_cases(backend: Backend, role: str, cases: list[Case]) -> Iterator[tuple[Case, Arrays]]:
    """Run a network on its cases, and yield what it puts out; it is loaded once for each of its sizes."""
    described = backend.bundle.network(role)
    types = {spec.name: numpy_dtype(spec.dtype) for spec in described.inputs}
    kept = {spec.name for spec in described.outputs if spec.dtype == "bfloat16"}
    for sizes in {tuple(case.sizes.items()): case.sizes for case in cases}.values():
        with backend.load(role, sizes) as session:
            for case in cases:
                if case.sizes == sizes:
                    outputs = session.run({name: array.astype(types[name]) for name, array in case.inputs.items()})
                    yield (
                        case,
                        {
                            name: np.array(backend.to_host(value))
                            for name, value in outputs.items()
                            if name not in kept or _is_float32(value)
                        },
                    )


def _is_float32(value: Any) -> bool:
    """Whether a value that passes as bfloat16 elsewhere is float32 here, as eager PyTorch's are."""
    return isinstance(value, np.ndarray) and value.dtype == np.float32
