"""Content digests by property: equal content has one digest however it lies in memory, and any change has another."""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mlops_workbench.errors import SourceError
from mlops_workbench.workspace import digests
from mlops_workbench.workspace.digests import ContentDigest, content_digest, normal_type, type_name
from mlops_workbench.workspace.frames import incoming, restore_frame

pytestmark = pytest.mark.fast
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows, so that small examples have many of them. Golden digests set their own."""
    monkeypatch.setattr(digests, "BLOCK_ROWS", 8)


LEAVES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int8": (pa.int8(), st.integers(-128, 127)),
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "uint32": (pa.uint32(), st.integers(0, 2**32 - 1)),
    "float": (pa.float32(), st.floats(width=32)),
    "double": (pa.float64(), st.floats()),
    "bool": (pa.bool_(), st.booleans()),
    "string": (pa.string(), st.text(max_size=8)),
    "binary": (pa.binary(), st.binary(max_size=8)),
    "fixed": (pa.binary(3), st.binary(min_size=3, max_size=3)),
    "date": (pa.date32(), st.dates(date(1900, 1, 1), date(2100, 1, 1))),
    "time": (pa.time64("us"), st.times()),
    "timestamp": (pa.timestamp("us", "Europe/Berlin"), st.integers(0, 2**50)),
    "seconds": (pa.timestamp("s"), st.integers(0, 2**33)),
    "duration": (pa.duration("ns"), st.integers(0, 2**60)),
    "decimal": (pa.decimal128(12, 2), st.decimals(-(10**9), 10**9, places=2)),
    "null": (pa.null(), st.none()),
}


@st.composite
def kinds(draw: st.DrawFn, depth: int = 1) -> tuple[pa.DataType, st.SearchStrategy[Any]]:
    name = draw(st.sampled_from([*LEAVES, *(["list", "struct", "map"] if depth else [])]))
    if name in LEAVES:
        return LEAVES[name]
    kind, values = draw(kinds(depth - 1))
    if name == "list":
        return pa.list_(kind), st.lists(st.none() | values, max_size=3)
    if name == "struct":
        return pa.struct([("a", kind), ("b", pa.int64())]), st.fixed_dictionaries(
            {"a": st.none() | values, "b": st.none() | st.integers(0, 9)}
        )
    return pa.map_(pa.string(), kind), st.lists(st.tuples(st.text(max_size=3), st.none() | values), max_size=2)


@st.composite
def arrow_tables(draw: st.DrawFn, min_rows: int = 0, min_columns: int = 1) -> pa.Table:
    rows = draw(st.integers(min_rows, 40))
    names = draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6),
            min_size=min_columns,
            max_size=4,
            unique=True,
        )
    )
    columns = []
    for _ in names:
        kind, values = draw(kinds())
        cells = draw(st.lists(st.none() | values, min_size=rows, max_size=rows))
        columns.append(pa.array(cells, kind))
    return pa.table(columns, names=names)


def rechunked(table: pa.Table, cuts: list[int]) -> pa.Table:
    bounds = sorted({0, table.num_rows, *(c % (table.num_rows + 1) for c in cuts)})
    pieces = [table.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
    return pa.concat_tables(pieces) if pieces else table


def reencoded(column: pa.ChunkedArray, way: int) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_string(kind):
        return [column, column.cast(pa.large_string()), column.dictionary_encode(), column.cast(pa.string_view())][way]
    if pa.types.is_binary(kind):
        return [column, column.cast(pa.large_binary()), column.dictionary_encode(), column][way]
    if pa.types.is_list(kind):
        return column.cast(pa.large_list(kind.value_type)) if way % 2 else column
    if way == 2 and (pa.types.is_integer(kind) or pa.types.is_timestamp(kind)):
        return column.dictionary_encode()
    if way == 3 and (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return pa.chunked_array(
            [pa.compute.run_end_encode(c) for c in column.chunks], pa.run_end_encoded(pa.int32(), kind)
        )
    return column


@QUICK
@given(arrow_tables(), st.lists(st.integers(0, 100), max_size=6), st.integers(0, 3))
def test_layout_does_not_matter(table: pa.Table, cuts: list[int], way: int) -> None:
    digest = content_digest(table)
    assert content_digest(rechunked(table, cuts)) == digest
    other = rechunked(table, cuts)
    for i, name in enumerate(other.column_names):
        other = other.set_column(i, name, reencoded(other.column(i), way))
    assert content_digest(other) == digest


@QUICK
@given(arrow_tables(min_rows=1), st.integers(1, 9))
def test_offsets_and_what_lies_under_nulls_do_not_matter(table: pa.Table, shift: int) -> None:
    padded = pa.concat_tables([table.slice(0, 1)] * shift + [table]).combine_chunks()
    assert content_digest(padded.slice(shift)) == content_digest(table)


def test_garbage_under_nulls() -> None:
    bits = pa.py_buffer(bytes([0b101]))
    for kind, a, b in [
        (pa.int64(), struct.pack("<3q", 1, 2, 3), struct.pack("<3q", 1, 99, 3)),
        (pa.float64(), struct.pack("<3d", 1, math.nan, 3), struct.pack("<3d", 1, 5.0, 3)),
        (pa.bool_(), bytes([0b111]), bytes([0b101])),
    ]:
        one, other = (pa.Array.from_buffers(kind, 3, [bits, pa.py_buffer(data)]) for data in (a, b))
        assert content_digest(pa.table({"x": one})) == content_digest(pa.table({"x": other}))
    offsets, data = pa.py_buffer(struct.pack("<4i", 0, 1, 3, 4)), pa.py_buffer(b"axyb")
    text = pa.Array.from_buffers(pa.string(), 3, [bits, offsets, data])
    assert content_digest(pa.table({"x": text})) == content_digest(pa.table({"x": ["a", None, "b"]}))
    lists = pa.ListArray.from_buffers(
        pa.list_(pa.int64()), 3, [bits, pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3))], children=[pa.array([1, 7, 3])]
    )
    assert content_digest(pa.table({"x": lists})) == content_digest(pa.table({"x": [[1], None, [3]]}))


@QUICK
@given(arrow_tables(), st.sampled_from(["none", "snappy", "zstd"]), st.integers(1, 50), st.booleans())
def test_parquet_settings_do_not_matter(table: pa.Table, compression: str, group: int, dictionary: bool) -> None:
    file = io.BytesIO()
    pq.write_table(table, file, compression=compression, row_group_size=group, use_dictionary=dictionary)
    again = pq.read_table(file).cast(table.schema)  # Parquet has no seconds
    assert content_digest(again) == content_digest(table)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


@QUICK
@given(arrow_tables(min_rows=1), st.data())
def test_any_changed_value_has_another_digest(table: pa.Table, data: st.DataObject) -> None:
    column = data.draw(st.integers(0, table.num_columns - 1))
    kind = table.schema.field(column).type
    assume(not pa.types.is_null(kind))
    row = data.draw(st.integers(0, table.num_rows - 1))
    cells = table.column(column).to_pylist()
    other = data.draw(st.sampled_from([*cells, None]))
    assume(not same(other, cells[row]))
    cells[row] = other
    changed = table.set_column(column, table.field(column), pa.array(cells, kind))
    assert content_digest(changed) != content_digest(table)


@QUICK
@given(arrow_tables(min_rows=2, min_columns=2))
def test_order_names_types_and_length_count(table: pa.Table) -> None:
    digest = content_digest(table)
    assert content_digest(table.slice(1)) != digest
    assert content_digest(table.rename_columns([n + "_" for n in table.column_names])) != digest
    assert content_digest(table.select(table.column_names[::-1])) != digest
    assert content_digest(table.drop_columns(table.column_names[:1])) != digest
    backwards = table.take(list(range(table.num_rows))[::-1])
    if not all(same(a, b) for a, b in zip(table.to_pylist(), backwards.to_pylist(), strict=True)):
        assert content_digest(backwards) != digest


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("int32", "int64"),
        ("float", "double"),
        ("string", "binary"),
        ("timestamp[s]", "timestamp[ms]"),
        ("date32", "int32"),
    ],
)
def test_types_count(a: str, b: str) -> None:
    empty, other = (pa.table({"x": pa.nulls(3, pa.type_for_alias(t))}) for t in (a, b))
    assert content_digest(empty) != content_digest(other)


@QUICK
@given(arrow_tables(), st.integers(0, 40), st.lists(st.integers(0, 100), max_size=3))
def test_put_down_and_taken_up(table: pa.Table, at: int, cuts: list[int]) -> None:
    at %= table.num_rows + 1
    first = ContentDigest(table.schema)
    first.update(table.slice(0, at))
    rest = at % digests.BLOCK_ROWS
    plain = pa.table(
        [digests.normal_array(table.column(i), normal_type(f.type)) for i, f in enumerate(table.schema)],
        names=table.column_names,
    )
    second = ContentDigest.resume(table.schema, json.loads(json.dumps(first.state())), plain.slice(at - rest, rest))
    second.update(rechunked(table.slice(at), cuts))
    assert second.hexdigest() == content_digest(table)


@QUICK
@given(arrow_tables(), st.integers(1, 40))
def test_extending_is_updating(table: pa.Table, size: int) -> None:
    whole = ContentDigest(table.schema)
    for start in range(0, table.num_rows, size):
        piece = table.slice(start, size)
        own = ContentDigest(table.schema, keep=True)
        own.update(piece)
        whole.extend(own, piece)
    assert whole.hexdigest() == content_digest(table)


def test_golden_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are stored in catalogs and audit trails: they may never change, whatever pyarrow does."""
    monkeypatch.setattr(digests, "BLOCK_ROWS", 8192)
    n = 20_000
    table = pa.table(
        {
            "i": pa.array(range(n)),
            "f": pa.array([None if k % 7 == 0 else k / 3 for k in range(n)]),
            "s": pa.array([None if k % 5 == 0 else f"é{k}" for k in range(n)]),
            "b": pa.array([k % 3 == 0 for k in range(n)]),
            "t": pa.array([datetime(2026, 1, 5) + timedelta(seconds=k) for k in range(n)], pa.timestamp("us", "UTC")),
            "d": pa.array([Decimal(k) / 100 for k in range(n)], pa.decimal128(10, 2)),
            "l": pa.array([[k, None] if k % 2 else None for k in range(n)]),
            "r": pa.array([{"a": k, "b": "x"} for k in range(n)]),
        }
    )
    assert content_digest(table) == "31deb7335132d4ed17e683d998eae3dca414d5859bc0eaa43337d621b8dcb986"
    assert (
        content_digest(pa.table({"x": [1, 2, 3]})) == "378e3b2d2ad39d938c2aceff5cf834c13ebf1399e49ea0b56ed0bc1a2620fc23"
    )
    assert type_name(table.schema.field("r").type) == 'struct<"a": int64, "b": string>'


