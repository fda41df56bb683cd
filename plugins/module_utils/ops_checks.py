"""Operations checks, judged: from what the hosts said and the reports of before to findings, tables, and what the next one needs.

Pure. A report is a dict: check, environment, at (Unix time), asked (host → when it was, by its own clock), findings
(``ops_runbook.Finding``), sections (title and rows of text, the first one the heading), hosts, and ``keeps``: what later reports
compare with, by name. Nothing in it is secret.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ansible.module_utils import backup_core, canary, rotation
from ansible.module_utils.deploy_status import status
from ansible.module_utils.ops_runbook import BACKUP_JOBS, DOCTOR, HEALTH, Finding, finding

DAY = 86_400.0
HISTORY_DAYS = 90
"""A disk's growth is drawn from the reports of so many days."""
FORECAST_DAYS = 1.0
"""Less than so many days of reports say nothing about growth."""
WEEKS = 4
LEAST_REQUESTS = 1000
"""Fewer requests in a week say nothing about how quick or how often wrong they are."""
KNOWN_KINDS = 1000
FIRST_BACKUP_SECONDS = 3600.0
"""An environment that is younger may still wait for the first report of its backups."""
OFF = ("MAINT", "DRAIN")
_LOG = "log of the database|the one that is backed up here"
Facts = Mapping[str, Mapping[str, Any]]
Report = Mapping[str, Any]
Rows = list[list[str]]


class Judgement:
    """One check under way: it collects findings, sections and what later reports need.

    *facts*: host → result of ops_facts. *policy*: limits and names, as the role ops hands them over. *before*: earlier reports
    of all checks, oldest first.
    """

    def __init__(
        self, facts: Facts, policy: Mapping[str, Any], before: Sequence[Report], check: str, now: float
    ) -> None:
        self.facts, self.policy, self.check, self.now = facts, policy, check, now
        self.same = [report for report in before if report.get("check") == check]
        self.last: Mapping[str, Any] = self.same[-1]["keeps"] if self.same else {}
        self.before = before
        self.found: list[Finding] = []
        self.sections: list[dict[str, Any]] = []
        self.keeps: dict[str, Any] = {}
        self.there = {host: fact for host, fact in facts.items() if "atlas" in fact}
        self.atlas = {host: fact["atlas"] if host in self.there else fact for host, fact in facts.items()}

    def find(self, kind: str, host: str, what: str, subject: str = "", mend: str = "") -> None:
        """Note something that needs a person."""
        self.found.append(finding(kind, host, what, self.policy["inventory"], subject, mend))

    def kept(self, name: str) -> dict[str, Any]:
        """Return, to be brought up to date, what *name* was by host: a host that does not answer is not forgotten."""
        found: dict[str, Any] = dict(self.last.get(name, {}))
        self.keeps[name] = found
        return found

    def section(self, title: str, rows: Rows) -> None:
        """Note a table, unless it has a heading alone."""
        if len(rows) > 1:
            self.sections.append({"title": title, "rows": rows})

    def state(self, host: str) -> str:
        """Return whether *host* needs a person, in one word."""
        return "LOOK" if any(each.host == host for each in self.found) else "well"

    def report(self) -> dict[str, Any]:
        """Return all of it."""
        asked = {host: fact["clock"] for host, fact in self.there.items()}
        return {
            "check": self.check,
            "environment": self.policy["environment"],
            "at": self.now,
            # Of a host that did not answer, since when its journal was not read.
            "asked": (self.same[-1].get("asked", {}) if self.same else {}) | asked,
            "hosts": sorted(self.facts),
            "findings": [each.as_dict() for each in self.found],
            "sections": self.sections,
            "keeps": self.keeps,
        }


def judge(check: str, facts: Facts, policy: Mapping[str, Any], before: Sequence[Report], now: float) -> dict[str, Any]:
    """Return the report of *check*; for the parameters see :class:`Judgement`."""
    judgement = Judgement(facts, policy, before, check, now)
    JUDGES[check](judgement)
    return judgement.report()


