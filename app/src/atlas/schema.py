"""The tables. Every column that holds a time is in milliseconds since the Unix epoch."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    false,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()
PRIORITIES = {"high": 0, "normal": 1, "low": 2}
PRIORITY_NAMES = {value: name for name, value in PRIORITIES.items()}
# jobs.target of a job that any admitted deployment may claim, and of one that waits in the lane of its host.
ANYONE, LANE = 0, -1

Serial = BigInteger().with_variant(Integer, "sqlite")
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

# The state of a document is that of its only job: see documents.STATUS.
documents = Table(
    "documents",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    # "url:" or "content:" and a SHA-256: one key enforces both kinds of uniqueness.
    Column("dedupe_key", Text, nullable=False, unique=True),
    Column("url", Text),
    Column("content_type", Text),
    Column("source", Text),
    Column("title", Text),
    Column("tags", Json, nullable=False),
    Column("text", Text),
    Column("content_hash", Text),
    Column("meta", Json),
    # Ciphertext, and the fingerprint of its key, so that rotation can count what is left.
    Column("sensitive", Text),
    Column("sensitive_key", Text),
    Column("submitted_by", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("processed_at", BigInteger),
    sqlite_autoincrement=True,
)

# Documents by tag, in the order of lists; triggers of the store keep it.
document_tags = Table(
    "document_tags",
    metadata,
    Column("tag", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)

_SENSITIVE = text("sensitive_key IS NOT NULL")
Index(
    "documents_sensitive",
    documents.c.sensitive_key,
    documents.c.seq,
    sqlite_where=_SENSITIVE,
    postgresql_where=_SENSITIVE,
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("document_id", Text, ForeignKey("documents.id", ondelete="CASCADE"), unique=True),
    Column("payload", Json),
    Column("priority", SmallInteger, nullable=False),
    Column("state", Text, nullable=False),
    # The deployment that alone may claim the job (a probe), or ANYONE, or LANE.
    Column("target", BigInteger, nullable=False, server_default=text("0")),
    Column("run_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    # The fencing token: grows at each claim, so that a late finisher holds an old one.
    Column("token", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", BigInteger),
    Column("owner", Text),
    Column("deployment", BigInteger),
    # The remote host that the job fetches from, if any: limits and breakers are kept by it.
    Column("host", Text),
    Column("request_id", Text),
    Column("error_class", Text),
    Column("error", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    CheckConstraint("state IN ('ready', 'running', 'done', 'dead')", name="jobs_state"),
    CheckConstraint("priority BETWEEN 0 AND 2", name="jobs_priority"),
    sqlite_autoincrement=True,
)
_READY, _RUNNING = text("state = 'ready'"), text("state = 'running'")
_ENDED = text("state IN ('done', 'dead')")
Index(
    "jobs_ready",
    jobs.c.target,
    jobs.c.priority,
    jobs.c.run_at,
    jobs.c.id,
    sqlite_where=_READY,
    postgresql_where=_READY,
)
_IN_LANE = text("state = 'ready' AND target = -1")
Index(
    "jobs_lane",
    jobs.c.host,
    jobs.c.priority,
    jobs.c.run_at,
    jobs.c.id,
    sqlite_where=_IN_LANE,
    postgresql_where=_IN_LANE,
)
# lease_until is left out on purpose: on PostgreSQL a heartbeat then touches no index.
Index("jobs_running", jobs.c.deployment, sqlite_where=_RUNNING, postgresql_where=_RUNNING)
_RUNNING_HOST = text("state = 'running' AND host IS NOT NULL")
Index("jobs_running_host", jobs.c.host, sqlite_where=_RUNNING_HOST, postgresql_where=_RUNNING_HOST)
Index("jobs_ended", jobs.c.state, jobs.c.finished_at, sqlite_where=_ENDED, postgresql_where=_ENDED)

# Append-only (a trigger refuses UPDATE): a double finish shows as two rows.
job_events = Table(
    "job_events",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("job_id", BigInteger, nullable=False),
    Column("document_id", Text),
    Column("event", Text, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("owner", Text),
    Column("deployment", BigInteger),
    Column("error_class", Text),
    Column("error", Text),
    Column("at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("job_events_job", job_events.c.job_id)
Index("job_events_document", job_events.c.document_id)
Index("job_events_at", job_events.c.at)

deployments = Table(
    "deployments",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("admitted", Boolean, nullable=False, server_default=false()),
    Column("concurrency", Integer),
    Column("changed_at", BigInteger, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("deployment", BigInteger, nullable=False),
    Column("until", BigInteger, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("host", Text, primary_key=True),
    Column("slot", Text, primary_key=True),
    Column("service", Text, primary_key=True),
    Column("deployment", BigInteger, nullable=False),
    Column("release", Text, nullable=False),
    Column("detail", Json),
    Column("started_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("scopes", Json, nullable=False),
    Column("limits", Json),
    Column("expires_at", BigInteger),
    Column("disabled_at", BigInteger),
    Column("created_at", BigInteger, nullable=False),
)

# What each limited token has used in the current minute and hour (numbered since the epoch), by all processes together.
token_uses = Table(
    "token_uses",
    metadata,
    Column("token", Text, primary_key=True),
    Column("minute", BigInteger, nullable=False),
    Column("minute_uses", BigInteger, nullable=False),
    Column("hour", BigInteger, nullable=False),
    Column("hour_uses", BigInteger, nullable=False),
)

# Who is signed in to the status page: a row goes when its session is ended, or is over.
sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("token", Text, nullable=False),
    Column("until", BigInteger, nullable=False),
)

# Remote hosts of which there is something to remember: see breakers.Host.
hosts = Table(
    "hosts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("state", Text, nullable=False, server_default=text("'closed'")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("successes", Integer, nullable=False, server_default=text("0")),
    Column("open_until", BigInteger, nullable=False, server_default=text("0")),
    Column("next_at", BigInteger, nullable=False, server_default=text("0")),
    Column("waiting", Boolean, nullable=False, server_default=false()),
    Column("error", Text),
    Column("changed_at", BigInteger, nullable=False),
    CheckConstraint("state IN ('closed', 'open', 'half_open')", name="hosts_state"),
)
Index("hosts_waiting", hosts.c.next_at, sqlite_where=text("waiting = 1"), postgresql_where=text("waiting"))

# Answers to requests that carried an Idempotency-Key, by the token (its hash) that sent them.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("token", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_hash", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("response", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
Index("idempotency_keys_created", idempotency_keys.c.created_at)

feeds = Table(
    "feeds",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("url", Text, nullable=False, unique=True),
    Column("title", Text),
    Column("tags", Json, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("interval_seconds", Integer, nullable=False),
    Column("enabled", Boolean, nullable=False, server_default=true()),
    Column("sensitive", Text),
    Column("sensitive_key", Text),
    Column("etag", Text),
    Column("last_modified", Text),
    Column("next_at", BigInteger, nullable=False),
    Column("polled_at", BigInteger),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("error", Text),
    # The latest poll, and the keys of the entries that the one before found.
    Column("job_id", BigInteger),
    Column("seen", Json),
    Column("created_by", Text),
    Column("created_at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("feeds_due", feeds.c.enabled, feeds.c.next_at)

# Who did what to which object: append-only, and kept for `keep_days`. The store stamps `at`.
audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("object_type", Text, nullable=False),
    Column("object_id", Text),
    Column("address", Text),
    Column("request_id", Text),
    Column("detail", Json),
    Column("keep_days", Integer, nullable=False),
    sqlite_autoincrement=True,
)
Index("audit_at", audit.c.at)
Index("audit_object", audit.c.object_type, audit.c.object_id)

# How much there is, kept by triggers: see atlas.counts.
counts = Table(
    "counts",
    metadata,
    Column("state", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("priority", SmallInteger, primary_key=True, autoincrement=False),
    Column("error_class", Text, primary_key=True),
    Column("shard", BigInteger, primary_key=True, autoincrement=False),
    Column("n", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# The queue at moments of the past, for the chart on the status page.
queue_samples = Table(
    "queue_samples",
    metadata,
    Column("at", BigInteger, primary_key=True, autoincrement=False),
    Column("ready", Integer, nullable=False),
    Column("running", Integer, nullable=False),
    Column("dead", Integer, nullable=False),
    Column("finished", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
)

# Which revisions were applied, and of which phase: an older release reads here whether it can still serve.
schema_revisions = Table(
    "schema_revisions",
    metadata,
    Column("revision", Text, primary_key=True),
    Column("phase", Text, nullable=False),
    Column("applied_at", BigInteger, nullable=False),
)
