"""Run every notebook alone, in its own kernel, and hold its stored outputs against the fresh ones.

    python -m tests.notebooks             run all, compare with what is stored (Python 3.11), report seconds
    python -m tests.notebooks --update    run all and store the fresh outputs
    python -m tests.notebooks nbs/api/errors.ipynb

A notebook is a page of the documentation: its outputs are part of what readers see, so they must be
what the code says today. Ids, times, paths and durations differ from run to run and are masked before
the comparison; images and HTML are compared by presence.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
SECONDS_CAP = 120  # a notebook that takes longer fails
SECONDS_AIM = 20  # a notebook that takes longer is named in the report
SIZE_CAP = 300_000  # bytes of one notebook file

MASKS = [
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b(?:[0-7][0-9A-HJKMNP-TV-Z]{25}|01[0-9A-HJKMNP-TV-Z]{5,23})\b"), "<ulid>"),  # whole, or shortened
    (re.compile(r"\btmp[a-z0-9_]{8}\b"), "<temporary>"),
    (re.compile(r"\b[0-9a-f]{8,}(?:-[0-9a-f]{4,}){0,4}\b"), "<hex>"),
    (re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"), "<time>"),
    (re.compile(r"\b\d\d:\d\d:\d\d(?:\.\d+)?\b"), "<time>"),
    (re.compile(r"datetime\.datetime\((?:\d+, )+\d+"), "datetime.datetime(<time>"),
    (re.compile(r"0x[0-9a-fA-F]+"), "<address>"),
    (re.compile(r"(?:/[\w.+@~-]+){2,}/?"), "<path>"),
    (re.compile(r"\b\d+(?:\.\d+)?(?:e-?\d+)? ?(?:ns|µs|us|ms|s|seconds|MB|kB|KB|GB|GiB|MiB)\b"), "<measured>"),
]
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")
TEXT_TYPES = ("text/plain",)


def lesson_notebooks() -> list[Path]:
    """All notebooks that are pages; step notebooks and dashboards (folders with `.notest`) need a pipeline or a person."""
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        folders = [p for p in path.parents if ROOT in p.parents]
        if ".ipynb_checkpoints" in path.parts or any((f / ".notest").exists() for f in folders):
            continue
        found.append(path)
    return found


def mask(text: str) -> str:
    for pattern, replacement in MASKS:
        text = pattern.sub(replacement, text)
    return re.sub(r"[ \t─━═-]{3,}", " ", text).strip()


def same_text(stored: str, fresh: str) -> bool:
    """Equal after masking, decimal numbers to a relative 1e-4 (another build of a BLAS differs in the last digits)."""
    a, b = mask(stored), mask(fresh)
    if a == b:
        return True
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(abs(float(x) - float(y)) <= 1e-4 * max(abs(float(x)), abs(float(y)), 1e-6) + 1e-9 for x, y in pairs)


def views(cell: Any) -> Iterator[tuple[str, str]]:
    """What a reader sees of a cell: (kind, text) per output; neighbouring stream chunks are one output."""
    stream: dict[str, str] = {}
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            stream[output["name"]] = stream.get(output["name"], "") + output["text"]
        else:
            data = output.get("data", {})
            kinds = "+".join(sorted(data)) or output["output_type"]
            yield kinds, "" if "text/html" in data else next((data[t] for t in TEXT_TYPES if t in data), "")
    for name, text in sorted(stream.items()):
        if name == "stdout":
            yield name, text


def differences(stored: Any, fresh: Any) -> list[str]:
    found = []
    for i, (a, b) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        if a.cell_type != "code":
            continue
        old, new = sorted(views(a)), sorted(views(b))
        if [k for k, _ in old] != [k for k, _ in new]:
            found.append(f"cell {i}: outputs are {[k for k, _ in new]}, stored are {[k for k, _ in old]}")
            continue
        for (kind, x), (_, y) in zip(old, new, strict=True):
            if not same_text(x, y):
                found.append(f"cell {i} ({kind}):\n    stored: {mask(x)[:300]!r}\n    fresh:  {mask(y)[:300]!r}")
    return found


def clean_outputs(notebook: Any) -> None:
    """Keep what a reader sees: no counters, no per-run metadata, standard output in one piece, no standard error."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        kept: list[Any] = []
        for output in cell.outputs:
            if output["output_type"] == "stream":
                if output["name"] == "stderr":
                    continue
                if kept and kept[-1]["output_type"] == "stream":
                    kept[-1]["text"] += output["text"]
                    continue
            if "execution_count" in output:
                output["execution_count"] = None
            output.get("metadata", {}).clear()
            kept.append(output)
        cell.outputs = kept
    notebook.metadata.pop("language_info", None)
    notebook.metadata.pop("widgets", None)


