"""Do intervals and verdicts keep their promise? Simulated studies whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from mlops_workbench.evaluation.classification import BINARY
from mlops_workbench.evaluation.comparisons import compare_models
from mlops_workbench.evaluation.fairness import check_fairness
from mlops_workbench.evaluation.intervals import bootstrap_intervals
from mlops_workbench.evaluation.metrics import find_metric
from mlops_workbench.evaluation.predictions import Predictions, read_predictions
from mlops_workbench.evaluation.regression import REGRESSION

pytestmark = pytest.mark.slow


def coverage(name: str, n: int, studies: int, truth: float, make: Any) -> float:
    metric = find_metric(name, REGRESSION if name in {m.name for m in REGRESSION} else BINARY)
    held = 0
    for study in range(studies):
        p = make(np.random.default_rng([study, n]))
        held += truth in bootstrap_intervals(p, [metric], resamples=400, seed=study)[1][0]
    return held / studies


def draw_scores(rng: np.random.Generator) -> Predictions:
    y = np.arange(100) % 2
    return read_predictions(stats.norm.cdf(rng.normal(size=100) + y), None, y)


@pytest.mark.parametrize(
    ("name", "truth", "make"),
    [
        ("roc_auc", stats.norm.cdf(1 / np.sqrt(2)), draw_scores),
        ("recall", 1 - stats.norm.cdf(-1), draw_scores),
        ("rmse", 1.0, lambda rng: Predictions("regression", rng.normal(size=100), np.zeros(100))),
        ("median_ae", stats.norm.ppf(0.75), lambda rng: Predictions("regression", rng.normal(size=100), np.zeros(100))),
    ],
)
def test_intervals_cover(name: str, truth: float, make: Any) -> None:
    "95 % intervals hold the truth in 90 to 99 % of 300 studies (binomial noise: 1.3 points)."
    assert 0.90 <= coverage(name, 100, 300, float(truth), make) <= 0.99


def test_comparison_of_equal_models_is_seldom_decided() -> None:
    decided = 0
    for study in range(200):
        rng = np.random.default_rng(study)
        y = np.arange(150) % 2
        a, b = (stats.norm.cdf(rng.normal(size=150) + y) for _ in range(2))
        decided += compare_models(y, a, b, resamples=400, seed=study).verdict in ("better", "worse")
    assert decided / 200 < 0.10


def two_groups(rate_a: float, rate_b: float, n_a: int, n_b: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    said = np.concatenate([rng.random(n_a) < rate_a, rng.random(n_b) < rate_b]).astype(int)
    group = np.repeat(["a", "b"], [n_a, n_b])
    return check_fairness(said, said, group, measures=["demographic_parity_ratio"], resamples=400, seed=seed).verdict


def test_verdicts_keep_their_promise() -> None:
    at_limit = [two_groups(0.6, 0.48, 2000, 400, s) for s in range(250)]  # the true ratio is exactly 0.8
    assert at_limit.count("pass") / 250 < 0.06 and at_limit.count("fail") / 250 < 0.06
    assert [two_groups(0.6, 0.3, 2000, 400, s) for s in range(40)].count("fail") > 38
    assert [two_groups(0.6, 0.6, 2000, 400, s) for s in range(40)].count("pass") > 35
    assert [two_groups(0.6, 0.6, 2000, 30, s) for s in range(40)].count("fail") == 0
