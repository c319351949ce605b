"""Bytes, seconds and tables as people read them."""

from collections.abc import Iterator


def size_text(count: float) -> str:
    """Return bytes in words, three digits of them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # three digits are shown
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def time_text(time: float) -> str:
    """Return seconds in words, three digits of them."""
    for unit in ("s", "ms"):
        if time >= 0.9995:
            return f"{time:.3g} {unit}"
        time *= 1000
    return f"{time:.3g} us"


def columns(rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *padded]).rstrip()
