"""What the operations checks ask of one host, in one call: journals, units, disks, accounts, ports, permissions.

Runs on the host, as root, with the standard library alone, and changes nothing. Nothing that it returns holds a secret: lines
of a journal come as kinds (:func:`kind`), of accounts no hash and of keys the fingerprint alone.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils import host_facts, nftables_ruleset
from ansible.module_utils.atlas_host import API_PORTS, MONITORING_PORTS, HostError, get, read_json, run
from ansible.module_utils.packages import Packages, choose, report

CHECKS = ("daily", "weekly", "monthly")
DAY = 86_400.0
LINES = 5000
"""Of a journal at most so many lines with errors are read, the newest."""
KIND_LENGTH = 160
DOCTOR_SECONDS = 60
TRIES = 40
"""Requests of the short measure."""
APT_SECONDS = 60
DISKS = (
    "/", "/var", "/var/log", "/opt/atlas", "/var/lib/atlas", "/var/lib/postgresql", "/var/lib/atlas-backup",
)  # fmt: skip
SEALED = (
    # What only root and its owner may read, and by what pattern it is found.
    "/etc/shadow", "/etc/ssh/ssh_host_*_key", "/etc/haproxy/tls/*", "/etc/atlas/backup-credentials/*", "/etc/sudoers.d/*",
    "/opt/atlas/deployments/*/credentials/*", "/var/lib/atlas/*", "/var/lib/atlas-deploy/*", "/var/lib/atlas-backup/*",
    "/var/lib/systemd/credential.secret", *(f"{home}/.ssh/*" for home in ("/root", "/home/*")),
)  # fmt: skip
OPEN_BY_DESIGN = ("backup-status.json", ".pub", "known_hosts")
"""Ends of names of files among those that hold no secret."""
WRITTEN = ("/etc", "/opt/atlas", "/usr/local")
"""Where nothing may be written by everybody."""
PROGRAMS = ("/usr", "/opt", "/home", "/var/lib/atlas")
NO_LOGIN = ("nologin", "false", "sync", "shutdown", "halt")
PRIVILEGED = ("root", "sudo", "wheel", "docker", "disk", "shadow")


def gather(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the check *params*\\ ["check"] asks of this host; for the other parameters see the module ops_facts."""
    check = params["check"]
    wanted = {name: params[name] if check == "monthly" else None for name in ("settings", "credentials")}
    atlas = host_facts.facts({**wanted, "texts": False, "socket": params["socket"], "journal": 0})
    found: dict[str, Any] = {
        "check": check,
        "clock": time.time(),
        "expected": params["expected"],
        "atlas": atlas,
        "disks": disks(DISKS),
        "backup": read_json(Path(params["backup_directory"]) / "status.json"),
    }
    asked = {"daily": _daily, "weekly": _weekly, "monthly": _monthly}[check]
    return found | asked(atlas, params)


