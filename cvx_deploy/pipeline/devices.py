"""Several devices for one run: each denoises its share of the videos, in a thread of its own."""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Queue
from typing import TypeVar

Device = TypeVar("Device")
Item = TypeVar("Item")
Work = Callable[[Device, Sequence[int]], Generator[Item, None, None]]


class _Done:
    """What a device puts after its last piece."""


def share_out(devices: Sequence[Device], count: int, work: Work[Device, Item]) -> Generator[Item, None, None]:
    """Do `count` pieces of work; piece k on device ``k % len(devices)``, each device in a thread of its own.

    Args:
        devices: One or more. With one, everything happens in the calling thread.
        count: How many pieces there are, one or more.
        work: Does the pieces it is given on a device; yields now and then, and may be closed where it yields.

    Yields:
        What the work yields, as it comes. Closed early, every device stops where it yields next.

    Raises:
        Exception: The first that any of the work raises, once the other devices have stopped where they yield.
    """
    shares = {n: range(n, count, len(devices)) for n in range(min(len(devices), count))}
    if len(shares) == 1:
        with closing(work(devices[0], shares[0])) as items:
            yield from items
        return
    stopped = threading.Event()
    arrived: Queue[Item | _Done] = Queue()

    def run(number: int) -> None:
        try:
            with closing(work(devices[number], shares[number])) as items:
                for item in items:
                    arrived.put(item)
                    if stopped.is_set():
                        return
        except BaseException:
            stopped.set()
            raise
        finally:
            arrived.put(_Done())

    with ThreadPoolExecutor(len(shares), "device") as pool:
        futures = [pool.submit(run, number) for number in shares]
        try:
            running = len(shares)
            while running:
                if isinstance(item := arrived.get(), _Done):
                    running -= 1
                else:
                    yield item
        finally:  # all are done, or one has failed, or the user interrupts
            stopped.set()
    for future in futures:
        future.result()
