"""What every notebook must keep to: the shape that makes it a page, a module and something that a reviewer can read."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from tests import notebooks

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "nbs" / "api"
PAGES = notebooks.lesson_notebooks()
MODULES = [p for p in PAGES if API in p.parents]
ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STEPS = [p for p in ALL if (ROOT / "nbs" / "pipelines") in p.parents]

CELL_LINES, CLASS_LINES = 60, 100  # an exported cell, one that holds a class: more is worth a warning
CELL_CAP, CLASS_CAP, BODY_LINES = 110, 250, 50  # more than this fails; the last is for the body of one function
WORDS_PER_LINE = 1.2  # of prose, for each exported line
PRIVATE_PATHS = sorted({"/root/", f"{Path.home()}/", f"{ROOT}/"} - {"//"})
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def directives(cell: Any) -> set[str]:
    return set(re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.MULTILINE)) if cell.cell_type == "code" else set()


def body(cell: Any) -> str:
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))


def tree(cell: Any) -> list[ast.stmt]:
    """The statements of a cell; magics are not Python and count as none."""
    try:
        return ast.parse(body(cell)).body
    except SyntaxError:
        return []


def exported(cell: Any) -> bool:
    return bool(directives(cell) & {"export", "exports", "exporti"})


def only_imports(cell: Any) -> bool:
    def imports(statements: list[ast.stmt]) -> bool:
        return all(
            isinstance(s, (ast.Import, ast.ImportFrom)) or (isinstance(s, ast.If) and imports(s.body))
            for s in statements
        )

    return imports(tree(cell))


def only_private(cell: Any) -> bool:
    """Helpers of what stands just above them: the words there are about both."""
    return all(isinstance(s, DEFINITIONS) and s.name.startswith("_") for s in tree(cell))


def code_lines(cell: Any) -> int:
    return sum(bool(line.strip()) for line in body(cell).splitlines())


def module_of(path: Path) -> str:
    parts = path.relative_to(API).with_suffix("").parts
    return ".".join([*parts[:-1], "__init__"] if parts[-1] == "index" else parts)


def read(path: Path) -> list[Any]:
    return list(nbformat.read(path, as_version=4).cells)


api = pytest.mark.parametrize("path", MODULES, ids=name)
module = pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "index"], ids=name)
every = pytest.mark.parametrize("path", ALL, ids=name)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_first_cell_is_title_and_sentence(path: Path) -> None:
    first = read(path)[0]
    assert first.cell_type == "markdown"
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert len(lines) == 2 and re.match(r"# \S", lines[0]) and re.match(r"> \S.*[.!?]$", lines[1]), first.source


@api
def test_second_cell_names_the_module(path: Path) -> None:
    """One notebook, one module, at the place that its path says; nothing else in that cell."""
    assert read(path)[1].source.strip() == f"#| default_exp {module_of(path)}"


@api
def test_no_two_exports_in_a_row(path: Path) -> None:
    """Imports and private helpers need no words of their own; between two others stands a reason or a lesson."""
    last: int | None = None
    close = []
    for number, cell in enumerate(read(path)):
        if not exported(cell):
            last = None
        elif not only_imports(cell):
            if last is not None and not only_private(cell):
                close.append((last, number))
            last = number
    assert not close, f"exported cells with nothing between them: {close}"


@api
def test_exported_cells_are_small(path: Path) -> None:
    """A class stays whole in one cell, so it may be longer; what is long wants to be two, what is too long fails."""
    long, too_long = {}, {}
    for number, cell in enumerate(read(path)):
        has_class = any(isinstance(s, ast.ClassDef) for s in tree(cell))
        limit, cap = (CLASS_LINES, CLASS_CAP) if has_class else (CELL_LINES, CELL_CAP)
        if exported(cell) and code_lines(cell) > limit:
            (too_long if code_lines(cell) > cap else long)[number] = code_lines(cell)
    assert not too_long, f"cell: lines {too_long}; the limit is {CELL_CAP}, with a class {CLASS_CAP}"
    if long:
        warnings.warn(
            f"{name(path)}: long exported cells {long}; aim at {CELL_LINES}, with a class {CLASS_LINES}", stacklevel=1
        )


@api
def test_functions_are_short(path: Path) -> None:
    long = {}
    for cell in read(path):
        for node in ast.walk(ast.Module(tree(cell), [])) if exported(cell) else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                if lines > BODY_LINES:
                    long[node.name] = lines
    assert not long, f"function: lines of its body {long}; the limit is {BODY_LINES}"


@api
def test_little_is_hidden(path: Path) -> None:
    cells = read(path)
    hidden = [i for i, c in enumerate(cells) if "hide" in directives(c)]
    assert len(hidden) <= -(-len(cells) // 10), f"hidden: {hidden} of {len(cells)} cells"


@module
def test_more_words_than_code(path: Path) -> None:
    cells = read(path)
    words = sum(len(re.findall(r"\w+", c.source)) for c in cells if c.cell_type == "markdown")
    lines = sum(code_lines(c) for c in cells if exported(c))
    assert words >= WORDS_PER_LINE * lines, f"{words} words for {lines} exported lines"


@module
def test_lessons_keep_up_with_exports(path: Path) -> None:
    """At least one visible lesson that shows something for every two exported cells."""
    cells = read(path)
    exports = sum(exported(c) and not only_imports(c) for c in cells)
    lessons = sum(
        c.cell_type == "code"
        and not exported(c)
        and not directives(c) & {"hide", "default_exp"}
        and not only_imports(c)
        for c in cells
    )
    assert 2 * lessons >= exports, f"{lessons} lessons for {exports} exported cells"


@functools.cache
def imported_elsewhere() -> frozenset[str]:
    """Names that modules of the package import from each other: those have their lesson where they are put to use."""
    files = (ROOT / "mlops_workbench").rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return frozenset(alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names)


@module
def test_public_names_are_used(path: Path) -> None:
    """Each public function and class appears in another visible place of its page, or is what another module builds on."""
    cells = read(path)
    unused = []
    for cell in cells:
        if not exported(cell):
            continue
        visible = "\n".join(c.source for c in cells if c.cell_type == "code" and "hide" not in directives(c))
        public = [s.name for s in tree(cell) if isinstance(s, DEFINITIONS) and not s.name.startswith("_")]
        unused += [n for n in public if len(re.findall(rf"\b{n}\b", visible)) < 2 and n not in imported_elsewhere()]
    assert path.stem in ("errors", "cli") or not unused  # errors are a list; commands are used by typing them


@every
def test_size(path: Path) -> None:
    assert path.stat().st_size <= notebooks.SIZE_CAP


@every
def test_no_private_paths(path: Path) -> None:
    """Neither in code nor in a stored output: the folders of the machine that ran it are wrong for everybody else."""
    text = path.read_text(encoding="utf-8")
    assert not [private for private in PRIVATE_PATHS if re.search(rf"(?<![\w.]){re.escape(private)}", text)]


@every
def test_no_stored_errors(path: Path) -> None:
    bad = [i for i, c in enumerate(read(path)) if any(o["output_type"] == "error" for o in c.get("outputs", []))]
    assert not bad, "a page that stops with a traceback"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "pipelines").glob("*/pipeline.yml")), ids=name)
def test_steps_are_declared_and_take_parameters(path: Path) -> None:
    """Every notebook of a case is a step of its pipeline and has one cell that papermill can replace."""
    steps = yaml.safe_load(path.read_text(encoding="utf-8"))["steps"]
    rows = steps.values() if isinstance(steps, dict) else steps
    declared = {(path.parent / row["notebook"]).resolve() for row in rows}
    present = {p.resolve() for p in path.parent.rglob("*.ipynb")}
    assert declared == present
    for notebook in sorted(declared):
        tagged = [c for c in read(notebook) if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1, name(notebook)
        split = [s.lineno for s in tree(tagged[0]) if s.lineno != s.end_lineno]
        assert not split, f"{name(notebook)}: papermill reads parameters line by line; shorten lines {split}"
        assert all(isinstance(s, (ast.AnnAssign, ast.Import, ast.ImportFrom)) for s in tree(tagged[0])), (
            f"{name(notebook)}: parameters need annotations, papermill takes types from them"
        )
