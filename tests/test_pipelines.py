"""Pipelines without a kernel: the graph, definitions, parameters, outputs and records, by property and by bad example."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_workbench.errors import DefinitionError, ParameterError, StepError
from mlops_workbench.pipelines.checks import check_pipeline, compatible
from mlops_workbench.pipelines.definition import Pipeline, Step, read_duration
from mlops_workbench.pipelines.documents import parse_document
from mlops_workbench.pipelines.files import cases_folder, find_pipeline, list_pipelines, read_pipeline
from mlops_workbench.pipelines.graph import downstream, find_cycle, graph_svg, mermaid_text, topological_order
from mlops_workbench.pipelines.notebooks import NotebookCell, StepNotebook, code_digests, read_notebook
from mlops_workbench.pipelines.outputs import OUTPUT_MIME, Output, collect_outputs, make_output
from mlops_workbench.pipelines.parameters import bind, parameters_of, read_parameters
from mlops_workbench.pipelines.recording import told_outcome
from mlops_workbench.pipelines.records import make_record, spelled
from mlops_workbench.pipelines.templates import Slot, fill, slots_in, whole_slot
from mlops_workbench.pipelines.values import ParameterType, check_value, read_type, read_value
from tests.pipelines_support import write_notebook

pytestmark = pytest.mark.fast


def holds(*values: st.SearchStrategy[Any]) -> Any:
    """`given`, on a machine that may be busy."""
    return lambda test: settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])(
        given(*values)(test)
    )


names = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


# ---------------------------------------------------------------- the graph


@st.composite
def graphs(draw: st.DrawFn, acyclic: bool = True) -> dict[str, list[str]]:
    """A graph in a random order of definition."""
    nodes = draw(st.lists(names, min_size=1, max_size=9, unique=True))
    needs = {
        n: draw(st.lists(st.sampled_from(nodes[:i] if acyclic else nodes), max_size=3)) if i or not acyclic else []
        for i, n in enumerate(nodes)
    }
    return {n: needs[n] for n in draw(st.permutations(nodes))}


@holds(graphs())
def test_order_is_complete_and_respects_needs(needs: dict[str, list[str]]) -> None:
    order = topological_order(needs)
    assert sorted(order) == sorted(needs)
    assert all(order.index(n) < order.index(step) for step, required in needs.items() for n in required)
    assert find_cycle(needs) is None


@holds(graphs())
def test_order_is_stable(needs: dict[str, list[str]]) -> None:
    order = topological_order(needs)
    assert topological_order({n: needs[n] for n in order}) == order, "a definition in working order runs as it reads"
    for i, later in enumerate(order):  # nothing that was defined earlier was ready before it
        position = list(needs).index(later)
        ready = [n for n in list(needs)[:position] if n not in order[:i] and set(needs[n]) <= set(order[:i])]
        assert ready == []


@holds(graphs(acyclic=False))
def test_a_cycle_is_a_real_path(needs: dict[str, list[str]]) -> None:
    cycle = find_cycle(needs)
    assert (cycle is None) == (len(topological_order(needs)) == len(needs))
    if cycle:
        assert cycle[0] == cycle[-1] and len(set(cycle[:-1])) == len(cycle) - 1
        assert all(a in needs[b] for a, b in pairwise(cycle))


@holds(graphs(), st.data())
def test_downstream_is_what_cannot_be_reached_without_it(needs: dict[str, list[str]], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(sorted(needs)))
    without = {n: [*required, "never"] if n == lost else required for n, required in needs.items()} | {
        "never": ["never"]
    }
    assert downstream(needs, lost) == set(needs) - set(topological_order(without)) - {lost}


@holds(graphs())
def test_drawings_hold_every_step(needs: dict[str, list[str]]) -> None:
    edges = sum(len(set(v)) for v in needs.values())
    assert graph_svg(needs).count("<rect") == len(needs) and mermaid_text(needs).count("-->") == edges


def test_drawings_escape_names() -> None:
    step = Step("a", "<script>alert(1)</script>.ipynb", {"x": "<b>"}, description="</table>")
    html = Pipeline("p", [step], description="<img src=x>")._repr_html_()
    assert "<script" not in html and "<img" not in html and "<b>&" not in html


# ---------------------------------------------------------------- templates


@holds(json_values)
def test_a_value_without_slots_is_filled_with_itself(value: Any) -> None:
    if "${" not in str(value):
        assert fill(value, lambda slot: 1 / 0) == value and slots_in(value) == ()


@holds(st.lists(names | st.sampled_from(["$${", "-", " "]), max_size=5), names, json_values)
def test_a_whole_slot_keeps_its_type(around: list[str], name: str, value: Any) -> None:
    assert fill(f"${{{name}}}", {Slot(name): value}.__getitem__) == value
    text = "".join(around) + f"${{step.{name}}}"
    assert slots_in(text) == (Slot(name, "step"),)
    assert (whole_slot(text) is None) == bool("".join(around))
    assert str(fill(text, lambda s: 7)) == "".join(around).replace("$${", "${") + "7"


def test_a_filled_value_is_not_filled_again() -> None:
    assert fill("${a}", {Slot("a"): "${b}"}.__getitem__) == "${b}"


# ---------------------------------------------------------------- values and parameters


@holds(json_values)
def test_checking_is_idempotent_and_lossless(value: Any) -> None:
    once = check_value(value, ParameterType("any"))
    assert once == value and check_value(once, ParameterType("any")) == once


@holds(st.integers())
def test_numbers_survive_text(number: int) -> None:
    assert read_value(str(number), read_type("int")) == number
    assert isinstance(check_value(number % 1000, read_type("float")), float)


@holds(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_text(number: float) -> None:
    assert read_value(repr(number), read_type("float")) == number


@holds(st.lists(st.integers(-999, 999), max_size=4))
def test_lists_survive_text(numbers: list[int]) -> None:
    assert read_value(json.dumps(numbers), read_type("list[int]")) == numbers


@holds(st.sampled_from(["int", "float", "str", "bool", "list", "dict"]), json_values)
def test_a_literal_default_is_read_as_itself(kind: str, value: Any) -> None:
    (parameter,) = parameters_of(f"x = {value!r}")
    assert parameter.default == value or (isinstance(value, float) and math.isinf(value))


def test_what_is_compatible_can_fit() -> None:
    examples = {
        "int": 1,
        "float": 0.5,
        "str": "x",
        "bool": True,
        "list": [1],
        "dict": {"a": 1},
        "dataset": "dataset:a@1",
        "model": "model:a@1",
    }
    for a, b in product(examples, repeat=2):
        try:
            check_value(examples[a], ParameterType(b))
            fits = True
        except ParameterError:
            fits = a == "str" and b in ("dataset", "model")  # some text is a reference
        assert compatible(ParameterType(a), ParameterType(b)) == fits, (a, b)


def test_the_cell_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    parameters_of(f"x = open({str(mark)!r}, 'w')\ny: int = 3\n__import__('os').system('touch {mark}')")
    assert not mark.exists()


def test_magic_and_other_statements_are_passed_over() -> None:
    found = parameters_of("%matplotlib inline\n!ls\nimport os\nseed: int = 7  # why\n\ndef f():\n    inner = 1\n")
    assert [(p.name, p.default, p.help) for p in found] == [("seed", 7, "why")]


@pytest.mark.parametrize(
    ("given_values", "text", "words"),
    [
        ({"sed": 7}, False, "no parameter 'sed'"),
        ({}, False, "data is required"),
        ({"data": "loans@3", "seed": 7.5}, False, "seed takes int"),
        ({"data": "model:credit@7"}, False, "a dataset belongs here"),
        ({"data": "loans", "seed": "x"}, True, "seed takes int"),
        ({"data": "loans", "family": "forest"}, True, "one of 'logistic', 'boosting'"),
        ({"data": "loans", "weights": "{a: b}"}, True, "weights['a'] takes float"),
        ({"data": "loans", "seed": "null"}, True, "seed takes int"),
    ],
)
def test_bad_values_are_refused(given_values: dict[str, Any], text: bool, words: str) -> None:
    declared = parameters_of(
        "data: 'dataset'\nseed: int = 7\nfamily: Literal['logistic', 'boosting'] = 'logistic'\nweights: dict[str, float] = {}"
    )
    with pytest.raises(ParameterError) as caught:
        bind(declared, given_values, text=text)
    assert words in str(caught.value)


# ---------------------------------------------------------------- definitions

GOOD = """
name: credit
parameters:
  seed: {type: int, default: 7}
  ratio: {type: float, default: 1e-1}
