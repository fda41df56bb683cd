"""Owns how servers of a running HAProxy leave and join traffic, how the slot in service is switched, and its certificate.

Everything goes over the runtime socket, every wait has a deadline, and every operation ends by reading back what it
claims: a server "is drained" when HAProxy says so, not when the command was sent. The protocol is that of HAProxy's
management guide, chapter 9.3 (2.6 and 3.0 agree on what is used here).
"""

from __future__ import annotations

import csv
import datetime
import fcntl
import hashlib
import io
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05
COMMAND_SECONDS = 5.0
RELOAD_SECONDS = 5.0
LOCK_SECONDS = 15.0
KEPT_OUT = "/etc/haproxy/kept-out.state"
"""What HAProxy starts with, beside slot.map: the servers that were out when the last order was given."""
OUT_BITS = 0x01 | 0x08
"""Of srv_admin_state: in maint or in drain by order, and not by the configuration or a failed check (management guide, 9.3, show servers state)."""


class RuntimeFailure(Exception):
    """What could not be reached or done, in words for the user."""


@dataclass(frozen=True)
class Server:
    """One server as ``show stat`` has it.

    status: ``UP``, ``UP 1/2`` (failing), ``DOWN``, ``DRAIN``, ``MAINT``, ``no check``; check: result of the last check,
    ``L7OK`` when it passed, with ``* `` in front while another one runs; sessions: requests in flight; weight: percent.
    """

    name: str
    status: str
    check: str
    sessions: int
    weight: int

    @property
    def checked(self) -> bool:
        """Whether the last finished check passed and no other one is running."""
        return self.check == "L7OK"

    @property
    def up(self) -> bool:
        """Whether it takes traffic and its checks pass."""
        return self.status == "UP" and self.check.removeprefix("* ") == "L7OK"

    @property
    def out(self) -> bool:
        """Whether it gets no new requests."""
        return self.status.split()[0] in ("DRAIN", "MAINT", "DOWN")

    def report(self) -> dict[str, str | int]:
        """Return what a user wants to see of it."""
        return {"status": self.status, "check": self.check, "sessions": self.sessions, "weight": self.weight}

    def __str__(self) -> str:
        return f"{self.name} is {self.status} ({self.check or 'no check yet'}, {self.sessions} in flight)"


