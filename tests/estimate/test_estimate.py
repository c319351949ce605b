"""The plan: what fits, what it costs, and that nothing needs to be there for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.engines.gpus import gpu_named
from cvx_deploy.errors import ShapeError
from cvx_deploy.estimate.estimate import plan
from cvx_deploy.estimate.memory import PRECISIONS, PrecisionName
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.shape import Shape
from tests.command import cvx
from tests.conftest import Exported

SHAPE = Shape(49, 480, 720)


def told(*words: object) -> dict[str, Any]:
    outcome = cvx("plan", *words, "--json")
    assert outcome.code == 0, outcome
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_has_a_plan_for_every_precision(name: str, tmp_path: Path) -> None:
    found = told("--model", name, "--engines-dir", tmp_path)
    assert list(found["precisions"]) == list(PRECISIONS)
    assert all(option["seconds"] is None and option["fits"] is None for option in found["precisions"].values())


def test_what_fits_is_the_plainest_way_that_does() -> None:
    cases: tuple[tuple[PrecisionName, int, str | None], ...] = (
        ("bf16", 80, "all resident"),
        ("bf16", 20, "one stage at a time"),
        ("int8", 11, "one stage at a time, VAE tiled"),
        ("bf16", 8, None),
    )
    for precision, gigabytes, expected in cases:
        options = {option.precision: option for option in plan(MODELS["5b"], SHAPE).options}
        assert options[precision].residency(gigabytes * 10**9) == expected


def test_more_memory_never_fits_worse() -> None:
    for option in plan(MODELS["5b"], SHAPE).options:
        order = [*option.residencies, None]
        ranks = [order.index(option.residency(gigabytes * 10**9)) for gigabytes in range(400)]
        assert ranks == sorted(ranks, reverse=True)


def test_less_guidance_and_fewer_frames_need_less() -> None:
    def total(**other: Any) -> int:
        shape = other.pop("shape", SHAPE)
        [option] = [one for one in plan(MODELS["5b"], shape, **other).options if one.precision == "bf16"]
        return option.needs["transformer"].total

    assert total(guided=False) < total()
    assert total(shape=Shape(25, 480, 720)) < total()


def test_faster_units_make_a_faster_step() -> None:
    found = told("--model", "5b", "--gpu", "rtx4090")["precisions"]
    seconds = {name: option["seconds"]["step"] for name, option in found.items()}
    assert seconds["int8"] < seconds["fp8"] < seconds["bf16"] == seconds["int8wo"] < seconds["fp32"]
    # 2 x (169 + 163) TFLOP at 165.2 TFLOP/s are 4.02 s; what moves between products comes on top.
    assert 4.02 < seconds["bf16"] < 4.4


def test_a_type_that_the_gpu_has_no_units_for_has_no_time() -> None:
    found = told("--model", "5b", "--gpu", "t4")["precisions"]
    assert found["bf16"]["seconds"] is None
    assert found["fp16"]["seconds"] is not None


def test_memory_of_the_named_gpu_is_the_limit_unless_another_is_given() -> None:
    assert told("--model", "5b", "--gpu", "rtx4090")["vram_bytes"] == gpu_named("rtx4090").memory
    assert told("--model", "5b", "--gpu", "rtx4090", "--vram", "12GB")["vram_bytes"] == 12 * 10**9


def test_text_says_what_json_says() -> None:
    shown = cvx("plan", "--model", "5b", "--vram", "12GB", "--gpu", "rtx4090")
    assert shown.code == 0
    assert "17,776 tokens" in shown.out
    assert "one stage at a time, VAE tiled" in shown.out
    assert "in 12 GB" in shown.out


@pytest.mark.parametrize(
    ("model", "words", "fix"),
    [
        ("5b", ("--frames", 50), "--frames 49 or 56"),
        ("5b-i2v", ("--height", 496), "--height 480"),
        ("1.5-5b", ("--width", 2000), "--width 1360"),
        ("5b", ("--height", 100), "--height 96 or 112"),
    ],
)
def test_a_shape_that_the_model_cannot_do_is_refused(model: str, words: tuple[object, ...], fix: str) -> None:
    assert fix in cvx("plan", "--model", model, *words).failure()


def test_a_shape_error_is_the_one_that_export_gives() -> None:
    with pytest.raises(ShapeError, match="8k"):
        plan(MODELS["2b"], Shape(12, 480, 720))


def test_a_step_is_priced_by_the_compiled_plan_where_there_is_one(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = exported("5b", precision="bf16")
    shutil.copytree(bundle.path, tmp_path / "5b")
    words = ("--engines-dir", tmp_path, "--model", "5b", "--shape", bundle.shape, "--gpu", "rtx4090")
    before = told(*words)["precisions"]
    built = cvx(
        "build", "--bundle", tmp_path / "5b", "--target", "sm89", "--network", "transformer", "--batch", 2, "-q"
    )
    assert built.code == 0, built
    after = told(*words)["precisions"]
    assert before["bf16"]["seconds"]["source"] == "architecture"
    assert after["bf16"]["seconds"]["source"] == "compiled plan"
    assert after["bf16"]["seconds"]["step"] != before["bf16"]["seconds"]["step"]
    assert after["fp16"] == before["fp16"]
    assert told(*words, "--no-guidance")["precisions"]["bf16"]["seconds"]["source"] == "architecture"


@pytest.mark.parametrize("words", [("--steps", "50"), ("--no-guidance",)], ids=["steps", "guidance"])
def test_what_says_nothing_of_training_is_refused_beside_it(words: tuple[str, ...]) -> None:
    assert cvx("plan", "--model", "5b", "--train").code == 0
    refused = cvx("plan", "--model", "5b", "--train", *words)
    assert (refused.code, f"{words[0]} is of a run" in refused.err) == (2, True), refused


def test_a_plan_needs_no_extra() -> None:
    blocked = {"onnx", "psutil", "torch", "tensorrt_rtx", "matplotlib", "onnxruntime"}
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
sys.argv[1:] = ["plan", "--model", "5b", "--gpu", "rtx4090", "--quiet"]
from cvx_deploy.cli import main
main()
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