def _reachable(j: Judgement) -> None:
    for host, fact in j.facts.items():
        if host not in j.there:
            said = (str(fact.get("msg", "no answer")).strip().splitlines() or ["no answer"])[-1]
            j.find("host-unreachable", host, f"cannot be looked at: {said[:300]}")


# Daily


def daily(j: Judgement) -> None:
    """Health, backups, failed units, new kinds of error, certificates and secrets by age, disks."""
    _reachable(j)
    fleet = _fleet(j)
    _drift(j, fleet)
    _services(j)
    errors = _errors(j)
    disks = _disks(j, "disk-full", j.policy["disk_days"])
    rows = [["HOST", "STATE", "DOES", "FAILED UNITS", "ERRORS", "DISK", "FULL IN"]]
    for host in j.facts:
        if host not in j.there:
            rows.append([host, "LOOK", "not reachable", *["-"] * 4])
            continue
        failed = [each["unit"] for each in j.there[host]["failed_units"]]
        fullest = max(disks.get(host, [["-", "-", "0 %", "-"]]), key=lambda row: float(row[2].split()[0]))
        rows.append(
            [
                host,
                j.state(host),
                _does(host, j, fleet),
                ", ".join(failed) or "none",
                errors.get(host, "none"),
                *fullest[2:],
            ]
        )
    j.sections.insert(0, {"title": "", "rows": rows})
    _backups(j)
    _ages(j, fleet)


def _fleet(j: Judgement) -> dict[str, Any]:
    return status(j.atlas, j.policy["hosts"], j.policy["edges"], j.policy.get("release_pin") or None)


def _drift(j: Judgement, fleet: Mapping[str, Any]) -> None:
    """What status.yml finds; each host that does not answer is a finding already."""
    for host, row in fleet["app"].items():
        for text in row.get("drift", []):
            j.find("service-down" if re.match(r"atlas-\w+ is ", text) else "deployment-drift", host, text)
        if row["owed"]:
            j.find("deployment-drift", host, f"is owed deployment {row['owed'].get('deployment')}")
    for edge, row in fleet["edge"].items():
        for text in row.get("drift", []):
            if not text.startswith("the certificate ends"):  # has a limit of its own here
                j.find("edge-drift", edge, text)
        for name, value in sorted(row.get("servers", {}).items()):
            server = name.split("/")[1]
            if not value.startswith(("UP", *OFF, "no check")) and server in j.there:
                j.find("edge-drift", edge, f"sees {server} as {value}")


def _services(j: Judgement) -> None:
    hosts = [host for host in j.policy["hosts"] if host in j.there]
    dead = {host: ((j.there[host].get("health") or {}).get("queue") or {}).get("dead") for host in hosts}
    j.keeps["dead"] = max((count for count in dead.values() if count is not None), default=j.last.get("dead", 0))
    for host in hosts:
        fact = j.there[host]
        if fact["atlas"]["slot"] is None:
            j.find("service-down", host, "nothing is in service")
            continue
        doctor = fact["doctor"] or {"findings": [], "error": "was not asked"}
        if doctor["error"]:
            j.find("service-down", host, f"atlas doctor cannot be asked: {doctor['error'][:200]}")
        told = set()
        for each in doctor["findings"]:
            kind = DOCTOR.get(each["check"], "service-down")
            told.add(kind)
            # An open breaker mends itself; backups are told by their own host; dead letters are news once.
            if kind not in ("breakers-open", "backup-failed", "dead-letters"):
                j.find(kind, host, f"{each['check']}: {each['message']}", "/var/lib/atlas", _mend(each["mend"], j))
        if fact["probe_success"] == 0:
            j.find("probe-failed", host, "the probe does not come through: a document that was taken in is not found")
        health = fact.get("health") or {}
        if not health:
            j.find("service-down", host, "/health does not answer")
        for name, text in (health.get("checks") or {}).items():
            kind = HEALTH.get(name, "service-down")
            if text != "ok" and kind not in (*told, "backup-failed"):
                j.find(kind, host, f"/health: {name}: {text}")
    if j.keeps["dead"] > j.last.get("dead", 0) and hosts:
        more = j.keeps["dead"] - j.last.get("dead", 0)
        j.find("dead-letters", hosts[0], f"{more} more jobs failed for good, {j.keeps['dead']} in all")
    for host, fact in j.there.items():
        for cluster in fact["clusters"]:
            if cluster["status"].split(",")[0] != "online":
                j.find("database-down", host, f"PostgreSQL {cluster['name']} is {cluster['status']}")
        for each in fact["failed_units"]:
            if not _matches(each["unit"], j.policy["ignored_units"]):
                j.find(
                    "unit-failed",
                    host,
                    f"{each['unit']} has failed ({each['about'] or 'no description'})",
                    each["unit"],
                )


