"""Metrics, intervals, calibration and comparisons against scikit-learn, scipy and definitions, over random inputs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from mlops_workbench.errors import StatisticsError
from mlops_workbench.evaluation.calibration import calibration_line, reliability_curve
from mlops_workbench.evaluation.classification import BINARY, MULTICLASS
from mlops_workbench.evaluation.comparisons import compare_models, comparison_verdict, delong, mcnemar
from mlops_workbench.evaluation.evaluations import evaluate
from mlops_workbench.evaluation.intervals import (
    bootstrap_intervals,
    exact_interval,
    percentile_interval,
    replicates,
    resample_weights,
)
from mlops_workbench.evaluation.metrics import Metric, find_metric, measure_metrics
from mlops_workbench.evaluation.predictions import Predictions, read_predictions
from mlops_workbench.evaluation.regression import REGRESSION

pytestmark = pytest.mark.fast
quick = settings(max_examples=60, deadline=None, derandomize=True)


def values(p: Predictions, metrics: tuple[Metric, ...], weights: np.ndarray | None = None) -> dict[str, float]:
    return dict(zip([m.name for m in metrics], measure_metrics(p, metrics, weights)[0].tolist(), strict=True))


@st.composite
def binary(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Truth, scores with many ties, whole-number weights that leave both classes some weight."
    n = draw(st.integers(4, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    truth = rng.integers(0, 2, n)
    levels = draw(st.sampled_from([2, 5, 20, 10_000]))
    scores = rng.integers(0, levels + 1, n) / levels
    weights = rng.integers(0, 4, n)
    assume(0 < (weights * truth).sum() < weights.sum())
    return truth, scores, weights


def sklearn_binary(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    said, w = (score > 0.5).astype(int), {"sample_weight": weights}
    return {
        "accuracy": sk.accuracy_score(y, said, **w),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said, **w),
        "precision": sk.precision_score(y, said, zero_division=0, **w),
        "recall": sk.recall_score(y, said, **w),
        "f1": sk.f1_score(y, said, **w),
        "roc_auc": sk.roc_auc_score(y, score, **w),
        "average_precision": sk.average_precision_score(y, score, **w),
        "log_loss": sk.log_loss(y, score, labels=[0, 1], **w),
        "brier": sk.brier_score_loss(y, score, **w),
    }


@quick
@given(binary())
def test_binary_metrics_equal_scikit_learn_with_weights(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, score, weights = case
    p = read_predictions(((score > 0.5).astype(int), score), None, y, task="binary")
    ours = values(p, BINARY, weights[None, :])
    theirs = sklearn_binary(y, score, weights)
    assert set(ours) == set(theirs)
    np.testing.assert_allclose([ours[k] for k in theirs], list(theirs.values()), rtol=1e-9, atol=1e-12)


@quick
@given(binary())
def test_weighting_rows_is_repeating_rows(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, score, weights = case
    p = read_predictions(((score > 0.5).astype(int), score), None, y, task="binary")
    repeated = p.take(np.repeat(np.arange(len(y)), weights))
    a, b = values(p, BINARY, weights[None, :]), values(repeated, BINARY)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-9, atol=1e-12)


@st.composite
def several_classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    k, n = draw(st.integers(3, 6)), draw(st.integers(30, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    truth = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    table = rng.dirichlet(np.ones(k), n).round(2)
    return truth, table / table.sum(axis=1, keepdims=True)


@quick
@given(several_classes())
def test_multiclass_metrics_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    y, table = case
    said = table.argmax(axis=1)
    theirs = {
        "accuracy": sk.accuracy_score(y, said),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
        "precision": sk.precision_score(y, said, average="macro", zero_division=0),
        "recall": sk.recall_score(y, said, average="macro", zero_division=0),
        "f1": sk.f1_score(y, said, average="macro", zero_division=0),
        "roc_auc": sk.roc_auc_score(y, table, multi_class="ovr"),
        "average_precision": np.mean([sk.average_precision_score(y == k, table[:, k]) for k in range(table.shape[1])]),
        "log_loss": sk.log_loss(y, table),
        "brier": np.mean(((table - np.eye(table.shape[1])[y]) ** 2).sum(axis=1)),
    }
    ours = values(read_predictions(table, None, y, task="multiclass"), MULTICLASS)
    assert set(ours) == set(theirs)
    np.testing.assert_allclose([ours[k] for k in theirs], list(theirs.values()), rtol=1e-9)


def test_a_class_that_is_only_predicted_counts_as_in_scikit_learn() -> None:
    y, said = ["a", "a", "b", "b"], ["a", "c", "b", "b"]
    ours = values(read_predictions(said, None, y), MULTICLASS)
    assert ours["f1"] == pytest.approx(sk.f1_score(y, said, average="macro", zero_division=0))
    assert ours["precision"] == pytest.approx(sk.precision_score(y, said, average="macro", zero_division=0))
    assert ours["balanced_accuracy"] == pytest.approx(0.75)


numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 3))


@quick
@given(st.lists(st.tuples(numbers, numbers, st.integers(0, 3)), min_size=3, max_size=60))
def test_regression_metrics_equal_scikit_learn_and_scipy(rows: list[tuple[float, float, int]]) -> None:
    y, said, weights = (np.array(c) for c in zip(*rows, strict=True))
    repeated = np.repeat(np.arange(len(y)), weights)
    assume(len(repeated) > 2 and np.ptp(y[repeated]) > 1 and np.ptp((y - said)[repeated]) > 1)
    ours = values(Predictions("regression", y, said), REGRESSION, weights[None, :])
    t, s = y[repeated], said[repeated]
    theirs = {
        "rmse": sk.root_mean_squared_error(t, s),
        "mae": sk.mean_absolute_error(t, s),
        "median_ae": sk.median_absolute_error(t, s),
        "r2": sk.r2_score(t, s),
        "residual_mean": (t - s).mean(),
        "residual_std": (t - s).std(),
        "residual_skew": stats.skew(t - s),
        "pinball_10": sk.mean_pinball_loss(t, s, alpha=0.1),
        "pinball_90": sk.mean_pinball_loss(t, s, alpha=0.9),
        "mape": np.nan if (y == 0).any() else sk.mean_absolute_percentage_error(t, s),
    }
    assert set(ours) == set(theirs)
    scale = np.abs(t - s).max()
    np.testing.assert_allclose([ours[k] for k in theirs], list(theirs.values()), rtol=1e-5, atol=1e-9 * scale)


@pytest.mark.parametrize("metric", [m.name for m in (*BINARY, *REGRESSION)])
def test_directions_are_right(metric: str) -> None:
    "A perfect prediction must be a gain over a poor one."
    rng = np.random.default_rng(0)
    if metric in {m.name for m in BINARY}:
        y = np.arange(200) % 2
        found = find_metric(metric, BINARY)
        best, worst = (read_predictions(s, None, y) for s in (0.05 + 0.9 * y, rng.random(200)))
    else:
        y = rng.normal(10, 1, 200)
        found = find_metric(metric, REGRESSION)
        best, worst = (
            read_predictions(y + d, None, y, task="regression")
            for d in (rng.normal(0, 0.01, 200), rng.exponential(2, 200))
        )
    gain = found.gain(measure_metrics(worst, [found])[0, 0], measure_metrics(best, [found])[0, 0])
    assert gain > 0
    assert found.low <= measure_metrics(best, [found])[0, 0] <= found.high


# intervals


def test_resamples_are_multinomial_counts() -> None:
    blocks = list(resample_weights(2_000, 1_200, seed=3))
    weights = np.concatenate(blocks)
    assert len(blocks) > 1 and weights.shape == (1_200, 2_000)
    assert (weights.sum(axis=1) == 2_000).all()
    assert weights.mean() == 1 and weights.var() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(weights[0], weights[1])[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["roc_auc", "brier", "recall"])
def test_percentile_interval_agrees_with_scipy(name: str) -> None:
    rng = np.random.default_rng(0)
    score = rng.random(300)
    y = (rng.random(300) < score).astype(int)
    p, metric = read_predictions(score, None, y), find_metric(name, BINARY)
    ours = percentile_interval(replicates(p, [metric], 4_000, seed=1)[:, 0])

    reference = {
        "roc_auc": sk.roc_auc_score,
        "brier": sk.brier_score_loss,
        "recall": lambda t, s: sk.recall_score(t, s > 0.5),
    }

    def theirs(rows: np.ndarray) -> float:
        return reference[name](y[rows], score[rows])

    them = stats.bootstrap(
        (np.arange(300),),
        theirs,
        vectorized=False,
        n_resamples=1_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = them.high - them.low
    assert ours.low == pytest.approx(them.low, abs=0.12 * width)
    assert ours.high == pytest.approx(them.high, abs=0.12 * width)


def test_bca_agrees_with_scipy_on_a_skewed_metric() -> None:
    rng = np.random.default_rng(4)
    y, said = rng.exponential(1, 60) ** 2, np.zeros(60)
    p, metric = Predictions("regression", y, said), find_metric("rmse", REGRESSION)
    ours = bootstrap_intervals(p, [metric], resamples=8_000, seed=0, method="bca")[1][0]
    them = stats.bootstrap(
        (y,),
        lambda x, axis=-1: np.sqrt(np.mean(x**2, axis=axis)),
        n_resamples=8_000,
        method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval
    plain = bootstrap_intervals(p, [metric], resamples=8_000, seed=0, method="percentile")[1][0]
    width = them.high - them.low
    assert ours.method == "bca"
    assert ours.low == pytest.approx(them.low, abs=0.05 * width)
    assert ours.high == pytest.approx(them.high, abs=0.05 * width)
    assert abs(plain.high - them.high) > abs(ours.high - them.high)


def test_no_certainty_from_thirty_rows() -> None:
    result = evaluate(np.array([0.1, 0.9] * 15), None, np.array([0, 1] * 15), resamples=200)
    low, high = result.interval("accuracy")
    assert (low, high) == pytest.approx(stats.binomtest(30, 30).proportion_ci(method="exact")[:2])
    assert np.isnan(result.interval("roc_auc")).all()
    assert "same value" in next(v.reason for v in result.values if v.metric == "roc_auc")


@quick
@given(st.integers(0, 40), st.integers(1, 40))
def test_exact_interval_equals_scipy(successes: int, extra: int) -> None:
    trials = successes + extra - 1 or 1
    successes = min(successes, trials)
    theirs = stats.binomtest(successes, trials).proportion_ci(method="exact")
    ours = exact_interval(successes, trials)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_equal_seeds_give_equal_results() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(200)
    y = (rng.random(200) < score).astype(int)
    groups = rng.choice(["a", "b"], 200)
    one, two = (evaluate(score, None, y, segments=groups, sensitive=groups, resamples=200, seed=5) for _ in range(2))
    other = evaluate(score, None, y, segments=groups, sensitive=groups, resamples=200, seed=6)
    assert one.to_dict() == two.to_dict()
    assert one.metrics == other.metrics and one.to_dict() != other.to_dict()


# calibration


def test_calibration_line_equals_unpenalised_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(2, 3, 3_000)
    odds = np.log(p / (1 - p))
    y = (rng.random(3_000) < 1 / (1 + np.exp(-(0.4 + 0.6 * odds)))).astype(int)
    slope, intercept = calibration_line(y, p)
    fitted = LogisticRegression(C=np.inf, tol=1e-9).fit(odds[:, None], y)
    assert slope == pytest.approx(fitted.coef_[0, 0], abs=1e-4) and slope == pytest.approx(0.6, abs=0.1)
    # with the slope at 1, the intercept makes expected and observed counts equal
    assert (1 / (1 + np.exp(-(intercept + odds)))).sum() == pytest.approx(y.sum(), abs=1e-6)


def test_calibration_survives_certainty_and_constants() -> None:
    y = np.array([0, 1, 0, 1, 1, 0])
    assert np.isnan(calibration_line(y, np.full(6, 0.5))[0]) and calibration_line(y, np.full(6, 0.5))[
        1
    ] == pytest.approx(0)
    assert np.isnan(calibration_line(y, y.astype(float))[0])
    assert np.isnan(calibration_line(np.ones(6), np.linspace(0.1, 0.9, 6))).all()
    curve = reliability_curve(y, np.full(6, 0.5), 10)
    assert curve["rows"].tolist() == [6] and curve["observed"].tolist() == [0.5]
    slope, intercept = calibration_line(np.array([1, 0, 1, 0, 1, 1, 0, 1]), np.array([0, 0, 1, 1, 1, 0, 0.5, 0.5]))
    assert np.isfinite(intercept) and np.isfinite(slope)


# comparisons


def test_delong_equals_its_definition() -> None:
    rng = np.random.default_rng(2)
    y = np.arange(60) % 3 == 0
    a, b = (rng.integers(0, 8, 60) + 3 * y * s for s in (1, 2))

    def contributions(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wins = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
        return wins.mean(axis=1), wins.mean(axis=0)

    (a10, a01), (b10, b01) = contributions(a), contributions(b)
    covariance = np.cov(a10, b10) / y.sum() + np.cov(a01, b01) / (~y).sum()
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    test = delong(y.astype(int), a.astype(float), b.astype(float))
    assert test.facts["difference"] == pytest.approx(sk.roc_auc_score(y, b) - sk.roc_auc_score(y, a))
    assert test.statistic == pytest.approx(test.facts["difference"] / np.sqrt(variance))


def test_mcnemar_equals_the_binomial_test() -> None:
    # Agresti, Categorical Data Analysis: 86 and 150 changed their mind
    first = np.repeat([True, True, False, False], [794, 150, 86, 570])
    second = np.repeat([True, False, True, False], [794, 150, 86, 570])
    test = mcnemar(first, second)
    assert test.statistic == 86
    assert test.p_value == pytest.approx(stats.binomtest(86, 236).pvalue) and test.p_value == pytest.approx(
        3.7e-5, rel=0.05
    )
    assert mcnemar(first, first).p_value == 1


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.001, 0.02, 0.0, "better"),
        (0.0, 0.02, 0.0, "no worse"),
        (-0.001, 0.02, 0.0, "inconclusive"),
        (-0.001, 0.02, 0.001, "no worse"),
        (-0.01, -0.001, 0.02, "no worse"),
        (-0.03, -0.001, 0.02, "worse"),
        (-0.03, 0.001, 0.02, "inconclusive"),
        (np.nan, np.nan, 1.0, "inconclusive"),
    ],
)
def test_comparison_verdicts(low: float, high: float, margin: float, verdict: str) -> None:
    assert comparison_verdict(low, high, margin) == verdict


def test_pairing_finds_what_separate_intervals_miss() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 400)  # the same hard rows for both models
    y = rng.normal(0, 1, 400)
    champion, challenger = y + hard + rng.normal(0, 0.3, 400), y + 0.9 * hard + rng.normal(0, 0.3, 400)
    found = compare_models(y, champion, challenger, task="regression")
    alone = [evaluate(p, None, y, task="regression", resamples=300).interval("rmse") for p in (champion, challenger)]
    assert found.verdict == "better" and found.metric == "rmse"
    assert alone[0][0] < alone[1][1]  # the two intervals overlap


def test_equal_labels_are_not_certainty() -> None:
    y = np.array([0, 1] * 10)
    scores = np.where(y == 1, 0.9, 0.1)
    same = compare_models(y, scores, scores, metric="accuracy")
    assert same.verdict == "no worse" and "same predictions" in same.reason
    other = compare_models(y, scores, np.where(y == 1, 0.8, 0.2), metric="accuracy")
    assert other.verdict == "inconclusive" and other.low == pytest.approx(-stats.binomtest(0, 20).proportion_ci().high)
    assert compare_models(y, scores, np.where(y == 1, 0.8, 0.2), metric="accuracy", margin=0.2).verdict == "no worse"


def test_models_that_know_different_labels_can_be_compared() -> None:
    y = np.array(["a", "b"] * 50)
    third = np.where(np.arange(100) < 10, "c", y)
    found = compare_models(y, third, y, metric="accuracy")
    assert (found.champion, found.challenger, found.verdict) == (0.9, 1.0, "better")


# the whole


def test_evaluation_is_strict_json_and_holds_no_rows() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {"a": rng.normal(size=300), "b": rng.normal(size=300), "<i>g</i>": rng.choice(["x", "<script>"], 300)}
    )
    y = np.where(X["a"] + rng.normal(size=300) > 0, "<b>yes</b>", "no")
    model = LogisticRegression().fit(X[["a", "b"]], y)
    result = evaluate(model, X, y, sensitive="<i>g</i>", segments=["a"], resamples=200)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["fairness"]["verdict"] == result.fairness.verdict
    for html in (result._repr_html_(), result.fairness._repr_html_()):
        assert "<script>" not in html and "<i>" not in html and "<b>yes" not in html
    assert result.positive == "no" and any("positive" in n for n in result.notes)
    assert len(result.segments) == 2 + 4


def test_segments_of_a_regressor_and_its_figure() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=200), "site": ["n"] * 190 + ["s"] * 10})
    y = (3 * X["a"]).round()  # few whole numbers: only the estimator can tell that this is a regression
    result = evaluate(Ridge().fit(X[["a"]], y), X, y, segments="site", sensitive="site", resamples=200)
    assert result.task == "regression" and result.fairness is None and any("fairness" in n for n in result.notes)
    assert [(s.group, s.n, s.tiny) for s in result.segments] == [("n", 190, False), ("s", 10, True)]
    assert "points" not in result.to_dict() and len(result.figure().data) >= 4


def test_a_callable_and_a_model_without_names() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 2))
    y = X[:, 0] * 2 + rng.normal(size=100)
    model = LinearRegression().fit(X, y)
    assert evaluate(model.predict, X, y, resamples=100).metrics == evaluate(model, X, y, resamples=100).metrics


def test_columns_of_probabilities_follow_the_model_not_the_alphabet() -> None:
    table = pd.DataFrame({"z": [0.9, 0.8, 0.3], "a": [0.1, 0.2, 0.7]})
    p = read_predictions(table, None, ["z", "z", "a"], positive="z")
    np.testing.assert_allclose(p.scores, [0.9, 0.8, 0.3])
    assert p.predicted.tolist() == [1, 1, 0]


Y = np.array([0, 1] * 20)


@pytest.mark.parametrize(
    ("source", "y", "options", "says"),
    [
        ([], [], {}, "empty"),
        (Y, None, {}, "missing"),
        (Y, np.full(40, np.nan), {}, "40 missing"),
        (Y[:-1], Y, {}, "39 values for 40 rows"),
        (np.where(Y == 1, np.nan, 0.5), Y, {}, "missing"),
        (np.where(Y == 1, 1.5, 0.5), Y, {}, "outside 0 to 1"),
        (np.full((40, 2), 0.7), Y, {}, "do not sum to 1"),
        (np.full((40, 3), 1 / 3), Y, {}, "shape"),
        (np.where(Y == 1, "yes", "no"), Y, {}, "the target is"),
        (["a"] * 40, ["a"] * 40, {}, "constant"),
        (np.arange(40.0) / 7, np.full(40, 3.25), {"task": "regression"}, "constant"),
        (np.arange(40.0), np.where(np.arange(40) == 3, np.inf, 1.0), {"task": "regression"}, "infinite"),
        (["x"] * 40, np.arange(40.0), {"task": "regression"}, "not a number"),
        (Y, Y, {"positive": "yes"}, "positive class"),
        (Y, Y, {"task": "ranking"}, "unknown task"),
        (np.arange(40) % 3, np.arange(40) % 3, {"task": "binary"}, "two classes"),
        (Y, Y, {"resamples": 1}, "resamples"),
        (Y, Y, {"level": 1.2}, "level"),
        (Y, Y, {"segments": ["a", "b"]}, "2 values for 40 rows"),
        (Y, Y, {"segments": [f"g{k}" for k in range(40)], "sensitive": np.arange(40).astype(str)}, None),
        (LogisticRegression(), Y, {}, "no X"),
    ],
)
def test_bad_input_is_refused_with_what_where_and_fix(
    source: Any, y: Any, options: dict[str, Any], says: str | None
) -> None:
    if says is None:  # forty groups of one row: legal, every one of them tiny
        assert all(s.tiny for s in evaluate(source, None, y, resamples=20, **options).segments)
        return
    with pytest.raises(StatisticsError) as caught:
        evaluate(source, None, y, **options)
    assert says in caught.value.what
    assert caught.value.where and caught.value.fix


def test_labels_a_model_never_saw_are_named() -> None:
    X = np.arange(20.0)[:, None]
    model = LogisticRegression().fit(X, Y[:20])
    with pytest.raises(StatisticsError) as caught:
        evaluate(model, X, np.where(np.arange(20) == 4, 7, Y[:20]))
    assert caught.value.unseen == [7]


def test_one_class_in_y_is_reported_not_raised() -> None:
    result = evaluate(np.linspace(0.1, 0.9, 40), None, np.ones(40, dtype=int), resamples=50)
    assert set(result.undefined) == {"balanced_accuracy", "roc_auc", "average_precision"}
    assert all("every row is 1" in r for r in result.undefined.values())
    assert {"accuracy", "log_loss", "brier", "recall"} <= set(result.metrics)
