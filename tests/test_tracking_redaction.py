"""Redaction by property: a planted secret never survives, and what is no secret always does."""

from __future__ import annotations

import json
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.tracking.redaction import Redactor, mark, secret_name

pytestmark = pytest.mark.fast

SECRETS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x24F, exclude_characters="\x7f«»"), min_size=8, max_size=40
).filter(lambda s: s.strip() == s and not s.isalpha() and "redacted" not in s)
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="«»"), max_size=80)
PASSWORDS = st.text(string.ascii_letters + string.digits + "!$%+-./?^_~", min_size=6, max_size=30).filter(
    lambda s: s[0].isalnum() and any(c.isdigit() for c in s)
)
STRONG = st.sampled_from(
    [
        "password",
        "DB_PASSWORD",
        "apiKey",
        "api_key",
        "client_secret",
        "aws_secret_access_key",
        "passphrase",
        "SECRET_KEY",
    ]
)


@given(TEXTS, SECRETS, TEXTS)
def test_a_known_value_never_survives(before, secret, after):
    redactor = Redactor({"X": secret})
    for text in (
        before + secret + after,
        f"url={before}{secret}",
        json.dumps({"k": before + secret}),
        repr(secret + after),
    ):
        kept = redactor.text(text)
        assert secret not in kept
    kept = json.dumps(redactor.value({"a": [secret, {secret: (1, before + secret)}]}), ensure_ascii=False)
    assert secret not in kept and json.dumps(secret)[1:-1] not in kept


NOTATIONS = [
    '{name} = "{value}"', "{name} = '{value}'", "{name}='''{value}'''", "{name}={value}", "export {name}={value}", '"{name}": "{value}"',
    "{name}: {value}", "'{name}': '{value}', 'other': 1", 'f("{name}", "{value}")', 'os.environ["{name}"] = "{value}"', "+    {name} = r'{value}'",
    '\\"{name}\\": \\"{value}\\"', "{name} = '{value}", "{name}: str = '{value}'", "curl --{name} {value}", "curl --{name}={value} x",
]  # fmt: skip


@pytest.mark.parametrize("notation", NOTATIONS)
@given(name=STRONG, value=PASSWORDS)
@settings(max_examples=60)
def test_an_assigned_password_never_survives_in_any_notation(notation, name, value):
    line = notation.format(name=name.lower().replace("_", "-") if "--" in notation else name, value=value)
    kept = Redactor().text(f"x = 1\n{line}\ny = 2\n")
    assert value not in kept, kept
    assert kept.startswith("x = 1\n") and kept.endswith("y = 2\n") and "«redacted:" in kept


@given(
    st.sampled_from(["postgresql", "https", "mysql+pymysql", "amqp"]),
    PASSWORDS.filter(lambda s: "/" not in s and "?" not in s),
)
def test_a_password_in_a_url_never_survives(scheme, value):
    kept = Redactor().text(f"see {scheme}://ana:{value}@db.example:5432/loans?x=1 now")
    assert kept == f"see {scheme}://ana:«redacted:url-password»@db.example:5432/loans?x=1 now"


