"""A thread for each worker: it starts the worker, hands it jobs, notes what comes of them, and starts it anew."""

import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from cvx_deploy.errors import CvxError
from cvx_deploy.progress import Progress
from cvx_deploy.serve.files import JobFiles
from cvx_deploy.serve.hub import Hub
from cvx_deploy.serve.jobs import ENDED, Job, JobStore
from cvx_deploy.serve.process import Employed, GoneError, Word, WorkerProcess
from cvx_deploy.serve.settings import ServeSettings
from cvx_deploy.terminal import safe

State = Literal["starting", "ready", "busy", "stopped"]
_TICK = 0.2  # seconds between two looks at what a worker has been told to do
_LAST_WORD = 15.0  # seconds for a worker that was told to end its job
_FULL = 1.0  # seconds between two tries to write to a disk that is full
_LONGEST_PAUSE = 60.0  # seconds between two starts of a worker that does not come up


class Slot:
    """One worker at a time, for one device.

    Attributes:
        state: What it does now.
        starts: How many there have been.
        trouble: Why it is not ready, where that is known.
    """

    def __init__(self, number: int, settings: ServeSettings, crew: "Supervisor") -> None:
        self.state: State = "starting"
        self.starts = 0
        self.trouble: CvxError | None = None
        self.job: str | None = None
        self._number, self._settings, self._crew = number, settings, crew
        self._worker: Employed | None = None
        self._deadline: float | None = None
        self.thread = threading.Thread(target=self._run, name=f"worker-{number}", daemon=True)

    def cancel(self, job: str) -> None:
        """Tell the worker to end a job, if it is at it."""
        if self.job == job:
            self._deadline = time.monotonic() + _LAST_WORD
            self._say({"cancel": job})

    def stop(self) -> None:
        """Tell the worker to save where it stands, and to end."""
        self._deadline = time.monotonic() + _LAST_WORD
        self._say({"stop": True})
        if self.state == "starting" and self._worker is not None:
            self._worker.end()

    def _run(self) -> None:
        pause = 0.5
        while not self._crew.stopping:
            try:
                self._start()
                pause = 0.5
                self._work()
            except GoneError as error:
                if not (self._crew.stopping or self._crew.given_up):
                    self._crew.progress.note(f"note: worker {self._number} {safe(error)}; it is started anew")
            finally:
                self._bury()
            if not self._crew.stopping and self.trouble is not None:
                self._crew.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        self.state = "stopped"

    def _start(self) -> None:
        self.state, self.starts = "starting", self.starts + 1
        try:
            self._worker = self._crew.hire(self._number)
            word = self._next()
        except OSError as error:
            what = f"no worker can be started: {error.strerror or error}"
            word = {"event": "broken", "what": what, "fix": f"make sure that {sys.executable} may run, and has room"}
        if word["event"] == "broken":
            self.trouble = CvxError(word["what"], fix=word["fix"])
            self._crew.broken(self)
            raise GoneError("did not come up")
        self.trouble, self.state = None, "ready"
        self._crew.announce()

    def _work(self) -> None:
        while not self._crew.stopping:
            job = self._crew.next_job()
            if job is None:
                self._check_alive()
                continue
            self.job, self.state, self._deadline = job.id, "busy", None
            try:
                self._make(job)
            except GoneError as error:
                self._gone(job, str(error))
                raise
            except (sqlite3.Error, OSError) as error:  # a full disk: what came of the job cannot be noted
                self._crew.progress.note(f"note: {job.id}: {safe(error)}; it is made again")
                self._give_back(job)
            finally:
                self.job, self.state = None, "ready"

    def _make(self, job: Job) -> None:
        """Hand a job to the worker, and note what it tells of it until it has ended."""
        store, hub = self._crew.store, self._crew.hub
        hub.changed(job.id)
        folder = str(self._crew.folder(job.id).absolute())
        self._say({"job": job.id, "spec": msgspec.to_builtins(job.spec), "folder": folder})
        if self._crew.is_cancelling(job):
            self._say({"cancel": job.id})  # asked for between the claim and now
        while True:
            word = self._next()
            match word["event"]:
                case "step" | "frames" | "resumed":
                    hub.tell(job.id, {key: value for key, value in word.items() if key != "job"})
                    continue
                case "saved":
                    store.got_further(job.id, word["progress"])
                    continue
                case "done":
                    store.complete(job.id, word["size"])
                case "failed":
                    store.fail(job.id, word["code"], word["message"])
                case "cancelled":
                    store.cancelled(job.id)
                case "stopped":
                    store.give_back(job.id, crashed=False)
            self._crew.ended(job)
            return

    def _gone(self, job: Job, why: str) -> None:
        after = self._crew.store.give_back(job.id, crashed=not self._crew.stopping)
        self._crew.progress.note(f"note: {job.id}: its worker {safe(why)}; it is {after.status.replace('_', ' ')} now")
        self._crew.ended(job)

    def _give_back(self, job: Job) -> None:
        """Let a job wait again, as soon as that can be noted."""
        while not self._crew.stopping:
            try:
                self._crew.store.give_back(job.id, crashed=False)
                return
            except (sqlite3.Error, OSError):
                self._crew.wait(_FULL)

    def _next(self) -> Word:
        """Return the next word of the worker; one that is silent for too long has to go."""
        assert self._worker is not None
        silent_since = time.monotonic()
        while (word := self._worker.heard(_TICK)) is None:
            now = time.monotonic()
            late = self._deadline is not None and now > self._deadline
            if late or now - silent_since > self._settings.patience:
                raise GoneError("hung, and was killed")
        return word

    def _check_alive(self) -> None:
        assert self._worker is not None
        self._worker.heard(0)

    def _say(self, words: Word) -> None:
        worker = self._worker
        if worker is not None:
            worker.say(words)

    def _bury(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()


class Supervisor:
    """All workers of a server.

    Args:
        settings: The server's.
        store: Where jobs come from.
        hub: Told of what happens to them.
        progress: Told of workers that come and go.
        on_broken: Called once when a worker cannot come up at all, before any has.
        hire: Starts the worker of a number; a process on this machine unless given.
    """

    def __init__(
        self,
        settings: ServeSettings,
        store: JobStore,
        hub: Hub,
        progress: Progress,
        on_broken: Callable[[CvxError], None],
        hire: Callable[[int], Employed] | None = None,
    ) -> None:
        self.store, self.hub, self.progress = store, hub, progress
        self.stopping = self.given_up = False
        self._settings, self._on_broken = settings, on_broken
        self.hire = hire or (lambda number: WorkerProcess(settings.for_worker(number)))
        self._was_ready = False
        self._news = threading.Condition()
        self.slots = [Slot(number, settings, self) for number in range(len(settings.devices))]

    def start(self) -> None:
        """Start every worker; none is ready yet."""
        for slot in self.slots:
            slot.thread.start()

    def end(self) -> None:
        """Tell every worker to save where it stands, and to end; their jobs wait for the next server."""
        if not self.stopping:
            self.stopping = True
            self.wake()
            for slot in self.slots:
                slot.stop()

    def wait_ended(self) -> None:
        """Tell them, and wait until they have."""
        self.end()
        for slot in self.slots:
            if slot.thread.ident is not None:
                slot.thread.join(2 * _LAST_WORD)

    def folder(self, job: str) -> Path:
        """Return where the files of a job lie."""
        return self._settings.data / "videos" / job

    def wake(self) -> None:
        """Tell that there is a new job."""
        with self._news:
            self._news.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait for news, or for so long."""
        with self._news:
            if not self.stopping:
                self._news.wait(seconds)

    def next_job(self) -> Job | None:
        """Return a job to make; None when there is none after a short wait."""
        if self.stopping:
            return None
        job = self.store.claim()
        if job is None:
            self.wait(_TICK)
        return job

    def is_cancelling(self, job: Job) -> bool:
        """Whether a client has asked for a job's end."""
        found = self.store.find(job.id, job.owner)
        return found is not None and found.cancelling

    def cancel(self, job: str) -> None:
        """Tell the worker that makes a job to end it."""
        for slot in self.slots:
            slot.cancel(job)

    def ended(self, job: Job) -> None:
        """Tell that a job has ended, or waits again; what only a running job needs goes with its end."""
        found = self.store.find(job.id, job.owner)
        if found is not None and found.status in ENDED:
            JobFiles(self.folder(job.id)).finished()
        self.hub.ended(job.id)

    @property
    def is_ready(self) -> bool:
        """Whether at least one worker can make videos."""
        return any(slot.state in ("ready", "busy") for slot in self.slots)

    def announce(self) -> None:
        """Say once that the first worker is ready."""
        if not self._was_ready:
            self._was_ready = True
            self.progress.note("ready")

    def broken(self, slot: Slot) -> None:
        """Note that a worker cannot come up; where none ever has, the server ends with the reason."""
        if not self._was_ready and slot.trouble is not None:
            self.given_up = True
            self._on_broken(slot.trouble)