steps:
  ingest:
    notebook: ingest.ipynb
    parameters: {seed: ${seed}}
    outputs: {data: dataset, auc: metric, report: file}
  train:
    notebook: train.ipynb
    parameters: {data: "${ingest.data}", alpha: ${ratio}}
    outputs: {model: model}
    timeout: 10m
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_notebook(tmp_path / "ingest.ipynb", "1", parameters="seed: int = 1")
    write_notebook(tmp_path / "train.ipynb", "1", parameters="data: 'dataset'\nalpha: float = 0.1\nname: str = ''")
    return tmp_path


def check_text(folder: Path, text: str) -> Any:
    (folder / "pipeline.yml").write_text(text)
    return check_pipeline(read_pipeline(folder))


def test_a_good_definition(folder: Path) -> None:
    checked = check_text(folder, GOOD)
    assert checked.order == ("ingest", "train") and checked.pipeline.step("train").timeout == 600
    assert checked.bind({"seed": "9"}, text=True) == {"seed": 9, "ratio": 0.1}
    again = yaml.safe_load(yaml.safe_dump(checked.pipeline.to_dict()))
    (folder / "pipeline.yml").write_text(yaml.safe_dump(again))
    assert read_pipeline(folder).digest == checked.pipeline.digest, "what it writes, it reads"


