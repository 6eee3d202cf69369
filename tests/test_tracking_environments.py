"""What is captured of code and machine: honest, redacted, and without side effects."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlops_workbench.tracking import environments, revisions
from mlops_workbench.tracking.environments import (
    capture_environment,
    installed_packages,
    model_requirements,
    visible_seeds,
)
from mlops_workbench.tracking.redaction import Redactor
from mlops_workbench.tracking.revisions import git_revision
from mlops_workbench.tracking.usage import UsageMeter

pytestmark = pytest.mark.fast


def git(folder: Path, *arguments: str) -> str:
    names = [
        "-c",
        "user.name=Ana",
        "-c",
        "user.email=ana@example.org",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    ]
    return subprocess.run(
        ["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "a repo"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("rate = 0.1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "baseline")
    return folder


def test_a_clean_tree_has_no_gaps_from_any_folder_of_it(repository):
    (repository / "sub").mkdir()
    found = git_revision(repository / "sub")
    assert (found.commit, found.branch, found.dirty, found.diff, found.gaps) == (
        git(repository, "rev-parse", "HEAD").strip(),
        "main",
        False,
        "",
        (),
    )


def test_staged_and_unstaged_changes_are_both_in_the_diff_and_secrets_are_not(repository):
    (repository / "train.py").write_text("rate = 0.2\n")
    git(repository, "add", ".")
    (repository / "train.py").write_text("rate = 0.2\ntoken = 'abc12345678'\nknown = 'correct-horse'\n")
    found = git_revision(repository, Redactor({"HORSE": "correct-horse"}))
    assert (
        found.dirty
        and "+rate = 0.2" in found.diff
        and "abc12345678" not in found.diff
        and "«redacted:HORSE»" in found.diff
    )


@pytest.mark.parametrize("limit", range(120, 420, 20))
def test_a_cut_diff_never_ends_inside_a_secret(repository, limit):
    (repository / "train.py").write_text(
        "".join(f"line_{i} = {i}\n" for i in range(5))
        + "password = 'hunter2hunter2'\nkey = '''-----BEGIN PRIVATE KEY-----\nMIIEabcd\nMIIEefgh\n-----END PRIVATE KEY-----'''\n"
    )
    found = git_revision(repository, limit=limit)
    assert "hunter" not in found.diff and "MIIE" not in found.diff
    assert len(found.diff.encode()) <= limit and bool(found.cut) == ("«redacted:private-key»" not in found.diff)


def test_a_deleted_file_a_detached_head_and_a_remote_with_a_password(repository):
    git(repository, "remote", "add", "origin", "https://ana:hunter2@git.example/loans.git")
    git(repository, "checkout", "-q", "--detach")
    (repository / "train.py").unlink()
    found = git_revision(repository)
    assert (
        found.branch == ""
        and found.dirty
        and "-rate = 0.1" in found.diff
        and "hunter2" not in found.remote
        and "git.example/loans" in found.remote
    )
    assert "detached" in str(found)


def test_untracked_code_is_listed_with_digests_and_ignored_files_are_not(repository):
    (repository / ".gitignore").write_text("secret.py\n.workbench/\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "ignore")
    for name in ("helper.py", "secret.py", "data.csv", "sub/Ünïcode name.ipynb", ".workbench/x.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("x")
    found = git_revision(repository)
    assert sorted(found.untracked) == ["helper.py", "sub/Ünïcode name.ipynb"] and not found.dirty
    before = found.digest
    (repository / "helper.py").write_text("y")
    assert git_revision(repository).digest != before


def test_before_the_first_commit_and_outside_git_it_says_so(tmp_path):
    assert git_revision(tmp_path).note == "not in a git repository"
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    found = git_revision(tmp_path)
    assert found.note == "no commit yet" and list(found.untracked) == ["a.py"] and found.gaps[0].startswith("no commit")


def test_without_git_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path).note == "git is not installed"


def test_a_git_that_hangs_is_given_up(tmp_path, monkeypatch):
    fake = tmp_path / "git"
    fake.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(30)\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(revisions._GitSilent, match="longer than"):
        revisions._git(tmp_path, "status", seconds=0.3)


def test_capturing_starts_no_program_that_the_repository_names_and_touches_nothing(repository):
    marker = repository.parent / "started"
    for key in ("core.fsmonitor", "diff.external"):
        git(repository, "config", key, f"touch '{marker}'; true")
    (repository / "train.py").write_text("rate = 9\n")
    (repository / ".gitattributes").write_text("*.py diff=evil\n")
    git(repository, "config", "diff.evil.textconv", f"touch '{marker}'; cat")
    index = (repository / ".git" / "index").read_bytes()
    assert "+rate = 9" in git_revision(repository).diff
    assert not marker.exists() and (repository / ".git" / "index").read_bytes() == index


def test_inside_a_git_hook_the_hooks_own_variables_do_not_mislead(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_revision(repository).branch == "main"


def test_packages_are_what_importlib_says_and_a_new_one_is_seen(tmp_path, monkeypatch):
    found = installed_packages()
    assert found["numpy"] == importlib.metadata.version("numpy") and found[
        "scikit-learn"
    ] == importlib.metadata.version("scikit-learn")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "brand-new" not in installed_packages()
    time.sleep(0.02)
    (tmp_path / "Brand_New-1.2.dist-info").mkdir()
    (tmp_path / "Brand_New-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: Brand_New\nVersion: 1.2\n"
    )
    assert installed_packages()["brand-new"] == "1.2"


def test_requirements_name_what_is_inside_the_model():
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline

    class Own:
        def __init__(self):
            import fsspec

            self.inside, self.me = [{"deep": make_pipeline(LinearRegression())}], self
            self.files = fsspec.filesystem("memory")

    names = [r.partition("==")[0] for r in model_requirements(Own())]
    assert (
        {"scikit-learn", "fsspec", "cloudpickle", "numpy", "pandas"} <= set(names)
        and "pytest" not in names
        and "tests" not in names
    )
    assert all("==" in r for r in model_requirements())


def test_equal_generator_states_have_equal_digests():
    import random

    import numpy as np

    random.seed(1), np.random.seed(1)
    first = visible_seeds()
    random.random()
    second = visible_seeds()
    assert first["random"] != second["random"] and first["numpy"] == second["numpy"]
    np.random.normal()
    assert visible_seeds()["numpy"] != second["numpy"]


def test_a_paths_secret_and_an_absent_card_tool(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/correct-horse/x.ipynb")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    environments.graphics_cards.cache_clear()
    found = capture_environment(redactor=Redactor({"HORSE": "correct-horse"}))
    assert found.notebook == "/home/«redacted:HORSE»/x.ipynb" and found.gpus == ()


@pytest.mark.process
def test_cpu_seconds_include_workers_living_and_ended():
    burn = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n{}"
    old = subprocess.Popen(
        [sys.executable, "-c", burn.format(0.4, "print('burnt', flush=True)\ntime.sleep(60)")], stdout=subprocess.PIPE
    )
    old.stdout.readline()  # it has burnt its 0.4 s before the meter starts
    meter = UsageMeter()
    living = subprocess.Popen(
        [sys.executable, "-c", burn.format(0.5, "print('burnt', flush=True)\ntime.sleep(60)")], stdout=subprocess.PIPE
    )
    subprocess.run([sys.executable, "-c", burn.format(0.5, "")], check=True)
    living.stdout.readline()
    used = meter.stop().cpu_seconds
    for process in (old, living):
        process.kill()
        process.wait()
    assert 1.0 <= used < 1.9, used
