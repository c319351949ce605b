"""An export that is killed with signal 9, at any touch of the disk, leaves the old bundle or the new one, whole."""

import multiprocessing
import os
import random
import signal
import sys
from itertools import count
from pathlib import Path

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.precision import Precision
from cvx_deploy.progress import SilentProgress
from tests.command import content
from tests.conftest import Tiny
from tests.untraced import without_tracing

KILLS = 20


def export(checkpoint: Path, output: Path, precision: Precision, kill_at: int, touches: Path | None = None) -> None:
    """Export, and die at the `kill_at`-th touch of the folder around `output`; never for 0.

    Weights are copied and all else is real, but for the graphs: tracing touches nothing.
    """
    number = count(1)
    touched = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal touched
        exchange = event == "ctypes.dlsym" and args[1] == "renameat2"
        removal = event in ("os.remove", "os.rmdir")  # rmtree names what it removes relative to a folder it holds open
        if removal or exchange or any(str(word).startswith(str(output.parent)) for word in args):
            touched = next(number)
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    without_tracing(pytest.MonkeyPatch())
    sys.addaudithook(hook)
    bundle_from_checkpoint(ExportRequest("5b", checkpoint, precision=precision, copy_weights=True), output)
    if touches is not None:
        touches.write_text(str(touched))


def in_a_fork(*words: object) -> int | None:
    """Run `export` in a process forked from one that has imported everything; return how it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=export, args=words)
    process.start()
    process.join()
    return process.exitcode


def computed_in(bundle: Bundle) -> Precision:
    """Return the one precision of a bundle."""
    (precision,) = bundle.manifest.computes_in
    return precision


def other_than(precision: Precision) -> Precision:
    """Return a precision whose bundle can be told from this one's."""
    return "bf16" if precision == "fp32" else "fp32"


def test_after_a_kill_at_twenty_random_points_one_whole_bundle_is_there(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, output = tiny("5b"), tmp_path / "engines" / "5b"
    whole = {}
    for precision in ("fp32", "bf16"):
        assert in_a_fork(checkpoint, output, precision, 0, tmp_path / "touches") == 0
        whole[precision] = content(output)
    total = int((tmp_path / "touches").read_text())
    points = [total, 1, *random.Random(0).sample(range(2, total), KILLS - 2)]
    outcomes = set()
    for index, kill_at in enumerate(points):
        asked = other_than(computed_in(Bundle.open(output)))
        assert in_a_fork(checkpoint, output, asked, kill_at) == -signal.SIGKILL, kill_at
        bundle = Bundle.open(output)
        for name in bundle.manifest.weights:
            bundle.weight_path(name, SilentProgress())
        assert content(output) == whole[computed_in(bundle)], kill_at
        outcomes.add("new" if computed_in(bundle) == asked else "old")
        if index % 4 == 0:  # so that some exports meet what several killed ones left
            assert in_a_fork(checkpoint, output, asked, 0) == 0
            assert content(output) == whole[asked]
            assert list(output.parent.iterdir()) == [output], kill_at
    assert outcomes == {"old", "new"}, "kills before and after the bundles change places"
