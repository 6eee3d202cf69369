"""Many processes on one table store, and processes killed in the middle of writing, erasing and collecting."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa

from mlops_workbench.workspace import catalog, collection, entries, erasure, files, parts, writing
from mlops_workbench.workspace.clock import SystemClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.digests import content_digest
from mlops_workbench.workspace.events import EventStore
from mlops_workbench.workspace.tables import TableStore

pytestmark = pytest.mark.process

fork = multiprocessing.get_context("fork")
NOW = timedelta(0)


def open_store(url: str, folder: Path) -> TableStore:
    return TableStore(Database(url, timeout=60), folder / "tables", SystemClock())


def run_all(*jobs: tuple[Callable[..., None], tuple[Any, ...]], seconds: float = 60) -> None:
    processes = [fork.Process(target=target, args=arguments, daemon=True) for target, arguments in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        assert process.exitcode == 0, process


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int64())})


def save(url: str, folder: Path, start: float, values: list[int], mode: str = "replace", times: int = 1) -> None:
    store = open_store(url, folder)
    events = EventStore(store.database, SystemClock())
    time.sleep(max(0.0, start - time.time()))
    for k in range(times):
        table = numbers(*(v + 1000 * k for v in values))
        store.write(
            "t", table, mode=mode,  # type: ignore[arg-type]
            commit=lambda c, v, created: created and events.append("dataset.saved", f"dataset:t@{v.version}", {"digest": v.digest}, actor="x", connection=c),
        )  # fmt: skip


def check(store: TableStore) -> None:
    """Every version reads, is what its digest says, has its one event, and no file is there that is not listed."""
    versions = store.versions("t") if store.names() else []
    assert [v.version for v in versions] == list(range(1, len(versions) + 1))
    for version in versions:
        table = store.read("t", version.version, verify=True)
        assert table.num_rows == version.rows and content_digest(table) == version.digest
    subjects = [e.subject for e in EventStore(store.database, SystemClock()).read(kind="dataset.saved")]
    assert sorted(subjects) == sorted(f"dataset:t@{v.version}" for v in versions)
    store.collect(NOW)
    with store.database.read() as connection:
        assert (
            not connection.execute(sa.select(catalog.leases_table.c.id)).all()
            and not connection.execute(sa.select(catalog.pending_table.c.file)).all()
        )
        known = set(connection.execute(sa.select(catalog.parts_table.c.file)).scalars())
    assert {f.name for f in store.files.list()} == known


def test_two_processes_save_the_same_dataset(any_database_url: str, tmp_path: Path) -> None:
    start = time.time() + 0.5
    run_all(*[(save, (any_database_url, tmp_path, start, [1, 2, 3]))] * 2)
    store = open_store(any_database_url, tmp_path)
    assert len(store.versions("t")) == 1
    check(store)


def test_two_processes_save_different_versions(any_database_url: str, tmp_path: Path) -> None:
    start = time.time() + 0.5
    run_all((save, (any_database_url, tmp_path, start, [1])), (save, (any_database_url, tmp_path, start, [2])))
    store = open_store(any_database_url, tmp_path)
    assert {tuple(store.read("t", v)["n"].to_pylist()) for v in (1, 2)} == {(1,), (2,)}
    check(store)


def test_appends_of_several_processes_are_all_there(any_database_url: str, tmp_path: Path) -> None:
    start = time.time() + 0.5
    run_all(*[(save, (any_database_url, tmp_path, start, [n], "append", 5)) for n in range(4)])
    store = open_store(any_database_url, tmp_path)
    assert len(store.versions("t")) == 20
    assert sorted(store.read("t")["n"].to_pylist()) == sorted(n + 1000 * k for n in range(4) for k in range(5))
    check(store)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but the process is killed instead at call number `count`."""
    calls = iter(range(count))

    def counted(*arguments: Any, **keywords: Any) -> Any:
        if next(calls, None) is None:
            die()
        return real(*arguments, **keywords)

    return counted


