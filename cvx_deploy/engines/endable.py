"""One long call of an engine that signals can end: it runs beside the main thread, which hears of them."""

import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")
_BEGUN = 10  # pieces of waiting after which a thread that was started has begun
_LISTENING = 0.1  # seconds between two chances for a signal's handler


def endable(call: Callable[[], _Result], end: Callable[[], object]) -> _Result:
    """Return what `call` returns, or raise what it raises.

    Python runs the handlers of signals in its main thread, between two of its own instructions. A call that stays in
    an engine for minutes would keep them waiting; so the call is made in a thread, and the main thread waits in short
    pieces.

    Args:
        call: What takes long, and lets other threads run meanwhile.
        end: Makes `call` come back soon, from another thread. It is called when a signal's handler raises.
    """
    outcome: list[_Result] = []
    failure: list[BaseException] = []
    # Not `Thread.join`: in Python 3.11 one that a signal's handler leaves takes the thread for ended.
    done = threading.Event()

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="engine", daemon=True)
    try:
        thread.start()  # which waits, and can be interrupted, too
        while not done.wait(_LISTENING):
            pass
    except BaseException:
        end()
        waited = 0
        # What it works on must not go before; a thread that never began is not waited for.
        while not done.wait(_LISTENING) and (thread.ident is not None or waited < _BEGUN):
            waited += 1
        raise
    if failure:
        raise failure[0]
    return outcome[0]
