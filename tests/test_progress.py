"""What long work tells where there is no terminal: nothing at first, then a line now and then."""

import pytest

from cvx_deploy import progress
from cvx_deploy.progress import RichProgress


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_long_task_says_every_half_minute_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress().task("calibrate [x]", 640) as advance:
        for _ in range(64):
            clock.now += 1
            advance(10)
    assert capsys.readouterr().err == "calibrate [x]: 47%, 30 s\ncalibrate [x]: 94%, 60 s\n"


def test_a_short_task_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress().task("calibrate", 640) as advance:
        clock.now += 29
        advance(640)
    assert capsys.readouterr().err == ""


def test_a_task_of_unknown_length_says_that_it_is_at_work(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress().task("decode") as advance:
        clock.now += 31
        advance(1)
    assert capsys.readouterr().err == "decode: at work, 31 s\n"
