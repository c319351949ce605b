"""A call of an engine that takes for ever is ended by a signal, and nothing but the signal comes of it."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime
import pytest

from cvx_deploy.engines.endable import endable
from cvx_deploy.engines.onnxruntime.backend import OrtSession, _Memory


def test_what_the_call_returns_or_raises_comes_back() -> None:
    assert endable(lambda: 7, lambda: None) == 7
    with pytest.raises(KeyError, match="gone"):
        endable(lambda: dict[str, int]()["gone"], lambda: None)


@pytest.fixture
def interrupt() -> Iterator[None]:
    """Send Ctrl-C to this process in a moment."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    yield
    timer.join()
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("interrupt")
def test_a_signal_ends_the_call_and_is_what_is_raised() -> None:
    ended = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        endable(lambda: ended.wait(60), ended.set)
    assert ended.is_set()


@pytest.mark.usefixtures("interrupt")
def test_a_call_that_takes_a_while_to_end_has_ended_when_the_signal_is_raised() -> None:
    told, ended = threading.Event(), threading.Event()

    def slow() -> None:
        told.wait(60)
        time.sleep(1)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        endable(slow, told.set)
    assert ended.is_set()


def endless() -> bytes:
    """Return a graph whose loop goes round 2**62 times."""
    info, make = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    body = onnx.helper.make_graph(
        [make("Identity", ["c"], ["co"]), make("Neg", ["x"], ["xo"])],
        "body",
        [info("it", 7, []), info("c", 9, []), info("x", 1, [1])],
        [info("co", 9, []), info("xo", 1, [1])],
    )
    graph = onnx.helper.make_graph(
        [make("Loop", ["n", "c0", "x0"], ["y"], body=body)],
        "endless",
        [info("x0", 1, [1])],
        [info("y", 1, [1])],
        [onnx.helper.make_tensor("n", 7, [], [2**62]), onnx.helper.make_tensor("c0", 9, [], [True])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.usefixtures("interrupt")
def test_a_loop_without_end_in_onnx_runtime_can_be_ended() -> None:
    session = onnxruntime.InferenceSession(endless(), providers=["CPUExecutionProvider"])
    running = OrtSession.__new__(OrtSession)
    running._streamed = {}
    running._name, running._outputs, running._session, running._memory = "vae", ["y"], session, _Memory(None)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        running.run({"x0": np.ones(1, np.float32)})
    assert time.monotonic() - start < 20
