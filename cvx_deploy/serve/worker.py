"""The process that makes videos on one device: it is told jobs in JSON lines, and tells what happens.

It hears on stdin and tells on stdout, and ends with its server: when stdin ends. It is told the settings first
(`ServeSettings.for_worker`), then ``{"job": ..., "spec": ..., "folder": ...}``, ``{"cancel": ID}`` and ``{"stop":
true}``. Its own lines each have an ``event``.
"""

import contextlib
import fcntl
import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from cvx_deploy.errors import CvxError, OutOfMemoryError
from cvx_deploy.files import open_lock
from cvx_deploy.longer.chain import Chain, ClipMade
from cvx_deploy.pipeline.events import Denoised, Frames, Step
from cvx_deploy.pipeline.pipeline import Pipeline
from cvx_deploy.serve.faults import code_of
from cvx_deploy.serve.files import JobFiles, Output, fingerprint
from cvx_deploy.serve.jobs import Spec
from cvx_deploy.terminal import reason

_NICE = 5  # the server, which answers everybody, goes first
_PATIENCE = 0.4  # seconds until a step that is to end is ended in its middle
_WARM_STEPS = 2
_EVERY = 5  # steps between two saved points, at the least
_SIDES = ("height", "width")
_LEVELS = 16  # frames whose brightness and colour what follows them is held at
_DENOISED = 95  # percent of progress when the latents are finished


class _EndedError(Exception):
    """The job is to end, by the wish of a client or of the server."""


