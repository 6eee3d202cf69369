"""The event store on SQLite and PostgreSQL: order, idempotency, clocks, transactions, guards, troubles of the disk."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError

from mlops_workbench.errors import ChainError, EventError, ReferenceFormatError, StorageError, UnknownReferenceError
from mlops_workbench.workspace.audit import verify
from mlops_workbench.workspace.chain import HEADER, canonical, parse_body
from mlops_workbench.workspace.clock import FixedClock, SystemClock, timestamp
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.events import EventStore, bodies_table, events_table
from tests.postgres import Server

catalog_metadata = MetaData()
catalog = Table("catalog", catalog_metadata, Column("number", Integer, primary_key=True))


@pytest.fixture
def store(any_database_url: str) -> Iterator[EventStore]:
    database = Database(any_database_url, timeout=10)
    yield EventStore(database, FixedClock(step=timedelta(seconds=1)))
    database.close()


def add(store: EventStore, n: int = 1, **kw: object) -> list:
    given = {"kind": "dataset.saved", "subject": "dataset:loans@1", "actor": "ann"} | kw
    return [store.append(body={"n": i}, **given) for i in range(n)]


# --- the format -------------------------------------------------------------------------------------------------


def test_the_seals_can_be_computed_without_our_code(store: EventStore) -> None:
    """Digest and payload digest from the standard library alone: for ASCII and whole numbers canonical JSON is sorted compact JSON."""
    add(store, 3)
    previous = "0" * 64
    for row in store.rows():
        header = {name: row[name] for name in HEADER}
        assert header["previous"] == previous and len(header) == 13
        written = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert hashlib.sha256(written).hexdigest() == row["digest"]
        assert len(bytes.fromhex(row["salt"])) == 32
        body = json.dumps({"n": row["seq"] - 1}, separators=(",", ":")).encode()
        assert hmac.new(bytes.fromhex(row["salt"]), body, hashlib.sha256).hexdigest() == row["payload_digest"]
        previous = row["digest"]
    assert store.head().seq == 3 and store.head().digest == previous


def test_what_append_returns_is_what_is_read(store: EventStore) -> None:
    body = {
        "float": 1e20,
        "whole": 3.0,
        "text": "\u2028 \x00 ö \U0001f3e0",
        "none": None,
        "list": (1, 2),
        "deep": {"a": [{}]},
    }
    given = {"actor": "ö", "correlation_id": "job", "causation_id": "x", "idempotency_key": "key", "kind_version": 2}
    written = store.append(
        "run.finished", "model:credit@7", body, occurred_at=datetime(2020, 1, 1, tzinfo=UTC), **given
    )
    read = next(iter(store.read()))
    assert read == written == store.get(written.id) and read.body["list"] == [1, 2]
    assert written.occurred_at == datetime(2020, 1, 1, tzinfo=UTC) and written.recorded_at.year == 2026
    with pytest.raises(UnknownReferenceError):
        store.get("event:01JGT9Z5T0ZZZZZZZZZZZZZZZZ")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.fast
@settings(max_examples=60, deadline=None)
@given(json_values)
def test_canonical_json_survives_reading(value: object) -> None:
    assert canonical(parse_body(canonical(value))) == canonical(value)
    assert parse_body(canonical(value)) == value


@pytest.mark.parametrize(
    "change",
    [
        {"body": {"a": float("inf")}}, {"body": {"a": 2**53}}, {"body": {"a": object()}}, {"body": {1: "a"}}, {"body": {"a": "\ud800"}},
        {"body": {"\ud800": 1}}, {"body": None}, {"body": {"a": "x" * 65_536}}, {"kind": "Saved"}, {"kind": "dataset."}, {"kind": "a.b'--"},
        {"actor": "a\x00b"}, {"actor": None}, {"actor": "x" * 257}, {"idempotency_key": ""}, {"correlation_id": "a\nb"},
        {"occurred_at": datetime(2026, 1, 1)}, {"kind_version": True}, {"kind_version": "1"},
    ],
)  # fmt: skip
def test_what_cannot_be_an_event_is_refused_and_leaves_nothing(store: EventStore, change: dict) -> None:
    arguments = {"kind": "dataset.saved", "subject": "dataset:loans@1", "body": {}, "actor": "ann"} | change
    with pytest.raises(EventError) as caught:
        store.append(**arguments)
    assert caught.value.fix and caught.value.where
    with pytest.raises(ReferenceFormatError):
        store.append("dataset.saved", "loans", {}, actor="ann")
    assert store.head().seq == 0 and not list(store.read())


# --- reading ----------------------------------------------------------------------------------------------------


def test_every_question_against_a_plain_loop(store: EventStore) -> None:
    kinds, subjects = (
        ["dataset.saved", "dataset.tagged", "datasets.saved", "run.started"],
        ["dataset:a@1", "dataset:a", "model:m@2"],
    )
    with store.database.write() as connection:
        for i in range(60):
            job = f"job-{i % 5}" if i % 2 else None
            store.append(
                kinds[i % 4], subjects[i % 3], {"i": i}, actor="ann", correlation_id=job, connection=connection
            )
    everything = list(store.read())
    assert [e.seq for e in everything] == list(range(1, 61))
    t1, t2 = everything[9].recorded_at, everything[29].recorded_at
    questions = [
        ({"kind": "dataset.*"}, lambda e: e.kind in ("dataset.saved", "dataset.tagged")),
        ({"kind": "run.started"}, lambda e: e.kind == "run.started"),
        ({"kind": ("run.*", "datasets.saved")}, lambda e: e.kind in ("run.started", "datasets.saved")),
        ({"subject": "dataset:a"}, lambda e: e.subject == "dataset:a"),
        ({"correlation_id": "job-3"}, lambda e: e.correlation_id == "job-3"),
        ({"since": t1, "until": t2}, lambda e: t1 <= e.recorded_at <= t2),
        (
            {"until": timestamp(t2), "kind": "dataset.*"},
            lambda e: e.recorded_at <= t2 and e.kind.startswith("dataset."),
        ),
        ({"after": 17, "upto": 40}, lambda e: 17 < e.seq <= 40),
    ]
    for question, holds in questions:
        expected = [e for e in everything if holds(e)]
        assert expected and list(store.read(**question)) == expected, question
        assert list(store.read(**question, limit=3)) == expected[:3]
    assert [row["seq"] for row in store.rows(batch=7)] == list(range(1, 61))
    assert (
        list(store.read(limit=0)) == []
        and store.last().seq == 60
        and store.last("dataset:a@1", "run.started").seq == 52
    )


def test_reading_ends_where_the_chain_ended_at_the_call(store: EventStore) -> None:
    add(store, 3)
    seen = []
    for row in store.rows(1, batch=1):  # a consumer that answers each event with another would otherwise go on
        add(store)
        seen.append(row["seq"])
    assert seen == [2, 3] and store.head().seq == 5


# --- idempotency ------------------------------------------------------------------------------------------------


def test_a_key_under_concurrency_is_recorded_once(store: EventStore) -> None:
    def tell(_: int) -> str:
        return store.append("run.finished", "model:m@1", {"auc": 0.8}, actor="ann", idempotency_key="once").id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(tell, range(24)))
    assert len(ids) == 1 and store.head().seq == 1


def test_of_several_bodies_under_one_key_the_first_wins(store: EventStore) -> None:
    def tell(n: int) -> str:
        try:
            return store.append("run.finished", "model:m@1", {"n": n % 4}, actor="ann", idempotency_key="once").id
        except EventError as error:
            return error.first

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(tell, range(16)))
    assert len(ids) == 1 and store.head().seq == 1
    for other in ({"kind": "run.failed"}, {"subject": "model:m@2"}, {"kind_version": 2}):
        arguments = {"kind": "run.finished", "subject": "model:m@1", "body": store.last().body, "actor": "ann"} | other
        with pytest.raises(EventError, match="already used"):
            store.append(**arguments, idempotency_key="once")


# --- time -------------------------------------------------------------------------------------------------------


def test_recorded_at_never_goes_backwards(store: EventStore) -> None:
    """Three machines whose clocks disagree, one of them running backwards."""
    clocks = [
        FixedClock("2026-01-05T12:00:00Z", timedelta(seconds=-7)),
        FixedClock("2026-01-05T11:00:00Z", timedelta(minutes=9)),
        FixedClock("2025-01-01", timedelta(0)),
    ]
    for i in range(30):
        store.clock = clocks[i % 3]
        add(store)
    events = list(store.read())
    times = [e.recorded_at for e in events]
    assert times == sorted(times) and {e.occurred_at.year for e in events} == {2025, 2026}
    for at in times:
        seen = [e.seq for e in store.read(until=at)]
        assert seen == list(range(1, len(seen) + 1))  # the state at T is one unbroken stretch from the first event
    assert verify(store).ok


# --- transactions -----------------------------------------------------------------------------------------------


def test_a_catalog_row_and_its_event_are_one(store: EventStore) -> None:
    store.database.create(catalog_metadata)
    with store.database.write() as connection:
        connection.execute(insert(catalog), {"number": 1})
        store.append("dataset.saved", "dataset:loans@1", {}, actor="ann", connection=connection)
    for number, failing in ((2, lambda: 1 / 0), (1, lambda: None)):  # an error of the caller, a clash in the catalog
        with pytest.raises((ZeroDivisionError, DBAPIError)), store.database.write() as connection:
            store.append("dataset.saved", "dataset:loans@2", {}, actor="ann", connection=connection)
            connection.execute(insert(catalog), {"number": number})
            failing()
    with store.database.read() as connection:
        rows = [
            connection.execute(select(func.count()).select_from(t)).scalar()
            for t in (catalog, events_table, bodies_table)
        ]
    assert rows == [1, 1, 1] and store.head().seq == 1 and verify(store).ok
    assert add(store)[0].seq == 2  # no gap


def test_the_tables_guard_themselves(store: EventStore) -> None:
    add(store, 2)
    statements = [
        "UPDATE events SET actor = 'x' WHERE seq = 1",
        "DELETE FROM events WHERE seq = 2",
        "UPDATE event_bodies SET body = '{}'",
    ]
    statements += (
        ["INSERT OR REPLACE INTO events SELECT * FROM events"]
        if store.database.dialect == "sqlite"
        else ["TRUNCATE events CASCADE"]
    )
    for statement in statements:
        with pytest.raises(DBAPIError, match="append-only"), store.database.write() as connection:
            connection.execute(text(statement))
    assert verify(store).ok and store.head().seq == 2


def test_a_head_that_lies_stops_the_writer(store: EventStore) -> None:
    add(store, 3)
    with store.database.write() as connection:
        connection.execute(text("UPDATE event_heads SET seq = 1"))
    with pytest.raises(ChainError) as caught:
        add(store)
    assert "audit verify" in caught.value.fix
    with store.database.write() as connection:
        connection.execute(text("DELETE FROM event_heads"))
    with pytest.raises(ChainError, match="head"):
        add(store)


@pytest.mark.fast
def test_a_new_sqlite_file_that_somebody_else_just_writes(tmp_path: Path) -> None:
    """Switching to the write-ahead log does not wait by itself."""
    other = sqlite3.connect(tmp_path / "new.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.4, other.execute, ["COMMIT"])
    timer.start()
    Database(f"sqlite:///{tmp_path / 'new.db'}", timeout=10).create(catalog_metadata)
    timer.join()
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError) as caught, Database(f"sqlite:///{tmp_path / 'new.db'}", timeout=0.2).write():
        pass
    assert caught.value.trouble == "locked"
    other.close()


def test_a_writer_gives_up_after_its_time(any_database_url: str) -> None:
    first, second = (EventStore(Database(any_database_url, timeout=t), SystemClock()) for t in (5, 0.3))
    with first.database.write() as connection:
        first.append("dataset.saved", "dataset:loans@1", {}, actor="ann", connection=connection)
        with pytest.raises(StorageError) as caught:
            add(second)
        assert caught.value.trouble == "locked"
        assert second.head().seq == 0  # reading goes on
    assert add(second)[0].seq == 2


# --- troubles of the disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", range(8))
def test_sqlite_is_full_at_each_possible_page(tmp_path: Path, room: int) -> None:
    """A joint write needs several pages; the room ends at each of them in turn."""
    database = Database(f"sqlite:///{tmp_path / 'full.db'}")
    store = EventStore(database, SystemClock())
    database.create(catalog_metadata)
    add(store, 5)
    pages = -1

    @event.listens_for(database.engine, "checkout")
    def limit(connection: object, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages if pages > 0 else 2**30}")  # type: ignore[attr-defined]

    with database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one() + room
    failed = 0
    for number in range(12):
        try:
            with database.write() as connection:
                connection.execute(insert(catalog), {"number": number})
                store.append(
                    "dataset.saved", "dataset:loans@1", {"text": "x" * 9000}, actor="ann", connection=connection
                )
        except StorageError as error:
            assert error.trouble == "full" and error.fix
            failed += 1
    assert failed > 5 and verify(store).ok
    pages = -1  # room again
    add(store)
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(catalog)).scalar() == 12 - failed
    assert verify(store).events == store.head().seq == 5 + 12 - failed + 1


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A real file system of two megabytes."""
    folder = Path(tempfile.mkdtemp(prefix="mlwb-small-", dir="/tmp"))
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode
        == 0
    )
    if not mounted:
        folder.rmdir()
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
    folder.rmdir()


