"""Lineage against a plain transitive closure, on random graphs with and without circles; at any time; joint transactions."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.errors import EventError, ReferenceFormatError, UnknownReferenceError
from mlops_workbench.workspace.audit import redact, verify
from mlops_workbench.workspace.clock import FixedClock
from mlops_workbench.workspace.database import Database
from mlops_workbench.workspace.events import EventStore
from mlops_workbench.workspace.lineage import Edge, Lineage, LineageGraph, depths, reachable

nodes = st.integers(0, 7).map(lambda n: f"table:t{n}")
pairs = st.lists(st.tuples(nodes, nodes).filter(lambda p: p[0] != p[1]), max_size=18, unique=True)


@pytest.fixture
def lineage(any_database_url: str) -> Iterator[Lineage]:
    database = Database(any_database_url)
    yield Lineage(EventStore(database, FixedClock(step=timedelta(days=1))))
    database.close()


def closure(edges: set[tuple[str, str]], start: str) -> set[str]:
    """Everything that can be reached from `start`, by squaring until nothing is added."""
    reach = set(edges)
    while more := {(a, d) for a, b in reach for c, d in reach if b == c} - reach:
        reach |= more
    return {b for a, b in reach if a == start} | {start}


@pytest.mark.fast
@settings(max_examples=150, deadline=None)
@given(pairs, nodes)
def test_reachable_is_the_transitive_closure(drawn: list[tuple[str, str]], start: str) -> None:
    edges = [Edge(a, b, None, None, "") for a, b in drawn]
    down, up = closure(set(drawn), start), closure({(b, a) for a, b in drawn}, start)
    assert {e.output for e in reachable(edges, [start], "down")} | {start} == down
    assert {e.input for e in reachable(edges, [start], "up")} | {start} == up
    assert set(reachable(edges, [start], "down")) == {e for e in edges if e.input in down}
    place = depths({n for p in drawn for n in p}, edges)
    if all(a not in closure(set(drawn), b) for a, b in drawn):  # no circle
        assert all(place[a] < place[b] for a, b in drawn)
    assert all(0 <= x < 8 for x in place.values())


@pytest.mark.fast
@settings(max_examples=12, deadline=None)
@given(pairs)
def test_the_graph_at_each_moment(drawn: list[tuple[str, str]]) -> None:
    folder = tempfile.mkdtemp()
    database = Database(f"sqlite:///{folder}/events.db")
    lineage = Lineage(EventStore(database, FixedClock(step=timedelta(days=1))))
    moments = [lineage.record(b, [a], actor="ann").recorded_at for a, b in drawn]
    try:
        for n, moment in enumerate(moments, 1):
            known = drawn[:n]
            assert [(e.input, e.output) for e in lineage.edges(at=moment)] == known
            about = known[-1][0]
            graph = lineage.graph(about, "down", at=moment)
            assert set(graph.nodes) == closure(set(known), about)
            assert {n for e in graph.edges for n in (e.input, e.output)} <= set(graph.nodes)
            graph.mermaid(), graph.to_frame()
    finally:
        database.close()
        shutil.rmtree(folder)


def test_recorded_with_the_thing_or_not_at_all(lineage: Lineage) -> None:
    with pytest.raises(ZeroDivisionError), lineage.events.database.write() as connection:
        lineage.record("dataset:a@2", ["dataset:a@1"], actor="ann", connection=connection)
        raise ZeroDivisionError
    assert lineage.edges() == [] and lineage.events.head().seq == 0
    for _ in range(2):
        made = lineage.record(
            "dataset:a@2",
            {"dataset:a@1": "base"},
            actor="ann",
            activity="step:clean",
            idempotency_key="k",
            correlation_id="job",
        )
    assert made.seq == 1 and made.correlation_id == "job"
    assert lineage.edges() == [Edge("dataset:a@1", "dataset:a@2", "step:clean", "base", f"event:{made.id}")]
    lineage.record("dataset:a@2", {"dataset:a@1": "base"}, actor="ann", activity="step:clean")
    assert len(lineage.edges()) == 1  # told twice, shown once


def test_an_erased_record_no_longer_says_what_went_in(lineage: Lineage) -> None:
    first = lineage.record("dataset:a@2", ["dataset:a@1"], actor="ann")
    lineage.record("dataset:a@3", ["dataset:a@2"], actor="ann")
    redact(lineage.events, first, "dpo", "request")
    assert [(e.input, e.output) for e in lineage.edges()] == [("dataset:a@2", "dataset:a@3")] and verify(
        lineage.events
    ).ok


def test_both_directions_and_shared_names(lineage: Lineage) -> None:
    lineage.record("dataset:a@1", ["source:bank"], actor="ann")
    lineage.record("dataset:a@10", ["dataset:a@1"], actor="ann", activity="run:01JGT9Z5T0ZZZZZZZZZZZZZZZZ")
    lineage.record("dataset:ab@1", ["source:other"], actor="ann")
    assert lineage.graph("dataset:a@1").nodes == ("source:bank", "dataset:a@1", "dataset:a@10")
    assert lineage.graph("dataset:a@1", "down").nodes == ("dataset:a@1", "dataset:a@10")
    assert lineage.graph("dataset:a").nodes == ("source:bank", "dataset:a@1", "dataset:a@10")  # not dataset:ab
    assert lineage.graph("run:01JGT9Z5T0ZZZZZZZZZZZZZZZZ", "up").nodes == ("source:bank", "dataset:a@1", "dataset:a@10")
    for call, error in [
        (lambda: lineage.graph("dataset:zzz"), UnknownReferenceError), (lambda: lineage.graph("dataset:a@1", "sideways"), EventError),
        (lambda: lineage.graph("dataset:a@1", at="2020-01-01"), UnknownReferenceError), (lambda: lineage.graph("not a reference"), ReferenceFormatError),
        (lambda: lineage.record("model:m@champion", [], actor="a"), ReferenceFormatError), (lambda: lineage.record("dataset:a@1", ["dataset:a@1"], actor="a"), EventError),
    ]:  # fmt: skip
        with pytest.raises(error):
            call()


def test_a_thing_without_lineage_stands_alone(lineage: Lineage) -> None:
    """Saved from a frame: there is nothing behind it, but it exists."""
    first = lineage.events.append("dataset.saved", "dataset:a@1", {}, actor="ann")
    lineage.events.append("dataset.tagged", "dataset:a@1", {"tag": "golden"}, actor="ann")
    lineage.events.append("dataset.saved", "dataset:a@2", {}, actor="ann")
    for near in ("dataset:A@1", "dataset:ab@1", "dataset:a-b@1", "table:a"):
        lineage.events.append("dataset.saved", near, {}, actor="ann")
    for direction in ("both", "up", "down"):
        assert lineage.graph("dataset:a@1", direction).nodes == ("dataset:a@1",)
    graph = lineage.graph("dataset:a")
    assert graph.nodes == ("dataset:a@1", "dataset:a@2") and graph.edges == ()
    assert graph.to_frame().empty and "0 edges" in str(graph) and len(graph.figure().data) == 1
    assert lineage.graph("dataset:a", at=first.recorded_at).nodes == ("dataset:a@1",)
    for unknown, at in [("dataset:a@3", None), ("dataset:zzz", None), ("dataset:a@2", first.recorded_at), ("dataset:a@1", "2020-01-01")]:  # fmt: skip
        with pytest.raises(UnknownReferenceError):
            lineage.graph(unknown, at=at)
    lineage.record("model:m@1", ["dataset:a@2"], actor="ann")
    assert lineage.graph("dataset:a@1").nodes == ("dataset:a@1",)
    assert lineage.graph("dataset:a@2").nodes == ("dataset:a@2", "model:m@1")


@pytest.mark.fast
def test_text_in_a_graph_is_escaped() -> None:
    """Roles are free text: they must not become markup."""
    graph = LineageGraph(
        "dataset:a@1",
        "up",
        ("dataset:a@1", "dataset:b@1"),
        (Edge("dataset:b@1", "dataset:a@1", None, '<script>"]', ""),),
    )
    assert (
        "<script>" not in graph._repr_html_()
        and "<" not in graph.mermaid()
        and '"]' not in graph.mermaid().split("-->")[1]
    )
