"""The queue: in order, fair, idempotent, bounded, and ended once."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.errors import CvxError
from cvx_deploy.serve.jobs import FullError, Job, JobStore, New, Spec, new_id

SPEC = Spec("mini", "a red circle", "", 9, 48, 48, 8, 4, 2.0, 7)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    jobs = JobStore(tmp_path / "jobs.sqlite", 3600)
    yield jobs
    jobs.close()


def add(store: JobStore, owner: str = "", queue: int = 100, per_owner: int = 100, **more: Any) -> Job:
    return store.add(New(id=new_id(), owner=owner, spec=SPEC, digest="d", **more), queue, per_owner, 1)


def claimed(store: JobStore) -> Job:
    job = store.claim()
    assert job is not None
    return job


def state(store: JobStore, job: Job) -> str:
    found = store.find(job.id, job.owner)
    assert found is not None
    return found.status


def test_jobs_of_one_owner_run_in_the_order_they_came(store: JobStore) -> None:
    jobs = [add(store) for _ in range(3)]
    assert [claimed(store).id for _ in jobs] == [job.id for job in jobs]
    assert store.claim() is None


def test_an_owner_with_many_jobs_does_not_keep_another_waiting(store: JobStore) -> None:
    for owner in ("many", "many", "many", "one", "many", "two"):
        add(store, owner)
    order = []
    for _ in range(6):
        job = claimed(store)
        order.append(job.owner)
        store.complete(job.id, 1)
    assert order == ["many", "one", "two", "many", "many", "many"]


def test_the_owner_with_fewer_running_jobs_comes_first(store: JobStore) -> None:
    for owner in ("a", "a", "b", "b"):
        add(store, owner)
    assert [claimed(store).owner for _ in range(4)] == ["a", "b", "a", "b"]


def test_what_was_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    first = JobStore(tmp_path / "jobs.sqlite", 3600)
    waiting, running, cancelling = (add(first) for _ in range(3))
    assert claimed(first).id == waiting.id
    claimed(first)
    claimed(first)
    first.cancel(cancelling.id)
    second = JobStore(tmp_path / "jobs.sqlite", 3600)  # the first one is not closed, as after kill -9
    assert second.recover() == 3
    assert [state(second, job) for job in (waiting, running, cancelling)] == ["queued", "queued", "cancelled"]


def test_a_job_ends_once(store: JobStore) -> None:
    job = add(store)
    assert not store.complete(job.id, 1), "it does not run"
    claimed(store)
    assert store.complete(job.id, 1)
    assert not store.fail(job.id, "late", "word")
    assert not store.cancelled(job.id)
    assert store.cancel(job.id).status == "completed"


def test_a_crash_is_forgiven_once_and_again_after_it_got_further(store: JobStore) -> None:
    job = add(store)
    for further in (True, False):
        claimed(store)
        if further:
            store.got_further(job.id, 10)
        assert store.give_back(job.id, crashed=True).status == "queued"
        claimed(store)
        if further:
            store.got_further(job.id, 20)
            assert store.give_back(job.id, crashed=False).status == "queued"
    ended = store.give_back(job.id, crashed=True)
    assert (ended.status, ended.error_code) == ("failed", "worker_died")
    assert "died twice" in str(ended.error_message)


def test_a_crash_of_a_job_that_was_to_end_ends_it(store: JobStore) -> None:
    job = add(store)
    claimed(store)
    assert store.cancel(job.id).status == "in_progress"
    assert store.give_back(job.id, crashed=True).status == "cancelled"


def test_the_same_idempotency_key_gives_the_same_job_and_only_to_its_owner(store: JobStore) -> None:
    job = add(store, "a", idempotency="k")
    assert add(store, "a", idempotency="k").id == job.id
    assert add(store, "b", idempotency="k").id != job.id
    assert store.counts()["queued"] == 2


def test_bounds_are_of_the_queue_and_of_an_owner_and_tell_when_to_come_again(store: JobStore) -> None:
    add(store, "a")
    with pytest.raises(FullError) as own:
        add(store, "a", per_owner=1)
    with pytest.raises(FullError) as full:
        add(store, "b", queue=1)
    assert (own.value.own, full.value.own) == (True, False)
    assert full.value.seconds == 10, "a guess, before any has ended"
    job = claimed(store)
    time.sleep(0.02)
    store.complete(job.id, 1)
    assert 0.02 <= store.mean_seconds() < 5


def test_ended_jobs_expire_and_the_oldest_go_beyond_the_budget(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite", 0.0)
    ended = []
    for _ in range(3):
        add(store)
        ended.append(claimed(store))
        store.complete(ended[-1].id, 10)
    assert [job.id for job in store.beyond(25)] == [ended[0].id]
    assert store.beyond(30) == []
    time.sleep(0.01)
    assert {job.id for job in store.expired()} == {job.id for job in ended}
    waiting = add(store)
    assert not store.remove(waiting.id)
    assert store.remove(ended[0].id)
    assert store.discard(waiting.id)


def test_pages_go_both_ways(store: JobStore) -> None:
    jobs = [add(store) for _ in range(4)]
    names = [job.id for job in jobs]
    assert [job.id for job in store.page("", None, 2, ascending=False)] == names[:1:-1]
    assert [job.id for job in store.page("", jobs[1], 9, ascending=True)] == names[2:]
    assert store.page("other", None, 9, ascending=True) == []


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be read as one" * 50, None])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "jobs.sqlite"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 9")
    else:
        path.write_bytes(content)
    with pytest.raises(CvxError, match="--data"):
        JobStore(path, 1)
