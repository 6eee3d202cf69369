"""Backup and restore of all stores: consistent beside writers, checked, never over something, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa

from mlops_workbench.errors import StorageError, TableError, WorkspaceError
from mlops_workbench.workspace import backups, dumps
from mlops_workbench.workspace.audit import verify
from mlops_workbench.workspace.backups import MANIFEST, Stores, backup, check_backup, restore, restore_folder, stores_in
from mlops_workbench.workspace.clock import SystemClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.dumps import is_empty
from mlops_workbench.workspace.events import EventStore
from mlops_workbench.workspace.files import Files
from mlops_workbench.workspace.tables import TableStore

fork = multiprocessing.get_context("fork")
CLOCK = SystemClock()


def open_store(stores: Stores) -> tuple[TableStore, EventStore]:
    tables = TableStore(Database(stores.database, timeout=60), stores.tables, CLOCK)
    return tables, EventStore(tables.database, CLOCK)


def save(stores: Stores, *values: int, mode: str = "append") -> None:
    tables, events = open_store(stores)
    tables.write(
        "loans", pd.DataFrame({"n": list(values)}), mode=mode,  # type: ignore[arg-type]
        commit=lambda c, v, created: created and events.append("dataset.saved", f"dataset:loans@{v.version}", {"rows": v.rows}, actor="x", connection=c),
    )  # fmt: skip
    tables.database.close()


def fill_tracking(url: str) -> None:
    """A database that this package did not define, with types and keys like MLflow's."""
    metadata = sa.MetaData()
    runs = sa.Table(
        "runs",
        metadata,
        sa.Column("run_uuid", sa.String(32), primary_key=True),
        sa.Column("deleted", sa.Boolean),
        sa.Column("start", sa.BigInteger),
    )
    metrics = sa.Table(
        "metrics", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("run", sa.String(32), sa.ForeignKey("runs.run_uuid")),
        sa.Column("value", sa.Float(53)), sa.Column("blob", sa.LargeBinary), sa.CheckConstraint("value < 1e9"),
    )  # fmt: skip
    database = Database(url)
    database.create(metadata)
    with database.write() as connection:
        connection.execute(sa.insert(runs).values(run_uuid="a" * 32, deleted=False, start=2**40))
        connection.execute(sa.insert(metrics), [{"run": "a" * 32, "value": 0.1, "blob": b"\x00\xff"}] * 2)
    database.close()


def check_tracking(url: str) -> None:
    database = Database(url)
    with database.write() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT m.id, m.value, r.deleted, r.start FROM metrics m JOIN runs r ON r.run_uuid = m.run ORDER BY m.id"
            )
        ).all()
        assert [tuple(r) for r in rows] == [(1, 0.1, False, 2**40), (2, 0.1, False, 2**40)]
        connection.execute(
            sa.text("INSERT INTO metrics (run, value) VALUES (NULL, 2)")
        )  # the counter goes on after the copied rows
    database.close()


def state_files(state: Path) -> dict[str, bytes]:
    return {str(p.relative_to(state)): p.read_bytes() for p in state.rglob("*") if p.is_file()}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "credit" / ".workbench"
    state.mkdir(parents=True)
    (state / "layout.json").write_text('{"layout": 1}\n')
    for values in ([1, 2], [3], [4, 5]):
        save(stores_in(state), *values)
    fill_tracking(f"sqlite:///{state}/mlflow.db")
    Files(state / "artifacts").write("1/abc/artifacts/model.bin", os.urandom(5000))
    return state


def check(stores: Stores) -> None:
    tables, events = open_store(stores)
    versions = tables.versions("loans")
    for version in versions:
        assert tables.read("loans", version.version, verify=True).num_rows == version.rows
    assert [e.subject for e in events.read()] == [f"dataset:loans@{v.version}" for v in versions] and verify(events).ok
    tables.database.close()
    save(stores, 99)


@pytest.mark.fast
def test_backup_and_restore_elsewhere(state: Path, tmp_path: Path) -> None:
    made = backup(stores_in(state), tmp_path / "backup", CLOCK)
    assert (made.tables, made.events, made.left_out) == (3, 3, ()) and check_backup(tmp_path / "backup") == made
    shutil.rmtree(state.parent)
    there = tmp_path / "other" / "place" / ".workbench"
    restore_folder(tmp_path / "backup", there)
    check(stores_in(there))
    check_tracking(stores_in(there).tracking or "")
    assert (there / "artifacts/1/abc/artifacts/model.bin").stat().st_size == 5000 and json.loads(
        (there / "layout.json").read_text()
    ) == {"layout": 1}


@pytest.mark.fast
def test_moving_the_folder_is_enough(state: Path, tmp_path: Path) -> None:
    state.parent.rename(tmp_path / "moved")
    check(stores_in(tmp_path / "moved" / ".workbench"))


