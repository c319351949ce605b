"""What a person reads on a terminal, whatever stands in the files that it quotes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_LONGEST = 600  # characters of a line that quotes a file
LONGEST_PATH = 10 * 4096  # of a path that is printed as a result, escapes and all
_JOINERS = "\u200c\u200d"  # inside words of some scripts and of emoji: they are not printable, and harmless


def safe(value: object, limit: int = _LONGEST) -> str:
    """Return one line of plain text: what would steer a terminal or begin a line is escaped, what is long is cut.

    Args:
        value: Anything that quotes a file, a name or a library.
        limit: The longest that is shown; of more, the beginning and the end are.
    """
    text = "".join(map(_escaped, _cut(str(value), limit)))
    return _cut(text, limit)


def safe_lines(text: str) -> str:
    """Return a text of several lines, each of them safe and none of them cut."""
    return "\n".join(safe(line, max(len(line) * 10, 1)) for line in text.split("\n"))


def reason(error: BaseException, limit: int = 300) -> str:
    """Return what a library says of a failure, in one line; its kind, too, where it says next to nothing."""
    words = str(error)[: 10 * limit].split()
    return safe(" ".join(words) if len(words) > 1 else f"{type(error).__name__} {' '.join(words)}".rstrip(), limit)


@contextlib.contextmanager
def no_foreign_lines() -> Iterator[None]:
    """Let nothing that a library written in another language prints on stderr reach the terminal in this block."""
    with _MUFFLED:
        _MUFFLED.begin()
    try:
        yield
    finally:
        with _MUFFLED:
            _MUFFLED.end()


class _Muffled:
    """Stderr led to nowhere while any thread asks for it: the first one in does it, the last one out undoes it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._kept = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def begin(self) -> None:
        self._inside += 1
        if self._inside > 1:
            return
        sys.stderr.flush()
        try:
            self._kept = os.dup(2)
        except OSError:  # there is no stderr at all
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def end(self) -> None:
        self._inside -= 1
        if self._inside == 0 and self._kept >= 0:
            os.dup2(self._kept, 2)
            os.close(self._kept)
            self._kept = -1


_MUFFLED = _Muffled()


def _escaped(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    end = min(limit // 4, 100)
    return f"{text[: limit - end - 5]} ... {text[len(text) - end :]}"
