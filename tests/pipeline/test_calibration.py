"""Tables of steps: made on full runs, kept in the bundle, used where their conditions hold, and nowhere else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_deploy import Pipeline
from cvx_deploy.bundle.inspect import describe
from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.bundle.pack import pack, unpack
from cvx_deploy.bundle.step_table import MOST_STEPS, StepMask, StepTable
from cvx_deploy.errors import CalibrationError
from cvx_deploy.measure.difference import psnr
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.calibration import CacheCalibration, keep_table
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.tolerances import CALIBRATION_GAIN

PROMPT = "a red circle moves to the right"
PROMPTS = (
    "a large blue square grows",
    "a small green triangle moves up",
    "a yellow circle shrinks",
    "a red square moves to the left",
)
STEPS, CALLS = 12, 6
FIXED: dict[str, Any] = {"cache": "fixed", "num_inference_steps": STEPS, "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of mini with a table of its own scheduler, made by the command."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(miniature("mini"), folder / "mini")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    args = ("calibrate-cache", "--bundle", folder / "mini", "--prompts", prompts, "--steps", STEPS, "--threads", 1)
    told = json.loads(cvx(*args, "--speedup", 2, "--speedup", 1.5, "--json").out)
    assert [mask["calls"] for mask in told["masks"]] == [CALLS, 8]
    assert (told["steps"], told["scheduler"], told["guidance_scale"], told["prompts"]) == (STEPS, "ddim", 2.0, 4)
    return folder / "mini"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """Return a copy of it that a test may alter."""
    return Path(shutil.copytree(made, tmp_path / "mini"))


def altered(bundle: Path, change: Callable[[StepTable], StepTable]) -> Path:
    """Change the table of a bundle."""
    manifest = Bundle.read(bundle).manifest
    tables = tuple(map(change, manifest.step_tables))
    (bundle / MANIFEST).write_bytes(replace(manifest, step_tables=tables).to_json())
    return bundle


def video(bundle: Path, **wanted: Any) -> Any:
    with Pipeline.from_bundle(bundle, threads=1) as pipe:
        return pipe(PROMPT, **wanted)


def taken(bundle: Path, **wanted: Any) -> Any:
    """Return what was done at each step of such a video, which is not decoded."""
    return video(bundle, **wanted, output_type="latent").report.steps[0]


def test_a_run_takes_the_table_and_says_so(made: Path, tmp_path: Path) -> None:
    args = ("run", "--bundle", made, "--prompt", PROMPT, "--steps", STEPS, "--output", tmp_path / "v.npy")
    for how in (("--cache", "fixed"), ("--fast",)):
        done = cvx(*args, *how, "--json")
        (found,) = json.loads(done.out)["steps"]
        assert found["calibrated"]
        assert tuple(found["run"]) == Bundle.open(made).manifest.step_tables[0].masks[0].run
        assert len(found["run"]) == CALLS
        assert 0 < found["error"] < 1
        assert "by the bundle's table" in done.err
    assert not json.loads(cvx(*args, "--cache", "adaptive", "--json").out)["steps"][0]["calibrated"]


def shifted(table: StepTable) -> StepTable:
    """Return a table whose masks run one step later between the first two and the last."""

    def later(mask: StepMask) -> StepMask:
        return StepMask((0, 1, *sorted({min(step + 1, STEPS - 2) for step in mask.run[2:-1]}), STEPS - 1), mask.weights)

    return replace(table, masks=tuple(map(later, table.masks[:1])))


def turned(table: StepTable) -> StepTable:
    """Return a table that forecasts with the sign turned."""
    masks = (StepMask(mask.run, tuple((-a, -b, -c, -d) for a, b, c, d in mask.weights)) for mask in table.masks)
    return replace(table, masks=tuple(masks))


def test_the_table_comes_nearer_to_the_full_run_than_what_needs_none_and_its_twins_do_not(bundle: Path) -> None:
    """Twins: a mask shifted by one, and a sign turned."""
    whole = {"num_inference_steps": STEPS, "seed": 3}
    full = video(bundle, **whole).frames[0]
    plain = psnr(video(miniature("mini"), **FIXED).frames[0], full)
    manifest = (bundle / MANIFEST).read_bytes()
    assert psnr(video(bundle, **FIXED).frames[0], full) > plain + CALIBRATION_GAIN
    for change in (shifted, turned):
        (bundle / MANIFEST).write_bytes(manifest)
        assert psnr(video(altered(bundle, change), **FIXED).frames[0], full) < plain + CALIBRATION_GAIN


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ({"num_inference_steps": STEPS + 1}, f"this run has {STEPS + 1} steps of ddim at guidance 2"),
        ({"scheduler": "dpm"}, f"this run has {STEPS} steps of dpm"),
        ({"guidance_scale": 6.0}, "at guidance 6, 9x48x48"),
        ({"use_dynamic_cfg": True}, "from a video or with dynamic guidance, for which none can be made"),
        ({"video": np.zeros((9, 48, 48, 3)), "strength": 0.9}, "from a video or with dynamic guidance"),
        ({"cache_speedup": 1.7}, "no mask of 7 calls"),
    ],
)
def test_a_run_that_the_table_is_not_for_is_refused(made: Path, wanted: dict[str, Any], what: str) -> None:
    with pytest.raises(CalibrationError, match=what.replace("(", r"\(")):
        video(made, **{**FIXED, **wanted})
    fast = {key: value for key, value in {**FIXED, **wanted, "fast": True}.items() if not key.startswith("cache")}
    if "cache_speedup" not in wanted:
        assert not taken(made, **fast).calibrated


def test_a_run_of_every_step_needs_no_mask(made: Path) -> None:
    assert len(taken(made, **FIXED, cache_speedup=1.0).run) == STEPS


def test_a_table_of_another_checkpoint_is_refused(bundle: Path) -> None:
    altered(bundle, lambda table: replace(table, model="0" * 64))
    for wanted in (FIXED, {"fast": True, "num_inference_steps": STEPS}):
        with pytest.raises(CalibrationError, match="other weights, graphs or another noise schedule") as caught:
            video(bundle, **wanted)
        assert f"cvx-deploy calibrate-cache --bundle {bundle} --prompts FILE" in caught.value.fix


def test_what_a_refused_run_offers_works(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("a red circle grows\n")
    with pytest.raises(CalibrationError) as caught:
        video(bundle, **{**FIXED, "num_inference_steps": 10, "scheduler": "dpm"})
    command = caught.value.fix.removeprefix("run: cvx-deploy ").removesuffix(", or use --fast")
    words = [str(tmp_path / word) if word == "FILE" else word for word in command.split()]
    assert cvx(*words, "--speedup", "2").code == 0
    assert len(Bundle.open(bundle).manifest.step_tables) == 2
    assert taken(bundle, **{**FIXED, "num_inference_steps": 10, "scheduler": "dpm"}).calibrated


def test_a_table_takes_the_place_of_one_with_its_conditions(bundle: Path) -> None:
    (table,) = Bundle.open(bundle).manifest.step_tables
    keep_table(bundle, replace(table, seed=9))
    assert [one.seed for one in Bundle.open(bundle).manifest.step_tables] == [9]


def test_a_packed_bundle_has_its_table_and_a_page_of_a_bundle_names_it(made: Path, tmp_path: Path) -> None:
    pack(Bundle.open(made), tmp_path / "mini.tar", SilentProgress())
    found = unpack(tmp_path / "mini.tar", tmp_path / "out", SilentProgress())
    assert found.manifest.step_tables == Bundle.open(made).manifest.step_tables
    assert "forecast steps: 12 steps of ddim at guidance 2, 9x48x48: masks of 6, 8 calls" in describe(found)


def test_a_bundle_without_tables_opens_as_before() -> None:
    text = (miniature("mini") / MANIFEST).read_text()
    assert "step_tables" not in text
    assert Bundle.open(miniature("mini")).manifest.step_tables == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask["run"].append(99),
        lambda mask: mask["run"].pop(),
        lambda mask: mask["run"].remove(1),
        lambda mask: mask["weights"].pop(),
        lambda mask: mask["weights"].__setitem__(0, [1.0, 0.0, 1.0]),
        lambda mask: mask["weights"][0].__setitem__(0, 1e9),
    ],
)
def test_a_damaged_table_is_refused(bundle: Path, change: Any) -> None:
    raw = json.loads((bundle / MANIFEST).read_text())
    change(raw["step_tables"][0]["masks"][0])
    (bundle / MANIFEST).write_text(json.dumps(raw))
    assert "is damaged" in cvx("inspect", "--bundle", bundle).failure()


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ({"steps": 4}, "masks of 4 steps cannot be calibrated"),
        ({"steps": MOST_STEPS + 1}, f"masks of {MOST_STEPS + 1} steps"),
        ({"speedups": (8.0,)}, "a speedup of 8 leaves 2 of 12 steps to run; it takes 4 to 11"),
        ({"speedups": (1.0,)}, "a speedup of 1 leaves 12 of 12"),
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(wanted: dict[str, Any], what: str) -> None:
    asked: dict[str, Any] = {"prompts": (PROMPT,), "steps": STEPS, "guidance_scale": 2.0, "scheduler": "ddim"}
    with pytest.raises(CalibrationError, match=what):
        CacheCalibration(**{**asked, **wanted})


def test_the_command_refuses_before_any_work(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    args = ("calibrate-cache", "--model", "mini", "--engines-dir", tmp_path / "none", "--prompts")  # the package's own
    assert "mini comes with the package, and nothing is written there" in cvx(*args, prompts).failure()
    assert cvx(*args, tmp_path / "none.txt").failure().startswith("error: ")
    bundle = shutil.copytree(miniature("mini"), tmp_path / "mini")
    before = (bundle / MANIFEST).read_bytes()
    words = ("calibrate-cache", "--bundle", bundle, "--prompts", prompts)
    assert "a cache speedup of nan" in cvx(*words, "--speedup", "nan").failure()
    assert (bundle / MANIFEST).read_bytes() == before
