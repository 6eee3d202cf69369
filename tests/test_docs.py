"""The documentation site, checked without Quarto: its list of pages, its links, and what the filter makes of a notebook."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from tests import notebooks

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
PAGES = [p.relative_to(ROOT).as_posix() for p in notebooks.lesson_notebooks()]
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


def listed(contents: Any) -> list[str]:
    """Every file that a sidebar or navbar names, in order."""
    if isinstance(contents, str):
        return [contents]
    if isinstance(contents, list):
        return [name for item in contents for name in listed(item)]
    return ([contents["href"]] if "href" in contents else []) + listed(contents.get("contents", []))


SIDEBAR = listed(SITE["website"]["sidebar"]["contents"])


@functools.cache
def rendered() -> list[str]:
    """The files that the `render` patterns select, as Quarto reads them: `**` is any number of folders."""
    found = set()
    for pattern in SITE["project"]["render"]:
        found |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern.lstrip("/"))}
    return sorted(f for f in found if ".ipynb_checkpoints" not in f)


def test_render_selects_exactly_the_pages() -> None:
    """Steps and dashboards need a pipeline or a person: they are not pages."""
    assert all("/" in pattern for pattern in SITE["project"]["render"]), "a bare pattern also matches in subfolders"
    assert [f for f in rendered() if f.endswith(".ipynb")] == sorted(PAGES)


def test_sidebar_lists_every_page_once() -> None:
    assert sorted(f for f in SIDEBAR if f.endswith(".ipynb")) == sorted(PAGES)


def test_listed_files_exist_and_are_rendered() -> None:
    navbar = listed(SITE["website"]["navbar"]["left"])
    missing = [f for f in SIDEBAR + navbar if f not in rendered()]
    assert not missing


def test_sidebar_goes_bottom_up() -> None:
    """A page uses only what earlier pages explained: the order of floors is the import linter's, upside down."""
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    height = {
        name.strip().removeprefix("mlops_workbench."): i
        for i, row in enumerate(reversed(layers))
        for name in row.split("|")
    }
    floors = [
        Path(f).relative_to("nbs/api").parts[0].removesuffix(".ipynb") for f in SIDEBAR if f.startswith("nbs/api/")
    ]
    heights = [height[f] for f in floors if f != "index"]
    assert heights == sorted(heights)


def imported(module: Path) -> set[str]:
    """The modules of this package that a generated file imports, by dotted name without the package."""
    package = ["mlops_workbench", *module.relative_to(ROOT / "mlops_workbench").parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("mlops_workbench.") for name in found}


def test_a_page_comes_after_those_it_builds_on() -> None:
    """Inside a floor too: a reader who goes down the sidebar meets nothing that was not explained."""
    order = [
        f.removeprefix("nbs/api/").removesuffix(".ipynb").replace("/", ".") for f in SIDEBAR if f.startswith("nbs/api/")
    ]
    place = {name: i for i, name in enumerate(order) if not name.endswith("index")}
    modules = {name: ROOT / "mlops_workbench" / (name.replace(".", "/") + ".py") for name in place}
    early = [
        f"{name} before {used}"
        for name, file in modules.items()
        if file.exists()
        for used in imported(file) & place.keys()
        if place[used] > place[name]
    ]
    assert not early


