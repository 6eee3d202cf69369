"""MLflow's store as the workspace keeps it: many processes, killed processes, moved folders, forks, a real server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

from mlops_workbench.tracking.records import status_of
from mlops_workbench.tracking.runs import Tracker
from mlops_workbench.tracking.stores import connect, process_alive, process_identity, store_address
from mlops_workbench.workspace.audit import verify
from mlops_workbench.workspace.folders import Workspace, init

pytestmark = pytest.mark.process


def environment(root: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLWB_"))}
    return (
        kept
        | {
            "MLWB_WORKSPACE": str(root),
            "MLWB_CONFIG_HOME": str(root.parent / "config"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        | more
    )


def start(root: Path, program: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment(root, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root.parent,
    )


def finish(process: subprocess.Popen[str], seconds: float = 180) -> str:
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init(tmp_path / "first place", name="loans", home=tmp_path / "config").close()
    return tmp_path / "first place"


def opened(root: Path) -> Workspace:
    return Workspace(root, home=root.parent / "config")


TRACK = """
    from mlops_workbench.tracking.runs import Tracker
    from mlops_workbench.workspace.folders import Workspace
    tracker = Tracker(Workspace.open())
    for i in range(4):
        with tracker.track(f"run {i}", data="dataset:loans@1", parameters={"i": i}) as run:
            run.log_metrics({"auc": i / 10})
        print(run.reference)
"""


def test_processes_that_start_at_once_on_an_empty_workspace(root, tmp_path):
    workers = [start(root, TRACK, XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(3)]
    names = [line for worker in workers for line in finish(worker).split()]
    workspace = opened(root)
    table = Tracker(workspace).runs()
    assert len(set(names)) == 12 and set(names) == set(table.index) and set(table.status) == {"finished"}
    assert set(table.experiment) == {"loans"}
    kinds = [e.kind for e in workspace.events.read(kind="run.*")]
    assert sorted(kinds) == ["run.finished"] * 12 + ["run.started"] * 12 and verify(workspace.events).ok
    assert [p.name for p in (tmp_path / "cache" / "mlwb").iterdir()] == [
        next((tmp_path / "cache" / "mlwb").glob("mlflow-*.db")).name
    ]


def test_the_copied_schema_is_the_migrated_one(root, tmp_path):
    import mlops_workbench.tracking.stores as stores

    fresh, copied = tmp_path / "fresh.db", tmp_path / "copied.db"
    stores._migrate(fresh)
    stores._make_database(copied)

    def schema(file: Path) -> list[tuple[str, ...]]:
        with closing(sqlite3.connect(file)) as database:
            made = database.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
            # MLflow writes the constraints of a table in an order that differs from process to process
            return [
                (kind, name, str(sorted(re.split(r"[\s,()]+", sql or "")))) for kind, name, sql in made
            ] + database.execute("SELECT * FROM alembic_version").fetchall()

    assert schema(fresh) == schema(copied)


def test_a_cache_that_cannot_be_written_only_costs_time(root, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    finish(start(root, TRACK.replace("range(4)", "range(1)"), XDG_CACHE_HOME=str(tmp_path / "file")))
    assert len(Tracker(opened(root)).runs()) == 1


def test_a_killed_run_is_shown_as_interrupted_and_closed_by_the_next(root):
    process = start(root, """
        import time
        import mlflow
        from mlops_workbench.tracking.runs import Tracker
        from mlops_workbench.workspace.folders import Workspace
        tracker = Tracker(Workspace.open())
        with tracker.track("overnight", data="dataset:loans@1", parameters={"C": 1}) as run:
            run.log_metrics({"auc": 0.7})
            print(run.reference, flush=True)
            for i in range(100000):
                mlflow.log_metric("loss", 1 / (i + 1), step=i)
    """)  # fmt: skip
    reference = process.stdout.readline().strip()
    workspace = opened(root)
    tracker = Tracker(workspace)
    time.sleep(0.3)
    assert tracker.get(reference).status == "running" and tracker.recover() == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = tracker.get(reference)
    assert (
        found.status == "interrupted"
        and found.metrics["auc"] == 0.7
        and found.parameters == {"C": "1"}
        and found.metrics["loss"] < 1
    )
    assert list(tracker.runs(status="interrupted").index) == [reference] and tracker.runs(status="running").empty
    again = Tracker(workspace)
    with again.track("the next"):
        pass
    import mlflow

    assert (
        mlflow.MlflowClient().get_run(found.run_id).info.status == "KILLED"
        and again.get(reference).status == "interrupted"
    )
    ends = list(workspace.events.read(subject=reference, kind="run.finished"))
    assert [e.body["status"] for e in ends] == ["interrupted"] and verify(workspace.events).ok
    assert (
        again.recover() == [] and len(list(workspace.events.read(subject=reference))) == 2 + 1
    )  # started, lineage, finished


@pytest.mark.slow
def test_kill_at_random_moments_leaves_a_store_that_works(root):
    for after in (0.0, 0.03, 0.2, 0.45, 0.7):
        process = start(root, TRACK.replace("range(4)", "range(1000)"))
        process.stdout.readline() if after else time.sleep(1.5)  # once before the store exists or while it is made
        time.sleep(after)
        process.kill()
        process.wait()
    finish(start(root, TRACK.replace("range(4)", "range(1)")))
    workspace = opened(root)
    tracker = Tracker(workspace)
    tracker.recover()
    table = tracker.runs(limit=10_000)
    assert set(table.status) <= {"finished", "interrupted"} and verify(workspace.events).ok
    ended = [e.subject for e in workspace.events.read(kind="run.finished")]
    started = [e.subject for e in workspace.events.read(kind="run.started")]
    assert len(ended) == len(set(ended)) and set(started) <= set(ended)
    given = {e.output for e in workspace.lineage.edges() if e.input == "dataset:loans@1"}
    assert given == set(started)
    said = {e.subject: e.body["status"] for e in workspace.events.read(kind="run.finished")}
    assert said == {r: s for r, s in table.status.items() if r in said}
    with closing(sqlite3.connect(workspace.path("mlflow.db"))) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


MAKE = """
    import mlflow, numpy as np, pandas as pd
    from sklearn.linear_model import LogisticRegression
    from mlops_workbench.tracking.runs import Tracker
    from mlops_workbench.workspace.folders import Workspace
    tracker = Tracker(Workspace.open())
    X = pd.DataFrame({"a": np.arange(50.0)}); y = (X.a > 20).astype(int)
    model = LogisticRegression().fit(X, y)
    with tracker.track("tracked") as run:
        kept = run.log_model(model, example=X, reference_data=X)
        run.log_text("hello", "notes/a.txt")
    mlflow.set_experiment("own experiment")
    with mlflow.start_run() as plain:
        info = mlflow.sklearn.log_model(model, name="plain", pip_requirements=["scikit-learn"], serialization_format="cloudpickle", registered_model_name="credit")
        mlflow.log_text("hello", "notes/b.txt")
    print(run.reference, kept.uri, kept.digest, plain.info.run_id, info.model_uri)
