"""``cvx-deploy quantize`` by its command line: tables, rankings, what an export takes of them, and bad input."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cvx_deploy import progress
from tests.command import TELLING, Outcome, cvx, spawn, wait_for
from tests.conftest import Tiny
from tests.untraced import without_tracing

SMALL = ("--shape", "9x80x112", "--num-prompts", "2", "--steps", "1", "--compute", "fp32")
PLACE = "transformer_blocks.1.ff.net.2"

# Tells on stderr of every prompt before it is sampled.
CALIBRATION = (
    TELLING
    + """
import cvx_deploy.exporters.quantization.calibrate as calibration

sample = calibration.Sampler.sample

def told(self, index, *words):
    print("now: prompt", index, file=sys.stderr, flush=True)
    sample(self, index, *words)

calibration.Sampler.sample = told
main()
"""
)


@pytest.fixture(scope="module")
def table(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "5b.calibration.safetensors"
    outcome = quantize(tiny, *SMALL, "--output", path)
    assert outcome.code == 0, outcome
    return path


def quantize(tiny: Tiny, *words: object) -> Outcome:
    return cvx("quantize", "--model", "5b", "--checkpoint", tiny("5b"), *words)


def only_object(outcome: Outcome) -> dict[str, Any]:
    """Return the one JSON object on stdout, which holds nothing that JSON does not know."""
    assert outcome.code == 0, outcome
    value = json.loads(outcome.out, parse_constant=pytest.fail)
    assert isinstance(value, dict)
    return value


def test_a_calibration_prints_its_table_and_says_how_it_came_to_be(tiny: Tiny, tmp_path: Path, table: Path) -> None:
    told = only_object(quantize(tiny, *SMALL, "--engines-dir", tmp_path, "--json", "--quiet"))
    place = tmp_path / "5b.calibration.safetensors"
    assert told["table"] == str(place)
    assert told["bytes"] == place.stat().st_size
    assert told["conditions"]["prompt_count"] == 2
    assert PLACE in told["places"]
    assert place.read_bytes() == table.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [place.name]


def test_show_prints_one_table_and_compares_two(
    tiny: Tiny, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "2 prompts at 9x80x112, steps 1 of 1, guidance scale 6, seed 0" in cvx("quantize", "--show", table).out
    told = only_object(cvx("quantize", "--show", table, "--json"))
    assert told["places"][PLACE] > 0
    other = tmp_path / "other"
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    done = quantize(tiny, *SMALL, "--seed", "5", "--output", other)
    assert done.code == 0
    assert "calibrate: 50%, " in done.err, "without a terminal it says how far it is"
    compared = ("quantize", "--show", table, "--show", other)
    assert "seed: 0 and 5" in cvx(*compared).out
    differing = only_object(cvx(*compared, "--json"))
    assert differing["conditions"] == {"seed": [0, 5]}
    assert differing["ratios"][PLACE] != 1
    assert "the two tables are the same" in cvx("quantize", "--show", table, "--show", table).out
    assert cvx("quantize", *(["--show", table] * 3)).code == 2


def test_a_ranking_writes_a_plot_and_exclusions_that_an_export_takes(
    tiny: Tiny, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "5b.sensitivity.json"
    words = (*SMALL, "--sensitivity", "--precision", "int8/fp32", "--calibration", table, "--output", report)
    plain = only_object(quantize(tiny, *words, "--json"))
    assert plain["exclude"] == []
    target = plain["psnr_of_all"] + 0.5
    told = quantize(tiny, *words, "--min-psnr", target)
    asked = json.loads(report.read_text())
    assert asked["psnr"] >= target
    assert asked["exclude"] == [one["place"] for one in asked["ranking"][: len(asked["exclude"])]]
    assert f"without {', '.join(asked['exclude'])}: " in told.out
    assert b"<svg" in report.with_suffix(".svg").read_bytes()
    without_tracing(monkeypatch)
    exported = only_object(export(tiny, "int8/fp32", table, tmp_path, "--exclude", report, "--json"))
    entry = exported["quantized"]["transformer"]
    assert entry["excluded"] == asked["exclude"]
    assert f"int8/fp32: {entry['layers']} layers, but for {entry['excluded'][0]}" in (
        cvx("inspect", "--bundle", tmp_path / "bundle").out
    )


def test_a_target_that_nothing_reaches_excludes_all_and_is_json_still(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    report = tmp_path / "ranked.json"
    words = (*SMALL, "--sensitivity", "--precision", "int8/fp32", "--calibration", table, "--output", report)
    told = only_object(quantize(tiny, *words, "--min-psnr", "500", "--json"))
    assert told["psnr"] is None
    assert len(told["exclude"]) == 3
    failure = export(tiny, "int8/fp32", table, tmp_path, "--exclude", report).failure()
    assert "every layer is excluded" in failure


def export(tiny: Tiny, precision: str, table: Path, folder: Path, *words: object, model: str = "5b") -> Outcome:
    named = ("--model", model, "--checkpoint", tiny(model), "--precision", precision, "--calibration", table)
    return cvx("export", *named, "--output", folder / "bundle", *(words or ("--frames", 9)), "--quiet")


def test_the_last_block_stays_as_it_is_and_the_export_says_so(
    tiny: Tiny, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvx_deploy.families.cogvideox.layers._BLOCKS_A_SPARED", 3)
    without_tracing(monkeypatch)
    words = ("--model", "5b", "--checkpoint", tiny("5b"), "--precision", "int8/fp32", "--calibration", table)
    outcome = cvx("export", *words, "--shape", "9x80x112", "--output", tmp_path / "bundle", "--json")
    assert only_object(outcome)["quantized"]["transformer"]["excluded"] == ["transformer_blocks.2"]
    assert "transformer_blocks.2 stay" in outcome.err
    assert "--exclude none" in outcome.err
    assert "12 layers, but for transformer_blocks.2" in cvx("inspect", "--bundle", tmp_path / "bundle").out
    all_of_it = export(tiny, "int8/fp32", table, tmp_path, "--shape", "9x80x112", "--exclude", "none", "--json")
    assert only_object(all_of_it)["quantized"]["transformer"]["layers"] == 18


def test_a_table_of_another_model_is_one_clear_line(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    assert "of another model" in export(tiny, "int8/fp32", table, tmp_path, model="2b").failure()
    assert not list(tmp_path.iterdir())


def test_a_table_of_another_shape_is_one_clear_line(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    failure = export(tiny, "int8/fp32", table, tmp_path, "--shape", "17x80x112").failure()
    assert "made at 9x80x112, the export is for 17x80x112" in failure
    assert "--calibration-any-shape" in failure
    assert not list(tmp_path.iterdir())


def test_statistics_that_are_no_numbers_are_one_clear_line(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    with safe_open(table, "np") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[f"{PLACE}.amax"][3] = np.nan
    broken = tmp_path / "broken"
    save_file(tensors, broken, told)
    assert f"the activations of {PLACE} were not numbers" in export(tiny, "int8/fp32", broken, tmp_path).failure()
    assert f"the activations of {PLACE} were not numbers" in cvx("quantize", "--show", broken).failure()
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_no_table_and_no_prompts_are_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    assert "there is no calibration table" in export(tiny, "fp8/fp32", tmp_path / "none", tmp_path).failure()
    ranking = quantize(tiny, *SMALL, "--sensitivity", "--precision", "int8/fp32", "--output", tmp_path / "x.json")
    assert "needs the ranges of its activations" in ranking.failure()
    (tmp_path / "prompts.txt").write_text("\n \n")
    words = ("--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "table")
    assert "holds no prompts" in cvx("quantize", "--model", "5b", "--checkpoint", tiny("5b"), *words).failure()
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_calibration_that_was_stopped_goes_on_to_the_same_table(
    number: signal.Signals, tiny: Tiny, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table"
    words = ("quantize", "--model", "5b", "--checkpoint", tiny("5b"), *SMALL, "--output", output)
    with spawn(CALIBRATION, *words, "--quiet") as process:
        wait_for(process, "now: prompt 1")
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not output.exists()
    outcome = cvx(*words)
    assert outcome.code == 0
    assert "going on after 1 prompts" in outcome.err
    assert output.read_bytes() == table.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["table"]


def test_a_calibration_that_was_stopped_is_not_taken_for_another(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    shutil.copy(table, tmp_path / ".table.partial")
    outcome = quantize(tiny, *SMALL, "--seed", "5", "--output", tmp_path / "table")
    assert outcome.code == 0
    assert "under other conditions; starting anew" in outcome.err
