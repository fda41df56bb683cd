"""Remote hosts and their breakers, repeated requests, sessions, feeds, the audit log, and the queue's history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.schema import CreateIndex, CreateTable

revision = "0002"
down_revision = "0001"
phase = "expand"

Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("host", sa.Text))
    for table, name, columns, condition in (
        ("jobs", "jobs_running_host", ["host"], "state = 'running' AND host IS NOT NULL"),
        ("jobs", "jobs_lane", ["host", "priority", "run_at", "id"], "state = 'ready' AND target = -1"),
        ("documents", "documents_sensitive", ["sensitive_key", "seq"], "sensitive_key IS NOT NULL"),
    ):
        where = sa.text(condition)
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
    op.create_table(
        "hosts",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False, server_default=sa.text("'closed'")),
        sa.Column("failures", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("successes", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("open_until", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("next_at", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("waiting", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("error", sa.Text),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.CheckConstraint("state IN ('closed', 'open', 'half_open')", name="hosts_state"),
    )
    waiting = sa.text("waiting = 1"), sa.text("waiting")
    op.create_index("hosts_waiting", "hosts", ["next_at"], sqlite_where=waiting[0], postgresql_where=waiting[1])
    # In the order of lists; kept by triggers, so that the releases before this one keep it too.
    op.create_table(
        "document_tags",
        sa.Column("tag", sa.Text, primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sqlite_with_rowid=False,
    )
    for statement in SQLITE_TAGS if op.get_bind().dialect.name == "sqlite" else POSTGRESQL_TAGS:
        op.execute(statement)
    op.create_table(
        "idempotency_keys",
        sa.Column("token", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("request_hash", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("response", Json, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("idempotency_keys_created", "idempotency_keys", ["created_at"])
    op.create_table(
        "token_uses",
        sa.Column("token", sa.Text, primary_key=True),
        sa.Column("minute", sa.BigInteger, nullable=False),
        sa.Column("minute_uses", sa.BigInteger, nullable=False),
        sa.Column("hour", sa.BigInteger, nullable=False),
        sa.Column("hour_uses", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "feeds",
        sa.Column("seq", Serial, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("url", sa.Text, nullable=False, unique=True),
        sa.Column("title", sa.Text),
        sa.Column("tags", Json, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("interval_seconds", sa.Integer, nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column("sensitive", sa.Text),
        sa.Column("sensitive_key", sa.Text),
        sa.Column("etag", sa.Text),
        sa.Column("last_modified", sa.Text),
        sa.Column("next_at", sa.BigInteger, nullable=False),
        sa.Column("polled_at", sa.BigInteger),
        sa.Column("failures", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("error", sa.Text),
        sa.Column("job_id", sa.BigInteger),
        sa.Column("seen", Json),
        sa.Column("created_by", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("feeds_due", "feeds", ["enabled", "next_at"])
    _create_audit()
    op.create_table(
        "counts",
        sa.Column("state", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("priority", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("error_class", sa.Text, primary_key=True),
        sa.Column("shard", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    for statement in SQLITE_COUNTS if op.get_bind().dialect.name == "sqlite" else POSTGRESQL_COUNTS:
        op.execute(statement)
    op.create_table(
        "queue_samples",
        sa.Column("at", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("ready", sa.Integer, nullable=False),
        sa.Column("running", sa.Integer, nullable=False),
        sa.Column("dead", sa.Integer, nullable=False),
        sa.Column("finished", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
    )


def _create_audit() -> None:
    bind = op.get_bind()
    is_sqlite = bind.dialect.name == "sqlite"
    audit = sa.Table(
        "audit",
        sa.MetaData(),
        sa.Column("id", Serial, primary_key=True, autoincrement=True),
        sa.Column("at", sa.BigInteger, nullable=False, server_default=sa.text(SQLITE_NOW if is_sqlite else PG_NOW)),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("object_type", sa.Text, nullable=False),
        sa.Column("object_id", sa.Text),
        sa.Column("address", sa.Text),
        sa.Column("request_id", sa.Text),
        sa.Column("detail", Json),
        sa.Column("keep_days", sa.Integer, nullable=False),
        sqlite_autoincrement=True,
    )
    indexes = (sa.Index("audit_at", audit.c.at), sa.Index("audit_object", audit.c.object_type, audit.c.object_id))
    made = [str(CreateTable(audit).compile(bind)), *(str(CreateIndex(index).compile(bind)) for index in indexes)]
    statements = [*made, *(SQLITE_AUDIT if is_sqlite else POSTGRESQL_AUDIT)]
    has_keeper = "SELECT to_regprocedure('public.establish_audit(text[])') IS NOT NULL"
    if not is_sqlite and bind.scalar(sa.text(has_keeper)):
        # Everything is then made by, and belongs to, a role that the service is no member of.
        bind.execute(sa.text("SELECT public.establish_audit(:statements)"), {"statements": statements})
        return
    for statement in statements:
        bind.exec_driver_sql(statement)


SQLITE_TAGS = (
    """INSERT OR IGNORE INTO document_tags SELECT t.value, d.seq FROM documents AS d, json_each(d.tags) AS t""",
    """CREATE TRIGGER document_tags_insert AFTER INSERT ON documents WHEN new.tags <> '[]' BEGIN
        INSERT OR IGNORE INTO document_tags SELECT value, new.seq FROM json_each(new.tags);
    END""",
    """CREATE TRIGGER document_tags_delete AFTER DELETE ON documents WHEN old.tags <> '[]' BEGIN
        DELETE FROM document_tags WHERE tag IN (SELECT value FROM json_each(old.tags)) AND seq = old.seq;
    END""",
)
POSTGRESQL_TAGS = (
    "INSERT INTO document_tags SELECT DISTINCT t.value, d.seq FROM documents d, jsonb_array_elements_text(d.tags) t",
    """CREATE FUNCTION keep_document_tags() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO document_tags SELECT DISTINCT value, new.seq FROM jsonb_array_elements_text(new.tags);
        ELSE
            DELETE FROM document_tags
            WHERE tag IN (SELECT value FROM jsonb_array_elements_text(old.tags)) AND seq = old.seq;
        END IF;
        RETURN NULL;
    END $$""",
    """CREATE TRIGGER document_tags_insert AFTER INSERT ON documents FOR EACH ROW
        WHEN (new.tags <> '[]') EXECUTE FUNCTION keep_document_tags()""",
    """CREATE TRIGGER document_tags_delete AFTER DELETE ON documents FOR EACH ROW
        WHEN (old.tags <> '[]') EXECUTE FUNCTION keep_document_tags()""",
)
# Kept by triggers for the same reason. Finished jobs are not counted.
_ADD = "ON CONFLICT (state, kind, priority, error_class, shard) DO UPDATE SET n = counts.n + excluded.n"
_COLUMNS = "(state, kind, priority, error_class, shard, n)"


def _key(row: str) -> str:
    dead = f"CASE {row}.state WHEN 'dead' THEN coalesce({row}.error_class, 'unknown') ELSE '' END"
    return f"{row}.state, {row}.kind, {row}.priority, {dead}"


def _sqlite(row: str, n: int) -> str:
    return f"INSERT INTO counts {_COLUMNS} SELECT {_key(row)}, 0, {n} WHERE {row}.state <> 'done' {_ADD};"


def _filled(shard: str) -> tuple[str, str]:
    return (
        f"INSERT INTO counts {_COLUMNS} SELECT {_key('jobs')}, {shard}, count(*) FROM jobs WHERE state <> 'done'"
        " GROUP BY 1, 2, 3, 4",
        f"INSERT INTO counts {_COLUMNS} SELECT 'stored', 'document', 0, '', {shard}, count(*) FROM documents",
    )


_STORED = "UPDATE counts SET n = n {} 1 WHERE state = 'stored'"
SQLITE_COUNTS = (
    *_filled("0"),
    f"CREATE TRIGGER counts_job_insert AFTER INSERT ON jobs BEGIN {_sqlite('new', 1)} END",
    f"CREATE TRIGGER counts_job_delete AFTER DELETE ON jobs BEGIN {_sqlite('old', -1)} END",
    f"""CREATE TRIGGER counts_job_update AFTER UPDATE OF state, kind, priority, error_class ON jobs
        WHEN old.state <> new.state OR old.kind <> new.kind OR old.priority <> new.priority OR new.state = 'dead'
        BEGIN {_sqlite("old", -1)} {_sqlite("new", 1)} END""",
    f"CREATE TRIGGER counts_document_insert AFTER INSERT ON documents BEGIN {_STORED.format('+')}; END",
    f"CREATE TRIGGER counts_document_delete AFTER DELETE ON documents BEGIN {_STORED.format('-')}; END",
)
# Each session has rows of its own, or all of them would commit one after another.
POSTGRESQL_COUNTS = (
    "ALTER TABLE counts SET (fillfactor = 30)",
    f"""CREATE FUNCTION count_jobs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO counts AS counts {_COLUMNS}
            SELECT {_key("r")}, pg_backend_pid(), count(*) FROM new_rows r WHERE r.state <> 'done'
            GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 {_ADD};
        ELSIF TG_OP = 'DELETE' THEN
            INSERT INTO counts AS counts {_COLUMNS}
            SELECT {_key("r")}, pg_backend_pid(), -count(*) FROM old_rows r WHERE r.state <> 'done'
            GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 {_ADD};
        ELSE
            INSERT INTO counts AS counts {_COLUMNS}
            SELECT {_key("r")}, pg_backend_pid(), sum(r.d) FROM (
                SELECT state, kind, priority, error_class, 1 AS d FROM new_rows
                UNION ALL SELECT state, kind, priority, error_class, -1 FROM old_rows
            ) r WHERE r.state <> 'done'
            GROUP BY 1, 2, 3, 4 HAVING sum(r.d) <> 0 ORDER BY 1, 2, 3, 4 {_ADD};
        END IF;
        RETURN NULL;
    END $$""",
    f"""CREATE FUNCTION count_documents() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE added bigint; BEGIN
        IF TG_OP = 'INSERT' THEN SELECT count(*) INTO added FROM new_rows;
        ELSE SELECT -count(*) INTO added FROM old_rows;
        END IF;
        IF added <> 0 THEN
            INSERT INTO counts AS counts {_COLUMNS}
            VALUES ('stored', 'document', 0, '', pg_backend_pid(), added) {_ADD};
        END IF;
        RETURN NULL;
    END $$""",
    *(
        f"""CREATE TRIGGER counts_{change.lower()} AFTER {change} ON {table} REFERENCING {rows}
            FOR EACH STATEMENT EXECUTE FUNCTION count_{table}()"""
        for table, changes in (("jobs", ("INSERT", "UPDATE", "DELETE")), ("documents", ("INSERT", "DELETE")))
        for change, rows in (
            ("INSERT", "NEW TABLE AS new_rows"),
            ("UPDATE", "OLD TABLE AS old_rows NEW TABLE AS new_rows"),
            ("DELETE", "OLD TABLE AS old_rows"),
        )
        if change in changes
    ),
    # The locks that the triggers took let nobody write in between.
    *_filled("0"),
)
SQLITE_NOW = "(CAST(unixepoch('subsec') * 1000 AS INTEGER))"
PG_NOW = "(extract(epoch from statement_timestamp()) * 1000)::bigint"
SQLITE_AUDIT = (
    """CREATE TRIGGER audit_append_only BEFORE UPDATE ON audit BEGIN
        SELECT RAISE(ABORT, 'audit is append-only');
    END""",
    """CREATE TRIGGER audit_kept BEFORE DELETE ON audit
        WHEN old.at + old.keep_days * 86400000 >= unixepoch('subsec') * 1000 BEGIN
        SELECT RAISE(ABORT, 'audit is append-only');
    END""",
    # INSERT OR REPLACE deletes without a DELETE trigger.
    """CREATE TRIGGER audit_not_replaced BEFORE INSERT ON audit
        WHEN EXISTS (SELECT 1 FROM audit WHERE id = new.id) BEGIN
        SELECT RAISE(ABORT, 'audit is append-only');
    END""",
)
POSTGRESQL_AUDIT = (
    f"""CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'DELETE' AND old.at + old.keep_days * 86400000::bigint < {PG_NOW} THEN RETURN old; END IF;
        RAISE EXCEPTION 'audit is append-only';
    END $$""",
    """CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit
        FOR EACH ROW EXECUTE FUNCTION refuse_audit_change()""",
    f"""CREATE FUNCTION purge_audit(most integer) RETURNS bigint LANGUAGE sql SECURITY DEFINER
        SET search_path = pg_catalog, public, pg_temp AS $$
        WITH gone AS (
            DELETE FROM audit WHERE id IN (
                SELECT id FROM audit WHERE at + keep_days * 86400000::bigint < {PG_NOW} LIMIT most
            ) RETURNING id
        ) SELECT count(*) FROM gone $$""",
    # Not "at": nobody but the database says when.
    """GRANT SELECT, INSERT (actor, action, object_type, object_id, address, request_id, detail, keep_days)
        ON audit TO pg_database_owner""",
    "GRANT USAGE ON SEQUENCE audit_id_seq TO pg_database_owner",
    "REVOKE ALL ON FUNCTION purge_audit FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION purge_audit TO pg_database_owner",
)
