"""Pipelines at work: kernels that hang, die or are killed, signals, full disks, and what is on record afterwards."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from mlops_workbench.errors import ParameterError, StepError, UnknownReferenceError
from mlops_workbench.pipelines.definition import Step
from mlops_workbench.pipelines.engine import cell_states
from mlops_workbench.pipelines.executors import SequentialExecutor
from mlops_workbench.pipelines.kernels import ColdKernels, KernelSpec
from mlops_workbench.pipelines.outcomes import CellFinished, CellStarted, StepFinished, StepOutcome, StepStarted
from mlops_workbench.pipelines.runs import Pipelines
from mlops_workbench.tracking.records import mlflow_id
from mlops_workbench.workspace.folders import Workspace
from tests.pipelines_support import gone, graph_of, wait_for, write_notebook

pytestmark = pytest.mark.process

SAY_PID = "import os\nopen({path!r}, 'w').write(str(os.getpid()))"
ENDLESS = "import time\nwhile True: time.sleep(0.01)"
DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True:\n    try: time.sleep(1)\n    except BaseException: pass"


def run_all(graph: Any, **kwargs: Any) -> dict[str, StepOutcome]:
    return {o.step: o for o in SequentialExecutor().run(graph, **kwargs)}


def pid_in(path: Path) -> int:
    """The process id that a cell wrote, once it has."""
    return int(wait_for(lambda: path.exists() and path.read_text()))


def own_kernels() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "ipykernel_launcher" in " ".join(p.cmdline())]


@pytest.fixture(autouse=True)
def no_kernel_is_left() -> Iterator[None]:
    yield
    left = [p.pid for p in own_kernels() if not gone(p.pid)]
    assert left == [], "a test left kernels behind"


# ---------------------------------------------------------------- one step, all its endings


def test_a_cell_fails_in_the_middle(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "a.ipynb", "print('before')", "{}['missing']", "print('after')")
    before = source.read_bytes()
    outcome = run_all(graph_of(tmp_path, Step("a", "a.ipynb")))["a"]
    assert outcome.status == "failed" and outcome.failure is not None and outcome.notebook is not None
    assert (outcome.failure.name, outcome.failure.place) == (
        "KeyError",
        "cell In [3]",
    ) and "{}['missing']" in outcome.failure.traceback
    assert "\x1b" not in outcome.failure.traceback
    executed = nbformat.read(outcome.notebook, 4)
    nbformat.validate(executed)
    assert cell_states(executed) == ["completed", "completed", "failed", "pending"]
    assert executed.cells[outcome.failure.cell or 0].source == "{}['missing']"
    assert any(o.get("text") == "before\n" for c in executed.cells for o in c.get("outputs", []))
    assert source.read_bytes() == before and outcome.outputs == {} and outcome.record is not None
    assert json.loads((outcome.notebook.parent / "outputs.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("limit", ["cell_timeout", "timeout"])
def test_limits_end_even_a_deaf_cell(tmp_path: Path, limit: str) -> None:
    pid = tmp_path / "pid"
    write_notebook(tmp_path / "a.ipynb", SAY_PID.format(path=str(pid)), DEAF, "print('after')")
    write_notebook(tmp_path / "b.ipynb", "print('fine')")
    seconds = 12 if limit == "timeout" else 3
    graph = graph_of(tmp_path, Step("a", "a.ipynb", **{limit: seconds}), Step("b", "b.ipynb"))
    start = time.monotonic()
    outcomes = run_all(graph)
    failure = outcomes["a"].failure
    assert (
        outcomes["a"].status == "timed_out"
        and failure is not None
        and failure.prompt == 3
        and f"{seconds} s" in failure.message
    )
    assert outcomes["b"].ok and time.monotonic() - start < 90 and gone(pid_in(pid))
    executed = nbformat.read(outcomes["a"].notebook, 4)
    assert cell_states(executed) == ["completed", "completed", "failed", "pending"], (
        "the notebook claims nothing that did not happen"
    )
    assert executed.metadata.papermill.exception is True and "did not finish" in executed.cells[0].source


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "memory"),
        ("import os; os._exit(3)", "status 3"),
        ("import os; os.abort()", "compiled code"),
    ],
)
def test_a_kernel_that_dies(tmp_path: Path, code: str, words: str) -> None:
    write_notebook(tmp_path / "a.ipynb", "print('before')", code, "print('after')")
    outcome = run_all(graph_of(tmp_path, Step("a", "a.ipynb")))["a"]
    assert outcome.status == "kernel_died" and outcome.failure is not None and words in outcome.failure.message
    executed = nbformat.read(outcome.notebook, 4)
    assert cell_states(executed) == ["completed", "completed", "failed", "pending"]
    assert any(o.get("text") == "before\n" for c in executed.cells for o in c.get("outputs", []))


def test_a_kernel_that_never_comes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    write_notebook(tmp_path / "a.ipynb", "print('x')")
    outcome = run_all(graph_of(tmp_path, Step("a", "a.ipynb"), env={"PYTHONPATH": str(tmp_path)}))["a"]
    assert outcome.status == "kernel_died" and outcome.failure is not None and "status 1" in outcome.failure.message
    assert "no kernel today" in (tmp_path / "run" / "steps" / "a" / "kernel.log").read_text()


def test_cancel_from_another_thread_within_a_second(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    write_notebook(tmp_path / "a.ipynb", SAY_PID.format(path=str(pid)), DEAF)
    cancel, at = threading.Event(), list[float]()

    def stop() -> None:
        pid_in(pid)
        time.sleep(0.3)
        at.append(time.monotonic())
        cancel.set()

    threading.Thread(target=stop).start()
    outcomes = run_all(graph_of(tmp_path, Step("a", "a.ipynb"), Step("b", "a.ipynb")), cancel=cancel)
    took = time.monotonic() - at[0]
    assert [o.status for o in outcomes.values()] == ["cancelled", "cancelled"] and gone(pid_in(pid))
    assert took < 1 + 2 * os.getloadavg()[0] / (os.cpu_count() or 1), f"{took:.2f} s"
    assert outcomes["a"].notebook is not None and outcomes["b"].notebook is None


def test_who_stops_listening_stops_the_step(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    write_notebook(tmp_path / "a.ipynb", "print(1)")
    write_notebook(tmp_path / "b.ipynb", SAY_PID.format(path=str(pid)), ENDLESS)
    graph = graph_of(tmp_path, Step("a", "a.ipynb"), Step("b", "b.ipynb"))

    class Enough(BaseException):
        pass

    def impatient(event: Any) -> None:
        if isinstance(event, CellStarted) and event.step == "b" and event.cell == 3:
            raise Enough

    with pytest.raises(Enough):
        run_all(graph, on_event=impatient)
    assert gone(pid_in(pid))


def test_a_broken_display_does_not_hurt(tmp_path: Path) -> None:
    write_notebook(tmp_path / "a.ipynb", "print(1)")
    with pytest.warns(UserWarning, match="progress display failed"):
        outcomes = run_all(graph_of(tmp_path, Step("a", "a.ipynb")), on_event=lambda e: 1 / 0)
    assert outcomes["a"].ok


def test_events_come_in_order_in_the_callers_thread(tmp_path: Path) -> None:
    write_notebook(tmp_path / "a.ipynb", "1", "", "2")
    said: list[Any] = []
    threads = set()
    run_all(
        graph_of(tmp_path, Step("a", "a.ipynb", {"seed": 3})),
        on_event=lambda e: (said.append(e), threads.add(threading.get_ident())),
    )
    assert threads == {threading.get_ident()}
    assert [type(e) for e in said] == [StepStarted, *[CellStarted, CellFinished] * 4, StepFinished]
    assert [e.cell for e in said if isinstance(e, CellStarted)] == [1, 2, 3, 4] and said[0].cells == 4


# ---------------------------------------------------------------- what a step sees


def test_a_step_works_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home {of} somebody"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("MLWB_PASSPHRASE_FILE", "/nowhere")
    monkeypatch.delenv("MLWB_REQUIRE_SERVICES", raising=False)  # continuous integration sets it
    write_notebook(
        home / "a {x}.ipynb",
        "import os, helper\nfrom pathlib import Path\nfrom mlops_workbench import output",
        "Path('scratch.txt').write_text('x')\nPath('sub').mkdir()\nPath('sub/report.html').write_text('<h1>')",
        "output('cwd', os.getcwd())\noutput('env', {k: v for k, v in os.environ.items() if k.startswith('MLWB')})\noutput('report', Path('sub/report.html'))\noutput('helped', helper.answer)",
    )
    (home / "helper.py").write_text("answer = 42")
    write_notebook(
        home / "b.ipynb",
        "from mlops_workbench import output\noutput('text', open(report).read())",
        parameters="report: str",
    )
    steps = [Step("a", "a {x}.ipynb", outputs={"report": "file"}), Step("b", "b.ipynb", {"report": "${a.report}"})]
    graph = graph_of(home, *steps, env={"MLWB_RUN": "run:x", "PYTHONPATH": str(home)}, workspace=tmp_path)
    outcomes = run_all(graph)
    assert all(o.ok for o in outcomes.values()), outcomes
    made = {n: o.value for n, o in outcomes["a"].outputs.items()}
    assert (
        made["env"] == {"MLWB_RUN": "run:x", "MLWB_STEP": "a", "MLWB_WORKSPACE": str(tmp_path)} and made["helped"] == 42
    )
    assert Path(made["cwd"]) == home / "run" / "work" / "a" and made["report"] == "steps/a/files/sub/report.html"
    assert outcomes["b"].outputs["text"].value == "<h1>"
    assert sorted(p.name for p in home.iterdir() if not p.name.startswith("__")) == [
        "a {x}.ipynb",
        "b.ipynb",
        "helper.py",
        "run",
    ]
    assert outcomes["b"].record is not None and str(home) not in json.dumps(outcomes["b"].record.to_dict()), (
        "a file counts by its content"
    )


def test_what_was_checked_is_what_runs(tmp_path: Path) -> None:
    target = write_notebook(tmp_path / "b.ipynb", "from mlops_workbench import output\noutput('who', 'checked')")
    write_notebook(
        tmp_path / "a.ipynb",
        f"from pathlib import Path\np = Path({str(target)!r})\np.write_text(p.read_text().replace('checked', 'slipped in'))",
    )
    outcomes = run_all(
        graph_of(tmp_path, Step("a", "a.ipynb"), Step("b", "b.ipynb", after=["a"], outputs={"who": "value"}))
    )
    assert "slipped in" in target.read_text() and outcomes["b"].outputs["who"].value == "checked"


@pytest.mark.parametrize(
    ("code", "declared", "words"),
    [
        ("pass", {"x": "value"}, "declares the output 'x', but did not make it"),
        ("output('x', 'text')", {"x": "metric"}, "but made a value"),
        ("output('x', 1)\noutput('x', 2)", {}, "emitted twice"),
        ("output('x', Path('f'))\nimport os; os.remove('f')", {"x": "file"}, "is gone"),
    ],
)
def test_outputs_are_held_against_the_definition(
    tmp_path: Path, code: str, declared: dict[str, str], words: str
) -> None:
    write_notebook(
        tmp_path / "a.ipynb",
        f"from pathlib import Path\nfrom mlops_workbench import output\nPath('f').write_text('x')\n{code}",
    )
    outcome = run_all(graph_of(tmp_path, Step("a", "a.ipynb", outputs=declared)))["a"]
    assert outcome.status == "failed" and outcome.failure is not None and words in outcome.failure.message
    assert outcome.failure.reason == "output" and outcome.notebook is not None


def test_a_value_that_does_not_fit_stops_the_next_step_before_its_kernel(tmp_path: Path) -> None:
    write_notebook(tmp_path / "a.ipynb", "from mlops_workbench import output\noutput('n', 'seven')")
    write_notebook(tmp_path / "b.ipynb", "1", parameters="n: int")
    outcomes = run_all(
        graph_of(tmp_path, Step("a", "a.ipynb", outputs={"n": "value"}), Step("b", "b.ipynb", {"n": "${a.n}"}))
    )
    failure = outcomes["b"].failure
    assert (
        outcomes["b"].status == "failed"
        and failure is not None
        and failure.reason == "parameters"
        and "takes int, not 'seven'" in failure.message
    )


def test_rich_outputs_and_unicode_survive(tmp_path: Path) -> None:
    write_notebook(
        tmp_path / "a.ipynb",
        "from IPython.display import HTML, display\ndisplay(HTML('<b>größer</b>'))\nprint(name)",
        parameters="name: str = ''",
    )
    graph = graph_of(tmp_path, Step("a", "a.ipynb", {"name": "\"quoted\" 'ß' \\n {x} $HOME"}))
    outcome = run_all(graph)["a"]
    cells = nbformat.read(outcome.notebook, 4).cells
    assert (
        cells[2].outputs[0].data["text/html"] == "<b>größer</b>"
        and cells[2].outputs[1].text == "\"quoted\" 'ß' \\n {x} $HOME\n"
    )


# ---------------------------------------------------------------- kernels


def test_many_kernels_at_once(tmp_path: Path) -> None:
    kernels = [ColdKernels().start(KernelSpec(cwd=tmp_path)) for _ in range(3)]
    assert len({k.pid for k in kernels}) == 3 and all(k.alive() for k in kernels)
    sockets = [Path(k.manager.connection_file).parent for k in kernels]
    assert all(oct(s.stat().st_mode & 0o777) == "0o700" for s in sockets), "nobody else can reach a kernel"
    for kernel in kernels:
        kernel.stop()
    assert all(gone(k.pid) for k in kernels) and not any(s.exists() for s in sockets)


@pytest.mark.parametrize("leaves", ["pass", "import os; os._exit(0)"])
def test_children_of_a_cell_end_with_it(tmp_path: Path, leaves: str) -> None:
    pid = tmp_path / "pid"
    start = f"import subprocess\np = subprocess.Popen(['sleep', '600'])\nopen({str(pid)!r}, 'w').write(str(p.pid))"
    write_notebook(tmp_path / "a.ipynb", start, leaves)
    outcome = run_all(graph_of(tmp_path, Step("a", "a.ipynb")))["a"]
    assert outcome.status == ("succeeded" if leaves == "pass" else "kernel_died")
    assert wait_for(lambda: gone(pid_in(pid)), 10)


# ---------------------------------------------------------------- a full disk


def test_full_disk_when_the_notebook_is_written(tmp_path: Path) -> None:
    write_notebook(tmp_path / "a.ipynb", "print('x' * 3_000_000)")
    write_notebook(tmp_path / "b.ipynb", "print('fine')")
    script = """
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from mlops_workbench.pipelines.definition import Step
from mlops_workbench.pipelines.executors import SequentialExecutor
from tests.pipelines_support import graph_of
folder = Path(sys.argv[1])
for o in SequentialExecutor().run(graph_of(folder, Step("a", "a.ipynb"), Step("b", "b.ipynb"))):
    print(o.step, o.status, o.failure.reason if o.failure else "", o.failure.message if o.failure else "", o.notebook)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # noqa: E731
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), root],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=300,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("a failed storage notebook.ipynb cannot be written") and first.endswith("None")
    assert second.startswith("b succeeded")
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "run/steps/a/notebook.ipynb").exists(), (
        "nothing half-written"
    )


