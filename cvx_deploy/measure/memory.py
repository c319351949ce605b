"""The memory of a process while it works, on the host through psutil and on a GPU through NVML, sample by sample."""

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil

_WHOLE_GPU = "NVML, all that is used on the GPU: NVML does not tell processes apart here"
_ONE_PROCESS = "NVML, of the process"


@dataclass(frozen=True)
class Sample:
    """The memory of a process at one moment.

    Attributes:
        moment: On the system's monotonic clock, in seconds.
        resident: Bytes of host memory, mapped files included.
        private: Without what can be dropped and read again, as mapped weights can.
        gpu: Bytes of GPU memory; None without a GPU, or where NVML failed at that moment.
    """

    moment: float
    resident: int
    private: int
    gpu: int | None = None


class GpuMeter:
    """A GPU's memory and energy, through NVML.

    Attributes:
        method: How memory is counted: of the process as soon as NVML has named one of this program's own, as it does
            not within some containers.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name = str(nvml.nvmlDeviceGetName(handle))
        self.driver = str(nvml.nvmlSystemGetDriverVersion())
        self.method = _WHOLE_GPU

    @classmethod
    def open(cls, device: int = 0) -> "GpuMeter | None":
        """Return the meter of a GPU; None where there is no GPU, driver or NVML binding."""
        try:
            import pynvml as nvml
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            return cls(nvml, _handle(nvml, device))
        except nvml.NVMLError:
            return None

    def used(self, pid: int) -> int | None:
        """Return the bytes that a process uses, or all that are used until NVML names processes of this program.

        A process that has not begun to use the GPU uses 0. None where NVML fails, which it may do now and then.
        """
        try:
            named = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            used = {process.pid: int(process.usedGpuMemory) for process in named if process.usedGpuMemory}
            if self.method == _WHOLE_GPU and not used.keys().isdisjoint(_own_processes(pid)):
                self.method = _ONE_PROCESS
            if self.method == _ONE_PROCESS:
                return used.get(pid, 0)
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError:
            return None

    def joules(self) -> float | None:
        """Return what the GPU has used since its driver was loaded; None where it does not say."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None


def _own_processes(pid: int) -> set[int]:
    """Return a process, this one, and all that it has started."""
    return {pid, os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}


def _handle(nvml: Any, device: int) -> Any:
    """Return NVML's handle of a CUDA device: CUDA_VISIBLE_DEVICES numbers those that CUDA shows, NVML all there are."""
    shown = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    named = shown[device] if device < len(shown) else str(device)
    if named.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(named))
    return nvml.nvmlDeviceGetHandleByUUID(named)


class MemoryWatch:
    """Samples the memory of a process while a block lasts.

    Args:
        pid: The process; this one by default.
        interval: Seconds between samples.
        gpu: Where its GPU memory is read; None for host memory alone.
    """

    def __init__(self, pid: int | None = None, interval: float = 0.1, gpu: GpuMeter | None = None) -> None:
        self.samples: list[Sample] = []
        self._process = psutil.Process(pid or os.getpid())
        self._interval, self._gpu = interval, gpu
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """The most resident memory, mapped files included."""
        return max((sample.resident for sample in self.samples), default=0)

    @property
    def private_bytes(self) -> int:
        """The most that cannot be dropped and read again: what the machine must have."""
        return max((sample.private for sample in self.samples), default=0)

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._done.wait(0 if not self.samples else self._interval)
            try:
                self._take()
            except psutil.NoSuchProcess:
                return
            except (psutil.Error, OSError):  # a sample that fails is left out, and the watch goes on
                continue

    def _take(self) -> None:
        before = None if self._gpu is None else self._gpu.method
        sample = self._sample()
        if self._gpu is not None and self._gpu.method != before:  # until now others' memory was counted as well
            self.samples = [replace(earlier, gpu=0) for earlier in self.samples]
        self.samples.append(sample)

    def _sample(self) -> Sample:
        memory = self._process.memory_info()
        # Linux counts mapped files as shared; elsewhere all that is resident counts.
        private = memory.rss - getattr(memory, "shared", 0)
        gpu = None if self._gpu is None else self._gpu.used(self._process.pid)
        return Sample(time.monotonic(), memory.rss, private, gpu)


def during(samples: Iterable[Sample], start: float, end: float) -> list[Sample]:
    """Return the samples between two moments, and the last before and the first after: a stage may be short."""
    ordered = list(samples)
    before = [sample for sample in ordered if sample.moment < start][-1:]
    after = [sample for sample in ordered if sample.moment > end][:1]
    return [*before, *(sample for sample in ordered if start <= sample.moment <= end), *after]
