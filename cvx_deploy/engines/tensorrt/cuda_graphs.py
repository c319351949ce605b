"""One network's runs: queued kernel by kernel at first, and as one CUDA graph from the second run on.

A graph holds the addresses it was captured with. There is one for every set of addresses that comes again: one for a
network whose in- and outputs lie where they always lie, two for one that reads what it wrote the run before.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cvx_deploy.engines.cuda import Cuda
from cvx_deploy.errors import EngineError

Addresses = dict[str, int]
"""Name of every in- and output to where it lies."""


class Launcher:
    """Queues the runs of one execution context.

    Args:
        stream: Where they are queued.
        context: TensorRT's, with its shapes and its activation block set.
        graphs: Whether runs that come again are captured.
        refused: Called once, when the library does not let its runs be captured.
        failure: Returns the error that says why the library refused a run.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        context: Any,
        *,
        graphs: bool,
        refused: Callable[[], None],
        failure: Callable[[], EngineError],
    ) -> None:
        self._cuda, self._stream, self._context = cuda, stream, context
        self._wanted, self._refused, self._failure = graphs, refused, failure
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], int] = {}

    def run(self, addresses: Addresses) -> None:
        """Queue one run with these addresses."""
        key = tuple(addresses.values())
        if key not in self._graphs:
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._failure()
            # The library sets itself up in a plain run, which a capture must not record.
            if not (self._wanted and key in self._seen and self._capture(key)):
                self._seen.add(key)
                if not self._context.execute_async_v3(self._stream):
                    raise self._failure()
                return
        self._cuda.launch(self._graphs[key], self._stream)

    def _capture(self, key: tuple[int, ...]) -> bool:
        # TensorRT for RTX can say so beforehand; the full library has no such method.
        capturable = getattr(self._context, "is_stream_capturable", lambda _: True)
        graph = self._captured() if capturable(self._stream) else None
        if graph is None:
            self._wanted = False
            self._refused()
            return False
        self._graphs[key] = graph
        return True

    def _captured(self) -> int | None:
        self._cuda.begin_capture(self._stream)
        try:
            accepted = self._context.execute_async_v3(self._stream)
        except BaseException:
            with suppress(EngineError):  # or the stream would go on capturing, and refuse all that is to come
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        try:
            graph = self._cuda.end_capture(self._stream)
        except EngineError:
            return None
        if not accepted:
            self._cuda.destroy_graph(graph)
            return None
        return graph

    def forget(self) -> None:
        """Let go of all graphs, none of which may be running: an address they hold is about to go."""
        for graph in self._graphs.values():
            self._cuda.destroy_graph(graph)
        self._graphs.clear()
        self._seen.clear()
