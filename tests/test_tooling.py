"""The tools that hold this repository together must be able to say no."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from tests import __main__ as runner
from tests import notebooks, sync

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small_repo(tmp_path: Path) -> Path:
    """A repository of the same shape with one module, in sync."""
    for folder in ("nbs/api", sync.PACKAGE, "nbs/pipelines/case"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    home = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Home\n\n> One sentence.\n\nSee [errors](api/errors.ipynb).")]
    )
    module = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# errors\n\n> One sentence."),
            nbformat.v4.new_code_cell("#| default_exp errors"),
            nbformat.v4.new_code_cell(
                '#| export\ndef shout(text: str) -> str:\n    "Louder."\n    return text.upper()'
            ),
        ]
    )
    step = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("seed: int = 7", metadata={"tags": ["parameters"]})]
    )
    for path, notebook in (
        ("nbs/index.ipynb", home),
        ("nbs/api/errors.ipynb", module),
        ("nbs/pipelines/case/step.ipynb", step),
    ):
        (tmp_path / path).write_text(sync.cleaned(nbformat.writes(notebook)))
    (tmp_path / "README.md").write_text(sync.readme(tmp_path))
    (tmp_path / sync.PACKAGE / "py.typed").touch()
    for name, content in sync.fresh_package(tmp_path).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.process
def test_sync_sees_every_kind_of_drift(small_repo: Path) -> None:
    assert sync.check(small_repo) == []
    assert "(nbs/api/errors.ipynb)" in (small_repo / "README.md").read_text()

    module = small_repo / sync.PACKAGE / "errors.py"
    original = module.read_text()
    module.write_text(original.replace("upper", "lower"))
    assert [
        line for line in sync.check(small_repo) if "errors.py: not what its notebook exports" in line and "line" in line
    ]
    module.unlink()
    assert any("errors.py: missing" in line for line in sync.check(small_repo))
    module.write_text(original)

    orphan = small_repo / sync.PACKAGE / "orphan.py"
    orphan.write_text("x = 1\n")
    assert sync.check(small_repo) == [f"{sync.PACKAGE}/orphan.py: no notebook makes this file"]
    orphan.unlink()

    readme = small_repo / "README.md"
    readme.write_text(readme.read_text() + "by hand\n")
    assert any("README.md: not what" in line for line in sync.check(small_repo))
    readme.write_text(sync.readme(small_repo))

    step = small_repo / "nbs/pipelines/case/step.ipynb"
    notebook = json.loads(step.read_text())
    notebook["cells"][0]["execution_count"] = 3
    step.write_text(json.dumps(notebook, indent=1))
    assert any("step.ipynb: metadata is not clean" in line for line in sync.check(small_repo))


@pytest.mark.process
def test_nbdev_clean_keeps_the_parameters_tag(small_repo: Path) -> None:
    """Without `allowed_cell_metadata_keys` nbdev's own command deletes the tag, and papermill then injects in the wrong place."""
    step = small_repo / "nbs/pipelines/case/step.ipynb"
    notebook = json.loads(step.read_text())
    notebook["cells"][0]["metadata"]["collapsed"] = True
    step.write_text(json.dumps(notebook))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    command = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", command], cwd=small_repo, env=env, check=True)
    assert json.loads(step.read_text())["cells"][0]["metadata"] == {"tags": ["parameters"]}
    assert step.read_text() == sync.cleaned(step.read_text())

    settings = small_repo / "pyproject.toml"
    settings.write_text(settings.read_text().replace('allowed_cell_metadata_keys = ["tags"]', ""))
    subprocess.run([sys.executable, "-c", command], cwd=small_repo, env=env, check=True)
    assert json.loads(step.read_text())["cells"][0]["metadata"] == {}  # so the setting is what keeps it


@pytest.mark.process
def test_importing_the_package_is_cheap() -> None:
    """No heavy library, and every exported name still arrives."""
    code = "import sys, mlops_workbench as m; heavy = {'pandas', 'numpy', 'sklearn', 'mlflow', 'pyarrow', 'plotly', 'sqlalchemy', 'pydantic', 'typer'}; print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import mlops_workbench as m; print([n for n in m.__all__ if not callable(getattr(m, n))], m.__version__, set(m.__all__) <= set(dir(m)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 0.1.0 True"


