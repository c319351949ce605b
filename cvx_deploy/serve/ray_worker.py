"""Workers that Ray puts on the nodes of its cluster, as the supervisor sees them."""

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cvx_deploy import __version__
from cvx_deploy.bundle.schema import leads_outside
from cvx_deploy.cluster.bundles import Known
from cvx_deploy.files import staged_file
from cvx_deploy.serve.files import JobFiles
from cvx_deploy.serve.node import Files, NodeWorker
from cvx_deploy.serve.process import GoneError, Word
from cvx_deploy.serve.settings import ServeSettings
from cvx_deploy.terminal import reason


class RayWorkers:
    """Hires workers: each takes a GPU, or `cpus` CPUs, of whatever node has them; it waits where none has.

    Args:
        settings: The server's.
        cpus: That one takes; 0 where it takes a GPU.
        source: The actor that has the bundles.
    """

    def __init__(self, settings: ServeSettings, cpus: int, source: Any) -> None:
        self._settings, self._source = settings, source
        self._bundles = {name: Known.of(bundle) for name, bundle in settings.models.items()}
        self._actors = ray.remote(concurrency_groups={"hearing": 1, "saying": 1})(NodeWorker).options(
            num_cpus=cpus,
            num_gpus=0 if cpus else 1,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )

    def hire(self, number: int) -> "RayWorker":
        """Start the worker of a number."""
        told = self._settings.for_worker(number)
        told["device"] = None if told["device"] is None else 0  # the one that Ray shows it
        return RayWorker(self._actors.remote(told, self._bundles, self._source, __version__))


class RayWorker:
    """See `serve.process.Employed`.

    Args:
        actor: A `NodeWorker`.
    """

    def __init__(self, actor: Any) -> None:
        self._actor, self._folder = actor, Path()
        self._starting = True
        self._next = actor.start.options(concurrency_group="hearing").remote()

    def say(self, words: Word) -> None:
        """Send words, and with a job the files that its folder on the server has."""
        files: Files = {}
        if "job" in words:
            self._folder = Path(words["folder"])
            there = JobFiles(self._folder)
            files = {name: path.read_bytes() for name, path in (there.kept() | there.sources()).items()}
        self._actor.say.options(concurrency_group="saying").remote(words, files)

    def heard(self, seconds: float) -> Word | None:
        """Return the next word, after its files are in the job's folder on the server.

        Raises:
            OSError: They cannot be written.
        """
        if not ray.wait([self._next], timeout=seconds)[0]:
            return None
        try:
            found = ray.get(self._next)
        except RayError as error:
            raise GoneError(f"was lost with its node or its process ({reason(error)})") from error
        self._next = self._actor.hear.options(concurrency_group="hearing").remote()
        if self._starting:
            self._starting = False
            return None if found is None else Word(found)
        if found is None:
            return None
        word, files = found
        if word["event"] == "gone":
            raise GoneError(word["why"])
        self._keep(files)
        return Word(word)

    def end(self) -> None:
        """Let Ray end the actor, and with it its process."""
        ray.kill(self._actor)

    def _keep(self, files: Files) -> None:
        for name, content in files.items():
            if leads_outside(name):
                raise GoneError("sent a file that no worker makes")
            with staged_file(self._folder / name) as temporary:
                temporary.write_bytes(content)
