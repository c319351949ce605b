"""From moments on a clock to seconds by stage, and memory by stage."""

import subprocess
import sys

import numpy as np
import pytest

from cvx_deploy.bench.results import percentile
from cvx_deploy.measure.memory import MemoryWatch, Sample, during
from cvx_deploy.pipeline.report import Span
from cvx_deploy.pipeline.timing import Trace


def trace(*spans: Span, steps: tuple[float, ...] = ()) -> Trace:
    return Trace(10.0, 20.0, spans, steps)


def test_loading_is_taken_out_of_the_stage_that_waits_for_it() -> None:
    found = trace(Span("transformer", 10, 15), Span("vae decode", 15, 18), Span("load", 10, 12), Span("load", 15, 15.5))
    assert found.stages == {"transformer": 3.0, "vae decode": 2.5, "load": 2.5}


def test_a_stage_that_comes_several_times_is_summed() -> None:
    found = trace(Span("vae decode", 10, 11), Span("write video", 11, 12), Span("vae decode", 12, 14))
    assert found.stages == {"vae decode": 3.0, "write video": 1.0}
    assert found.first_frame == 1.0


def test_step_seconds_leave_out_the_first_step() -> None:
    assert trace(steps=(11.0, 12.0, 14.0)).step_seconds == [1.0, 2.0]


@pytest.mark.parametrize("percent", [50, 95])
@pytest.mark.parametrize("count", [2, 3, 49])
def test_percentiles_are_numpys(percent: int, count: int) -> None:
    values = list(np.random.default_rng(count).random(count))
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_stage_shorter_than_the_interval_still_has_samples() -> None:
    samples = [Sample(moment, resident, resident) for moment, resident in ((1.0, 5), (2.0, 7), (3.0, 6))]
    assert [sample.resident for sample in during(samples, 1.2, 1.3)] == [5, 7]
    assert [sample.resident for sample in during(samples, 1.5, 2.5)] == [5, 7, 6]


def test_memory_that_a_process_takes_is_seen() -> None:
    size = 64 << 20
    # A process of its own: in this one, other tests' garbage may be freed in the middle.
    code = f"print(flush=True); input(); block = bytearray(b'x') * {size}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        with MemoryWatch(child.pid) as before:
            pass
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        with MemoryWatch(child.pid) as watch:
            pass
        child.kill()
    assert watch.private_bytes - before.private_bytes > 0.9 * size
    assert watch.peak_bytes >= watch.private_bytes
