"""A real PostgreSQL for the tests: found on this machine, started in a folder of its own, stopped at the end.

PostgreSQL refuses to run as root, so where the tests are root the server runs as `postgres` or `nobody`.
It listens on a Unix socket and on 127.0.0.1, on a free port, with a password made for this run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PLACES = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
]


class NoPostgres(Exception):
    """There is no PostgreSQL to test with; the message says why."""


def binaries() -> Path:
    """The folder with `initdb` and `postgres`, the newest release first."""
    found = [folder for pattern in PLACES for folder in Path("/").glob(pattern[1:])]
    on_path = shutil.which("initdb")
    found = sorted(
        found, key=lambda p: [int(n) for n in str(p).replace("-", "/").split("/") if n.isdigit()], reverse=True
    )
    found += [Path(os.path.realpath(on_path)).parent] if on_path else []
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise NoPostgres(
        "PostgreSQL is not installed (no initdb in /usr/lib/postgresql/*/bin or on the PATH); on Debian: apt install postgresql"
    )


def unprivileged() -> dict[str, Any]:
    """Arguments for `subprocess` that leave root behind; nothing where we are not root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise NoPostgres("the tests run as root and there is neither a user postgres nor nobody to run PostgreSQL as")


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG: also when the tests are killed


class Server:
    """One PostgreSQL server. `start()` it, make databases with `new_database()`, `stop()` it."""

    def __init__(self) -> None:
        self.bin, self.as_user = binaries(), unprivileged()
        memory = Path("/dev/shm")  # many small databases are made and dropped: in memory that is several times faster
        roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**31
        self.folder = Path(
            tempfile.mkdtemp(prefix="mlwb-pg-", dir=memory if roomy else "/tmp")
        )  # short: a socket's path has at most 107 bytes
        self.password = secrets.token_urlsafe(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self, seconds: float = 30.0) -> Server:
        if self.as_user:
            os.chown(self.folder, self.as_user["user"], self.as_user["group"])
        password = self.folder / "password"
        password.write_text(self.password)
        password.chmod(0o644)  # the folder itself is closed to others
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}
        command = [
            self.bin / "initdb",
            "-D",
            self.folder / "data",
            "-U",
            "workbench",
            "-A",
            "scram-sha-256",
            f"--pwfile={password}",
        ]
        made = subprocess.run(
            [*command, "--no-locale", "-E", "UTF8", "--no-sync"],
            capture_output=True,
            text=True,
            cwd="/",
            env=environment,
            **self.as_user,
        )
        if made.returncode:
            raise NoPostgres(f"initdb failed: {made.stderr.strip()[-500:]}")
        for _ in range(5):  # another process may take the port before we do
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            options = {
                "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder, "fsync": "off",
                "shared_buffers": "32MB", "max_connections": 60, "jit": "off", "autovacuum": "off",
            }  # fmt: skip
            arguments = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
            log = (self.folder / "log").open("ab")
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.folder / "data", *arguments],
                stdout=log, stderr=log, cwd="/", env=environment, start_new_session=True, preexec_fn=_die_with_parent, **self.as_user,
            )  # fmt: skip
            log.close()
            if self._answers(seconds):
                return self
        raise NoPostgres(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-500:]}")

    def _answers(self, seconds: float) -> bool:
        import psycopg

        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process is not None and self.process.poll() is None:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return True
            except psycopg.OperationalError:
                time.sleep(0.05)
        return False

    def url(self, database: str) -> str:
        return f"postgresql://workbench:{self.password}@127.0.0.1:{self.port}/{database}"

    def run(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as the superuser, outside a transaction."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)  # type: ignore[arg-type]

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        self.run(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Remove a database that `new_database` made, and end whoever still uses it."""
        self.run(f"DROP DATABASE {url.rsplit('/', 1)[1]} WITH (FORCE)")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)  # "immediate": nothing is worth saving
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        shutil.rmtree(self.folder, ignore_errors=True)
