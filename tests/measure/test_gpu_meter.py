"""What the GPU's meter makes of what NVML tells, on an NVML of our own: none was at hand."""

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from cvx_deploy.bench.markdown import report
from cvx_deploy.measure.memory import GpuMeter, MemoryWatch
from tests.bench.results import results


class NVMLError(Exception):
    """What NVML raises."""


@dataclass
class FakeNvml:
    """A GPU of which 5,000 bytes are used, 3,000 of them by one process and 1,500 by another."""

    pid: int
    energy: tuple[int, ...] = ()
    NVMLError: type[Exception] = NVMLError

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return "a GPU"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
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


def test_figures_of_one_run_are_never_of_two_kinds() -> None:
    """A process that NVML lost once and finds again: from then on all samples are of the whole GPU."""
    nvml = FakeNvml(pid=os.getpid())
    meter = GpuMeter(nvml, None)
    found = [meter.used(os.getpid())]
    nvml.pid = -1
    found.append(meter.used(os.getpid()))
    nvml.pid = os.getpid()
    found.append(meter.used(os.getpid()))
    assert found == [3000, 5000, 5000]


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
