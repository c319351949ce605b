"""No option of a run is ignored without a word."""

from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.errors import PromptError
from cvx_deploy.pipeline.combinations import MEANINGLESS_BESIDE, MEANINGLESS_WITHOUT, check_combination
from cvx_deploy.pipeline.request import RunRequest
from tests.command import cvx

NPY = Path("latents.npy")


@pytest.mark.parametrize(("rule", "other"), [(rule, other) for rule in MEANINGLESS_BESIDE for other in rule.beside])
def test_what_would_be_ignored_beside_another_option_is_refused(rule: Any, other: str) -> None:
    with pytest.raises(PromptError, match="means nothing"):
        check_combination({rule.option, other})
    check_combination({rule.option})


@pytest.mark.parametrize("rule", MEANINGLESS_WITHOUT)
def test_what_would_be_ignored_without_another_option_is_refused(rule: Any) -> None:
    with pytest.raises(PromptError, match="means nothing without"):
        check_combination({rule.option})
    for other in rule.beside:
        check_combination({rule.option, other})


@pytest.mark.parametrize(
    "changes",
    [
        {"from_latents": NPY, "image": Path("image.png"), "prompts": ()},
        {"from_latents": NPY, "num_videos": 2, "prompts": ()},
        {"from_latents": NPY, "seed": 1, "prompts": ()},
        {"from_latents": NPY, "strength": 0.5, "prompts": ()},
        {"from_latents": NPY},
        {"strength": 0.5},
    ],
)
def test_a_request_is_held_against_the_table(changes: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="means nothing"):
        RunRequest(**{"prompts": ("a",), "output": "video.npy", **changes})


def test_twin_requests_that_mean_something_are_made() -> None:
    RunRequest((), "video.npy", from_latents=NPY)
    RunRequest(("a",), "video.npy", video=Path("clip.mp4"), strength=0.5, seed=7, num_videos=2)


def test_an_option_that_is_given_with_its_default_is_given(tmp_path: Path) -> None:
    line = cvx("run", "--from-latents", tmp_path / "x.npy", "--seed", "0", "--output", tmp_path / "v.npy").failure()
    assert line.startswith("error: --seed beside --from-latents means nothing: ")
    line = cvx("run", "--prompt", "x", "--strength", "0.8", "--output", tmp_path / "v.npy").failure()
    assert line.endswith(" fix: add --video, or leave --strength out.")


@pytest.mark.parametrize("name", [".mp4", "folder/.MP4", ".npy"])
def test_a_suffix_alone_is_no_name(name: str, tmp_path: Path) -> None:
    line = cvx("run", "--prompt", "x", "--output", tmp_path / name).failure()
    assert f"{name} is a suffix, not a name" in line
    assert not list(tmp_path.iterdir())
