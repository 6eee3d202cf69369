"""Contracts: the file is read strictly and comes back equal; verdicts are pandera's; reports give no personal values away."""

from __future__ import annotations

import datetime as dt
import string
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_workbench.data.contract_files import parse_contract, read_contract
from mlops_workbench.data.contracts import COLUMN_KEYS, TABLE_KEYS, ColumnRules, Contract, TableRules
from mlops_workbench.data.frames import COLUMN_TYPES, column_type
from mlops_workbench.data.inference import infer_contract
from mlops_workbench.data.validation import validate
from mlops_workbench.errors import ContractBrokenError, ContractError, SourceError
from mlops_workbench.workspace.clock import FixedClock

pytestmark = pytest.mark.fast
CLOCK = FixedClock("2026-01-05T09:00:00Z")

# ── the file ───────────────────────────────────────────────────────────────────────────────────────────────

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
odd = st.sampled_from(
    [
        "no",
        "yes",
        "null",
        "~",
        "1e3",
        "0x1F",
        "1:30",
        "2026-01-05",
        "#x",
        "a: b",
        "- a",
        "'",
        '"',
        " lead",
        "a\nb",
        "\u2028",
        "\x85",
        "é",
        "<<",
        "=",
        "{a}",
        "&a",
        "*a",
        "!t",
        "%",
    ]
)
names = texts | odd
finite = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
days = st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)).map(str)


@st.composite
def column_rules(draw: Any) -> ColumnRules:
    kind = draw(st.sampled_from(COLUMN_TYPES))
    rules: dict[str, Any] = {
        "type": kind,
        "max_missing": draw(st.floats(0, 1)),
        "required": draw(st.booleans()),
        "personal": draw(st.booleans()),
    }
    if kind in ("integer", "number"):
        rules["min"], rules["max"] = sorted(draw(st.tuples(finite, finite)))
    elif kind in ("datetime", "date"):
        rules["min"], rules["max"] = sorted(draw(st.tuples(days, days)))
    elif kind == "string":
        rules["categories"] = draw(st.none() | st.lists(names, min_size=1, max_size=4, unique=True).map(tuple))
        rules["pattern"] = draw(st.none() | st.sampled_from(["[a-z]+", r"\d{4}", "a|b: #", "'\""]))
    rules["unique"] = draw(st.booleans()) if kind != "any" else False
    rules["description"] = draw(st.just("") | names)
    seen = draw(st.dictionaries(st.sampled_from(COLUMN_KEYS), names, max_size=2))
    return ColumnRules(**rules, seen=seen)


@st.composite
def contracts(draw: Any) -> Contract:
    columns = draw(st.dictionaries(names, column_rules(), min_size=1, max_size=4))
    moments = [name for name, rules in columns.items() if rules.type in ("datetime", "date")]
    keys = draw(
        st.lists(
            st.lists(st.sampled_from(sorted(columns)), min_size=1, max_size=2, unique=True).map(tuple), max_size=2
        ).map(tuple)
    )
    fresh = (draw(st.sampled_from(moments)), "36 hours") if moments and draw(st.booleans()) else None
    table = TableRules(
        draw(st.none() | st.integers(0, 10)),
        draw(st.none() | st.integers(10, 10**9)),
        draw(st.booleans()),
        keys,
        fresh,
        draw(st.none() | st.floats(0, 1)),
    )
    return Contract(draw(names), columns, table, draw(st.none() | names), draw(st.just("") | names))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contracts())
def test_the_file_comes_back_equal_and_any_yaml_reader_sees_the_same(contract: Contract) -> None:
    text = contract.to_yaml()
    back = parse_contract(text)
    assert back == contract and back.digest == contract.digest
    assert list(back.columns) == list(contract.columns)
    assert yaml.safe_load(text) == contract.to_dict()
    assert back.to_yaml() == parse_contract(back.to_yaml()).to_yaml()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.binary(max_size=40).map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_contract_or_a_contract_error(text: str) -> None:
    try:
        parse_contract(text)
    except ContractError as e:
        assert e.fix and e.where


GOOD = """\
format: 1
name: loans
table: {min_rows: 1}
columns:
  income: {type: number, min: 0, max: 10}
  place: {type: string, categories: [a, b]}
"""


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_never_raises_anything_else(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD) - 1))
    text = GOOD[:at] + data.draw(st.text(string.printable, max_size=4)) + GOOD[at + data.draw(st.integers(0, 6)) :]
    try:
        parse_contract(text)
    except ContractError as e:
        assert e.fix


