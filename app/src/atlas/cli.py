"""The `atlas` command. What is needed by one command alone is imported by it, so that all start fast and stay small."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy import make_url

import atlas
from atlas.schema import PRIORITIES
from atlas.settings import SettingsError, load_identity, load_settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from atlas.crypto import Keyring
    from atlas.db import Database
    from atlas.feeds import Feeds
    from atlas.queue import Queue, Which

EXIT_FAILED = 1
EXIT_USAGE = 2
SERVICES = {"api": "atlas.serve", "core": "atlas.core", "services": "atlas.services", "monitoring": "atlas.monitoring"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Atlas takes content in and never loses what it has acknowledged."""


def main() -> None:
    """Run the command. Whatever is wrong is said in one clear line: exit 2 for settings, 1 for the rest."""
    from sqlalchemy.exc import SQLAlchemyError

    from atlas.crypto import KeyringError

    try:
        cli.main(prog_name="atlas", standalone_mode=True)
    except SettingsError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_USAGE)
    except KeyringError as error:
        click.echo(f"credentials: {error}", err=True)
        sys.exit(EXIT_USAGE)
    except (SQLAlchemyError, OSError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        click.echo(f"atlas: the database does not answer: {reason}", err=True)
        sys.exit(EXIT_FAILED)


@contextmanager
def open_database() -> Iterator[Database]:
    from atlas.db import Database

    database = Database(load_settings())
    try:
        yield database
    finally:
        database.close()


def report(values: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(values) if as_json else text)


def moment(value: str | None) -> int | None:
    """A moment given in RFC 3339, in milliseconds."""
    from atlas.db import milliseconds

    try:
        return None if value is None else milliseconds(value)
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{value!r} is not a moment in RFC 3339, like 2026-01-31T12:00:00Z") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command()
@click.argument("service", type=click.Choice(list(SERVICES)))
def serve(service: str) -> None:
    """Run one of the four services until SIGTERM."""
    importlib.import_module(SERVICES[service]).run()


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version of this release."""
    values = {"version": atlas.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    report(values, as_json, f"atlas {atlas.__version__}")


@cli.group()
def config() -> None:
    """The settings of a deployment."""


@config.command("check")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@json_option
def config_check(files: tuple[str, ...], as_json: bool) -> None:
    """Check the settings file that ATLAS_SETTINGS names, or FILES: exit 2 with one line for each finding.

    Without --json, the first of FILES that has findings is the last one that is read.
    """
    found = []
    for path in files or [None]:
        if path:
            os.environ["ATLAS_SETTINGS"] = path
        try:
            load_identity(load_settings())
            found.append({"valid": True, "findings": []})
        except SettingsError as error:
            if not as_json:
                raise
            found.append({"valid": False, "source": error.source, "findings": error.findings})
    report(found if files else found[0], as_json, "settings are valid")
    sys.exit(0 if all(each["valid"] for each in found) else EXIT_USAGE)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Find and explain what is wrong on this host, with the command that mends it: exit 1 if that is an error."""
    from atlas.doctor import examine

    found = list(examine())
    lines = [f"{each.level}: {each.check}: {each.message}\n    mend: {each.mend}" for each in found]
    report([each.as_dict() for each in found], as_json, "\n".join(lines) or "nothing is wrong")
    sys.exit(EXIT_FAILED if any(each.level == "error" for each in found) else 0)


@cli.group()
def db() -> None:
    """The schema of the store."""


@db.command("migrate")
@click.option("--contract", is_flag=True, help="Make those changes too that older releases cannot live with.")
@json_option
def db_migrate(contract: bool, as_json: bool) -> None:
    """Bring the schema to this release's head, by changes that older releases can live with."""
    from atlas.migrations import MigrationError, migrate

    with open_database() as database:
        try:
            before, after = migrate(database, contract)
        except MigrationError as error:
            raise click.ClickException(str(error)) from None
    values = {"from": before, "to": after, "changed": before != after}
    report(values, as_json, f"schema is at {after}" + (f" (was {before or 'empty'})" if before != after else ""))


@db.command("status")
@json_option
def db_status(as_json: bool) -> None:
    """Say where the schema is, and whether this release can serve on it."""
    from atlas.migrations import SchemaStatus, head, status

    path = make_url(load_settings().database_url)
    if path.get_backend_name() == "sqlite" and not os.path.exists(path.database or ""):
        found = SchemaStatus(None, head(), False, False)
    else:
        with open_database() as database:
            found = status(database)
    fit = "fits" if found.compatible else "does not fit"
    report(
        found.as_dict(), as_json, f"schema is at {found.current or 'nothing'}; head {found.head}; {fit} this release"
    )


@db.command("snapshot")
@click.argument("target", type=click.Path(path_type=Path))
@json_option
def db_snapshot(target: Path, as_json: bool) -> None:
    """Copy a SQLite store, as it is at one moment, to the file TARGET."""
    from atlas.snapshot import SnapshotError, take

    url = make_url(load_settings().database_url)
    if url.get_backend_name() != "sqlite":
        raise click.ClickException("only a SQLite store is copied by this command; PostgreSQL has backups of its own")
    try:
        values = take(url.database or "", target)
    except SnapshotError as error:
        raise click.ClickException(str(error)) from None
    report(values, as_json, f"{target}: {values['bytes']} bytes, schema {values['schema']}")


@db.command("contents")
@json_option
def db_contents(as_json: bool) -> None:
    """Count what the store holds."""
    from atlas.snapshot import contents

    with open_database() as database:
        values = contents(database)
    report(values, as_json, "\n".join(f"{name} {count}" for name, count in values["rows"].items()))


@db.command("verify")
@json_option
def db_verify(as_json: bool) -> None:
    """Check that this release can live on the store: integrity, schema, sensitive fields, audit log, search."""
    from atlas.crypto import Keyring
    from atlas.snapshot import verify

    keyring = Keyring.from_secret(load_settings().fernet_keys)
    with open_database() as database:
        values = verify(database, keyring)
    report(values, as_json, "\n".join(values["faults"]) or "this release can live on the store")
    sys.exit(EXIT_FAILED if values["faults"] else 0)


@cli.group()
def tokens() -> None:
    """API tokens."""


@tokens.command("apply")
@json_option
def tokens_apply(as_json: bool) -> None:
    """Make the store hold exactly the tokens of the credential `tokens`."""
    from atlas.tokens import Tokens

    with open_database() as database:
        changed = Tokens(database).apply(load_settings().tokens)
    report({"changed": changed}, as_json, f"{changed} tokens changed")


@tokens.command("list")
@json_option
def tokens_list(as_json: bool) -> None:
    """List the tokens of the store, with what they may do and when they expire; secrets are known to nobody."""
    from atlas.db import rfc3339
    from atlas.tokens import listed

    times = ("expires_at", "disabled_at", "created_at")
    with open_database() as database:
        found = [token | {name: rfc3339(token[name]) for name in times} for token in listed(database)]
    lines = [
        f"{token['name']} {','.join(token['scopes'])}"
        + (
            " at most {per_minute}/min, {per_hour}/h".format(**token["limits"])
            if token["limits"]
            else " without limits"
        )
        + (f" expires {token['expires_at']}" if token["expires_at"] else "")
        + (f" disabled {token['disabled_at']}" if token["disabled_at"] else "")
        for token in found
    ]
    report(found, as_json, "\n".join(lines) or "there is no token")


@cli.group()
def admission() -> None:
    """Which deployments may claim jobs and lead."""


@admission.command("admit")
@click.argument("deployment", type=click.IntRange(min=0))
@click.option("--concurrency", type=click.IntRange(min=1), help="How many jobs it may have running at once.")
@click.option("--alone", is_flag=True, help="Let no other deployment claim jobs.")
@json_option
def admission_admit(deployment: int, concurrency: int | None, alone: bool, as_json: bool) -> None:
    """Let a deployment claim jobs."""
    from atlas.admission import admit

    with open_database() as database:
        changed = admit(database, deployment, concurrency, alone)
    report({"id": deployment, "changed": changed}, as_json, f"deployment {deployment} is admitted")


@admission.command("dismiss")
@click.argument("deployment", type=click.IntRange(min=0))
@json_option
def admission_dismiss(deployment: int, as_json: bool) -> None:
    """Let a deployment claim no more jobs."""
    from atlas.admission import dismiss

    with open_database() as database:
        changed = dismiss(database, deployment)
    report({"id": deployment, "changed": changed}, as_json, f"deployment {deployment} is dismissed")


@admission.command("list")
@json_option
def admission_list(as_json: bool) -> None:
    """List what was decided for each deployment."""
    from atlas.admission import admissions

    with open_database() as database:
        found = admissions(database)
    lines = [
        f"{entry.id} {'admitted' if entry.admitted else 'dismissed'}"
        + (f" (at most {entry.concurrency} at once)" if entry.concurrency else "")
        for entry in found
    ]
    report([entry.as_dict() for entry in found], as_json, "\n".join(lines) or "no deployment was admitted yet")


@cli.command()
@click.option("--actor", help="A token's name, cli:ACCOUNT, or service:NAME.")
@click.option("--action", help="What was done: requeued, rotated, ...")
@click.option("--type", "object_type", help="What it was done to: job, document, feed, token, key, deployment, ...")
@click.option("--id", "object_id", help="To which one.")
@click.option("--since", help="The earliest moment, in RFC 3339.")
@click.option("--until", help="The moment to end before, in RFC 3339.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
def audit(since: str | None, until: str | None, limit: int, as_json: bool, **filters: str | None) -> None:
    """List who did what to which object, newest first."""
    from atlas.audit import records, shown

    with open_database() as database:
        found, _ = records(database, filters, limit, since=moment(since), until=moment(until))
    entries = [shown(entry) for entry in found]
    lines = [
        " ".join(
            str(part)
            for part in (entry["at"], entry["actor"], entry["action"], entry["object_type"])
            + (entry["object_id"], entry["address"], entry["detail"] and json.dumps(entry["detail"]))
            if part is not None
        )
        for entry in entries
    ]
    report(entries, as_json, "\n".join(lines) or "no record matches")


@contextmanager
def open_jobs() -> Iterator[Queue]:
    from atlas.runtime import open_queue

    with open_database() as database:
        yield open_queue(database, "cli", 0, load_settings())


def which_jobs(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose jobs; see `chosen`."""
    for option in (
        click.option("--until", help="The moment to end before, in RFC 3339."),
        click.option("--since", help="The earliest moment of their end, in RFC 3339."),
        click.option("--error-class", help="The class of their error: timeout, not_found, ..."),
        click.option("--host", help="The remote host that they ask, as host[:port]."),
    ):
        command = option(command)
    return command


def chosen(state: str | None, host: str | None, error_class: str | None, since: str | None, until: str | None) -> Which:
    from atlas.queue import Which

    return Which(None, state, host, error_class, moment(since), moment(until))


def report_jobs(which: Which, limit: int, before: int | None, as_json: bool) -> None:
    from atlas.queue import shown

    with open_jobs() as opened:
        found = [shown(job) for job in opened.find(which, limit, before)[0]]
    lines = [
        f"{job['id']} {job['state']} {job['host'] or job['document_id'] or job['kind']}, attempts: {job['attempts']}"
        + (f", {job['error_class']}: {job['error']}" if job["error_class"] else "")
        for job in found
    ]
    report(found, as_json, "\n".join(lines) or "no job matches")


def report_job(which: Which, name: str, as_json: bool) -> None:
    from atlas.queue import shown

    with open_jobs() as opened:
        found, _ = opened.find(which, 1)
    if not found:
        raise click.ClickException(f"there is no {name}")
    job = shown(found[0])
    events = job["events"]
    lines = [f"{key}: {value}" for key, value in job.items() if key != "events" and value is not None]
    lines += [" ".join(str(part) for part in event.values() if part is not None) for event in events]
    report(job, as_json, "\n".join(lines))


JOB_ID = click.IntRange(1, 2**63 - 1)
job_argument = click.argument("job_id", type=JOB_ID)
limit_option = click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
before_option = click.option("--before", type=JOB_ID, help="Continue after the last id of a list.")


@cli.group()
def queue() -> None:
    """What waits, what runs, and what became of it."""


@queue.command("status")
@json_option
def queue_status(as_json: bool) -> None:
    """Show the statistics that /v1/statistics shows."""
    from atlas.statistics import collect

    with open_jobs() as opened:
        found = collect(opened.database, opened.stats(), load_settings().queue_limit)
    states = {name: value for name, value in found["queue"].items() if isinstance(value, dict)}
    lines = [
        f"{name}: {sum(counts.values())}" + "".join(f", {count} {key}" for key, count in counts.items() if count)
        for name, counts in states.items()
    ]
    lines += [f"limit: {found['queue']['limit']}", f"oldest: {found['queue']['oldest_ready_seconds']:g} s"]
    report(found, as_json, "\n".join(lines))


@queue.command("list")
@click.option("--state", type=click.Choice(["ready", "running", "done", "dead"]))
@which_jobs
@limit_option
@before_option
@json_option
def queue_list(limit: int, before: int | None, as_json: bool, **wanted: Any) -> None:
    """List jobs, newest first."""
    report_jobs(chosen(**wanted), limit, before, as_json)


@queue.command("show")
@job_argument
@json_option
def queue_show(job_id: int, as_json: bool) -> None:
    """Show a job with its history: exit 1 if there is none."""
    from atlas.queue import Which

    report_job(Which(ids=[job_id]), f"job {job_id}", as_json)


@cli.group("dead-letters")
def dead_letters() -> None:
    """Jobs that failed for good."""


@dead_letters.command("list")
@which_jobs
@limit_option
@before_option
@json_option
def dead_letters_list(limit: int, before: int | None, as_json: bool, **wanted: Any) -> None:
    """List dead letters, newest first."""
    report_jobs(chosen("dead", **wanted), limit, before, as_json)


@dead_letters.command("show")
@job_argument
@json_option
def dead_letters_show(job_id: int, as_json: bool) -> None:
    """Show a dead letter with the history of its errors: exit 1 if there is none."""
    from atlas.queue import Which

    report_job(Which(ids=[job_id], state="dead"), f"dead letter {job_id}", as_json)


def change_letters(change: str, job_id: int | None, every: bool, as_json: bool, wanted: Mapping[str, Any]) -> None:
    from atlas.audit import operator, record
    from atlas.queue import CHANGES, Which, change_many

    make, done = CHANGES[change]
    given = {name: value for name, value in wanted.items() if value is not None}
    if [job_id is not None, every, bool(given)].count(True) != 1:
        raise click.UsageError("give a JOB_ID, or filters, or --all")
    which = chosen("dead", **wanted)

    def write(connection: Connection, ids: Sequence[int]) -> None:
        detail = None if job_id else (given or {"all": True}) | {"ids": list(ids)}
        record(connection, operator(), done, "job", job_id, detail=detail)

    with open_jobs() as opened:
        if job_id is not None:
            count = len(make(opened, Which(ids=[job_id]), write))
        else:
            count, more = 0, True
            while more:
                changed, more = change_many(opened, change, which, write)
                count += changed
    if job_id is not None and not count:
        raise click.ClickException(f"there is no dead letter {job_id}")
    report({"count": count, "change": done}, as_json, f"{count} dead letters {done}")


def changes_letters(command: Callable[..., None]) -> Callable[..., None]:
    every = click.option("--all", "every", is_flag=True, help="All dead letters.")
    return click.argument("job_id", type=JOB_ID, required=False)(which_jobs(every(json_option(command))))


@dead_letters.command("requeue")
@changes_letters
def dead_letters_requeue(job_id: int | None, every: bool, as_json: bool, **wanted: Any) -> None:
    """Give one dead letter, or those that match, all their attempts again."""
    change_letters("requeue", job_id, every, as_json, wanted)


@dead_letters.command("discard")
@changes_letters
def dead_letters_discard(job_id: int | None, every: bool, as_json: bool, **wanted: Any) -> None:
    """Remove one dead letter, or those that match, with documents that were never processed."""
    change_letters("discard", job_id, every, as_json, wanted)


@cli.group("breakers")
def breakers_group() -> None:
    """Remote hosts, and whether they may be asked."""


@breakers_group.command("list")
@click.option("--state", type=click.Choice(["closed", "open", "half_open"]))
@click.option("--after", help="Continue after the last name of a list.")
@limit_option
@json_option
def breakers_list(state: str | None, after: str | None, limit: int, as_json: bool) -> None:
    """List the remote hosts of which there is something to remember, by name."""
    from atlas.breakers import listed

    with open_database() as database:
        found = [host.as_dict() for host in listed(database, state, limit, after)[0]]
    lines = [
        f"{host['name']} {host['state']}, failures: {host['failures']}"
        + (f", not before {host['next_at']}" if host["next_at"] else "")
        + (", jobs wait" if host["waiting"] else "")
        for host in found
    ]
    report(found, as_json, "\n".join(lines) or "nothing is known of any host")


@breakers_group.command("reset")
@click.argument("host")
@json_option
def breakers_reset(host: str, as_json: bool) -> None:
    """Close the breaker of HOST, and end any pause: exit 1 if nothing is known of it."""
    from atlas.audit import operator, record
    from atlas.breakers import reset

    with open_database() as database, database.write() as connection:
        if not reset(database, connection, host):
            raise click.ClickException(f"nothing is known of the host {host}")
        record(connection, operator(), "reset", "breaker", host)
    report({"name": host}, as_json, f"the breaker of {host} is closed")


@cli.group()
def feeds() -> None:
    """Subscriptions to RSS and Atom."""


@contextmanager
def open_feeds() -> Iterator[Feeds]:
    from atlas.crypto import Keyring
    from atlas.documents import Documents
    from atlas.feeds import Feeds
    from atlas.runtime import open_queue

    settings = load_settings()
    with open_database() as database:
        queue = open_queue(database, "cli", 0, settings)
        yield Feeds(Documents(database, queue, Keyring.from_secret(settings.fernet_keys), settings))


@feeds.command("list")
@json_option
def feeds_list(as_json: bool) -> None:
    """List the feeds with the outcome of the latest poll of each."""
    with open_feeds() as opened:
        found, _, _ = opened.list(limit=10_000)
    lines = [
        f"{feed['id']} {feed['url']} every {feed['interval_seconds']} s, polled {feed['polled_at'] or 'never'}"
        + ("" if feed["enabled"] else ", paused")
        + (f": {feed['error']}" if feed["error"] else "")
        for feed in found
    ]
    report(found, as_json, "\n".join(lines) or "there is no feed")


@feeds.command("add")
@click.argument("url")
@click.option("--tag", "tags", multiple=True, help="A tag of its documents; may be given several times.")
@click.option("--priority", type=click.Choice(list(PRIORITIES)), default="normal", show_default=True)
@click.option("--interval", "interval_seconds", type=click.IntRange(1), help="Seconds between two polls.")
@json_option
def feeds_add(url: str, tags: tuple[str, ...], priority: str, interval_seconds: int | None, as_json: bool) -> None:
    """Subscribe to the feed at URL. One that needs credentials is added through the API."""
    from atlas.audit import operator, record
    from atlas.documents import InvalidDocument

    values: dict[str, Any] = {"tags": tags, "priority": PRIORITIES[priority]}
    if interval_seconds is not None:
        values["interval_seconds"] = interval_seconds
    try:
        with open_feeds() as opened, opened.database.write() as connection:
            feed_id, is_new = opened.create(connection, url, operator(), **values)
            if is_new:
                record(connection, operator(), "created", "feed", feed_id, detail={"url": url})
    except InvalidDocument as error:
        raise click.UsageError(str(error)) from None
    report(
        {"id": feed_id, "changed": is_new}, as_json, f"feed {feed_id} " + ("is new" if is_new else "was there already")
    )


@feeds.command("poll")
@click.argument("feed_id")
@json_option
def feeds_poll(feed_id: str, as_json: bool) -> None:
    """Have a feed polled within seconds."""
    with open_feeds() as opened, opened.database.write() as connection:
        if not opened.change(connection, feed_id, {}):
            raise click.ClickException(f"there is no feed {feed_id}")
    report({"id": feed_id}, as_json, f"feed {feed_id} is due")


@feeds.command("remove")
@click.argument("feed_id")
@json_option
def feeds_remove(feed_id: str, as_json: bool) -> None:
    """End a subscription; the documents it brought stay."""
    from atlas.audit import operator, record

    with open_feeds() as opened, opened.database.write() as connection:
        if not opened.remove(connection, feed_id):
            raise click.ClickException(f"there is no feed {feed_id}")
        record(connection, operator(), "deleted", "feed", feed_id)
    report({"id": feed_id}, as_json, f"feed {feed_id} is removed")


@cli.group()
def keys() -> None:
    """The keys that encrypt sensitive fields. One is added by putting it first into the credential fernet_keys."""


@contextmanager
def open_keyring() -> Iterator[tuple[Database, Keyring]]:
    from atlas.crypto import Keyring

    with open_database() as database:
        yield database, Keyring.from_secret(load_settings().fernet_keys)


@keys.command("status")
@json_option
def keys_status(as_json: bool) -> None:
    """Count what each key has encrypted, newest key first."""
    from atlas.keys import progress

    with open_keyring() as (database, keyring), database.read() as connection:
        found = progress(connection, keyring)
    known = keyring.fingerprints
    notes = {known[0]: " (newest)"} | {key: " (not in the keyring)" for key in found.rows if key not in known}
    lines = [f"{key}: {count}{notes.get(key, '')}" for key, count in found.rows.items()]
    report(found.as_dict(), as_json, "\n".join(lines))


@keys.command("reencrypt")
@json_option
def keys_reencrypt(as_json: bool) -> None:
    """Encrypt with the newest key what older keys encrypted. Safe to repeat, also after it was killed."""
    from atlas.keys import reencrypt

    with open_keyring() as (database, keyring):
        done, unreadable = reencrypt(database, keyring)
    text = f"{done} encrypted anew" + (f", {unreadable} unreadable" if unreadable else "")
    report({"changed": done, "unreadable": unreadable}, as_json, text)
    sys.exit(EXIT_FAILED if unreadable else 0)


@keys.command("retire-check")
@json_option
def keys_retire_check(as_json: bool) -> None:
    """Say whether all keys but the newest may leave the keyring: exit 1 if something still needs one."""
    from atlas.keys import progress

    with open_keyring() as (database, keyring), database.read() as connection:
        found = progress(connection, keyring)
    free = "all keys but the newest may go"
    text = f"{found.remaining} are not under the newest key: run atlas keys reencrypt" if found.remaining else free
    report(found.as_dict() | {"retirable": not found.remaining}, as_json, text)
    sys.exit(EXIT_FAILED if found.remaining else 0)
