"""Fairness against fairlearn, and what the verdicts promise."""

from __future__ import annotations

import json

import fairlearn.metrics as fm
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from mlops_workbench.errors import StatisticsError
from mlops_workbench.evaluation.disparities import DISPARITIES, chance_within, draw_rates, group_cells, group_rates
from mlops_workbench.evaluation.fairness import check_fairness

pytestmark = pytest.mark.fast

FAIRLEARN = {
    "demographic_parity_ratio": fm.demographic_parity_ratio,
    "demographic_parity_difference": fm.demographic_parity_difference,
    "equal_opportunity_ratio": fm.equal_opportunity_ratio,
    "equal_opportunity_difference": fm.equal_opportunity_difference,
    "equalized_odds_ratio": fm.equalized_odds_ratio,
    "equalized_odds_difference": fm.equalized_odds_difference,
    "accuracy_difference": fm.accuracy_score_difference,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(20, 200))
def test_values_equal_fairlearn(seed: int, groups: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    truth, said, group = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.integers(0, groups, n).astype(str)
    counts = pd.crosstab(group, truth)
    assume(counts.shape == (groups, 2) and (counts > 0).all(axis=None))
    # fairlearn's ratios are 0/0 where a rate is 0 in every group
    assume(said[truth == 1].any() and said[truth == 0].any())
    check = check_fairness(truth, said, group, measures=list(FAIRLEARN), resamples=200)
    for result in check.results:
        theirs = FAIRLEARN[result.measure](truth, said, sensitive_features=group)
        assert result.value == pytest.approx(theirs, abs=1e-12), result.measure


def test_every_measure_is_held_against_fairlearn() -> None:
    assert set(FAIRLEARN) == set(DISPARITIES)


def test_group_rates_equal_metric_frame_and_say_when_undefined() -> None:
    rng = np.random.default_rng(0)
    truth, said, group = rng.integers(0, 2, 300), rng.integers(0, 2, 300), rng.choice(list("abc"), 300)
    frame = fm.MetricFrame(metrics=fm.false_positive_rate, y_true=truth, y_pred=said, sensitive_features=group).by_group
    np.testing.assert_allclose(group_rates(truth, said, group)["false_positive_rate"], frame)
    truth[group == "b"] = 0
    rates = group_rates(truth, said, group)
    assert np.isnan(rates.loc["b", "true_positive_rate"]) and np.isfinite(rates.loc["b", "selection_rate"])
    check = check_fairness(truth, said, group, measures=["equal_opportunity_difference"])
    (b,) = (g for g in check.results[0].groups if g.group == "b")
    assert b.verdict == "inconclusive" and check.verdict != "pass"


@pytest.mark.parametrize(("selected", "n"), [(0, 40), (3, 40), (200, 400), (12, 12)])
def test_selection_intervals_are_those_of_jeffreys(selected: int, n: int) -> None:
    said = (np.arange(n) < selected).astype(int)
    _, cells = group_cells(said, said, np.full(n, "g"))
    low, high = np.quantile(draw_rates(cells, 40_000, seed=0)["selection_rate"][:, 0], [0.025, 0.975])
    exact = stats.beta(selected + 0.5, n - selected + 0.5).ppf([0.025, 0.975])
    np.testing.assert_allclose([low, high], exact, atol=0.006)


def test_intervals_agree_with_resampling_rows_within_groups() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(["a", "b"], [800, 400])
    said = (rng.random(1200) < np.where(group == "a", 0.6, 0.5)).astype(int)
    result = check_fairness(said, said, group, measures=["demographic_parity_ratio"], resamples=4000).results[0]
    a, b = said[:800], said[800:]
    plain = [rng.choice(b, 400).mean() / rng.choice(a, 800).mean() for _ in range(4000)]
    np.testing.assert_allclose([result.low, result.high], np.quantile(plain, [0.025, 0.975]), atol=0.01)


def test_two_noisy_rates_do_not_fail_an_equal_model() -> None:
    fails = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth, group = rng.integers(0, 2, 400), rng.choice(["a", "b"], 400)
        said = np.where(rng.random(400) < 0.8, truth, 1 - truth)
        fails += (
            check_fairness(truth, said, group, measures=["equalized_odds_difference"], resamples=300).verdict == "fail"
        )
    assert fails <= 4


@pytest.mark.parametrize("n", [1, 5, 29])
def test_small_groups_are_inconclusive_and_named(n: int) -> None:
    group = ["big"] * 500 + ["other"] * 500 + ["few"] * n
    said = np.array([1, 0] * 500 + [0] * n)
    result = check_fairness(said, said, group, measures=["demographic_parity_ratio"]).results[0]
    verdicts = {g.group: g.verdict for g in result.groups}
    assert set(verdicts) == {"big", "other", "few"}
    assert verdicts["few"] == result.verdict == "inconclusive" and "few" in result.reason and str(n) in result.reason


def test_a_small_group_hides_no_failure_and_is_no_reference() -> None:
    group = ["a"] * 500 + ["b"] * 500 + ["few"] * 5
    said = np.array([1] * 450 + [0] * 50 + [1] * 100 + [0] * 400 + [1] * 5)
    check = check_fairness(said, said, group, measures=["demographic_parity_ratio"])
    verdicts = {g.group: g.verdict for g in check.results[0].groups}
    assert check.verdict == "fail" and verdicts == {"a": "reference", "b": "fail", "few": "inconclusive"}


def test_only_small_groups_decide_nothing() -> None:
    check = check_fairness([1] * 10 + [0] * 10, [1] * 10 + [0] * 10, ["a"] * 10 + ["b"] * 10)
    assert check.verdict == "inconclusive" and all(r.verdict == "inconclusive" for r in check.results)


def test_missing_values_are_a_group_and_said() -> None:
    group = pd.Series(["a", "b", None] * 200, name="sex")
    said = np.tile([1, 1, 0], 200)
    check = check_fairness(said, said, group, measures=["demographic_parity_ratio"])
    assert {g.group for g in check.results[0].groups} == {"a", "b", "missing"} and check.verdict == "fail"
    assert "200 rows have no value" in check.notes[0]


def test_crossing_and_json() -> None:
    people = pd.DataFrame({"sex": ["f", "m"] * 300, "site": ["n"] * 300 + ["s"] * 300})
    said = np.tile([1, 0, 1], 200)
    check = check_fairness(
        said, said, people, measures="demographic_parity_difference", limits={"demographic_parity_difference": 0.2}
    )
    assert [r.attribute for r in check.results] == ["sex", "site", "sex × site"] and len(check.results[2].groups) == 4
    stored = json.loads(json.dumps(check.to_dict(), allow_nan=False))
    assert stored["verdict"] == check.verdict and len(check.to_frame()) == 3 + 2 + 2 + 4
    assert check.rates_frame().loc[("sex", "f"), "rows"] == 300


def test_positive_can_be_any_label() -> None:
    rng = np.random.default_rng(0)
    said, group = rng.integers(0, 2, 400), rng.choice(["a", "b"], 400)
    words = np.where(said == 1, "approved", "denied")
    a, b = check_fairness(said, said, group), check_fairness(words, words, group, positive="approved")
    assert [r.value for r in a.results] == [r.value for r in b.results]
    denied = check_fairness(words, words, group, positive="denied", measures=["demographic_parity_ratio"])
    assert denied.results[0].value != a.results[0].value


@pytest.mark.parametrize(
    ("truth", "said", "group", "options", "says"),
    [
        ([], [], [], {}, "empty"),
        ([0, 1], [0, 1, 1], ["a", "b"], {}, "3 values for 2 rows"),
        ([0, 1], [0, 1], ["a"], {}, "1 values for 2 rows"),
        ([0, 1], [0, None], ["a", "b"], {}, "missing"),
        ([0, 1], [0.2, 0.7], ["a", "b"], {}, "selected is not clear"),
        (["y", "n"], ["y", "y"], ["a", "b"], {}, "selected is not clear"),
        (["y", "n"], ["y", "y"], ["a", "b"], {"positive": "yes"}, "does not occur"),
        ([0, 1], [0, 1], ["a", "a"], {}, "one group only"),
        ([0, 1], [0, 1], None, {}, "no sensitive column"),
        ([0, 1], [0, 1], ["a", "b"], {"measures": []}, "no measures"),
        ([0, 1], [0, 1], ["a", "b"], {"measures": ["parity"]}, "no fairness measure"),
        ([0, 1], [0, 1], ["a", "b"], {"limits": {"demographic_parity_ratio": 80}}, "limit"),
        ([0, 1], [0, 1], ["a", "b"], {"resamples": 10}, "resamples"),
    ],
)
def test_bad_input_is_refused_with_what_where_and_fix(
    truth: list, said: list, group: list, options: dict, says: str
) -> None:
    with pytest.raises(StatisticsError) as caught:
        check_fairness(truth, said, group, **options)
    assert says in caught.value.what and caught.value.where and caught.value.fix


def _crossed_world(seed: int, gap: float) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    "Two attributes of four groups, 1,500 rows; in group a of the first, selection is lower by the gap."
    rng = np.random.default_rng(seed)
    people = {name: rng.choice(list("abcd"), 1500) for name in ("origin", "region")}
    truth = rng.integers(0, 2, 1500)
    said = (rng.random(1500) < np.where(truth == 1, 0.8, 0.45) - gap * (people["origin"] == "a")).astype(int)
    return truth, said, people


def test_fair_worlds_with_many_groups_fail_no_oftener_than_the_level_allows() -> None:
    worlds, fails, alone = 40, 0, 0
    for seed in range(worlds):
        check = check_fairness(*_crossed_world(seed, gap=0.0), resamples=200)
        fails += check.verdict == "fail"
        alone += any("alone is beyond the limit" in g.reason for r in check.results for g in r.groups)
    assert stats.binom.sf(fails - 1, worlds, 0.05) > 0.01, fails
    assert alone > 8, "the worlds must tempt: single intervals are often beyond the limit"


def test_an_unfair_world_still_fails_among_many_comparisons() -> None:
    checks = [check_fairness(*_crossed_world(seed, gap=0.3), resamples=300) for seed in range(10)]
    assert sum(c.verdict == "fail" for c in checks) >= 9
    assert all(c.comparisons > 200 for c in checks)
    assert all(r.comparisons == c.comparisons for c in checks for r in c.results)
    assert all("comparisons at once" in c.notes[-1] for c in checks)


def test_comparisons_count_each_interval_once_and_leave_small_groups_out() -> None:
    group = np.array(["a"] * 200 + ["b"] * 200 + ["c"] * 200 + ["few"] * 10)
    said = np.arange(610) % 2
    one = check_fairness(said, said, group, measures=["demographic_parity_ratio"])
    assert one.comparisons == 3
    same = ["equal_opportunity_difference", "equalized_odds_difference"]  # both use the true positive rate's intervals
    assert check_fairness(said, said, group, measures=same).comparisons == 6
    two = check_fairness(said[:400], said[:400], group[:400], measures=["demographic_parity_ratio"])
    assert two.comparisons == 1 and not two.notes


@pytest.mark.parametrize("name", ["demographic_parity_ratio", "demographic_parity_difference"])
@pytest.mark.parametrize(("group", "reference"), [((12, 40), (30, 50)), ((0, 30), (20, 200)), ((50, 100), (900, 1500))])
def test_chance_within_equals_a_simulation(name: str, group: tuple[int, int], reference: tuple[int, int]) -> None:
    measure, rng = DISPARITIES[name], np.random.default_rng(0)
    low = rng.beta(group[0] + 1, group[1] - group[0], 400_000)
    high = rng.beta(reference[0], reference[1] - reference[0] + 1, 400_000)
    within = low >= measure.limit * high if measure.ratio else high - low <= measure.limit
    assert chance_within(measure, group, reference, measure.limit) == pytest.approx(within.mean(), abs=0.004)
    assert chance_within(measure, (5, 5), reference, measure.limit) == 1 == chance_within(measure, group, (0, 9), 0.8)
