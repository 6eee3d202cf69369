"""What several test modules share: a PostgreSQL server for the session, and a fresh database of each kind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import NoPostgres, Server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A running server. Skips where PostgreSQL is not installed; with MLWB_REQUIRE_SERVICES=1 that is a failure."""
    try:
        server = Server()
        try:
            server.start()
        except BaseException:
            server.stop()
            raise
    except NoPostgres as reason:
        if os.environ.get("MLWB_REQUIRE_SERVICES") == "1":
            pytest.fail(str(reason))
        pytest.skip(str(reason))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_url(postgres_server: Server) -> str:
    """The URL of one database for the whole session."""
    return postgres_server.new_database()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.service)])
def any_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a new, empty database: the test runs once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'events.db'}"
        return
    server: Server = request.getfixturevalue("postgres_server")
    url = server.new_database()
    yield url
    server.drop_database(url)