@pytest.mark.parametrize("section", [*COLUMN_KEYS])
def test_every_misspelt_rule_is_an_error_with_its_line(section: str) -> None:
    text = GOOD.replace("{type: number, min: 0, max: 10}", f"\n    type: number\n    {section}x: 1")
    with pytest.raises(ContractError) as caught:
        parse_contract(text, "loans.yml")
    assert caught.value.line == 7 and "line 7" in caught.value.where and section in caught.value.fix


@pytest.mark.parametrize("rule", TABLE_KEYS)
def test_every_misspelt_table_rule_is_an_error(rule: str) -> None:
    with pytest.raises(ContractError, match="unknown key") as caught:
        parse_contract(GOOD.replace("min_rows", rule + "s"), "loans.yml")
    assert caught.value.line == 3


def test_a_repeated_key_is_an_error_at_every_level() -> None:
    for good, line in (
        ("name: loans\n", 3),
        ("{min_rows: 1", 3),
        ("  income: {type: number, min: 0, max: 10}\n", 6),
        ("type: string, ", 6),
    ):
        again = good.removeprefix("{") + (", " if good.startswith("{") else "")
        with pytest.raises(ContractError, match="twice") as caught:
            parse_contract(
                GOOD.replace(
                    good,
                    ("{" if good.startswith("{") else "") + again + again.removesuffix(", ")
                    if good.startswith("{")
                    else good + good,
                )
            )
        assert caught.value.line == line


def test_a_number_is_one_promise_however_it_is_written() -> None:
    whole, real = (
        Contract("t", {"x": ColumnRules("number", min=low, max=high, max_missing=low)})
        for low, high in ((0, 10), (0.0, 10.0))
    )
    assert whole.digest == real.digest and whole.to_yaml() == real.to_yaml()
    assert whole.digest != whole.amend("x", max=10.5).digest


def test_files(tmp_path: Any) -> None:
    (tmp_path / "loans.yml").write_bytes(b"\xff\xfe\x00")
    for path in ("loans.yml", "lons.yml", "."):
        with pytest.raises(ContractError):
            read_contract(tmp_path / path)


# ── verdicts, against pandera written by hand ──────────────────────────────────────────────────────────────

RULES = Contract(
    "sales",
    {
        "amount": ColumnRules("number", min=0, max=100),
        "count": ColumnRules("integer", min=0),
        "place": ColumnRules("string", categories=("a", "b")),
        "code": ColumnRules("string", pattern="[a-z]{2}", unique=True),
        "note": ColumnRules("string", max_missing=0.5, required=False),
    },
    TableRules(min_rows=2, max_rows=6),
)
BY_HAND = pa.DataFrameSchema(
    {
        "amount": pa.Column(float, [pa.Check.in_range(0, 100)]),
        "count": pa.Column(int, [pa.Check.ge(0)]),
        "place": pa.Column(str, [pa.Check.isin(["a", "b"])]),
        "code": pa.Column(str, [pa.Check.str_matches(r"^[a-z]{2}\Z")], unique=True),
        "note": pa.Column(
            object, [pa.Check(lambda s: s.isna().mean() <= 0.5, ignore_na=False)], nullable=True, required=False
        ),
    },
    checks=[pa.Check(lambda frame: 2 <= len(frame) <= 6)],
    strict=True,
)
rows = st.fixed_dictionaries(
    {
        "amount": st.sampled_from([0.0, 50.5, 100.0, 100.5, -0.1, np.nan]),
        "count": st.sampled_from([0, 7, -1]),
        "place": st.sampled_from(["a", "b", "c", None]),
        "code": st.sampled_from(["aa", "ab", "ba", "bb", "a", "ab\n"]),
        "note": st.sampled_from(["x", None]),
    }
)
kept_rows = st.fixed_dictionaries(
    {
        "amount": st.sampled_from([0.0, 100.0]),
        "count": st.just(1),
        "place": st.just("a"),
        "code": st.sampled_from(["aa", "ab", "ba", "bb", "cc"]),
        "note": st.sampled_from(["x", None]),
    }
)