@pytest.mark.process
def test_a_real_disk_that_fills_up_sqlite(small_disk: Path) -> None:
    database = Database(f"sqlite:///{small_disk / 'events.db'}")
    store = EventStore(database, SystemClock())
    acknowledged = []
    with pytest.raises(StorageError) as caught:
        for i in range(1000):
            acknowledged.append(
                store.append("dataset.saved", "dataset:loans@1", {"text": "x" * 20_000, "i": i}, actor="ann").id
            )
    assert caught.value.trouble in ("full", "io") and 10 < len(acknowledged) < 1000
    database.close()
    with tempfile.TemporaryDirectory() as roomy:
        for path in small_disk.glob("events.db*"):
            shutil.copy(path, roomy)
        moved = EventStore(Database(f"sqlite:///{roomy}/events.db"), SystemClock())
        assert verify(moved).ok and [e.id for e in moved.read()] == acknowledged
        assert add(moved)[0].seq == len(acknowledged) + 1
        moved.database.close()


@pytest.mark.service
@pytest.mark.process
def test_a_real_disk_that_fills_up_postgresql(small_disk: Path, postgres_server: Server) -> None:
    """The bodies lie on a small disk; the error is the server's own."""
    place = small_disk / "bodies"
    place.mkdir()
    if postgres_server.as_user:
        small_disk.chmod(0o755)
        os.chown(place, postgres_server.as_user["user"], postgres_server.as_user["group"])
    url = postgres_server.new_database()
    name = url.rsplit("/", 1)[1]
    store = EventStore(Database(url), SystemClock())
    postgres_server.run(f"CREATE TABLESPACE {name}_small LOCATION '{place}'")
    try:
        postgres_server.run(
            f"ALTER TABLE event_bodies SET TABLESPACE {name}_small",
            "ALTER TABLE event_bodies ALTER body SET STORAGE PLAIN",
            database=name,
        )
        acknowledged = []
        with pytest.raises(StorageError) as caught:
            for i in range(2000):
                acknowledged.append(
                    store.append("dataset.saved", "dataset:loans@1", {"text": "x" * 7000, "i": i}, actor="ann").id
                )
        assert caught.value.trouble == "full" and len(acknowledged) > 10
        assert verify(store).ok and [e.id for e in store.read()] == acknowledged
        postgres_server.run("ALTER TABLE event_bodies SET TABLESPACE pg_default", database=name)
        assert add(store)[0].seq == len(acknowledged) + 1
    finally:
        store.database.close()
        postgres_server.run(f"DROP DATABASE {name} WITH (FORCE)", f"DROP TABLESPACE {name}_small")