def _mend(text: str, j: Judgement) -> str:
    """Return what doctor says will mend it, with commands of the host as such."""
    return text.replace("-i INV", f"-i {j.policy['inventory']}") if text.startswith("ansible") else f"on HOST: {text}"


def _does(host: str, j: Judgement, fleet: Mapping[str, Any]) -> str:
    """Return in a few words what *host* does, and whether it does."""
    found = []
    row = fleet["app"].get(host)
    if row:
        up = sum(value == "active" for value in row["services"].values())
        found.append(f"{up} of {len(row['services']) or 4} services, {'ready' if row['ready'] else 'NOT READY'}")
    row = fleet["edge"].get(host)
    if row:
        up = sum(value.startswith("UP") for value in row["servers"].values())
        found.append(f"edge, {up} of {len(row['servers'])} servers up")
    found += [f"PostgreSQL {each['name']} {each['status']}" for each in j.there[host]["clusters"]]
    if j.there[host]["backup"].get("jobs"):
        found.append("backups")
    return "; ".join(found) or "-"


def _matches(text: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, text) for pattern in patterns)


def _errors(j: Judgement) -> dict[str, str]:
    """Compare kinds of error with the known ones; return host → how many there were, for people."""
    known: dict[str, Any] = dict(j.last.get("kinds", {}))
    first, shown, rows = not j.same, {}, [["HOST", "TIMES", "KIND OF ERROR"]]
    fresh: dict[str, dict[str, Any]] = {}
    for host, fact in j.there.items():
        errors = fact["errors"]["kinds"]
        new = [name for name in errors if name not in known and not _matches(name, j.policy["known_errors"])]
        for name, one in errors.items():
            was = fresh.get(name) or known.get(name) or {"first": j.now, "count": 0}
            fresh[name] = {"first": was["first"], "last": one["last"], "count": was["count"] + one["count"]}
        rows += [[host, str(errors[name]["count"]), name] for name in new]
        times = sum(one["count"] for one in errors.values())
        shown[host] = f"{times}, {len(new)} new kinds" if errors else "none"
        if fact["errors"]["cut"]:
            shown[host] += ", more unread"
        for name in [] if first else new:
            who = name.split(":")[0]
            where = "-k" if who == "kernel" else f'-u "{who}*"' if who.startswith("atlas-") else f"-t {who} -p err"
            j.find("new-errors", host, f"{errors[name]['count']} times, new: {name}", where)
    newest = sorted((known | fresh).items(), key=lambda item: float(item[1]["last"]))[-KNOWN_KINDS:]
    j.keeps["kinds"] = dict(newest)
    title = (
        "Errors in the journals, noted as known by this first run" if first else "Errors in the journals, of a new kind"
    )
    j.section(title, rows)
    return shown


def _backups(j: Judgement) -> None:
    """What the backup host reports of its jobs."""
    reports = {host: fact["backup"] for host, fact in j.there.items() if fact["backup"].get("jobs")}
    expected = j.policy["backup_host"]
    began = _began(j)
    is_new = began is not None and j.now - began < FIRST_BACKUP_SECONDS
    if expected in j.there and expected not in reports and not is_new:
        j.find("backup-failed", expected, "backups have never reported")
    for host, report in reports.items():
        for line in backup_core.problems(report, j.now):
            job = line.split()[0]
            kind = "backup-log" if re.search(_LOG, line) else BACKUP_JOBS.get(job, "backup-failed")
            if j.check == "daily" or job == "drill":
                j.find(kind, host, f"backups: {line}")
        rows = [[job, *cells] for job, *cells in _jobs(report, j.now) if j.check == "daily" or job == "drill"]
        heading = ["JOB", "OUTCOME", "LAST SUCCESS", "AGE", "MAY BE", "A RESTORE LOSES", "AND TAKES", "MESSAGE"]
        j.section("Backups" if j.check == "daily" else "Restore drill", [heading, *rows])


