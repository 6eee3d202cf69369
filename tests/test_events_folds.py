"""Folds: checkpoints never change the answer, whatever is appended, redacted or restored in between."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event as hooks
from sqlalchemy import func, select

from mlops_workbench.errors import EventError
from mlops_workbench.workspace import folds
from mlops_workbench.workspace.audit import redact
from mlops_workbench.workspace.clock import FixedClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.events import EventStore, checkpoints_table
from mlops_workbench.workspace.folds import Fold, Upcasters, fold


def remember(state: dict, event: object) -> dict:
    """A state that depends on the order, on every body and on every number."""
    state["trail"] = [*state.get("trail", []), [event.seq, event.kind, event.body]][-6:]
    state["sum"] = state.get("sum", 0) * 3 % 1009 + event.body.get("n", 0)
    return state


def erased(state: dict, event: object) -> dict:
    return state | {"erased": [*state.get("erased", []), event.seq]}


everything = Fold("everything", 1, dict, remember, redacted=erased)
tags_only = Fold("tags", 1, dict, remember, kinds=("dataset.tagged", "run.*"))


@pytest.fixture
def store(any_database_url: str) -> Iterator[EventStore]:
    database = Database(any_database_url)
    yield EventStore(database, FixedClock(step=timedelta(minutes=1)))
    database.close()


def checkpoints(store: EventStore) -> list[int]:
    with store.database.read() as connection:
        return sorted(connection.execute(select(checkpoints_table.c.seq)).scalars())


def fill(store: EventStore, n: int) -> list:
    kinds = ["dataset.saved", "dataset.tagged", "run.finished"]
    with store.database.write() as connection:
        return [
            store.append(kinds[i % 3], "dataset:loans", {"n": i}, actor="ann", connection=connection) for i in range(n)
        ]


steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 9)),
    st.tuples(st.just("redact"), st.integers(0, 1000)),
    st.tuples(st.just("fold"), st.integers(-5, 200)),
    st.tuples(st.just("clock"), st.integers(-30, 30)),
)


@pytest.mark.fast
@settings(max_examples=25, deadline=None)
@given(st.lists(steps, min_size=4, max_size=20), st.integers(1, 7))
def test_with_checkpoints_as_from_scratch_at_any_time(actions: list, every: int) -> None:
    folder = tempfile.mkdtemp()
    clock = FixedClock(step=timedelta(minutes=1))
    database = Database(f"sqlite:///{folder}/events.db")
    store = EventStore(database, clock)
    try:
        for what, n in actions:
            head = store.head()
            if what == "append":
                fill(store, n)
            elif what == "clock":
                clock.move(timedelta(minutes=n))
            elif what == "redact" and head.seq:
                target = next(iter(store.read(after=n % head.seq, limit=1)))
                if target.kind != "event.redacted":
                    redact(store, target, "dpo", "by the test")
            elif what == "fold" and head.seq:
                at = head.recorded_at - timedelta(minutes=n)
                for one in (everything, tags_only):
                    assert fold(store, one, at=at, every=every) == fold(store, one, at=at, every=0)
        for one in (everything, tags_only):
            assert fold(store, one, every=every) == fold(store, one, every=every) == fold(store, one, every=0)
    finally:
        database.close()
        shutil.rmtree(folder)


def test_checkpoints_are_used_and_bounded(store: EventStore) -> None:
    events = fill(store, 95)
    assert fold(store, everything, every=20) == fold(store, everything, every=0)
    assert checkpoints(store) == [80]
    for event in events:  # asking for every moment there was
        assert fold(store, everything, at=event.recorded_at, every=20) == fold(
            store, everything, at=event.recorded_at, every=0
        )
    assert checkpoints(store) == [20, 40, 60, 80]
    seen = []
    counting = Fold("everything", 1, dict, lambda state, event: seen.append(event.seq) or remember(state, event))
    fold(store, counting, every=20)
    assert seen == list(range(81, 96))  # only what came after the checkpoint was gone through


def test_what_was_erased_is_in_no_checkpoint(store: EventStore) -> None:
    secret = store.append("dataset.saved", "dataset:loans", {"n": 1, "name": "Jane Doe"}, actor="ann")
    fill(store, 5)
    assert "Jane Doe" in str(fold(store, everything, every=2))
    redact(store, secret, "dpo", "request 12")
    assert checkpoints(store) == []
    again = fold(store, everything, every=2)
    assert again["erased"] == [1] and "Jane Doe" not in str(again)
    with store.database.read() as connection:
        assert "Jane" not in str(connection.execute(select(checkpoints_table)).all())


def test_a_redaction_while_a_fold_is_on_its_way(store: EventStore) -> None:
    """The fold has read the body, then it is erased, then the fold wants to store its state."""
    secret, *_ = fill(store, 10)

    def slow(state: dict, event: object) -> dict:
        if event.seq == 6:
            redact(store, secret, "dpo", "just now")
        return remember(state, event)

    fold(store, Fold("slow", 1, dict, slow), every=5)
    assert checkpoints(store) == [5] or checkpoints(store) == []  # 5 was stored before, and removed by the redaction
    racing = Fold(
        "racing",
        1,
        dict,
        lambda state, event: redact(store, event, "dpo", "now") and state if event.seq == 3 else remember(state, event),
    )
    fold(store, racing, every=5)
    assert checkpoints(store) == []


def test_another_history_does_not_use_the_old_checkpoints(store: EventStore) -> None:
    """After a restore the same number is another event: the checkpoint names the digest it went through."""
    fill(store, 10)
    fold(store, everything, every=5)
    with store.database.write() as connection:
        connection.execute(checkpoints_table.update().values(digest="0" * 64, state='{"sum":"wrong"}'))
    assert fold(store, everything, every=5) == fold(store, everything, every=0)
    assert checkpoints(store) == [10]


def test_code_and_upcasters_are_part_of_the_key(store: EventStore) -> None:
    fill(store, 10)
    old = fold(store, everything, every=5)
    casters = Upcasters()
    casters.register("dataset.saved", 1)(lambda body: {"n": body["n"] + 100})
    new = fold(store, everything, every=5, upcasters=casters)
    assert new != old and new == fold(store, everything, every=0, upcasters=casters)
    casters.register("dataset.saved", 2)(lambda body: {"n": -body["n"]})
    assert (
        fold(store, everything, every=5, upcasters=casters)
        == fold(store, everything, every=0, upcasters=casters)
        != new
    )
    changed = Fold("everything", 2, dict, lambda state, event: {"last": event.seq})
    assert fold(store, changed, every=5) == {"last": 10}


@pytest.mark.parametrize("state", [{"a": float("nan")}, {1: 2}, {"a": (1, 2)}, {"a": 2**60}, {"a": {1, 2}}])
def test_a_state_that_is_not_json(store: EventStore, state: object) -> None:
    fill(store, 5)
    with pytest.raises(EventError):
        fold(store, Fold("bad", 1, dict, lambda *_: state), every=5)
    with pytest.raises(EventError, match="at is not a moment"):
        fold(store, everything, at="yesterday")


def test_where_no_checkpoint_can_be_written_the_answer_is_given(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'events.db'}")
    store = EventStore(database, FixedClock())
    fill(store, 10)
    hooks.listen(database.engine, "checkout", lambda connection, *_: connection.execute("PRAGMA query_only = ON"))
    assert fold(store, everything, every=5) == fold(store, everything, every=0)
    assert checkpoints(store) == []
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(checkpoints_table)).scalar() == 0
    assert folds.UPCASTERS.fingerprint() and os.path.exists(tmp_path / "events.db")
