"""What the tests of pipelines share: notebooks written in a line, and pipelines checked and planned."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mlops_workbench.pipelines.checks import check_pipeline
from mlops_workbench.pipelines.definition import Pipeline, Step
from mlops_workbench.pipelines.outcomes import StepGraph, plan_graph


def write_notebook(path: Path, *cells: str, parameters: str = "seed: int = 1") -> Path:
    """A notebook with a `parameters` cell and code cells."""
    sources = [(parameters, ["parameters"]), *((c, []) for c in cells)]
    body = [
        {"cell_type": "code", "source": s, "metadata": {"tags": t}, "outputs": [], "execution_count": None}
        for s, t in sources
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": body, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
    return path


def graph_of(folder: Path, *steps: Step, values: dict[str, Any] | None = None, **shared: Any) -> StepGraph:
    """A checked graph whose run folder lies beside the notebooks."""
    pipeline = Pipeline("test", steps, folder=folder)
    return plan_graph(check_pipeline(pipeline), values or {}, folder / "run", **shared)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of a condition; fails after a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {seconds} s")


def gone(pid: int) -> bool:
    """No process of this number, or only its remains."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
