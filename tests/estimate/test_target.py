"""Which precision is chosen for a machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from cvx_deploy.engines.gpus import GPUS, gpu_named
from cvx_deploy.errors import EngineError
from cvx_deploy.estimate import target
from cvx_deploy.estimate.target import precision_for
from cvx_deploy.exporters.export import ExportRequest
from cvx_deploy.families.registry import MODELS
from cvx_deploy.quantize.recipe import Recipe
from cvx_deploy.shape import Shape
from tests.command import cvx


def chosen(name: str, model: str = "5b", *, calibrated: bool = False, shape: Shape | None = None) -> str:
    return precision_for(name, MODELS[model], shape, calibrated=calibrated).precision


def test_a_gpu_gets_what_it_multiplies_fast_and_has_room_for() -> None:
    assert chosen("h100") == "bf16"
    assert chosen("h100", "2b") == "fp16"
    assert chosen("t4", "2b") == "fp16", "it has no bf16"
    assert chosen("h100", calibrated=True) == "fp8/bf16"
    assert chosen("a100", calibrated=True) == "int8/bf16", "it has no fp8"


def test_twin_with_less_memory_weights_have_fewer_bits() -> None:
    by_memory = [chosen(name) for name in ("rtx4090", "rtx4070")]
    assert by_memory == ["bf16", "int8wo/bf16"]
    assert chosen("rtx4070", shape=Shape(9, 240, 368)) == "bf16", "a small video leaves room"


def test_every_choice_is_a_precision_and_says_why() -> None:
    for gpu in GPUS:
        found = precision_for(gpu.name, MODELS["1.5-5b"], Shape(9, 480, 720), calibrated=gpu.memory < 30e9)
        assert str(Recipe.parse(found.precision, "bf16"))
        assert found.why


def test_a_cpu_gets_bf16_where_it_is_faster_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "bf16_speedup", lambda: 3.0)
    recipe = Recipe.parse(chosen("cpu"), "bf16")
    assert (recipe.transformer.compute, recipe.text_encoder.scheme) == ("bf16", "int8wo")


@pytest.mark.parametrize(("gain", "why"), [(0.6, "1.7 times as long"), (0.0, "has no bf16")])
def test_twin_elsewhere_it_gets_fp32(monkeypatch: pytest.MonkeyPatch, gain: float, why: str) -> None:
    monkeypatch.setattr(target, "bf16_speedup", lambda: gain)
    assert chosen("cpu") == "int8wo/fp32"
    assert chosen("cpu", calibrated=True) == "int8/fp32"
    assert why in precision_for("cpu", None, None, calibrated=False).why


def test_a_gpu_that_nobody_knows_is_refused_with_those_that_are_close() -> None:
    with pytest.raises(EngineError, match=r"GPU called rtx4091.*RTX 4090.*or cpu for this machine's"):
        chosen("rtx4091")


def test_export_takes_it_and_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ExportRequest] = []

    def refused(request: ExportRequest, *_: object) -> None:
        asked.append(request)
        raise EngineError("that is all", fix="none")

    monkeypatch.setattr("cvx_deploy.exporters.export.bundle_from_checkpoint", refused)
    words = ["export", "--model", "mini", "--output", tmp_path / "b", "--for", "h100"]
    assert "for h100: --precision bf16: what H100" in cvx(*words).err
    assert [request.precision for request in asked] == ["bf16"]
    wrong = cvx(*words, "--precision", "fp32")
    assert wrong.code == 2
    assert "give --precision or --for" in wrong.err


def test_what_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(gpu_named("rtx4070"), memory=1 << 30)
    monkeypatch.setattr(target, "gpu_named", lambda _: tiny)
    with pytest.raises(EngineError, match=r"5b at 49x480x720 does not fit into the 1.07 GB of RTX 4070"):
        chosen("rtx4070")