@pytest.mark.process
@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
def test_a_folder_without_write_permission(existing: bool) -> None:
    """Tried in a child process that is not root."""
    folder = Path(tempfile.mkdtemp(prefix="mlwb-readonly-", dir="/tmp"))
    path = folder / "events.db"
    if existing:
        mine = EventStore(Database(f"sqlite:///{path}"), SystemClock())
        add(mine, 3)
        mine.database.close()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    folder.chmod(0o555)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                os.setgroups([])
                os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
                os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)
            try:
                add(EventStore(Database(f"sqlite:///{path}", timeout=1), SystemClock()))
                told = "no error"
            except StorageError as error:
                told = f"StorageError {error.trouble} {error.where} {error.fix}"
            except BaseException as error:
                told = repr(error)
            os.write(write_end, told.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    told = os.read(read_end, 4000).decode()
    os.close(read_end)
    os.waitpid(child, 0)
    folder.chmod(0o755)
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    assert told.startswith(("StorageError readonly", "StorageError unreachable")) and str(path) in told
    assert after == before


@pytest.mark.service
def test_a_role_that_may_only_read(postgres_server: Server) -> None:
    url = postgres_server.new_database()
    name = url.rsplit("/", 1)[1]
    add(EventStore(Database(url), SystemClock()), 2)
    role = f"reader_{name}"
    postgres_server.run(
        f"CREATE ROLE {role} LOGIN PASSWORD 'reader'",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
        database=name,
    )
    reader = EventStore(Database(f"postgresql://{role}:reader@127.0.0.1:{postgres_server.port}/{name}"), SystemClock())
    assert len(list(reader.read())) == 2 and verify(reader).ok
    with pytest.raises(StorageError) as caught:
        add(reader)
    assert (
        caught.value.trouble == "readonly"
        and "reader@" not in str(caught.value)
        and ":reader" not in caught.value.where
    )


@pytest.mark.service
def test_a_connection_that_the_server_ends(postgres_server: Server) -> None:
    url = postgres_server.new_database()
    name = url.rsplit("/", 1)[1]
    store = EventStore(Database(url), SystemClock())
    add(store)
    ending = (
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )
    with pytest.raises(StorageError) as caught, store.database.write() as connection:
        store.append("dataset.saved", "dataset:loans@1", {}, actor="ann", connection=connection)
        postgres_server.run(ending)
        connection.execute(select(1))
    assert caught.value.trouble == "unreachable"
    assert add(store)[0].seq == 2  # a new connection, no gap
    postgres_server.run(ending)
    assert add(store)[0].seq == 3  # a pooled connection that died while idle is not noticed by anyone
