"""What the GPU's meter makes of what NVML tells, on an NVML of our own: none was at hand."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from cvx_deploy.bench.markdown import report
from cvx_deploy.measure.memory import GpuMeter, MemoryWatch, _handle
from tests.bench.results import results


class NVMLError(Exception):
    """What NVML raises."""


@dataclass
class FakeNvml:
    """A GPU of which 5,000 bytes are used, 3,000 of them by one process and 1,500 by another."""

    pid: int
    energy: tuple[int, ...] = ()
    failing: bool = False
    NVMLError: type[Exception] = NVMLError

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return "a GPU"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        if self.failing:
            raise NVMLError
        others = SimpleNamespace(pid=1, usedGpuMemory=1500)
        return [others, SimpleNamespace(pid=self.pid, usedGpuMemory=3000)]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=5000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        if not self.energy:
            raise NVMLError
        first, *self.energy = self.energy  # type: ignore[assignment]
        return first


def test_memory_is_the_processs_own_among_several() -> None:
    meter = GpuMeter(FakeNvml(pid=os.getpid()), None)
    with MemoryWatch(interval=0.001, gpu=meter) as watch:
        pass
    assert {sample.gpu for sample in watch.samples} == {3000}
    assert meter.method == "NVML, of the process"


def test_memory_is_the_whole_gpus_where_it_does_not_and_the_method_says_so() -> None:
    meter = GpuMeter(FakeNvml(pid=-1), None)
    assert meter.used(os.getpid()) == 5000
    assert meter.method.startswith("NVML, all that is used on the GPU")


def test_a_process_that_has_not_begun_to_use_the_gpu_uses_nothing_and_spoils_nothing() -> None:
    meter = GpuMeter(FakeNvml(pid=os.getpid()), None)
    with subprocess.Popen(["sleep", "60"]) as other:
        assert meter.used(other.pid) == 0, "NVML names this process, which started it"
        other.kill()
    assert meter.used(os.getpid()) == 3000
    assert meter.method == "NVML, of the process"


def test_samples_from_before_a_process_is_named_do_not_count_what_others_use() -> None:
    nvml = FakeNvml(pid=-1)
    with MemoryWatch(interval=0.001, gpu=GpuMeter(nvml, None)) as watch:
        wait_for(lambda: bool(watch.samples))
        nvml.pid = os.getpid()
    assert {sample.gpu for sample in watch.samples} == {0, 3000}


def test_an_error_of_nvml_costs_a_sample_and_not_the_series() -> None:
    nvml = FakeNvml(pid=os.getpid(), failing=True)
    with MemoryWatch(interval=0.001, gpu=GpuMeter(nvml, None)) as watch:
        wait_for(lambda: bool(watch.samples))
        nvml.failing = False
        wait_for(lambda: watch.samples[-1].gpu is not None)
    assert watch.samples[0].gpu is None or watch.samples[0].gpu == 0
    assert watch.samples[-1].gpu == 3000


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds, or fail after a while."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_figures_of_one_run_are_never_of_two_kinds() -> None:
    """A process that NVML lost once and finds again: what others use is not taken for its own."""
    nvml = FakeNvml(pid=os.getpid())
    meter = GpuMeter(nvml, None)
    found = [meter.used(os.getpid())]
    nvml.pid = -1
    found.append(meter.used(os.getpid()))
    nvml.pid = os.getpid()
    found.append(meter.used(os.getpid()))
    assert found == [3000, 0, 3000]


def test_energy_is_what_a_counter_of_millijoules_grew_by() -> None:
    meter = GpuMeter(FakeNvml(pid=1, energy=(7_000, 9_500)), None)
    before, after = meter.joules(), meter.joules()
    assert before is not None
    assert after is not None
    assert after - before == 2.5


def test_energy_is_none_where_there_is_no_counter() -> None:
    assert GpuMeter(FakeNvml(pid=1), None).joules() is None


def test_report_shows_what_a_gpu_took() -> None:
    found = results()
    for peer in found.peers:
        peer.runs[:] = [replace(run, gpu={"transformer": 3_000_000_000}, joules=120.0) for run in peer.runs]
    assert "| GPU peak | energy | PSNR |" in report(found)
    assert "| 3 GB | 120 J |" in report(found)
    assert "GPU peak" not in report(results())


@pytest.mark.parametrize(
    ("shown", "device", "asked"),
    [("", 1, ("index", 1)), ("3,1", 1, ("index", 1)), ("3,1", 0, ("index", 3)), ("GPU-a, GPU-b", 1, ("uuid", "GPU-b"))],
)
def test_a_device_is_the_one_that_cuda_shows_under_its_number(
    monkeypatch: pytest.MonkeyPatch, shown: str, device: int, asked: tuple[str, object]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda number: ("index", number),
        nvmlDeviceGetHandleByUUID=lambda name: ("uuid", name),
    )
    assert _handle(nvml, device) == asked