# ---------------------------------------------------------------- runs in a workspace

PIPELINE = """
name: {name}
parameters:
  loans: {{type: dataset, default: dataset:loans}}
  seed: {{type: int, default: 7}}
steps:
  first:
    notebook: first.ipynb
    parameters: {{loans: "${{loans}}", seed: "${{seed}}"}}
    outputs: {{train: dataset, n: metric}}
  second:
    notebook: second.ipynb
    parameters: {{train: "${{first.train}}"}}
    outputs: {{text: value}}
"""


def make_pipeline(workspace: Workspace, name: str, first: str = "pass", second: str = "pass") -> Path:
    folder = workspace.root / "pipelines" / name
    use = "from mlops_workbench import output"
    write_notebook(
        folder / "first.ipynb",
        use,
        first,
        "output('train', 'dataset:train@1')\noutput('n', seed, type='metric')",
        parameters="loans: 'dataset'\nseed: int = 1",
    )
    write_notebook(folder / "second.ipynb", use, second, "output('text', train)", parameters="train: 'dataset'")
    (folder / "pipeline.yml").write_text(PIPELINE.format(name=name))
    return folder


def resolver(reference: str) -> str:
    if reference == "dataset:loans":
        return "dataset:loans@3"
    raise UnknownReferenceError(f"there is no {reference}", reference=reference)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace.temporary("bank") as made:
        yield made


