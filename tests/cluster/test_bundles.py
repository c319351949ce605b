"""Bundles on the nodes of a cluster, with a sender that is no actor."""

import shutil
from pathlib import Path

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.pack import identity
from cvx_deploy.cluster.bundles import BundleSource, Known, Sender, at_hand
from cvx_deploy.cluster.joined import Cluster, joined
from cvx_deploy.errors import BundleError, CvxError
from cvx_deploy.miniatures import miniature


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "cache"))


class Counting:
    """A sender that counts what it sends, and may damage it."""

    def __init__(self, known: Known, *, damaged: bool = False) -> None:
        self.source, self.sent = BundleSource([known]), 0
        self._damaged = damaged

    def piece(self, wanted: str, start: int) -> bytes:
        self.sent += 1
        piece = self.source.piece(wanted, start)
        return piece[:-9999] + b"?" + piece[-9998:] if self._damaged else piece

    @property
    def sender(self) -> Sender:
        return Sender(self.source.size, self.piece)


def elsewhere(known: Known) -> Known:
    """Return the same bundle as a machine tells of it whose folders are not here."""
    return Known("/nowhere/engines/mini", known.identity)


def test_a_bundle_that_the_node_sees_is_used_where_it_lies() -> None:
    known = Known.of(Bundle.open(miniature("mini")))
    source = Counting(known)
    assert at_hand(known, source.sender, compiled=True) == miniature("mini")
    assert source.sent == 0


def test_a_bundle_is_sent_once_and_is_the_same_one_then() -> None:
    bundle = Bundle.open(miniature("mini"))
    known = Known.of(bundle)
    source = Counting(known)
    place = at_hand(elsewhere(known), source.sender, compiled=False)
    sent = source.sent
    assert sent > 0
    assert identity(Bundle.open(place)) == known.identity
    assert at_hand(elsewhere(known), source.sender, compiled=False) == place
    assert source.sent == sent
    source.source.close()
    assert {path.suffix for path in place.parent.iterdir()} == {"", ".lock"}, "what was packed is gone"


def test_a_node_does_not_take_another_bundle_in_its_place(tmp_path: Path) -> None:
    known = Known.of(Bundle.open(miniature("mini")))
    shutil.copytree(miniature("mini-i2v"), tmp_path / "mini")
    source = Counting(known)
    place = at_hand(Known(str(tmp_path / "mini"), known.identity), source.sender, compiled=False)
    assert place != tmp_path / "mini"
    (place / "tokenizer.json").write_text("{}")
    sent = source.sent
    assert at_hand(elsewhere(known), source.sender, compiled=False) == place
    assert source.sent > sent, "a damaged one is sent again"
    Bundle.open(place)


def test_what_is_damaged_on_its_way_is_not_taken() -> None:
    known = Known.of(Bundle.open(miniature("mini")))
    with pytest.raises(BundleError, match="altered"):
        at_hand(elsewhere(known), Counting(known, damaged=True).sender, compiled=False)


def test_compiled_engines_need_storage_that_is_shared() -> None:
    known = Known.of(Bundle.open(miniature("mini")))
    with pytest.raises(BundleError, match="compiled engines are not sent"):
        at_hand(elsewhere(known), Counting(known).sender, compiled=True)


def test_bundles_differ_by_what_they_hold_and_not_by_where_they_lie(tmp_path: Path) -> None:
    shutil.copytree(miniature("mini"), tmp_path / "copy")
    first, copy, other = (
        identity(Bundle.open(path)) for path in (miniature("mini"), tmp_path / "copy", miniature("mini-i2v"))
    )
    assert first == copy
    assert first != other


def test_workers_are_as_many_as_have_room() -> None:
    cluster = Cluster("head:6379", (4, 8), 3)
    assert cluster.workers(on_gpu=True, workers=None, threads=None) == (3, 0)
    assert cluster.workers(on_gpu=False, workers=None, threads=None) == (3, 4)
    assert cluster.workers(on_gpu=False, workers=None, threads=8) == (1, 8)
    assert cluster.workers(on_gpu=False, workers=7, threads=1) == (7, 1)
    with pytest.raises(CvxError, match="16 free CPUs"):
        cluster.workers(on_gpu=False, workers=None, threads=16)
    with pytest.raises(CvxError, match="has a GPU"):
        Cluster("head:6379", (4,), 0).workers(on_gpu=True, workers=None, threads=None)


def test_a_cluster_that_is_not_there_is_stated_at_once() -> None:
    with pytest.raises(CvxError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"), joined("127.0.0.1:1"):
        pass
