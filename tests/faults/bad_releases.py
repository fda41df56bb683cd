"""Really bad releases, made by the real builder with the real key from a copy of the sources that is spoiled in one way.

    .venv/bin/python -m tests.faults.bad_releases crashes_when_used     builds it and prints its path; no name lists them

Spoiling only appends to a module (or adds a file), so that it survives changes of the service. What was built is kept under
.cache/test-releases by the digest of sources and spoiling.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".cache" / "test-releases"
COPIED = ("app/bin", "app/src", "app/requirements.lock", "bin", "plugins/module_utils", ".keys", "pyproject.toml")
PACKAGE = "app/src/atlas"
KEPT = 40
"""Built releases that stay in the cache, 80 MB each: those used last."""

APP = """

def _spoiled(create):
    import os, signal, threading, time
    from flask import jsonify, request

    def spoiled(*arguments):
        app, count, hoard = create(*arguments), iter(range(10**9)), []
{body}
        return app

    return spoiled


create_app = _spoiled(create_app)
"""

ON_REQUEST = """
        @app.before_request
        def spoil():
            if {wanted}:
                {deed}
"""

MIGRATION = '''"""Of a test."""

import sqlalchemy as sa
from alembic import op

revision = "9001"
down_revision = "{head}"
phase = "{phase}"


def upgrade():
    {deed}
'''


class Spoiling(NamedTuple):
    """*what* is wrong, in words; *files*: path in the project → text that is appended to it."""

    what: str
    files: dict[str, str]


def _app(body: str) -> dict[str, str]:
    return {f"{PACKAGE}/api/__init__.py": APP.format(body=body)}


def _post(deed: str) -> dict[str, str]:
    return _app(ON_REQUEST.format(wanted="request.method == 'POST'", deed=deed))


def _newest() -> str:
    """Return the file of the newest schema revision of the sources."""
    return max(path.name for path in (PROJECT / PACKAGE / "migrations" / "versions").glob("[0-9]*.py"))


def _migration(phase: str, deed: str) -> dict[str, str]:
    text = MIGRATION.format(head=_newest().split("_")[0], phase=phase, deed=deed)
    return {f"{PACKAGE}/migrations/versions/9001_of_a_test.py": text}


RUN = """

def run():
    import time
    from atlas.watchdog import Notifier
    Notifier().ready("soon gone")
    time.sleep({seconds})
    raise SystemExit(3)
"""

SETTING = """

_Settings = Settings


class Settings(_Settings):
    mail_relay: str = ""

    @model_validator(mode="after")
    def _production_sends_mail(self):
        if self.environment == "production" and not self.mail_relay:
            raise ValueError("mail_relay is required in production")
        return self