TOKENS = {
    "aws-key": "AKIA" + "Q3EXAMPLE7Z2K4M6"[:16], "github-token": "ghp_" + "a1B2c3D4" * 5, "gitlab-token": "glpat-" + "x9Y8z7W6v5" * 2, "slack-token": "xoxb-123456789012-abcdefGHIJ",
    "stripe-key": "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "api-key": "sk-proj-" + "abcDEF123_" * 4, "google-key": "AIza" + "Sy0123456789abcdefghijklmnopqrstuvw"[:35],
    "huggingface-token": "hf_" + "aBcDeFgHiJ" * 3 + "kLmN", "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "databricks-token": "dapi" + "0123456789abcdef" * 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENS)
def test_well_known_tokens_are_recognised_anywhere(kind):
    token = TOKENS[kind]
    for text in (token, f"print('{token}')", f"a,{token},b", f"?t={token}&x=1", json.dumps([token])):
        kept = Redactor().text(text)
        assert token not in kept and "«redacted:" in kept
    assert Redactor().text(f"({token})") == f"({mark(kind)})"


def test_a_private_key_goes_whole_also_in_a_diff_and_when_cut():
    key = (
        "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1rZXktdjEAAAAA\n" * 4 + "-----END OPENSSH PRIVATE KEY-----"
    )
    diff = "\n".join("+" + line for line in key.splitlines())
    for text in (key, diff, key[:90], json.dumps({"k": key})):
        assert "b3Blbn" not in Redactor().text(text)
    assert Redactor().text(f"a\n{key}\nb") == "a\n«redacted:private-key»\nb"
    public = "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"
    assert Redactor().text(public) == public


ORDINARY = st.one_of(
    st.integers().map(str), st.floats(allow_nan=False).map(repr), st.binary(min_size=16, max_size=32).map(bytes.hex), st.uuids().map(str),
    st.datetimes().map(str), st.from_regex(r"[a-z]{1,8}( [a-z]{1,8}){0,4}", fullmatch=True).filter(lambda s: not re.search("pass|secret|token|auth|key|cookie|bearer|basic|pwd|dsn|cred", s)),
    st.sampled_from(["dataset:loans@3", "run:01JGT9Z5T0ZZZZZZZZZZZZZZZZ", "sha256:" + "ab" * 32, "s3://bucket/key/part.parquet", "sqlite:///.workbench/mlflow.db", "a@b.example", "git@github.com:a/b.git", "12:30:45"]),
)  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["max_depth", "digest", "max_tokens", "n_tokens", "tokenizer", "seed", "author", "keys", "monkey"]
            ),
            ORDINARY,
        ),
        max_size=6,
    )
)
def test_ordinary_values_are_left_alone(pairs):
    redactor = Redactor({"W": "correct-horse-battery"})
    for text in (
        "\n".join(f"{k} = {v!r}" for k, v in pairs),
        "\n".join(f"{k}: {v}" for k, v in pairs),
        json.dumps(dict(pairs)),
        " ".join(v for _, v in pairs),
    ):
        assert redactor.text(text) == text
    assert redactor.value(dict(pairs)) == dict(pairs)


@given(
    st.lists(st.tuples(STRONG | st.sampled_from(["token", "n", "auth"]), PASSWORDS | ORDINARY | TEXTS), max_size=5),
    SECRETS,
)
def test_redacting_twice_changes_nothing_more(pairs, secret):
    redactor = Redactor({"X": secret})
    text = "\n".join(f"{k} = {v}" for k, v in pairs) + secret
    once = redactor.text(text)
    assert redactor.text(once) == once


@pytest.mark.parametrize(
    "line",
    [
        "password = getpass.getpass()", "token = tokens[0]", "pwd = os.getcwd()", "connect(password=password)", "password: str | None = None", "token: str",
        "api_key=settings.api_key", "password=secret:WAREHOUSE", "password=${DB_PASSWORD}", "password=$DB_PASSWORD", 'password="***"', 'token="[PAD]"', "for token in text.split():",
        'df[["token", "label"]]', 'drop(columns=["password", "email"])', "secrets.token_hex(8)", 'password = f"{pw}"', "if token == 'the':", "password = input('Password: ')", "token: the", "print(f'Token: {t}')",
    ],
)  # fmt: skip
def test_code_that_holds_no_secret_is_left_alone(line):
    assert Redactor().text(line) == line


def test_names():
    assert secret_name("PGPASSWORD") == secret_name("password1") == secret_name("clientSecret") == "strong"
    assert secret_name("HF_TOKEN") == "weak"
    assert not any(
        map(secret_name, ["passwords_seen", "token_count", "secretary", "keyboard", "author", "api_keys_file", ""])
    )


def test_environment_values_are_known_unless_they_are_paths_or_placeholders():
    redactor = Redactor(
        environment={
            "API_KEY": "plain-words-here",
            "PWD": "/home/ana/loans",
            "TOKEN": "true",
            "EDITOR": "vim",
            "DB_PASSWORD": "secret:DB",
        }
    )
    assert (
        redactor.text("plain-words-here /home/ana/loans true vim secret:DB")
        == "«redacted:API_KEY» /home/ana/loans true vim secret:DB"
    )
