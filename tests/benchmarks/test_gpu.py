"""What is to be run on a GPU goes through to its end without one, and a part that goes wrong says so."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.progress import SilentProgress
from tests.conftest import ROOT, Exported
from tests.engines.fake_cuda import FakeCuda

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import gpu_backend
import gpu_flops


def arguments(output: Path, **given: Any) -> argparse.Namespace:
    common = {"bundle": output, "parts": ["facts"], "minutes": 5.0, "rehearse": True, "runtime": None, "part": None}
    return argparse.Namespace(output=output, **(common | given))


def test_every_call_of_the_driver_is_tried_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(2**30)
    monkeypatch.setattr(gpu, "_rehearsed_driver", lambda: cuda)
    found = gpu.driver(arguments(tmp_path))
    assert not [check for check, said in found.items() if str(said).startswith("FAILED")]
    assert found["graph"] == "launched twice, right twice"
    assert all("refused" in said for said in found["refused_capture"].values())
    cuda.assert_clean()


def test_twin_bytes_that_change_on_their_way_are_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(2**30)
    monkeypatch.setattr(gpu, "_rehearsed_driver", lambda: cuda)
    monkeypatch.setattr(cuda, "synchronize", lambda stream: cuda.abandon())
    found = gpu.driver(arguments(tmp_path))
    assert found["copies"] == "FAILED: ValueError: bytes changed on their way"
    assert found["out_of_memory"].startswith("stated"), "the others go on"


def test_twin_a_driver_that_gives_what_is_not_there_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(2**30)
    monkeypatch.setattr(gpu, "_rehearsed_driver", lambda: cuda)
    monkeypatch.setattr(cuda, "malloc", lambda nbytes: 4096 + 1)
    found = gpu.driver(arguments(tmp_path))
    assert found["out_of_memory"].startswith("FAILED")
    assert found["addresses"].startswith("FAILED")


def test_the_backend_computes_on_a_driver_what_the_host_does(tmp_path: Path) -> None:
    found = gpu.backend(arguments(tmp_path))
    assert set(found) == {"kernel by kernel", "with graphs"}
    assert all(one["steps_right"] and one["chunks_right"] and not one["refused"] for one in found.values())


def test_twin_a_kernel_that_adds_wrongly_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_backend.mixed
    monkeypatch.setattr(gpu_backend, "_chunks", lambda _: True)
    monkeypatch.setattr(
        gpu_backend, "mixed", lambda inputs, shape: right(inputs, shape) + (len(shape) == 1)
    )  # what is computed on the device is flat
    with pytest.raises(ValueError, match="other values than on the host: kernel by kernel, with graphs"):
        gpu.backend(arguments(tmp_path))


def test_the_plan_in_the_docstring_is_what_the_limits_say() -> None:
    minutes, start = {}, 0
    for part, seconds in gpu.LIMITS.items():
        minutes[part] = f"{start // 60}:{start % 60:02}"
        start += seconds
    assert gpu.__doc__ is not None
    told = {part: time for time, part in re.findall(r"^    (\d+:\d\d) +(\w+)", gpu.__doc__, re.MULTILINE)}
    assert told == minutes | {"end": f"{start // 60}:{start % 60:02}"}
    assert start <= 14 * 60
    assert list(gpu.PARTS) == list(gpu.LIMITS)


def test_operations_are_those_of_products_convolutions_and_attention(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 23]>
        g (float[2,3,5] x, float[5,7] w, float[1,4,6,8] q, float[1,4,9,8] k, float[1,2,5,5] p, float[3,2,2,2] f)
          => (float[2,3,7] y, float[1,4,6,8] a, float[1,3,4,4] c) {
            y = MatMul(x, w)
            a = Attention(q, k, k)
            c = Conv(p, f)
        }"""
    )
    products, attention, convolution = 2 * 2 * 3 * 5 * 7, 4 * 4 * 6 * 9 * 8, 2 * 3 * 4 * 4 * 2 * 2 * 2
    assert gpu_flops.flops(graph) == products + attention + convolution
    assert gpu_flops.rate(2 * 10**12, 4.0, tmp_path) == {"tflops": 0.5}
    (tmp_path / "facts.json").write_text('{"bf16_tflops": 2}')
    assert gpu_flops.rate(2 * 10**12, 4.0, tmp_path) == {"tflops": 0.5, "of_measured": 0.25}


def test_a_part_that_is_done_is_not_run_again_and_one_that_failed_is(tmp_path: Path) -> None:
    asked = arguments(tmp_path)
    [(part, result)] = gpu.run_parts(asked)
    assert (part, result["ended"], result["rehearsed"]) == ("facts", "done", True)
    assert list(gpu.run_parts(asked)) == []
    (tmp_path / "facts.json").write_text(json.dumps({"ended": "failed: ..."}))
    assert [result["ended"] for _, result in gpu.run_parts(asked)] == ["done"]


def test_a_part_that_fails_or_takes_too_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = arguments(tmp_path, parts=["transformer"], bundle=tmp_path / "none")
    [(_, result)] = gpu.run_parts(lost)
    assert result["ended"].startswith("failed: ")
    assert "none" in result["ended"]
    monkeypatch.setitem(gpu.LIMITS, "facts", 0.01)
    [(_, result)] = gpu.run_parts(arguments(tmp_path))
    assert result["ended"].startswith("stopped after")
    assert [ended["ended"] for _, ended in gpu.run_parts(arguments(tmp_path, minutes=0))] == ["left out: no time"]


def test_random_weights_stand_in_for_those_that_are_missing(exported: Exported, tmp_path: Path) -> None:
    source = exported("5b", frames=9)
    shutil.copytree(source.path, tmp_path / "bundle")
    place = tmp_path / "bundle" / "bundle.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"checkpoint": str(tmp_path / "gone")}))
    bundle = Bundle.open(tmp_path / "bundle")
    gpu.make_weights(bundle)
    for name, entry in bundle.manifest.weights.items():
        path = bundle.weight_path(name, SilentProgress())
        assert path.stat().st_size == entry.size
        halves = np.fromfile(path, np.uint16)[:1000].astype(np.uint32) << 16
        assert np.isfinite(halves.view(np.float32)).all()
