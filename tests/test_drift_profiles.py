"""Profiles are mergeable: hypothesis looks for frames and splits where adding up differs from counting the whole."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.drift.grids import ColumnGrid, Grid, make_grid, quantile_edges
from mlops_workbench.drift.profiles import NEW_NAMES, Profile, merge, profile
from mlops_workbench.errors import StatisticsError

pytestmark = pytest.mark.fast

NUMBERS = st.one_of(
    st.none(), st.floats(-1e6, 1e6), st.integers(-3, 3).map(float), st.sampled_from([math.inf, -math.inf, math.nan])
)
ROW = st.fixed_dictionaries(
    {
        "amount": NUMBERS,
        "county": st.one_of(st.none(), st.sampled_from(["Essex", "Suffolk", "Dukes", "", "new ö"])),
        "owner": st.one_of(st.none(), st.booleans()),
        "days": st.one_of(st.none(), st.integers(-20_000, 20_000)),
    }
)


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "amount": pd.Series([r["amount"] for r in rows], dtype="float64"),
            "county": pd.Series([r["county"] for r in rows], dtype="object"),
            "owner": pd.Series([r["owner"] for r in rows], dtype="boolean"),
            "since": pd.Series(
                [
                    pd.NaT if r["days"] is None else pd.Timestamp("2000-01-01") + pd.Timedelta(days=r["days"])
                    for r in rows
                ]
            ),
        }
    ).astype({"since": "datetime64[ns]"})


REFERENCE = frame(
    [
        {
            "amount": float(i % 37) * 1.5 - 9,
            "county": ["Essex", "Suffolk", "Dukes"][i % 3],
            "owner": i % 4 == 0,
            "days": i,
        }
        for i in range(400)
    ]
)
GRID = make_grid(REFERENCE, bins=8)


def same(a: Profile, b: Profile) -> None:
    assert a.rows == b.rows and a.columns.keys() == b.columns.keys() and a.added == b.added
    for name, x in a.columns.items():
        y = b.columns[name]
        exact = ("kind", "n", "missing", "positive_infinite", "negative_infinite", "unfit", "empty")
        assert [getattr(x, k) for k in exact] == [getattr(y, k) for k in exact], name
        assert x.counts.tolist() == y.counts.tolist() and dict(x.new) == dict(y.new), name
        assert x.moments.n == y.moments.n, name
        for k in ("mean", "m2", "minimum", "maximum"):
            u, v = getattr(x.moments, k), getattr(y.moments, k)
            scale = max(abs(x.moments.minimum), abs(x.moments.maximum), 1.0) if x.moments.n else 1.0
            tolerance = 1e-9 * scale ** (2 if k == "m2" else 1) * max(x.moments.n, 1)
            assert (math.isnan(u) and math.isnan(v)) or abs(u - v) <= tolerance, (name, k, u, v)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ROW, min_size=1, max_size=8), min_size=3, max_size=3))
def test_merging_is_associative_commutative_and_equals_the_whole(parts: list[list[dict[str, Any]]]) -> None:
    a, b, c = (profile(frame(p), GRID) for p in parts)
    whole = profile(frame([row for p in parts for row in p]), GRID)
    same(merge(a, b, c), whole)
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, b), merge(b, a))


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), st.integers(2, 12))
def test_every_value_is_in_exactly_one_place_and_json_round_trips(rows: list[dict[str, Any]], bins: int) -> None:
    for p in (profile(frame(rows), GRID), profile(frame(rows), bins=bins)):
        for c in p.columns.values():
            assert c.binned + c.missing + c.positive_infinite + c.negative_infinite + c.unfit == c.n == len(rows)
        again = Profile.from_json(p.to_json())
        assert again == p and again.grid.digest == p.grid.digest
        same(again, p)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=300), st.integers(2, 40))
def test_edges_bound_every_value_of_the_reference(values: list[float], bins: int) -> None:
    ordered = np.sort(np.array(values))
    edges, complete = quantile_edges(ordered, bins)
    assert list(edges) == sorted(set(edges)) and edges[0] < ordered[0] and edges[-1] == ordered[-1]
    assert len(edges) <= bins + 1
    if complete:
        assert set(edges[1:]) == {float(v) for v in ordered}
    else:
        counts = profile(pd.DataFrame({"x": values}), bins=bins).columns["x"].counts
        heaviest = pd.Series(values).value_counts().iloc[0]
        assert counts[0] == counts[-1] == 0 and counts.max() <= max(math.ceil(len(values) / bins) + heaviest, heaviest)


def test_counts_are_those_of_pandas_cut() -> None:
    x = np.random.default_rng(0).normal(size=2000)
    p = profile(pd.DataFrame({"x": x}), bins=16)
    edges = [-np.inf, *p.grid.columns["x"].edges, np.inf]
    assert p.columns["x"].counts.tolist() == pd.cut(x, edges, right=True).value_counts().tolist()
    assert p.columns["x"].counts[1:-1].tolist() == [125] * 16
    assert np.isclose(p.columns["x"].moments.std, x.std(ddof=1))


def test_a_point_mass_has_a_bin_of_its_own() -> None:
    x = np.append(np.zeros(500), np.random.default_rng(0).uniform(-1, 1, 500))
    p = profile(pd.DataFrame({"x": x}), bins=10)
    edges = p.grid.columns["x"].edges
    assert p.columns["x"].counts[edges.index(0.0)] == 500


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pd.Series([1, 2, None], dtype="Int64"), "number"),
        (pd.Series([1.5, 2], dtype="float32"), "number"),
        (pd.Series([True, None], dtype="boolean"), "boolean"),
        (pd.Series([True, None, False], dtype="object"), "boolean"),
        (pd.Series(["a", None], dtype="string"), "category"),
        (pd.Series([1, 2], dtype="category"), "category"),
        (pd.Series(pd.to_datetime(["2024-01-01", None])), "datetime"),
        (pd.Series(pd.to_datetime(["2024-01-01", None])).dt.tz_localize("Europe/Berlin"), "datetime"),
        (pd.Series(pd.to_timedelta([1, 2], unit="h")), "number"),
        (pd.Series([None, None], dtype="object"), "empty"),
        (pd.Series([np.nan, np.nan]), "empty"),
        (pd.Series([np.inf, np.nan]), "number"),
        (pd.Series(["x"] * 2, dtype=pd.ArrowDtype(pa.string())), "category"),
        (pd.Series([1, None], dtype=pd.ArrowDtype(pa.int64())), "number"),
    ],
)
def test_kinds(values: pd.Series, kind: str) -> None:
    p = profile(pd.DataFrame({"x": values}))
    assert p.columns["x"].kind == kind and p.columns["x"].n == len(values)
    assert Profile.from_json(p.to_json()) == p


def test_time_zones_are_one_time_line() -> None:
    utc = pd.date_range("2024-01-01", periods=50, freq="h", tz="UTC")
    a = profile(pd.DataFrame({"t": utc}))
    b = profile(pd.DataFrame({"t": utc.tz_convert("Asia/Tokyo")}), grid=a)
    assert a.columns["t"].counts.tolist() == b.columns["t"].counts.tolist()
    assert a.columns["t"].moments.minimum == pd.Timestamp("2024-01-01").timestamp()


def test_text_is_seen_by_its_length() -> None:
    rng = np.random.default_rng(0)
    remarks = ["".join(rng.choice(list("abcdefgh "), 3 + i % 50)) + str(i) for i in range(500)] + ["", "  "]
    p = profile(pd.DataFrame({"remark": remarks}))
    assert p.columns["remark"].kind == "text" and p.columns["remark"].empty == 2
    assert p.columns["remark"].moments.n == 502


def test_new_categories_are_counted_exactly_and_others_apart() -> None:
    reference = pd.DataFrame({"c": ["a"] * 10 + ["b"] * 5})
    p = profile(pd.DataFrame({"c": ["a", "x", "x", "y", None]}), grid=profile(reference))
    assert dict(p.columns["c"].new) == {"x": 2, "y": 1} and p.columns["c"].counts.tolist() == [1, 0, 3]
    short = profile(pd.DataFrame({"c": ["a", "b", "x"]}), grid=profile(reference, categories=1))
    assert short.columns["c"].counts.tolist() == [1, 2] and not short.columns["c"].new


def test_a_hundred_thousand_new_categories_stay_small_and_exact() -> None:
    reference = profile(pd.DataFrame({"c": ["a", "b"] * 50}))
    many = pd.DataFrame({"c": [f"id{i:06}" for i in range(100_000)]})
    halves = merge(*(profile(many.iloc[i::2], grid=reference) for i in (0, 1)))
    assert int(halves.columns["c"].counts[-1]) == 100_000 and len(halves.columns["c"].new) == NEW_NAMES
    same(halves, profile(many, grid=reference))


def test_numbers_for_booleans_and_unlisted_values() -> None:
    reference = profile(pd.DataFrame({"b": [True, False] * 10}))
    p = profile(pd.DataFrame({"b": [1.0, 0.0, np.nan, 2.0]}), grid=reference)
    assert p.columns["b"].counts.tolist() == [1, 1, 1] and dict(p.columns["b"].new) == {"2.0": 1}


def test_a_column_of_another_kind_is_unfit_and_parts_that_disagree_are_mixed() -> None:
    reference = profile(pd.DataFrame({"x": [1.0, 2.0], "y": [1, 2]}))
    strings = profile(pd.DataFrame({"x": ["a", None], "y": [1, 2]}), grid=reference)
    assert (strings.columns["x"].unfit, strings.columns["x"].missing, strings.columns["x"].kind) == (1, 1, "category")
    assert merge(reference, strings).columns["x"].kind == "mixed"
    nothing = profile(pd.DataFrame({"x": [None], "y": [3]}), grid=reference)
    assert merge(reference, nothing).columns["x"].kind == "number"


def test_batches_and_their_memory() -> None:
    reference = profile(pd.DataFrame({"x": np.arange(100.0)}))
    seen = []

    def batches() -> Any:
        for i in range(20):
            seen.append(i)
            yield pa.table({"x": np.arange(5.0) + i})

    p = profile(batches(), grid=reference)
    assert p.rows == 100 and len(seen) == 20 and p.columns["x"].n == 100
    assert profile([pd.DataFrame({"x": []}, dtype=float), pd.DataFrame({"x": [1.0]})], grid=reference).rows == 1


def test_profiles_are_compact() -> None:
    worst = profile(
        pd.DataFrame(np.random.default_rng(0).normal(size=(2000, 50)), columns=[f"x{i}" for i in range(50)])
    )
    assert len(worst.to_json()) < 500_000


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d.update(format=2), "format 2"),
        (lambda d: d.update(format=0), "format 0"),
        (lambda d: d.pop("format"), "no format"),
        (lambda d: d.pop("rows"), "cannot be read"),
        (lambda d: d["grid"].update(digest="0" * 64), "digest"),
        (lambda d: d["grid"]["columns"]["x"]["edges"].reverse(), "damaged"),
        (lambda d: d["columns"]["x"]["counts"].pop(), "add up"),
        (lambda d: d["columns"]["x"].update(missing=-1), "add up"),
        (lambda d: d["columns"]["x"].update(n=7), "add up"),
        (lambda d: d["columns"].update(z=d["columns"]["x"]), "cannot be read"),
        (lambda d: d.update(columns=None), "cannot be read"),
    ],
)
def test_a_damaged_profile_is_refused(change: Any, what: str) -> None:
    d = json.loads(profile(pd.DataFrame({"x": np.arange(10.0)})).to_json())
    change(d)
    with pytest.raises(StatisticsError, match=what):
        Profile.from_dict(d)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '{"format": "1"}'])
def test_what_is_not_a_profile_is_refused(text: str) -> None:
    with pytest.raises(StatisticsError, match="not a profile"):
        Profile.from_json(text)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (pd.DataFrame(), "no columns"),
        (pd.DataFrame({"x": []}), "no rows"),
        (pd.DataFrame([[1, 2]], columns=["x", "x"]), "twice"),
        (pd.DataFrame([[1, 2]], columns=[1, "1"]), "twice"),
        (pd.DataFrame({"x": [1, "a"]}), "column 'x' is not one type"),
        (pd.DataFrame({"x": [b"a", b"b"]}), "bytes"),
        (pd.DataFrame({"x": [[1], [2]]}), "list"),
        (pd.DataFrame({"x": [1j, 2j]}), "complex"),
        ({"x": [1, 2], "y": [1]}, "do not make a table"),
        ("loans.csv", "DataFrame"),
        (None, "DataFrame"),
    ],
)
def test_bad_data_is_refused(data: Any, what: str) -> None:
    with pytest.raises(StatisticsError, match=what):
        profile(data)


def test_other_grids_are_refused() -> None:
    a, b = (profile(pd.DataFrame({"x": np.arange(10.0) + i})) for i in (0, 1))
    with pytest.raises(StatisticsError, match="different grids"):
        merge(a, b)
    with pytest.raises(StatisticsError, match="need a grid"):
        profile(iter([pd.DataFrame({"x": [1]})]))
    with pytest.raises(StatisticsError, match="nothing to merge"):
        merge()


def test_the_digest_is_fixed() -> None:
    """Stored profiles must stay comparable: a change of this digest is a change of the format."""
    grid = Grid(
        {"x": ColumnGrid("number", (0.0, 1.5)), "c": ColumnGrid("category", categories=("a", "ö"), complete=False)}
    )
    assert grid.digest == "952612d93644c33162756587b6efd2f4a00f184d1f4e442601527e0a04e80349"
    assert Grid.from_dict(grid.to_dict()).digest == grid.digest
