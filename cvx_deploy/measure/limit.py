"""How much memory this process may have."""

import contextlib
import os
import sys
from pathlib import Path

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit() -> tuple[int, str]:
    """Return the bytes of memory that this process may have, and what says so: the machine, or a limit set on it."""
    limits: list[tuple[int, str]] = []
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on Windows
        limits.append((os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine has"))
    for place in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # it says "max" where there is none
            limits.append((int(Path(place).read_text(encoding="ascii")), "the control group of this process allows"))
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            soft, _ = resource.getrlimit(kind)
            if soft != resource.RLIM_INFINITY:
                limits.append((soft, "ulimit allows"))
    return min(limits, default=(sys.maxsize, "there is"))
