"""The GPU's meter, on an NVML of our own: none was at hand."""

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from cvx_deploy.bench.markdown import report
from cvx_deploy.measure.memory import GpuMeter, MemoryWatch
from tests.bench.results import results


class NVMLError(Exception):
    """What NVML raises."""


@dataclass
class FakeNvml:
    """A GPU of which 5,000 bytes are used, 3,000 of them by one process."""

    pid: int
    energy: bool = True
    NVMLError: type[Exception] = NVMLError

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return "a GPU"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=self.pid, usedGpuMemory=3000)]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=5000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        if not self.energy:
            raise NVMLError
        return 7000


def test_memory_is_the_processs_where_nvml_knows_it() -> None:
    meter = GpuMeter(FakeNvml(pid=os.getpid()), None)
    with MemoryWatch(interval=0.001, gpu=meter) as watch:
        pass
    assert {sample.gpu for sample in watch.samples} == {3000}
    assert meter.method == "NVML, of the process"


def test_memory_is_the_whole_gpus_where_it_does_not_and_the_method_says_so() -> None:
    meter = GpuMeter(FakeNvml(pid=-1), None)
    assert meter.used(os.getpid()) == 5000
    assert meter.method.startswith("NVML, all that is used on the GPU")


@pytest.mark.parametrize(("offered", "joules"), [(True, 7.0), (False, None)])
def test_energy_is_none_where_it_is_not_offered(offered: bool, joules: float | None) -> None:
    assert GpuMeter(FakeNvml(pid=1, energy=offered), None).joules() == joules


def test_report_shows_what_a_gpu_took() -> None:
    found = results()
    for peer in found.peers:
        peer.runs[:] = [replace(run, gpu={"transformer": 3_000_000_000}, joules=120.0) for run in peer.runs]
    assert "| GPU peak | energy | PSNR |" in report(found)
    assert "| 3 GB | 120 J |" in report(found)
    assert "GPU peak" not in report(results())
