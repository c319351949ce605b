"""Bytes and seconds as people read them."""


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
