"""Results side by side: what got worse is said, what differs as runs do is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cvx_deploy.bench.compare import compare
from cvx_deploy.bench.results import BenchResults, read_results, write_results
from cvx_deploy.errors import CvxError
from tests.bench.results import results
from tests.command import cvx


def regressions(before: BenchResults, after: BenchResults) -> set[tuple[str, str]]:
    return {(change.peer, change.metric) for change in compare([("a", before), ("b", after)]).regressions}


def test_the_same_results_have_no_regression() -> None:
    assert not regressions(results(), results())


def test_a_change_within_the_runs_range_is_none() -> None:
    assert not regressions(results((1.0, 1.1, 1.2)), results((1.15, 1.2, 1.3)))


def test_slower_than_every_run_before_is_a_regression() -> None:
    found = regressions(results((1.0, 1.1, 1.2)), results((1.3, 1.4, 1.5)))
    assert ("onnxruntime", "a video") in found
    assert ("onnxruntime", "vae decode") not in found


def test_faster_is_none() -> None:
    assert not regressions(results((1.3, 1.4, 1.5)), results((1.0, 1.1, 1.2)))


def test_worse_pixels_are_a_regression_and_better_ones_none() -> None:
    good, bad = results(), results()
    bad.peers[1] = replace(bad.peers[1], psnr=40.0)
    assert regressions(good, bad) == {("onnxruntime", "PSNR")}
    assert not regressions(bad, good)


def test_what_figures_were_taken_on_is_told_where_it_differs() -> None:
    found = compare([("a", results()), ("b", results(cores=8, date="2027-01-01"))])
    assert found.conditions == {"cores": (2, 8)}


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_results(results(), tmp_path / "bench.json")
    assert read_results(tmp_path / "bench.json") == results()


@pytest.mark.parametrize(
    ("text", "what"),
    [('{"schema_version": 99}', "schema version 99"), ("{}", "schema version None"), ("[", "is damaged")],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(CvxError, match=what):
        read_results(tmp_path / "bench.json")


def test_the_command_compares_and_fails_only_when_asked_to(tmp_path: Path) -> None:
    places = [tmp_path / "a.json", tmp_path / "b.json"]
    for place, taken in zip(places, ((1.0, 1.1), (1.5, 1.6)), strict=True):
        write_results(results(taken), place)
    shown = cvx("bench", "--compare", *places)
    assert shown.code == 0
    assert "(+48%, worse)" in shown.out
    failed = cvx("bench", "--compare", *places, "--fail-on-regression", "--json")
    assert "a video" in json.loads(failed.out)["error"]["what"]
    assert failed.failure()


def test_one_file_is_not_enough_to_compare(tmp_path: Path) -> None:
    assert cvx("bench", "--compare", tmp_path / "a.json").code == 2
    assert cvx("bench", "a.json").code == 2