def killed(target: Callable[..., None], *arguments: Any) -> None:
    process = fork.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


WRITE_POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "half a file": (
        files,
        "_write_all",
        lambda descriptor, data: (os.write(descriptor, data[: len(data) // 2]), die()),
    ),
    "second file": (files, "_write_all", after(1, files._write_all)),
    "before the rename": (files.os, "replace", die),
    "after the rename": (files, "_sync_folder", after(1, files._sync_folder)),
    "before the commit": (writing, "commit_version", die),
    "in the commit": (entries, "insert_version", die),
    "in the event": (EventStore, "append", die),
}


def write_and_die(url: str, folder: Path, point: str) -> None:
    place, name, instead = WRITE_POINTS[point]
    parts.PART_ROWS = parts.BLOCK_ROWS
    open_store(url, folder)
    setattr(place, name, instead)
    save(url, folder, 0, list(range(20_000)))


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_killed_while_writing(any_database_url: str, tmp_path: Path, point: str) -> None:
    save(any_database_url, tmp_path, 0, [7])
    killed(write_and_die, any_database_url, tmp_path, point)
    store = open_store(any_database_url, tmp_path)
    assert [v.version for v in store.versions("t")] == [1] and store.read("t")["n"].to_pylist() == [7]
    check(store)
    save(any_database_url, tmp_path, 0, list(range(20_000)))
    assert store.read("t").num_rows == 20_000
    check(store)


ERASE_POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "after the plan": (erasure, "_rewrite", die),
    "second part": (erasure, "_rewrite", after(1, erasure._rewrite)),
    "half a file": (
        files,
        "_write_all",
        lambda descriptor, data: (os.write(descriptor, data[: len(data) // 2]), die()),
    ),
    "in the switch": (erasure, "retire_unlisted", die),
    "after the switch": (erasure, "_delete_now", die),
}


def erase_and_die(url: str, folder: Path, point: str) -> None:
    store = open_store(url, folder)
    place, name, instead = ERASE_POINTS[point]
    setattr(place, name, instead)
    store.erase("t", "n", [3])


@pytest.mark.parametrize("point", ERASE_POINTS)
def test_killed_while_erasing(any_database_url: str, tmp_path: Path, point: str) -> None:
    store = open_store(any_database_url, tmp_path)
    for values in ([1, 2, 3], [3, 4], [3]):
        store.write("t", numbers(*values), mode="append")
    store.database.close()
    killed(erase_and_die, any_database_url, tmp_path, point)
    finished = point == "after the switch"
    assert store.read("t")["n"].to_pylist() == ([1, 2, 4] if finished else [1, 2, 3, 3, 4, 3])
    assert store.collect(NOW).unfinished == (() if finished else ("t",))
    done = store.resume_erasures()
    assert len(done) == (0 if finished else 1) and store.resume_erasures() == []
    assert [store.read("t", v)["n"].to_pylist() for v in (1, 2, 3)] == [[1, 2], [1, 2, 4], [1, 2, 4]]
    store.collect(NOW)
    with store.database.read() as connection:
        known = set(connection.execute(sa.select(catalog.parts_table.c.file)).scalars())
        assert connection.execute(sa.select(catalog.erasures_table.c["values"])).scalars().all() == [None]
    assert {f.name for f in store.files.list()} == known and len(known) == 2


def collect_and_die(url: str, folder: Path) -> None:
    store = open_store(url, folder)
    real = store.files.remove
    store.files.remove = after(2, real)  # type: ignore[method-assign]
    collection.collect(store.database, store.files, store.clock, NOW)


def test_killed_while_collecting(any_database_url: str, tmp_path: Path) -> None:
    store = open_store(any_database_url, tmp_path)
    for k in range(6):
        store.write("t", numbers(k))
    for version in range(1, 6):
        store.drop("t", version)
    store.database.close()
    killed(collect_and_die, any_database_url, tmp_path)
    assert store.read("t", verify=True)["n"].to_pylist() == [5] and len(list(store.files.list())) == 4
    assert store.collect(NOW).files == 3 and len(list(store.files.list())) == 1


def read_slowly(url: str, folder: Path, ready: Any, go: Any, seen: Any) -> None:
    store = open_store(url, folder)
    reader = store.batches("t", 1, rows=1000)
    total = next(reader).num_rows
    ready.set()
    go.wait(30)
    seen.put(total + sum(b.num_rows for b in reader))


def test_collection_and_erasure_beside_a_reader_in_another_process(
    any_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", parts.BLOCK_ROWS)
    store = open_store(any_database_url, tmp_path)
    store.write("t", numbers(*range(60_000)))
    store.database.close()
    ready, go, seen = fork.Event(), fork.Event(), fork.Queue()
    reader = fork.Process(target=read_slowly, args=(any_database_url, tmp_path, ready, go, seen), daemon=True)
    reader.start()
    assert ready.wait(30)
    erased = store.erase("t", "n", [59_999])
    store.write("t", numbers(1))
    store.drop("t", 1)
    kept = store.collect(NOW)
    assert (erased.waiting, kept.files) == (1, 0) and kept.in_use == 9
    go.set()
    assert seen.get(timeout=30) == 60_000  # the reader sees the version as it was when it began
    reader.join(30)
    assert store.collect(NOW).files == 9


def test_a_killed_reader_holds_nothing_back(any_database_url: str, tmp_path: Path) -> None:
    store = open_store(any_database_url, tmp_path)
    store.write("t", numbers(1))
    store.database.close()
    ready = fork.Event()
    reader = fork.Process(target=read_slowly, args=(any_database_url, tmp_path, ready, fork.Event(), None))
    reader.start()
    assert ready.wait(30)
    store.write("t", numbers(2))
    store.drop("t", 1)
    assert store.collect(NOW).in_use == 1
    reader.kill()
    reader.join()
    assert store.collect(NOW).files == 1


def churn(url: str, folder: Path, seed: int, seconds: float) -> None:
    store, draw = open_store(url, folder), random.Random(seed)
    events = EventStore(store.database, SystemClock())
    end = time.time() + seconds
    while time.time() < end:
        values = [draw.randrange(1000) for _ in range(draw.randrange(1, 50))]
        store.write(
            "t", numbers(*values), mode=draw.choice(["append", "replace"]),  # type: ignore[arg-type]
            commit=lambda c, v, created: created and events.append("dataset.saved", f"dataset:t@{v.version}", {"digest": v.digest}, actor="x", connection=c),
        )  # fmt: skip
        if draw.random() < 0.3:
            store.read("t")


def sweep(url: str, folder: Path, seconds: float) -> None:
    store, end = open_store(url, folder), time.time() + seconds
    while time.time() < end:
        store.collect(NOW)


@pytest.mark.slow
def test_writers_killed_at_random_beside_a_collector(any_database_url: str, tmp_path: Path) -> None:
    open_store(any_database_url, tmp_path).database.close()
    draw, seconds = random.Random(5), 8.0
    collector = fork.Process(target=sweep, args=(any_database_url, tmp_path, seconds), daemon=True)
    collector.start()
    end, seed, running = time.time() + seconds, 0, []
    while time.time() < end:
        while len(running) < 3:
            seed += 1
            writer = fork.Process(target=churn, args=(any_database_url, tmp_path, seed, seconds), daemon=True)
            writer.start()
            running.append(writer)
        time.sleep(draw.uniform(0.05, 0.6))
        victim = running.pop(draw.randrange(len(running)))
        victim.kill()
        victim.join()
    for writer in running:
        writer.kill()
        writer.join()
    collector.join(30)
    assert collector.exitcode == 0
    store = open_store(any_database_url, tmp_path)
    assert len(store.versions("t")) > 3
    check(store)