def door(workspace: Workspace) -> Pipelines:
    return Pipelines(workspace, resolve=resolver, digest_of=lambda r: "9f86d081" if r == "dataset:loans@3" else None)


def test_a_run_is_on_record(workspace: Workspace) -> None:
    make_pipeline(workspace, "credit")
    run = door(workspace).run("credit", seed="8").raise_for_failure()
    assert run.outputs == {"first": {"train": "dataset:train@1", "n": 8}, "second": {"text": "dataset:train@1"}}
    assert run.parameters == {"loans": "dataset:loans@3", "seed": 8}, "latest is resolved once, and recorded"
    record = run["first"].record
    assert record is not None and record.inputs == {"dataset:loans@3": "9f86d081"} and len(record.code) == 3
    events = list(workspace.events.read(correlation_id=run.reference))
    assert [e.kind for e in events] == [
        "pipeline.started",
        "step.started",
        "step.finished",
        "lineage.recorded",
        "step.started",
        "step.finished",
        "pipeline.finished",
    ]
    assert {e.subject for e in events if e.kind != "lineage.recorded"} == {run.reference}
    assert (events[2].body or {})["key"] == record.key
    assert workspace.lineage.graph("dataset:train@1", "up").nodes == ("dataset:loans@3", "dataset:train@1")
    assert door(workspace).get(run.reference).steps == run.steps
    import mlflow

    stored = mlflow.MlflowClient().get_run(mlflow_id(run.reference))
    assert (
        stored.info.status == "FINISHED"
        and stored.data.metrics == {"first.n": 8.0}
        and stored.data.params["seed"] == "8"
    )
    kept = sorted(a.path for a in mlflow.MlflowClient().list_artifacts(stored.info.run_id, "steps/first"))
    assert kept == ["steps/first/notebook.ipynb", "steps/first/outputs.json"]
    assert not list(workspace.path("runs").glob("*")), "what is an artifact does not lie around twice"
    assert not list((workspace.root / "pipelines" / "credit").glob("*.csv"))


