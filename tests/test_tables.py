"""The table store over both databases: versions, appends, time travel, erasure, collection, registration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_workbench.errors import SourceError, StorageError, TableError, WorkspaceError
from mlops_workbench.workspace import catalog, parts
from mlops_workbench.workspace.clock import FixedClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.digests import content_digest
from mlops_workbench.workspace.files import Files
from mlops_workbench.workspace.tables import TableStore

NOW = timedelta(0)


def make_store(url: str, folder: Path) -> TableStore:
    return TableStore(Database(url, timeout=20), folder / "tables", FixedClock(step=timedelta(milliseconds=1)))


@pytest.fixture
def store(any_database_url: str, tmp_path: Path) -> Iterator[TableStore]:
    store = make_store(any_database_url, tmp_path)
    yield store
    store.database.close()


@pytest.fixture
def local(tmp_path: Path) -> TableStore:
    return make_store(f"sqlite:///{tmp_path / 'w.db'}", tmp_path)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", parts.BLOCK_ROWS)


def numbers(*values: Any) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int64())})


def listed(store: TableStore) -> list[str]:
    return sorted(f.name for f in store.files.list())


def test_versions_and_time_travel(store: TableStore) -> None:
    contents = [[1, 2], [1, 2, 3], [4]]
    for values in contents:
        store.write("loans", numbers(*values))
    assert [v.version for v in store.versions("loans")] == [1, 2, 3]
    for version, values in enumerate(contents, 1):
        assert store.read("loans", version)["n"].to_pylist() == values
    assert store.read("loans").equals(store.read("loans", 3))
    assert store.names() == ["loans"] and store.names("x") == []


def test_equal_to_the_latest_is_that_version_and_equal_to_an_earlier_one_is_not(store: TableStore) -> None:
    calls: list[tuple[int, bool]] = []
    note = lambda connection, version, created: calls.append((version.version, created))  # noqa: E731
    for values in ([1], [1], [2], [1]):
        store.write("loans", numbers(*values), commit=note)
    assert calls == [(1, True), (1, False), (2, True), (3, True)]
    one, _, three = store.versions("loans")
    assert one.digest == three.digest and store.parts("loans", 1) == store.parts("loans", 3)
    assert len(listed(store)) == 2


def test_grown_and_whole_are_one_content(store: TableStore, small_parts: None) -> None:
    rng = np.random.default_rng(1)
    whole = pa.table({"x": rng.random(40_000), "s": pa.array(rng.choice(["a", "b", None], 40_000))})
    cuts = [0, 3, 9_000, 9_001, 25_000, 40_000]
    for a, b in itertools.pairwise(cuts):
        store.write("grown", whole.slice(a, b - a), mode="append")
    assert store.version("grown").digest == content_digest(whole)
    assert store.write("grown", whole).version == len(cuts) - 1
    assert store.read("grown").equals(whole)
    assert store.read("grown", 3).equals(whole.slice(0, 9_001))


def test_appends_share_parts(store: TableStore) -> None:
    for n in range(6):
        store.write("log", numbers(n), mode="append")
    files = [[p.file for p in store.parts("log", v)] for v in range(1, 7)]
    assert all(files[i] == files[5][: i + 1] for i in range(6)) and len(listed(store)) == 6
    with store.database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(catalog.members_table)).scalar() == 6


def test_a_longer_table_shares_its_first_parts(store: TableStore, small_parts: None) -> None:
    long = numbers(*range(50_000))
    store.write("a", long.slice(0, 20_000))
    store.write("b", long)
    a, b = ([p.file for p in store.parts(n)] for n in "ab")
    assert a[:2] == b[:2] and a[2] != b[2]


def test_schema_evolution(store: TableStore) -> None:
    store.write("t", pa.table({"n": [1, 2], "note": pa.nulls(2)}))
    store.write("t", pa.table({"note": ["x"], "n": [3], "arm": ["canary"]}), mode="append")
    assert store.read("t").to_pylist()[1:] == [
        {"n": 2, "note": None, "arm": None},
        {"n": 3, "note": "x", "arm": "canary"},
    ]
    assert store.read("t", 1).column_names == ["n", "note"]
    assert store.version("t").digest == content_digest(store.read("t"))
    for bad in ({"n": [1.5], "note": ["x"], "arm": ["y"]}, {"n": [1], "note": ["x"]}):
        with pytest.raises(TableError, match=r"column '(n|arm)'"):
            store.write("t", pa.table(bad), mode="append")
    store.write("t", pa.table({"n": [4], "note": pa.nulls(1), "arm": pa.nulls(1)}), mode="append")
    assert store.read("t")["note"].to_pylist() == [None, None, "x", None] and store.version(
        "t"
    ).digest == content_digest(store.read("t"))


def test_expected(store: TableStore) -> None:
    store.write("t", numbers(1), expected=0)
    store.write("t", numbers(2), expected=1)
    for expected in (0, 1, 3):
        with pytest.raises(TableError) as caught:
            store.write("t", numbers(3), expected=expected)
        assert caught.value.conflict and caught.value.latest == 2
    assert store.version("t").version == 2 and len(listed(store)) == 2


def test_a_refusing_commit_leaves_nothing(store: TableStore) -> None:
    def refuse(connection: Any, version: Any, created: bool) -> None:
        raise EventRefused

    class EventRefused(Exception): ...

    with pytest.raises(EventRefused):
        store.write("t", numbers(1), commit=refuse)
    assert store.names() == [] and listed(store) == []
    with pytest.raises(EventRefused):
        store.register("t", "delta://x", 1, pa.schema([("a", pa.int64())]), commit=refuse)
    assert store.names() == []


def test_streams_have_flat_memory_and_equal_digests(local: TableStore) -> None:
    def stream(rows: int) -> Iterator[pa.RecordBatch]:
        for start in range(0, 3_000_000, rows):
            ids = np.arange(start, min(start + rows, 3_000_000))
            yield pa.record_batch({"id": ids, "half": ids / 2})

    pool = pa.default_memory_pool()
    version = local.write("stream", stream(70_001))
    again = local.write("stream", stream(500_000))
    assert version == again and version.rows == 3_000_000 and version.parts == 3
    before, most, seen = pool.bytes_allocated(), 0, 0
    for batch in local.batches("stream"):
        seen += batch.num_rows
        most = max(most, pool.bytes_allocated() - before)
    assert seen == 3_000_000 and most < 40e6  # the whole is 48 MB decoded


def test_filters_and_columns(store: TableStore) -> None:
    store.write("t", pd.DataFrame({"a": range(100), "b": list("xy") * 50, "c": pd.Categorical(["low", "high"] * 50)}))
    assert store.read("t", columns=["b"], filters=[("a", "<", 3)]).to_pylist() == [{"b": "x"}, {"b": "y"}, {"b": "x"}]
    assert store.read("t", filters=(pc.field("a") > 97) & (pc.field("b") == "x"))["a"].to_pylist() == [98]
    assert store.to_pandas("t", columns=["c"], filters=[("c", "==", "low")])["c"].cat.categories.tolist() == [
        "high",
        "low",
    ]
    for question in ({"columns": ["z"]}, {"filters": [("z", "==", 1)]}, {"filters": pc.field("z") == 1}):
        with pytest.raises(TableError):
            store.read("t", **question)


def test_an_empty_table_and_awkward_names(store: TableStore) -> None:
    frame = pd.DataFrame({"a.b": [1], "with space": ["x"], "ünï": [True], "[0]": [1.0], "SELECT": [2]})
    store.write("odd", frame)
    pd.testing.assert_frame_equal(store.to_pandas("odd"), frame)
    assert store.read("odd", columns=["a.b"]).to_pylist() == [{"a.b": 1}]
    store.write("none", frame.iloc[:0])
    pd.testing.assert_frame_equal(store.to_pandas("none"), frame.iloc[:0])
    store.write("none", frame, mode="append")
    assert store.version("none").digest == store.version("odd").digest


def test_frames_that_differ_only_in_pandas_are_versions_that_share_their_parts(store: TableStore) -> None:
    frame = pd.DataFrame({"c": ["low", "high"]})
    for categories in (["low", "high"], ["high", "low"]):
        store.write("c", frame.assign(c=pd.Categorical(frame["c"], categories=categories, ordered=True)))
    store.write("c", frame)
    assert [v.version for v in store.versions("c")] == [1, 2, 3] and len(listed(store)) == 1
    assert [store.to_pandas("c", v)["c"].dtype == "category" for v in (1, 2, 3)] == [True, True, False]


def test_bad_input_is_refused_before_anything_is_written(store: TableStore) -> None:
    bad: list[Any] = [
        pd.DataFrame(), pd.DataFrame({"a": [1, "x"]}), pd.DataFrame([[1, 2]], columns=["a", "a"]), pd.DataFrame({0: [1]}),
        pd.DataFrame({"": [1]}), pd.DataFrame({"a": [1]}, index=["k"]), "text", None, iter([]), [1, 2], pa.table({}),
    ]  # fmt: skip
    for data in bad:
        with pytest.raises(SourceError):
            store.write("bad", data)
    for name in ("", "a b", "../x", "-x", "x" * 300):
        with pytest.raises(TableError):
            store.write(name, numbers(1))
    with pytest.raises(TableError):
        store.write("t", numbers(1), mode="upsert")  # type: ignore[arg-type]
    with pytest.raises(SourceError):  # in the middle of a stream
        store.write("bad", iter([numbers(*range(10)), pa.table({"n": ["x"]})]))
    assert listed(store) == [] and store.names() == []


def test_a_failing_stream_leaves_nothing(store: TableStore, small_parts: None) -> None:
    def stream() -> Iterator[pa.Table]:
        yield numbers(*range(30_000))
        assert listed(store)
        raise ConnectionResetError("the source went away")

    with pytest.raises(ConnectionResetError):
        store.write("t", stream())
    assert listed(store) == [] and store.names() == []


def test_registered(store: TableStore) -> None:
    schema = pa.schema([("a", pa.int64()), ("s", pa.large_string())])
    first = store.register("lake", "delta://lake/loans", 4, schema, rows=10, statistics={"a": {"min": 1}})
    assert store.register("lake", "delta://lake/loans", 4, schema).version == 1 == first.version
    assert store.register("lake", "delta://lake/loans", 5, schema).version == 2
    assert store.version("lake", 1).by_reference == {
        "uri": "delta://lake/loans",
        "snapshot": 4,
        "statistics": {"a": {"min": 1}},
    }
    for call in (
        lambda: store.read("lake"),
        lambda: store.write("lake", numbers(1), mode="append"),
        lambda: store.diff("lake", 1, 2),
    ):
        with pytest.raises(TableError, match="by reference"):
            call()
    for uri in ("s3://key:secret@bucket/x", "https://x/y?sig=abc", " "):
        with pytest.raises(TableError):
            store.register("lake", uri, 1, schema)
    store.write("lake", numbers(1))  # from now on it is stored here
    assert store.read("lake")["n"].to_pylist() == [1] and store.version("lake", 2).by_reference


@pytest.mark.parametrize("keys", [None, ["k"]])
def test_diff(store: TableStore, small_parts: None, keys: list[str] | None) -> None:
    a = pd.DataFrame({"k": range(30_000), "v": np.arange(30_000) % 7, "gone": 1})
    b = a.drop(columns="gone").assign(new="x")
    b.loc[[5, 29_000], "v"] += 1
    b = pd.concat([b.drop(index=[6]), pd.DataFrame({"k": [90_000], "v": [1], "new": ["x"]})])
    store.write("t", a)
    store.write("t", b)
    found = store.diff("t", 1, 2, keys=keys)
    assert (found.columns_added, found.columns_removed) == ({"new": "string"}, {"gone": "int64"})
    changed = (1, 1, 2) if keys else (3, 3, None)
    assert (found.rows_added, found.rows_removed, found.rows_changed) == changed
    assert found.changes == ({"v": 2} if keys else {})
    assert set(found.added["k"]) == ({90_000} if keys else {5, 29_000, 90_000})
    back = store.diff("t", 2, 1, keys=keys)
    assert (back.rows_added, back.rows_removed) == (found.rows_removed, found.rows_added)


def test_diff_counts_repeated_rows_and_finds_repeated_keys_in_shared_parts(store: TableStore) -> None:
    store.write("t", numbers(1, 1, 2))
    store.write("t", numbers(1), mode="append")
    found = store.diff("t", 1, 2)
    assert (found.rows_added, found.rows_removed) == (1, 0) and found.added["n"].tolist() == [1]
    store.write("t", numbers(2, 1))
    assert (store.diff("t", 1, 3).rows_removed, store.diff("t", 1, 3).rows_added) == (1, 0)
    store.write("u", numbers(1, 2))
    store.write("u", numbers(2), mode="append")
    with pytest.raises(TableError, match="not unique"):
        store.diff("u", 1, 2, keys=["n"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=25),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=25),
)
def test_diff_against_plain_python(local: TableStore, a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    from collections import Counter

    for rows in (a, b):
        local.write(
            "p",
            pa.table(
                {
                    "k": pa.array([r[0] for r in rows], pa.int64()),
                    "v": pa.array([r[1] or None for r in rows], pa.int64()),
                }
            ),
        )
    latest = local.version("p").version
    first = latest if Counter(a) == Counter(b) and a == b else latest - 1
    found = local.diff("p", first, latest)
    a, b = ([(k, v or None) for k, v in rows] for rows in (a, b))
    assert (
        found.rows_added == (Counter(b) - Counter(a)).total()
        and found.rows_removed == (Counter(a) - Counter(b)).total()
    )
    if len(dict(a)) == len(a) and len(dict(b)) == len(b):
        keyed = local.diff("p", first, latest, keys=["k"])
        assert keyed.rows_changed == sum(dict(a)[k] != dict(b)[k] for k in dict(a).keys() & dict(b).keys())
        assert keyed.rows_added == len(dict(b).keys() - dict(a).keys())


def test_erasure(store: TableStore, small_parts: None) -> None:
    base = pd.DataFrame({"person": [f"p{i % 50}" for i in range(20_000)], "x": range(20_000)})
    store.write("t", base)
    store.write("t", base.iloc[:10], mode="append")
    store.write("t", base[base["person"] != "p7"])
    store.write("other", base)
    store.register("t", "delta://x", 1, pa.schema([("person", pa.string())]))
    heard: list[Any] = []
    erased = store.erase("t", "person", ["p7"], commit=lambda connection, result: heard.append(result))
    assert (erased.versions, erased.elsewhere, erased.by_reference, erased.waiting) == ((1, 2), ("other",), (4,), 0)
    assert erased.rows == 401 and len(heard) == 1
    for version in (1, 2, 3):
        frame = store.to_pandas("t", version)
        assert "p7" not in set(frame["person"]) and len(frame) == store.version("t", version).rows
        assert store.version("t", version).erased == (version < 3)
        assert sum(p.rows for p in store.parts("t", version)) == len(frame) and store.version(
            "t", version
        ).parts == len(store.parts("t", version))
        assert store.version("t", version).bytes == sum(p.bytes for p in store.parts("t", version))
    assert len(store.to_pandas("other")) == 20_000
    store.erase("other", "person", ["p7"])
    assert not any(b"p7" in pq_strings(store, f) for f in listed(store))
    again = store.erase("t", "person", ["p7"])
    assert (again.rows, again.versions) == (0, ())


def pq_strings(store: TableStore, name: str) -> bytes:
    import pyarrow.parquet as pq

    return b" ".join(v.encode() for v in set(pq.read_table(store.files.path(name))["person"].to_pylist()))


def test_erasing_a_whole_part_and_types(store: TableStore) -> None:
    store.write("t", pa.table({"id": [1, 1], "d": ["2026-01-05", "2026-01-06"]}))
    store.write("t", pa.table({"id": [2], "d": ["2026-01-07"]}), mode="append")
    assert store.erase("t", "id", np.array([1])).rows == 2
    assert (
        store.read("t", 1).num_rows == 0
        and store.read("t", 2)["id"].to_pylist() == [2]
        and store.version("t", 1).parts == 0
    )
    for column, values in (("id", ["one"]), ("id", []), ("id", [None]), ("ids", [1]), ("id", [1.5])):
        with pytest.raises(TableError):
            store.erase("t", column, values)
    with pytest.raises(TableError, match="no table"):
        store.erase("u", "id", [1])
    with store.database.read() as connection:
        assert (
            connection.execute(
                sa.select(sa.func.count())
                .select_from(catalog.erasures_table)
                .where(catalog.erasures_table.c.finished_at.is_(None))
            ).scalar()
            == 0
        )


def test_an_append_beside_an_erasure_is_erased_too(store: TableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlops_workbench.workspace import erasure

    store.write("t", numbers(1, 2, 3))
    real, turns = erasure._rewrite, []

    def rewrite(*arguments: Any) -> Any:
        if not turns:
            turns.append(1)
            make_store(store.database.url.render_as_string(hide_password=False), Path(store.files.root).parent).write(
                "t", numbers(2, 9), mode="append"
            )
        return real(*arguments)

    monkeypatch.setattr(erasure, "_rewrite", rewrite)
    assert store.erase("t", "n", [2]).versions == (1, 2)
    assert store.read("t")["n"].to_pylist() == [1, 3, 9]


def test_drop_and_collect(store: TableStore, small_parts: None) -> None:
    clock: Any = store.clock
    for k in range(4):
        store.write("t", numbers(*range(k, 20_000 + k)))
    store.write("t", numbers(7), mode="append")
    total = len(listed(store))
    for version in (2, 4):
        store.drop("t", version)
    assert store.collect().files == 0 and len(listed(store)) == total
    clock.move(timedelta(hours=1, minutes=1))
    assert store.collect().files == 3  # version 4's parts are version 5's as well
    for version in (1, 3, 5):
        store.verify("t", version)
    for version in (2, 4):
        with pytest.raises(TableError, match="dropped"):
            store.read("t", version)
    store.drop("t", 5)
    assert store.version("t").version == 3 and store.write("t", numbers(0)).version == 6
    grown = store.write("t", numbers(1), mode="append")
    assert grown.digest == content_digest(numbers(0, 1))
    for version in (1, 3, 6, 7):
        store.drop("t", version)
    clock.move(timedelta(hours=2))
    store.collect()
    assert listed(store) == [] and store.names() == []
    assert store.write("t", numbers(5)).version == 8


def test_an_append_after_its_base_was_dropped_continues_from_what_is_left(store: TableStore) -> None:
    for values in ([1], [2], [3]):
        store.write("t", numbers(*values))
    store.drop("t", 3)
    grown = store.write("t", numbers(9), mode="append")
    assert (
        store.read("t")["n"].to_pylist() == [2, 9]
        and grown.version == 4
        and grown.digest == content_digest(numbers(2, 9))
    )
    assert store.read("t", 1)["n"].to_pylist() == [1]


def test_collect_spares_running_readers_and_writers(store: TableStore, small_parts: None) -> None:
    store.write("t", numbers(*range(40_000)))
    reader = store.batches("t", rows=1000)
    seen = next(reader).num_rows
    store.drop("t", 1)
    assert store.collect(NOW).in_use == 5
    seen += sum(b.num_rows for b in reader)
    assert seen == 40_000 and store.collect(NOW).files == 5

    def stream() -> Iterator[pa.Table]:
        yield numbers(*range(30_000))
        assert listed(store) and store.collect(NOW).files == 0
        yield numbers(1)

    store.write("t", stream())
    store.verify("t")


def test_a_part_that_is_retired_while_a_writer_uses_it_comes_back(store: TableStore, small_parts: None) -> None:
    store.write("t", numbers(*range(30_000)))

    def stream() -> Iterator[pa.Table]:
        yield numbers(*range(30_000))
        store.drop("t", 1)
        assert store.collect(NOW).in_use == 4

    store.write("u", stream())
    store.collect(NOW)
    assert store.read("u").num_rows == 30_000


def test_clock_jumps(store: TableStore) -> None:
    clock: Any = store.clock
    one = store.write("t", numbers(1))
    clock.move(timedelta(days=-400))
    two = store.write("t", numbers(2))
    assert two.created_at >= one.created_at
    store.drop("t", 1)
    assert store.collect().files == 0
    reader = store.batches("t")
    next(reader)
    clock.move(timedelta(days=4000))
    store.write("t", numbers(3))
    store.drop("t", 2)
    assert store.collect(NOW).in_use == 1
    assert sum(b.num_rows for b in reader) == 0 and store.collect(NOW).files == 1


def test_object_store(any_database_url: str, tmp_path: Path) -> None:
    store = TableStore(Database(any_database_url), f"memory://{tmp_path.name}", FixedClock())
    store.write("t", numbers(1, 2))
    store.write("t", numbers(3), mode="append")
    assert store.read("t", filters=[("n", ">", 1)], verify=True)["n"].to_pylist() == [2, 3]
    store.erase("t", "n", [2])
    store.write("t", numbers(3))
    for version in (1, 2):
        store.drop("t", version)
    assert store.collect(NOW).files == 1 and store.read("t")["n"].to_pylist() == [3]


def test_a_catalog_of_a_newer_layout_is_refused(store: TableStore) -> None:
    with store.database.write() as connection:
        connection.execute(sa.update(catalog.state_table).values(layout=catalog.CATALOG_LAYOUT + 1))
    with pytest.raises(WorkspaceError, match="layout 2"):
        TableStore(store.database, store.files, store.clock)


def test_nothing_absolute_is_in_the_catalog(local: TableStore, tmp_path: Path) -> None:
    local.write("t", pd.DataFrame({"a": [1]}), metadata={"owner": "x"})
    local.erase("t", "a", [5])
    local.database.close()
    assert str(tmp_path).encode() not in (tmp_path / "w.db").read_bytes()


def test_files_refuse_to_leave_their_folder(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for name in ("../x", "/etc/passwd", "a/../../x", "a\\b"):
        with pytest.raises(StorageError):
            files.write(name, b"x")


def test_an_erasure_also_reaches_what_was_dropped_before(store: TableStore) -> None:
    store.write("t", numbers(1, 2))
    store.write("t", numbers(3))
    store.drop("t", 1)
    assert len(listed(store)) == 2
    store.erase("t", "n", [2])
    assert len(listed(store)) == 1