def test_quoted_or_not_is_the_same(folder: Path) -> None:
    unquoted = GOOD.replace('"${ingest.data}"', "${ingest.data}")
    quoted = GOOD.replace("{seed: ${seed}}", "{seed: '${seed}'}")
    assert check_text(folder, unquoted).pipeline == check_text(folder, quoted).pipeline


BAD = [
    ("seed: ${seed}}", "seed: ${sed}}", DefinitionError, "no parameter 'sed'", "did you mean 'seed'?", "line 9"),
    ("${ingest.data}", "${ingest.dta}", DefinitionError, "declares no output 'dta'", "did you mean 'data'?", "line 13"),
    ("${ingest.data}", "${ingst.data}", DefinitionError, "no step 'ingst'", "did you mean 'ingest'?", "line 13"),
    ("${ingest.data}", "${ingest.auc}", ParameterError, "takes dataset, but ${ingest.auc} is float", "", "line 13"),
    ("alpha: ${ratio}", "alhpa: ${ratio}", ParameterError, "takes no parameter 'alhpa'", "did you mean 'alpha'?", "line 13"),
    ("alpha: ${ratio}", "alpha: high", ParameterError, "alpha takes float, not 'high'", "", "line 13"),
    ('data: "${ingest.data}", ', "", ParameterError, "requires the parameter data", "", "train"),
    ("data: dataset,", "data: datset,", DefinitionError, "'datset' is not a type of output", "did you mean 'dataset'?", "line 10"),
    ("notebook: train.ipynb", "notebook: trian.ipynb", DefinitionError, "trian.ipynb does not exist", "", "line 12"),
    ("notebook: train.ipynb", "notebok: train.ipynb", DefinitionError, "no key 'notebok'", "did you mean 'notebook'?", "line 12"),
    ("timeout: 10m", "timeout: ages", DefinitionError, "not a length of time", "90s", "line 15"),
    ("timeout: 10m", "timeout: 10m\n    after: [report]", DefinitionError, "no step 'report'", "ingest, train", "line 16"),
    ("{seed: ${seed}}", "{seed: 1}\n    after: train", DefinitionError, "ingest -> train -> ingest", "remove one", "line 7"),
    ("  train:\n", "  ingest:\n", DefinitionError, "'ingest' is written twice", "rename", "lines 7 and 11"),
    ("  train:\n", "  2nd:\n", DefinitionError, "'2nd' cannot be a name", "", "line 11"),
    ("model: model", "class: model", DefinitionError, "'class' cannot be a name", "", "line 14"),
    ("name: credit", "name: my credit", DefinitionError, "not a name for a pipeline", "", "line 2"),
    ("type: int, default: 7", "type: int, default: x", ParameterError, "seed takes int, not 'x'", "", "line 4"),
    ("type: int, default: 7", "type: itn, default: 7", ParameterError, "'itn' is not a type", "did you mean 'int'?", "line 4"),
    ("{seed: ${seed}}", "{seed: ${seed}", DefinitionError, "not YAML", "", "line 1"),
    ("{seed: ${seed}}", "{seed: ${seed", DefinitionError, "not YAML", "not closed", "line 9"),
    ("steps:\n", "steps: 3\nrest:\n", DefinitionError, "where a mapping belongs", "", "line 6"),
    ("${ingest.data}", "${train.model}", DefinitionError, "train -> train", "", "line 11"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "kind", "what", "fix", "where"), BAD, ids=[b[3] for b in BAD])