def execute(path: Path, attempts: int = 2) -> tuple[Any, float, str]:
    """Run one notebook; returns (notebook with outputs, seconds, error or empty)."""
    notebook = nbformat.read(path, as_version=4)
    leaks = ("MLWB_", "MLFLOW_")  # a surrounding workspace or tracking server is none of the lesson's business
    env = {k: v for k, v in os.environ.items() if not k.startswith(leaks)}
    env |= {"IN_TEST": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    client = NotebookClient(
        notebook,
        timeout=SECONDS_CAP,
        kernel_name="python3",
        extra_arguments=["--log-level=40"],  # the kernel's own warnings are not about the notebook
        resources={"metadata": {"path": path.parent}},
    )
    start = time.perf_counter()
    error = ""
    try:
        client.execute(env=env)
    except CellExecutionError as e:
        error = str(e)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
        if "Kernel didn't respond" in error and attempts > 1:  # two kernels that start at once can choose one port
            return execute(path, attempts - 1)
    return notebook, time.perf_counter() - start, error


def check(path: Path, update: bool, compare: bool) -> tuple[Path, float, list[str]]:
    stored = nbformat.read(path, as_version=4)
    fresh, seconds, error = execute(path)
    problems = [error] if error else []
    if not error and update:
        clean_outputs(fresh)
        path.write_text(nbformat.writes(fresh, indent=1, ensure_ascii=False).rstrip("\n") + "\n")
    elif not error and compare:
        problems += differences(stored, fresh)
    if seconds > SECONDS_CAP:
        problems.append(f"took {seconds:.0f} s, the cap is {SECONDS_CAP} s")
    if path.stat().st_size > SIZE_CAP:
        problems.append(f"is {path.stat().st_size:,} bytes, the cap is {SIZE_CAP:,}")
    return path, seconds, problems


@dataclass
class Outcome:
    "Which notebooks ran as they should, which did not, and the seconds of each."

    passed: list[Path] = field(default_factory=list)
    failed: list[Path] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        times = (
            f"; median {statistics.median(self.seconds):.1f} s, slowest {max(self.seconds):.1f} s"
            if self.seconds
            else ""
        )
        return f"notebooks: {len(self.passed)} ran, {len(self.failed)} did not{times}"


def run(paths: list[Path], update: bool = False, jobs: int = 2) -> Outcome:
    """Run `paths`, a few at a time, and print a line for each as it ends."""
    compare = sys.version_info[:2] == (3, 11)  # other versions word some messages differently
    outcome = Outcome()
    with ThreadPoolExecutor(jobs) as pool:
        for path, seconds, problems in pool.map(lambda p: check(p, update, compare), paths):
            outcome.seconds.append(seconds)
            (outcome.failed if problems else outcome.passed).append(path)
            slow = "  (slow)" if seconds > SECONDS_AIM else ""
            print(f"{'FAIL' if problems else 'ok':4} {seconds:6.1f} s  {path.relative_to(ROOT)}{slow}", flush=True)
            for problem in problems:
                print("     " + problem.replace("\n", "\n     "), flush=True)
    print(outcome, flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--update", action="store_true", help="store the fresh outputs")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    outcome = run([p.resolve() for p in args.notebooks] or lesson_notebooks(), args.update, args.jobs)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
