"""What goes wrong with disks: full, read-only, damaged. Every fault is a `WorkbenchError` with a fix, and nothing is half-written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sa

from mlops_workbench.errors import StorageError, TableError
from mlops_workbench.workspace import catalog, files, parts
from mlops_workbench.workspace.clock import SystemClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.tables import TableStore

fork = multiprocessing.get_context("fork")
NOW = timedelta(0)


def open_store(folder: Path) -> TableStore:
    return TableStore(Database(f"sqlite:///{folder}/workbench.db"), folder / "tables", SystemClock())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableStore:
    monkeypatch.setattr(parts, "PART_ROWS", parts.BLOCK_ROWS)
    return open_store(tmp_path)


def rows(count: int, seed: int = 0) -> pa.Table:
    return pa.table({"x": np.random.default_rng(seed).random(count)})


def assert_clean(store: TableStore) -> None:
    with store.database.read() as connection:
        known = set(connection.execute(sa.select(catalog.parts_table.c.file)).scalars())
        assert (
            not connection.execute(sa.select(catalog.leases_table.c.id)).all()
            and not connection.execute(sa.select(catalog.pending_table.c.file)).all()
        )
    assert {f.name for f in store.files.list()} == known


@pytest.mark.fast
@pytest.mark.parametrize("full_after", [0, 1, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_broken_disk(
    store: TableStore, monkeypatch: pytest.MonkeyPatch, full_after: int, number: int
) -> None:
    store.write("t", rows(10))
    real, calls = files._write_all, iter(range(full_after))

    def write(descriptor: int, data: memoryview) -> None:
        if next(calls, None) is None:
            real(descriptor, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        real(descriptor, data)

    attempts: list[Callable[[], Any]] = [
        lambda: store.write("t", rows(40_000, 1)),
        lambda: store.write("t", rows(40_000, 1), mode="append"),
    ]
    for attempt in attempts:
        with monkeypatch.context() as patch:
            patch.setattr(files, "_write_all", write)
            with pytest.raises(StorageError) as caught:
                attempt()
        assert (
            caught.value.trouble == ("io" if number == errno.EIO else "full")
            and caught.value.fix
            and caught.value.where
        )
        assert store.version("t").version == 1 and store.read("t", verify=True).equals(rows(10))
        assert_clean(store)
    assert store.write("t", rows(40_000, 1)).version == 2


@pytest.mark.fast
def test_a_full_disk_while_erasing(store: TableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("t", pa.table({"n": range(30_000)}))

    def full(descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_all", full)
        with pytest.raises(StorageError):
            store.erase("t", "n", [5])
    assert store.read("t").num_rows == 30_000 and store.collect(NOW).unfinished == ("t",)
    (done,) = store.resume_erasures()
    assert done.rows == 1 and store.read("t").num_rows == 29_999
    assert_clean(store)


def in_child(work: Callable[[], None]) -> None:
    """Run in a child process, so that it can give up rights or set limits; assertion errors come back."""
    results = fork.SimpleQueue()

    def run() -> None:
        try:
            work()
            results.put("")
        except BaseException:
            results.put(traceback.format_exc())

    process = fork.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    message = results.get()
    assert not message, message


@pytest.mark.process
def test_the_operating_systems_own_limit(tmp_path: Path) -> None:
    """Not a mock: the kernel refuses to write beyond a size, in the middle of a file."""
    open_store(tmp_path).write("t", rows(10))

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        store = open_store(tmp_path)
        with pytest.raises(StorageError) as caught:
            store.write("t", rows(100_000))
        assert caught.value.trouble == "full"
        assert store.read("t").num_rows == 10
        assert_clean(store)

    in_child(limited)
    assert open_store(tmp_path).write("t", rows(100_000)).version == 2


def without_rights(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return run


def close_to_others(folder: Path, mode: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(mode if path.is_dir() else mode & 0o666)


@pytest.mark.process
def test_no_permission_to_write(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("readonly")
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)
    store = open_store(folder)
    store.write("t", rows(10))
    store.database.close()

    def read_only() -> None:
        reader = open_store(folder)
        assert reader.read("t", verify=True).num_rows == 10 and reader.versions("t")
        for attempt in (
            lambda: reader.write("t", rows(20)),
            lambda: reader.drop("t", 1),
            lambda: reader.erase("t", "x", [1.0]),
            reader.collect,
        ):
            with pytest.raises(StorageError) as caught:
                attempt()
            assert caught.value.trouble == "readonly" and caught.value.fix, caught.value

    # SQLite reads a database with a write-ahead log in a closed folder only while somebody else has it open
    hold = f"import sqlite3, sys; c = sqlite3.connect({str(folder / 'workbench.db')!r}); c.execute('SELECT * FROM table_state').fetchall(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        close_to_others(folder, 0o555)
        try:
            in_child(without_rights(read_only))
        finally:
            close_to_others(folder, 0o755)
            holder.communicate()

    close_to_others(folder / "tables", 0o555)
    for path in folder.glob("workbench.db*"):
        path.chmod(0o666)
    folder.chmod(0o777)

    def tables_read_only() -> None:
        with pytest.raises(StorageError) as caught:
            open_store(folder).write("t", rows(20))
        assert caught.value.trouble == "readonly" and "tables" in caught.value.where

    in_child(without_rights(tables_read_only))
    close_to_others(folder / "tables", 0o755)
    assert store.version("t").version == 1
    assert_clean(store)


@pytest.mark.fast
def test_any_damaged_byte_of_a_part_is_found(store: TableStore) -> None:
    version = store.write("t", rows(20_000))
    for part in store.parts("t"):
        path = Path(store.files.path(part.file))
        healthy = path.read_bytes()
        places = np.random.default_rng(1).integers(0, len(healthy), 6)
        for place in places:
            path.write_bytes(healthy[:place] + bytes([healthy[place] ^ 0x10]) + healthy[place + 1 :])
            with pytest.raises(TableError) as caught:
                store.read("t", verify=True)
            assert caught.value.part == part.digest and part.file in caught.value.where
        for content in (b"", healthy[: len(healthy) // 2], b"not parquet"):
            path.write_bytes(content)
            with pytest.raises(TableError) as caught:
                store.read("t")
            assert caught.value.part == part.digest
        path.unlink()
        for call in (lambda: store.read("t"), lambda: list(store.batches("t")), lambda: store.verify("t")):
            with pytest.raises((TableError, StorageError)):
                call()
        path.write_bytes(healthy)
    assert store.read("t", verify=True).num_rows == version.rows


@pytest.mark.fast
def test_saving_again_somewhere_else_does_not_rely_on_a_lost_part(store: TableStore) -> None:
    store.write("t", rows(100))
    Path(store.files.path(store.parts("t")[0].file)).unlink()
    store.write("u", rows(100))
    assert store.read("u").num_rows == 100
    assert store.read("t", verify=True).num_rows == 100  # and heals the version that lost it
    part = store.parts("t")[0]
    Path(store.files.path(part.file)).write_bytes(b"PAR1")
    assert store.write("t", rows(100)).version == 1 and store.read("t").num_rows == 100
    store.collect(NOW)
    assert_clean(store)


@pytest.mark.fast
def test_pages_are_checked_without_asking(store: TableStore) -> None:
    store.write("t", rows(8_000))
    path = Path(store.files.path(store.parts("t")[0].file))
    healthy = path.read_bytes()
    path.write_bytes(healthy[:30_000] + bytes([healthy[30_000] ^ 1]) + healthy[30_001:])
    with pytest.raises(TableError) as caught:
        store.read("t")
    assert caught.value.damaged