@pytest.mark.fast
def test_a_notebook_run_is_compared_with_what_is_stored() -> None:
    """Times, ids and paths may differ; a number or a missing plot may not."""
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x")])

    def with_outputs(*outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
        copy = nbformat.from_dict(json.loads(json.dumps(page)))
        copy.cells[0].outputs = list(outputs)
        return copy

    def text(value: str) -> nbformat.NotebookNode:
        return nbformat.v4.new_output("stream", name="stdout", text=value)

    def same(a: str, b: str) -> bool:
        return not notebooks.differences(with_outputs(text(a)), with_outputs(text(b)))

    assert same(
        "run 01JGT9Z5T0ZZZZZZZZZZZZZZZZ took 3.1 s in /tmp/a/b", "run 01JGT9Z5T0AAAAAAAAAAAAAAAA took 2.9 s in /tmp/c/d"
    )
    assert same("auc 0.812345", "auc 0.812346") and not same("auc 0.81", "auc 0.83")
    assert not same("3 failures", "4 failures")
    html = nbformat.v4.new_output("display_data", {"text/html": "<b>x</b>", "text/plain": "x"})
    assert notebooks.differences(with_outputs(html), with_outputs())


@pytest.mark.process
def test_a_failing_notebook_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    path = tmp_path / "page.ipynb"
    nbformat.write(page, path)
    outcome = notebooks.run([path], jobs=1)
    assert (outcome.passed, outcome.failed) == ([], [path])


@pytest.mark.fast
def test_skips_count_as_failures_only_where_services_are_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="t" name="good"/>'
        '<testcase classname="t" name="bad"><failure message="no"/></testcase>'
        '<testcase classname="t" name="away"><skipped type="pytest.skip" message="no PostgreSQL"/></testcase>'
        '<testcase classname="t" name="known"><skipped type="pytest.xfail" message="later"/></testcase></testsuite></testsuites>'
    )
    part = runner.Part("tests")
    runner.read_report(report, part)
    assert (part.passed, part.failed, part.skipped) == (2, ["t::bad"], ["t::away: no PostgreSQL"])
    assert runner.summary([part], required=False) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed, 1 skipped"
    part.failed.clear()
    assert runner.summary([part], required=False) == 0
    assert runner.summary([part], required=True) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed"


@pytest.mark.fast
def test_readme_holds_the_two_commands_once() -> None:
    """They are pasted into shells and parsed by .ci/run: one line each, no comment behind them."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for command in (
        'python3 -m venv .venv && . .venv/bin/activate && pip install ".[demo]" && mlwb demo',
        'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]" && python -m tests',
    ):
        assert lines.count(command) == 1, command
    assert not re.search(r"(DEMO|DEV)_(MB|MINUTES)|TODO|FIXME", "\n".join(lines)), (
        "a number that nobody has measured yet"
    )


@pytest.mark.fast
def test_workflows_use_the_same_script_and_pin_actions_by_major_version() -> None:
    """The matrix covers the ends of the supported range, and what CI runs is what a contributor can run."""
    workflows = {
        p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (ROOT / ".github" / "workflows").glob("*.yml")
    }
    assert set(workflows) == {"tests", "publish"}
    steps = [step for workflow in workflows.values() for job in workflow["jobs"].values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+", action) for action in actions)
    tests = workflows["tests"]["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [step for step in tests["steps"] if step.get("run") == "bash .ci/run"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"


@pytest.mark.fast
def test_hooks_run_tools_of_this_repository() -> None:
    """Local hooks only: nothing is fetched at commit time, and the clean hook is the one that keeps tags."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert hooks["clean-notebooks"]["entry"] == "python -m tests.sync --clean"
    assert re.match(hooks["clean-notebooks"]["files"], "nbs/pipelines/credit_scoring/train.ipynb")
    assert hooks["sync"]["entry"] == "python -m tests.sync"


@pytest.mark.fast
def test_ci_is_a_shell_script_that_reads_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "pip install -e" not in script.read_text(encoding="utf-8"), (
        "the command line comes from README.md, not from here"
    )
