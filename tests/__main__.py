"""Run everything: the tests under tests/ and every notebook alone in its own kernel.

    python -m tests                    all of it
    python -m tests --fast             only the tests that stay in this process (about a minute)
    python -m tests --no-notebooks     the tests, without the notebooks
    python -m tests -k events -x       what is not known here goes to pytest
    python -m tests nbs/api/errors.ipynb tests/test_docs.py

Where PostgreSQL is not installed its tests are skipped and say so. With MLWB_REQUIRE_SERVICES=1 (continuous
integration) a skipped test is a failure: there, everything must have run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from tests import notebooks

ROOT = Path(__file__).resolve().parents[1]
FAST = "not process and not browser and not service and not slow"


@dataclass
class Part:
    "What came of one part of the suite."

    name: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def clean_environment() -> dict[str, str]:
    """The environment for the tests: nothing of a surrounding workspace, nbdev session or MLflow server leaks in."""
    leaks = ("MLWB_", "MLWB__", "MLFLOW_")
    keep = ("MLWB_REQUIRE_SERVICES",)
    env = {k: v for k, v in os.environ.items() if k in keep or not k.startswith(leaks)}
    env.pop("IN_TEST", None)
    return env | {"MLFLOW_DISABLE_TELEMETRY": "true", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def read_report(path: Path, part: Part) -> None:
    """Add the outcomes of a JUnit report to `part`. Expected failures count as passed."""
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            part.failed.append(name)
        elif skip is not None and skip.get("type") != "pytest.xfail":
            part.skipped.append(f"{name}: {skip.get('message', '')}")
        else:
            part.passed += 1


def run_pytest(arguments: list[str]) -> Part:
    """pytest in a process of its own, so that nothing it imports or changes reaches the notebooks."""
    part, start = Part("tests"), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mlwb-tests-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        code = subprocess.call(command, cwd=ROOT, env=clean_environment())
        if report.exists():
            read_report(report, part)
        if code not in (0, 1):  # 2 interrupted, 3 internal, 4 usage, 5 no test selected
            part.failed.append(f"pytest ended with exit code {code}")
        elif code == 1 and not part.failed:
            part.failed.append("pytest failed without naming a test")
    part.seconds = time.perf_counter() - start
    return part


def run_notebooks(paths: list[Path], jobs: int) -> Part:
    part, start = Part("notebooks"), time.perf_counter()
    outcome = notebooks.run(paths, jobs=jobs)
    part.passed = len(outcome.passed)
    part.failed = [str(path.relative_to(ROOT)) for path in outcome.failed]
    part.seconds = time.perf_counter() - start
    return part


def litter() -> list[str]:
    """What a test or a notebook must never leave: a workspace in the repository itself."""
    found = []
    for folder, names, _ in os.walk(ROOT):
        if ".workbench" in names:
            found.append(str((Path(folder) / ".workbench").relative_to(ROOT)))
        names[:] = [n for n in names if not n.startswith(".")]
    return found


def summary(parts: list[Part], required: bool) -> int:
    """Print one table and the failures by name; returns the exit code."""
    print("\n" + "=" * 78)
    for part in parts:
        print(
            f"{part.name:<12} {part.passed:>5} passed {len(part.failed):>5} failed {len(part.skipped):>5} skipped {part.seconds:>8.0f} s"
        )
    failed = [name for part in parts for name in part.failed]
    skipped = [name for part in parts for name in part.skipped]
    for name in failed:
        print(f"FAILED   {name}")
    for name in skipped:
        print(f"{'FAILED   (skipped, but MLWB_REQUIRE_SERVICES=1)' if required else 'SKIPPED '} {name}")
    count = len(failed) + (len(skipped) if required else 0)
    print("=" * 78)
    tail = "" if required or not skipped else f", {len(skipped)} skipped"
    print(f"{sum(p.passed for p in parts)} passed, {count} failed{tail}")
    return 1 if count else 0


def main(argv: list[str] | None = None) -> int:
    # No abbreviations: `--no-header` belongs to pytest.
    parser = argparse.ArgumentParser(
        prog="python -m tests",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="only tests that stay in this process; no notebooks")
    parser.add_argument("--no-notebooks", action="store_true", help="leave the notebooks out")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time (default 2)")
    options, rest = parser.parse_known_args(argv)

    chosen = [Path(a).resolve() for a in rest if a.endswith(".ipynb")]
    arguments = [a for a in rest if not a.endswith(".ipynb")]
    named_tests = any((ROOT / a.split("::")[0]).exists() for a in arguments if not a.startswith("-"))
    if options.fast:
        arguments = ["-m", FAST, *arguments]

    before = set(litter())
    parts = []
    if arguments or not chosen:
        parts.append(run_pytest(arguments))
    if chosen or not (options.fast or options.no_notebooks or named_tests):
        parts.append(run_notebooks(chosen or notebooks.lesson_notebooks(), options.jobs))
    left = [f"{path} was left behind in the repository" for path in litter() if path not in before]
    parts.append(Part("tidiness", passed=0 if left else 1, failed=left))
    return summary(parts, required=os.environ.get("MLWB_REQUIRE_SERVICES") == "1")


if __name__ == "__main__":
    sys.exit(main())
