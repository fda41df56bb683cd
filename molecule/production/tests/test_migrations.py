"""A contract migration: by a deploy of its own, not while a retained deployment needs the old schema, not while users wait."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from interruptions import await_rest
from labtest import Lab, sql
from prooftest import deploy, load, wait_until

CONTRACT = ("-e", "deploy_contract=true")
BRIEF = ("-e", "deploy_keep=2", "-e", "deploy_warm_seconds=0")
REVISION = "9001"
UNDONE = f"""ALTER TABLE documents DROP COLUMN IF EXISTS contracted;
DELETE FROM schema_revisions WHERE revision = '{REVISION}';
UPDATE alembic_version SET version_num = (SELECT max(revision) FROM schema_revisions);"""
READS = "BEGIN; SELECT count(*) FROM documents; SELECT pg_sleep(300);"

pytestmark = pytest.mark.timeout(1800)


def applied(lab: Lab) -> bool:
    """Tell whether the database has the contract revision."""
    return REVISION in sql(lab, lab.group("database")[0], "SELECT revision FROM schema_revisions").splitlines()


@contextmanager
def somebody_reads(lab: Lab) -> Iterator[None]:
    """Have a long transaction that reads documents, as a report does: nothing that changes the table goes past it."""
    host = lab.group("database")[0]
    begun = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(300)%' AND pid <> pg_backend_pid()"
    process = lab.start(host, f'cd / && runuser -u postgres -- psql -Xqd atlas -c "{READS}"')
    try:
        wait_until(lambda: sql(lab, host, begun) == "1", 15, "the long transaction has begun")
        yield
    finally:
        sql(lab, host, begun.replace("count(*)", "pg_terminate_backend(pid)"))
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def test_contract_comes_later_when_nothing_needs_the_old_schema(lab: Lab) -> None:
    try:
        with load(lab, 15) as traffic:
            deploy(lab, "contracts", "blue_green", *BRIEF).succeeded()
            assert not applied(lab), "an ordinary deploy leaves it"
            step = deploy(lab, "contracts", "blue_green", *CONTRACT).refused(
                "Nothing was changed", "Contract migrations would take from deployment", REVISION
            )
            assert step.ended - step.began < 60 and not applied(lab)
            # One more within the slot: what the idle one points at is older than what is kept.
            deploy(lab, "contracts", "rolling", "-e", "deploy_force=true", *BRIEF).succeeded()
            with somebody_reads(lab):
                deploy(lab, "contracts", "rolling", *CONTRACT, *BRIEF).refused("lock timeout")
            assert not applied(lab)
            deploy(lab, "contracts", "rolling", *CONTRACT, *BRIEF).succeeded()
            assert applied(lab)
            deploy(lab, "plain", "rolling").refused(
                "Nothing was changed", f"does not know the contract revision {REVISION}"
            )
            await_rest(lab)
            time.sleep(1)
        verdict = traffic.verdict()
        print(f"\n{verdict}")
        assert verdict.findings == []
    finally:
        sql(lab, lab.group("database")[0], UNDONE)
        deploy(lab, "plain", "rolling").succeeded()