"""

READ = """
    import os, sys, mlflow, numpy as np, pandas as pd
    from mlops_workbench.tracking.models import folder_digest, reference_profile
    from mlops_workbench.tracking.runs import Tracker
    from mlops_workbench.workspace.folders import Workspace
    tracker = Tracker(Workspace.open())
    run, kept, digest, plain, uri = os.environ["NAMES"].split()
    X = pd.DataFrame({"a": np.arange(50.0)})
    assert tracker.get(run).read("notes/a.txt") == "hello" and tracker.get(plain).read("notes/b.txt") == "hello"
    for name in (kept, uri, "models:/credit/1"):
        assert mlflow.sklearn.load_model(name).predict(X)[-1] == 1
        assert mlflow.pyfunc.load_model(name).predict(X)[-1] == 1
    assert folder_digest(mlflow.artifacts.download_artifacts(artifact_uri=kept)) == digest and reference_profile(kept).rows == 50
    mlflow.set_experiment("own experiment")
    with mlflow.start_run():
        mlflow.log_text("new", "new.txt")
    print(mlflow.get_artifact_uri())
"""


def test_a_moved_and_a_copied_workspace_find_their_artifacts(root, tmp_path):
    names = finish(start(root, MAKE)).splitlines()[-1]
    copy, moved = tmp_path / "cöpy & more", tmp_path / "moved"
    shutil.copytree(root, copy)
    shutil.move(root, moved)
    for place in (moved, copy):
        new = finish(start(place, READ, NAMES=names)).splitlines()[-1]
        assert "first" not in new and place.name.split()[-1] in new
        with closing(sqlite3.connect(place / ".workbench" / "mlflow.db")) as database:
            assert "first%20place" not in "\n".join(database.iterdump()), "an address of the old place is left"
    assert not (tmp_path / "first place").exists()


def test_plain_mlflow_imported_after_connecting_lands_in_the_workspace(root):
    output = finish(start(root, """
        import sys, os
        from mlops_workbench.tracking.stores import connect
        from mlops_workbench.workspace.folders import Workspace
        connect(Workspace.open())
        assert "mlflow" not in sys.modules
        import mlflow
        with mlflow.start_run(run_name="plain") as run:
            mlflow.log_params({"password": "hunter2"})
            mlflow.log_text("x", "a.txt")
        print(mlflow.get_artifact_uri() if False else run.info.artifact_uri)
        assert not os.path.exists("mlruns") and not os.path.exists("mlflow.db")
    """))  # fmt: skip
    assert "first%20place/.workbench/artifacts" in output
    found = Tracker(opened(root)).runs()
    assert list(found.name) == ["plain"] and list(found["parameter.password"]) == ["«redacted:password»"]


def test_a_process_started_from_here_without_our_package_finds_the_store(root):
    finish(start(root, """
        import os, subprocess, sys
        from mlops_workbench.tracking.runs import Tracker
        from mlops_workbench.workspace.folders import Workspace
        tracker = Tracker(Workspace.open())
        with tracker.track("parent"):
            pass
        child = "import mlflow, sys\\nwith mlflow.start_run(run_name='child'): mlflow.log_text('x', 'a.txt')\\nassert 'mlops_workbench' not in sys.modules"
        subprocess.run([sys.executable, "-c", child], check=True)
        assert sorted(tracker.runs().name) == ["child", "parent"] and set(tracker.runs().experiment) == {"loans"}
        assert not os.path.exists("mlruns")
    """))  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_and_their_parent_track_at_once(root):
    finish(start(root, """
        import os
        from mlops_workbench.tracking.runs import Tracker
        from mlops_workbench.workspace.folders import Workspace
        workspace = Workspace.open()
        tracker = Tracker(workspace)
        with tracker.track("before"):
            pass
        children = []
        for n in range(2):
            pid = os.fork()
            if pid == 0:
                from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
                inherited = sum(e.pool.checkedin() for e in SqlAlchemyStore._engine_map.values())
                for i in range(0 if inherited else 3):
                    with tracker.track(f"child {n} {i}") as run:
                        run.log_metrics(a=i)
                os._exit(0)
            children.append(pid)
        for i in range(3):
            with tracker.track(f"parent {i}"):
                pass
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
        assert len(tracker.runs()) == 10 and set(tracker.runs().status) == {"finished"}
    """))  # fmt: skip


def test_what_a_process_identity_says():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    import psutil

    name = f"{process_identity().rsplit('/', 2)[0]}/{child.pid}/{psutil.Process(child.pid).create_time():.2f}"
    assert process_alive(name) is True and process_alive(process_identity()) is True
    child.kill()
    time.sleep(0.1)
    assert process_alive(name) is False  # a zombie now: it has not been waited for
    child.wait()
    assert process_alive(name) is False and process_alive("another-host/1/1.00") is None
    recycled = f"{name.rsplit('/', 2)[0]}/{os.getpid()}/1.00"
    assert process_alive(recycled) is False


@pytest.mark.fast
def test_a_damaged_store_and_a_read_only_folder_say_what_to_do(root):
    from mlops_workbench.errors import StorageError, TrackingError

    workspace = opened(root)
    address = store_address(workspace)
    address.file.write_bytes(b"this is not a database, it only says so" * 100)
    connect(workspace)
    import mlflow

    with pytest.raises((TrackingError, StorageError)) as caught:
        mlflow.start_run()
    assert caught.value.fix and str(address.file) in caught.value.where
    while mlflow.active_run():
        mlflow.end_run()


@pytest.mark.service
def test_a_postgresql_store(root, postgres_url):
    finish(start(root, TRACK + """
    import mlflow
    with mlflow.start_run() as run:
        mlflow.log_param("password", "hunter2")
    assert mlflow.get_run(run.info.run_id).data.params == {"password": "«redacted:password»"}
    assert ".workbench/artifacts" in run.info.artifact_uri and len(tracker.runs()) == 5
    """, MLWB__STORAGE__TRACKING="secret:TRACKING", MLWB_SECRET_TRACKING=postgres_url))  # fmt: skip
    assert not (root / ".workbench" / "mlflow.db").exists()


def test_status_of_runs_that_were_never_marked():
    from types import SimpleNamespace as N

    assert status_of(N(info=N(status="RUNNING"), data=N(tags={}))) == "running"
    assert [status_of(N(info=N(status=s), data=N(tags={}))) for s in ("FINISHED", "FAILED", "KILLED")] == [
        "finished",
        "failed",
        "interrupted",
    ]
