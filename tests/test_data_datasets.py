"""Datasets: what is saved is saved whole, once and for ever; names move, versions do not; several processes may save at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from mlops_workbench.data.contract_store import ContractStore
from mlops_workbench.data.datasets import Datasets
from mlops_workbench.data.sources import Sql
from mlops_workbench.errors import (
    ContractBrokenError,
    ContractError,
    NotAuthorisedError,
    ReferenceFormatError,
    TableError,
    UnknownReferenceError,
    WorkbenchError,
)
from mlops_workbench.workspace.audit import verify
from mlops_workbench.workspace.clock import FixedClock
from mlops_workbench.workspace.folders import Workspace

OURS = ["contract.*", "dataset.*", "lineage.*"]


@pytest.fixture
def workspace() -> Workspace:
    return Workspace.temporary("data", clock=FixedClock("2026-01-05T09:00:00Z", step=timedelta(seconds=1)))


@pytest.fixture
def datasets(workspace: Workspace) -> Datasets:
    return Datasets(workspace)


def table(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": np.arange(n) + 1000 * seed,
            "amount": rng.normal(100, 15, n),
            "place": rng.choice(["north", "south"], n),
            "paid": rng.integers(0, 2, n),
        }
    )


def trail(workspace: Workspace) -> list[tuple[str, str]]:
    return [(e.kind, e.subject) for e in workspace.events.read(kind=OURS)]


# ── versions ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fast
def test_a_version_never_changes_and_equal_content_is_one(datasets: Datasets) -> None:
    one = datasets.save("sales", table(seed=1), target="paid", owner="shop")
    two = datasets.save("sales", table(seed=2))
    kept = datasets.save("sales", table(seed=2))
    back = datasets.save("sales", table(seed=1))  # only the latest counts as "already there"
    assert [s.version for s in (one, two, kept, back)] == [1, 2, 2, 3]
    assert [s.created for s in (one, two, kept, back)] == [True, True, False, True]
    assert one.digest == back.digest and one.target == two.target == "paid" and two.owner == "shop"
    for version, seed in ((1, 1), (2, 2), (3, 1)):
        frame = datasets.load(f"sales@{version}")
        pd.testing.assert_frame_equal(frame, table(seed=seed))
        assert frame.attrs == {"reference": f"dataset:sales@{version}"}
    assert [s.version for s in datasets.versions("sales")] == [1, 2, 3] and datasets.names() == ["sales"]


@pytest.mark.fast
def test_later_words_about_equal_content_are_kept(datasets: Datasets) -> None:
    datasets.save("sales", table())
    again = datasets.save("sales", table(), target="paid", owner="shop")
    assert (again.created, again.target, again.owner) == (False, "paid", "shop")
    assert (datasets.snapshot("sales@1").target, datasets.snapshot("sales@1").owner) == ("paid", "shop")
    said = [k for k, _ in trail(datasets.workspace)]
    datasets.save("sales", table(), target="paid")
    assert [k for k, _ in trail(datasets.workspace)] == said and said.count("dataset.described") == 1


@pytest.mark.fast
def test_append_is_judged_on_the_new_rows_and_on_the_whole(datasets: Datasets) -> None:
    datasets.save("sales", table(1000, seed=1))
    grown = datasets.save("sales", table(100, seed=2), append=True)
    assert grown.rows == 1100 and grown.valid
    other = table(100, seed=3).assign(amount=lambda d: d.amount + 30, place="north", paid=1)
    moved = datasets.save("sales", other, append=True)
    assert not moved.valid and datasets.verdict(moved)["reference"] == "dataset:sales@2"
    assert [f["rule"] for f in datasets.verdict(moved)["failures"]] == ["max_drifted"]
    assert not datasets.validate(moved, enforce=False).ok  # the same question later has the same answer
    twice = datasets.save("sales", table(50, seed=1), append=True)
    assert "unique" in [f["rule"] for f in datasets.verdict(twice)["failures"]]  # ids that the whole has already
    with pytest.raises(TableError):
        datasets.save("sales", table(5, seed=9).drop(columns="place"), append=True)


@pytest.mark.fast
def test_a_broken_version_is_no_yardstick(datasets: Datasets) -> None:
    datasets.save("sales", table(300, seed=1))
    broken = datasets.save("sales", table(300, seed=2).assign(amount=1e9, place="north", paid=0))
    repaired = datasets.save("sales", table(300, seed=3))
    assert not broken.valid and repaired.valid
    assert datasets.verdict(repaired)["reference"] == "dataset:sales@1"


@pytest.mark.fast
def test_names_move_and_can_be_asked_as_of_a_moment(datasets: Datasets, workspace: Workspace) -> None:
    for seed in (1, 2, 3):
        datasets.save("sales", table(seed=seed), tags=["golden"] if seed < 3 else [])
    before = workspace.clock.now()
    datasets.tag("sales@3", "golden")
    datasets.untag("sales", "golden")
    datasets.tag("sales@1", "golden")
    datasets.tag("sales@1", "golden")  # said once
    assert datasets.tags("sales", at=before) == {"golden": 2} and datasets.tags("sales") == {"golden": 1}
    assert str(datasets.resolve("dataset:sales@golden")) == "dataset:sales@1" and datasets.snapshot(
        "sales@golden"
    ).tags == ("golden",)
    assert [e.body for e in workspace.events.read(kind="dataset.tagged")] == [
        {"tag": "golden", "version": v} for v in (1, 2, 3, None, 1)
    ]
    for wrong in ("latest", "7", "a b", ""):
        with pytest.raises(ReferenceFormatError):
            datasets.tag("sales@1", wrong)
    for unknown in ("sales@9", "sales@silver", "sale"):
        with pytest.raises(UnknownReferenceError):
            datasets.load(unknown)
    with pytest.raises(UnknownReferenceError):
        datasets.untag("sales", "silver")


@pytest.mark.fast
def test_a_branch_leaves_the_main_line_alone(datasets: Datasets) -> None:
    datasets.save("sales", table(seed=1))
    first = datasets.save("sales", table(seed=2), branch="trial")
    second = datasets.save("sales", table(seed=3), branch="trial")
    assert (
        first.version,
        second.version,
        datasets.resolve("sales").version,
        datasets.resolve("sales@trial").version,
    ) == (2, 3, 1, 3)
    assert datasets.verdict(second)["reference"] == "dataset:sales@2"
    with pytest.raises(TableError, match="another branch"):
        datasets.save("sales", table(20, seed=4), append=True)
    grown = datasets.save("sales", table(20, seed=4), append=True, branch="trial")
    assert grown.rows == 220
    merged = datasets.save("sales", datasets.load("sales@trial"))
    assert not merged.created and datasets.resolve("sales").version == grown.version


# ── what may not be saved ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fast
def test_nothing_is_left_of_a_save_that_failed(
    datasets: Datasets, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary.csv").write_bytes(b"\x00\x01\x02")
    bad: list[tuple[Any, dict[str, Any]]] = [
        (table(0), {}), (tmp_path / "empty.csv", {}), (tmp_path / "binary.csv", {}), (tmp_path / "none.csv", {}), (table().assign(paid=1), {"target": "paid"}),
        (table(), {"target": "pade"}), (table().assign(amount=["x", *range(199)]), {}), (table(), {"tags": ["latest"]}), (table(), {"personal": ["nobody"]}),
        (table(), {"parents": ["dataset:unknown@1"]}), (table().assign(z=[1 + 2j] * 200), {}),
    ]  # fmt: skip
    for data, options in bad:
        with pytest.raises(WorkbenchError):
            datasets.save("sales", data, **options)
    with pytest.raises(ReferenceFormatError):
        datasets.save("two words", table())
    monkeypatch.setattr(ContractStore, "record", lambda *a, **k: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        datasets.save("sales", table())
    assert trail(workspace) == [] and datasets.names() == [] and not list((workspace.root / "contracts").iterdir())
    assert not list(workspace.path("tables").rglob("*.parquet"))
    monkeypatch.undo()
    assert datasets.save("sales", table()).version == 1


@pytest.mark.fast
def test_enforcing_stops_before_anything_is_written(datasets: Datasets, workspace: Workspace) -> None:
    datasets.save("sales", table(seed=1))
    before = trail(workspace)
    broken = table(seed=2).assign(amount=-5.0, place="moon").drop(columns="paid")
    with pytest.raises(ContractBrokenError) as caught:
        datasets.save("sales", broken, enforce=True)
    assert {f.column for f in caught.value.failures} >= {"amount", "place", "paid"} and trail(workspace) == before
    marked = datasets.save("sales", broken)
    assert not marked.valid
    with pytest.raises(ContractBrokenError):
        datasets.validate(marked)
    assert datasets.validate("sales@1").ok
    assert [e.body["ok"] for e in workspace.events.read(kind="dataset.validated")] == [True, False, False, True]


@pytest.mark.fast
def test_a_broken_contract_file_stops_a_save(datasets: Datasets, workspace: Workspace) -> None:
    datasets.save("sales", table(seed=1))
    path = datasets.contracts.path("sales")
    good = path.read_text()
    for text in (good.replace("max_missing", "max_mising"), good.replace("name: sales", "name: wages"), "", "a: ["):
        path.write_text(text)
        with pytest.raises(ContractError):
            datasets.save("sales", table(seed=2))
    assert [s.version for s in datasets.versions("sales")] == [1]
    path.unlink()  # lost: it comes back from the events
    assert datasets.save("sales", table(seed=2)).contract == "contract:sales@1" and path.read_text() == good
    path.write_text(good.replace("extra_columns: false", "extra_columns: true"))
    third = datasets.save("sales", table(seed=3).assign(more=1))
    assert (
        third.valid
        and third.contract == "contract:sales@2"
        and datasets.verdict("sales@1")["contract"] == "contract:sales@1"
    )
    with pytest.raises(ContractError, match="personal"):
        datasets.save("sales", table(seed=4), personal=["place"])


@pytest.mark.fast
def test_every_change_asks_for_authority(
    datasets: Datasets, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.save("sales", table())
    asked: list[str] = []

    def refuse(action: str, reference: object) -> None:
        asked.append(action)
        raise NotAuthorisedError("no", action=action)

    monkeypatch.setattr(workspace, "authorise", refuse)
    before = trail(workspace)
    verbs = [lambda: datasets.save("sales", table(seed=2)), lambda: datasets.tag("sales", "x"), lambda: datasets.validate("sales"), lambda: datasets.erase("sales", "id", [1]),
             lambda: datasets.register("far", "delta://x", snapshot=1, schema=table()), lambda: datasets.resume_erasures()]  # fmt: skip
    for verb in verbs:
        with pytest.raises(NotAuthorisedError):
            verb()
    assert (
        asked == ["data.save", "data.tag", "data.validate", "data.erase", "data.register", "data.erase"]
        and trail(workspace) == before
    )


# ── provenance ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fast
def test_the_trail_holds_no_secret_no_value_and_no_path_of_this_machine(
    datasets: Datasets, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{workspace.root}/bank.db"
    people = table().assign(
        surname=[f"Unseen{i % 50}" for i in range(200)], amount=lambda d: d.amount.where(d.index != 7, -98765.5)
    )
    people.to_sql("t", sa.create_engine(url), index=False)
    monkeypatch.setenv("MLWB_SECRET_BANK", url)
    datasets.save(
        "people",
        Sql("secret:BANK", "SELECT * FROM t WHERE surname <> 'Hidden Name'"),
        personal=["surname"],
        owner="shop",
    )
    people.assign(paid=0).to_csv(workspace.root / "people.csv", index=False)
    datasets.contracts.path("people").write_text(
        datasets.contracts.path("people").read_text().replace("personal: true", "personal: true\n    pattern: '[a-z]+'")
    )
    second = datasets.save("people", workspace.root / "people.csv")
    assert not second.valid
    written = json.dumps([e.body for e in workspace.events.read()])
    for secret in ("Unseen", "Hidden", "98765.5", str(workspace.root), str(Path.home()) + "/"):
        assert secret not in written.replace("seen -98765.5", ""), secret
    assert "secret:BANK" in written and "people.csv" in written


@pytest.mark.fast
def test_lineage_is_recorded_without_being_asked_for(datasets: Datasets, workspace: Workspace) -> None:
    table().to_csv(workspace.root / "in.csv", index=False)
    datasets.save("raw", workspace.root / "in.csv", tags=["golden"])
    clean = datasets.load("raw@golden").query("amount > 90").assign(ratio=1.0)
    datasets.save("clean", clean)
    datasets.save(
        "features",
        table(seed=5),
        parents=["dataset:clean", "dataset:raw@golden"],
        activity="run:01JGT9Z5T0ZZZZZZZZZZZZZZZZ",
    )
    edges = {(e.input.split("-")[0], e.output) for e in datasets.built_from("raw").edges}
    assert edges == {
        ("dataset:raw@1", "dataset:clean@1"),
        ("dataset:clean@1", "dataset:features@1"),
        ("dataset:raw@1", "dataset:features@1"),
    }
    assert any(n.startswith("source:in.csv-") for n in workspace.lineage.graph("dataset:features@1", "up").nodes)
    assert datasets.built_from("features").edges == ()


@pytest.mark.fast
def test_forgetting_reaches_every_version_and_says_nobodys_name(datasets: Datasets, workspace: Workspace) -> None:
    datasets.save("sales", table(seed=1))
    datasets.save("sales", table(50, seed=2), append=True)
    datasets.erase("sales", "id", [1003, 2001])
    assert all(not set(datasets.load(f"sales@{v}").id) & {1003, 2001} for v in (1, 2))
    assert datasets.snapshot("sales@1").erased and datasets.snapshot("sales@2").rows == 248
    (event,) = workspace.events.read(kind="dataset.erased")
    assert event.body["rows"] == 2 and event.body["versions"] == [1, 2] and "1003" not in json.dumps(event.body)
    assert datasets.validate("sales@2").ok
    with pytest.raises(WorkbenchError):
        datasets.erase("sales", "nobody", [1])
    with pytest.raises(UnknownReferenceError):
        datasets.erase("sale", "id", [1])


@pytest.mark.fast
def test_by_reference(datasets: Datasets, tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "far.parquet")
    far = datasets.register(
        "far", f"file://{tmp_path}/far.parquet", snapshot="a", schema=table(2), rows=200, owner="web", target="paid"
    )
    assert (
        far.created
        and not datasets.register("far", f"file://{tmp_path}/far.parquet", snapshot="a", schema=table(2)).created
    )
    pd.testing.assert_frame_equal(far.to_pandas(), table())
    near = datasets.save("far", table(seed=3))  # a copy on top of it
    assert near.version == 2 and near.target == "paid"
    for bad in (
        {"uri": "s3://u:pw@b/x.parquet", "snapshot": 1, "schema": table(2)},
        {"uri": "s3://b/x.parquet", "snapshot": 1, "schema": table(2), "target": "pade"},
    ):
        with pytest.raises(WorkbenchError) as caught:
            datasets.register("other", **bad)
        assert "pw" not in str(caught.value)


@pytest.mark.fast
def test_diff(datasets: Datasets) -> None:
    datasets.save("sales", table(400, seed=1))
    datasets.save("sales", table(400, seed=1).assign(amount=lambda d: d.amount * 2, extra=1))
    found = datasets.diff("sales@1", keys=["id"])
    assert (
        found.drifted == ["amount"]
        and found.table.changes["amount"] == 400
        and found.table.columns_added
        and not found.equal
    )
    assert datasets.diff("sales@1", "sales@1").equal
    json.dumps(found.to_dict())
    assert "amount" in found._repr_html_()


def test_the_same_on_sqlite_and_postgresql(any_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLWB_SECRET_STORE", any_database_url)
    monkeypatch.setenv("MLWB__STORAGE__DATABASE", "secret:STORE")
    workspace = Workspace.temporary("both")
    datasets = Datasets(workspace)
    datasets.save("sales", table(seed=1), target="paid", tags=["golden"])
    datasets.save("sales", table(seed=2), append=True)
    path = datasets.contracts.path("sales")
    path.write_text(path.read_text().replace("max_drifted: 0.5", "max_drifted: 0.9"))
    datasets.save("sales", table(seed=3))
    datasets.tag("sales@3", "golden")
    datasets.erase("sales", "id", [1003])
    assert [(s.version, s.rows, s.tags, s.contract) for s in datasets.versions("sales")] == [
        (1, 199, (), "contract:sales@1"),
        (2, 399, (), "contract:sales@1"),
        (3, 200, ("golden",), "contract:sales@2"),
    ]
    assert verify(workspace.events).ok
    workspace.close()


# ── several processes ──────────────────────────────────────────────────────────────────────────────────────

SAVER = """
import sys
import numpy as np, pandas as pd
from pathlib import Path
from mlops_workbench.data.datasets import Datasets
from mlops_workbench.workspace.folders import Workspace
root, seed, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
datasets = Datasets(Workspace(root, home=root.parent / "config"))
print("ready", flush=True)
sys.stdin.readline()
for i in range(times):
    rng = np.random.default_rng(1000 * seed + i)
    n = 100 + 10 * seed
    frame = pd.DataFrame({"id": np.arange(n), "x": rng.normal(seed, 1, n), "saver": seed, "turn": i})
    print(datasets.save("shared", frame, tags=[f"saver{seed}"]).version, flush=True)
