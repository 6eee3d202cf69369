"""What Quarto cannot do by itself: run by `_quarto.yml` before (`prepare`) and after (`finish`) a rendering.

prepare: copy plotly.js out of the installed package, so that the site needs no other server.
finish:  the home page is `nbs/index.html`; a page at the top sends readers there.
"""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REDIRECT = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=nbs/index.html"><a href="nbs/index.html">MLOps Workbench</a>\n'


def prepare() -> None:
    with (
        (files("plotly") / "package_data" / "plotly.min.js").open("rb") as source,
        (ROOT / "nbs" / "plotly.min.js").open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def finish(site: Path = ROOT / "_site") -> None:
    if (site / "nbs" / "index.html").exists():
        (site / "index.html").write_text(REDIRECT, encoding="utf-8")


if __name__ == "__main__":
    {"prepare": prepare, "finish": finish}[sys.argv[1]]()
