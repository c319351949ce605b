"""Calibration tables on disk."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cvx_deploy.errors import CalibrationError
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.quantize.prompts import SHIPPED, read_prompts
from cvx_deploy.quantize.table import CalibrationTable, Conditions, describe, describe_difference
from cvx_deploy.shape import Shape

TRAITS = MODELS["5b"].traits
CONDITIONS = Conditions(2, "d" * 64, TRAITS, Shape(9, 80, 112), "p" * 64, 2, 4, (0, 2, 3), 6.0, 0, "bf16", {})
AMAX = {"a": np.array([1, 4], np.float32), "b": np.array([2], np.float32)}
TABLE = CalibrationTable(CONDITIONS, AMAX)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    TABLE.write(tmp_path / "table")
    found = CalibrationTable.read(tmp_path / "table")
    assert found.conditions == CONDITIONS
    assert all(np.array_equal(found.amax[place], AMAX[place]) for place in AMAX)
    assert "2 prompts at 9x80x112" in describe(found)


def test_a_table_of_the_first_version_is_read_without_its_percentiles(tmp_path: Path) -> None:
    old = asdict(CONDITIONS) | {"schema_version": 1, "percentile": 99.99}
    tensors = {f"{place}.amax": channels for place, channels in AMAX.items()}
    tensors |= {f"{place}.percentile": np.array([1], np.float32) for place in AMAX}
    save_file(tensors, tmp_path / "table", {"calibration": json.dumps(old)})
    found = CalibrationTable.read(tmp_path / "table")
    assert found.conditions == CONDITIONS
    assert found.as_dict()["places"] == {"a": 4.0, "b": 2.0}
    assert describe_difference(found, TABLE)[1] == "the two tables are the same"


MOMENTS = np.array([[[2, 1], [1, 2]]], np.float32)


def test_second_moments_are_kept_beside_the_ranges(tmp_path: Path) -> None:
    replace(TABLE, moments={"a": MOMENTS}).write(tmp_path / "table")
    found = CalibrationTable.read(tmp_path / "table")
    assert np.array_equal(found.moments["a"], MOMENTS)
    assert set(found.amax) == set(AMAX)
    assert "with second moments" in describe(found)
    assert "with second moments" not in describe(TABLE)


@pytest.mark.parametrize(
    ("place", "values", "words"),
    [
        ("a", MOMENTS[0], "float32 of shape"),
        ("a", MOMENTS.astype(np.float64), "float64"),
        ("a", -MOMENTS, "negative square"),
        ("c", MOMENTS, "beside 0 ranges"),
        ("b", MOMENTS, "beside 1 ranges"),
        ("a", MOMENTS * np.float32(np.nan), "were not numbers"),
    ],
)
def test_second_moments_that_are_none_are_refused(place: str, values: np.ndarray, words: str, tmp_path: Path) -> None:
    tensors = {f"{name}.amax": channels for name, channels in AMAX.items()} | {f"{place}.moments": values}
    save_file(tensors, tmp_path / "table", {"calibration": json.dumps(asdict(CONDITIONS))})
    with pytest.raises(CalibrationError, match=words):
        CalibrationTable.read(tmp_path / "table")


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_is_neither_written_nor_read(broken: float, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="b were not numbers"):
        replace(TABLE, amax=AMAX | {"b": np.array([broken], np.float32)})


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with pytest.raises(CalibrationError, match="there is no calibration table"):
        CalibrationTable.read(path)
    TABLE.write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CalibrationError, match="damaged"):
        CalibrationTable.read(path)
    path.write_bytes(whole.replace(b'\\"schema_version\\": 2', b'\\"schema_version\\": 9'))
    with pytest.raises(CalibrationError, match="schema version 9"):
        CalibrationTable.read(path)
    path.write_bytes(whole.replace(b"calibration", b"calibratiom"))
    with pytest.raises(CalibrationError, match="no calibration table"):
        CalibrationTable.read(path)


def test_a_table_of_another_model_or_shape_is_refused() -> None:
    shape = CONDITIONS.shape
    TABLE.require(TRAITS, "d" * 64, shape, any_shape=False)
    TABLE.require(TRAITS, "d" * 64, Shape(17, 80, 112), any_shape=True)
    with pytest.raises(CalibrationError, match="made at 9x80x112, the export is for 17x80x112"):
        TABLE.require(TRAITS, "d" * 64, Shape(17, 80, 112), any_shape=False)
    for traits, checkpoint in ((MODELS["2b"].traits, "d" * 64), (TRAITS, "e" * 64)):
        with pytest.raises(CalibrationError, match="another model"):
            TABLE.require(traits, checkpoint, shape, any_shape=True)


def test_two_tables_are_compared() -> None:
    other = replace(TABLE, conditions=replace(CONDITIONS, seed=3), amax=AMAX | {"b": np.array([4], np.float32)})
    values, text = describe_difference(TABLE, other)
    assert values["conditions"] == {"seed": [0, 3]}
    assert "b: 2.000 times" in text
    assert describe_difference(TABLE, TABLE)[1] == "the two tables are the same"


def test_the_shipped_prompts_are_64_different_ones() -> None:
    prompts = read_prompts()
    assert len(set(prompts)) == len(prompts) == 64
    assert SHIPPED.is_file()
