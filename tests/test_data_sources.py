"""Reading from anywhere: what comes back is what was written, bad input is told apart, and no credential is kept."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.data.delimited import read_delimited
from mlops_workbench.data.frames import check_frame, check_target
from mlops_workbench.data.sources import Sql, mask_query, read_source, redact_url
from mlops_workbench.errors import SecretError, SourceError
from mlops_workbench.workspace.clock import FixedClock

pytestmark = pytest.mark.fast
CLOCK = FixedClock("2026-01-05T09:00:00Z")

# ── round trips ────────────────────────────────────────────────────────────────────────────────────────────

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(lambda s: "x" + s)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            *[
                st.lists(c, min_size=n, max_size=n)
                for c in (st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), words)
            ]
        )
    )
)
def test_what_pandas_wrote_comes_back_bit_for_bit(columns: tuple[list[Any], ...]) -> None:
    frame = pd.DataFrame(dict(zip(["whole", "real", "text"], columns, strict=True)))
    back = read_delimited(frame.to_csv(index=False).encode(), "t.csv")
    assert back.text.tolist() == frame.text.tolist() and back.whole.tolist() == frame.whole.tolist()
    assert np.array_equal(back.real.to_numpy(), frame.real.to_numpy())


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass"))
    | st.text('abc,;"\n 1.5', max_size=40).map(str.encode)
)
def test_any_bytes_are_a_table_or_a_source_error(data: bytes) -> None:
    try:
        frame = read_delimited(data, "upload.csv")
        check_frame(frame, "upload.csv")
    except SourceError as e:
        assert e.fix and e.where
    else:
        assert len(frame) and frame.columns.is_unique


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frame = pd.DataFrame({"age": [31, 45], "income": [2876.5, 3813.25]})
    frame.to_csv(tmp_path / "loans.csv", index=False)
    frame.to_csv(tmp_path / "loans.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "loans.parquet")
    (tmp_path / "loans.csv.gz").write_bytes(gzip.compress((tmp_path / "loans.csv").read_bytes()))
    (tmp_path / "nameless").write_bytes((tmp_path / "loans.parquet").read_bytes())
    frame.to_sql("loans", sa.create_engine(f"sqlite:///{tmp_path / 'bank.db'}"), index=False)
    return tmp_path


def test_every_road_gives_the_same_table(folder: Path) -> None:
    with fsspec.open("memory://inbox/loans.csv", "wb") as file:
        file.write((folder / "loans.csv").read_bytes())
    expected = pd.read_parquet(folder / "loans.parquet")
    files = ["loans.csv", "loans.tsv", "loans.parquet", "loans.csv.gz", "nameless"]
    roads = [expected, pa.Table.from_pandas(expected), *(folder / f for f in files), *(str(folder / f) for f in files), f"file://{folder}/loans.csv",
             "memory://inbox/loans.csv", Sql(f"sqlite:///{folder}/bank.db", "SELECT * FROM loans")]  # fmt: skip
    for road in roads:
        frame, source = read_source(road, clock=CLOCK, root=folder)
        pd.testing.assert_frame_equal(frame, expected)
        assert (source.rows, source.columns, source.read_at) == (2, 2, CLOCK.now())
        assert str(folder) not in source.location
        json.dumps(source.to_dict())


# ── bad input ──────────────────────────────────────────────────────────────────────────────────────────────

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n\n", "empty"),
    "header": (b"a,b\n", "no rows"),
    "workbook": (b"PK\x03\x04rest", "Excel"),
    "parquet": (b"PAR1rest", "Parquet"),
    "nul": (b"a,b\n1,\x00\n", "binary"),
    "latin": ("a,b\nJosé,1\n".encode("latin-1"), "line 2"),
    "utf16": ("a,b\n1,2\n".encode("utf-16"), "not utf-8"),
    "duplicate": (b"a,b,a\n1,2,3\n", "'a' in columns 1, 3"),
    "unnamed": (b"a,,b\n1,2,3\n", "column 2 of 3 has no name"),
    "ragged": (b"a,b\n1,2\n3\n4,5\n", "line 3 has 1 field"),
    "long": (b"a,b\n1,2\n3,4,5\n", "line 3 has 3 fields"),
    "all long": (b"a,b\n1,2,3\n4,5,6\n", "line 2 has 3 fields"),
    "quote": (b'a,b\n1,"2\n', "well-formed"),
    "mixed": (b"a,b\n1,2\n?,3\n4,5\n", "'a' mixes 2 numbers and 1 text (row 1)"),
    "semicolon": (b"a;b\n1;2\n", "at ';'"),
    "headless": (b"1,2\n3,4\n", "looks like data"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_what_is_wrong_with_it(case: str, tmp_path: Path) -> None:
    data, said = BAD[case]
    (tmp_path / f"{case}.csv").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_source(tmp_path / f"{case}.csv", root=tmp_path)
    assert said in str(caught.value) and caught.value.where.startswith(f"{case}.csv") and caught.value.fix


def test_the_fix_that_is_named_works(tmp_path: Path) -> None:
    fixes: dict[str, dict[str, Any]] = {
        "latin": {"encoding": "cp1252"},
        "utf16": {"encoding": "utf-16"},
        "semicolon": {"sep": ";"},
        "headless": {"names": ["x", "y"]},
        "mixed": {"na_values": ["?"]},
    }
    for case, options in fixes.items():
        (tmp_path / "t.csv").write_bytes(BAD[case][0])
        frame, _ = read_source(tmp_path / "t.csv", **options)
        assert frame.shape[1] == 2 and len(frame)
    (tmp_path / "t.csv").write_bytes(BAD["mixed"][0])
    assert read_source(tmp_path / "t.csv", dtype={"a": "string"})[0].a.tolist() == ["1", "?", "4"]


def test_bad_frames() -> None:
    bad = [pd.DataFrame(), pd.DataFrame({"a": []}), pd.DataFrame([[1, 2]]), pd.DataFrame([[1, 2]], columns=["a", "a"]), pd.DataFrame({None: [1]}), pd.DataFrame({" ": [1]}),
           pd.DataFrame({"a": [1, "x"]}), pd.DataFrame({"a": [True, 2.5]}, dtype=object), pd.DataFrame({"a": [1]}, index=pd.Index([7], name="id"))]  # fmt: skip
    for frame in bad:
        with pytest.raises(SourceError) as caught:
            read_source(frame)
        assert caught.value.fix
    with pytest.raises(SourceError, match=r"numbers \(rows 0, 2\).*text \(row 1\)"):
        check_frame(pd.DataFrame({"a": [1, "x", 2.5]}))


@pytest.mark.parametrize("values", [[1, 1, 1], [None, None, None], [1, None, 1]])
def test_a_target_must_vary(values: list[Any]) -> None:
    with pytest.raises(SourceError):
        check_target(pd.DataFrame({"y": values}), "y")


def test_a_missing_target_is_named() -> None:
    with pytest.raises(SourceError, match="did you mean 'approve'"):
        check_target(pd.DataFrame({"approve": [0, 1]}), "aprove")


def test_damaged_and_missing_files(folder: Path) -> None:
    whole = (folder / "loans.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.parquet").write_bytes(b"")
    (folder / "cut.csv.gz").write_bytes((folder / "loans.csv.gz").read_bytes()[:-9])
    for name in ("cut.parquet", "zero.parquet", "cut.csv.gz", "missing.csv", ".", "no/such/folder.csv"):
        with pytest.raises(SourceError):
            read_source(folder / name)
    with pytest.raises(SourceError, match=r"did you mean 'loans\.csv'"):
        read_source(folder / "lons.csv")


def test_a_query_changes_nothing_and_makes_no_file(folder: Path) -> None:
    url = f"sqlite:///{folder}/bank.db"
    for query in (
        "DELETE FROM loans",
        "SELECT nonsense FROM loans",
        "SELECT a.age, b.age FROM loans a, loans b",
        "",
        "SELECT * FROM loans WHERE age > 100",
    ):
        with pytest.raises(SourceError):
            read_source(Sql(url, query))
    assert len(read_source(Sql(url, "SELECT * FROM loans"))[0]) == 2
    with pytest.raises(SourceError):
        read_source(Sql(f"sqlite:///{folder}/other.db", "SELECT 1"))
    assert not (folder / "other.db").exists()


# ── secrets ────────────────────────────────────────────────────────────────────────────────────────────────

tokens = st.text("abcdefgh0123456789!$%^&*()_+=~/:@?#", min_size=6, max_size=16)


@settings(max_examples=300, deadline=None)
@given(tokens, st.sampled_from(["db.example", "db.example:5432"]), st.sampled_from(["/loans.csv", "/a/b.parquet", ""]))
def test_no_part_of_a_credential_survives(token: str, host: str, path: str) -> None:
    secret = f"Q{token}Q"
    bare = re.sub(r"[/?#]", "", secret)  # a token alone before the @, which is a user name: there these must be escaped
    for url in (f"postgresql://ana:{secret}@{host}{path}", f"https://{bare}@{host}{path}", f"https://{host}{path}?sig={secret}", f"https://{host}{path}#{secret}",
                f"zip://x.csv::https://u:{secret}@{host}{path}", f"simplecache::https://u:{secret}@{host}{path}"):  # fmt: skip
        assert "Q" not in redact_url(url) and host in redact_url(url), url


def test_an_error_of_a_database_does_not_give_the_password_away(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+psycopg://ana:hunter2@127.0.0.1:1/bank"
    monkeypatch.setenv("MLWB_SECRET_BANK", url)
    for sql in (
        Sql(url, "SELECT 1"),
        Sql("secret:BANK", "SELECT 1"),
        Sql(url.replace("psycopg", "nosuchdriver"), "SELECT 1"),
        Sql(url.replace("postgresql", "nosuch"), "SELECT 1"),
    ):
        with pytest.raises(SourceError) as caught:
            read_source(sql)
        everything = f"{caught.value} {caught.value.facts} {sql!r} {caught.value.__cause__}"
        assert "hunter2" not in everything and "ana" not in everything
    with pytest.raises(SecretError):
        read_source(Sql("secret:NOWHERE", "SELECT 1"))


def test_what_a_database_says_is_stripped_of_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative(*args: Any, **kwargs: Any) -> sa.Engine:
        raise sa.exc.OperationalError("SELECT 1", {}, Exception("login failed for user ana with hunter2\nmore"))

    monkeypatch.setattr(sa, "create_engine", talkative)
    with pytest.raises(SourceError, match=r"login failed for user \*\*\* with \*\*\*") as caught:
        read_source(Sql("postgresql://ana:hunter2@db/bank", "SELECT 1"))
    assert "more" not in str(caught.value)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM t WHERE n = 'J. Doe'",
        "SELECT 'J. Doe''s'",
        "SELECT 1 -- J. Doe",
        "SELECT 1 /* J. Doe\n*/",
        "SELECT * FROM t WHERE ssn = 123456789",
        "SELECT $$J. Doe$$",
        r"SELECT 'a\'J. Doe'",
        "SELECT 'J. Doe",
    ],
)
def test_literals_are_not_kept(query: str) -> None:
    shown = mask_query(query)
    assert "Doe" not in shown and "123456789" not in shown and shown.startswith("SELECT")


def test_provenance_of_a_url_and_storage_options(monkeypatch: pytest.MonkeyPatch) -> None:
    with fsspec.open("memory://box/loans.csv", "wb") as file:
        file.write(b"age\n31\n45\n")
    monkeypatch.setenv("MLWB_SECRET_TOKEN", "hunter2")
    frame, source = read_source("memory://box/loans.csv", clock=CLOCK, storage_options={"token": "secret:TOKEN"})
    assert "hunter2" not in repr(source) and "TOKEN" not in repr(source) and source.location == "memory://box/loans.csv"
    assert source.reference.startswith("source:loans.csv-") and len(frame) == 2