def test_bad_definitions(
    folder: Path, old: str, new: str, kind: type[DefinitionError], what: str, fix: str, where: str
) -> None:
    assert old in GOOD
    with pytest.raises(kind) as caught:
        check_text(folder, GOOD.replace(old, new, 1))
    assert what in str(caught.value) and fix in str(caught.value) and where in str(caught.value)
    assert "Traceback" not in str(caught.value) and "pipeline.yml" in str(caught.value)


def test_a_fuzzed_definition_is_read_or_refused(folder: Path) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(GOOD) - 1), st.text("{}[]:,$'\"#&*!|>%@- \n\tabc\x00é", max_size=3), st.integers(0, 6))
    def check(at: int, inserted: str, dropped: int) -> None:
        try:
            check_text(folder, GOOD[:at] + inserted + GOOD[at + dropped :])
        except DefinitionError as e:
            assert e.what

    check()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not JSON"),
        (b'{"cells": [', "not JSON"),
        (b"[1, 2]", "no list of cells"),
        (b'{"nbformat": 3, "worksheets": []}', "old notebook format"),
        (b'{"cells": [], "metadata": {}, "nbformat": 4}', "no cell tagged"),
        (
            b'{"cells": [{"cell_type": "code", "source": "a b c", "metadata": {"tags": ["parameters"]}}], "nbformat": 4}',
            "not Python",
        ),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_notebooks_are_found_before_anything_starts(folder: Path, content: bytes, what: str) -> None:
    (folder / "train.ipynb").write_bytes(content)
    with pytest.raises(DefinitionError) as caught:
        check_text(folder, GOOD)
    assert what in str(caught.value) and "train.ipynb" in str(caught.value)


def test_two_parameter_cells(folder: Path) -> None:
    raw = json.loads((folder / "train.ipynb").read_text())
    raw["cells"].append(raw["cells"][0])
    (folder / "train.ipynb").write_text(json.dumps(raw))
    with pytest.raises(ParameterError, match="2 cells tagged 'parameters'"):
        check_text(folder, GOOD)


def test_a_notebook_of_another_language(folder: Path) -> None:
    raw = json.loads((folder / "train.ipynb").read_text())
    raw["metadata"] = {"kernelspec": {"name": "ir", "language": "R"}}
    (folder / "train.ipynb").write_text(json.dumps(raw))
    with pytest.raises(ParameterError, match="written in r"):
        check_text(folder, GOOD)


def test_all_problems_are_told_together(folder: Path) -> None:
    with pytest.raises(DefinitionError) as caught:
        check_text(folder, GOOD.replace("${ingest.data}", "${ingest.dta}").replace("${seed}", "${sed}"))
    assert len(caught.value.problems) == 2


def test_yaml_traps() -> None:
    document = parse_document("a: 1e-3\nb: 2026-01-05\nc: 1_000\nd: .5\ne: '1e-3'\nf: 12e03\n")
    assert document.value == {"a": 0.001, "b": "2026-01-05", "c": 1000, "d": 0.5, "e": "1e-3", "f": 12000.0}
    with pytest.raises(DefinitionError):
        parse_document("a: &x [*x]")


def test_pipelines_are_found_by_name(folder: Path) -> None:
    (folder / "credit").mkdir()
    (folder / "credit" / "pipeline.yml").write_text(GOOD)
    assert find_pipeline("credit", [folder]).name == "credit" and "credit" in list_pipelines([folder])
    assert find_pipeline(str(folder / "credit")).name == "credit"
    with pytest.raises(DefinitionError) as caught:
        find_pipeline("credti", [folder])
    assert caught.value.nearest == "credit" and "credit" in caught.value.known


def test_every_shipped_case_is_sound() -> None:
    shipped = list_pipelines([cases_folder()])
    assert "credit_scoring" in shipped
    for name in shipped:
        assert check_pipeline(find_pipeline(name)).order


@holds(st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_durations(h: int, m: int, s: int) -> None:
    assert read_duration(f"{h}h{m}m{s}s") == h * 3600 + m * 60 + s


# ---------------------------------------------------------------- outputs


def executed(*messages: Any) -> dict[str, Any]:
    shown = [{"output_type": "display_data", "metadata": {}, "data": {OUTPUT_MIME: m}} for m in messages]
    return {"cells": [{"cell_type": "code", "source": "", "outputs": [s]} for s in shown]}


@holds(names, json_values)
def test_outputs_survive_the_notebook(name: str, value: Any) -> None:
    made = make_output(name, value)
    found = collect_outputs(json.loads(json.dumps(executed(made.to_dict()))))
    assert found[name].value == made.value and found[name].type == made.type and found[name].cell == 0


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": [1, float("nan")]}, object(), {1: 2}, {"x": {1, 2}}, "x" * 70_000]
)
def test_what_cannot_be_handed_on(value: Any) -> None:
    with pytest.raises(StepError) as caught:
        make_output("x", value)
    assert caught.value.reason == "output" and caught.value.fix