def test_nothing_starts_while_something_is_wrong(workspace: Workspace) -> None:
    folder = make_pipeline(workspace, "credit")
    with pytest.raises(ParameterError):
        door(workspace).run("credit", sed=1)
    with pytest.raises(UnknownReferenceError):
        door(workspace).run("credit", loans="dataset:lones")
    (folder / "second.ipynb").write_text("{}")
    with pytest.raises(Exception, match=r"second\.ipynb"):
        door(workspace).run("credit")
    assert not list(workspace.events.read(kind="pipeline.*")) and not workspace.path("runs").exists()


def test_a_failure_and_the_rerun(workspace: Workspace) -> None:
    folder = make_pipeline(workspace, "credit", second="raise ValueError('no luck: ' + train)")
    failed = door(workspace).run("credit")
    assert failed.status == "failed" and failed["first"].ok
    with pytest.raises(StepError) as caught:
        failed.raise_for_failure()
    error = caught.value
    assert (error.step, error.prompt, error.reason) == (
        "second",
        4,
        "exception",
    ) and "no luck: dataset:train@1" in error.what
    assert Path(error.notebook).is_file() and "second" in error.what and "In [4]" in error.what
    assert "no luck" not in json.dumps([e.body for e in workspace.events.read(correlation_id=failed.reference)]), (
        "messages may hold data"
    )
    write_notebook(
        folder / "second.ipynb",
        "from mlops_workbench import output\noutput('text', 'better')",
        parameters="train: 'dataset'",
    )
    assert door(workspace).run("credit").ok
    assert list(door(workspace).runs()["status"]) == ["succeeded", "failed"]