def _jobs(report: Mapping[str, Any], now: float) -> Rows:
    """Return the rows of the backup host's own table, without those figures that no job has."""
    return [re.split(r"  +", line, maxsplit=7) for line in backup_core.table(report, now).splitlines()[1:]]


def _began(j: Judgement) -> float | None:
    """Return the Unix time of the first deployment that the app hosts remember."""
    entries = [j.there[host]["atlas"]["first_entry"] for host in j.policy["hosts"] if host in j.there]
    return min((rotation.unix(entry) for entry in entries if entry), default=None)


def _ages(j: Judgement, fleet: Mapping[str, Any]) -> None:
    """Certificates by the days that are left, secrets by the days since they were new."""
    rows = [["WHAT", "ON", "AGE", "LIMIT", "STATE"]]
    for edge, row in fleet["edge"].items():
        days = row.get("certificate_days")
        if days is None:
            continue
        limit = float(j.policy["certificate_days"])
        rows.append(
            ["certificate", edge, f"{days} days left", f"{limit:g} days left", "LOOK" if days < limit else "well"]
        )
        if days < limit:
            j.find("certificate-ends", edge, f"the certificate ends in {days} days")
    journals = {host: j.there[host]["atlas"] for host in j.policy["hosts"] if host in j.there}
    states = rotation.states({host: fact["rotations"] for host, fact in journals.items()})
    where = next(iter(journals), "-")
    for each in rotation.ages(states, j.policy["rotation_days"], _began(j), j.now):
        unfinished = rotation.under_way(states.get(each["kind"], {}))
        age = "unknown" if each["days"] is None else f"{each['days']} days"
        rows.append(
            [each["kind"], "all", age, f"{each['allowed']} days", "LOOK" if each["overdue"] or unfinished else "well"]
        )
        if each["overdue"]:
            j.find("secrets-old", where, f"{each['kind']}: {age} old, {each['allowed']} are allowed", each["kind"])
        if unfinished:
            since = states[each["kind"]]["at"]
            j.find("rotation-unfinished", where, f"{each['kind']}: half rotated since {since}", each["kind"])
    j.section("Certificates and secrets", rows)


# Disks


def _disks(j: Judgement, kind: str, days: float) -> dict[str, Rows]:
    """Judge every file system; return host → rows of path, size, used, and when it is full."""
    j.keeps["disks"] = {host: fact["disks"] for host, fact in j.there.items()}
    limit = float(j.policy["disk_percent"])
    found: dict[str, Rows] = {host: [] for host in j.there}
    for host, fact in j.there.items():
        for path, disk in fact["disks"].items():
            samples = [*_samples(j, host, path), (j.now, float(disk["used_mb"]))]
            left = days_until_full(samples, float(disk["total_mb"]))
            used = 100 * disk["used_mb"] / disk["total_mb"]
            shown = "-" if left is None else "not soon" if left > 10 * HISTORY_DAYS else f"{left:.0f} days"
            found[host].append([path, f"{disk['total_mb'] / 1024:.1f} GB", f"{used:.0f} %", shown])
            if used > limit:
                j.find("disk-full", host, f"{used:.0f} % of {path} are used, {limit:g} are allowed", path)
            elif disk["inodes_percent"] > limit:
                j.find("disk-full", host, f"{disk['inodes_percent']:.0f} % of the inodes of {path} are used", path)
            elif left is not None and left < float(days):
                what = f"{path} is full in {left:.0f} days, if it goes on like that; it should last {float(days):g}"
                j.find(kind, host, what, path)
    return found


def _samples(j: Judgement, host: str, path: str) -> Iterator[tuple[float, float]]:
    """Yield Unix time and used MB from earlier reports, while the disk was of its present size."""
    size = j.there[host]["disks"][path]["total_mb"]
    for report in j.before:
        disk = report.get("keeps", {}).get("disks", {}).get(host, {}).get(path)
        if disk and report["at"] > j.now - HISTORY_DAYS * DAY and abs(disk["total_mb"] - size) < 0.02 * size:
            yield float(report["at"]), float(disk["used_mb"])