class RuntimeSocket:
    """HAProxy's runtime socket at *path*: one command a connection, as its non-interactive mode wants it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def ask(self, command: str, seconds: float = COMMAND_SECONDS) -> str:
        """Send *command* and return the answer, within *seconds* in all; raise RuntimeFailure otherwise."""
        deadline = time.monotonic() + seconds
        answer = bytearray()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(seconds)
                self._connect(connection)
                connection.sendall(command.encode() + b"\n")
                # The master socket goes on waiting for more commands until it is told that there are none.
                connection.shutdown(socket.SHUT_WR)
                while True:
                    connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    part = connection.recv(65536)
                    if not part:
                        return answer.decode().strip()
                    answer += part
        except TimeoutError as error:
            raise RuntimeFailure(f"HAProxy did not answer '{command}' on {self.path} within {seconds:.0f} s") from error
        except OSError as error:
            raise RuntimeFailure(
                f"HAProxy's socket {self.path} cannot be used: {error.strerror}. See on that host: systemctl status haproxy"
            ) from error

    def _connect(self, connection: socket.socket) -> None:
        """Connect, with patience for the moment of a reload in which nobody listens, or nobody takes who knocks."""
        deadline = time.monotonic() + RELOAD_SECONDS
        while True:
            try:
                return connection.connect(self.path)
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_SECONDS)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Keep reloads out while orders are given and read back, having waited for one that is going on.

        A new worker process starts with what is saved at the beginning of a reload; what the old one is told after that, it
        would never learn. Not to be nested.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        path = Path(self.path).with_name("reload.lock")
        try:
            lock = path.open("a")
        except FileNotFoundError:
            raise RuntimeFailure(
                f"{path.parent} does not exist, so HAProxy does not run. See on that host: systemctl status haproxy"
            ) from None
        with lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise RuntimeFailure(
                            f"HAProxy was not told anything: a reload has held {path} for {LOCK_SECONDS:.0f} s. "
                            "See on that host: systemctl status haproxy"
                        ) from None
                    time.sleep(POLL_SECONDS)
            yield

    def order(self, command: str) -> None:
        """Send a *command* that answers nothing when it is obeyed; raise RuntimeFailure with what it answered."""
        answer = self.ask(command)
        if answer:
            raise RuntimeFailure(f"HAProxy refused '{command}': {answer}")


def parse_servers(text: str) -> dict[str, Server]:
    """Return the servers in the CSV *text* of ``show stat``, by ``backend/server``."""
    servers = {}
    for row in csv.DictReader(io.StringIO(text.removeprefix("# "))):
        if row.get("type") == "2":
            name = f"{row['pxname']}/{row['svname']}"
            servers[name] = Server(name, row["status"], row["check_status"], int(row["scur"]), int(row["weight"] or 0))
    return servers


def parse_old_workers(text: str) -> list[int]:
    """Return the process ids of old workers, which finish what they hold after a reload, in the *text* of ``show proc``."""
    section, pids = "", []
    for line in text.splitlines():
        if line.startswith("# "):
            section = line[2:].strip()
        elif section == "old workers" and re.match(r"\d+\s+worker\b", line):
            pids.append(int(line.split()[0]))
    return pids


def parse_kept_out(text: str, active: str | None) -> str:
    """Return, of the servers in *text* (``show servers state``), those that the next start has to keep out, in the same format.

    They are in maint or drain in the backend *active*. Those of the other slot only wait for their last requests or for the
    next deploy, and traffic falls back to them where the one in service did not come back.
    """
    version, names, *rows = [line for line in text.splitlines() if line.strip()]
    at = names.removeprefix("# ").split().index

    def out(row: list[str]) -> bool:
        return row[at("be_name")] == active and bool(int(row[at("srv_admin_state")]) & OUT_BITS)

    return "\n".join([version, names, *(row for row in rows if out(row.split()))]) + "\n"


class Balancer:
    """A running HAProxy, seen and steered through its runtime socket and, after reloads, its master socket.

    *kept_out*: what it starts with; nothing is kept where the role haproxy has not made that file.
    """

    def __init__(
        self, runtime: str, master: str | None = None, check_interval: float = 1.0, kept_out: str = KEPT_OUT
    ) -> None:
        self.runtime = RuntimeSocket(runtime)
        self.kept_out = Path(kept_out)
        self.master = RuntimeSocket(master) if master and Path(master).exists() else None
        self.check_interval = check_interval

    def servers(self, names: Iterable[str] | None = None) -> dict[str, Server]:
        """Return all servers, or those *names* (``backend/server``); raise RuntimeFailure for a name it does not have."""
        known = parse_servers(self.runtime.ask("show stat"))
        if names is None:
            return known
        missing = [name for name in names if name not in known]
        if missing:
            raise RuntimeFailure(
                f"HAProxy has no server {', '.join(missing)}; it has {', '.join(sorted(known)) or 'none'}. "
                "The role haproxy configures them from haproxy_servers: run playbooks/site.yml"
            )
        return {name: known[name] for name in names}

    def held_by_old_workers(self, names: Iterable[str]) -> dict[str, int]:
        """Return how many requests old workers still hold for each of *names*; those that hold none are left out."""
        held: dict[str, int] = {}
        if self.master is None:
            return held
        for pid in parse_old_workers(self.master.ask("show proc")):
            try:
                servers = parse_servers(self.master.ask(f"@!{pid} show stat"))
            except RuntimeFailure:
                if pid in parse_old_workers(self.master.ask("show proc")):
                    raise
                continue  # it ended between the two questions
            for name in names:
                if name in servers and servers[name].sessions:
                    held[name] = held.get(name, 0) + servers[name].sessions
        return held

    def set_state(self, names: Iterable[str], state: str) -> None:
        """Order *names* into *state* (``ready``, ``drain`` or ``maint``), so that a reload knows of it, and a start of who is
        out; nothing is read back."""
        with self.runtime.steady():
            for name in names:
                self.runtime.order(f"set server {name} state {state}")
            self._keep_out()

    def _keep_out(self) -> None:
        """Have the next start keep out who is out by now: it may lack what is in service, and pass every health check."""
        try:
            if not self.kept_out.exists():
                return
            active = entries(self.kept_out.with_name("slot.map").read_text()).get("active")
            wanted = parse_kept_out(self.runtime.ask("show servers state"), active)
            if wanted != self.kept_out.read_text():
                replace_file(self.kept_out, wanted)
        except OSError as error:
            raise RuntimeFailure(
                f"HAProxy took the order, but would forget it when it starts: {self.kept_out}: {error.strerror}"
            ) from error

    def _wait(
        self, names: list[str], done: Callable[[Server], bool], deadline: float, failure: Callable[[list[Server]], str]
    ) -> dict[str, Server]:
        """Poll until *done* holds for all *names*; past *deadline* raise RuntimeFailure with *failure* of the others."""
        while True:
            servers = self.servers(names)
            late = [server for server in servers.values() if not done(server)]
            if not late:
                return servers
            if time.monotonic() >= deadline:
                raise RuntimeFailure(failure(late))
            time.sleep(POLL_SECONDS)

    def maint(self, names: list[str]) -> dict[str, Server]:
        """Take *names* out of traffic and checks at once; requests in flight go on."""
        self.set_state(names, "maint")
        return self._wait(names, lambda s: s.status == "MAINT", time.monotonic() + COMMAND_SECONDS, _still("MAINT"))

    def require_others(self, names: Iterable[str], count: int) -> None:
        """Raise RuntimeFailure unless *count* servers UP are left in each backend of *names* once these are out."""
        out, known = set(names), self.servers()
        for backend in sorted({name.split("/")[0] for name in out}):
            others = [s for name, s in known.items() if name.split("/")[0] == backend and name not in out]
            if sum(server.up for server in others) < count:
                raise RuntimeFailure(
                    f"{', '.join(sorted(out))} was not drained: {count} other server(s) of {backend} have to be UP meanwhile, "
                    f"but {'; '.join(map(str, others)) or 'there is none'}"
                )

    def drained(self, names: list[str], seconds: float) -> dict[str, Server]:
        """Give *names* no new requests, wait until none is in flight (old workers included), then put them into maint.

        Past *seconds* it raises and says who still holds requests; those servers stay in drain.
        """
        self.emptied(names, seconds)
        return self.maint(names)

    def emptied(self, names: list[str], seconds: float) -> None:
        """Do the same without maint at the end: health checks go on, so that :meth:`ready` need not wait for them."""
        deadline = time.monotonic() + seconds
        self.set_state([name for name, server in self.servers(names).items() if server.status != "MAINT"], "drain")
        self._wait(
            names, lambda s: s.sessions == 0 and s.out, deadline, lambda late: _not_drained(seconds, map(str, late))
        )
        while held := self.held_by_old_workers(names):
            if time.monotonic() >= deadline:
                texts = [
                    f"{name} has {count} in flight in a process from before a reload" for name, count in held.items()
                ]
                raise RuntimeFailure(_not_drained(seconds, texts))
            time.sleep(POLL_SECONDS)

    def warm(self, names: list[str], seconds: float, age: float = 0.0) -> dict[str, Server]:
        """Have *names* checked without traffic until a check made from now on has passed; they end in DRAIN.

        Entering drain shows the result of a check from before: it counts only after another result was seen in between, or
        when a whole check interval and a half has passed, in which a new check has begun and ended. Of servers that were in
        drain already, checks that ended in the last *age* seconds count too.
        """
        known = {name for name, server in self.servers(names).items() if server.status == "DRAIN"}
        begin = time.monotonic()
        deadline = begin + seconds
        self.set_state(names, "drain")
        failed_since: set[str] = set()

        def fresh(server: Server) -> bool:
            if server.check.removeprefix("* ") != "L7OK":
                failed_since.add(server.name)
            waited = time.monotonic() - begin + (age if server.name in known else 0.0)
            old = server.name not in failed_since and waited < 1.5 * self.check_interval
            return server.status == "DRAIN" and server.checked and not old

        return self._wait(names, fresh, deadline, lambda late: _not_ready(seconds, late))

    def ready(self, names: list[str], seconds: float, age: float = 0.0) -> dict[str, Server]:
        """Put *names* into traffic, each only after a fresh check has passed, and wait until HAProxy calls them UP.

        MAINT to ready would count as UP before any check, hence the way through :meth:`warm`, with its *age*.
        """
        deadline = time.monotonic() + seconds
        out = [name for name, server in self.servers(names).items() if not server.status.startswith("UP")]
        if out:
            self.warm(out, seconds, age)
            self.set_state(out, "ready")
        return self._wait(names, lambda s: s.up, deadline, lambda late: _not_ready(seconds, late))

    def map_entries(self, path: str) -> dict[str, str]:
        """Return what the map *path* in HAProxy's memory holds; raise RuntimeFailure if there is no such map."""
        answer = self.runtime.ask(f"show map {path}")
        if answer.startswith("Unknown map"):
            raise RuntimeFailure(f"HAProxy has no map {path}: its configuration is older; run playbooks/site.yml")
        # Address, key, value.
        return entries("\n".join(line.partition(" ")[2] for line in answer.splitlines()))

    def map_value(self, path: str, key: str) -> str | None:
        """Return what the map *path* in HAProxy's memory has for *key*."""
        return self.map_entries(path).get(key)

    def write_map(self, path: str, content: Mapping[str, str]) -> None:
        """Make *content* all that the map *path* holds, in its file and, at one stroke, in memory; read both back.

        When HAProxy refuses, the file returns to what it was.
        """
        text = "".join(f"{key} {value}\n" for key, value in content.items())
        with self.runtime.steady():
            before = Path(path).read_text()
            replace_file(Path(path), text)
            try:
                version = self.runtime.ask(f"prepare map {path}").rpartition(": ")[2]
                if content:
                    self.runtime.order(f"add map @{version} {path} <<\n{text}")
                self.runtime.order(f"commit map @{version} {path}")
                if self.map_entries(path) != content:
                    raise RuntimeFailure(f"HAProxy took the order but its map {path} does not have the new content")
            except RuntimeFailure:
                replace_file(Path(path), before)
                raise

    def require_up(self, backend: str, count: int) -> None:
        """Raise RuntimeFailure unless *backend* exists and has at least *count* servers UP."""
        members = [s for name, s in self.servers().items() if name.split("/")[0] == backend]
        if not members:
            raise RuntimeFailure(f"HAProxy has no backend {backend} with servers, so traffic cannot go there")
        if sum(server.up for server in members) < count:
            raise RuntimeFailure(
                f"{backend} needs {count} server(s) UP before traffic goes there; nothing was switched: "
                + "; ".join(map(str, members))
            )

    def switch(self, path: str, key: str, value: str, required: int) -> None:
        """Have the map *path* send *key* to backend *value*: in the file, which reloads read, and in memory; read both back.

        When HAProxy refuses, the file returns to what it was.
        """
        self.require_up(value, required)
        with self.runtime.steady():
            before = Path(path).read_text()
            replace_file(Path(path), with_entry(before, key, value))
            try:
                command = "add" if self.map_value(path, key) is None else "set"
                self.runtime.order(f"{command} map {path} {key} {value}")
                if self.map_value(path, key) != value:
                    raise RuntimeFailure(f"HAProxy took the order but its map {path} does not say '{key} {value}'")
            except RuntimeFailure:
                replace_file(Path(path), before)
                raise
            self._keep_out()
        if entries(Path(path).read_text()).get(key) != value:
            raise RuntimeFailure(f"{path} does not say '{key} {value}' though HAProxy does: who else writes it?")


