"""Which networks stay loaded, which go, and in what order."""

import threading

import pytest

from cvx_deploy.engines.residency import Policy, Residency, key_of
from cvx_deploy.errors import OutOfMemoryError
from cvx_deploy.progress import SilentProgress


class Machine:
    """Memory for so many networks; what is loaded and freed is noted."""

    def __init__(self, policy: Policy, room: int = 99) -> None:
        self.room, self.log, self.notes = room, [], []  # type: ignore[var-annotated]
        self.loaded: list[str] = []
        notes = self.notes

        class Notes(SilentProgress):
            def note(self, text: str) -> None:
                notes.append(text)

        self.residency: Residency[str] = Residency(policy, Notes(), self.free)

    def load(self, role: str) -> str:
        if len(self.loaded) >= self.room:
            raise OutOfMemoryError(f"{role} does not fit", fix="free some")
        self.log.append(f"load {role}")
        self.loaded.append(role)
        return role

    def free(self, session: str) -> None:
        self.log.append(f"free {session}")
        self.loaded.remove(session)

    def run(self, *roles: str) -> None:
        for role in roles:
            with self.residency.hold(role, key_of(role, {}), lambda role=role: self.load(role)) as session:  # type: ignore[misc]
                assert session == role


RUN = ("text_encoder", "modulation", "transformer", "vae_decoder_first", "vae_decoder_next")


def test_resident_networks_are_loaded_once() -> None:
    machine = Machine("resident")
    machine.run(*RUN)
    machine.run(*RUN)
    assert machine.log == [f"load {role}" for role in RUN]
    machine.residency.close()
    assert machine.loaded == []


def test_a_phase_goes_when_the_next_one_begins() -> None:
    machine = Machine("phase", room=2)
    machine.run(*RUN, *RUN[:1])
    assert machine.log == [
        *("load text_encoder", "free text_encoder", "load modulation", "free modulation", "load transformer"),
        *("free transformer", "load vae_decoder_first", "load vae_decoder_next", "free vae_decoder_next"),
        *("free vae_decoder_first", "load text_encoder"),
    ]
    assert machine.notes == []


def test_what_does_not_fit_comes_after_the_phases_that_are_done_have_gone() -> None:
    machine = Machine("resident", room=2)
    machine.run(*RUN)
    assert machine.loaded == ["vae_decoder_first", "vae_decoder_next"]
    assert machine.notes == [
        "note: transformer did not fit beside modulation, text_encoder, which had to go",
        "note: vae_decoder_next did not fit beside transformer, which had to go",
    ]


def test_what_is_in_use_never_goes() -> None:
    machine = Machine("resident", room=1)
    with (
        machine.residency.hold("transformer", key_of("transformer", {}), lambda: machine.load("transformer")),
        pytest.raises(OutOfMemoryError),
    ):
        machine.run("vae_decoder_first")
    assert machine.loaded == ["transformer"]


def test_sizes_tell_networks_apart() -> None:
    machine = Machine("resident")
    for batch in (1, 2, 1):
        with machine.residency.hold("transformer", key_of("transformer", {"batch": batch}), lambda: machine.load("t")):
            pass
    assert machine.log == ["load t"] * 2


def test_a_network_that_was_asked_for_beforehand_is_loaded_once_in_another_thread() -> None:
    machine, threads = Machine("resident"), set[int]()

    def load() -> str:
        threads.add(threading.get_ident())
        return machine.load("transformer")

    key = key_of("transformer", {})
    machine.residency.prefetch(key, load)
    machine.residency.prefetch(key, load)
    machine.run("transformer")
    machine.residency.prefetch(key, load)
    assert machine.log == ["load transformer"]
    assert threads != {threading.get_ident()}
    machine.residency.close()
    assert machine.loaded == []


def test_by_phases_nothing_is_loaded_beforehand() -> None:
    machine = Machine("phase")
    machine.residency.prefetch(key_of("transformer", {}), lambda: machine.load("transformer"))
    assert machine.log == []


def test_what_was_loaded_beforehand_and_never_used_is_freed() -> None:
    machine = Machine("resident")
    machine.residency.prefetch(key_of("transformer", {}), lambda: machine.load("transformer"))
    machine.residency.close()
    assert machine.loaded == []


def test_a_failure_beforehand_is_raised_where_the_network_is_needed() -> None:
    machine = Machine("resident", room=0)
    machine.residency.prefetch(key_of("transformer", {}), lambda: machine.load("transformer"))
    with pytest.raises(OutOfMemoryError):
        machine.run("transformer")