def test_frames_are_not_handed_on() -> None:
    import pandas as pd

    for value in (pd.DataFrame({"a": [1]}), pd.Series([1.0, 2.0])):
        with pytest.raises(StepError, match="pandas"):
            make_output("x", value)


def test_a_name_is_emitted_once() -> None:
    message = Output("x", "value", 1).to_dict()
    with pytest.raises(StepError, match="emitted twice"):
        collect_outputs(executed(message, message))


def test_broken_messages_are_not_outputs() -> None:
    assert collect_outputs(executed({"name": "x"}, {"name": "y", "type": "mdoel", "value": 1}, "text", None)) == {}


def test_files_outside_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "step" / "link").symlink_to(tmp_path / "secret.txt")
    monkeypatch.chdir(tmp_path / "step")
    for path in ("../secret.txt", "link", str(tmp_path / "secret.txt"), "."):
        with pytest.raises(StepError):
            make_output("x", Path(path))


def test_output_is_light() -> None:
    import subprocess
    import sys

    code = "import sys; from mlops_workbench import output; output('x', 1); print([m for m in ('pandas', 'numpy', 'mlflow', 'papermill', 'sqlalchemy', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["output x (value) = 1", "[]"]


# ---------------------------------------------------------------- records


def notebook(*code: str, parameters: str = "seed: int = 7", prose: str = "") -> StepNotebook:
    cells = [NotebookCell(0, "markdown", prose), NotebookCell(1, "code", parameters, ("parameters",))]
    return StepNotebook(
        Path("x.ipynb"),
        (*cells, *(NotebookCell(i + 2, "code", c) for i, c in enumerate(code))),
        "python3",
        "python",
        prose.encode(),
    )


@holds(
    st.lists(st.text("ab=1 \n", min_size=1, max_size=8), max_size=4),
    st.lists(st.text("ab=1 \n", min_size=1, max_size=8), max_size=4),
    st.text(max_size=5),
)
def test_code_digests_change_with_the_code_only(a: list[str], b: list[str], prose: str) -> None:
    def tidy(cells: list[str]) -> list[str]:
        return [t for c in cells if (t := "\n".join(line.rstrip() for line in c.strip().splitlines()))]

    assert (code_digests(notebook(*a)) == code_digests(notebook(*b, prose=prose))) == (tidy(a) == tidy(b))


@holds(st.dictionaries(names, json_values, max_size=3), st.dictionaries(names, json_values, max_size=3))
def test_keys_change_with_the_values_only(a: dict[str, Any], b: dict[str, Any]) -> None:
    takes = read_parameters(notebook("1"))
    keys = [make_record("s", notebook("1"), takes, values).key for values in (a, b, {"seed": 7} | a)]
    same = spelled({"seed": 7} | a) == spelled({"seed": 7} | b)
    assert (keys[0] == keys[1]) == same
    assert keys[0] == keys[2]


def test_the_order_of_keys_does_not_matter() -> None:
    takes = read_parameters(notebook("1"))
    a, b = ({"x": {"p": 1, "q": 2}, "seed": 7}, {"seed": 7, "x": {"q": 2, "p": 1}})
    assert make_record("s", notebook("1"), takes, a).key == make_record("s", notebook("1"), takes, b).key


def test_events_hold_no_data() -> None:
    from mlops_workbench.pipelines.outcomes import StepFailure, StepOutcome

    secret = "Maria Silva, 52, diabetic"
    outputs = {
        "a": Output("a", "value", secret),
        "b": Output("b", "value", {"who": secret}),
        "c": Output("c", "file", "report.html", "ab"),
    }
    failure = StepFailure("exception", "ValueError", f"could not convert {secret}", traceback=secret)
    told = json.dumps(
        told_outcome(StepOutcome("s", "failed", parameters={"p": secret}, outputs=outputs, failure=failure))
    )
    assert "Maria" not in told and "diabetic" not in told


def test_reading_leaves_no_trace(folder: Path) -> None:
    before = {p: p.read_bytes() for p in folder.iterdir()}
    read_notebook(folder / "train.ipynb")
    check_text(folder, GOOD)
    after = {p: p.read_bytes() for p in folder.iterdir() if p.name != "pipeline.yml"}
    assert before == after