def verdict_by_hand(frame: pd.DataFrame) -> tuple[bool, set[str]]:
    try:
        BY_HAND.validate(frame, lazy=True)
        return True, set()
    except pa.errors.SchemaErrors as e:
        cases = e.failure_cases
        by_column = set(cases.loc[cases.schema_context == "Column", "column"])
        absent = set(
            cases.loc[cases["check"].astype(str).isin(["column_in_dataframe", "column_in_schema"]), "failure_case"]
        )
        return False, by_column | absent


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(rows, min_size=1, max_size=8) | st.lists(kept_rows, min_size=2, max_size=5),
    st.sampled_from([None, "note", "place", "extra"]),
)
def test_the_verdict_is_that_of_pandera_written_by_hand(records: list[dict[str, Any]], change: str | None) -> None:
    frame = pd.DataFrame(records).astype({"place": object, "code": object, "note": object})
    frame = frame.assign(extra=1) if change == "extra" else frame.drop(columns=change) if change else frame
    ours, (ok, columns) = validate(frame, RULES, clock=CLOCK), verdict_by_hand(frame)
    assert ours.ok == ok
    assert set(ours.broken_columns) == columns


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 110) | st.just(float("nan")), min_size=1, max_size=200))
def test_counts_and_rows_are_those_of_plain_numpy(values: list[float]) -> None:
    frame = pd.DataFrame({"x": values}, index=np.arange(len(values)) * 7 + 3)
    verdict = validate(frame, Contract("x", {"x": ColumnRules("number", min=0, max=100)}), clock=CLOCK)
    found = {f.rule: (f.count, f.rows) for f in verdict.failures}
    array = np.array(values)
    for rule, broken in (("min", array < 0), ("max", array > 100), ("max_missing", np.isnan(array))):
        at = np.flatnonzero(broken)
        assert found.get(rule, (0, ())) == (len(at), tuple(at[:5].tolist()))


def test_moments_days_and_categories() -> None:
    rules = Contract(
        "t",
        {
            "when": ColumnRules("datetime", min="2026-01-01", max="2026-01-31T12:00:00Z"),
            "day": ColumnRules("date", min="2026-01-02"),
            "size": ColumnRules("string", categories=("s", "m")),
        },
    )
    frame = pd.DataFrame(
        {
            "when": [pd.Timestamp("2026-01-01"), pd.Timestamp("2026-01-31 11:00"), pd.Timestamp("2026-02-01")],
            "day": [dt.date(2026, 1, 1), dt.date(2026, 1, 2), None],
            "size": pd.Categorical(["s", "m", "l"]),
        }
    )
    verdict = validate(frame, rules, clock=CLOCK)
    assert [(f.column, f.rule, f.rows) for f in verdict.failures] == [
        ("when", "max", (2,)),
        ("day", "max_missing", (2,)),
        ("day", "min", (0,)),
        ("size", "categories", (2,)),
    ]
    aware = frame.assign(when=frame.when.dt.tz_localize("Europe/Berlin"))
    assert [f.rows for f in validate(aware, rules, clock=CLOCK).failures if f.column == "when"] == [
        (0,),
        (2,),
    ]  # midnight in Berlin is the day before in UTC


def test_the_same_rows_are_found_in_a_categorical_column_of_numbers() -> None:
    rules = Contract("t", {"n": ColumnRules("integer", min=1, max=2)})
    assert validate(pd.DataFrame({"n": pd.Categorical([1, 2, 3])}), rules, clock=CLOCK).failures[0].rows == (2,)
    assert validate(
        pd.DataFrame({"n": pd.array([1, None, 3], dtype="Int64")}), rules.amend("n", max_missing=0.5), clock=CLOCK
    ).failures[0].rows == (2,)


def test_freshness_asks_the_clock() -> None:
    rules = Contract("t", {"at": ColumnRules("datetime")}, TableRules(freshness=("at", "2 days")))
    frame = pd.DataFrame({"at": [pd.Timestamp("2026-01-01"), pd.Timestamp("2026-01-03T09:00")]})
    assert validate(frame, rules, clock=FixedClock("2026-01-05T09:00:00Z")).ok
    late = validate(frame, rules, clock=FixedClock("2026-01-05T09:00:01Z"))
    assert [f.rule for f in late.failures] == ["freshness"] and "2026-01-03" in late.failures[0].found
    assert not validate(pd.DataFrame({"at": [pd.NaT, pd.NaT]}), rules.amend("at", max_missing=1.0), clock=CLOCK).ok