def test_types_without_a_column_form_are_refused() -> None:
    for kind in [
        pa.dense_union([pa.field("a", pa.int64())]),
        pa.month_day_nano_interval(),
        pa.list_(pa.month_day_nano_interval()),
    ]:
        with pytest.raises(SourceError):
            incoming(pa.RecordBatchReader.from_batches(pa.schema([("x", kind)]), []))


FRAME_COLUMNS = {
    "int": st.lists(st.integers(-(2**40), 2**40), min_size=6, max_size=6),
    "Int64": st.lists(st.none() | st.integers(-(2**62), 2**62), min_size=6, max_size=6),
    "boolean": st.lists(st.none() | st.booleans(), min_size=6, max_size=6),
    "string": st.lists(st.none() | st.text(max_size=4), min_size=6, max_size=6),
    "float": st.lists(st.floats(), min_size=6, max_size=6),
    "category": st.lists(st.none() | st.sampled_from(["low", "high"]), min_size=6, max_size=6),
    "ordered": st.lists(st.none() | st.sampled_from([10, 20, 5]), min_size=6, max_size=6),
    "zoned": st.lists(st.integers(0, 2**60), min_size=6, max_size=6),
    "text": st.lists(st.text(max_size=4), min_size=6, max_size=6),
}


def frame_column(name: str, cells: list[Any]) -> Any:
    if name == "int":
        return pd.array(cells, "int64")
    if name == "category":
        return pd.Categorical(cells, categories=["never", "low", "high"])
    if name == "ordered":
        return pd.Categorical(cells, categories=[20, 5, 10], ordered=True)
    if name == "zoned":
        return pd.to_datetime(cells, utc=True).tz_convert("America/New_York")
    if name == "text":
        return np.array(cells, dtype=object)
    return pd.array(cells, name) if name != "float" else np.array(cells, dtype="float64")


