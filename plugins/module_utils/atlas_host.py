"""An app host as deploys see it: releases, deployments, slots, the four services, the transaction and the journal.

Owns the paths and rules that the deploy modules share, with the standard library alone. The slot in service is the one
whose ``atlas@SLOT.target`` is enabled; a slot is a symbolic link to a deployment. While a deploy changes a host, the file
``transaction.json`` tells what it was before, so that any later run can return it. The journal is also kept on edges.
"""

from __future__ import annotations

import base64
import ctypes
import datetime
import errno
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import re
import secrets
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

SLOTS = ("blue", "green")
SERVICES = ("api", "core", "services", "monitoring")
_COUNTED = re.compile(r"^atlas_http_requests_total\{([^}]*)\} (\S+)$", re.MULTILINE)
API_PORTS = {"blue": 8101, "green": 8102}
MONITORING_PORTS = {"blue": 8111, "green": 8112}
POLL_SECONDS = 0.25
SLOWEST_POLL_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
"""A worker whose last heartbeat is older than this does not count as alive."""
CRASHES = 3
"""A service that systemd restarted this often while it was waited for will not come up."""
ALONE_SECONDS = 300.0
"""Longer than it takes to stop the services of a slot and to wait for others to be healthy."""
JOURNAL_ENTRIES = 5000
"""A journal that is longer loses its older half when a deploy is finished."""
LEAVE_SECONDS = 5.0
"""An edge asks once a second and looks elsewhere after three bad answers (roles/haproxy/templates/haproxy.cfg.j2)."""
READ_SECONDS = 1.0
"""For so long a unit that was starting may still read a directory of credentials that was replaced: it skips files that vanish."""
HELD = Path("/var/lib/atlas-restore/unaccepted")
"""While it is there no unit of the service starts (a condition of each): a restored store was not accepted yet, or not put back."""
TRIAL = Path("/run/atlas-restore-trial")
"""While it is there they start all the same, because the restore itself tries them. A boot removes it."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # rename(2)
NEVER_TRIMMED = ("rotation",)
"""Events (``rotation.EVENT``) of which there are few, and whose age matters."""


class HostError(Exception):
    """A host cannot be brought to the wanted state; the message names the cause, *log* the last lines of the guilty unit."""

    def __init__(self, message: str, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = list(log)


class Done(NamedTuple):
    """The outcome of a command."""

    status: int
    output: str
    errors: str


def run(
    argv: Sequence[str], stdin: bytes | None = None, timeout: float = 60, env: Mapping[str, str] | None = None
) -> Done:
    """Run *argv* with *stdin* for at most *timeout* seconds; a command that is missing or too slow raises :class:`HostError`."""
    environment = {**os.environ, "LC_ALL": "C", **(env or {})}
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    try:
        done = subprocess.run(list(argv), capture_output=True, timeout=timeout, env=environment, **given)
    except FileNotFoundError:
        raise HostError(f"{argv[0]} is not on this host: provision it with playbooks/site.yml.") from None
    except subprocess.TimeoutExpired:
        raise HostError(f"{argv[0]} did not end within {timeout:g} s.") from None
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def now() -> str:
    """Return the present time as RFC 3339 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def write_atomically(path: Path, content: str, mode: int = 0o644) -> None:
    """Replace the file at *path* by *content*: readers see the old or the new file, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    # Made anew and never opened: in a directory of the service a link could lie in wait there, and root would write through it.
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "w") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in the directory *path* durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(partial: Path, directory: Path) -> None:
    """Make *partial* the whole content of *directory*, which is there at every moment, and remove what it was before.

    A run that is killed leaves the directory as it was or as it is to be, and at most *partial* beside it.
    """
    sync_directory(partial)
    if not directory.exists():
        partial.rename(directory)
        sync_directory(directory.parent)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(directory), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, f"it cannot be exchanged for {partial.name}: {os.strerror(number)}", str(directory))
    sync_directory(directory.parent)
    time.sleep(READ_SECONDS)
    shutil.rmtree(partial)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in *path*; {} where the file is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def unit(service: str, slot: str) -> str:
    """Return the name of the unit of *service* in *slot*."""
    return f"atlas-{service}@{slot}.service"


def units(slot: str) -> list[str]:
    """Return the names of the four units of *slot*."""
    return [unit(service, slot) for service in SERVICES]


def telling(lines: Sequence[str], limit: int = 8) -> list[str]:
    """Return at most *limit* lines that tell what went wrong: the end of the last whole traceback, or the last lines.

    Our services log JSON, in which a traceback is a field; whatever dies early writes plain text.
    """
    plain = [part for line in lines for part in _plain(line)]
    end, inside = None, False
    for index, line in enumerate(plain):
        if line.startswith("Traceback "):
            inside = True
        elif inside and line and not line.startswith(" "):
            end, inside = index, False
    until = len(plain) if end is None else end + 1
    return [line[:300] for line in plain[max(0, until - limit) : until]]


def _plain(line: str) -> list[str]:
    """Return a line of a service's log without what everybody knows, its traceback as lines of its own."""
    try:
        entry = json.loads(line)
    except ValueError:
        return [line.rstrip()]
    if not isinstance(entry, dict):
        return [line.rstrip()]
    fields = [f"{key}={value}" for key, value in entry.items() if key not in _KNOWN_FIELDS]
    return [
        " ".join([f"{entry.get('level', 'info')}: {entry.get('event', '')}", *fields]),
        *str(entry.get("exception", "")).splitlines(),
    ]


