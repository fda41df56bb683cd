"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
phase = "expand"

Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "documents",
        sa.Column("seq", Serial, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("dedupe_key", sa.Text, nullable=False, unique=True),
        sa.Column("url", sa.Text),
        sa.Column("content_type", sa.Text),
        sa.Column("source", sa.Text),
        sa.Column("title", sa.Text),
        sa.Column("tags", Json, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("content_hash", sa.Text),
        sa.Column("meta", Json),
        sa.Column("sensitive", sa.Text),
        sa.Column("sensitive_key", sa.Text),
        sa.Column("submitted_by", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("processed_at", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "jobs",
        sa.Column("id", Serial, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("document_id", sa.Text, sa.ForeignKey("documents.id", ondelete="CASCADE"), unique=True),
        sa.Column("payload", Json),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("target", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("run_at", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("token", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("lease_until", sa.BigInteger),
        sa.Column("owner", sa.Text),
        sa.Column("deployment", sa.BigInteger),
        sa.Column("request_id", sa.Text),
        sa.Column("error_class", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.CheckConstraint("state IN ('ready', 'running', 'done', 'dead')", name="jobs_state"),
        sa.CheckConstraint("priority BETWEEN 0 AND 2", name="jobs_priority"),
        sqlite_autoincrement=True,
    )
    for name, columns, condition in (
        ("jobs_ready", ["target", "priority", "run_at", "id"], "state = 'ready'"),
        ("jobs_running", ["deployment"], "state = 'running'"),
        ("jobs_ended", ["state", "finished_at"], "state IN ('done', 'dead')"),
    ):
        where = sa.text(condition)
        op.create_index(name, "jobs", columns, sqlite_where=where, postgresql_where=where)
    op.create_table(
        "job_events",
        sa.Column("id", Serial, primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.BigInteger, nullable=False),
        sa.Column("document_id", sa.Text),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("deployment", sa.BigInteger),
        sa.Column("error_class", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("job_events_job", "job_events", ["job_id"])
    op.create_index("job_events_document", "job_events", ["document_id"])
    op.create_index("job_events_at", "job_events", ["at"])
    op.create_table(
        "deployments",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("admitted", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("concurrency", sa.Integer),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("deployment", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "workers",
        sa.Column("host", sa.Text, primary_key=True),
        sa.Column("slot", sa.Text, primary_key=True),
        sa.Column("service", sa.Text, primary_key=True),
        sa.Column("deployment", sa.BigInteger, nullable=False),
        sa.Column("release", sa.Text, nullable=False),
        sa.Column("detail", Json),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("sha256", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("scopes", Json, nullable=False),
        sa.Column("limits", Json),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("disabled_at", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "schema_revisions",
        sa.Column("revision", sa.Text, primary_key=True),
        sa.Column("phase", sa.Text, nullable=False),
        sa.Column("applied_at", sa.BigInteger, nullable=False),
    )
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)


# Documents enter the index when they are processed. The table of texts is not copied (external content).
SQLITE = (
    """CREATE VIRTUAL TABLE documents_index USING fts5(
        title, text, content='documents', content_rowid='seq', tokenize='porter unicode61 remove_diacritics 2')""",
    """CREATE TRIGGER documents_index_update AFTER UPDATE OF title, text ON documents BEGIN
        INSERT INTO documents_index(documents_index, rowid, title, text)
            SELECT 'delete', old.seq, old.title, old.text WHERE old.text IS NOT NULL;
        INSERT INTO documents_index(rowid, title, text)
            SELECT new.seq, new.title, new.text WHERE new.text IS NOT NULL;
    END""",
    """CREATE TRIGGER documents_index_delete AFTER DELETE ON documents WHEN old.text IS NOT NULL BEGIN
        INSERT INTO documents_index(documents_index, rowid, title, text)
            VALUES ('delete', old.seq, old.title, old.text);
    END""",
    """CREATE TRIGGER job_events_append_only BEFORE UPDATE ON job_events BEGIN
        SELECT RAISE(ABORT, 'job_events is append-only');
    END""",
)

# A tsvector holds at most 1 MB, which longer texts could exceed; what follows is stored but not found by search.
POSTGRESQL = (
    """ALTER TABLE documents ADD COLUMN search tsvector GENERATED ALWAYS AS (
        setweight(to_tsvector('english', left(coalesce(title, ''), 10000)), 'A') ||
        setweight(to_tsvector('english', left(coalesce(text, ''), 240000)), 'B')) STORED""",
    "CREATE INDEX documents_search ON documents USING gin (search) WITH (fastupdate = off)",
    """ALTER TABLE jobs SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01,
        autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.05)""",
    """CREATE FUNCTION refuse_update() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$""",
    """CREATE TRIGGER job_events_append_only BEFORE UPDATE ON job_events
        FOR EACH ROW EXECUTE FUNCTION refuse_update()""",
)
