"""Hold what is generated against what it is generated from.

    python -m tests.sync                check: package, README and notebook metadata; names what differs
    python -m tests.sync --fix          regenerate all of it
    python -m tests.sync --clean [NB]   only clean the notebooks' metadata (all, or those named)

The notebooks are the source. The package (every `__init__` too), its index `_modidx.py` and the README are made
from them and committed, so that reading and installing need no tools; this check keeps them honest. It works on a
copy in a temporary folder and compares bytes, so a check changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlops_workbench"
HOME_PAGE = Path("nbs/index.ipynb")
LOCAL_LINK = re.compile(r"""(\]\(|src="|href=")(?!https?:|mailto:|#|/)([^)"\s]+)""")


def notebook_paths(root: Path = ROOT) -> list[Path]:
    """Every notebook of the repository: pages, steps and dashboards."""
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cleaned(text: str, root: Path = ROOT) -> str:
    """The notebook as `nbdev-clean` writes it with the settings of this repository: tags stay, all other metadata goes."""
    from fastcore.nbio import nb2str
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    config = get_config(root)
    notebook = json.loads(text)
    clean_nb(notebook, allowed_cell_metadata_keys=config.get("allowed_cell_metadata_keys"))
    return str(nb2str(notebook))


def clean(paths: list[Path]) -> list[Path]:
    """Clean in place; returns those that changed."""
    changed = []
    for path in paths:
        before = path.read_text(encoding="utf-8")
        after = cleaned(before)
        if before != after:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def export(root: Path) -> None:
    """A full `nbdev-export` of the tree at `root`. With IN_TEST set nbdev silently does nothing, so it is removed."""
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nbdev-export failed:\n{done.stderr[-3000:]}")


def readme(root: Path = ROOT) -> str:
    """The README that the home page makes: nbdev's filter, then nbconvert's Markdown, links seen from the top folder."""
    from nbconvert import MarkdownExporter
    from nbdev import processors
    from nbformat import reads

    class ReadmeFilter(processors.FilterDefaults):  # type: ignore[misc]
        """Without what only a website has: front matter, links to its pages, reference entries."""

        def base_procs(self) -> list[Any]:
            drop = (
                "FrontmatterProc",
                "populate_language",
                "add_show_docs",
                "exec_show_docs",
                "insert_warning",
                "add_links",
            )
            return [p for p in super().base_procs() if p.__name__ not in drop]

    from fastcore.nbio import nb2str, read_nb

    notebook = read_nb(root / HOME_PAGE)
    here = Path.cwd()
    os.chdir(root)  # nbdev finds its settings by the working directory
    try:
        ReadmeFilter()(notebook)
    finally:
        os.chdir(here)
    notebook.cells = [c for c in notebook.cells if "source" in c]
    body, _ = MarkdownExporter().from_notebook_node(reads(nb2str(notebook), as_version=4))
    folder = HOME_PAGE.parent.as_posix()
    body = LOCAL_LINK.sub(lambda m: m[1] + os.path.normpath(f"{folder}/{m[2]}"), body)
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"<!-- made from {HOME_PAGE} by `python -m tests.sync --fix`: edit the notebook -->\n\n{body}\n"


def generated_files(root: Path) -> dict[str, bytes]:
    """What the package consists of, by path; caches aside."""
    files = (p for p in (root / PACKAGE).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def fresh_package(root: Path) -> dict[str, bytes]:
    """The package made anew, in a temporary folder, from nothing but notebooks and settings."""
    with tempfile.TemporaryDirectory(prefix="mlwb-sync-") as folder:
        copy = Path(folder)
        shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".workbench"))
        shutil.copy(root / "pyproject.toml", copy)
        shutil.copy(root / "README.md", copy)
        (copy / PACKAGE).mkdir()
        if (root / PACKAGE / "py.typed").exists():  # the only file of the package that no notebook makes
            shutil.copy(root / PACKAGE / "py.typed", copy / PACKAGE)
        export(copy)
        return generated_files(copy)


def first_difference(a: bytes, b: bytes) -> str:
    """Where two texts part: the line number and both lines."""
    old, new = a.decode(errors="replace").splitlines(), b.decode(errors="replace").splitlines()
    for number, (x, y) in enumerate(zip(old, new, strict=False), 1):
        if x != y:
            return f"line {number}: is {x[:100]!r}, should be {y[:100]!r}"
    return f"has {len(old)} lines, should have {len(new)}"


def check(root: Path = ROOT) -> list[str]:
    """Everything that is not what its source says, one line each."""
    found = []
    have, want = generated_files(root), fresh_package(root)
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            found.append(f"{name}: missing; its notebook has not been exported")
        elif name not in want:
            found.append(f"{name}: no notebook makes this file")
        elif have[name] != want[name]:
            found.append(f"{name}: not what its notebook exports ({first_difference(have[name], want[name])})")
    if not (root / PACKAGE / "py.typed").exists():
        found.append(f"{PACKAGE}/py.typed: missing")
    is_, should = (root / "README.md").read_bytes(), readme(root).encode()
    if is_ != should:
        found.append(f"README.md: not what {HOME_PAGE} makes ({first_difference(is_, should)})")
    for path in notebook_paths(root):
        text = path.read_text(encoding="utf-8")
        should_text = cleaned(text, root)
        if text != should_text:
            where = first_difference(text.encode(), should_text.encode())
            found.append(f"{path.relative_to(root)}: metadata is not clean ({where})")
    return found


def fix() -> None:
    """Clean the notebooks, then make package and README anew; a file that no notebook makes is removed."""
    for path in clean(notebook_paths()):
        print(f"cleaned  {path.relative_to(ROOT)}")
    have, want = generated_files(ROOT), fresh_package(ROOT)
    for name in sorted(have.keys() - want.keys()):
        (ROOT / name).unlink()
        print(f"removed  {name}")
    for name, content in sorted(want.items()):
        if have.get(name) != content:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_bytes(content)
            print(f"wrote    {name}")
    (ROOT / PACKAGE / "py.typed").touch()
    text = readme()
    if (ROOT / "README.md").read_text(encoding="utf-8") != text:
        (ROOT / "README.md").write_text(text, encoding="utf-8")
        print("wrote    README.md")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fix", action="store_true", help="regenerate instead of complaining")
    parser.add_argument("--clean", action="store_true", help="only clean notebook metadata")
    parser.add_argument("notebooks", nargs="*", type=Path, help="with --clean: only these")
    options = parser.parse_args(argv)
    if options.clean:
        for path in clean([p.resolve() for p in options.notebooks] or notebook_paths()):
            print(f"cleaned  {path.relative_to(ROOT)}")
        return 0
    if options.fix:
        fix()
    found = check()
    for line in found:
        print(f"OUT OF SYNC  {line}")
    print("in sync: package, README and notebook metadata" if not found else "run: python -m tests.sync --fix")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