def test_public_names_are_unique() -> None:
    """A name in backticks means one thing, wherever it stands. Commands bear the names of what they call: no page links to them."""
    homes: dict[str, list[str]] = {}
    for module, symbols in modidx()["syms"].items():
        for symbol in symbols:
            name = symbol.removeprefix(f"{module}.")
            if "." not in name and not name.startswith("_") and module != "mlops_workbench.cli":
                homes.setdefault(name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_execution_is_off_and_the_scripts_exist() -> None:
    assert SITE["execute"]["enabled"] is False
    project = SITE["project"]
    for command in [*SITE["ipynb-filters"], project["pre-render"], project["post-render"]]:
        assert (ROOT / command.split()[0]).exists(), command
    for style in [name for theme in SITE["format"]["html"]["theme"].values() for name in theme if "/" in name]:
        assert (ROOT / style).exists(), style


@functools.cache
def prose(path: Path) -> str:
    """The Markdown of a file without its code: fenced blocks and spans in backticks hold no links."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


@functools.cache
def headings(path: Path) -> set[str]:
    """The anchors of a page, as pandoc makes them, with the names that its module defines."""
    text = (
        prose(path)
        if path.suffix != ".ipynb"
        else "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    )
    found = set()
    for title in re.findall(r"^#+\s+(.+?)\s*$", text, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\s.-]", "", title.replace("`", "").lower())
        found.add(re.sub(r"\s+", "-", plain).lstrip("0123456789-."))
    return found | {symbol.lower() for symbol in defined(path)}


def defined(path: Path) -> set[str]:
    page = path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix() if (ROOT / "nbs") in path.parents else ""
    return {
        target.split("#")[1]
        for symbols in modidx()["syms"].values()
        for target, _ in symbols.values()
        if target.startswith(f"{page}#")
    }


def modidx() -> dict[str, Any]:
    from mlops_workbench._modidx import d

    return d


@pytest.mark.parametrize("name", [*PAGES, "README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_resolve(name: str) -> None:
    """To files that exist, anchors that exist, and from the site only to pages of the site."""
    path = ROOT / name
    broken = []
    for match in LINK.finditer(prose(path)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        base = ROOT if file.startswith("/") else path.parent
        there = (base / file.lstrip("/")).resolve() if file else path
        page = there.suffix in (".ipynb", ".md") and name != "README.md"
        off_site = page and there.exists() and there.relative_to(ROOT).as_posix() not in rendered()
        if (
            not there.exists()
            or off_site
            or (anchor and there.suffix in (".ipynb", ".md") and anchor not in headings(there))
        ):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize(
    "folder", sorted({Path(p).parent.as_posix() for p in PAGES if p.count("/") == 3 and p.startswith("nbs/api/")})
)
def test_the_page_of_a_floor_names_its_modules(folder: str) -> None:
    text = prose(ROOT / folder / "index.ipynb")
    missing = [
        p
        for p in PAGES
        if Path(p).parent.as_posix() == folder and Path(p).stem != "index" and f"({Path(p).name})" not in text
    ]
    assert not missing


def test_modidx_points_at_pages() -> None:
    """nbdev's index says where each name is documented: the page exists, is rendered, and defines the name."""
    wrong = []
    for symbols in modidx()["syms"].values():
        for symbol, (target, module) in symbols.items():
            page, anchor = target.split("#")
            notebook = f"nbs/{page.removesuffix('.html')}.ipynb"
            if notebook not in PAGES or not symbol.lower().endswith(anchor) or not (ROOT / module).exists():
                wrong.append(symbol)
    assert not wrong
    modules = {
        f"mlops_workbench.{p.removeprefix('nbs/api/').removesuffix('.ipynb').replace('/', '.')}"
        for p in PAGES
        if p.startswith("nbs/api/") and not p.endswith("index.ipynb")
    }
    assert set(modidx()["syms"]) <= modules


def run_filter(notebook: Path) -> Any:
    """As Quarto does it: JSON in, JSON out, in the folder of the notebook."""
    command = [sys.executable, str(ROOT / SITE["ipynb-filters"][0])]
    done = subprocess.run(
        command, input=notebook.read_text(encoding="utf-8"), capture_output=True, text=True, cwd=notebook.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = nbformat.reads(done.stdout, as_version=4)
    nbformat.validate(page)
    return page


@pytest.mark.process
def test_filter_makes_a_page() -> None:
    """Title and description, an entry before the source of an export, links by name, nothing hidden, outputs kept."""
    page = run_filter(ROOT / "nbs/api/workspace/references.ipynb")
    front = yaml.safe_load(page.cells[0].source.strip().strip("-"))
    assert page.cells[0].cell_type == "raw" and front["title"] == "references" and "one name" in front["description"]

    sources = [c.source for c in page.cells]
    shown = [i for i, s in enumerate(sources) if "def parse_reference(" in s]
    assert len(shown) == 1 and "code-fold: show" in sources[shown[0]]
    entry = page.cells[shown[0] - 1]
    assert entry.cell_type == "markdown" and entry.source.startswith(
        "### parse_reference {#parse_reference}\n\nRead a reference."
    )
    assert "[`ReferenceFormatError`](/nbs/api/errors.ipynb#referenceformaterror)" in entry.source
    assert any("- [`at`]{#reference.at} The same object at another version." in s for s in sources)

    assert not [s for s in sources if re.search(r"^#\| *(hide|default_exp|export)", s, flags=re.MULTILINE)]
    assert any("[`parse_reference`](/nbs/api/workspace/references.ipynb#parse_reference)" in s for s in sources)
    lesson = next(c for c in page.cells if c.cell_type == "code" and "loans.resolved" in c.source)
    assert "dataset:loans@3" in json.dumps(lesson.outputs)


@functools.cache
def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "nbs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_the_anchors_that_the_index_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter works on every notebook, and each public name and method can be linked to."""
    monkeypatch.chdir((ROOT / name).parent)
    page = json.loads(load_script("quarto_filter").page((ROOT / name).read_text(encoding="utf-8")))
    anchors = set(
        re.findall(
            r"\{#([\w.]+)\}", "".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
        )
    )
    html = name.removeprefix("nbs/").replace(".ipynb", ".html")
    index = [
        symbol.removeprefix(f"{module}.")
        for module, symbols in modidx()["syms"].items()
        for symbol, (target, _) in symbols.items()
        if target.startswith(f"{html}#")
    ]
    public = {symbol.lower() for symbol in index if not any(part.startswith("_") for part in symbol.split("."))}
    assert public == anchors


@pytest.mark.process
def test_plotly_comes_from_the_site(tmp_path: Path) -> None:
    """A page with a plot loads plotly.js from the site's own copy, by a path relative to the page; other pages do not."""
    folder = ROOT / "nbs" / "api" / "workspace"
    notebook = nbformat.read(folder / "references.ipynb", as_version=4)
    assert "plotly" not in json.dumps(run_filter(folder / "references.ipynb").cells[0])
    output = nbformat.v4.new_output(
        "display_data", {"text/html": "<div id='a'></div><script>Plotly.newPlot('a', [])</script>"}
    )
    notebook.cells.append(nbformat.v4.new_code_cell("plot", outputs=[output]))
    done = subprocess.run(
        [sys.executable, str(ROOT / SITE["ipynb-filters"][0])],
        input=nbformat.writes(notebook),
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    front = yaml.safe_load("".join(json.loads(done.stdout)["cells"][0]["source"]).strip().strip("-"))
    assert front["include-in-header"] == [{"text": '<script src="../../plotly.min.js"></script>'}]
    assert any(fnmatch("nbs/plotly.min.js", pattern) for pattern in SITE["project"]["resources"])
    stored = "".join((ROOT / p).read_text(encoding="utf-8") for p in PAGES)
    assert "cdn.plot.ly" not in stored and "cdn.jsdelivr" not in stored


def test_site_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """plotly.js is copied whole, and the top of the site leads to the home page."""
    site = load_script("quarto_site")
    (tmp_path / "nbs").mkdir()
    monkeypatch.setattr(site, "ROOT", tmp_path)
    site.prepare()
    assert b"plotly.js v" in (tmp_path / "nbs" / "plotly.min.js").read_bytes()[:200]
    site.finish(tmp_path)
    assert not (tmp_path / "index.html").exists()  # nothing was rendered, so there is nothing to lead to
    (tmp_path / "nbs" / "index.html").touch()
    site.finish(tmp_path)
    assert "url=nbs/index.html" in (tmp_path / "index.html").read_text()
