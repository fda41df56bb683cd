"""What the proofs share: a load with a witness on every edge, deploys of named releases, and what the fleet is."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from labtest import PROJECT, Lab, deployment, sql

sys.path.insert(0, str(PROJECT))

from tests.faults import bad_releases
from tests.load.client import Outcome
from tests.load.traffic import Traffic
from tests.load.verdict import Span, Verdict, judge
from tests.load.witness import Witness

SETTLE_SECONDS = 180.0
SQLITE = """#python
import sqlite3
store = sqlite3.connect("file:/var/lib/atlas/atlas.db?mode=ro", uri=True, timeout=20)
for row in store.execute({statement!r}):
    print(*row, sep="|")
"""
GOOD = ("plain", "good")
"""Two releases that are as good as each other, so that it shows which one answers."""

QUICK = {
    "deploy_minimum_healthy_seconds": 1,
    "deploy_canary_steps": [{"percent": 25, "seconds": 2, "samples": 0}, {"percent": 100, "seconds": 1, "samples": 0}],
    "deploy_canary_slow_ms": 1000,
    "deploy_healthy_timeout": 180,
}
"""Every gate is on, and none waits for long. All hosts share few processors: a release may need long to start, and is slow at first."""


def archive(name: str) -> Path:
    """Return the release *name*: one of bad_releases, or "plain", which is the one of these sources."""
    if name == "signed by a stranger":
        return signed_by_a_stranger()
    return next((PROJECT / "dist").glob("atlas-*.tar.gz")) if name == "plain" else bad_releases.build(name)


def release_id(file: Path) -> str:
    """Return the id of the release in *file*, as ``X-Atlas-Release`` says it."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"{file.name.removeprefix('atlas-').removesuffix('.tar.gz')}-{digest[:12]}"


@dataclass
class Step:
    """A playbook that ran: when (Unix times), and how it ended."""

    name: str
    began: float
    ended: float
    run: subprocess.CompletedProcess[str]

    @property
    def output(self) -> str:
        """All that it said."""
        return self.run.stdout + self.run.stderr

    def succeeded(self) -> Step:
        """Assert that it did."""
        assert self.run.returncode == 0, f"{self.name}:\n{self.output[-6000:]}"
        return self

    def refused(self, *expected: str) -> Step:
        """Assert that it failed, said every text in *expected*, and showed no traceback of its own."""
        assert self.run.returncode != 0, f"{self.name} went through:\n{self.output[-6000:]}"
        for text in expected:
            assert text in self.output, f"{self.name}: {text!r} is missing in:\n{self.output[-6000:]}"
        return self


def play(lab: Lab, playbook: str, *arguments: str, timeout: float = 900) -> Step:
    """Run ``playbooks/PLAYBOOK.yml`` on the lab."""
    began = time.time()
    run = lab.playbook(playbook, *arguments, timeout=timeout)
    return Step(" ".join([playbook, *arguments]), began, time.time(), run)


def deploy(lab: Lab, release: str, strategy: str, *arguments: str) -> Step:
    """Deploy the release *release* (see :func:`archive`) by *strategy*; further *arguments* as ansible-playbook takes them."""
    return play(lab, "deploy", *_wanted(release, strategy), *arguments)


def roll_back(lab: Lab, *arguments: str) -> Step:
    """Return to the last good deployment; further *arguments* as ansible-playbook takes them."""
    environment = lab.facts()["_meta"]["hostvars"][lab.group("app")[0]]["atlas_environment"]
    return play(lab, "rollback", "-e", f"confirm={environment}", "-e", json.dumps(QUICK), *arguments)


def deploy_command(lab: Lab, release: str, strategy: str) -> list[str]:
    """Return the command of the same deploy, for who wants to watch it or to kill it."""
    return ["ansible-playbook", "-i", str(lab.inventory), "playbooks/deploy.yml", *_wanted(release, strategy)]


def _wanted(release: str, strategy: str) -> list[str]:
    return ["-e", f"release={archive(release)}", "-e", f"deploy_strategy={strategy}", "-e", json.dumps(QUICK)]


def fleet(lab: Lab) -> dict[str, Any]:
    """Return what a deploy that came to nothing must leave as it was: deployments, slots, processes of the API, maps, locks."""
    look = """set -u
for slot in blue green; do
  systemctl is-enabled atlas@$slot.target
  readlink /opt/atlas/slots/$slot
done 2>/dev/null
test ! -e /var/lib/atlas-deploy/transaction.json || echo open
"""
    found: dict[str, Any] = {host: (deployment(lab, host), lab.ssh(host, look).stdout) for host in lab.group("app")}
    for host in lab.group("edge"):
        found[host] = lab.ssh(host, "cat /etc/haproxy/slot.map; ls /var/lib/atlas-deploy").stdout
    return found


def releases_in_service(lab: Lab) -> set[str]:
    """Return the releases that the app hosts have in service."""
    look = """for slot in blue green; do
  if [ -e /etc/systemd/system/multi-user.target.wants/atlas@$slot.target ]; then cat /opt/atlas/slots/$slot/deployment.json; fi
done"""
    return {str(json.loads(lab.ssh(host, look).stdout)["release"]) for host in lab.group("app")}


def good_in_turn(lab: Lab) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return (name, release) of the one of GOOD that is in service, and of the other."""
    ids = {release_id(archive(name)): name for name in GOOD}
    (current,) = releases_in_service(lab)
    other = next(release for release in ids if release != current)
    return (ids[current], current), (ids[other], other)


def query(lab: Lab, statement: str) -> str:
    """Return what *statement* finds in the lab's store, be it PostgreSQL or SQLite: a line for each row, with | between columns."""
    if databases := lab.group("database"):
        return sql(lab, databases[0], statement)
    answer = lab.ssh(lab.group("app")[0], SQLITE.format(statement=statement))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@dataclass
