"""The command line from outside: bad input gets three lines and status 1, and nothing is half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

MLWB = [str(Path(sys.executable).parent / "mlwb")]  # the command as installed


class Shell:
    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "lending"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("MLWB_", "MLFLOW_")) and k != "IN_TEST"}
        self.env |= {
            "MLWB_CONFIG_HOME": str(folder / "config"),
            "COLUMNS": "200",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def __call__(self, *words: str, status: int = 0, cwd: Path | None = None, stdin: str | None = None) -> str:
        done = subprocess.run(
            [*MLWB, *words], cwd=cwd or (self.root if self.root.exists() else self.folder), env=self.env,
            capture_output=True, text=True, timeout=180, input=stdin,
        )  # fmt: skip
        assert done.returncode == status, f"{words} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
        if "--debug" not in words:
            assert "Traceback" not in done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr

    def digest(self) -> str:
        return str(json.loads(self("audit", "anchor"))["digest"])


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("cli"))
    shell("init", "lending")
    (shell.folder / "loans.csv").write_text("amount,approve\n" + "".join(f"{100 + i},{i % 2}\n" for i in range(40)))
    shell("save", "loans", str(shell.folder / "loans.csv"), "--target", "approve")
    return shell


@pytest.mark.process
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"a,b\n", "no rows"),
        (b"a,a\n1,2\n", "a"),
        (b"a,\n1,2\n", "name"),
        (b"a,b\n1,2\n3\n4,5,6\n", "line"),
        (bytes(range(256)) * 20, ""),
    ],
    ids=["empty", "header only", "duplicate columns", "unnamed column", "ragged", "binary"],
)
def test_bad_files_are_refused_and_leave_nothing(shell: Shell, tmp_path: Path, content: bytes, says: str) -> None:
    before = shell.digest()
    (tmp_path / "bad.csv").write_bytes(content)
    message = shell("save", "bad", str(tmp_path / "bad.csv"), status=1)
    assert message.startswith("error: ") and "fix:" in message and says in message
    assert shell.digest() == before


@pytest.mark.process
def test_a_missing_and_a_constant_target(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("amount,approve\n1,1\n2,1\n3,1\n")
    assert "did you mean 'approve'" in shell("save", "x", str(tmp_path / "x.csv"), "--target", "aprove", status=1)
    assert "approve" in shell("save", "x", str(tmp_path / "x.csv"), "--target", "approve", status=1)


@pytest.mark.process
def test_a_contract_broken_in_several_columns(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "later.csv").write_text("amount,approve\n" + "".join(f"{-5000 - i},{i + 7}\n" for i in range(40)))
    shell("save", "loans", str(tmp_path / "later.csv"), "--target", "approve")
    message = shell("data", "validate", "loans", status=1)
    assert "amount" in message and "approve" in message
    before = shell.digest()
    (tmp_path / "worse.csv").write_text("amount,approve\n" + "".join(f"{-6000 - i},{i + 9}\n" for i in range(40)))
    assert "amount" in shell("save", "loans", str(tmp_path / "worse.csv"), "--enforce", status=1)
    assert shell.digest() == before


def pipeline(root: Path, name: str, definition: str, cells: dict[str, list[str]]) -> None:
    folder = root / "pipelines" / name
    folder.mkdir(parents=True)
    (folder / "pipeline.yml").write_text(f"name: {name}\n{definition}")
    for notebook, sources in cells.items():
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        if made.cells and sources[0].startswith("# parameters"):
            made.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(made, folder / notebook)


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "definition", "cells", "says"),
    [
        ("cycle", "steps:\n  a: {notebook: a.ipynb, after: [b]}\n  b: {notebook: a.ipynb, after: [a]}\n", {"a.ipynb": ["# parameters"]}, "cycle"),
        ("missing", "steps:\n  a: {notebook: b.ipynb}\n", {"a.ipynb": ["# parameters"]}, "b.ipynb"),
        ("untagged", "steps:\n  a: {notebook: a.ipynb, parameters: {x: 1}}\n", {"a.ipynb": ["x = 1"]}, "parameters"),
        ("unmade", 'steps:\n  a: {notebook: a.ipynb}\n  b: {notebook: b.ipynb, parameters: {x: "${a.rows}"}}\n', {"a.ipynb": ["# parameters"], "b.ipynb": ["# parameters\nx: int = 1"]}, "rows"),
    ],
)  # fmt: skip
def test_a_wrong_pipeline_is_refused_before_anything_starts(
    shell: Shell, name: str, definition: str, cells: dict[str, list[str]], says: str
) -> None:
    pipeline(shell.root, name, definition, cells)
    before = shell.digest()
    message = shell("run", name, status=1)
    assert says in message and "pipeline.yml" in message
    assert shell.digest() == before


@pytest.mark.process
def test_a_cell_that_fails_in_the_middle_and_a_rerun(shell: Shell) -> None:
    cells = [
        "# parameters\ngoal: int = 1  # 1 fails",
        "from mlops_workbench import output\nassert goal != 1, 'the goal is one'",
        "output('made', goal)",
    ]
    pipeline(
        shell.root,
        "middle",
        'parameters:\n  goal: {type: int, default: 1}\nsteps:\n  work: {notebook: w.ipynb, parameters: {goal: "${goal}"}, outputs: {made: value}}\n',
        {"w.ipynb": cells},
    )
    message = shell("run", "middle", status=1)
    assert "the goal is one" in message and "work" in message and ".ipynb" in message
    assert "goal" in shell("run", "middle", "-p", "goal=many", status=1)
    assert '"value": 2' in shell("--json", "run", "middle", "-p", "goal=2")
    assert "ok" in shell("audit", "verify")


@pytest.mark.process
def test_settings_and_layout(shell: Shell, tmp_path: Path) -> None:
    other = Shell(tmp_path)
    other("init", "lending")
    settings = other.root / "settings.ini"
    settings.write_text(settings.read_text().replace("environment = dev", "enviroment = dev"))
    assert "did you mean 'environment'" in other("load", "loans", status=1)
    assert "did you mean 'environment'" in json.dumps(json.loads(_out(other, "--json", "doctor", status=1)))
    settings.write_text(settings.read_text().replace("enviroment", "environment"))
    (other.root / ".workbench/layout.json").write_text('{"layout": 9}')
    assert "layout 9" in other("data", "list", status=1)


def _out(shell: Shell, *words: str, status: int) -> str:
    done = subprocess.run([*MLWB, *words], cwd=shell.root, env=shell.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    return done.stdout


@pytest.mark.process
def test_outside_a_workspace_and_debug(shell: Shell, tmp_path: Path) -> None:
    assert "mlwb init" in shell("load", "loans", status=1, cwd=tmp_path)
    assert "Traceback" in shell("--debug", "load", "loans", status=1, cwd=tmp_path)


@pytest.mark.process
def test_secrets_and_roles(shell: Shell) -> None:
    assert "hunter2" not in shell("secret", "set", "WAREHOUSE", stdin="hunter2\n")
    assert shell("secret", "list").split() == ["WAREHOUSE"]
    me = shell("identity", "show").strip()
    assert shell("role", "list").split() == [me, "administrator"]
    assert "without an administrator" in shell("role", "grant", me, "reader", status=1)
    stranger = {**shell.env, "MLWB_CONFIG_HOME": str(shell.folder / "stranger")}
    done = subprocess.run(
        [*MLWB, "data", "erase", "loans", "amount", "101", "--yes"],
        cwd=shell.root,
        env=stranger,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "mlwb role grant" in done.stderr


@pytest.mark.process
def test_help_does_not_wait_for_pandas() -> None:
    code = "import sys, mlops_workbench.cli; print(sorted({'pandas', 'mlflow', 'sklearn', 'pyarrow', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.process
def test_data_and_messages_are_never_read_as_markup(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(
        "[/b],note,approve\n" + "".join(f"[red]{i},[/bold] hi,{i % 2}\n" for i in range(20))
    )
    shell("save", "markup", str(tmp_path / "m.csv"))
    assert "[/bold] hi" in shell("load", "markup") and "[/b]" in shell("load", "markup")
    pipeline(
        shell.root,
        "loud",
        "description: '[/x] test'\nsteps:\n  a: {notebook: a.ipynb, description: '[/y]'}\n",
        {"a.ipynb": ["# parameters", "raise ValueError('[/bold] no')"]},
    )
    assert "loud" in shell("pipelines", "list")
    assert "[/bold] no" in shell("run", "loud", status=1)


@pytest.mark.process
def test_output_that_cannot_be_written(shell: Shell, tmp_path: Path) -> None:
    assert "cannot be written" in shell("load", "loans", "--to", str(tmp_path / "nodir/x.csv"), status=1)
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be written" in shell("load", "loans", "--to", str(tmp_path / "folder.csv"), status=1)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.csv"], "nothing half-written"
    shell("load", "loans@1", "--to", str(tmp_path / "x.csv"))
    assert (tmp_path / "x.csv").read_text() == (shell.folder / "loans.csv").read_text()
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*MLWB, "data", "list"],
                cwd=shell.root,
                env=shell.env,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
        assert done.returncode == 1 and "Traceback" not in done.stderr and "No space left" in done.stderr


@pytest.mark.process
def test_pipes_get_plain_lines_and_programs_get_json(shell: Shell) -> None:
    lines = shell("data", "versions", "loans").splitlines()
    assert lines[0].split("\t")[:2] == ["reference", "rows"] and lines[1].split("\t")[0] == "dataset:loans@1"
    events = json.loads(shell("--json", "audit", "log", "--kind", "dataset.saved", "--limit", "1"))
    assert isinstance(events[0]["body"], dict)
    assert "not a moment" in shell("audit", "log", "--since", "yesterday", status=1)


@pytest.mark.process
def test_a_narrow_terminal_shows_whole_references(shell: Shell) -> None:
    code = "from rich.console import Console; import mlops_workbench.cli as c; c.console = Console(force_terminal=True, width=80, color_system=None); c.main()"
    for words in (["data", "list"], ["tracking", "runs"], ["audit", "log"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=shell.root,
            env=shell.env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert words[0] == "tracking" or "dataset:loans@" in done.stdout
        assert max(map(len, done.stdout.splitlines()), default=0) <= 80


@pytest.mark.process
def test_saving_what_breaks_the_contract_warns(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text("amount;approve\n" + "".join(f"{-9000 - i};{i % 2}\n" for i in range(40)))
    done = subprocess.run(
        [*MLWB, "save", "loans", str(tmp_path / "odd.csv"), "--sep", ";"],
        cwd=shell.root,
        env=shell.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "breaks contract:loans@" in done.stderr and "breaks its contract" in done.stdout