def test_no_secret_is_kept(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed, shown, in a traceback, in what is handed on, in the kernel's log, in a source: no byte of it stays."""
    value = "quite-Harmless_looking7"
    monkeypatch.setenv("MLWB_SECRET_DB", value)
    read = "import os, sys\nopened = os.environ['MLWB_SECRET_DB']\n"
    leaks = "print(opened)\nprint(opened, file=sys.stderr)\n{'dsn': opened}\n"
    log = "os.write(sys.__stderr__.fileno(), (opened + os.linesep).encode())\nos.system('echo $MLWB_SECRET_DB')\n"
    written = f"# try {value}\noutput('opened', {{'with': opened}})\nopened"
    make_pipeline(workspace, "credit", first=read + leaks + log + written)
    make_pipeline(workspace, "failing", second=read + "raise ValueError(f'cannot connect with {opened} today')")
    run, failed = door(workspace).run("credit"), door(workspace).run("failing")
    assert run.ok and run.outputs["first"]["opened"] == {"with": value}, "the next step gets what was handed on"
    assert failed["second"].failure is not None and value not in str(failed["second"].failure)
    with pytest.raises(StepError) as caught:
        failed.raise_for_failure()
    assert "cannot connect with «redacted:DB» today" in caught.value.what

    for outcome in (run["first"], failed["second"]):
        assert outcome.notebook is not None and "«redacted:DB»" in outcome.notebook.read_text("utf-8")
        nbformat.validate(nbformat.read(outcome.notebook, 4))
        assert "redacted:DB" in (outcome.notebook.parent / "outputs.json").read_text()
    files = [f for f in workspace.path().rglob("*") if f.is_file()]
    assert len([f for f in files if f.name == "notebook.ipynb"]) == 4
    assert [f for f in files if value.encode() in f.read_bytes()] == []


def test_a_tracked_run_inside_a_step_is_nested(workspace: Workspace) -> None:
    code = "from mlops_workbench.workspace.folders import Workspace\nfrom mlops_workbench.tracking.runs import Tracker\nwith Tracker(Workspace.open()).track('inner') as inner:\n    inner.log_metrics({'auc': 0.7})\nimport mlflow\nwith mlflow.start_run(run_name='plain'): mlflow.log_metric('plain', 1)"
    make_pipeline(workspace, "credit", first=code)
    run = door(workspace).run("credit").raise_for_failure()
    from mlops_workbench.tracking.runs import Tracker

    table = Tracker(workspace).runs()
    inner = table[table["name"] == "inner"].iloc[0]
    assert inner["parent"] == run.reference and inner["step"] == "first" and "plain" in set(table["name"])
    assert {e.actor for e in workspace.events.read()} == {workspace.actor}, "a step acts for whoever started it"


def test_two_runs_at_the_same_time(workspace: Workspace) -> None:
    make_pipeline(workspace, "credit")
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda s=s: results.append(door(workspace).run("credit", seed=s))) for s in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert sorted(r.outputs["first"]["n"] for r in results) == [1, 2] and len({r.reference for r in results}) == 2