def days_until_full(samples: Sequence[tuple[float, float]], total: float) -> float | None:
    """Return in how many days a disk of *total* MB is full, by the line of least squares through *samples*.

    These are Unix time and used MB, oldest first. None where they are of too short a time, or it does not grow.
    """
    if len(samples) < 2 or samples[-1][0] - samples[0][0] < FORECAST_DAYS * DAY:
        return None
    line = statistics.linear_regression(*zip(*samples, strict=True))
    grows = line.slope * DAY
    return max(0.0, (total - samples[-1][1]) / grows) if grows > 0 else None


# Weekly


def weekly(j: Judgement) -> None:
    """Performance against the baseline and the last weeks, security updates, the restore drill."""
    _reachable(j)
    _performance(j)
    _updates(j)
    _backups(j)


FIGURES = {
    # Name: what it is, its unit, and up to which value nobody minds.
    "answer": ("API answers, median of the slowest host", "ms", 50.0),
    "edge": ("through the edge, median of the slowest", "ms", 50.0),
    "probe": ("a document, from ingest until found", "s", 5.0),
    "median": ("users' requests, median", "ms", 100.0),
    "p99": ("users' requests, 99 of 100 within", "ms", 500.0),
}


def _performance(j: Judgement) -> None:
    figures, requests, errors = _figures(j)
    weeks = [report["keeps"].get("figures", {}) for report in j.same[-WEEKS:]]
    baseline = j.last.get("baseline") or {}
    if not baseline or j.policy["baseline"]:
        baseline = {"at": j.now, "figures": figures}
    # What could not be measured then (a new environment has few requests) joins it as soon as it can.
    baseline = {**baseline, "figures": figures | baseline["figures"]}
    j.keeps |= {"figures": figures, "baseline": baseline}
    factor = float(j.policy["slower_factor"])
    where = (j.policy["edges"] or j.policy["hosts"] or ["-"])[0]
    rows = [["FIGURE", "NOW", "BASELINE", f"LAST {len(weeks) or WEEKS} WEEKS", "STATE"]]
    for name, (about, unit, floor) in FIGURES.items():
        now, base = figures.get(name), baseline["figures"].get(name)
        seen = [week[name] for week in weeks if week.get(name) is not None]
        lately = statistics.median(seen) if seen else None
        worse = [
            f"{text} {_figure(than, unit)}"
            for text, than in (("the baseline is", base), ("the last weeks had", lately))
            if now is not None and than is not None and now > floor and now > factor * than
        ]
        rows.append(
            [
                about,
                *(_figure(value, unit) for value in (now, base, lately)),
                "LOOK" if worse else "well" if now else "-",
            ]
        )
        if worse:
            j.find("slower", where, f"{about}: {_figure(now, unit)}; {', '.join(worse)}")
    percent, limit = 100 * errors / requests if requests else 0.0, float(j.policy["error_percent"])
    bad = requests >= LEAST_REQUESTS and percent > limit
    rows.append(
        [
            f"users' requests that failed, of {requests}",
            f"{percent:.2f} %",
            f"{limit:g} % allowed",
            "-",
            "LOOK" if bad else "well",
        ]
    )
    if bad:
        j.find("errors-more", where, f"{percent:.2f} % of {requests} requests failed, {limit:g} % are allowed")
    j.section(f"Performance; the baseline is of {_day(baseline['at'])}", rows)