"""

SPOILINGS = {
    "good": Spoiling("nothing: another good release", {f"{PACKAGE}/__init__.py": "\n# Another release.\n"}),
    "does_not_start": Spoiling(
        "the application cannot be imported",
        {f"{PACKAGE}/api/__init__.py": "\nraise RuntimeError('this release cannot be imported')\n"},
    ),
    "starts_and_exits": Spoiling(
        "the API ends a second after it reported ready", {f"{PACKAGE}/serve.py": RUN.format(seconds=1)}
    ),
    "never_ready": Spoiling(
        "/readyz never says yes",
        _app(
            ON_REQUEST.format(
                wanted="request.path == '/readyz'", deed="return jsonify(checks={'warm-up': 'is not done'}), 503"
            )
        ),
    ),
    "crashes_when_used": Spoiling(
        "the API dies of its third document",
        _post("if next(count) >= 2: os.kill(os.getppid(), signal.SIGKILL); os._exit(9)"),
    ),
    "fails_sometimes": Spoiling("every third POST is a 500", _post("if next(count) % 3 == 2: raise RuntimeError('spoiled')")),
    "lies": Spoiling(
        "/readyz says yes, and every POST is a 500", _post("raise RuntimeError('spoiled')")
    ),
    "slow": Spoiling("every POST takes three seconds longer", _post("time.sleep(3)")),
    "leaks": Spoiling(
        "each POST keeps 30 MB for ever", _post("hoard.append(b'x' * 30_000_000)")
    ),
    "workers_exit": Spoiling(
        "the workers of the queue end a second after they reported ready; the API is fine",
        {f"{PACKAGE}/core.py": RUN.format(seconds=1)},
    ),
    "workers_fail": Spoiling(
        "every document's job fails but the one that monitoring sends through the workers; the API is fine",
        {
            f"{PACKAGE}/core.py": (
                "\n\n_good = Processor._document\n\n\ndef _document(self, work, asked):\n"
                "    if work.title is not None or work.url is not None:\n        raise RuntimeError('spoiled')\n"
                "    return _good(self, work, asked)\n\n\nProcessor._document = _document\n"
            )
        },
    ),
    "migration_fails": Spoiling(
        "its migration fails half-way",
        _migration("expand", "op.create_table('half', sa.Column('id', sa.Integer)); op.execute('SELECT no_such_column')"),
    ),
    "foreign_schema": Spoiling(
        "its newest revision is none that the database has, nor one that follows",
        {f"{PACKAGE}/migrations/versions/{_newest()}": "\nrevision = '8001'\n"},
    ),
    "fails_with_postgresql": Spoiling(
        "the API cannot be made where the store is PostgreSQL; with SQLite all is well",
        _app("        if str(arguments[0].database_url).startswith('postgresql'): raise RuntimeError('spoiled')\n"),
    ),
    "needs_a_setting": Spoiling(
        "it requires a setting, mail_relay, in production alone", {f"{PACKAGE}/settings.py": SETTING}
    ),
    "expands": Spoiling(
        "nothing: it adds a table that releases before it can live with",
        _migration("expand", "op.create_table('expanded', sa.Column('id', sa.Integer))"),
    ),
    "contracts": Spoiling(
        "it has a contract migration, after which no release before it can serve",
        _migration("contract", "op.add_column('documents', sa.Column('contracted', sa.Integer))"),
    ),
}  # fmt: skip


def another(name: str) -> Spoiling:
    """Return what makes ``good_NAME``: one more good release. Raises KeyError for a name that is none."""
    if not name.startswith("good_"):
        raise KeyError(name)
    return Spoiling(f"nothing: good release {name}", {f"{PACKAGE}/__init__.py": f"\n# {name}\n"})


def build(name: str) -> Path:
    """Return the archive of the release that is spoiled as *name* says; its signature is beside it. Raises KeyError."""
    spoiling = SPOILINGS.get(name) or another(name)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = CACHE / f"{name}-{_digest(spoiling)}"
        if not place.is_dir():
            _build(spoiling, place)
        place.touch()
        for old in sorted(CACHE.glob("*-*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
    return next(place.glob("*.tar.gz"))


def _build(spoiling: Spoiling, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="atlas-release-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source, target = PROJECT / name, copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        (copy / ".cache").mkdir()
        (copy / ".cache" / "release").symlink_to(PROJECT / ".cache" / "release")
        for name, text in spoiling.files.items():
            with (copy / name).open("a", encoding="utf-8") as file:
                file.write(text)
        built = subprocess.run(
            [sys.executable, "bin/build-release"], cwd=copy, capture_output=True, text=True, timeout=300, check=False
        )
        if built.returncode:
            raise RuntimeError(f"the spoiled release cannot be built: {built.stderr}{built.stdout}")
        partial = place.with_name(f".{place.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(copy / "dist", partial)
        partial.rename(place)


def _digest(spoiling: Spoiling) -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(PROJECT)}\0".encode() + path.read_bytes())
    digest.update(repr(sorted(spoiling.files.items())).encode())
    return digest.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    for name in (*COPIED[:3], "bin/build-release", "plugins/module_utils/release.py", ".keys"):
        found = PROJECT / name
        inside = sorted(found.rglob("*")) if found.is_dir() else [found]
        yield from (path for path in inside if path.is_file() and "__pycache__" not in path.parts)


def main() -> int:
    """Build the release that is named, or list the names."""
    if len(sys.argv) != 2 or sys.argv[1] not in SPOILINGS:
        print("\n".join(f"{name:20} {spoiling.what}" for name, spoiling in SPOILINGS.items()), file=sys.stderr)
        return 2
    print(build(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