"""


def start(root: Path, seed: int, times: int) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SAVER, str(root), str(seed), str(times)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n", process.stderr.read() if process.stderr else ""
    process.stdin.write("go\n")
    process.stdin.flush()


def consistent(workspace: Workspace) -> Datasets:
    """Catalog and events say the same, every version reads back, the chain holds, one contract per number."""
    datasets = Datasets(workspace)
    assert verify(workspace.events).ok
    versions = datasets.versions("shared")
    saved = list(workspace.events.read(kind="dataset.saved"))
    assert [v.version for v in versions] == list(range(1, len(versions) + 1))
    assert [e.subject for e in saved] == [v.reference for v in versions] and [
        e.body["digest"] for e in saved if e.body
    ] == [v.digest for v in versions]
    validated = [e.subject for e in workspace.events.read(kind="dataset.validated")]
    assert validated == [v.reference for v in versions]
    contracts = datasets.contracts.history("shared")
    assert [c.version for c in contracts] == list(range(1, len(contracts) + 1))
    known = {c.reference for c in contracts}
    assert {datasets.verdict(v)["contract"] for v in versions} <= known
    for version in versions:
        frame = version.to_pandas()
        assert len(frame) == version.rows and frame.saver.nunique() == 1
    return datasets


@pytest.mark.process
def test_processes_that_save_the_same_name_lose_nothing() -> None:
    workspace = Workspace.temporary("shared")
    workers = [start(workspace.root, seed, 4) for seed in (1, 2, 3)]
    for worker in workers:
        go(worker)
    numbers = []
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        numbers += [int(line) for line in out.split()]
    assert sorted(numbers) == list(range(1, 13))
    datasets = consistent(workspace)
    assert len(datasets.contracts.history("shared")) == 1
    assert {(f.saver.iloc[0], f.turn.iloc[0]) for f in (v.to_pandas() for v in datasets.versions("shared"))} == {
        (s, i) for s in (1, 2, 3) for i in range(4)
    }
    for seed in (1, 2, 3):
        tagged = datasets.load(f"shared@saver{seed}")
        assert (tagged.saver == seed).all() and (tagged.turn == 3).all()


@pytest.mark.process
@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_save_leaves_all_of_it_or_nothing() -> None:
    workspace, rng = Workspace.temporary("killed"), random.Random(3)
    for round in range(4):
        worker = start(workspace.root, round + 1, 1000)
        go(worker)
        assert worker.stdout is not None
        worker.stdout.readline()  # at least one whole save
        time.sleep(rng.uniform(0.0, 0.4))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        before = len(consistent(workspace).versions("shared"))
        after = Datasets(workspace).save(
            "shared",
            pd.DataFrame(
                {"id": range(60), "x": np.random.default_rng(round).normal(size=60), "saver": 0, "turn": round}
            ),
        )
        assert after.created and after.version == before + 1
    workspace.tables.collect(grace=timedelta(0))
    consistent(workspace)