def _daily(atlas: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    slot = atlas["slot"]
    return {
        "failed_units": failed_units(run(["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).output),
        "errors": errors(float(params["since"])),
        "doctor": doctor() if slot else None,
        "health": get(API_PORTS[slot], "/health", timeout=10).body if slot else None,
        "probe_success": metric(slot, "atlas_probe_success") if slot else None,
        "clusters": clusters(),
    }


def _weekly(atlas: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    slot, packages = atlas["slot"], Packages()
    found: dict[str, Any] = {"updates": [], "updates_error": "", "answers_ms": [], "edge_ms": [], "probe_seconds": None}
    try:
        packages.refresh(APT_SECONDS)
        found["updates"] = report(choose(packages.upgradable(), "security")[0])
    except HostError as error:
        found["updates_error"] = str(error)
    stale = packages.stale()
    found |= {"stale": sorted(stale), "boot": packages.boot_reasons(stale)}
    if slot:
        found["answers_ms"] = measure(API_PORTS[slot], "/readyz")
        found["probe_seconds"] = metric(slot, "atlas_probe_duration_seconds")
    if atlas["edge"]["installed"]:
        found["edge_ms"] = measure(int(params["edge_port"]), "/healthz")
    return found


def _monthly(atlas: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accounts": accounts(),
        "sockets": sockets(),
        "firewall": firewall(),
        "exposure": exposure(),
        "permissions": list(permissions(SEALED, WRITTEN)),
        "setuid": sorted(setuid(PROGRAMS)),
        "stores_mb": stores(),
    }


# Journals


def kind(message: str) -> str:
    """Return what kind of message this is: its words, without what differs from one to the next, and without secrets.

    Of the JSON that our services log these are the event and the class of the exception.
    """
    with contextlib.suppress(ValueError):
        entry = json.loads(message)
        if isinstance(entry, dict) and "event" in entry:
            last = (str(entry.get("exception") or "").strip().splitlines() or [""])[-1]
            name = re.match(r"[\w.]+", last)
            message = f"{entry['event']}" + (f" ({name[0].rpartition('.')[2]})" if name else "")
    line = re.sub(r"\x1b\[[0-9;]*m", "", (message.strip().splitlines() or [""])[0])
    for pattern, word in _DIFFERING:
        line = pattern.sub(word, line)
    return " ".join(line.split())[:KIND_LENGTH]


_DIFFERING = [
    (re.compile(pattern, re.IGNORECASE), word)
    for pattern, word in (
        (r"\b(bearer|basic)\s+\S+", r"\1 *"),
        (r"\b(\w*(?:password|passwd|secret|token))(\s*[=:]\s*|\s+)\S+", r"\1 *"),
        (r"\b[a-z][a-z0-9+.-]*://\S+", "URL"),
        (r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", "*"),
        (r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b", "ADDRESS"),
        (r"(?<![\w:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{1,4}\b", "ADDRESS"),
        (r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "*"),
        (r"(?<![\w./-])(?=[\w+/=-]*\d)[\w+/=-]{24,}", "*"),
        (r"\d+", "N"),
    )
]


def unit(name: str) -> str:
    """Return the unit *name* as the name of a kind: without its type, its slot, and the number of a transient one."""
    name = re.sub(r"\.(service|scope)$", "", name)
    return re.sub(r"(@(blue|green))$|(-\d+)+$", "", name)


def kinds(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return ``WHO: KIND`` (a unit of ours, or a program) → how often it is in *lines* (of ``journalctl --output json``), and the Unix time of the last one."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            at = int(entry["__REALTIME_TIMESTAMP"]) / 1e6
        except (ValueError, KeyError, TypeError):
            continue
        message = entry.get("MESSAGE")
        if isinstance(message, list):  # journald's way to hold what is no text
            message = bytes(message).decode(errors="replace")
        if not message:
            continue
        name = unit(str(entry.get("_SYSTEMD_UNIT") or ""))
        # Our units run one program each, others many: a session, say.
        who = name if name.startswith("atlas-") else str(entry.get("SYSLOG_IDENTIFIER") or name or "kernel")
        one = found.setdefault(f"{who}: {kind(str(message))}", {"count": 0, "last": at})
        one["count"] += 1
        one["last"] = max(one["last"], at)
    return found


def errors(since: float) -> dict[str, Any]:
    """Return the kinds of error since the Unix time *since*, and whether there was more than could be read."""
    base = ["journalctl", "--no-pager", "--quiet", "--output", "json", "--lines", str(LINES), f"--since=@{since:.6f}"]
    fields = ["--output-fields=MESSAGE,_SYSTEMD_UNIT,SYSLOG_IDENTIFIER"]
    said = run([*base, *fields, "--priority=err"], timeout=120).output.splitlines()
    # What our services print has no priority of its own; its level is in it.
    ours = [*base, *fields, "--unit=atlas-*", '--grep="level": "(error|critical)"', "--case-sensitive=yes"]
    said_by_us = run(ours, timeout=120).output.splitlines()
    return {"kinds": kinds([*said, *said_by_us]), "cut": max(len(said), len(said_by_us)) >= LINES}


# Units, programs


def failed_units(text: str) -> list[dict[str, str]]:
    """Return the units in *text* of ``systemctl list-units --failed``, with what each is."""
    found = []
    for line in text.splitlines():
        parts = line.replace("●", "").split(maxsplit=4)
        if len(parts) >= 4:
            found.append({"unit": parts[0], "about": parts[4] if len(parts) > 4 else ""})
    return found


def doctor() -> dict[str, Any]:
    """Return what ``atlas doctor`` finds, or why it could not be asked."""
    try:
        done = run(
            ["/usr/local/bin/atlas", "doctor", "--json"],
            timeout=DOCTOR_SECONDS + 15,
            env={"ATLAS_COMMAND_SECONDS": str(DOCTOR_SECONDS)},
        )
        return {"findings": list(json.loads(done.output)), "error": ""}
    except HostError as error:
        return {"findings": [], "error": str(error)}
    except ValueError:
        said = [line for line in done.errors.splitlines() if line.strip()]
        return {"findings": [], "error": said[-1] if said else f"it ended with {done.status} and said nothing"}


def clusters() -> list[dict[str, str]]:
    """Return the PostgreSQL clusters of this host by name and status; ``online`` is well."""
    if not Path("/usr/bin/pg_lsclusters").exists():
        return []
    rows = [line.split() for line in run(["pg_lsclusters", "--no-header"]).output.splitlines()]
    return [{"name": f"{row[0]}/{row[1]}", "status": row[3]} for row in rows if len(row) > 3]


def exposure() -> dict[str, float]:
    """Return running service → its exposure, 0 to 10, as ``systemd-analyze security`` sees it."""
    done = run(["systemd-analyze", "security", "--no-pager", "--json=short"], timeout=120)
    try:
        return {str(row["unit"]): float(row["exposure"]) for row in json.loads(done.output)}
    except (ValueError, KeyError, TypeError):
        return {}


def metric(slot: str, name: str) -> float | None:
    """Return what monitoring in *slot* says of the metric *name*, which has no labels; None where it says nothing."""
    found = re.search(rf"^{name} (\S+)$", get(MONITORING_PORTS[slot], "/metrics").text, re.MULTILINE)
    return float(found[1]) if found else None


def measure(port: int, path: str, tries: int = TRIES) -> list[float]:
    """Return how many milliseconds each of *tries* requests took, one after the other; those that failed are left out."""
    took = []
    for _ in range(tries):
        began = time.perf_counter()
        if get(port, path).status == 200:
            took.append(round(1000 * (time.perf_counter() - began), 2))
    return took


# Disks and stores


def disks(paths: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the file systems that hold *paths*, each once under its shortest: total and used MB, percent of inodes used."""
    found: dict[str, dict[str, float]] = {}
    seen = set()
    for path in paths:
        try:
            device, room = os.stat(path).st_dev, os.statvfs(path)
        except OSError:
            continue
        if device in seen or not room.f_blocks:
            continue
        seen.add(device)
        size = room.f_frsize / 2**20
        used = (room.f_blocks - room.f_bfree) * size
        found[path] = {
            # What root keeps for itself does not count as room.
            "total_mb": round(used + room.f_bavail * size),
            "used_mb": round(used),
            "inodes_percent": round(100 * (1 - room.f_ffree / room.f_files), 1) if room.f_files else 0.0,
        }
    return found


def stores() -> dict[str, float]:
    """Return the size in MB of what grows: the store, and the repository of backups."""
    found = {}
    sqlite = Path("/var/lib/atlas/atlas.db")
    if sqlite.exists():
        found["SQLite store"] = sqlite.stat().st_size / 2**20
    for name, path in (("PostgreSQL store", "/var/lib/postgresql"), ("backups", "/var/lib/atlas-backup")):
        if Path(path).is_dir() and (size := _size(path)) >= 2**20:
            found[name] = size / 2**20
    return {name: round(size, 1) for name, size in found.items()}


def _size(path: str) -> int:
    total = 0
    for top, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(top, name)).st_blocks * 512
    return total


# Accounts, ports, permissions


def accounts(root: Path = Path("/")) -> list[dict[str, Any]]:
    """Return the accounts that may log in or have the rights of root: name, uid, why, and fingerprints of their SSH keys."""
    hashes = dict(line.split(":", 2)[:2] for line in _lines(root / "etc/shadow") if line.count(":") >= 2)
    groups = {row[0]: row[3].split(",") for row in (line.split(":") for line in _lines(root / "etc/group")) if row[3:]}
    sudoers = {
        words[0]
        for path in [root / "etc/sudoers", *sorted((root / "etc/sudoers.d").glob("*"))]
        for line in _lines(path)
        if (words := line.split()) and not words[0].startswith(("#", "Defaults", "@", "%"))
    }
    found = []
    for line in _lines(root / "etc/passwd"):
        name, _, uid, _, _, home, shell = line.split(":", 6)
        secret = hashes.get(name, "!")
        keys = _keys(root / home.lstrip("/") / ".ssh/authorized_keys")
        shells = not shell.endswith(NO_LOGIN)
        why = ["root's own number"] if uid == "0" and name != "root" else []
        why += ["an empty password"] if secret == "" else []
        why += ["a password"] if secret and secret[0] not in "!*" else []
        why += ["SSH keys"] if keys and shells else []
        why += [f"member of {group}" for group in PRIVILEGED if name in groups.get(group, [])]
        why += ["rights by sudo"] if name in sudoers and name != "root" else []
        if why or name == "root":
            found.append({"name": name, "uid": int(uid), "why": why, "keys": keys})
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def _keys(path: Path) -> list[str]:
    """Return the fingerprint of each key in the authorized_keys *path*, as ssh-keygen shows it."""
    found = []
    for line in _lines(path):
        blob = re.search(r"(?:ssh-|ecdsa-|sk-)\S+ (AAAA[A-Za-z0-9+/=]+)", line)
        if blob and not line.lstrip().startswith("#"):
            with contextlib.suppress(ValueError):
                digest = hashlib.sha256(base64.b64decode(blob[1])).digest()
                found.append(f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}")
    return sorted(found)


def sockets(root: Path = Path("/")) -> list[dict[str, Any]]:
    """Return what listens: protocol, port, addresses, and by whom. Loopback is marked; UDP of clients is left out."""
    owners = None
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for row in (line.split() for line in _lines(root / "proc/net" / table)[1:]):
            if len(row) < 10 or row[3] != state:
                continue
            protocol, (address, port) = table[:3], _endpoint(row[1])
            # UDP on a port that the kernel lends to whoever asks somebody something.
            if protocol == "udp" and port >= 32768:
                continue
            if owners is None:
                owners = _owners(root)
            one = found.setdefault(
                (protocol, port), {"protocol": protocol, "port": port, "addresses": [], "by": set(), "loopback": True}
            )
            one["addresses"].append(address)
            one["by"].add(owners.get(row[9], "?"))
            one["loopback"] = one["loopback"] and (address.startswith("127.") or address == "::1")
    return [
        {**one, "addresses": sorted(set(one["addresses"])), "by": sorted(one["by"])} for _, one in sorted(found.items())
    ]


def _endpoint(text: str) -> tuple[str, int]:
    """Return address and port of an entry in /proc/net: words of 32 bits in the order of the machine."""
    address, port = text.split(":")
    raw = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, raw).removeprefix("::ffff:"), int(port, 16)


def _owners(root: Path) -> dict[str, str]:
    """Return inode of a socket → name of the program that has it open."""
    found = {}
    for directory in (root / "proc").glob("[0-9]*"):
        try:
            name = (directory / "comm").read_text().strip()
            for handle in (directory / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(handle)
                    if target.startswith("socket:["):
                        found[target[8:-1]] = name
        except OSError:
            continue  # it ended meanwhile
    return found


def firewall() -> dict[str, Any]:
    """Return whether the firewall in force is that of its file, and which TCP ports it lets in."""
    if not nftables_ruleset.installed():
        return {"as_file": False, "ports": [], "error": "nftables is not installed"}
    try:
        live = nftables_ruleset.live()
        wanted = nftables_ruleset.expected(nftables_ruleset.BOOT_FILE.read_text())
    except (nftables_ruleset.FirewallError, OSError) as error:
        return {"as_file": False, "ports": [], "error": str(error)}
    return {"as_file": live == wanted, "ports": accepted(live), "error": ""}


def accepted(ruleset: str) -> list[int]:
    """Return the TCP ports that a rule of *ruleset* accepts, as ``nft list ruleset`` prints it."""
    found = set()
    for match in re.finditer(r"tcp dport (?:\{ ([^}]*) \}|(\d+)).*\baccept\b", ruleset):
        found |= {int(port) for port in re.findall(r"\d+", match[1] or match[2])}
    return sorted(found)


def permissions(sealed: Iterable[str], written: Iterable[str], root: Path = Path("/")) -> Iterator[dict[str, str]]:
    """Yield what too many may read or write: path, mode, owner, and what is wrong with it."""
    for pattern in sealed:
        for path in sorted(root.glob(pattern.lstrip("/"))):
            if path.name.endswith(OPEN_BY_DESIGN) or not _reachable(path.parent, root):
                continue
            with contextlib.suppress(OSError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IROTH:
                    yield _entry(path, found, "everybody may read it")
    for place in written:
        for top, folders, names in os.walk(root / place.lstrip("/")):
            for name in [*folders, *names]:
                path = Path(top, name)
                with contextlib.suppress(OSError):
                    found = path.lstat()
                    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
                    if found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode) and not sticky:
                        yield _entry(path, found, "everybody may write it")


def _reachable(directory: Path, root: Path) -> bool:
    """Tell whether everybody may go as far as *directory*: what is behind a closed door is closed."""
    for place in [directory, *directory.parents]:
        if not place.stat().st_mode & stat.S_IXOTH:
            return False
        if place == root:
            break
    return True


def _entry(path: Path, found: os.stat_result, wrong: str) -> dict[str, str]:
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    return {"path": str(path), "mode": f"{stat.S_IMODE(found.st_mode):04o}", "owner": owner, "wrong": wrong}


def setuid(places: Iterable[str]) -> set[str]:
    """Return the programs in *places* that run with the rights of their owner or group, whoever starts them."""
    there = [place for place in places if Path(place).is_dir()]
    found = run(["find", *there, "-xdev", "-type", "f", "-perm", "/6000", "-print0"], timeout=300) if there else None
    return {path for path in found.output.split("\0") if path} if found else set()