@QUICK
@given(st.fixed_dictionaries(FRAME_COLUMNS), st.sampled_from([None, ["int"], ["text", "int"]]))
def test_frames_come_back(cells: dict[str, list[Any]], index: list[str] | None) -> None:
    frame = pd.DataFrame({name: frame_column(name, values) for name, values in cells.items()})
    frame = frame.set_index(index) if index else frame
    arrived = incoming(frame)
    stored = io.BytesIO()
    pq.write_table(pa.concat_tables(arrived.tables), stored)
    back = restore_frame(pq.read_table(stored), arrived.frame).to_pandas()
    pd.testing.assert_frame_equal(back, frame)


def test_extension_types() -> None:
    import uuid

    plain = pa.array([uuid.UUID(int=n).bytes for n in range(5)], pa.binary(16))
    marked = pa.ExtensionArray.from_storage(pa.uuid(), plain)
    assert content_digest(pa.table({"x": plain})) != content_digest(pa.table({"x": marked}))
    assert content_digest(pa.table({"x": marked.slice(2)})) == content_digest(
        pa.table({"x": pa.ExtensionArray.from_storage(pa.uuid(), plain.slice(2))})
    )
    months = pa.Table.from_pandas(pd.DataFrame({"m": pd.period_range("2026-01", periods=3, freq="M")}))
    days = pa.Table.from_pandas(pd.DataFrame({"m": pd.period_range("2026-01", periods=3, freq="D")}))
    assert type_name(months.schema.field("m").type) != type_name(days.schema.field("m").type)


def test_every_nan_is_one_nan_and_zeros_have_signs() -> None:
    def bits(*values: int) -> str:
        return content_digest(pa.table({"x": pa.array(np.array(values, "<u8").view("<f8"))}))

    quiet, other, negative = 0x7FF8000000000000, 0x7FF8000000000001, 0xFFF8000000000000
    assert bits(quiet, 0) == bits(other, 0) == bits(negative, 0) != bits(quiet, 0x8000000000000000)
    single = [
        content_digest(pa.table({"x": pa.array(np.array([b], "<u4").view("<f4"))}))
        for b in (0x7FC00000, 0x7FC00001, 0xFFC00000)
    ]
    assert len(set(single)) == 1
