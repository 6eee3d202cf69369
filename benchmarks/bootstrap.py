"""Bootstrap intervals of the whole binary metric set: weighted matrix products against a loop over scikit-learn.

    python benchmarks/bootstrap.py                     1,000 resamples of 10,000 rows, 3 rounds (about 3 minutes)
    python benchmarks/bootstrap.py --resamples 200 --rounds 1

Both sides draw ordinary bootstrap resamples of the same predictions and compute the same nine metrics on each; the
rounds alternate, so that a busy machine hurts both. Before timing, both compute the metrics on the *same* resamples
and must agree to 1e-9. The last line of the output is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
import sklearn
from sklearn import metrics as sk

from mlops_workbench.evaluation.classification import BINARY
from mlops_workbench.evaluation.intervals import percentile_interval, replicates
from mlops_workbench.evaluation.metrics import measure_metrics
from mlops_workbench.evaluation.predictions import Predictions, read_predictions


def make_predictions(rows: int) -> Predictions:
    """A useful, miscalibrated classifier on 20 % positives; scores have few ties."""
    rng = np.random.default_rng(0)
    truth = (rng.random(rows) < 0.2).astype(int)
    score = 1 / (1 + np.exp(-(rng.normal(size=rows) + 1.5 * truth - 1.2)))
    return read_predictions(score, None, truth)


def sklearn_metrics(y: np.ndarray, said: np.ndarray, score: np.ndarray) -> list[float]:
    """The same nine metrics, each through its scikit-learn function."""
    return [
        sk.accuracy_score(y, said),
        sk.balanced_accuracy_score(y, said),
        sk.precision_score(y, said),
        sk.recall_score(y, said),
        sk.f1_score(y, said),
        sk.roc_auc_score(y, score),
        sk.average_precision_score(y, score),
        sk.log_loss(y, score),
        sk.brier_score_loss(y, score),
    ]


def by_loop(p: Predictions, resamples: int, seed: int) -> list[tuple[float, float]]:
    rng, n, score = np.random.default_rng(seed), p.n, p.scores
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(0, n, n)
        drawn.append(sklearn_metrics(p.y[rows], p.predicted[rows], score[rows]))
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def by_weights(p: Predictions, resamples: int, seed: int) -> list[tuple[float, float]]:
    found = [percentile_interval(column) for column in replicates(p, BINARY, resamples, seed).T]
    return [(i.low, i.high) for i in found]


def largest_difference(p: Predictions) -> float:
    """Both ways on the same five resamples."""
    rng, worst = np.random.default_rng(1), 0.0
    for _ in range(5):
        rows = rng.integers(0, p.n, p.n)
        ours = measure_metrics(p, BINARY, np.bincount(rows, minlength=p.n))[0]
        theirs = sklearn_metrics(p.y[rows], p.predicted[rows], p.scores[rows])
        worst = max(worst, float(np.abs(ours - np.array(theirs)).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    p = make_predictions(args.rows)
    difference = largest_difference(p)
    if difference > 1e-9:
        raise SystemExit(f"the two ways differ by {difference:g}")
    ways = {"weights": by_weights, "loop": by_loop}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    intervals: dict[str, list[tuple[float, float]]] = {}
    by_weights(p, 20, 0)  # first-use costs are not measured
    by_loop(p, 2, 0)
    for round_number in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            intervals[name] = way(p, args.resamples, round_number)
            seconds[name].append(time.perf_counter() - start)
    print(
        f"{args.resamples:,} resamples of {args.rows:,} rows, {len(BINARY)} metrics, {args.rounds} rounds, {os.cpu_count()} cores"
    )
    print(f"{'metric':20} {'weighted products':>24} {'loop over scikit-learn':>26}")
    for metric, ours, theirs in zip(BINARY, intervals["weights"], intervals["loop"], strict=True):
        print(f"{metric.name:20} {ours[0]:11.4f} to {ours[1]:8.4f} {theirs[0]:13.4f} to {theirs[1]:8.4f}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["loop"] / medians["weights"]
    print(f"{'median seconds':20} {medians['weights']:24.3f} {medians['loop']:26.3f}   ratio {ratio:.1f}")
    result = {
        "benchmark": "bootstrap",
        "rows": args.rows,
        "resamples": args.resamples,
        "metrics": len(BINARY),
        "rounds": args.rounds,
        "seconds_ours": {"median": round(medians["weights"], 4), "all": [round(s, 4) for s in seconds["weights"]]},
        "seconds_sklearn_loop": {"median": round(medians["loop"], 4), "all": [round(s, 4) for s in seconds["loop"]]},
        "ratio": round(ratio, 1),
        "largest_difference_same_resamples": difference,
        "under_one_second": medians["weights"] < 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit_learn": sklearn.__version__,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