# ── reports ────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_report_holds_a_value_of_a_personal_column() -> None:
    frame = pd.DataFrame(
        {"name": ["Ann Unseen", "Bob Unseen", "Cy Unseen"] * 50, "tax": [10**6 + i for i in range(150)]}
    )
    contract = infer_contract(frame, "people", personal=["name", "tax"])
    assert "Unseen" not in contract.to_yaml() and "1000" not in contract.to_yaml()
    strict = contract.amend("name", pattern="[a-z]+").amend("tax", type="integer", min=0, max=5)
    verdict = validate(frame, strict, clock=CLOCK)
    assert set(verdict.broken_columns) == {"name", "tax"}
    with pytest.raises(ContractBrokenError) as caught:
        verdict.raise_for_failures()
    everything = f"{caught.value} {caught.value.facts} {verdict!r} {verdict._repr_html_()} {verdict.to_dict(values=True)} {verdict.to_frame().to_string()}"
    assert "Unseen" not in everything and "1000" not in everything
    assert len(caught.value.failures) == 2 and "'name'" in caught.value.where and "'tax'" in caught.value.where


def test_a_report_is_safe_html() -> None:
    frame = pd.DataFrame({"<b>x</b>": ["<script>alert(1)</script>"]})
    verdict = validate(frame, Contract("<i>", {"<b>x</b>": ColumnRules("string", categories=("a",))}), clock=CLOCK)
    page = verdict._repr_html_()
    assert "<script" not in page and "<b>x" not in page and "<i>" not in page and "&lt;script" in page


def test_columns_that_are_no_columns_are_refused() -> None:
    with pytest.raises(SourceError, match="duplicate"):
        validate(pd.DataFrame([[1, 2]], columns=["a", "a"]), Contract("t", {"a": ColumnRules("integer")}))


# ── inference ──────────────────────────────────────────────────────────────────────────────────────────────

cells = {
    "integer": st.integers(-(2**40), 2**40), "number": st.floats(allow_nan=False, allow_infinity=False), "string": texts, "boolean": st.booleans(),
    "datetime": st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1)), "date": st.dates(dt.date(1700, 1, 1), dt.date(2200, 1, 1)),
}  # fmt: skip


@st.composite
def frames(draw: Any) -> pd.DataFrame:
    n = draw(st.integers(1, 12))
    kinds = draw(st.lists(st.sampled_from(sorted(cells)), min_size=1, max_size=4))
    columns = {}
    for i, kind in enumerate(kinds):
        values = draw(st.lists(st.none() | cells[kind], min_size=n, max_size=n))
        column = pd.Series(values, dtype=object)
        columns[f"c{i}"] = column.infer_objects() if draw(st.booleans()) else column
    return pd.DataFrame(columns)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames())
def test_data_keeps_the_contract_inferred_from_it(frame: pd.DataFrame) -> None:
    contract = infer_contract(frame, "t")
    assert parse_contract(contract.to_yaml()) == contract
    assert {c: column_type(frame[c]) for c in frame} == {c: rules.type for c, rules in contract.columns.items()}
    verdict = validate(frame, contract, clock=CLOCK)
    assert verdict.ok, str(verdict)


def test_an_infinite_value_is_in_no_range() -> None:
    frame = pd.DataFrame({"ratio": [0.5, float("inf"), 2.0]})
    assert [(f.rule, f.rows) for f in validate(frame, infer_contract(frame, "t"), clock=CLOCK).failures] == [
        ("max", (1,))
    ]
    assert infer_contract(pd.DataFrame({"ratio": [float("inf")]}), "t").columns["ratio"].max is None


def test_an_honest_next_batch_passes() -> None:
    """A thousand rows of five common shapes; a hundred batches of the same size each. The stated leeway should hold nearly always."""
    rng = np.random.default_rng(5)

    def batch(n: int) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "normal": rng.normal(50, 10, n), "skewed": rng.lognormal(3, 0.8, n), "count": rng.poisson(3, n), "share": rng.beta(2, 5, n),
                "place": rng.choice(["a", "b", "c"], n, p=[0.7, 0.25, 0.05]), "gaps": np.where(rng.random(n) < 0.05, np.nan, rng.random(n)),
            }
        )  # fmt: skip

    contract = infer_contract(batch(1000), "t")
    verdicts = [validate(batch(1000), contract, clock=CLOCK) for _ in range(100)]
    assert sum(v.ok for v in verdicts) >= 95, [str(v) for v in verdicts if not v.ok]
    wrong_unit = validate(batch(1000).assign(normal=lambda d: d.normal * 1000), contract, clock=CLOCK)
    assert [f.column for f in wrong_unit.failures] == ["normal"]