def _still(wanted: str) -> Callable[[list[Server]], str]:
    return lambda late: f"HAProxy did not reach {wanted}: " + "; ".join(map(str, late))


def _not_drained(seconds: float, texts: Iterable[str]) -> str:
    return (
        f"not drained within {seconds:g} s: {'; '.join(texts)}. They stay in drain and get no new requests; "
        "wait for the long requests or raise the timeout"
    )


def _not_ready(seconds: float, late: Iterable[Server]) -> str:
    return (
        f"no passed health check within {seconds:g} s: {'; '.join(map(str, late))}. "
        "Ask the service on that host what is wrong: its /readyz, and journalctl -u 'atlas-api@*'"
    )


def entries(text: str) -> dict[str, str]:
    """Return the entries of a map file's *text*; comments and empty lines are none. The first of equal keys counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.split(maxsplit=1)
        if len(fields) == 2 and not fields[0].startswith("#"):
            found.setdefault(fields[0], fields[1].strip())
    return found


def with_entry(text: str, key: str, value: str) -> str:
    """Return a map file's *text* with *key* set to *value* and everything else as it was."""
    lines, done = [], False
    for line in text.splitlines():
        if line.split(maxsplit=1)[:1] == [key]:
            if not done:
                lines.append(f"{key} {value}")
            done = True
        else:
            lines.append(line)
    return "\n".join(lines if done else [*lines, f"{key} {value}"]) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Replace *path* by *text* atomically and durably, with the owner and mode it has."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        shutil.copymode(path, name)
        status = path.stat()
        os.chown(name, status.st_uid, status.st_gid)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class CertificateFailure(Exception):
    """What is wrong with a certificate, in words for the user; never a part of it."""


