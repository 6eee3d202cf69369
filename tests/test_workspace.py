"""The workspace folder from outside: init, opening, moving, permissions, and living beside nbdev."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from mlops_workbench.errors import SettingsError, StorageError, WorkspaceError
from mlops_workbench.workspace.folders import Workspace, init
from mlops_workbench.workspace.identity import current_actor
from mlops_workbench.workspace.settings import load_settings, settings_text

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "config"


def digest_tree(root: Path) -> str:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.mark.fast
def test_init_makes_what_the_design_says_and_nothing_half(tmp_path: Path, home: Path) -> None:
    workspace = init(tmp_path / "lending", home=home)
    assert {p.name for p in workspace.root.iterdir()} == {
        "settings.ini",
        "pipelines",
        "contracts",
        "pyproject.toml",
        ".workbench",
    }
    assert json.loads(workspace.path("layout.json").read_text()) == {"layout": 1}
    assert load_settings(workspace.root).workbench.name == "lending"
    assert [e.kind for e in workspace.events.read()] == ["workspace.created"]


@pytest.mark.fast
@pytest.mark.parametrize(
    "before",
    [
        b'[project]\nname = "x"\n',
        b'[project]\r\nname = "x"\r\n',
        b"# only a comment, no newline at the end",
        b"[tool.ruff]\nline-length = 99\n\n\n",
    ],
)
def test_init_appends_to_an_existing_pyproject(tmp_path: Path, home: Path, before: bytes) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_bytes(before)
    path.chmod(0o640)
    init(tmp_path, home=home)
    assert path.read_bytes().startswith(before) and b"[tool.nbdev]" in path.read_bytes()[len(before) :]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.fast
def test_init_leaves_a_pyproject_with_the_table_alone(tmp_path: Path, home: Path) -> None:
    before = b'[tool.nbdev]\nlib_path = "mine"\n'
    (tmp_path / "pyproject.toml").write_bytes(before)
    init(tmp_path, home=home)
    assert (tmp_path / "pyproject.toml").read_bytes() == before


@pytest.mark.fast
def test_init_refuses_a_broken_pyproject_and_leaves_no_workspace(tmp_path: Path, home: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project\n")
    with pytest.raises(SettingsError, match="not TOML"):
        init(tmp_path, home=home)
    assert not (tmp_path / "settings.ini").exists()
    (tmp_path / "pyproject.toml").write_text("")
    assert init(tmp_path, home=home).events.head().seq == 1, "a rerun after mending continues"


@pytest.mark.fast
def test_init_refuses_another_tools_settings(tmp_path: Path, home: Path) -> None:
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = mine\n")
    with pytest.raises(WorkspaceError, match="another tool"):
        init(tmp_path, home=home)
    assert (tmp_path / "settings.ini").read_text() == "[DEFAULT]\nlib_name = mine\n"


@pytest.mark.process
def test_nbdev_commands_work_in_a_fresh_workspace_and_change_no_pyproject(tmp_path: Path, home: Path) -> None:
    root = tmp_path / "lending"
    root.mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "lending"\nversion = "0.1"\n')
    init(root, home=home)
    before = (root / "pyproject.toml").read_bytes()
    step = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("rows: int = 5  # how many", metadata={"tags": ["parameters"], "scrolled": True})
        ]
    )
    step.cells[0].execution_count = 3
    (root / "pipelines/scoring").mkdir()
    nbformat.write(step, root / "pipelines/scoring/ingest.ipynb")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for command in ("nbdev-clean", "nbdev-export", "nbdev-test"):
        done = subprocess.run([SCRIPTS / command], cwd=root, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    cleaned = nbformat.read(root / "pipelines/scoring/ingest.ipynb", 4)
    assert cleaned.cells[0].metadata == {"tags": ["parameters"]} and cleaned.cells[0].execution_count is None
    assert (root / "pyproject.toml").read_bytes() == before


@pytest.mark.fast
def test_a_newer_layout_is_refused_and_untouched(tmp_path: Path, home: Path) -> None:
    workspace = init(tmp_path / "w", home=home)
    workspace.close()
    workspace.path("layout.json").write_text('{"layout": 2}')
    before = digest_tree(workspace.root)
    with pytest.raises(WorkspaceError, match="layout 2") as caught:
        Workspace.open(workspace.root)
    assert caught.value.found == 2 and digest_tree(workspace.root) == before


@pytest.mark.fast
def test_a_clone_without_state_founds_its_own(tmp_path: Path, home: Path) -> None:
    workspace = init(tmp_path / "w", home=home)
    workspace.close()
    shutil.rmtree(workspace.path())
    again = Workspace.open(tmp_path / "w", home=home)
    assert again.events.head().seq == 1 and again.path(".gitignore").read_text() == "*\n"


def _found(root: str, home: str, queue: multiprocessing.Queue) -> None:
    with Workspace.open(root, home=Path(home)) as workspace:
        queue.put((workspace.authority.founded(), workspace.actor))


@pytest.mark.process
def test_processes_that_open_a_fresh_clone_together_agree_on_founder_and_actor(tmp_path: Path, home: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w/settings.ini").write_text(settings_text())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_found, args=(str(tmp_path / "w"), str(home), queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    answers = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(30)
    assert len(answers) == 1
    (_, founder), actor = answers.pop()
    assert founder == actor == current_actor(home)


@pytest.mark.process
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user to be refused"
)
def test_no_write_permission_is_a_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o755)
    for parent in [tmp_path, *tmp_path.parents]:
        if (
            parent.stat().st_uid == os.geteuid()
            and parent != Path("/")
            and parent.is_relative_to("/tmp")
            and parent != Path("/tmp")
        ):
            parent.chmod(0o755)
    code = (
        "import sys; from pathlib import Path\n"
        "from mlops_workbench.errors import StorageError\n"
        "from mlops_workbench.workspace.folders import init\n"
        "try: init(sys.argv[1], home=Path(sys.argv[1]) / 'config')\n"
        "except StorageError as e: print(e); sys.exit(7)\n"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "Permission denied" in done.stdout and str(folder) in done.stdout and "fix:" in done.stdout
    assert list(folder.iterdir()) == []


@pytest.mark.fast
def test_a_full_disk_while_making_a_workspace_is_a_clear_error(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        init(tmp_path / "w", home=home)
    assert not (tmp_path / "w/settings.ini").exists()
    monkeypatch.setattr(os, "fsync", real)
    assert init(tmp_path / "w", home=home).events.head().seq == 1


@pytest.mark.fast
def test_temporary_workspaces_clean_up(tmp_path: Path) -> None:
    workspace = Workspace.temporary()
    root = workspace.root
    assert workspace.events.head().seq == 1
    workspace.close()
    del workspace
    assert not root.exists()