class Load:
    """A load on the lab and what was seen of it; the verdict comes after the block."""

    lab: Lab
    traffic: Traffic
    witnesses: dict[str, Witness] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each request."""
        return self.traffic.outcomes

    def answered_by(self) -> set[str]:
        """Return the releases that answered anything."""
        return {outcome.release for outcome in self.outcomes if outcome.release}

    def settle(self) -> tuple[dict[str, int], int]:
        """Wait until every document of the load is processed; return document → finishes, and how many there are."""
        ours = f"SELECT id FROM documents WHERE title = '{self.traffic.run}'"
        pending = f"SELECT count(*) FROM jobs WHERE document_id IN ({ours}) AND state NOT IN ('done', 'dead')"
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := query(self.lab, pending)) != "0":
            assert time.monotonic() < deadline, f"{left} documents are not processed within {SETTLE_SECONDS:g} s"
            time.sleep(1)
        finishes = (
            "SELECT document_id, count(*) FROM job_events WHERE event = 'finished' "
            f"AND document_id IN ({ours}) GROUP BY document_id"
        )
        lines = query(self.lab, finishes).splitlines()
        applied = {name: int(count) for name, count in (line.split("|") for line in lines)}
        return applied, int(query(self.lab, f"SELECT count(*) FROM ({ours}) AS ours"))

    def verdict(self, spans: list[Span] | None = None) -> Verdict:
        """Judge all of it; waits until the documents are processed."""
        applied, stored = self.settle()
        counters = {edge: witness.counters for edge, witness in self.witnesses.items()}
        return judge(self.traffic.planned, self.outcomes, applied, stored, spans or [], counters)


@contextmanager
def load(lab: Lab, rate: float, slow_seconds: float = 2.0, edges: Sequence[str] = ()) -> Iterator[Load]:
    """POST at *rate* per second through *edges* (default: every edge) meanwhile, with a witness on each; see Traffic."""
    edges = list(edges) or lab.group("edge")
    parts = urlsplit(lab.url)
    urls = [
        parts._replace(netloc=parts.netloc.replace(str(parts.hostname), lab.hosts[edge])).geturl() for edge in edges
    ]
    with ExitStack() as stack:
        witnesses = {}
        for edge in edges:
            witnesses[edge] = Witness(lambda script, edge=edge: lab.start(edge, script))  # type: ignore[misc]
            stack.callback(witnesses[edge].stop)
        traffic = Traffic(lab.folder / "access.json", rate, urls, slow_seconds)
        yield Load(lab, stack.enter_context(traffic), witnesses)


@contextmanager
def sabotaged(lab: Lab, folder: Path, additions: Mapping[str, str]) -> Iterator[Lab]:
    """Let playbooks run with *additions* (name of a module_utils file → text appended to it): for negative controls alone.

    The project's own files stay as they are: Ansible is pointed at a copy.
    """
    copy = folder / "module_utils"
    copy.mkdir(parents=True)
    for source in (PROJECT / "plugins" / "module_utils").glob("*.py"):
        (copy / source.name).write_text(source.read_text() + additions.get(source.name, ""))
    unknown = set(additions) - {path.name for path in copy.iterdir()}
    assert not unknown, f"there is no {unknown} to sabotage"
    lab.environment["ANSIBLE_MODULE_UTILS"] = str(copy)
    try:
        yield lab
    finally:
        del lab.environment["ANSIBLE_MODULE_UTILS"]


def wait_until(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.3) -> Any:
    """Poll *condition* until it returns something true, or fail at the deadline with what it returned last."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what} (last: {result!r})"
        time.sleep(pause)
    return result


class Bad(NamedTuple):
    """A release, or a deploy of one, that must come to nothing, and what the refusal has to say."""

    release: str
    arguments: tuple[str, ...]
    expected: tuple[str, ...]


HEALTH_GATED = {
    "does not start": Bad("does_not_start", (), ("this release cannot be imported",)),
    "starts and exits": Bad("starts_and_exits", (), ("atlas-api@", "ends again and again")),
    "never becomes ready": Bad("never_ready", ("-e", "deploy_healthy_timeout=10"), ("/readyz says 503", "is not done")),
    "fails only its workers": Bad("workers_exit", (), ("atlas-core@", "ends again and again")),
    "bad configuration": Bad(
        "plain",
        ("-e", '{"atlas_settings_environment": {"queue_limit": "many"}, "deploy_force": true}'),
        ("queue_limit",),
    ),
    "wrong signature": Bad("signed by a stranger", (), ("sign",)),
    "incompatible schema": Bad(
        "foreign_schema", (), ("Nothing was changed. Preflight found", "the histories have parted", "8001")
    ),
    "a migration that fails half-way": Bad("migration_fails", (), ("no_such_column",)),
}
"""Every kind that is found before a user meets it."""


def bad(lab: Lab, kind: str, strategy: str) -> Step:
    """Try the kind *kind* of :data:`HEALTH_GATED`, and assert that it was refused and why."""
    release, arguments, expected = HEALTH_GATED[kind]
    return deploy(lab, release, strategy, *arguments).refused(*expected)


def signed_by_a_stranger() -> Path:
    """Return a good release that carries a good signature, by a key that nobody trusts."""
    good = archive("good")
    copy = good.parent / "stranger" / good.name
    if not copy.with_name(f"{good.name}.sig").exists():
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(good, copy)
        for argv in (
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(copy.parent / "key")],
            ["ssh-keygen", "-q", "-Y", "sign", "-n", "atlas-release", "-f", str(copy.parent / "key"), str(copy)],
        ):
            subprocess.run(argv, check=True, capture_output=True)
    return copy