class Worker:
    """Makes one video after the other, with networks that stay loaded.

    Args:
        settings: See `ServeSettings.for_worker`.
        out: Where events are told.
    """

    def __init__(self, settings: dict[str, Any], out: TextIO) -> None:
        self._settings, self._out = settings, out
        self._told: queue.Queue[dict[str, Any]] = queue.Queue()
        self._pipelines: dict[str, Pipeline] = {}
        self._lock = threading.Lock()
        self._job: str | None = None
        self._wish: str | None = None  # cancelled or stopped
        self._early: str | None = None  # a job that is to end, and has not begun
        self._armed = False  # whether a signal may raise in the main thread now
        self._by_force = False
        self._stopping = False

    def work(self, commands: TextIO) -> None:
        """Load and try every model, then do what comes until stdin ends."""
        signal.signal(signal.SIGUSR1, self._raise)
        threading.Thread(target=self._listen, args=(commands,), daemon=True).start()
        with os.fdopen(open_lock(Path(self._settings["lock"])), "w") as lock:  # kept: its predecessor has to be gone
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                for name in self._settings["models"]:
                    self._warm(name)
            except CvxError as error:
                self._tell("broken", what=error.what, fix=error.fix)
                return
            self._tell("ready", pid=os.getpid())
            while not self._stopping and (told := self._told.get()):
                self._do(told)

    def _listen(self, commands: TextIO) -> None:
        for line in commands:
            told = json.loads(line)
            if "job" in told:
                self._told.put(told)
            else:
                self._end("stopped" if "stop" in told else "cancelled", told.get("cancel"))
        os._exit(0)  # the server has gone

    def _end(self, wish: str, job: str | None) -> None:
        """End the running job: at its next step, or soon in the middle of one."""
        with self._lock:
            if wish == "stopped":
                self._stopping = True
                self._told.put({})
            if self._job is None or job not in (None, self._job):
                self._early = job
                return
            if self._wish is not None:
                return
            self._wish = wish
            if wish == "cancelled":
                threading.Timer(_PATIENCE, self._force, (self._job,)).start()

    def _force(self, job: str) -> None:
        with self._lock:
            if self._job == job and self._armed:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed, self._by_force = False, True
            raise _EndedError

    def _do(self, told: dict[str, Any]) -> None:
        identifier = told["job"]
        spec = msgspec.convert(told["spec"], Spec)
        with self._lock:
            self._job, self._wish, self._by_force = identifier, None, False
            if self._stopping or self._early == identifier:
                self._wish = "stopped" if self._stopping else "cancelled"
        files = JobFiles(Path(told["folder"]))
        try:
            self._tell("done", size=self._with_room(spec, files))
        except _EndedError:
            self._tell(self._wish or "cancelled")
        except CvxError as error:
            self._tell("failed", code=code_of(error), message=str(error))
        except MemoryError:
            self._tell("failed", code="out_of_memory_error", message="the worker has too little memory for this video")
        except Exception as error:
            self._tell("failed", code="internal_error", message=f"a fault of cvx-deploy: {reason(error)}")
        finally:
            with self._lock:
                self._job, self._armed = None, False
            if self._by_force:  # what was broken off in its middle is not trusted again
                self._close(None)

    def _with_room(self, spec: Spec, files: JobFiles) -> int:
        try:
            return self._made(spec, files)
        except OutOfMemoryError:
            if set(self._pipelines) <= {spec.model}:
                raise
        self._close(spec.model)
        return self._made(spec, files)

    def _made(self, spec: Spec, files: JobFiles) -> int:
        """Make the video and return the bytes of its files."""
        if spec.image_model is not None:
            return self._chained(spec, files, spec.image_model)
        pipeline = self._pipeline(spec.model)
        mark = fingerprint((pipeline,), spec)
        point = None if spec.cache is not None else files.point(mark)
        if point is not None:
            self._tell("resumed", taken=point.taken, count=point.count)
        saved = time.monotonic()
        with self._interruptible(), files.writing(spec) as output:
            stream = pipeline.stream(resume=point, **arguments_of(spec, _source(spec, files)))
            with closing(stream):
                for event in stream:
                    if isinstance(event, Step):
                        saved = self._after_step(event, files, mark, saved)
                    elif isinstance(event, Frames):
                        output.add(event.frames)
                        self._tell_frames(event, spec, output.preview(event.frames))
                    elif isinstance(event, Denoised) and self._wish == "cancelled":
                        raise _EndedError
        return files.finished()

    def _chained(self, spec: Spec, files: JobFiles, image_model: str) -> int:
        """Make a video of several clips, or continue one, and return the bytes of its files."""
        chain = Chain(self._pipeline(spec.model), self._pipeline(image_model))
        mark = fingerprint((chain.first, chain.then or chain.first), spec)
        parts = files.parts(mark)
        given: dict[str, Any] = {"num_frames": spec.frames, "seed": spec.seed}
        clips = len(chain.clips(spec.prompt, spec.frames, continues=spec.extends > 0))
        kept = parts.kept(clips - 1)
        if kept:
            self._tell("resumed", taken=len(kept), count=clips)
        words = {
            key: value
            for key, value in arguments_of(spec, _source(spec, files)).items()
            if key not in (*given, *_SIDES, *spec.left_open)
        }
        with self._interruptible(), files.writing(spec) as output:
            tail = _copied(spec, files, output) if spec.extends else None
            with closing(chain.stream(**words, **given, kept=kept, continued=tail)) as happening:
                for event in happening:
                    if isinstance(event, Step):
                        self._after_step(event, files, mark, time.monotonic(), clips)
                    elif isinstance(event, ClipMade):
                        parts.keep(event.clip.index, event.pixels)
                        self._tell("saved", progress=_DENOISED * (event.clip.index + 1) // clips)
                    elif isinstance(event, Frames):
                        output.add(event.frames)
                        made = spec.extends + event.start + len(event.frames)
                        self._tell(
                            "frames",
                            start=event.start,
                            made=made,
                            count=spec.extends + spec.frames,
                            progress=_DENOISED * made // (spec.extends + spec.frames),
                            preview=output.preview(event.frames),
                        )
        return files.finished()

    def _after_step(self, step: Step, files: JobFiles, mark: str, saved: float, clips: int = 1) -> float:
        """Tell of a step, save its point where that is due, and return when one was saved last."""
        taken = step.index + 1
        progress = _DENOISED * (step.video * step.count + taken) // (clips * step.count)
        self._tell("step", index=step.index, count=step.count, forecast=step.forecast, progress=progress)
        if self._wish == "cancelled":
            raise _EndedError
        late = time.monotonic() - saved >= self._settings["point_seconds"]  # a short job costs less than its points
        due = late and (taken % _EVERY == 0 or taken == step.count)
        if step.point is not None and (due or self._wish == "stopped"):
            files.save_point(mark, step.point)
            self._tell("saved", progress=progress)
            saved = time.monotonic()
        if self._wish == "stopped":
            raise _EndedError
        return saved

    def _tell_frames(self, event: Frames, spec: Spec, preview: str) -> None:
        made = event.start + len(event.frames)
        progress = _DENOISED + (99 - _DENOISED) * made // spec.frames
        self._tell("frames", start=event.start, made=made, count=spec.frames, progress=progress, preview=preview)
        if self._wish is not None:
            raise _EndedError

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let a wish to end raise within the block."""
        if self._wish is not None:
            raise _EndedError
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _pipeline(self, name: str) -> Pipeline:
        if name not in self._pipelines:
            on_gpu = self._settings["device"] is not None
            self._pipelines[name] = Pipeline.from_bundle(
                self._settings["models"][name],
                engine=self._settings["engine"],
                devices=(self._settings["device"],) if on_gpu else (),
                threads=self._settings["threads"],
                vram=self._settings["vram"],
                cuda_graphs=self._settings["cuda_graphs"],
            )
        return self._pipelines[name]

    def _close(self, kept: str | None) -> None:
        """Free every pipeline but one."""
        for name in [name for name in self._pipelines if name != kept]:
            self._pipelines.pop(name).close()

    def _warm(self, name: str) -> None:
        """Load a model and try it, without the others where there is no room for all."""
        try:
            warm_up(self._pipeline(name))
        except OutOfMemoryError:
            if set(self._pipelines) <= {name}:
                raise
            self._close(name)
            self._warm(name)

    def _tell(self, event: str, **values: Any) -> None:
        self._out.write(json.dumps({"event": event, "job": self._job, **values}) + "\n")
        self._out.flush()


def warm_up(pipeline: Pipeline) -> None:
    """Make a video of a few steps and throw it away, so that whatever is loaded or compiled late is there."""
    shape = pipeline.bundle.shape
    picture = np.full((shape.height, shape.width, 3), 127, np.uint8)
    image = picture if pipeline.bundle.manifest.traits.task == "image-to-video" else None
    pipeline("", num_inference_steps=_WARM_STEPS, image=image)


def _copied(spec: Spec, files: JobFiles, output: Output) -> NDArray[np.uint8]:
    """Let a video that is continued come first, and return its last frames."""
    last: deque[NDArray[np.uint8]] = deque(maxlen=_LEVELS)
    for frame in files.continued(spec):
        output.copy(frame[None].astype(np.float32) / np.float32(255))
        last.append(frame)
    tail = np.stack(list(last))
    output.follow(tail[-1:].astype(np.float32) / np.float32(255))
    return tail


def _source(spec: Spec, files: JobFiles) -> NDArray[np.uint8] | None:
    """Return the image or the clip that a job starts from; None where it has none."""
    return files.source() if spec.source in ("image", "video") else None


def arguments_of(spec: Spec, source: Any) -> dict[str, Any]:
    """Return the arguments of `Pipeline.stream` for a job, and for what it starts from where it does from something."""
    arguments: dict[str, Any] = {
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt,
        "num_inference_steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "seed": spec.seed,
        "num_frames": spec.frames,
        "height": spec.height,
        "width": spec.width,
        "cache": spec.cache,
    }
    if spec.source in ("image", "video"):
        arguments[spec.source] = source
    if spec.strength is not None:
        arguments["strength"] = spec.strength
    return arguments


def main() -> None:
    """Keep stdout for events, whatever libraries print, and work."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the server tells what follows from it
    os.nice(_NICE)
    settings = json.loads(sys.stdin.readline())
    with contextlib.suppress(BrokenPipeError):
        Worker(settings, out).work(sys.stdin)
    os._exit(0)  # the thread that listens would keep stdin, and the interpreter waiting for it


if __name__ == "__main__":
    main()