RUNNER = """
import sys
from pathlib import Path
from mlops_workbench.workspace.folders import Workspace
from mlops_workbench.pipelines.runs import Pipelines
with Workspace(Path(sys.argv[1]), home=Path(sys.argv[2])) as workspace:
    run = Pipelines(workspace, resolve=lambda r: "dataset:loans@3").run("credit")
    print(run.status)
"""


def start_endless(workspace: Workspace, pid: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that runs a pipeline whose second step never ends, and the kernel of that step."""
    make_pipeline(workspace, "credit", second=SAY_PID.format(path=str(pid)) + "\n" + ENDLESS)
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(workspace.root), str(workspace.home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        return runner, pid_in(pid)
    except BaseException:
        runner.kill()
        raise AssertionError(runner.communicate()[1]) from None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signals_end_the_kernel_and_are_recorded(
    workspace: Workspace, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    runner, kernel = start_endless(workspace, tmp_path / "pid")
    runner.send_signal(number)
    runner.communicate(timeout=60)
    assert gone(kernel) and runner.returncode in (code, 130 if number == signal.SIGINT else code)
    found = door(workspace).runs()
    assert list(found["status"]) == ["cancelled"]
    run = door(workspace).get(found.index[0])
    assert (
        [s.status for s in run.steps] == ["succeeded", "cancelled"]
        and run["second"].notebook is not None
        and run["second"].notebook.is_file()
    )


def test_kill_nine_of_the_runner_and_the_rerun(workspace: Workspace, tmp_path: Path) -> None:
    runner, kernel = start_endless(workspace, tmp_path / "pid")
    reference = door(workspace).runs().index[0]
    assert (
        door(workspace).get(reference).status == "running"
        and door(workspace).get(reference)["second"].status == "running"
    )
    runner.kill()
    runner.communicate()
    assert wait_for(lambda: gone(kernel), 30), "the kernel leaves by itself"
    lost = door(workspace).get(reference)
    assert lost.status == "interrupted" and [s.status for s in lost.steps] == ["succeeded", "interrupted"]
    make_pipeline(workspace, "credit")
    assert door(workspace).run("credit").ok
    assert list(door(workspace).runs()["status"]) == ["succeeded", "interrupted"]
    ends = [e.body for e in workspace.events.read(kind="pipeline.finished", subject=reference)]
    assert len(ends) == 1 and (ends[0] or {})["status"] == "interrupted"
    import mlflow

    assert mlflow.MlflowClient().get_run(mlflow_id(reference)).info.status == "KILLED"


def test_the_store_fails_in_the_middle(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlops_workbench.errors import StorageError

    make_pipeline(workspace, "credit")
    plain = Workspace.emit

    def emit(self: Workspace, kind: str, *rest: Any, **more: Any) -> Any:
        if kind == "step.finished":
            raise StorageError("the disk is full", where="events", fix="free some space")
        return plain(self, kind, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "emit", emit)
        with pytest.raises(StorageError, match="disk is full"):
            door(workspace).run("credit")
    assert list(door(workspace).runs()["status"]) == ["failed"]
    assert door(workspace).run("credit").ok
