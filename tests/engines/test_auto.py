"""`--engine auto`: which engine it takes, that it says why, and that it asks this machine once."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines import auto
from cvx_deploy.engines.auto import VARIABLE, chosen
from cvx_deploy.engines.registry import SPECS
from cvx_deploy.engines.spec import EngineOptions, EngineSpec, Probe
from cvx_deploy.errors import EngineError
from cvx_deploy.kept import Kept
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress
from tests.conftest import in_precision


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(VARIABLE)
    return Bundle.open(miniature("mini"))


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the engines that are probed; onnxruntime is the slower one."""
    asked: list[str] = []

    def seconds(spec: EngineSpec, *_: Any) -> float:
        asked.append(spec.name)
        return {"onnxruntime": 0.2}.get(spec.name, 0.1)

    monkeypatch.setattr(auto, "_seconds", seconds)
    return asked


def with_spec(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    monkeypatch.setattr(auto, "SPECS", {**vars(auto)["SPECS"], name: replace(SPECS[name], **changes)})


def test_the_fastest_is_taken_and_the_machine_is_asked_once(mini: Bundle, probed: list[str]) -> None:
    notes = Notes()
    assert [chosen("auto", mini, progress=notes).engine for _ in range(2)] == ["openvino"] * 2
    assert probed == ["onnxruntime", "openvino"]
    assert "engine openvino: a block of the transformer takes 100 ms, 200 ms in onnxruntime" in notes.told


def test_twin_another_cpu_is_asked_again(mini: Bundle, probed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen("auto", mini)
    monkeypatch.setattr(auto, "cpu_name", lambda: "another")
    chosen("auto", mini)
    assert probed == ["onnxruntime", "openvino"] * 2


@pytest.mark.parametrize("kept", ["{", "3", '{"onnxruntime": 0.1}', '{"onnxruntime": "a", "openvino": 1.0}'])
def test_what_is_kept_and_makes_no_sense_is_not_believed(
    mini: Bundle, probed: list[str], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kept, "get", lambda *_: kept)
    assert chosen("auto", mini).engine == "openvino"
    assert len(probed) == 2


def test_a_real_probe_runs_one_block_on_each_engine(mini: Bundle, tmp_path: Path) -> None:
    import onnx

    block = auto._block(mini, tmp_path)
    nodes = onnx.load(tmp_path / "block.onnx").graph.node
    assert [node.op_type for node in nodes].count("Attention") == 1
    able = [SPECS["onnxruntime"], SPECS["openvino"]]
    assert all((auto._seconds(spec, block, EngineOptions(threads=1)) or 0) > 0 for spec in able)


def test_an_engine_that_fails_in_the_probe_is_not_taken(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_seconds", lambda spec, *_: None if spec.name == "openvino" else 0.1)
    assert chosen("auto", mini).engine == "onnxruntime"


def test_the_one_that_can_run_a_bundle_is_not_probed(mini: Bundle, probed: list[str]) -> None:
    if SPECS["openvino"].obstacle(in_precision(mini, "bf16").manifest):
        pytest.skip("OpenVINO does not compute in bf16 on this CPU")
    found = chosen("auto", in_precision(mini, "bf16"))
    assert found.engine == "openvino"
    assert "ONNX Runtime has no bf16 on the CPU" in found.why
    assert not probed


def test_a_gpu_goes_before_a_cpu(mini: Bundle, probed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["onnxruntime-cuda"]

    def opened(name: str, *_: Any, **__: Any) -> AbstractContextManager[None]:
        if name in there:
            return nullcontext()
        raise EngineError("nothing was compiled", fix="")

    monkeypatch.setattr(auto, "open_backend", opened)
    works: Any = {"version": lambda: "1", "probe": lambda: Probe(True, ""), "obstacle": lambda _: ""}
    with_spec(monkeypatch, "onnxruntime-cuda", **works)
    with_spec(monkeypatch, "tensorrt", **works)
    assert chosen("auto", mini).engine == "onnxruntime-cuda"
    there.append("tensorrt")
    assert chosen("auto", mini).engine == "tensorrt", "what was compiled goes first"
    assert chosen("auto", mini, EngineOptions(threads=1)).engine == "openvino", "--threads speaks of a CPU"


def test_where_none_fits_none_is_probed(mini: Bundle, probed: list[str]) -> None:
    assert chosen("auto", mini, fits=lambda _: "it takes too much").why == "it takes too much"
    assert not probed


def test_where_none_can_each_is_said_with_its_reason(mini: Bundle) -> None:
    with pytest.raises(EngineError, match=r"no engine here can run .*onnxruntime: it takes no vram.*tensorrt: "):
        chosen("auto", mini, EngineOptions(vram=1 << 30))


def test_an_environment_variable_says_what_auto_means(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "onnxruntime")
    assert Pipeline(mini).engine == "onnxruntime"
    monkeypatch.setenv(VARIABLE, "onyx")
    with pytest.raises(EngineError, match="there is no engine 'onyx'"):
        Pipeline(mini)
    assert chosen("openvino", mini).engine == "openvino", "a name means itself"
