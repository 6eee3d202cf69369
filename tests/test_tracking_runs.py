"""Runs through the tracker: what is written, what happens when things go wrong, and what is never written."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression

from mlops_workbench.errors import (
    NotAuthorisedError,
    ReferenceFormatError,
    StorageError,
    TrackingError,
    UnknownReferenceError,
)
from mlops_workbench.evaluation.fairness import check_fairness
from mlops_workbench.tracking.assessments import groups_for, training_frame
from mlops_workbench.tracking.models import folder_digest, reference_profile
from mlops_workbench.tracking.runs import Tracker, metrics_digest, mlflow_id, run_reference
from mlops_workbench.tracking.writers import data_references
from mlops_workbench.workspace.folders import Workspace

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    return Tracker(Workspace.temporary("runs"))


@pytest.fixture(scope="module")
def applications() -> pd.DataFrame:
    rng = np.random.default_rng(11)
    frame = pd.DataFrame(
        {
            "income": rng.normal(4, 1, 1500),
            "debt": rng.normal(2, 0.7, 1500),
            "race": rng.choice(["black", "white"], 1500, p=[0.3, 0.7]),
        }
    )
    frame.index = rng.permutation(1500) + 5000
    frame["approve"] = (frame.income - frame.debt + 1.5 * (frame.race == "white") + rng.normal(0, 1, 1500) > 2).astype(
        int
    )
    frame.attrs["reference"] = "dataset:loans@3"
    return frame


@given(st.integers(0, 2**128 - 1))
def test_references_are_a_bijection(number):
    identity = f"{number:032x}"
    name = run_reference(identity)
    assert mlflow_id(name) == identity and mlflow_id(name.removeprefix("run:")) == identity == mlflow_id(identity)
    assert len(name) == 30


@pytest.mark.parametrize("bad", ["", "run:7", "dataset:loans@1", "x" * 32, "run:" + "8" + "0" * 25, 5, None])
def test_what_is_no_run_reference_is_refused(bad):
    with pytest.raises(ReferenceFormatError):
        mlflow_id(bad)


def test_everything_about_a_run_is_captured_and_read_back(tracker, applications):
    with tracker.track(
        "all", data=applications, parameters={"model": {"C": 1.0}}, tags={"team": "risk"}, seed=7, description="why"
    ) as run:
        first = np.random.rand()
        run.log_metrics({"auc": 0.81, "nan": math.nan, "inf": math.inf})
        mlflow.log_param("plain", 1)
        for step in range(3):
            run.log_metrics(loss=1 / (step + 1), step=step)
    np.random.seed(7)
    assert np.random.rand() == first
    found = tracker.get(run)
    assert (found.status, found.data, found.name, found.tags["team"]) == (
        "finished",
        ("dataset:loans@3",),
        "all",
        "risk",
    )
    assert (
        found.parameters == {"model.C": "1.0", "plain": "1", "seed": "7"}
        and math.isnan(found.metrics["nan"])
        and found.metrics["loss"] == pytest.approx(1 / 3)
    )
    assert [m.value for m in mlflow.MlflowClient().get_metric_history(run.run_id, "loss")] == [1, 1 / 2, 1 / 3]
    assert found.environment["seeds"]["given"] == 7 and found.environment["packages"]["numpy"] == np.__version__
    assert found.metrics["usage/seconds"] == pytest.approx(run.usage.duration) and mlflow.active_run() is None
    started, finished = tracker.workspace.events.read(subject=run.reference, kind="run.*")
    assert started.body["data"] == ["dataset:loans@3"] and started.body["environment"] == found.environment["digest"]
    assert finished.body["status"] == "finished" and finished.body["metrics_digest"] == metrics_digest(found.metrics)
    assert str(tracker.workspace.actor) == finished.actor
    assert found.to_frame().loc[run.reference, "parameter.model.C"] == "1.0" and "<" in found._repr_html_()


def test_a_changed_metric_no_longer_fits_the_trail(tracker):
    with tracker.track("honest") as run:
        run.log_metrics(auc=0.71)
    event = next(iter(tracker.workspace.events.read(subject=run.reference, kind="run.finished")))
    mlflow.MlflowClient().log_metric(run.run_id, "auc", 0.91)
    assert metrics_digest(tracker.get(run).metrics) != event.body["metrics_digest"]


def test_lineage_runs_from_data_to_run_to_every_model(tracker, applications):
    model = LogisticRegression().fit(applications[["income"]], applications.approve)
    with tracker.track("two models", data=[applications, "dataset:rates@2"]) as run:
        kept = run.log_model(model, example=applications[["income"]])
        plain = mlflow.sklearn.log_model(
            model, name="plain", pip_requirements=["scikit-learn"], serialization_format="cloudpickle"
        )
    edges = {(e.input, e.output) for e in tracker.workspace.lineage.edges()}
    assert {
        ("dataset:loans@3", run.reference),
        ("dataset:rates@2", run.reference),
        (run.reference, kept.reference),
        (run.reference, f"model:{plain.model_id}@1"),
    } <= edges


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "failed"),
        (SystemExit(0), "finished"),
    ],
)
def test_exceptions_go_on_and_leave_their_mark(tracker, error, status):
    with pytest.raises(type(error)) as caught, tracker.track("fails") as run:
        raise error
    assert caught.value is error and tracker.get(run).status == status and mlflow.active_run() is None
    events = list(tracker.workspace.events.read(subject=run.reference, kind="run.finished"))
    assert [e.body["status"] for e in events] == [status]


def test_runs_nest_and_forgotten_plain_runs_are_ended(tracker):
    with tracker.track("outer") as outer, tracker.track("inner") as inner:
        forgotten = mlflow.start_run(nested=True)
    assert tracker.get(inner).parent == outer.reference and tracker.get(forgotten.info.run_id).status == "finished"
    assert tracker.get(forgotten.info.run_id).parent == inner.reference and mlflow.active_run() is None


def test_a_body_that_ends_the_run_itself(tracker):
    with tracker.track("ended") as run:
        mlflow.end_run()
        run.log_metrics(late=1)
    found = tracker.get(run)
    assert found.status == "finished" and found.metrics["late"] == 1 and found.metrics["usage/seconds"] > 0


def test_in_a_pipeline_step_the_run_nests_under_the_pipelines_run(tracker, monkeypatch):
    with tracker.track("pipeline") as parent:
        pass
    monkeypatch.setenv("MLWB_RUN", parent.reference)
    monkeypatch.setenv("MLWB_STEP", "train")
    with tracker.track("step") as run, tracker.track("deeper") as deeper:
        pass
    assert (tracker.get(run).parent, tracker.get(run).step, tracker.get(deeper).parent) == (
        parent.reference,
        "train",
        run.reference,
    )


def test_many_and_long_parameters(tracker):
    with tracker.track("long", parameters={f"p{i}": i for i in range(250)}) as run:
        run.log_parameters(columns="c" * 20_000, other=1)
        run.log_parameters(later="x")
        run.log_metrics({f"m{i}": i for i in range(1500)})
    found = tracker.get(run)
    assert len(found.parameters) == 253 and len(found.metrics) == 1503 and len(found.parameters["columns"]) <= 6000
    whole = json.loads(found.read("parameters.json"))
    assert whole["columns"] == "c" * 20_000 and whole["later"] == "x" and whole["p7"] == 7


def test_a_parameter_cannot_change(tracker):
    with tracker.track("twice", parameters={"C": 1}) as run:
        run.log_parameters(C=1)
        with pytest.raises(TrackingError, match="another value"):
            run.log_parameters(C=2)
    assert tracker.get(run).parameters["C"] == "1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": "dataset:loans"},
        {"data": "loans@champion"},
        {"data": 3},
        {"parameters": {"": 1}},
        {"parameters": {"x" * 300: 1}},
    ],
)
def test_wrong_calls_are_refused_before_a_run_exists(tracker, wrong):
    before = len(tracker.runs(limit=1000))
    with pytest.raises((TrackingError, ReferenceFormatError)), tracker.track("never", **wrong):
        raise AssertionError("the body ran")
    assert len(tracker.runs(limit=1000)) == before and mlflow.active_run() is None


def test_who_may_not_track_starts_nothing():
    workspace = Workspace.temporary("closed")
    settings_file = workspace.root / "settings.ini"
    settings_file.write_text(settings_file.read_text().replace("default_role = contributor", "default_role = reader"))
    stranger = Workspace(workspace.root, home=workspace.root.parent / "stranger")
    with pytest.raises(NotAuthorisedError), Tracker(stranger).track("no"):
        raise AssertionError("the body ran")
    assert not workspace.path("mlflow.db").exists()


def test_trouble_with_the_record_never_hides_the_users_error(tracker, monkeypatch):
    def full(*args, **kwargs):
        raise StorageError("the disk is full")

    with pytest.raises(ZeroDivisionError), tracker.track("both"):
        monkeypatch.setattr(tracker.workspace.events, "append", full)
        raise ZeroDivisionError
    assert mlflow.active_run() is None
    monkeypatch.undo()
    with pytest.raises(StorageError), tracker.track("only the record"):
        monkeypatch.setattr(tracker.workspace.events, "append", full)
    assert mlflow.active_run() is None


class Snapshot:
    def __init__(self, frame, reference="dataset:loans@3"):
        self.frame, self.reference = frame, reference


def test_data_is_named_by_its_reference_wherever_it_is(applications):
    plain = applications.copy()
    plain.attrs.clear()
    assert data_references([Snapshot(plain), applications, "loans@3", "table:t@1"]) == ["dataset:loans@3"] * 3 + [
        "table:t@1"
    ]
    assert data_references(plain) == data_references(plain.copy()) != data_references(plain.assign(income=0))
    assert data_references(pd.DataFrame({"a": [[1], {"b": 2}]}))[0].startswith("frame:2x1:")
    assert data_references(None) == data_references([]) == []


@pytest.mark.parametrize("how", ["name in data", "name in X", "series", "whole series", "array", "frame", "list"])
def test_sensitive_columns_are_found_and_never_reach_the_model(tracker, applications, how):
    train, test = applications.iloc[:900], applications.iloc[900:].sample(frac=1, random_state=1)
    features = ["income", "debt"]
    model = LogisticRegression().fit(train[features], train.approve)
    X = test if how == "name in X" else test[features]
    given = {
        "name in data": "race",
        "name in X": "race",
        "series": test.race.sample(frac=1, random_state=2),
        "whole series": applications.race,
        "array": test.race.to_numpy(),
        "frame": test[["race"]],
        "list": ["race"],
    }[how]
    with tracker.track(how, data=Snapshot(applications)) as run:
        evaluation = run.evaluate(model, X, test.approve, sensitive=given, resamples=200, seed=3)
    direct = check_fairness(
        test.approve,
        model.predict(test[features]),
        {"race" if how != "array" else "sensitive": test.race.to_numpy()},
        seed=3,
        resamples=200,
    )
    assert evaluation.fairness.to_dict() == direct.to_dict()
    found = tracker.get(run)
    assert found.tags["fairness"] == direct.verdict and {"roc_auc", "roc_auc_low", "roc_auc_high"} <= set(found.metrics)
    tracked = run.models[0]
    assert list(tracked.inputs) == features
    files = Path(mlflow.artifacts.download_artifacts(artifact_uri=tracked.uri))
    assert folder_digest(files) == tracked.digest and not any(
        b"race" in p.read_bytes() for p in files.rglob("*") if p.is_file()
    )
    papers = reference_profile(tracked)
    assert papers.rows == 900 and list(papers.columns) == features
    loaded = tracker.load_model(run)
    assert (loaded.predict(test[features]) == model.predict(test[features])).all()
    assert {"evaluation/evaluation.json", "evaluation/fairness.html"} <= set(found.artifacts)
    stored = json.loads(found.read("evaluation/evaluation.json"))
    assert (
        stored["fairness"]["verdict"] == direct.verdict
        and stored["metrics"]["roc_auc"]["value"] == found.metrics["roc_auc"]
    )


def test_a_snapshot_of_the_data_floor_is_recognised_and_its_columns_are_found(tracker, applications):
    from mlops_workbench.data.datasets import Datasets

    frame = applications.reset_index(drop=True)
    frame.attrs.clear()
    datasets = Datasets(tracker.workspace)
    snapshot = datasets.save("applications", frame, target="approve")
    loaded = datasets.load(snapshot.reference)
    X = loaded[["income"]]
    model = LogisticRegression().fit(X[:900], loaded.approve[:900])
    for data in (snapshot, loaded):
        with tracker.track("from a snapshot", data=data) as run:
            evaluation = run.evaluate(model, X[900:], loaded.approve[900:], sensitive="race", resamples=100)
        assert tracker.get(run).data == (str(snapshot.reference),) and {s.group for s in evaluation.segments} == {
            "black",
            "white",
        }
        assert run.models[0].profiled
        assert (str(snapshot.reference), run.reference) in {
            (e.input, e.output) for e in tracker.workspace.lineage.edges()
        }


def test_a_reset_index_is_refused_rather_than_silently_wrong(applications):
    X = applications[["income"]].iloc[:20].reset_index(drop=True)
    with pytest.raises(TrackingError, match="index"):
        groups_for("race", X, applications, "sensitive")
    partly = X.set_axis([*applications.index[:10], *range(10)])
    with pytest.raises(TrackingError, match="index"):
        groups_for("race", partly, applications, "sensitive")
    assert training_frame(applications, partly) is None


def test_a_number_is_evaluated_too_and_two_models_keep_apart(tracker, applications):
    X, y = applications[["income"]], applications.debt
    with tracker.track("numbers") as run:
        for name in ("model", "second"):
            run.evaluate(LinearRegression().fit(X, y), X, y, name=name, resamples=50)
        found_before = len(run.models)
        run.evaluate(run._stored and next(iter(run._stored.values()))[0], X, y, name="again", resamples=50)
    found = tracker.get(run)
    assert found_before == 2 == len(found.models) and {"mae", "second/mae", "again/mae"} <= set(found.metrics)
    assert "evaluation/second/evaluation.json" in found.artifacts
    assert tracker.load_model(run, "second").predict(X).shape == (1500,)
    with pytest.raises(UnknownReferenceError):
        tracker.load_model(run, "third")


def test_a_notebooks_own_class_and_a_stored_function(tracker, applications):
    class Threshold:
        def __init__(self, at):
            self.at = at

        def predict(self, X):
            return (X["income"] > self.at).astype(int).to_numpy()

    with tracker.track("own") as run:
        run.log_model(Threshold(4.0), example=applications[["income"]])
        with pytest.raises(TrackingError, match="cannot be stored"):
            broken = Threshold(4.0)
            broken.lock = threading.Lock()
            run.log_model(broken, name="broken", example=applications[["income"]])
    assert tracker.get(run).models == (run.models[0].uri,)
    assert set(tracker.load_model(run.models[0]).predict(applications)) == {0, 1}


def test_cost_is_logged_where_the_settings_name_a_price(monkeypatch):
    monkeypatch.setenv("MLWB__COST__CPU_HOUR", "36")
    tracker = Tracker(Workspace.temporary("price"))
    with tracker.track("dear") as run:
        sum(range(3_000_000))
    metrics = tracker.get(run).metrics
    assert (
        metrics["usage/cost"] == pytest.approx(metrics["usage/cpu_seconds"] * 36 / 3600) and metrics["usage/cost"] > 0
    )


SECRETS = {
    "known": "correct-horse/battery",
    "url": "sw0rdfish99",
    "param": "hunter2hunter2",
    "message": "tr0ub4dor&3",
    "env": "blue-elephant-77",
    "token": "ghp_" + "q7W2e9" * 6,
}


def test_secrets_planted_everywhere_are_nowhere_in_the_store(monkeypatch, tmp_path):
    import subprocess

    monkeypatch.setenv("MLWB_SECRET_WAREHOUSE", SECRETS["known"])
    monkeypatch.setenv("SERVICE_PASSWORD", SECRETS["env"])
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "load.py").write_text("a = 1\n")
    subprocess.run(["git", "add", "load.py"], cwd=tmp_path, check=True)
    (tmp_path / "load.py").write_text(f"engine = 'mysql://ana:{SECRETS['url']}@h/d'\nx = '{SECRETS['env']}'\n")
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.temporary("vault")
    tracker = Tracker(workspace)
    with (
        pytest.raises(ConnectionError),
        tracker.track(
            f"load {SECRETS['token']}",
            parameters={"db": {"password": SECRETS["param"], "note": SECRETS["known"]}},
            tags={"auth_token": SECRETS["token"]},
            description=f"with {SECRETS['env']}",
        ) as run,
    ):
        run.log_text(f"password = '{SECRETS['message']}'", "notes.txt")
        run.log_tags(where=f"mysql://ana:{SECRETS['url']}@h/d")
        mlflow.log_params({"api_key": SECRETS["param"], "long": "x" * 7000 + SECRETS["known"]})
        mlflow.set_tag("mlflow.note.content", SECRETS["known"])
        mlflow.set_experiment_tag("owner", SECRETS["known"])
        mlflow.log_input(mlflow.data.from_numpy(np.ones(3), source=f"https://ana:{SECRETS['url']}@h/x.npy"))
        with mlflow.start_run(nested=True, run_name=SECRETS["env"], tags={"k": SECRETS["token"]}):
            mlflow.log_param("secret", SECRETS["param"])
        raise ConnectionError(
            f"cannot reach mysql://ana:{SECRETS['url']}@h/d, password={SECRETS['message']}, {SECRETS['env']}"
        )
    workspace.close()
    files = [p for p in workspace.path().rglob("*") if p.is_file()]
    assert len(files) > 5 and any(b"redacted" in p.read_bytes() for p in files)
    for kind, value in SECRETS.items():
        leaks = [str(p.relative_to(workspace.root)) for p in files if value.encode() in p.read_bytes()]
        assert leaks == [], (kind, leaks)
    assert "+engine = 'mysql://ana:«redacted:url-password»@h/d'" in tracker.get(run).read("changes.diff")


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
            lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
        ),
        max_size=5,
    )
)
@settings(max_examples=150)
def test_any_parameters_are_logged_or_refused_with_a_reason(parameters):
    from mlops_workbench.tracking.entries import flat_parameters, json_text, parameter_text

    try:
        flat = flat_parameters(parameters)
    except TrackingError as e:
        assert e.fix
        return
    for name, value in flat.items():
        assert 0 < len(name) <= 250 and len(parameter_text(value)[0]) <= 6000
    json.loads(json_text(parameters))