@pytest.mark.fast
def test_to_and_from_an_object_store(state: Path, tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}/backup"
    backup(stores_in(state), place, CLOCK)
    remote = Stores(
        f"sqlite:///{tmp_path}/r/workbench.db",
        f"memory://{tmp_path.name}/tables",
        None,
        f"memory://{tmp_path.name}/artifacts",
    )
    restore(place, remote)
    check(remote)
    backup(remote, tmp_path / "second", CLOCK)
    restore_folder(tmp_path / "second", tmp_path / "third" / ".workbench")
    check(stores_in(tmp_path / "third" / ".workbench"))


@pytest.mark.fast
def test_nothing_is_overwritten(state: Path, tmp_path: Path) -> None:
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    before = state_files(state)
    with pytest.raises(WorkspaceError, match="not empty"):
        restore_folder(tmp_path / "backup", state)
    for name in ("tables", "artifacts", "database"):
        stores = Stores(
            f"sqlite:///{tmp_path}/{name}/w.db", str(tmp_path / name / "t"), None, str(tmp_path / name / "a")
        )
        place = {"tables": "t/x", "artifacts": "a/x", "database": "w.db"}[name]
        Files(tmp_path / name).write(place, b"mine")
        with pytest.raises(WorkspaceError, match="not empty"):
            restore(tmp_path / "backup", stores)
        assert (tmp_path / name / place).read_bytes() == b"mine"
    with pytest.raises(WorkspaceError, match="complete backup already"):
        backup(stores_in(state), tmp_path / "backup", CLOCK)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(WorkspaceError, match="not empty"):
        backup(stores_in(state), tmp_path / "full", CLOCK)
    assert {k: v for k, v in state_files(state).items() if ".db" not in k} == {
        k: v for k, v in before.items() if ".db" not in k
    }


@pytest.mark.fast
def test_damage_is_found_before_anything_is_restored(state: Path, tmp_path: Path) -> None:
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    files = [p for p in (tmp_path / "backup").rglob("*") if p.is_file() and p.name != MANIFEST]
    assert len(files) == 6
    for path in files:
        healthy = path.read_bytes()
        for harm in (healthy[:-1], healthy[:-1] + bytes([healthy[-1] ^ 1]), None):
            path.unlink() if harm is None else path.write_bytes(harm)
            with pytest.raises(TableError) as caught:
                restore_folder(tmp_path / "backup", tmp_path / "new" / ".workbench")
            assert caught.value.files == [str(path.relative_to(tmp_path / "backup"))]
            path.write_bytes(healthy)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    part = next((state / "tables").rglob("*.parquet"))
    part.write_bytes(b"?" + part.read_bytes()[1:])
    with pytest.raises(TableError) as caught:
        backup(stores_in(state), tmp_path / "second", CLOCK)
    assert part.name in str(caught.value)
    with pytest.raises(WorkspaceError, match="not a complete backup"):
        check_backup(tmp_path / "second")


@pytest.mark.fast
def test_newer_formats_and_layouts_are_refused(state: Path, tmp_path: Path) -> None:
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    path = tmp_path / "backup" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(WorkspaceError, match="format 2"):
        restore_folder(tmp_path / "backup", tmp_path / "new")
    path.write_text("{")
    with pytest.raises(WorkspaceError, match="damaged"):
        restore_folder(tmp_path / "backup", tmp_path / "new")
    with pytest.raises(WorkspaceError, match="no backup"):
        restore_folder(state, tmp_path / "new")


@pytest.mark.fast
def test_a_tracking_server_is_left_out_and_said_so(state: Path, tmp_path: Path) -> None:
    stores = Stores(f"sqlite:///{state}/workbench.db", str(state / "tables"), "http://tracking:5000")
    assert "tracking:5000" in backup(stores, tmp_path / "backup", CLOCK).left_out[0]


@pytest.mark.fast
def test_leases_of_the_past_are_forgotten(state: Path, tmp_path: Path) -> None:
    tables, _ = open_store(stores_in(state))
    reader = tables.batches("loans")
    next(reader)
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    restore_folder(tmp_path / "backup", tmp_path / "new")
    new, _ = open_store(stores_in(tmp_path / "new"))
    with new.database.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM table_leases")).scalar() == 0
    reader.close()


def keep_saving(state: Path, stop: Any) -> None:
    from datetime import timedelta

    number = 10
    while not stop.is_set():
        number += 1
        save(stores_in(state), number, mode="append" if number % 3 else "replace")
        tables, _ = open_store(stores_in(state))
        versions = tables.versions("loans")
        if len(versions) > 6:
            tables.erase("loans", "n", [number])
        tables.collect(timedelta(0))
        tables.database.close()


