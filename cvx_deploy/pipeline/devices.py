"""Several devices for one run: each denoises its share of the videos, in a thread of its own."""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TypeVar

Device = TypeVar("Device")
Work = Callable[[Device, Sequence[int]], Generator[None, None, None]]


def share_out(devices: Sequence[Device], count: int, work: Work[Device]) -> None:
    """Do `count` pieces of work; piece k on device ``k % len(devices)``, each device in a thread of its own.

    Args:
        devices: One or more. With one, everything happens in the calling thread.
        count: How many pieces there are, one or more.
        work: Does the pieces it is given on a device; yields now and then, and may be closed where it yields.

    Raises:
        Exception: The first that any of the work raises, once the other devices have stopped where they yield.
    """
    shares = {n: range(n, count, len(devices)) for n in range(min(len(devices), count))}
    stopped = threading.Event()

    def run(number: int) -> None:
        with closing(work(devices[number], shares[number])) as steps:
            for _ in steps:
                if stopped.is_set():
                    return

    if len(shares) == 1:
        run(0)
        return
    with ThreadPoolExecutor(len(shares), "device") as pool:
        futures = [pool.submit(run, number) for number in shares]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # all are done, or one has failed, or the user interrupts
            stopped.set()
    for future in futures:
        future.result()
