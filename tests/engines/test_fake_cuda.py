"""The fake driver is as strict as a real one: what that refuses or spoils, it refuses."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from cvx_deploy.errors import EngineError, OutOfMemoryError
from tests.engines.fake_cuda import FakeCuda, MisuseError, Operation

NOTHING = Operation("nothing", lambda: None)


def in_thread(work: Callable[[], Any]) -> BaseException | None:
    """Run something in a thread of its own, and return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_each_thread_has_its_own_current_device() -> None:
    cuda = FakeCuda(count=2)
    cuda.use(1)
    stream = cuda.create_stream()
    cuda.kernel(stream, NOTHING)
    assert isinstance(in_thread(lambda: cuda.kernel(stream, NOTHING)), MisuseError)
    assert isinstance(in_thread(lambda: cuda.begin_capture(stream)), MisuseError)

    def on_its_gpu() -> None:
        cuda.use(1)
        cuda.kernel(stream, NOTHING)

    assert in_thread(on_its_gpu) is None


def test_memory_of_one_gpu_is_not_a_tensor_on_another() -> None:
    cuda = FakeCuda(count=2)
    address = cuda.malloc(512)
    cuda.check_address(address, "x")
    cuda.use(1)
    with pytest.raises(MisuseError, match="x lies on GPU 0, and is used on GPU 1"):
        cuda.check_address(address, "x")


def test_an_event_belongs_to_the_gpu_of_its_stream() -> None:
    cuda = FakeCuda(count=2)
    event = cuda.create_event()
    cuda.use(1)
    with pytest.raises(MisuseError, match="stream of another GPU"):
        cuda.record(event, cuda.create_stream())


CAPTURED: dict[str, Callable[[FakeCuda, int, int, int, int], Any]] = {
    "malloc": lambda cuda, stream, event, memory, host: cuda.malloc(256),
    "free": lambda cuda, stream, event, memory, host: cuda.free(memory),
    "malloc_host": lambda cuda, stream, event, memory, host: cuda.malloc_host(256),
    "free_host": lambda cuda, stream, event, memory, host: cuda.free_host(host),
    "create_stream": lambda cuda, stream, event, memory, host: cuda.create_stream(),
    "wait": lambda cuda, stream, event, memory, host: cuda.wait(stream, event),
    "synchronize_event": lambda cuda, stream, event, memory, host: cuda.synchronize_event(event),
    "synchronize": lambda cuda, stream, event, memory, host: cuda.synchronize(stream),
    "begin_capture": lambda cuda, stream, event, memory, host: cuda.begin_capture(stream),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_what_may_wait_is_refused_within_a_capture_alone(name: str) -> None:
    cuda = FakeCuda()
    stream, event, memory, host = cuda.create_stream(), cuda.create_event(), cuda.malloc(256), cuda.malloc_host(256)
    cuda.begin_capture(stream)
    with pytest.raises(MisuseError, match="during a capture"):
        CAPTURED[name](cuda, stream, event, memory, host)
    cuda.end_capture(stream)
    CAPTURED[name](cuda, stream, event, memory, host)


def test_tensors_lie_on_the_device_and_aligned() -> None:
    cuda = FakeCuda()
    memory, host = cuda.malloc(1024), cuda.malloc_host(1024)
    cuda.check_address(memory + 256, "x")
    with pytest.raises(MisuseError, match="not aligned to 256 bytes"):
        cuda.check_address(memory + 64, "x")
    with pytest.raises(MisuseError, match="not allocated"):
        cuda.check_address(host, "x")


def test_after_a_bad_access_every_call_fails() -> None:
    cuda = FakeCuda()
    stream, event, memory, host = cuda.create_stream(), cuda.create_event(), cuda.malloc(256), cuda.malloc_host(256)
    cuda.kernel(stream, NOTHING)
    cuda.crashes_in = "nothing"
    with pytest.raises(EngineError, match="memory that is not there"):
        cuda.synchronize(stream)
    later: list[Callable[[], Any]] = [
        lambda: cuda.malloc(1),
        lambda: cuda.free(memory),
        lambda: cuda.malloc_host(1),
        lambda: cuda.free_host(host),
        lambda: cuda.copy_to_device(memory, host, 256, stream),
        lambda: cuda.copy_to_host(host, memory, 256, stream),
        cuda.create_stream,
        lambda: cuda.destroy_stream(stream),
        cuda.create_event,
        lambda: cuda.destroy_event(event),
        lambda: cuda.record(event, stream),
        lambda: cuda.wait(stream, event),
        lambda: cuda.synchronize(stream),
        lambda: cuda.synchronize_event(event),
        lambda: cuda.begin_capture(stream),
        lambda: cuda.launch(1, stream),
        lambda: cuda.destroy_graph(1),
        cuda.memory_info,
    ]
    for call in later:
        with pytest.raises(EngineError, match="memory that is not there"):
            call()


def test_the_context_of_the_driver_takes_memory_too() -> None:
    cuda = FakeCuda(1000, overhead=300)
    assert cuda.memory_info() == (700, 1000)
    with pytest.raises(OutOfMemoryError):
        cuda.malloc(701)
    cuda.malloc(700)