_KNOWN_FIELDS = {"service", "host", "slot", "release", "level", "event", "time", "exception", "request_id"}


def parse_show(text: str) -> dict[str, dict[str, str]]:
    """Return the output of ``systemctl show`` as unit → property → value."""
    found: dict[str, dict[str, str]] = {}
    for block in text.strip().split("\n\n"):
        properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in properties:
            found[properties["Id"]] = properties
    return found


class Host:
    """One app host. Its places are parameters for tests alone."""

    def __init__(
        self,
        root: Path = Path("/opt/atlas"),
        state: Path = Path("/var/lib/atlas-deploy"),
        boot: Path = Path("/etc/systemd/system/multi-user.target.wants"),
        command: Callable[..., Done] = run,
        marks: tuple[Path, Path] = (HELD, TRIAL),
        runtime: Path = Path("/run/atlas"),
    ) -> None:
        self.root, self.state, self.boot, self.run, self.runtime = root, state, boot, command, runtime
        self._held, self._trial = marks

    # What is there

    def releases(self) -> list[str]:
        """Return the IDs of the unpacked releases."""
        return _names(self.root / "releases")

    def deployments(self) -> dict[int, dict[str, Any]]:
        """Return number → deployment.json of the complete deployments."""
        names = [name for name in _names(self.root / "deployments") if name.isdigit()]
        return {int(name): read_json(self.deployment(int(name)) / "deployment.json") for name in sorted(names, key=int)}

    def deployment(self, number: int) -> Path:
        """Return the directory of the deployment *number*."""
        return self.root / "deployments" / str(number)

    def slots(self) -> dict[str, int | None]:
        """Return slot → number of the deployment it points at, or None."""
        return {slot: self._pointed(slot) for slot in SLOTS}

    def _pointed(self, slot: str) -> int | None:
        try:
            name = os.readlink(self.root / "slots" / slot).rsplit("/", 1)[-1]
        except OSError:
            return None
        return int(name) if name.isdigit() else None

    def in_service(self) -> str | None:
        """Return the slot that boot would start, which is the one in service; None before the first deploy."""
        enabled = [slot for slot in SLOTS if (self.boot / f"atlas@{slot}.target").is_symlink()]
        return enabled[0] if enabled else None

    def journal(self) -> list[dict[str, Any]]:
        """Return the journal's entries, oldest first; a line cut off by a crash is left out."""
        try:
            lines = (self.state / "journal.jsonl").read_text().splitlines()
        except OSError:
            return []
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return [entry for entry in entries if isinstance(entry, dict)]

    def record(self, event: str, **details: Any) -> None:
        """Append *event* to the journal."""
        self.state.mkdir(mode=0o700, exist_ok=True)
        line = json.dumps({"at": now(), "event": event, **details}, sort_keys=True) + "\n"
        handle = os.open(self.state / "journal.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(handle).st_size
            # A line that a crash or a full disk cut off must not swallow this one.
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            content = ("\n" * torn + line).encode()
            if os.write(handle, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.state / "journal.jsonl"))
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextmanager
    def recorded(self, event: str, phase: str, **details: Any) -> Iterator[dict[str, Any]]:
        """Append *event* to the journal when the block ends, with *phase*, outcome (ok or failed) and seconds.

        What the block adds to the dictionary that it gets is recorded too.
        """
        began, entry = time.monotonic(), dict(details)

        def close(outcome: str, **more: Any) -> None:
            seconds = round(time.monotonic() - began, 3)
            self.record(event, phase=phase, outcome=outcome, seconds=seconds, **entry, **more)

        try:
            yield entry
        except Exception as error:
            close("failed", message=str(error)[:500])
            raise
        close("ok")

    def trim(self) -> None:
        """Keep the journal from growing for ever; what tells how old secrets are stays: rotations, and when it began."""
        entries = self.journal()
        if len(entries) <= JOURNAL_ENTRIES:
            return
        cut = len(entries) - JOURNAL_ENTRIES // 2
        began = {"at": entries[0]["at"], "event": "began"}
        kept = [entry for entry in entries[:cut] if entry.get("event") in NEVER_TRIMMED]
        lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in [began, *kept, *entries[cut:]]]
        write_atomically(self.state / "journal.jsonl", "".join(lines), 0o600)

    def good(self) -> list[int]:
        """Return the deployments that were in service to the end of their deploy, oldest first.

        One that was left by a rollback is good no longer, until it is brought into service again.
        """
        found: list[int] = []
        for entry in self.journal():
            if entry.get("event") == "finished" and entry.get("outcome", "ok") == "ok":
                gone = {int(entry["deployment"]), entry.get("rolled_back")}
                found = [number for number in found if number not in gone] + [int(entry["deployment"])]
        return found

    def abandoned(self) -> int | None:
        """Return the deployment that the last rollback left, if nothing was brought into service since."""
        last = [entry for entry in self.journal() if entry.get("event") == "finished"][-1:]
        return last[0].get("rolled_back") if last else None

    def highest(self) -> int:
        """Return the highest deployment number ever used on this host, 0 for none."""
        used = [int(entry["deployment"]) for entry in self.journal() if isinstance(entry.get("deployment"), int)]
        return max([0, *used, *self.deployments()])

    def transaction(self) -> dict[str, Any]:
        """Return what the running (or killed) deploy recorded before its first change; {} if there is none."""
        return read_json(self.state / "transaction.json")

    def show(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return unit → properties of the units *names*, from one call of systemctl."""
        properties = (
            "Id,LoadState,ActiveState,SubState,MainPID,NRestarts,Result,ExecMainStatus,ExecMainStartTimestamp,"
            "FragmentPath,DropInPaths,MemoryCurrent"
        )
        done = self.run(["systemctl", "show", "--timestamp=unix", "--property", properties, *names])
        if done.status:
            raise HostError(f"systemctl show failed: {done.errors.strip()}")
        return parse_show(done.output)

    def log(self, name: str, since: float) -> list[str]:
        """Return the lines that tell most of what the unit *name* logged since the Unix time *since*, and how it ended."""
        argv = ["journalctl", "--since", f"@{since:.6f}", "--lines", "200", "--no-pager", "--output", "cat"]
        said = telling(self.run([*argv, f"_SYSTEMD_UNIT={name}"]).output.splitlines())
        about = [line[:300] for line in self.run([*argv, f"UNIT={name}"]).output.splitlines()]
        ends = [line for line in about if re.search(r"exited|killed|OOM|[Ff]ailed", line)]
        return said + (ends[-2:] if said else about[-8:])

    # What changes it

    @contextmanager
    def alone(self, seconds: float = ALONE_SECONDS) -> Iterator[None]:
        """Keep out who else would change this host meanwhile, having waited at most *seconds* for one that does.

        A module runs to its end although the playbook that called it was killed: the next run must not meet it halfway.
        Raises :class:`HostError` when the wait is over. Not to be nested.
        """
        deadline = time.monotonic() + seconds
        handle = os.open(self.root, os.O_RDONLY)
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise HostError(
                            f"Somebody else still changes this host, after {seconds:g} s, perhaps for a deploy that was killed. "
                            "See who: ps -ef | grep AnsiballZ; then run the playbook again."
                        ) from None
                    time.sleep(0.1)
            yield
        finally:
            os.close(handle)

    def point(self, slot: str, number: int | None) -> None:
        """Point *slot* at the deployment *number* by one rename, or at nothing."""
        link = self.root / "slots" / slot
        if number is None:
            link.unlink(missing_ok=True)
        else:
            partial = link.with_name(f".{slot}.partial")
            partial.unlink(missing_ok=True)
            partial.symlink_to(f"../deployments/{number}")
            partial.rename(link)
        sync_directory(link.parent)

    def begin(self, transaction: Mapping[str, Any]) -> None:
        """Record what the host is before its first change, once per deploy."""
        if self.transaction().get("deploy") != transaction["deploy"]:
            self._write_transaction(transaction)

    def note(self, **more: Any) -> None:
        """Add *more* to the transaction, if there is one."""
        if was := self.transaction():
            self._write_transaction({**was, **more})

    def _write_transaction(self, content: Mapping[str, Any]) -> None:
        write_atomically(self.state / "transaction.json", json.dumps(dict(content), sort_keys=True) + "\n", 0o600)

    def end(self) -> None:
        """Forget the transaction."""
        (self.state / "transaction.json").unlink(missing_ok=True)
        sync_directory(self.state)

    def active(self, slot: str) -> list[str]:
        """Return the units of *slot* that run or are about to."""
        shown = self.show(units(slot))
        return [
            name for name in units(slot) if shown.get(name, {}).get("ActiveState") not in ("inactive", "failed", None)
        ]

    def processes(self, slot: str) -> dict[str, str]:
        """Return unit → main process of the four units of *slot* and then, for the API, those of its workers.

        A restarted unit has another main process, and a worker that died (of memory, say) is replaced without a restart.
        """
        shown = self.show(units(slot))
        found = {name: shown.get(name, {}).get("MainPID", "0") for name in units(slot)}
        name = unit("api", slot)
        return {**found, name: " ".join([found[name], *self.children(found[name])])}

    def children(self, process: str) -> list[str]:
        """Return the children of *process*."""
        try:
            return Path(f"/proc/{process}/task/{process}/children").read_text().split()
        except OSError:
            return []

    def cool(self, slot: str, seconds: float) -> None:
        """Have systemd stop *slot*, which stays warm until then, in so many *seconds*, whoever is there to ask for it."""
        self.keep_warm(slot)
        # It leaves first: an edge that the deploy could not reach may send users here until it has looked elsewhere.
        leave = f"/usr/bin/touch {self._leaving(slot)}; /usr/bin/sleep {LEAVE_SECONDS:g}; exec /usr/bin/systemctl stop --no-block "
        stop = ["/bin/sh", "-c", leave + " ".join(units(slot))]
        timer = f"--unit={_cooling(slot)}", f"--on-active={seconds:g}", "--timer-property=AccuracySec=1s"
        done = self.run(["systemd-run", "--quiet", "--collect", *timer, "--", *stop])
        if done.status:
            raise HostError(f"slot {slot} cannot be told to stop later: {done.errors.strip()}")
        write_atomically(self.state / f"warm-{slot}.json", json.dumps({"until": int(time.time() + seconds)}) + "\n")

    def keep_warm(self, slot: str) -> None:
        """Take back what :meth:`cool` ordered for *slot*."""
        # A timer that elapses at this moment has started its service, whose stop of the slot must not come later.
        self.run(["systemctl", "stop", f"{_cooling(slot)}.timer", f"{_cooling(slot)}.service"])
        (self.state / f"warm-{slot}.json").unlink(missing_ok=True)
        self._leaving(slot).unlink(missing_ok=True)

    def _leaving(self, slot: str) -> Path:
        """Return the file that makes the API of *slot* say that it is not ready; systemd removes it when that stops."""
        return self.runtime / f"atlas-api-{slot}" / "leaving"

    def leave(self, slot: str) -> None:
        """Have the edges send no more users to *slot*, also those that nobody can reach: their health checks find it not ready."""
        if self.active(slot) and self._leaving(slot).parent.is_dir():
            self._leaving(slot).touch()
            time.sleep(LEAVE_SECONDS)

    def warm_until(self, slot: str) -> int | None:
        """Return the Unix time at which *slot* is stopped, if that was ordered."""
        until = read_json(self.state / f"warm-{slot}.json").get("until")
        return int(until) if until else None

    def serves(self, slot: str) -> bool:
        """Tell whether all services of *slot* are active, and none of them is on its way out."""
        shown = self.show(units(slot))
        return all(shown.get(name, {}).get("ActiveState") == "active" for name in units(slot))

    def stop(self, slot: str, timeout: float) -> bool:
        """Stop the services of *slot* by name and wait until all have ended; tell whether any had to be."""
        if not self.active(slot):
            return False
        began, said = time.time(), ""
        # One call that waits: asking again and again takes more of a processor than they need to stop.
        with suppress(HostError):  # it took too long
            said = self.run(["systemctl", "stop", *units(slot)], timeout=timeout).errors.strip()
        if running := self.active(slot):
            why = said or f"not within {timeout:g} s"
            raise HostError(f"{', '.join(running)} did not stop: {why}.", self.log(running[0], began))
        return True

    def start(self, slot: str) -> None:
        """Ask systemd for the services of *slot*, all at once; :meth:`wait_healthy` tells what came of it."""
        if self.is_held() and not self._trial.exists():
            raise HostError(
                "A restore on this host did not end, and no service starts on a store that was not accepted. Run playbooks/restore.yml "
                f"again. If one did end and could not reach this host any more: rm {self._held}"
            )
        self._systemctl("start", "--no-block", *units(slot))

    def hold(self) -> None:
        """Keep whoever it is, a boot too, from starting services until :meth:`release`."""
        self._held.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(self._held, f"{now()}\n", 0o600)
        self._trial.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Tell whether services are kept from starting."""
        return self._held.exists()

    def try_out(self) -> None:
        """Let them start until the next boot."""
        if self.is_held():
            self._trial.touch()

    def release(self) -> bool:
        """Let them start for good; tell whether they were held."""
        was_held = self.is_held()
        self._held.unlink(missing_ok=True)
        if was_held:
            sync_directory(self._held.parent)
        self._trial.unlink(missing_ok=True)
        return was_held

    def enable(self, slot: str) -> bool:
        """Make *slot* the one in service, which boot starts, and no other; tell whether that changed anything."""
        others = [other for other in SLOTS if other != slot and (self.boot / f"atlas@{other}.target").is_symlink()]
        changed = bool(others)
        if self.in_service() != slot or not (self.boot / f"atlas@{slot}.target").is_symlink():
            self._systemctl("enable", "--quiet", f"atlas@{slot}.target")
            changed = True
        for other in others:
            self._systemctl("disable", "--quiet", f"atlas@{other}.target")
        return changed

    def disable(self) -> None:
        """Have boot start no slot."""
        for slot in SLOTS:
            if (self.boot / f"atlas@{slot}.target").is_symlink():
                self._systemctl("disable", "--quiet", f"atlas@{slot}.target")

    def _systemctl(self, *arguments: str) -> None:
        done = self.run(["systemctl", *arguments])
        if done.status:
            raise HostError(f"systemctl {arguments[0]} failed: {done.errors.strip()}")

    def command(self, number: int, slot: str, argv: Sequence[str], timeout: float) -> Done:
        """Run ``atlas`` *argv* of the deployment *number* in a transient unit with its settings and credentials."""
        environment = {
            "ATLAS_DEPLOYMENT_DIRECTORY": str(self.deployment(number)),
            "ATLAS_SLOT": slot,
            "ATLAS_COMMAND_SECONDS": str(max(1, int(timeout))),
        }
        began = time.monotonic()
        done = self.run(["/usr/local/bin/atlas", *argv], timeout=timeout + 15, env=environment)
        if done.status:
            said = [line for line in (done.errors + "\n" + done.output).strip().splitlines() if line.strip()]
            why = explain(done.status, time.monotonic() - began, timeout)
            # A message may have more lines, down to one that points at a column.
            first = next((line for line in said if line.startswith("Error: ")), said[-1] if said else "")
            raise HostError(
                f"atlas {' '.join(argv)} of deployment {number} failed ({why})" + (f": {first}" if first else "."),
                said[-8:],
            )
        return done

    def prune(self, keep: int, dry: bool = False) -> list[str]:
        """Remove deployments beyond the newest *keep* good ones, and releases that no deployment needs; return what went.

        The last good deployment, what a rollback has just left, and what a slot points at always stay; but a slot that is
        neither in service nor runs keeps none that is older than those, or deploys within one slot would keep it for ever.
        """
        good = self.good()
        kept = {*good[-max(keep, 2) :], self.abandoned()}
        for slot, number in self.slots().items():
            if number in kept or slot == self.in_service() or self.active(slot):
                kept.add(number)
            elif number is not None and not dry:
                self.point(slot, None)
        gone = [f"deployments/{number}" for number in self.deployments() if number not in kept]
        needed = {str(content.get("release")) for number, content in self.deployments().items() if number in kept}
        gone += [f"releases/{release}" for release in self.releases() if release not in needed]
        archives = _names(self.root / "archives")
        gone += [f"archives/{name}" for name in archives if re.sub(r"\.tar\.gz(\.sig)?$", "", name) not in needed]
        if not dry:
            for name in gone:
                path = self.root / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return gone

    # Health

    def wait_healthy(self, gate: Gate, timeout: float, minimum: float, began: float | None = None) -> float:
        """Wait until *gate* finds no fault, and none of its quick ones for *minimum* seconds; return the seconds it took.

        *began* is the Unix time at which the services were started, if they were: nothing older is shown of their logs.
        Raises :class:`HostError` with the fault and the guilty unit's log after *timeout* seconds, or at once if a service
        keeps crashing.
        """
        began = time.time() if began is None else began
        deadline, since = time.monotonic() + timeout + minimum, None
        first: dict[str, int] = {}
        processes: list[str] = []
        while True:
            looked = time.monotonic()
            shown = self.show(units(gate.slot))
            before, processes = processes, [shown.get(name, {}).get("MainPID", "0") for name in units(gate.slot)]
            fault = gate.quick_fault(shown)
            if fault is not None:
                since = None
            elif since is None or processes != before:
                since = time.monotonic()
            if since is not None and time.monotonic() - since >= minimum:
                fault = gate.slow_fault()
                if fault is None:
                    return time.time() - began
            for name in units(gate.slot):
                restarts = int(shown.get(name, {}).get("NRestarts") or 0)
                if restarts - first.setdefault(name, restarts) >= CRASHES:
                    raise HostError(f"{name} ends again and again.", self.log(name, began))
            if time.monotonic() > deadline:
                guilty, message = fault or (unit("api", gate.slot), "its processes do not stay the same")
                raise HostError(f"{guilty}: {message}; not healthy within {timeout:g} s.", self.log(guilty, began))
            # Four services start meanwhile, and looking must not slow them down: where it takes long, it happens less often.
            time.sleep(min(SLOWEST_POLL_SECONDS, max(POLL_SECONDS, 5 * (time.monotonic() - looked))))

    def look_after(self, gate: Gate, processes: Mapping[str, str], began: float) -> None:
        """Raise :class:`HostError` if a unit of *gate*'s slot is not active with the *processes* that it had."""
        shown = self.show(units(gate.slot))
        for name in units(gate.slot):
            properties = shown.get(name, {})
            main, *workers = processes.get(name, "").split()
            if properties.get("ActiveState") != "active":
                how = f"is {properties.get('ActiveState')}"
            elif properties.get("MainPID") != main:
                how = "restarted"
            elif gone := set(workers).difference(self.children(main)):
                how = f"lost {len(gone)} of {len(workers)} worker processes"
            else:
                continue
            raise HostError(f"{name} {how} after it had been healthy.", self.log(name, began))


def changed_since_start(shown: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the active units of *shown* whose unit files are younger than their processes."""
    found = []
    for name, properties in shown.items():
        if properties.get("ActiveState") != "active":
            continue
        started = float(properties.get("ExecMainStartTimestamp", "").removeprefix("@") or 0)
        paths = [properties.get("FragmentPath", ""), *properties.get("DropInPaths", "").split()]
        if started and any(Path(path).stat().st_mtime > started + 1 for path in paths if path and Path(path).exists()):
            found.append(name)
    return found


def _cooling(slot: str) -> str:
    return f"atlas-cooling-{slot}"


class Answer(NamedTuple):
    """An HTTP answer: status (0: none), headers with lower-case names, JSON body ({} if it is none), and its text."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]
    text: str = ""


def get(
    port: int, path: str, address: str = "127.0.0.1", timeout: float = 3, tls: ssl.SSLContext | None = None
) -> Answer:
    """Ask for *path*, encrypted where *tls* is given; what cannot be reached answers with status 0."""
    connection = (
        http.client.HTTPSConnection(address, port, timeout=timeout, context=tls)
        if tls
        else http.client.HTTPConnection(address, port, timeout=timeout)
    )
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        content = response.read(1_000_000)
        headers = {name.lower(): value for name, value in response.getheaders()}
    except (OSError, http.client.HTTPException):
        return Answer(0, {}, {})
    finally:
        connection.close()
    try:
        body = json.loads(content)
    except ValueError:
        body = {}
    text = content.decode(errors="replace")
    return Answer(response.status, headers, body if isinstance(body, dict) else {}, text)


def requests(slot: str) -> dict[str, int]:
    """Return how many requests the API of *slot* has answered since it started, and how many with 5xx; probes left out."""
    found = {"total": 0, "failed": 0}
    for labels, count in _COUNTED.findall(get(API_PORTS[slot], "/metrics").text):
        values = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if not values.get("endpoint", "").startswith(("health.", "metrics.")):
            found["total"] += int(float(count))
            found["failed"] += int(float(count)) if values.get("status", "").startswith("5") else 0
    return found


class Gate:
    """The health gate of one slot: units active, ``/readyz`` says so with the right release, heartbeats of the deployment,
    and a job of its own came through its workers."""

    def __init__(
        self, slot: str, deployment: int, release: str, host: str, ask: Callable[[int, str], Answer] = get
    ) -> None:
        self.slot, self.deployment, self.release, self.host, self.ask = slot, deployment, release, host, ask

    def fault(self, shown: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
        """Return (guilty unit, what is wrong), or None if all is well. *shown* is the state of the four units."""
        return self.quick_fault(shown) or self.slow_fault()

    def quick_fault(self, shown: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
        """Return what units and ``/readyz`` alone say."""
        for name in units(self.slot):
            state = shown.get(name, {}).get("ActiveState", "missing")
            if state != "active":
                return name, f"is {state} ({shown.get(name, {}).get('SubState', '-')})"
        api = unit("api", self.slot)
        ready = self.ask(API_PORTS[self.slot], "/readyz")
        if ready.status != 200:
            return api, f"/readyz says {_not_ready(ready)}"
        release = ready.headers.get("x-atlas-release", "nothing")
        if release != self.release:
            return api, f"answers as release {release}, expected {self.release}"
        return None

    def slow_fault(self) -> tuple[str, str] | None:
        """Return what the workers say, by their heartbeats and by a job of their own."""
        return self._workers() or self._probe()

    def _workers(self) -> tuple[str, str] | None:
        workers = self.ask(API_PORTS[self.slot], "/health").body.get("workers") or []
        for service in ("core", "services"):
            ages = [
                float(worker.get("age_seconds", HEARTBEAT_SECONDS + 1))
                for worker in workers
                if worker.get("service") == service
                and worker.get("host") == self.host
                and worker.get("slot") == self.slot
                and str(worker.get("deployment")) == str(self.deployment)
            ]
            if not ages or min(ages) > HEARTBEAT_SECONDS:
                return unit(service, self.slot), f"/health shows no live heartbeat of deployment {self.deployment}"
        return None

    def _probe(self) -> tuple[str, str] | None:
        metrics = self.ask(MONITORING_PORTS[self.slot], "/metrics").text
        found = re.search(r"^atlas_probe_success (\S+)$", metrics, re.MULTILINE)
        if found is None:
            return unit("core", self.slot), "its workers have not yet done the job that monitoring sends through them"
        if float(found[1]) != 1:
            return unit("core", self.slot), "its workers failed at the job that monitoring sends through them"
        return None


def _not_ready(answer: Answer) -> str:
    if not answer.status:
        return "nothing (no connection)"
    checks = answer.body.get("checks")
    failed = (
        [f"{name}: {value}" for name, value in checks.items() if not _is_well(value)]
        if isinstance(checks, dict)
        else []
    )
    return f"{answer.status}" + (f" ({'; '.join(failed)})" if failed else "")


def _is_well(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("ok", value.get("status") == "ok"))
    return value in (True, "ok")


def explain(status: int, took: float, limit: float) -> str:
    """Say what the exit *status* of a transient unit means that *took* so many seconds and had a *limit*."""
    if took >= limit:
        return f"it was ended at its limit of {limit:g} s"
    known = {
        203: "the release cannot be executed",
        217: "the user atlas is missing",
        243: "its credentials cannot be loaded",
    }
    return known.get(status, f"exit status {status}")


# The content of a deployment


def fingerprint_key(state: Path) -> bytes:
    """Return the key of fingerprints, which never leaves the host; made at first use."""
    path = state / "fingerprint.key"
    try:
        return base64.b64decode(path.read_text())
    except OSError:
        pass
    key = secrets.token_bytes(32)
    write_atomically(path, base64.b64encode(key).decode() + "\n", 0o600)
    return key


def fingerprint(key: bytes, digest: str, settings: str, credentials: Mapping[str, str]) -> str:
    """Return the keyed fingerprint (HMAC-SHA-256, hex) of a deployment's content: equal content, equal fingerprint."""
    content = json.dumps([digest, settings, dict(credentials)], sort_keys=True)
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()


def _names(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []
