"""A bundle at the shape of the tensors that come, on an engine that opens when the first of them do."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend, DeviceTensor
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.errors import EngineError, ShapeError
from cvx_deploy.families.cogvideox.vae import VaeHalf
from cvx_deploy.pipeline.shapes import latent_shape
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape

Plane = tuple[int, int]  # height and width of a video, in pixels


class Views:
    """The shapes of a bundle, each on its engine once it is needed; `close` frees them all."""

    def __init__(self, bundle: Bundle, engine: EngineName, options: EngineOptions, progress: Progress) -> None:
        self.bundle = bundle
        self._engine, self._options, self._progress = engine, options, progress
        self._opened: dict[Shape, Backend] = {}
        self._stack = ExitStack()
        self._closed = False

    def close(self) -> None:
        """Free every network; nothing runs any more."""
        self._closed = True
        self._opened.clear()
        self._stack.close()

    def first(self) -> Backend:
        """Return the engine at any shape, for networks that are the same at all of them."""
        return next(iter(self._opened.values()), None) or self._at(self.bundle)

    def of_latents(self, size: tuple[int, ...]) -> Backend:
        """Return the engine whose transformer takes latents of a size (F, C, H, W), whatever their channels."""
        for view in self._views():
            _, frames, _, height, width = latent_shape(view)
            if (frames, height, width) == (size[0], *size[2:]):
                return self._at(view)
        vae = self.bundle.manifest.vae
        plane = vae.spatial * size[2], vae.spatial * size[3]
        raise self._none(video_frames(self.bundle, size[0]), plane)

    def of_clip(self, half: VaeHalf, frames: int, plane: Plane, *, whole: int) -> Backend:
        """Return the engine whose VAE takes a clip of so many frames (latent ones to decode) of a `whole` video."""
        for view in self._views():
            if (view.shape.height, view.shape.width) == plane and _cuts(view, half, frames):
                return self._at(view)
        raise self._none(whole, plane)

    def _views(self) -> list[Bundle]:
        return [self.bundle.at(shape) for shape in self.bundle.shapes]

    def _at(self, view: Bundle) -> Backend:
        if self._closed:
            raise EngineError("these engines have been closed", fix="call use_engines again")
        if view.shape not in self._opened:
            opened = open_backend(self._engine, view, self._options, progress=self._progress)
            self._opened[view.shape] = self._stack.enter_context(opened)
        return self._opened[view.shape]

    def _none(self, frames: int, plane: Plane) -> ShapeError:
        shape = Shape(frames, *plane)
        if shape in self.bundle.shapes:
            return ShapeError(
                f"{self.bundle.path} has no VAE for such a clip of {shape}",
                fix="use the pipeline's own, which the handle has: engines.plain['vae']",
            )
        made = ", ".join(map(str, self.bundle.shapes))
        return ShapeError(
            f"{self.bundle.path} has no engine for a video of {shape} (it makes {made})",
            fix="run: " + self.bundle.export_command((*self.bundle.shapes, shape)),
        )


def video_frames(bundle: Bundle, latent_frames: int) -> int:
    """Return how many frames a video of so many latent frames has; an odd count begins with a single frame."""
    temporal = bundle.manifest.vae.temporal
    return temporal * (latent_frames - 1) + 1 if latent_frames % 2 else temporal * latent_frames


def _cuts(view: Bundle, half: VaeHalf, frames: int) -> bool:
    """Whether a clip is a whole number of the half's chunks at that shape."""
    if not view.has(half.first):
        return False
    rest = frames - _frames(view, half.first)
    return rest == 0 or (rest > 0 and view.has(half.following) and rest % _frames(view, half.following) == 0)


def _frames(view: Bundle, role: str) -> int:
    frames = view.network(role).inputs[0].shape[2]
    assert isinstance(frames, int)
    return frames


def on_engine(tensor: torch.Tensor) -> NDArray[Any] | onnxruntime.OrtValue:
    """Return a tensor as an engine takes it: the same memory, of a GPU by DLPack."""
    tensor = tensor.detach().contiguous()
    if tensor.device.type != "cuda":
        return tensor.numpy()
    torch.cuda.current_stream(tensor.device).synchronize()  # an engine works on a stream of its own
    return handed_over(tensor)


def handed_over(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """Return a contiguous tensor as ONNX Runtime holds it: the same memory, wherever it lies."""
    return onnxruntime.OrtValue.from_dlpack(tensor)


def in_torch(backend: Backend, tensor: DeviceTensor, like: torch.Tensor) -> torch.Tensor:
    """Return an output on the device of `like` and in its type; what lies there already is not copied."""
    if isinstance(tensor, onnxruntime.OrtValue):
        return from_dlpack(tensor).to(like.device, like.dtype)
    return torch.from_numpy(np.ascontiguousarray(backend.to_host(tensor))).to(like.device, like.dtype)
