"""Which networks stay loaded: one policy for all engines.

``resident`` keeps every network for the next run: from the second on nothing is loaded. ``phase`` keeps those of one
phase of a run (text, modulation, transformer, vae): when the next one begins, they go. With either, a network that does
not fit beside others is loaded again once those of the phases that are done have gone, and a note says so.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, get_args

from cvx_deploy.errors import OutOfMemoryError
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle

Policy = Literal["resident", "phase"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Key = tuple[str, tuple[tuple[str, int], ...]]  # role or network, and its sizes


S = TypeVar("S")


def phase(role: str) -> str:
    """Return which part of a run needs a role: text, modulation, transformer or vae."""
    return role.partition("_")[0]


@dataclass
class _Held(Generic[S]):
    role: str
    session: S
    open: int = 0  # blocks that use it now


class Residency(Generic[S]):
    """The networks that an engine has loaded.

    Args:
        policy: See this module.
        progress: Told when networks had to go because memory ran out.
        close: Frees a network.
    """

    def __init__(self, policy: Policy, progress: Progress, close: Callable[[S], None]) -> None:
        self.policy = policy
        self._progress, self._close = progress, close
        self._held: dict[Key, _Held[S]] = {}
        self._coming: dict[Key, Future[S]] = {}
        self._loader: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()

    @property
    def sessions(self) -> list[S]:
        """Every network that is loaded, the earliest first."""
        return [held.session for held in self._held.values()]

    @property
    def idle(self) -> list[S]:
        """Those that nothing uses now."""
        return [held.session for held in self._held.values() if not held.open]

    @contextmanager
    def hold(self, role: str, key: Key, load: Callable[[], S]) -> Iterator[S]:
        """Give a network for the block: the one that is there, or the one that `load` makes.

        Raises:
            OutOfMemoryError: It does not fit, even alone.
        """
        with self._lock:
            if key not in self._held:
                if self.policy == "phase":
                    self._free(self._done(role))
                self._held[key] = _Held(role, self._loaded(role, key, load))
            held = self._held[key]
            held.open += 1
        try:
            yield held.session
        finally:
            with self._lock:
                held.open -= 1

    def prefetch(self, key: Key, load: Callable[[], S]) -> None:
        """Begin to load a network in a thread of its own, while another runs; only where networks stay loaded."""
        with self._lock:
            if self.policy == "resident" and key not in self._held and key not in self._coming:
                self._loader = self._loader or ThreadPoolExecutor(1, "load")
                self._coming[key] = self._loader.submit(load)

    def let_go(self, session: S) -> None:
        """Free one network that nothing uses."""
        with self._lock:
            self._free([key for key, held in self._held.items() if held.session is session])

    def close(self) -> None:
        """Free everything, when no block uses a network any more."""
        with self._lock:
            coming, self._coming = self._coming, {}
            if self._loader is not None:
                self._loader.shutdown(cancel_futures=True)
                self._loader = None
            for future in coming.values():
                if not future.cancelled() and future.exception() is None:
                    self._close(future.result())
            self._free(list(self._held))

    def _loaded(self, role: str, key: Key, load: Callable[[], S]) -> S:
        coming = self._coming.pop(key, None)
        try:
            return load() if coming is None else coming.result()
        except OutOfMemoryError:
            done = self._done(role)
            if not done and coming is None:
                raise
            names = ", ".join(sorted({self._held[key].role for key in done}))
            self._free(done)
        if names:
            self._progress.note(f"note: {role} did not fit beside {names}, which had to go")
        return load()

    def _done(self, role: str) -> list[Key]:
        """Return the networks of other phases that nothing uses."""
        return [key for key, held in self._held.items() if not held.open and phase(held.role) != phase(role)]

    def _free(self, keys: list[Key]) -> None:
        with ExitStack() as stack:  # all of them, whatever becomes of one
            for held in [self._held.pop(key) for key in keys]:
                stack.callback(self._close, held.session)
        if keys:
            _give_memory_back()


def _give_memory_back() -> None:
    """Let the C library return to the system what has been freed: glibc keeps it, beside what is loaded next."""
    with contextlib.suppress(OSError, AttributeError):  # another C library, which may not keep it
        ctypes.CDLL(None).malloc_trim(0)


class LoadedNetworks(Generic[S]):
    """The half of a backend that loads networks by role, and keeps or frees them by a policy; see `Backend`.

    Attributes:
        bundle: What it runs.
    """

    _loads_ahead = True  # whether a network may be loaded while another one runs

    def __init__(self, bundle: "Bundle", policy: Policy, progress: Progress, close: Callable[[S], None]) -> None:
        self.bundle = bundle
        self._residency: Residency[S] = Residency(policy, progress, close)

    def load(self, role: str, sizes: Mapping[str, int]) -> AbstractContextManager[S]:
        """Give a network for the block; see `Backend.load`."""
        return self._residency.hold(role, self._key(role, sizes), partial(self._loaded, self.bundle, role, dict(sizes)))

    def prefetch(self, role: str, sizes: Mapping[str, int]) -> None:
        """See `Prefetching.prefetch`."""
        if self._loads_ahead:
            self._residency.prefetch(self._key(role, sizes), partial(self._loaded, self.bundle, role, dict(sizes)))

    def close(self) -> None:
        """Free every network."""
        self._residency.close()

    def _key(self, role: str, sizes: Mapping[str, int]) -> Key:
        return key_of(self.bundle.network_name(role), sizes)

    def _loaded(self, bundle: "Bundle", role: str, sizes: dict[str, int]) -> S:
        """Load the network of a role of a bundle, which is the one this backend saw when it was asked for."""
        raise NotImplementedError


def key_of(name: str, sizes: Mapping[str, int]) -> Key:
    """Return what a network at some sizes is kept under."""
    return name, tuple(sorted(sizes.items()))
