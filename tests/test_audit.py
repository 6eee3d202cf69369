"""Every kind of tampering is found and named, on both databases and in exports; redaction; CloudEvents; exports."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text
from sqlalchemy import event as hooks

from mlops_workbench.errors import ChainError, EventError, StorageError, UnknownReferenceError
from mlops_workbench.workspace.audit import check_chain, export_events, redact, to_cloudevent, verify, verify_export
from mlops_workbench.workspace.chain import GENESIS, Anchor, canonical, header_digest, payload_digest
from mlops_workbench.workspace.clock import FixedClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.events import EventStore

COUNT = 12


@pytest.fixture
def store(any_database_url: str) -> Iterator[EventStore]:
    """Twelve events whose guards an administrator has switched off."""
    database = Database(any_database_url)
    store = EventStore(database, FixedClock(step=timedelta(minutes=1)))
    for n in range(COUNT):
        store.append(
            "dataset.saved",
            f"dataset:loans@{n + 1}",
            {"rows": n, "note": "plain"},
            actor="ann",
            idempotency_key=f"key-{n}",
        )
    with database.write() as connection:
        if database.dialect == "sqlite":
            for (name,) in connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all():
                connection.execute(text(f"DROP TRIGGER {name}"))
        else:
            for table in ("events", "event_bodies"):
                connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER ALL"))
    yield store
    database.close()


def sql(*statements: str) -> Callable[[Connection], None]:
    def act(connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            connection.execute(text("PRAGMA defer_foreign_keys = ON"))
        for statement in statements:
            connection.execute(text(statement))

    return act


def reseal(connection: Connection, seq: int, **changes: object) -> None:
    row = (
        dict(connection.execute(text("SELECT * FROM events WHERE seq = :seq"), {"seq": seq}).mappings().one()) | changes
    )
    columns = ", ".join(f"{name} = :{name}" for name in changes)
    connection.execute(
        text(f"UPDATE events SET {columns}, digest = :digest WHERE seq = :at"),
        changes | {"digest": header_digest(row), "at": seq},
    )


def value(connection: Connection, column: str, seq: int) -> str:
    return connection.execute(text(f"SELECT {column} FROM events WHERE seq = {seq}")).scalar_one()


def edit_body_resealed(connection: Connection) -> None:
    salt, body = "cd" * 32, canonical({"rows": 99})
    connection.execute(
        text("UPDATE event_bodies SET salt = :s, body = :b WHERE id = :i"),
        {"s": salt, "b": body.decode(), "i": value(connection, "id", 5)},
    )
    reseal(connection, 5, payload_digest=payload_digest(salt, body))


def drop_and_renumber(connection: Connection) -> None:
    sql(
        "DELETE FROM event_bodies WHERE id = (SELECT id FROM events WHERE seq = 5)", "DELETE FROM events WHERE seq = 5"
    )(connection)
    for seq in range(6, COUNT + 1):
        connection.execute(text(f"UPDATE events SET seq = {seq - 1} WHERE seq = {seq}"))
        reseal(
            connection,
            seq - 1,
            previous=value(connection, "digest", seq - 2) if seq > 6 else value(connection, "previous", 5),
        )


def rewrite_from_5(connection: Connection) -> None:
    edit_body_resealed(connection)
    for seq in range(6, COUNT + 1):
        reseal(connection, seq, previous=value(connection, "digest", seq - 1))
    connection.execute(text(f"UPDATE event_heads SET digest = (SELECT digest FROM events WHERE seq = {COUNT})"))


def cut_off(connection: Connection) -> None:
    sql(
        "DELETE FROM event_bodies WHERE id IN (SELECT id FROM events WHERE seq > 8)",
        "DELETE FROM events WHERE seq > 8",
        "UPDATE event_heads SET seq = 8, digest = (SELECT digest FROM events WHERE seq = 8), recorded_at = (SELECT recorded_at FROM events WHERE seq = 8)",
    )(connection)


BODY_5 = "WHERE id = (SELECT id FROM events WHERE seq = 5)"
# what is done, the number of the first bad event, the reason, and whether it shows without an anchor
TAMPERING = {
    **{
        f"header: {column}": (sql(f"UPDATE events SET {column} = {new} WHERE seq = 5"), 5, "edited header", True)
        for column, new in {
            "recorded_at": "'2026-01-05T09:04:00.000001Z'", "occurred_at": "'2020-01-01T00:00:00.000000Z'",
            "actor": "'ben'", "kind": "'dataset.deleted'", "kind_version": "2", "subject": "'dataset:loans@50'", "correlation_id": "'job'",
            "causation_id": "'x'", "idempotency_key": "NULL", "payload_digest": "'00'", "previous": "'00'", "digest": "'00'",
        }.items()
    },
    "header: id": (sql(f"UPDATE event_bodies SET id = 'X' {BODY_5}", "UPDATE events SET id = 'X' WHERE seq = 5"), 5, "edited header", True),
    "header, sealed again": (lambda c: reseal(c, 5, actor="ben"), 6, "replaced", True),
    "header, time unreadable and sealed again": (lambda c: reseal(c, 5, recorded_at="soon"), 5, "edited header", True),
    "header, time before the last and sealed again": (lambda c: reseal(c, 5, recorded_at="2025-01-01T00:00:00.000000Z"), 5, "reordered", True),
    "last header, sealed again": (lambda c: reseal(c, COUNT, actor="ben"), COUNT, "replaced", True),
    "body: changed": (sql(f"UPDATE event_bodies SET body = '{{}}' {BODY_5}"), 5, "edited body", True),
    "body: a space": (sql(f"UPDATE event_bodies SET body = replace(body, ',', ', ') {BODY_5}"), 5, "edited body", True),
    "body: not JSON": (sql(f"UPDATE event_bodies SET body = 'x' {BODY_5}"), 5, "edited body", True),
    "body: salt changed": (sql(f"UPDATE event_bodies SET salt = '{'00' * 32}' {BODY_5}"), 5, "edited body", True),
    "body: salt unreadable": (sql(f"UPDATE event_bodies SET salt = 'x' {BODY_5}"), 5, "edited body", True),
    "body and digests, sealed again": (edit_body_resealed, 6, "replaced", True),
    "dropped": (sql(f"DELETE FROM event_bodies {BODY_5}", "DELETE FROM events WHERE seq = 5"), 5, "dropped", True),
    "first dropped": (sql("DELETE FROM event_bodies WHERE id = (SELECT id FROM events WHERE seq = 1)", "DELETE FROM events WHERE seq = 1"), 1, "dropped", True),
    "dropped, the rest renumbered and sealed again": (drop_and_renumber, 5, "replaced", True),
    "swapped": (sql("UPDATE events SET seq = -1 WHERE seq = 5", "UPDATE events SET seq = 5 WHERE seq = 7", "UPDATE events SET seq = 7 WHERE seq = -1"), 5, "reordered", True),
    "forked": (lambda c: reseal(c, 6, previous=value(c, "previous", 5)), 6, "forked", True),
    "forked from far": (lambda c: reseal(c, 9, previous=value(c, "previous", 3)), 9, "forked", True),
    "follows a later one": (lambda c: reseal(c, 5, previous=value(c, "digest", 8)), 5, "reordered", True),
    "end cut off": (sql("DELETE FROM event_bodies WHERE id IN (SELECT id FROM events WHERE seq > 8)", "DELETE FROM events WHERE seq > 8"), 9, "truncated", True),
    "end cut off, head moved": (cut_off, 9, "truncated", False),
    "everything gone": (sql("DELETE FROM event_bodies", "DELETE FROM events", f"UPDATE event_heads SET seq = 0, digest = '{GENESIS}'"), 1, "truncated", False),
    "head moved back": (sql("UPDATE event_heads SET seq = 8, digest = (SELECT digest FROM events WHERE seq = 8)"), COUNT, "forked", True),
    "head digest": (sql("UPDATE event_heads SET digest = 'x'"), COUNT, "replaced", True),
    "head gone": (sql("DELETE FROM event_heads"), COUNT, "forked", True),
    "rewritten from 5 on": (rewrite_from_5, COUNT, "replaced", False),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_found_and_named(store: EventStore, what: str) -> None:
    act, seq, reason, shows = TAMPERING[what]
    anchor = Anchor.from_json(store.head().to_json())
    assert verify(store, anchor).ok
    ids = {event.seq: event.id for event in store.read()}
    with store.database.write() as connection:
        act(connection)
    alone, anchored = verify(store), verify(store, anchor)
    assert alone.ok is (not shows), alone
    bad = anchored.first_bad
    assert bad is not None and (bad.seq, bad.reason) == (seq, reason), anchored
    assert bad.detail.endswith(".") and anchored.events == anchored.head.seq <= seq
    if reason == "edited body":
        assert bad.id == ids[seq]
    with pytest.raises(ChainError) as caught:
        anchored.require()
    assert caught.value.reason == reason and f"event {seq}" in caught.value.where
    assert reason in str(anchored) and anchored.to_dict()["ok"] is False and anchored.to_frame().loc[0, "seq"] == seq


@pytest.mark.parametrize("at", [1, 6, COUNT])
def test_an_older_anchor_pins_what_was_before_it(store: EventStore, at: int) -> None:
    digest = list(store.read())[at - 1].digest
    old = Anchor(at, digest, None)
    with store.database.write() as connection:
        rewrite_from_5(connection)
    found = verify(store, old)
    assert found.ok is (at < 5)  # what came after the anchor can be rewritten unseen


@pytest.mark.parametrize(
    "written",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"seq": -1, "digest": "' + "0" * 64 + '", "recorded_at": null}',
        '{"seq": 1, "digest": "x", "recorded_at": null}',
    ],
)
@pytest.mark.fast
def test_what_is_not_an_anchor(written: str) -> None:
    with pytest.raises(ChainError, match="not an anchor"):
        Anchor.from_json(written)


def test_an_empty_chain_verifies(any_database_url: str, tmp_path: Path) -> None:
    store = EventStore(Database(any_database_url), FixedClock())
    assert verify(store, store.head()).ok and verify(store).head == store.head() == Anchor(0, GENESIS, None)
    assert (
        export_events(store, tmp_path / "empty.jsonl").seq == 0 and verify_export(tmp_path / "empty.jsonl").events == 0
    )
    assert check_chain(list).ok


# --- redaction --------------------------------------------------------------------------------------------------


def test_redaction_leaves_a_chain_that_verifies(store: EventStore) -> None:
    events, anchor = list(store.read()), store.head()
    record = redact(store, events[4].reference, "dpo", "request 12")
    assert (
        record.kind == "event.redacted"
        and record.subject == f"event:{events[4].id}"
        and record.body["reason"] == "request 12"
    )
    checked = verify(store, anchor)
    assert checked.ok and checked.redacted == 1 and checked.unrecorded == () and checked.events == COUNT + 1
    left = store.get(events[4].id)
    assert left.redacted and left.digest == events[4].digest and left.payload_digest == events[4].payload_digest
    with store.database.read() as connection:
        assert (
            connection.execute(text("SELECT count(*) FROM event_bodies WHERE id = :id"), {"id": left.id}).scalar() == 0
        )
    assert redact(store, left, "somebody", "again") == record and store.head().seq == COUNT + 1
    assert (
        store.append("dataset.saved", "dataset:loans@5", {"rows": 7}, actor="ann", idempotency_key="key-4") == left
    )  # cannot be compared any more


def test_a_crash_in_the_middle_of_a_redaction(store: EventStore) -> None:
    """Whichever statement fails, either nothing has happened or everything."""
    target = next(iter(store.read(after=4)))
    for failing in ("INSERT INTO events", "DELETE FROM event_bodies", "DELETE FROM fold_checkpoints"):

        def fail(connection: object, cursor: object, statement: str, *_: object, failing: str = failing) -> None:
            if statement.startswith(failing):
                raise KeyboardInterrupt

        hooks.listen(store.database.engine, "before_cursor_execute", fail)
        with pytest.raises(KeyboardInterrupt):
            redact(store, target, "dpo", "request 12")
        hooks.remove(store.database.engine, "before_cursor_execute", fail)
        assert store.get(target.id) == target and store.head().seq == COUNT and verify(store).redacted == 0
    redact(store, target, "dpo", "request 12")
    assert verify(store).redacted == 1


def test_what_cannot_be_redacted(store: EventStore) -> None:
    record = redact(store, next(iter(store.read())), "dpo", "request 12")
    for event, reason, error in [
        (record, "why", EventError),
        (store.last(), " ", EventError),
        ("event:01JGT9Z5T0ZZZZZZZZZZZZZZZZ", "x", UnknownReferenceError),
    ]:
        with pytest.raises(error):
            redact(store, event, "dpo", reason)
    assert store.head().seq == COUNT + 1


def test_a_silent_erasure_is_counted(store: EventStore) -> None:
    with store.database.write() as connection:
        sql(f"DELETE FROM event_bodies {BODY_5}")(connection)
    checked = verify(store)
    assert checked.ok and checked.redacted == 1 and len(checked.unrecorded) == 1 and "without a record" in str(checked)


@pytest.mark.fast
def test_erased_words_are_gone_from_the_sqlite_files(tmp_path: Path) -> None:
    store = EventStore(Database(f"sqlite:///{tmp_path / 'events.db'}"), FixedClock())
    words = [f"Jane Doe {n} " + "x" * (n * 977) for n in range(1, 12)]  # small bodies, and bodies over several pages
    events = [store.append("incident.opened", "incident:i", {"words": w}, actor="ann") for w in words]
    for event in events[::2]:
        redact(store, event, "dpo", "request")
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert [f"Jane Doe {n} ".encode() in files for n in range(1, 12)] == [n % 2 == 0 for n in range(1, 12)]


# --- exports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bodies", [True, False], ids=["bodies", "sealed"])
@pytest.mark.parametrize("format", ["jsonl", "cloudevents"])
def test_an_export_is_checked_without_its_database(
    store: EventStore, tmp_path: Path, format: str, bodies: bool
) -> None:
    redact(store, next(iter(store.read(after=3))), "dpo", "request 12")
    store.append(
        "run.finished",
        "model:m@1",
        {"large": 1e20, "text": "\u2028 ö", "none": None, "empty": {}},
        actor="ö",
        correlation_id="job",
    )
    store.append("run.finished", "model:m@1", {}, actor="ann")
    path = tmp_path / "trail.jsonl"
    end = export_events(store, path, format=format, bodies=bodies)
    checked = verify_export(path, store.head())
    assert end == store.head() == checked.head and checked.ok, checked
    assert (
        (checked.events, checked.redacted, checked.withheld) == (COUNT + 3, 1, 0)
        if bodies
        else (COUNT + 3, 0, COUNT + 3)
    )
    assert ("plain" in path.read_text()) is bodies and [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    stream = io.StringIO()
    assert export_events(store, stream, format=format, bodies=bodies) == end and stream.getvalue() == path.read_text(
        encoding="utf-8"
    )


def edited(lines: list[dict], name: str, new: object) -> list[dict]:
    return [*lines[:4], lines[4] | {name: new}, *lines[5:]]


@pytest.mark.parametrize("format", ["jsonl", "cloudevents"])
def test_a_changed_export_is_found(store: EventStore, tmp_path: Path, format: str) -> None:
    cloud = format == "cloudevents"
    export_events(store, tmp_path / "good", format=format)
    lines = [json.loads(line) for line in (tmp_path / "good").read_text().splitlines()]
    cases = {
        "dropped": (lines[:4] + lines[5:], 5),
        "reordered": ([*lines[:4], lines[5], lines[4], *lines[6:]], 5),
        "edited header": (edited(lines, "actor", "ben"), 5),
        "edited body": (edited(lines, "data" if cloud else "body", {"rows": 99, "note": "plain"}), 5),
        "truncated": (lines[:7], 8),
    }
    for reason, (changed, seq) in cases.items():
        (tmp_path / "bad").write_text("\n".join(json.dumps(line) for line in changed))
        found = verify_export(tmp_path / "bad", store.head()).first_bad
        assert found is not None and (found.reason, found.seq) == (reason, seq)
    (tmp_path / "bad").write_text(
        "\n".join(
            json.dumps(line) for line in [*lines[:4], {k: v for k, v in lines[4].items() if k != "salt"}, *lines[5:]]
        )
    )
    assert verify_export(tmp_path / "bad").first_bad.reason == "edited body"
    for name in lines[4]:  # a line that lacks any one field is never accepted
        (tmp_path / "bad").write_text(
            "\n".join(
                json.dumps(line) for line in [*lines[:4], {k: v for k, v in lines[4].items() if k != name}, *lines[5:]]
            )
        )
        optional = {"specversion", "source", "datacontenttype", "correlation_id", "causation_id", "body", "data"}
        try:
            ok = verify_export(tmp_path / "bad").ok
        except ChainError:
            ok = False
        assert not ok or name in optional, name


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
names = ["seq", "id", "kind", "subject", "body", "salt", "digest", "specversion", "sequence", "type"]
odd_lines = st.fixed_dictionaries(dict.fromkeys(names[:4], anything), optional=dict.fromkeys(names[4:], anything)).map(
    lambda v: json.dumps(v).encode()
)


@pytest.mark.fast
@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        anything.map(lambda v: json.dumps(v).encode()),
        odd_lines,
    )
)
def test_any_file_is_either_an_export_or_told_apart(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "some.jsonl"
    path.write_bytes(content)
    try:
        assert verify_export(path, Anchor(1, "0" * 64, None)).events == 0
    except ChainError as error:
        assert error.fix


def test_exports_that_cannot_be_written_or_read(store: EventStore, tmp_path: Path) -> None:
    for target in (tmp_path / "missing" / "x", tmp_path):
        with pytest.raises(StorageError):
            export_events(store, target)
    with pytest.raises(StorageError):
        verify_export(tmp_path / "missing")
    with pytest.raises(EventError, match="format"):
        export_events(store, tmp_path / "x", format="csv")  # type: ignore[arg-type]
    with store.database.write() as connection:
        sql(f"UPDATE event_bodies SET body = 'x' {BODY_5}")(connection)
    (tmp_path / "x").write_text("before")
    with pytest.raises(ChainError, match="event 5"):
        export_events(store, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "before" and [
        p.name for p in tmp_path.iterdir() if "partial" in p.name
    ] == []


@pytest.mark.fast
def test_cloudevents_keep_to_the_standard(tmp_path: Path) -> None:
    """CloudEvents 1.0: required attributes, names of lower-case letters and digits, no null attributes, RFC 3339 times."""
    store = EventStore(Database(f"sqlite:///{tmp_path / 'events.db'}"), FixedClock())
    event = store.append(
        "dataset.saved", "dataset:loans@1", {"rows": 3}, actor="ann", correlation_id="job", causation_id="c"
    )
    cloud = to_cloudevent(event, "urn:lender")
    assert (
        {"id", "source", "specversion", "type"} <= cloud.keys()
        and cloud["specversion"] == "1.0"
        and cloud["source"] == "urn:lender"
    )
    assert all(name.isalnum() and name == name.lower() and len(name) <= 20 for name in cloud)
    assert (
        all(v is not None for v in cloud.values())
        and cloud["data"] == {"rows": 3}
        and cloud["datacontenttype"] == "application/json"
    )
    assert all(isinstance(v, (str, bool)) or -(2**31) <= v < 2**31 for name, v in cloud.items() if name != "data")
    assert (
        cloud["time"] == "2026-01-05T09:00:00.000000Z" and cloud["sequence"] == "1" and cloud["correlationid"] == "job"
    )
    redact(store, event, "dpo", "request")
    assert "data" not in to_cloudevent(store.get(event.id)) and json.dumps(cloud)


@pytest.mark.fast
def test_the_check_reads_in_batches(tmp_path: Path) -> None:
    """A long chain is checked row by row; no list of all of it is made."""
    store = EventStore(Database(f"sqlite:///{tmp_path / 'events.db'}"), FixedClock())
    with store.database.write() as connection:
        for n in range(1300):
            store.append("dataset.saved", "dataset:loans", {"n": n}, actor="ann", connection=connection)
    assert verify(store).events == 1300
    raw = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
    raw.execute("DROP TRIGGER event_bodies_no_update")
    raw.execute("UPDATE event_bodies SET body = '{}' WHERE id = (SELECT id FROM events WHERE seq = 1001)")
    raw.close()
    assert verify(store).first_bad.seq == 1001
