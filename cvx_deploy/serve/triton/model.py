"""The model that Triton's Python backend runs: a request is answered by events as they happen, then by the video.

https://github.com/triton-inference-server/python_backend describes what is called when. The module that the backend
lends to models, ``triton_python_backend_utils``, is there in its processes only.
"""

import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.errors import CvxError, MediaError
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.interpolation import Interpolation
from cvx_deploy.media.read import check_pixels
from cvx_deploy.media.write import open_writer
from cvx_deploy.pipeline.events import Event, Frames, Step
from cvx_deploy.pipeline.pipeline import Pipeline
from cvx_deploy.serve.faults import ApiError
from cvx_deploy.serve.jobs import Source, Spec
from cvx_deploy.serve.schemas import Asked, parsed
from cvx_deploy.serve.settings import Limits
from cvx_deploy.serve.specs import spec_of
from cvx_deploy.serve.triton.config import INPUTS, settings_of
from cvx_deploy.serve.worker import arguments_of, warm_up
from cvx_deploy.terminal import reason

_SOURCES: tuple[Source, ...] = ("image", "video")
_LIMITS = Limits()


class _CancelledError(Exception):
    """The client has cancelled, or gone."""


class TritonPythonModel:
    """One bundle on one device. Triton hands it one request after the other."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load everything, and try it with a short video, before Triton calls the model ready."""
        try:
            settings = settings_of(json.loads(args["model_config"]))
            engine = settings["engine"]
            threads, vram = (int(settings[name]) if name in settings else None for name in ("threads", "vram"))
            devices = (int(args["model_instance_device_id"]),) if engine_spec(engine).on_gpu else ()
            self._name = args["model_name"]
            self._pipeline = Pipeline.from_bundle(
                settings["bundle"], engine=engine, devices=devices, threads=threads, vram=vram
            )
            warm_up(self._pipeline)
        except CvxError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer each request: any number of events, then the video or the reason why there is none."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                last = pb_utils.InferenceResponse(self._made(request, sender))
            except _CancelledError:
                last = _refusal("cancelled", pb_utils.TritonError.CANCELLED)
            except ApiError as error:
                last = _refusal(error.message, pb_utils.TritonError.INVALID_ARG)
            except CvxError as error:
                last = _refusal(str(error), pb_utils.TritonError.INTERNAL)
            except Exception as error:
                last = _refusal(f"a fault of cvx-deploy: {reason(error)}", pb_utils.TritonError.INTERNAL)
            sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Free everything."""
        self._pipeline.close()

    def _made(self, request: Any, sender: Any) -> list[Any]:
        """Make the video of a request, telling of each step, and return the tensors of the last answer."""
        fields = _fields(request)
        sources = {kind: fields.pop(kind) for kind in _SOURCES if kind in fields}
        if len(sources) > 1:
            raise ApiError(400, "an image and a video. fix: send one of them.", "invalid_value", "video")
        asked = parsed(Asked, {name: _text(name, value) for name, value in fields.items()}, texts=False)
        spec = spec_of(asked, self._name, {self._name: self._pipeline.bundle}, next(iter(sources), None), _LIMITS)
        if spec.image_model is not None:
            message = f"one clip is made here, of {self._pipeline.bundle.shape.frames} frames. fix: ask for no more."
            raise ApiError(400, message, "unsupported", "num_frames")
        with tempfile.TemporaryDirectory(prefix="cvx-triton-") as folder:
            try:
                video = self._written(spec, _kept(sources, Path(folder)), Path(folder) / "video.mp4", sender)
            except MediaError as error:
                what = error.what.replace(f"{folder}/", "")
                raise ApiError(400, f"{what}. fix: {error.fix}.", "invalid_file", spec.source) from error
        done = {"event": "completed", "seed": spec.seed, "size": f"{spec.width}x{spec.height}"}
        return [_tensor("event", json.dumps(done).encode()), _tensor("video", video)]

    def _written(self, spec: Spec, source: Path | None, path: Path, sender: Any) -> bytes:
        """Write the video, telling of each step, and return its bytes."""
        between = None if spec.rate.is_kept else Interpolation(spec.rate)
        with (
            closing(self._pipeline.stream(**arguments_of(spec, source))) as happening,
            open_writer(path, VideoFormat(spec.written, spec.height, spec.width, spec.fps)) as writer,
        ):
            for event in happening:
                if sender.is_cancelled():
                    raise _CancelledError
                if isinstance(event, Frames):
                    for written in [event.frames] if between is None else between.add(event.frames):
                        writer.write(written)
                if told := _told(event, spec):
                    sender.send(pb_utils.InferenceResponse([_tensor("event", json.dumps(told).encode())]))
        return path.read_bytes()


def _fields(request: Any) -> dict[str, Any]:
    """Return the inputs that a request brings, by name; those of strings as bytes."""
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
    return {name: tensor.as_numpy().item() for name, tensor in found.items() if tensor is not None}


def _text(name: str, value: Any) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{name} is not Unicode. fix: send UTF-8.", "invalid_value", name) from error


def _kept(sources: dict[Source, bytes], folder: Path) -> Path | None:
    """Write the file that a video starts from; what is in it is found out by the guarded reader."""
    for kind, content in sources.items():
        path = folder / kind
        path.write_bytes(content)
        if kind == "image":
            check_pixels(path, _LIMITS.image_pixels)
        return path
    return None


def _told(event: Event, spec: Spec) -> dict[str, Any] | None:
    if isinstance(event, Step):
        return {"event": "step", "index": event.index, "count": event.count, "forecast": event.forecast}
    if isinstance(event, Frames):
        return {"event": "frames", "made": event.start + len(event.frames), "count": spec.frames}
    return None


def _tensor(name: str, content: bytes) -> Any:
    return pb_utils.Tensor(name, np.array([content], dtype=np.object_))


def _refusal(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
