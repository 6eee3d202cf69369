"""A live notebook session, driven through a real Jupyter kernel as a front end does it: cells that were never saved."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager

from mlops_workbench.tracking.runs import Tracker
from mlops_workbench.workspace.folders import Workspace, init

pytestmark = pytest.mark.process

LOAD = "%load_ext mlops_workbench.tracking.sessions"
SECRETS = {
    "typed": "hunter2hunter2",
    "known": "correct-horse-battery",
    "env": "blue-elephant-77",
    "url": "sw0rdfish99",
    "token": "ghp_" + "q7W2e9" * 6,
}


class Front:
    """The part of a front end that matters: sends cells with their ids and collects what comes back."""

    def __init__(self, root: Path, **environment: str):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLWB_", "IN_TEST"))}
        self.env = (
            kept | {"MLWB_CONFIG_HOME": str(root.parent / "config"), "MLFLOW_DISABLE_TELEMETRY": "true"} | environment
        )
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(root), env=self.env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def run(self, source: str, cell: str = "", fail: bool = False) -> dict[str, Any]:
        """Execute one cell; returns stdout, stderr, result and error name."""
        message = self.client.session.msg(
            "execute_request",
            {
                "code": source,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": True,
            },
            metadata={"cellId": cell},
        )
        self.client.shell_channel.send(message)
        found: dict[str, Any] = {"stdout": "", "stderr": "", "result": None, "error": None, "traceback": ""}
        while True:
            got = self.client.get_iopub_msg(timeout=120)
            if got["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                continue
            content, kind = got["content"], got["msg_type"]
            if kind == "stream":
                found[content["name"]] += content["text"]
            elif kind == "execute_result":
                found["result"] = content["data"]["text/plain"]
            elif kind == "error":
                found["error"], found["traceback"] = content["ename"], "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                break
        assert fail or found["error"] is None, found["traceback"]
        return found

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init(tmp_path / "loans", home=tmp_path / "config").close()
    return tmp_path / "loans"


@pytest.fixture
def front(root: Path) -> Iterator[Front]:
    front = Front(root, MLWB_SECRET_WAREHOUSE=SECRETS["known"], SERVICE_PASSWORD=SECRETS["env"])
    yield front
    front.close()


def tracker_of(root: Path) -> Tracker:
    return Tracker(Workspace(root, home=root.parent / "config"))


def cells_of(record: Any) -> list[Any]:
    return nbformat.reads(record.read("session.ipynb"), as_version=4).cells


def test_a_session_from_first_cell_to_stored_run(front, root):
    assert "tracking in workspace loans" in front.run(LOAD, "load")["stdout"]
    front.run(
        "from sklearn.datasets import load_breast_cancer\nfrom sklearn.linear_model import LogisticRegression\nX, y = load_breast_cancer(return_X_y=True, as_frame=True)\nX = X.iloc[:, :4]",
        "data",
    )
    front.run("rate = 0.1", "rate")
    front.run(f"password = '{SECRETS['typed']}'; secret_url = 'mysql://ana:{SECRETS['url']}@h/d'", "secret")
    front.run("rate = 10.0", "rate")  # changed and run again: the screen forgets 0.1
    shown = front.run(
        "%%track baseline --data dataset:loans@1 --seed 7 --param kind=logistic --tag team=risk\nmodel = LogisticRegression(C=rate, max_iter=5000).fit(X, y)\nrun.log_metrics(accuracy=model.score(X, y))\nround(run.evaluate(model, X, y, resamples=60).metrics['roc_auc'], 1)",
        "train",
    )
    assert (
        shown["result"] == "1.0"
        and "baseline: finished" in shown["stdout"]
        and "mlops_workbench" not in shown["stderr"]
    )
    front.run(
        f"import mlflow\nwith mlflow.start_run(run_name='plain'):\n    mlflow.log_params({{'depth': 3, 'api_key': '{SECRETS['typed']}'}})\n    mlflow.log_metric('auc', 0.5)",
        "plain",
    )
    failed = front.run(
        f"%%track broken\nimport os\nraise ConnectionError('refused for ' + os.environ['SERVICE_PASSWORD'] + ' with {SECRETS['token']}')",
        "broken",
        fail=True,
    )
    assert failed["error"] == "ConnectionError" and "refused for" in failed["traceback"]
    status = front.run("%track")["stdout"]
    assert "autologging on" in status and "failed" in status and "broken" in status

    tracker = tracker_of(root)
    table = tracker.runs().set_index("name", append=True).reset_index(level=0)
    assert dict(table.status) == {"baseline": "finished", "plain": "finished", "broken": "failed"}
    baseline = tracker.get(table.loc["baseline", "reference"])
    assert (
        baseline.data == ("dataset:loans@1",)
        and baseline.tags["team"] == "risk"
        and baseline.parameters["kind"] == "logistic"
    )
    assert baseline.parameters["C"] == "10.0" and baseline.parameters["max_iter"] == "5000"  # by autologging
    assert {"accuracy", "training_accuracy_score", "roc_auc", "roc_auc_low"} <= set(baseline.metrics) and len(
        baseline.models
    ) == 1
    assert not [
        m for m in baseline.metrics if m.startswith("roc_auc_score")
    ]  # the evaluation's own predictions are not autologged
    cells = cells_of(baseline)
    sources = [c.source for c in cells[1:]]
    assert (
        sources[0] == LOAD
        and sources[2] == "rate = 0.1"
        and sources[4] == "rate = 10.0"
        and sources[-1].startswith("%%track baseline")
    )
    assert [c.execution_count for c in cells[1:]] == list(range(1, len(cells))) and cells[3].metadata[
        "mlops_workbench"
    ]["cell_id"] == "rate"
    assert "one cell ran as In [3, 5] in 2 versions" in cells[0].source
    plain = tracker.get(table.loc["plain", "reference"])
    assert plain.parameters == {"depth": "3", "api_key": "«redacted:api_key»"} and cells_of(plain)[
        -1
    ].source.startswith("import mlflow")
    broken = tracker.get(table.loc["broken", "reference"])
    assert "refused for «redacted:SERVICE_PASSWORD» with «redacted:github-token»" in broken.read("error.txt")
    front.close()
    files = [p for p in (root / ".workbench").rglob("*") if p.is_file()]
    for kind, value in SECRETS.items():
        assert [str(p) for p in files if value.encode() in p.read_bytes()] == [], kind


def test_an_error_is_the_users_own_and_the_cell_runs_once(front):
    front.run(LOAD)
    front.run("n = 0")
    failed = front.run("%%track bad\nn += 1\nx = [][1]\nn += 10", fail=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", failed["traceback"])
    assert failed["error"] == "IndexError" and "x = [][1]" in plain  # the user's own line is shown
    assert front.run("n")["result"] == "1"
    assert front.run("%%track bad syntax\nx = = 1", fail=True)["error"]
    assert (
        front.run("%%track --nonsense\nn = 99", fail=True)["error"] == "TrackingError"
        and front.run("n")["result"] == "1"
    )
    assert front.run("%%track quiet\nn + 1;")["result"] is None and front.run("%%track loud\nn + 1")["result"] == "2"


def test_trouble_with_tracking_never_stops_the_cell(front, root):
    front.run(LOAD)
    front.run(
        "from mlops_workbench.tracking import runs, stores\nfrom mlops_workbench.errors import StorageError\ndef full(*a, **k): raise StorageError('the disk is full', fix='free some space')\nkeep = runs.Tracker._start; runs.Tracker._start = full"
    )
    for _ in range(2):
        shown = front.run("%%track lost\nvalue = 6 * 7\nrun.log_metrics(value=value)\nvalue")
        assert shown["result"] == "42"
        assert shown["stderr"].count("\n") == (1 if _ == 0 else 0)  # one line, once
    front.run("runs.Tracker._start = keep; end = runs._Ledger.close; runs._Ledger.close = full")
    shown = front.run("%%track half\n1 + 1")
    assert shown["result"] == "2" and "could not be recorded" in shown["stderr"] and shown["stderr"].count("\n") == 1
    front.run("runs._Ledger.close = end\nfrom mlops_workbench.tracking import cells\ncells.session_notebook = full")
    shown = front.run("%%track no cells\n2 + 1")
    assert shown["result"] == "3" and "could not be kept" in shown["stderr"] and "finished" in shown["stdout"]
    table = tracker_of(root).runs().set_index("name")
    assert set(table.status) == {"finished"} and set(table.index) == {"half", "no cells"}


def test_without_a_workspace_there_is_one_line_and_the_notebook_works(tmp_path):
    front = Front(tmp_path, MLWB_WORKSPACE="")
    try:
        shown = front.run(LOAD)
        assert "no workspace" in shown["stderr"] and shown["stderr"].count("\n") == 1 and "mlwb init" in shown["stderr"]
        assert front.run("%%track x\n1 + 1")["result"] == "2"
        assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlruns").exists()
    finally:
        front.close()


def test_unloading_takes_everything_back(front, root):
    front.run(LOAD)
    front.run("%unload_ext mlops_workbench.tracking.sessions")
    assert (
        "not found"
        in front.run("%%track x\n1", fail=True)["stderr"] + front.run("%%track x\n1", fail=True)["traceback"]
    )
    front.run("from sklearn.linear_model import LinearRegression\nLinearRegression().fit([[1.], [2.]], [1., 2.])")
    assert tracker_of(root).runs().empty


def test_autologging_makes_a_run_of_a_fit_and_stores_no_model(front, root):
    front.run("%load_ext mlops_workbench")
    front.run(
        "from sklearn.linear_model import LinearRegression\nLinearRegression().fit([[1.], [2.], [3.]], [1., 2., 3.])"
    )
    front.run("data = {'frame': 1}")
    table = tracker_of(root).runs()
    record = tracker_of(root).get(table.index[0])
    assert (
        len(table) == 1
        and record.parameters["fit_intercept"] == "True"
        and record.models == ()
        and "session.ipynb" in record.artifacts
    )


def test_variables_as_data_and_nothing_of_a_session_in_a_pipeline_step(root):
    front = Front(root, MLWB_STEP="train")
    try:
        front.run(
            "import pandas as pd\nfrom mlops_workbench.tracking.sessions import load_ipython_extension\nload_ipython_extension(get_ipython())"
        )
        front.run("loans = pd.DataFrame({'a': [1, 2]}); loans.attrs['reference'] = 'dataset:loans@4'")
        front.run("%%track step --data loans --data dataset:rates@1\npass")
        record = tracker_of(root).get(tracker_of(root).runs().index[0])
        assert (
            record.data == ("dataset:loans@4", "dataset:rates@1")
            and record.step == "train"
            and "session.ipynb" not in record.artifacts
        )
        assert json.loads(record.read("environment.json"))["python"]
    finally:
        front.close()
