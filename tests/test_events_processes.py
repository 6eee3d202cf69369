"""Many processes on one chain: killed at random, reading while others write, forked, starting at the same moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Column, MetaData, Table, Text, func, insert, select

from mlops_workbench.errors import StorageError
from mlops_workbench.workspace.audit import redact, verify
from mlops_workbench.workspace.clock import SystemClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.events import EventStore, bodies_table, heads_table

pytestmark = pytest.mark.process

fork = multiprocessing.get_context("fork")
catalog_metadata = MetaData()
catalog = Table("catalog", catalog_metadata, Column("id", Text, primary_key=True))


def open_store(url: str) -> EventStore:
    database = Database(url, timeout=20)
    database.create(catalog_metadata)
    return EventStore(database, SystemClock())


def write_for_ever(url: str, acknowledged: str, pause: float = 0.0) -> None:
    """Append a catalog row and an event in one transaction; put down what was acknowledged, one line each."""
    store = open_store(url)
    receipts = os.open(acknowledged, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    number = 0
    while True:
        number += 1
        with store.database.write() as connection:
            made = store.append(
                "dataset.saved", "dataset:loans", {"n": number}, actor=f"writer-{os.getpid()}", connection=connection
            )
            connection.execute(insert(catalog), {"id": made.id})
        os.write(receipts, f"{made.seq} {made.id} {made.digest}\n".encode())
        time.sleep(pause)


@contextmanager
def running(
    count: int, target: Callable[..., None], *arguments: object
) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """`count` processes; whoever still runs at the end is killed."""
    processes = [fork.Process(target=target, args=arguments, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_eight_writers_killed_at_random(any_database_url: str, tmp_path: Path) -> None:
    """No gap, no fork, nothing acknowledged is lost, no half of a pair."""
    receipts, chance, kills = str(tmp_path / "receipts"), random.Random(7), 0
    with running(8, write_for_ever, any_database_url, receipts) as writers:
        end = time.monotonic() + 7
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.0, 0.12))
            place = chance.randrange(8)
            os.kill(writers[place].pid, signal.SIGKILL)
            writers[place].join()
            kills += 1
            writers[place] = fork.Process(target=write_for_ever, args=(any_database_url, receipts), daemon=True)
            writers[place].start()
    store = open_store(any_database_url)
    told = [line.split() for line in Path(receipts).read_text().splitlines()]
    assert kills > 30 and len(told) > 50
    checked = verify(store)
    assert checked.ok, checked
    events = {event.seq: event for event in store.read()}
    assert list(events) == list(range(1, len(events) + 1)) and store.head() == checked.head
    for seq, id, digest in told:
        assert (events[int(seq)].id, events[int(seq)].digest) == (id, digest)
    assert len(events) - len(told) <= kills + 8  # a writer dies with at most one event that it could not confirm
    with store.database.read() as connection:
        assert set(connection.execute(select(catalog.c.id)).scalars()) == {event.id for event in events.values()}
        assert connection.execute(select(func.count()).select_from(bodies_table)).scalar() == len(events)
    assert len({event.actor for event in events.values()}) >= 8
    assert store.append("dataset.saved", "dataset:loans", {}, actor="after").seq == len(events) + 1


def test_a_cursor_never_skips_while_others_write(any_database_url: str, tmp_path: Path) -> None:
    """Transactions of different lengths, so that an earlier number could become visible later if the order were not held."""
    store, cursor, rounds = open_store(any_database_url), 0, 0
    with running(4, write_uneven, any_database_url):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            for event in store.read(after=cursor):
                assert event.seq == cursor + 1
                cursor = event.seq
            rounds += 1
            if rounds % 10 == 0:
                assert verify(store, store.head()).ok
                if cursor > 5:
                    redact(store, store.last(kind="dataset.saved"), "dpo", "while others write")
    cursor = max([event.seq for event in store.read(after=cursor)], default=cursor)
    checked = verify(store)
    assert checked.ok and not checked.unrecorded and checked.events == cursor == store.head().seq
    assert cursor > 40 and rounds > 10 and checked.redacted > 0


def write_uneven(url: str) -> None:
    store, chance = open_store(url), random.Random(os.getpid())
    while True:
        with store.database.write() as connection:
            for _ in range(chance.randint(1, 3)):
                store.append("dataset.saved", "dataset:loans", {}, actor="writer", connection=connection)
            time.sleep(chance.choice([0, 0, 0.01]))
        time.sleep(chance.choice([0, 0.005]))


def test_a_new_workspace_opened_by_eight_at_once(any_database_url: str) -> None:
    """The tables, the triggers and the head are made once."""
    start, told = fork.Barrier(8), fork.Queue()

    def begin() -> None:
        start.wait()
        try:
            told.put(
                open_store(any_database_url)
                .append("workspace.created", "workspace:w", {}, actor="a", idempotency_key="genesis")
                .id
            )
        except BaseException as error:
            told.put(repr(error))

    with running(8, begin):
        ids = {told.get(timeout=15) for _ in range(8)}
    assert len(ids) == 1 and len(ids.pop()) == 26
    store = open_store(any_database_url)
    with store.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(heads_table)).scalar() == 1
    assert verify(store).events == 1


def test_a_store_survives_a_fork(any_database_url: str) -> None:
    """Parent and children go on with the same object; they must not share a connection.

    The parent also closes its connections again and again: on SQLite, closing the last one empties and removes the
    write-ahead log, which must not happen under the hands of a child."""
    store = open_store(any_database_url)
    store.append("dataset.saved", "dataset:loans", {}, actor="parent")  # the pool holds an open connection now

    def append() -> None:
        for _ in range(30):
            store.append("dataset.saved", "dataset:loans", {}, actor="child")
        os._exit(0)

    with running(3, append) as children:
        for _ in range(30):
            store.append("dataset.saved", "dataset:loans", {}, actor="parent")
            store.database.close()
        for child in children:
            child.join(15)
            assert child.exitcode == 0
    assert verify(store).events == 121


def test_a_fork_inside_a_transaction(any_database_url: str) -> None:
    """The child neither holds nor ends the transaction of its parent. SQLite cannot be used by it at all, and says so."""
    store, told = open_store(any_database_url), fork.Queue()

    def append() -> None:
        for place in (store, None):
            try:
                (place or open_store(any_database_url)).append("dataset.saved", "dataset:loans", {}, actor="child")
                told.put("appended")
            except StorageError as error:
                told.put(error.trouble)

    with store.database.write() as connection:
        store.append("dataset.saved", "dataset:loans", {}, actor="parent", connection=connection)
        child = fork.Process(target=append, daemon=True)
        child.start()
        time.sleep(0.3)
    results = [told.get(timeout=15) for _ in range(2)]
    child.join(5)
    sqlite = store.database.dialect == "sqlite"
    assert results == (["forked"] * 2 if sqlite else ["appended"] * 2)
    assert [event.actor for event in store.read()] == ["parent"] + ([] if sqlite else ["child"] * 2) and verify(
        store
    ).ok