@pytest.mark.process
def test_a_backup_beside_a_writer_an_eraser_and_a_collector_is_consistent(state: Path, tmp_path: Path) -> None:
    stop = fork.Event()
    writer = fork.Process(target=keep_saving, args=(state, stop), daemon=True)
    writer.start()
    for n in range(5):
        time.sleep(0.2)
        backup(stores_in(state), tmp_path / f"b{n}", CLOCK)
    assert writer.is_alive()
    stop.set()
    writer.join(30)
    assert writer.exitcode == 0
    for n in range(5):
        there = tmp_path / f"r{n}" / ".workbench"
        restore_folder(tmp_path / f"b{n}", there)
        check(stores_in(there))


def back_up_and_die(state: Path, target: Path, count: int) -> None:
    calls, real = iter(range(count)), backups._copy

    def copy(*arguments: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    backups._copy = copy
    backup(stores_in(state), target, CLOCK)


@pytest.mark.process
@pytest.mark.parametrize("count", [0, 2, 5])
def test_killed_while_backing_up_then_continued(state: Path, tmp_path: Path, count: int) -> None:
    process = fork.Process(target=back_up_and_die, args=(state, tmp_path / "backup", count))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(WorkspaceError, match="not a complete backup"):
        restore_folder(tmp_path / "backup", tmp_path / "new")
    save(stores_in(state), 77)
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    restore_folder(tmp_path / "backup", tmp_path / "new")
    check(stores_in(tmp_path / "new"))


def restore_and_die(source: Path, state: Path) -> None:
    backups.load_dump = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    restore_folder(source, state)


@pytest.mark.process
def test_killed_while_restoring(state: Path, tmp_path: Path) -> None:
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    process = fork.Process(target=restore_and_die, args=(tmp_path / "backup", tmp_path / "new" / ".workbench"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "new" / ".workbench").exists()
    restore_folder(tmp_path / "backup", tmp_path / "new" / ".workbench")
    check(stores_in(tmp_path / "new" / ".workbench"))


@pytest.mark.fast
def test_a_full_disk_while_backing_up_and_restoring(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    backup(stores_in(state), tmp_path / "backup", CLOCK)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlops_workbench.workspace.files.shutil.copyfile", full)
        for attempt in (
            lambda: backup(stores_in(state), tmp_path / "second", CLOCK),
            lambda: restore_folder(tmp_path / "backup", tmp_path / "new"),
        ):
            with pytest.raises(StorageError) as caught:
                attempt()
            assert caught.value.trouble == "full"
    assert not (tmp_path / "new").exists()
    backup(stores_in(state), tmp_path / "second", CLOCK)
    restore_folder(tmp_path / "second", tmp_path / "new")
    check(stores_in(tmp_path / "new"))


def postgres_stores(server: Any, folder: Path) -> Stores:
    return Stores(server.new_database(), str(folder / "tables"), server.new_database(), str(folder / "artifacts"))


@pytest.mark.service
@pytest.mark.parametrize("tool", ["pg_dump", "rows"])
def test_postgresql(postgres_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    if tool == "rows":
        monkeypatch.setattr(dumps.shutil, "which", lambda name: None)
    elif dumps.shutil.which("pg_dump") is None:
        pytest.skip("pg_dump is not installed")
    stores = postgres_stores(postgres_server, tmp_path / "a")
    for values in ([1], [2, 3]):
        save(stores, *values)
    fill_tracking(stores.tracking or "")
    backup(stores, tmp_path / "backup", CLOCK)
    kinds = json.loads((tmp_path / "backup" / MANIFEST).read_text())["databases"]
    assert set(kinds.values()) == {"pg_dump" if tool == "pg_dump" else "sqlite"}
    other = postgres_stores(postgres_server, tmp_path / "b")
    restore(tmp_path / "backup", other)
    check(other)
    check_tracking(other.tracking or "")
    with pytest.raises(WorkspaceError, match="not empty"):
        restore(tmp_path / "backup", Stores(other.database, str(tmp_path / "c")))
    if tool == "rows":  # also onto a laptop
        restore_folder(tmp_path / "backup", tmp_path / "laptop")
        check(stores_in(tmp_path / "laptop"))
        check_tracking(stores_in(tmp_path / "laptop").tracking or "")
    else:
        with pytest.raises(WorkspaceError, match="only be restored into PostgreSQL"):
            restore_folder(tmp_path / "backup", tmp_path / "laptop")


@pytest.mark.service
def test_from_a_laptop_to_a_server(state: Path, postgres_server: Any, tmp_path: Path) -> None:
    backup(stores_in(state), tmp_path / "backup", CLOCK)
    stores = postgres_stores(postgres_server, tmp_path / "server")
    restore(tmp_path / "backup", stores)
    check(stores)
    check_tracking(stores.tracking or "")
    database = Database(stores.database)
    with pytest.raises(Exception, match="append-only"), database.write() as connection:
        connection.execute(sa.text("DELETE FROM events"))
    database.close()
    assert not is_empty(stores.database)
