"""Make a page of a notebook. Quarto calls this for each one: JSON on standard input, JSON on standard output.

It is nbdev's filter with a few differences, because these notebooks are read for their code as well as their prose.
The source of an exported cell, whose comments document the parameters, stays on the page, foldable. Before it stands
an entry for each name it defines: a heading to link to, what it is for, and its methods. The entries are read from the
source, so making a page executes nothing. Names in backticks link by the package's own index, from the top of the
project, so that the site works under any address. And the title needs no file name, which Quarto does not tell.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from fastcore.nbio import dict2nb, mk_cell, nb2str
from nbdev import processors
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import Processor

ROOT = Path(__file__).resolve().parents[1]
BACKTICKS = re.compile(r"(?<!\[)`([A-Za-z_][\w.]*)(\(\))?`(?!\])")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def links() -> dict[str, str]:
    """Where each public name is documented; a name that two modules define has no link rather than a wrong one."""
    index = ast.literal_eval((ROOT / "mlops_workbench" / "_modidx.py").read_text(encoding="utf-8").split("d = ", 1)[1])
    found: dict[str, set[str]] = {}
    for module, symbols in index["syms"].items():
        if module == "mlops_workbench.cli":  # commands have the names of what they call
            continue
        for symbol, (page, _) in symbols.items():
            name = symbol.removeprefix(f"{module}.")
            target = f"/nbs/{page}".replace(".html#", ".ipynb#")
            if not any(part.startswith("_") for part in name.split(".")):
                found.setdefault(name, set()).add(target)
                found.setdefault(symbol.removeprefix("mlops_workbench."), set()).add(target)
    return {name: targets.pop() for name, targets in found.items() if len(targets) == 1}


def linked(markdown: str, targets: dict[str, str]) -> str:
    """`markdown` with each known name in backticks made a link; fenced blocks and headings stay as they are."""

    def link(match: re.Match[str]) -> str:
        target = targets.get(match[1])
        return f"[{match[0]}]({target})" if target else match[0]

    lines, fenced = [], False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        lines.append(line if fenced or line.startswith(("#", "    ")) else BACKTICKS.sub(link, line))
    return "\n".join(lines)


class PageTitle(FrontmatterProc):  # type: ignore[misc]
    "The first cell becomes title and description; a page with plots loads plotly.js, once, from the site itself."

    def end(self) -> None:
        self.nb.frontmatter_ = self.fm
        front = "".join(f"{key}: {json.dumps(str(value), ensure_ascii=False)}\n" for key, value in self.fm.items())
        if "Plotly.newPlot" in str([cell.get("outputs") for cell in self.nb.cells]):
            here = os.path.relpath(ROOT / "nbs", Path.cwd())  # Quarto calls a filter in the folder of the notebook
            script = json.dumps(f'<script src="{here}/plotly.min.js"></script>')
            front += f"include-in-header:\n  - text: {script}\n"
        self.nb.cells.insert(0, mk_cell(f"---\n{front}---\n", "raw"))


def sentence(node: ast.AST) -> str:
    """What the first paragraph of a docstring says."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())  # type: ignore[arg-type]


def entry(node: ast.AST) -> str:
    """The reference entry of one definition, with an anchor for it and for each public method."""
    name: str = node.name  # type: ignore[attr-defined]
    lines = [f"### {name} {{#{name.lower()}}}", sentence(node)]
    if isinstance(node, ast.ClassDef):
        methods = [m for m in node.body if isinstance(m, DEFINITIONS) and not m.name.startswith("_")]
        lines.append(
            "\n".join(f"- [`{m.name}`]{{#{name.lower()}.{m.name.lower()}}} {sentence(m)}".rstrip() for m in methods)
        )
    return "\n\n".join(line for line in lines if line)


class ReferenceThenSource(Processor):  # type: ignore[misc]
    "Keep the source of a cell that defines something, and put an entry for each of its public names before it."

    def begin(self) -> None:
        for cell in reversed(list(self.nb.cells)):
            if cell.cell_type != "code" or "export" not in cell.directives_ or "hide" in cell.directives_:
                continue
            tree = cell.parsed_() or []
            if any(isinstance(t, (*DEFINITIONS, ast.Assign, ast.AnnAssign)) for t in tree):
                cell.directives_["exports"] = cell.directives_.pop("export")  # nbdev's word for an export that is shown
            entries = [entry(t) for t in tree if isinstance(t, DEFINITIONS) and not t.name.startswith("_")]
            if entries:
                self.nb.cells.insert(cell.idx_, mk_cell("\n\n".join(entries), "markdown"))


class NameLinks(Processor):  # type: ignore[misc]
    "Link names in backticks, in prose and in Markdown that a cell displays."

    def begin(self) -> None:
        targets = links()
        for cell in self.nb.cells:
            if cell.cell_type == "markdown" and cell.get("source"):
                cell.source = linked(cell.source, targets)
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/markdown" in data:
                    text = data["text/markdown"]
                    data["text/markdown"] = linked(text if isinstance(text, str) else "".join(text), targets)


class PageFilter(processors.FilterDefaults):  # type: ignore[misc]
    "nbdev's processors in nbdev's order, three of them exchanged for those above."

    def base_procs(self) -> list[Any]:
        exchange = {"FrontmatterProc": PageTitle, "add_show_docs": ReferenceThenSource, "add_links": NameLinks}
        dropped = ("mv_exports", "insert_warning", "exec_show_docs", "clean_show_doc")
        return [exchange.get(p.__name__, p) for p in super().base_procs() if p.__name__ not in dropped]


def page(notebook: str) -> str:
    """The notebook as Quarto should see it, JSON to JSON."""
    content = dict2nb(json.loads(notebook))
    with redirect_stdout(io.StringIO()):
        PageFilter()(content)
    content.cells = [cell for cell in content.cells if cell.get("source") is not None]
    for cell in content.cells:  # directives that only nbdev understands
        cell.source = re.sub(r"^#\| (export|exports|eval): \w+\n", "", cell.source, flags=re.MULTILINE)
    return str(nb2str(content))


if __name__ == "__main__":
    sys.stdout.write(page(sys.stdin.read()))