@dataclass(frozen=True)
class Certificate:
    """What people want to know of a certificate, and what HAProxy knows it by. *sha1* in capitals, as HAProxy has it."""

    names: tuple[str, ...]
    expires: datetime.datetime
    fingerprint: str
    sha1: str

    def report(self) -> dict[str, object]:
        """Return what a user wants to see of it."""
        return {"names": list(self.names), "expires": self.expires.isoformat(), "fingerprint": self.fingerprint}


def inspect_certificate(pem: str, now: datetime.datetime | None = None) -> Certificate:
    """Return the first certificate in *pem*; raise CertificateFailure if its key is missing or another's, or if it is
    not valid at *now*."""
    found = re.search(r"^-+BEGIN CERTIFICATE-+\n.+?^-+END CERTIFICATE-+$", pem, re.MULTILINE | re.DOTALL)
    if not found:
        raise CertificateFailure(
            "There is no certificate in it: certificate, chain and private key are expected, as PEM."
        )
    try:
        _load(pem)
    except (ssl.SSLError, ValueError) as error:
        why = (
            "its private key is another certificate's"
            if "MISMATCH" in str(error).upper()
            else "it has no usable private key"
        )
        raise CertificateFailure(
            f"The certificate cannot be used: {why}. Certificate, chain and private key are expected, as PEM."
        ) from None
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-startdate", "-enddate", "-ext", "subjectAltName"],
        input=found[0], capture_output=True, text=True, check=False, timeout=10,
    )  # fmt: skip
    dates = dict(re.findall(r"^(not\w+)=(.*)$", shown.stdout, re.MULTILINE))
    begins, ends = (
        datetime.datetime.strptime(dates[key], "%b %d %H:%M:%S %Y GMT").replace(tzinfo=datetime.UTC)
        for key in ("notBefore", "notAfter")
    )
    if now is not None and not begins <= now < ends:
        raise CertificateFailure(f"The certificate is valid from {begins.isoformat()} to {ends.isoformat()}, not now.")
    der = ssl.PEM_cert_to_DER_cert(found[0])
    return Certificate(
        names=tuple(re.findall(r"(?:DNS|IP Address):([^,\s]+)", shown.stdout)),
        expires=ends,
        fingerprint=hashlib.sha256(der).hexdigest(),
        sha1=hashlib.sha1(der, usedforsecurity=False).hexdigest().upper(),
    )