def _figure(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _day(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d")


def _figures(j: Judgement) -> tuple[dict[str, float], int, int]:
    """Return the figures by name, and of users' requests since the last report how many there were and how many failed."""
    found: dict[str, float] = {}
    for name, key in (("answer", "answers_ms"), ("edge", "edge_ms")):
        medians = [statistics.median(fact[key]) for fact in j.there.values() if fact[key]]
        if medians:
            found[name] = round(max(medians), 2)
    probes = [fact["probe_seconds"] for fact in j.there.values() if fact["probe_seconds"] is not None]
    if probes:
        found["probe"] = max(probes)
    counters = {edge: j.there[edge]["atlas"]["edge"]["counters"] for edge in j.policy["edges"] if edge in j.there}
    j.kept("counters").update(counters)
    total: dict[str, float] = {}
    requests = errors = 0
    for edge, counted in counters.items():
        part = canary.since(j.last.get("counters", {}).get(edge, {}), counted, list(counted))
        requests += int(part["requests"])
        errors += int(part["errors"])
        for bound, count in part["histogram"].items():
            total[str(bound)] = total.get(str(bound), 0) + count
    if total.get("+Inf", 0) >= LEAST_REQUESTS:
        found |= {"median": within(total, 0.5), "p99": within(total, 0.99)}
    return found, requests, errors


def within(histogram: Mapping[str, float], share: float) -> float:
    """Return the least bound in ms within which *share* of the answers came; *histogram*: bound → how many came within it."""
    bounds = sorted((float(bound), count) for bound, count in histogram.items() if bound != "+Inf")
    wanted = share * histogram["+Inf"]
    return next((bound for bound, count in bounds if count >= wanted), 2 * bounds[-1][0] if bounds else 0.0)


def _updates(j: Judgement) -> None:
    """Security updates: those that people have to install, and those that wait longer than machines take."""
    rows = [["HOST", "SECURITY UPDATES", "BOOT", "ON REPLACED FILES", "STATE"]]
    updates = j.kept("updates")
    for host, fact in j.there.items():
        was, names = j.last.get("updates", {}).get(host, {}), [each["name"] for each in fact["updates"]]
        since = {name: float(was.get(name, j.now)) for name in names}
        updates[host] = since
        by_hand = [name for name in names if name.startswith(tuple(j.policy["manual_packages"]))]
        late = [
            name for name in names if name not in by_hand and since[name] < j.now - float(j.policy["update_days"]) * DAY
        ]
        if by_hand:
            j.find("updates-pending", host, f"security updates that do not install themselves: {', '.join(by_hand)}")
        if late:
            j.find("updates-pending", host, f"security updates still not installed: {', '.join(late)}")
        if fact["updates_error"]:
            j.find("updates-unknown", host, f"its archives cannot be asked: {fact['updates_error'][:200]}")
        if fact["boot"]:
            j.find("boot-pending", host, f"has to boot: {'; '.join(fact['boot'])}")
        waits = f"{len(names)}: {', '.join(names)}"[:60] if names else "not known" if fact["updates_error"] else "none"
        rows.append(
            [host, waits, "needed" if fact["boot"] else "no", ", ".join(fact["stale"])[:60] or "none", j.state(host)]
        )
    j.section("Security updates", rows)


# Monthly


def monthly(j: Judgement) -> None:
    """Accounts, ports, exposure of units, permissions, drift, capacity."""
    _reachable(j)
    fleet = _fleet(j)
    _drift(j, fleet)
    _accounts(j)
    _ports(j)
    _exposure(j)
    _permissions(j)
    drift = [
        [each.host, each.what] for each in j.found if each.kind in ("service-down", "deployment-drift", "edge-drift")
    ]
    j.section("Drift from the inventory", [["HOST", "DRIFT"], *(drift or [["all", "none"]])])
    _capacity(j)


def _accounts(j: Judgement) -> None:
    rows = [["HOST", "ACCOUNT", "MAY BECAUSE OF", "SSH KEYS", "STATE"]]
    keys = j.kept("keys")
    for host, fact in j.there.items():
        expected = fact["expected"].get("accounts", [])
        keys[host] = {each["name"]: each["keys"] for each in fact["accounts"]}
        was = j.last.get("keys", {}).get(host)
        for each in fact["accounts"]:
            name, wrong = each["name"], []
            if name not in expected and name != "root":
                wrong.append(f"the account {name} is not among the expected ones ({', '.join(each['why'])})")
            wrong += [
                f"the account {name} has {text}"
                for text in each["why"]
                if text in ("root's own number", "an empty password")
            ]
            new = [] if was is None else [key for key in each["keys"] if key not in was.get(name, [])]
            if new and name in expected:
                wrong.append(f"the account {name} has a new SSH key: {', '.join(new)}")
            for text in wrong:
                j.find("account-unexpected", host, text, name)
            rows.append(
                [host, name, ", ".join(each["why"]) or "-", str(len(each["keys"])), "LOOK" if wrong else "well"]
            )
    j.section("Accounts", rows)


def _ports(j: Judgement) -> None:
    rows = [["HOST", "LISTENS", "BY", "FIREWALL LETS IN", "STATE"]]
    for host, fact in j.there.items():
        expected = [int(port) for port in fact["expected"].get("ports", [])]
        extra, wrong = [str(name) for name in j.policy["ports_expected"]], False
        seen = [each for each in fact["sockets"] if not each["loopback"]]
        for each in seen:
            name = f"{each['protocol']}/{each['port']}"
            if name not in extra and not (each["protocol"] == "tcp" and each["port"] in expected):
                wrong = True
                by = ", ".join(each["by"])
                j.find(
                    "port-unexpected",
                    host,
                    f"{by} listens on {name} ({', '.join(each['addresses'])}), which nothing expects",
                    name,
                )
        firewall = fact["firewall"]
        more = [port for port in firewall["ports"] if port not in expected]
        if not firewall["as_file"] or more:
            wrong = True
            what = (
                f"lets in {', '.join(map(str, more))}, which the inventory does not"
                if more
                else "differs from its file"
            )
            j.find("firewall-differs", host, f"the firewall {firewall['error'] or what}")
        programs = sorted({name for each in seen for name in each["by"]})
        ports = ", ".join(f"{each['protocol']}/{each['port']}" for each in seen)
        rows.append(
            [
                host,
                ports or "nothing",
                ", ".join(programs) or "-",
                ", ".join(map(str, firewall["ports"])),
                "LOOK" if wrong else "well",
            ]
        )
    j.section("Open ports", rows)


def _exposure(j: Judgement) -> None:
    limit, rows = float(j.policy["exposure_max"]), [["HOST", "OUR UNITS", "WORST OF THEM", "OTHERS", "STATE"]]
    exposure = j.kept("exposure")
    for host, fact in j.there.items():
        found: Mapping[str, float] = fact["exposure"]
        exposure[host] = dict(found)
        ours = {name: value for name, value in found.items() if name.startswith("atlas-")}
        was = j.last.get("exposure", {}).get(host, {})
        bad = {
            name: f"exposure {value:g} of 10, {limit:g} are allowed" for name, value in ours.items() if value > limit
        }
        bad |= {
            name: f"exposure rose from {was[name]:g} to {value:g} of 10"
            for name, value in found.items()
            if name in was and value > was[name] + 0.5 and name not in bad
        }
        for name, text in sorted(bad.items()):
            j.find("unit-exposed", host, f"{name}: {text}", name)
        worst = max(ours, key=lambda name: ours[name], default=None)
        shown = f"{worst} {ours[worst]:g}" if worst else "-"
        rows.append([host, str(len(ours)), shown, str(len(found) - len(ours)), "LOOK" if bad else "well"])
    j.section("Exposure of units (systemd-analyze security, 0 is best)", rows)


def _permissions(j: Judgement) -> None:
    rows = [["HOST", "PATH", "MODE", "OWNER", "WHAT"]]
    programs = j.kept("setuid")
    for host, fact in j.there.items():
        programs[host] = fact["setuid"]
        for each in fact["permissions"]:
            j.find(
                "permissions-open",
                host,
                f"{each['path']} ({each['mode']}, {each['owner']}): {each['wrong']}",
                each["path"],
            )
            rows.append([host, each["path"], each["mode"], each["owner"], each["wrong"]])
        was = j.last.get("setuid", {}).get(host)
        for path in [] if was is None else [path for path in fact["setuid"] if path not in was]:
            j.find("setuid-new", host, f"{path} runs with the rights of its owner since the last check", path)
            rows.append([host, path, "-", "-", "new with the rights of its owner"])
    j.section(
        "Permissions", rows if len(rows) > 1 else [*rows, ["all", "-", "-", "-", "nothing is open that should not be"]]
    )


def _capacity(j: Judgement) -> None:
    disks = _disks(j, "capacity-short", j.policy["capacity_days"])
    rows = [["HOST", "DISK", "SIZE", "USED", "FULL IN", "MEMORY FREE", "HOLDS"]]
    j.kept("stores_mb").update({host: fact["stores_mb"] for host, fact in j.there.items()})
    for host, fact in j.there.items():
        memory = fact["atlas"]["memory"]
        free = f"{memory['available_mb'] / 1024:.1f} of {memory['total_mb'] / 1024:.1f} GB"
        was = j.last.get("stores_mb", {}).get(host, {})
        holds = ", ".join(
            f"{name} {size:.0f} MB" + (f" ({size - was[name]:+.0f})" if name in was else "")
            for name, size in fact["stores_mb"].items()
        )
        for number, disk in enumerate(disks[host]):
            rows.append([host, *disk, *([free, holds or "-"] if number == 0 else ["", ""])])
    j.section("Capacity", rows)


# Quarterly


def quarterly(j: Judgement) -> None:
    """Disaster recovery in a lab: ``policy["steps"]`` with their times, and whether every document came back."""
    steps: Sequence[Mapping[str, Any]] = j.policy["steps"]
    was = j.last.get("seconds", {})
    j.keeps["seconds"] = {each["name"]: each["seconds"] for each in steps if each["rc"] == 0}
    rows = [["STEP", "SECONDS", "LAST TIME", ""]]
    for each in steps:
        last = f"{was[each['name']]:.0f}" if each["name"] in was else "-"
        rows.append([each["name"], f"{each['seconds']:.0f}", last, "FAILED" if each["rc"] else "done"])
        if each["rc"]:
            j.find("recovery-failed", "the lab", f"{each['name']}: failed. {_why(each['said'])}", each["log"])
        minutes, limit = each["seconds"] / 60, float(j.policy["recovery_minutes"])
        if each.get("recovery") and minutes > limit:
            j.find("recovery-slow", "the lab", f"the recovery took {minutes:.0f} minutes, {limit:g} are allowed")
    j.section("", rows)
    noted = {each["documents"]: each for each in steps if each.get("documents") and each["rc"] == 0}
    if len(noted) < 2:
        return
    before, after = (json.loads(noted[when]["said"]) for when in ("before", "after"))
    lost = [name for name in before if name not in after]
    changed = [name for name, content in before.items() if after.get(name, content) != content]
    counts = [str(len(each)) for each in (before, after, lost, changed)]
    j.section("What came back", [["DOCUMENTS BEFORE", "AFTER", "LOST", "CHANGED"], counts])
    if lost or changed:
        what = f"of {len(before)} documents {len(lost)} are lost, {len(changed)} changed"
        j.find("recovery-failed", "the lab", what, noted["after"]["log"])


def _why(said: str) -> str:
    """Return the line of a failed step's output that says why: of a playbook, what its last task said."""
    lines = [line.strip() for line in said.partition("PLAY RECAP")[0].splitlines() if line.strip()]
    tasks = [number for number, line in enumerate(lines) if line.startswith("TASK [")]
    told = lines[tasks[-1] + 1 :] if tasks else lines[-1:]
    fatal = [line for line in told if line.startswith("fatal:")]
    return [*fatal, *told, "It said nothing."][0][:300]


JUDGES: dict[str, Callable[[Judgement], None]] = {
    "daily": daily,
    "weekly": weekly,
    "monthly": monthly,
    "quarterly": quarterly,
}

# For people


def text(report: Report, last: float | None) -> str:
    """Return *report* as text for a terminal. *last*: when the report before it was made, Unix time."""
    at = datetime.datetime.fromtimestamp(report["at"], datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    since = f"the one before was {backup_core.span(report['at'] - last)} ago" if last else "the first one"
    lines = [f"{report['check'].capitalize()} check of {report['environment']}, {at}; {since}"]
    for section in report["sections"]:
        lines += ["", *([section["title"]] if section["title"] else []), *columns(section["rows"])]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return *rows* in columns, each as wide as its widest cell."""
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
