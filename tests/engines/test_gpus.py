"""GPUs are found by any usual spelling; of their figures nothing is claimed: there is nothing to hold them against."""

import pytest

from cvx_deploy.engines.gpus import GPUS, GpuModel, gpu_named
from cvx_deploy.errors import EngineError


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100 SXM"),
        ("h100-pcie", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H200", "H200"),
        ("h200", "H200"),
        ("a100", "A100 80GB"),
        ("A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("rtx4060ti", "RTX 4060 Ti 16GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("Tesla T4", "T4"),
    ],
)
def test_every_usual_spelling_finds_its_gpu(spelling: str, name: str) -> None:
    assert gpu_named(spelling).name == name


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_its_own_name(gpu: GpuModel) -> None:
    assert gpu_named(gpu.name) is gpu


@pytest.mark.parametrize(("spelling", "close"), [("rtx4091", "RTX 4090"), ("5070", "RTX 5070 Ti"), ("l40", "L40S")])
def test_an_unknown_gpu_is_an_error_that_names_the_closest(spelling: str, close: str) -> None:
    with pytest.raises(EngineError, match=f"called {spelling}") as caught:
        gpu_named(spelling)
    assert close in caught.value.fix


def test_no_name_at_all_lists_every_gpu() -> None:
    with pytest.raises(EngineError) as caught:
        gpu_named("")
    assert all(gpu.name in caught.value.fix for gpu in GPUS)


def test_a_type_without_units_has_no_peak() -> None:
    assert gpu_named("t4").peak("bfloat16") is None
    assert gpu_named("a100").peak("float8") is None
    assert gpu_named("h100").peak("float64") is None