def _load(pem: str) -> None:
    """Have OpenSSL load certificate and key in *pem*, which never touches a disk."""
    handle = os.memfd_create("certificate")
    try:
        os.write(handle, pem.encode())
        # Without an answer to the question for a passphrase it would be asked on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(f"/proc/self/fd/{handle}", password="")
    finally:
        os.close(handle)


def presented(runtime: RuntimeSocket, path: str) -> str | None:
    """Return the SHA-1 fingerprint of the certificate that the running HAProxy has for the file *path*, or None."""
    found = re.search(r"^SHA1 FingerPrint: (\w+)$", runtime.ask(f"show ssl cert {path}"), re.MULTILINE)
    return found[1] if found else None


def exchange_certificate(runtime: RuntimeSocket | None, path: Path, pem: str, sha1: str) -> None:
    """Put *pem* into the file *path* and, unless *runtime* is None, into the running HAProxy, and read it back.

    When HAProxy refuses, the file returns to what it was.
    """
    with runtime.steady() if runtime else nullcontext():
        before = path.read_text() if path.exists() else None
        if before is None:
            path.touch(0o600)
        path.chmod(0o600)
        replace_file(path, pem)
        if runtime is None:
            return
        try:
            # An empty line would end the text early.
            body = "\n".join(line for line in pem.splitlines() if line.strip())
            answers = [runtime.ask(f"set ssl cert {path} <<\n{body}\n"), runtime.ask(f"commit ssl cert {path}")]
            if presented(runtime, str(path)) != sha1:
                runtime.ask(f"abort ssl cert {path}")
                said = " ".join(" ".join(answers).split())
                raise RuntimeFailure(f"HAProxy did not take the new certificate: {said}. It presents the old one.")
        except RuntimeFailure:
            if before is not None:
                replace_file(path, before)
            raise


def is_already(state: str, servers: Mapping[str, Server]) -> bool:
    """Return whether *servers* are in *state*, so that nothing has to be ordered.

    Not for ``warm``: whether its check is fresh can only be found out by waiting for one.
    """
    tests: dict[str, Callable[[Server], bool]] = {
        "maint": lambda s: s.status == "MAINT",
        "drained": lambda s: s.status == "MAINT" and s.sessions == 0,
        "ready": lambda s: s.up,
        "warm": lambda s: s.status == "DRAIN",
    }
    return all(map(tests[state], servers.values()))
