"""Labs: what a lab is on one machine, and the operations on it.

Owns the names (container, network, labels), the record `.lab/NAME/lab.json`, addresses, the Podman calls and the wait for
a host that has booted. A container or network without our label is never touched; one that belongs to another checkout
that still exists is refused.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import io
import ipaddress
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LABEL = "atlas.lab"
ROOT_LABEL = "atlas.lab.root"
SPEC_LABEL = "atlas.lab.spec"
SPACE = ipaddress.ip_network("10.91.0.0/16")
RELEASES = ("bookworm", "trixie")
ORIGIN = "origin"
ORIGIN_OFFSET = 250
FIRST_OFFSET = 11
BOOT_SECONDS = 90
# Open files and processes of a host; larger numbers are refused on a machine without CAP_SYS_RESOURCE.
LIMIT = 20000
# A host's systemd, journal and D-Bus take seven inotify instances; the kernel's default of 128 ends at 18 hosts.
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_INSTANCES = 1024
PACKAGES = "podman runc netavark aardvark-dns iptables nftables uidmap mmdebstrap openssh-client iproute2"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")


class LabError(Exception):
    """What is wrong, and what to do about it, in one message."""


def check_name(name: str) -> str:
    """The lab's name, if containers, networks and vault ids can carry it."""
    if not _NAME.fullmatch(name):
        raise LabError(f"{name!r} is no name for a lab: small letters, digits and -, 32 at most, e.g. LAB=staging")
    return name


def environments(inventories: Path) -> list[str]:
    """The environments that can be raised: every directory that has hosts.yml."""
    return sorted(path.parent.name for path in inventories.glob("*/hosts.yml"))


def environment_hosts(inventory: Path) -> dict[str, str]:
    """Host name -> Debian release, in the order of the environment's hosts.yml.

    Reads only hosts.yml, never a group_vars or vault file.
    """
    import yaml  # here, because bin/lab runs on a Python without it

    source = inventory / "hosts.yml"
    if not source.is_file():
        known = ", ".join(environments(inventory.parent)) or "none"
        raise LabError(
            f"There is no environment {inventory.name!r}. Environments: {known}. Example: make up ENV=staging"
        )
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LabError(f"{source} is not valid YAML: {error}") from error
    variables: dict[str, dict[str, Any]] = {}
    for group in _groups(tree if isinstance(tree, Mapping) else {}):
        for host, given in (group.get("hosts") or {}).items():
            variables.setdefault(str(host), {}).update(given or {})
    if not variables:
        raise LabError(f"{source} names no host")
    for host, given in variables.items():
        if not _HOST.fullmatch(host) or host == ORIGIN:
            raise LabError(
                f"{source}: the host name {host!r} cannot be a lab host: small letters, digits, - and ., not {ORIGIN!r}"
            )
        release = given.get("debian_release", RELEASES[0])
        if release not in RELEASES:
            raise LabError(f"{source}: {host} has debian_release {release!r}; supported: {', '.join(RELEASES)}")
    return {host: str(given.get("debian_release", RELEASES[0])) for host, given in variables.items()}


def edges(inventory: Path) -> list[str]:
    """The hosts of the group `edge`; a lab's URL points to the first."""
    import yaml

    tree = yaml.safe_load((inventory / "hosts.yml").read_text(encoding="utf-8"))
    for group in _groups(tree):
        edge = (group.get("children") or {}).get("edge") or {}
        if edge.get("hosts"):
            return list(map(str, edge["hosts"]))
    raise LabError(f"{inventory / 'hosts.yml'} has no host in the group edge")


def _groups(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for group in tree.values():
        if isinstance(group, Mapping):
            yield group
            yield from _groups(group.get("children") or {})


def subnets(name: str) -> Iterator[ipaddress.IPv4Network]:
    """Every /24 of the lab space, beginning with the one that the name points to: the same name meets the same subnet."""
    choices = list(SPACE.subnets(new_prefix=24))
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(choices)
    yield from (choices[(start + step) % len(choices)] for step in range(len(choices)))  # type: ignore[misc]


def free_subnet(name: str, taken: Collection[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """The first subnet for this name that overlaps nothing in `taken`."""
    for candidate in subnets(name):
        if not any(candidate.overlaps(other) for other in taken):
            return candidate
    raise LabError(f"Every subnet of {SPACE} is in use: take a lab down (bin/lab list shows them; make down LAB=NAME)")


def assign_addresses(
    subnet: ipaddress.IPv4Network, hosts: Sequence[str], known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """An address for each host; a host that has one in `known` keeps it."""
    kept = {host: (known or {})[host] for host in hosts if host in (known or {})}
    used = set(kept.values())
    free = (str(subnet[offset]) for offset in range(FIRST_OFFSET, ORIGIN_OFFSET) if str(subnet[offset]) not in used)
    try:
        return {host: kept.get(host) or next(free) for host in hosts}
    except StopIteration as error:
        raise LabError(f"A lab holds at most {ORIGIN_OFFSET - FIRST_OFFSET} hosts") from error


@dataclass
class Record:
    """What `.lab/NAME/lab.json` says: the shape of a lab that stays the same between runs."""

    name: str
    environment: str
    subnet: str
    releases: dict[str, str]
    addresses: dict[str, str]

    @property
    def origin_address(self) -> str:
        """Address of the origin host."""
        return str(ipaddress.ip_network(self.subnet)[ORIGIN_OFFSET])

    @property
    def gateway(self) -> str:
        """Address of the bridge: where the machine's own connections come from."""
        return str(ipaddress.ip_network(self.subnet)[1])

    def all_hosts(self) -> dict[str, tuple[str, str]]:
        """Host -> (address, release), the origin last."""
        hosts = {host: (address, self.releases[host]) for host, address in self.addresses.items()}
        return hosts | {ORIGIN: (self.origin_address, RELEASES[0])}


@dataclass
class Podman:
    """Podman as root: system services in a container need it."""

    prefix: list[str] = field(default_factory=lambda: [] if os.geteuid() == 0 else ["sudo", "-n"])

    def run(self, *arguments: str, data: bytes | None = None, check: bool = True, seconds: int = 120) -> str:
        """Output of one podman command; raises LabError with podman's own words."""
        return self.command("podman", *arguments, data=data, check=check, seconds=seconds)

    def command(self, *arguments: str, data: bytes | None = None, check: bool = True, seconds: int = 120) -> str:
        """Output of one command as root."""
        try:
            result = subprocess.run(
                [*self.prefix, *arguments], input=data, capture_output=True, timeout=seconds, check=False
            )  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(arguments[:3])} did not end within {seconds} s") from error
        if check and result.returncode != 0:
            raise LabError(f"{' '.join(arguments[:3])} failed: {result.stderr.decode(errors='replace').strip()[-600:]}")
        return result.stdout.decode(errors="replace")

    def json(self, *arguments: str) -> list[dict[str, Any]]:
        """Output of a podman command that prints a JSON list."""
        answer = json.loads(self.run(*arguments) or "[]")
        return list(answer or [])

    def containers(self, *filters: str) -> list[dict[str, Any]]:
        """All containers that match, running or not."""
        return self.json("ps", "--all", "--format", "json", *(f"--filter={item}" for item in filters))

    def networks(self) -> list[dict[str, Any]]:
        """All networks of this machine with their subnets and labels: asked at once, since other labs come and go meanwhile."""
        return self.json("network", "ls", "--format", "json")


def check_machine() -> None:
    """Raise LabError with the one command that mends it when the machine cannot hold a lab."""
    # netavark speaks to iptables on Debian 12 and to nft on 13.
    tools = ("podman", "mmdebstrap", "ssh-keygen", "ip", "iptables", "nft")
    extra = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in tools if not shutil.which(tool, path=extra)]
    if runtime_name(hybrid_cgroups(), lambda tool: shutil.which(tool, path=extra) is not None) is None:
        missing.append("runc")
    if missing:
        raise LabError(
            f"Missing on this machine: {', '.join(missing)}. Do: apt-get install {PACKAGES} (make bootstrap does it)"
        )
    if os.geteuid() != 0 and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode != 0:  # noqa: S607
        raise LabError("A lab needs root: run the command with sudo, or allow this user sudo without a password")


def hybrid_cgroups() -> bool:
    """Whether this machine still has cgroup v1 controllers (systemd's `hybrid` or `legacy` layout)."""
    return not Path("/sys/fs/cgroup/cgroup.controllers").exists()


def runtime_name(hybrid: bool, present: Callable[[str], bool]) -> str | None:
    """The OCI runtime to use: crun refuses a machine with cgroup v1, so there it must be runc."""
    return next((tool for tool in (("runc",) if hybrid else ("crun", "runc")) if present(tool)), None)


def limit_arguments() -> list[str]:
    """Limits at or below the machine's own: without CAP_SYS_RESOURCE the runtime cannot raise them."""
    arguments = []
    for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(kind)[1]
        value = LIMIT if hard == resource.RLIM_INFINITY else min(hard, LIMIT)
        arguments += ["--ulimit", f"{name}={value}:{value}"]
    return arguments


def allow_inotify(podman: Podman, setting: Path = INOTIFY) -> list[str]:
    """Raise the machine's limit of inotify instances, until its next boot, where it is too low for many hosts."""
    if int(setting.read_text(encoding="utf-8")) >= INOTIFY_INSTANCES:
        return []
    try:
        podman.command("tee", str(setting), data=str(INOTIFY_INSTANCES).encode())
    except LabError as error:
        raise LabError(
            f"fs.inotify.max_user_instances of this machine is {setting.read_text(encoding='utf-8').strip()}, too low for labs, and could not "
            f"be raised. Do, on the machine itself: sysctl -w fs.inotify.max_user_instances={INOTIFY_INSTANCES}"
        ) from error
    return [f"fs.inotify.max_user_instances raised to {INOTIFY_INSTANCES} until this machine boots again"]


@contextmanager
def machine_lock(directory: Path) -> Iterator[None]:
    """One lab is changed at a time; the lock ends with the process."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Lab:
    """One lab of one checkout.

    root: the checkout; name: the lab's name. Every method works on things that carry this lab's label.
    """

    def __init__(self, root: Path, name: str, podman: Podman | None = None) -> None:
        self.root = root.resolve()
        self.name = check_name(name)
        self.prefix = f"atlas-lab-{name}"
        self.directory = self.root / ".lab" / name
        self.podman = podman or Podman()

    # --- the record and the keys -------------------------------------------------------------------------------------

    def record(self) -> Record | None:
        """What an earlier run decided, or None."""
        path = self.directory / "lab.json"
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise LabError(f"{path} is damaged. Do: make down LAB={self.name}, then make up again") from error

    def _key(self, path: Path, comment: str) -> bool:
        if path.exists() and path.with_name(path.name + ".pub").exists():
            return False
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)  # noqa: S603
        if result.returncode != 0:
            raise LabError(f"ssh-keygen could not write {path}: {result.stderr.strip()}")
        return True

    # --- what exists -------------------------------------------------------------------------------------------------

    def containers(self) -> dict[str, dict[str, Any]]:
        """Host -> container, for this lab's label; refuses a lab that another checkout holds."""
        found = self.podman.containers(f"label={LABEL}={self.name}")
        for container in found:
            self._refuse_foreign(container.get("Labels") or {})
        return {str(item["Names"][0]).removeprefix(self.prefix + "-"): item for item in found}

    def network(self) -> dict[str, Any] | None:
        """This lab's network, or None; refuses one of that name that is not ours."""
        for network in self.podman.networks():
            if network["name"] == self.prefix:
                labels = network.get("labels") or {}
                if labels.get(LABEL) != self.name:
                    raise LabError(
                        f"A network {self.prefix} exists that no lab made. Choose another name: make up LAB=NAME"
                    )
                self._refuse_foreign(labels)
                return network
        return None

    def _refuse_foreign(self, labels: Mapping[str, str]) -> None:
        owner = labels.get(ROOT_LABEL, "")
        if owner and owner != str(self.root) and (Path(owner) / ".lab" / self.name / "lab.json").exists():
            raise LabError(
                f"The lab {self.name} belongs to the checkout at {owner}. Take it down there (make down LAB={self.name}), "
                f"or choose another name: make up LAB=NAME"
            )

    # --- raise -------------------------------------------------------------------------------------------------------

    def up(self, environment: str, releases: Mapping[str, str], images: Mapping[str, str]) -> tuple[Record, list[str]]:
        """Raise every host and the origin; returns the record and what was changed.

        releases: host -> Debian release. images: Debian release -> image to start from.
        """
        record = self.record()
        changes: list[str] = []
        network = self.network()
        containers = self.containers()
        if record is None or network is None or _subnet(network) != record.subnet:
            # Leftovers of an earlier run whose record or network is gone: their keys and addresses are of no use.
            changes += self._remove(list(containers.values()), network)
            containers, network = {}, None
        known = record.addresses if record and record.environment == environment else None
        if network is None:
            subnet = self._create_network(record.subnet if record else None)
            changes.append(f"network {subnet}")
        else:
            subnet = _subnet(network)
        keep = known if record and record.subnet == subnet else None
        addresses = assign_addresses(ipaddress.IPv4Network(subnet), list(releases), keep)
        record = Record(self.name, environment, subnet, dict(releases), addresses)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        self._key(self.directory / "ssh_key", f"lab {self.name}")
        for host in record.all_hosts():
            self._key(self.directory / "host_keys" / host, host)
        write_file(self.directory / "known_hosts", self._known_hosts(record))
        write_file(self.directory / "lab.json", json.dumps(vars(record), indent=2) + "\n")
        changes += self._raise_hosts(record, containers, images)
        return record, changes

    def _known_hosts(self, record: Record) -> str:
        lines = []
        for host, (address, _) in record.all_hosts().items():
            key = (self.directory / "host_keys" / f"{host}.pub").read_text(encoding="utf-8").split()
            lines.append(f"{address} {key[0]} {key[1]}\n")
        return "".join(lines)

    def _create_network(self, wanted: str | None) -> str:
        taken = self._taken()
        for _ in range(8):
            subnet = free_subnet(self.name, taken)
            if wanted and not any(ipaddress.IPv4Network(wanted).overlaps(other) for other in taken):
                subnet = ipaddress.IPv4Network(wanted)
            labels = ["--label", f"{LABEL}={self.name}", "--label", f"{ROOT_LABEL}={self.root}"]
            try:
                self.podman.run(
                    "network", "create", *labels, "--subnet", str(subnet), "--gateway", str(subnet[1]), self.prefix
                )
            except LabError as error:
                if "subnet" not in str(error):
                    raise
                # Another lab took it between the look and the call.
                taken.append(subnet)
                continue
            return str(subnet)
        raise LabError("Podman refused eight subnets in turn: see podman network ls")

    def _taken(self) -> list[ipaddress.IPv4Network]:
        taken = [ipaddress.IPv4Network(_subnet(network)) for network in self.podman.networks() if _subnet(network)]
        for route in json.loads(self.podman.command("ip", "-4", "-json", "route", "show") or "[]"):
            if route["dst"] != "default":
                taken.append(ipaddress.IPv4Network(route["dst"], strict=False))
        return taken

    def _raise_hosts(
        self, record: Record, containers: Mapping[str, dict[str, Any]], images: Mapping[str, str]
    ) -> list[str]:
        hosts = record.all_hosts()
        changes = []
        if any(containers.get(host, {}).get("State") != "running" for host in hosts):
            changes += allow_inotify(self.podman)
        gone = [item for host, item in containers.items() if host not in hosts or not self._fits(host, item, record)]
        if gone:
            changes += self._remove(gone, None)
        present = {host: item for host, item in containers.items() if item not in gone}

        def raise_one(host: str) -> list[str]:
            address, release = hosts[host]
            done = []
            if host not in present:
                self._create(host, address, release, images[release], record)
                done.append(f"{host} created at {address}")
            if host not in present or present[host]["State"] != "running":
                if host in present and present[host]["State"] == "paused":
                    self.podman.run("unpause", f"{self.prefix}-{host}")
                else:
                    self.podman.run("start", f"{self.prefix}-{host}")
                done.append(f"{host} started")
            if done or not _ssh_banner(address):
                self.wait(host, address)
            return done

        with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
            for done in pool.map(raise_one, hosts):
                changes += done
        return changes

    def _spec(self, host: str, record: Record) -> str:
        address, release = record.all_hosts()[host]
        # The one that hosts were made with, where a rotation has replaced it in them.
        made_with = self.directory / "ssh_key.made.pub"
        keys = [
            made_with if made_with.exists() else self.directory / "ssh_key.pub",
            self.directory / "host_keys" / f"{host}.pub",
        ]
        parts = [address, release, record.subnet, *(key.read_text(encoding="utf-8") for key in keys)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _fits(self, host: str, container: Mapping[str, Any], record: Record) -> bool:
        return bool((container.get("Labels") or {}).get(SPEC_LABEL) == self._spec(host, record))

    def _create(self, host: str, address: str, release: str, image: str, record: Record) -> None:
        hybrid = hybrid_cgroups()
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        runtime = runtime_name(hybrid, lambda tool: shutil.which(tool, path=path) is not None)
        name = f"{self.prefix}-{host}"
        if self.podman.containers(f"name=^{name}$"):
            raise LabError(f"A container {name} exists that no lab made. Choose another name: make up LAB=NAME")
        arguments = ["--name", name, "--hostname", host, "--network", self.prefix, "--ip", address]
        arguments += ["--restart=always", "--systemd=always", "--privileged", *limit_arguments()]
        labels = {LABEL: self.name, ROOT_LABEL: str(self.root), SPEC_LABEL: self._spec(host, record)}
        for key, value in labels.items():
            arguments += ["--label", f"{key}={value}"]
        if hybrid and release != "bookworm":
            # systemd of Debian 13 refuses cgroup v1 unless told.
            options = "systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"
            arguments += ["--env", f"SYSTEMD_PROC_CMDLINE={options}"]
        # Shared mounts: without them the units' credential directories come up empty.
        start = ["/bin/sh", "-c", "mount --make-rshared / && exec /lib/systemd/systemd"]
        self.podman.run("--runtime", str(runtime), "create", *arguments, image, *start)
        # Not as archive: that would give every file to root.
        self.podman.run("cp", "--archive=false", "-", f"{name}:/", data=self._files(host))

    def _files(self, host: str) -> bytes:
        """What makes a host of this lab out of the image: the user's key and the host's own."""
        key = self.directory / "host_keys" / host
        files = {
            "etc/ssh/ssh_host_ed25519_key": (key.read_bytes(), 0o600, 0),
            "etc/ssh/ssh_host_ed25519_key.pub": (key.with_name(f"{host}.pub").read_bytes(), 0o644, 0),
            "home/deploy/.ssh/authorized_keys": ((self.directory / "ssh_key.pub").read_bytes(), 0o600, 1000),
        }
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, (content, mode, owner) in files.items():
                entry = tarfile.TarInfo(path)
                entry.size, entry.mode, entry.uid, entry.gid = len(content), mode, owner, owner
                archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    def wait(self, host: str, address: str, seconds: float = BOOT_SECONDS) -> None:
        """Return when sshd answers and systemd has finished booting; raise LabError at the deadline."""
        deadline = time.monotonic() + seconds
        answer, state = "", ""
        while time.monotonic() < deadline:
            answer = answer or _ssh_banner(address)
            if answer:
                state = self.podman.run(
                    "exec", f"{self.prefix}-{host}", "systemctl", "is-system-running", check=False
                ).strip()
                if state in ("running", "degraded"):
                    return
            time.sleep(0.1)
        journal = ("journalctl", "--no-pager", "--quiet", "--output=cat", "--lines=3")
        console = self.podman.run("exec", f"{self.prefix}-{host}", *journal, check=False).strip()
        raise LabError(
            f"{host} of the lab {self.name} did not boot within {seconds:.0f} s (sshd {'answers' if answer else 'is silent'}, "
            f"systemd says {state or 'nothing'}). Last words: {console or 'none'}. Do: make down LAB={self.name}, then make up again"
        )

    # --- down --------------------------------------------------------------------------------------------------------

    def down(self) -> list[str]:
        """Remove containers, network and `.lab/NAME`; returns what was removed, nothing when there was nothing."""
        changes = self._remove(list(self.containers().values()), self.network())
        if self.directory.exists():
            shutil.rmtree(self.directory)
            changes.append(f".lab/{self.name}")
        return changes

    def _remove(self, containers: Sequence[Mapping[str, Any]], network: Mapping[str, Any] | None) -> list[str]:
        names = [str(container["Names"][0]) for container in containers]
        if names:
            paused = [str(item["Names"][0]) for item in containers if item["State"] == "paused"]
            if paused:
                self.podman.run("unpause", *paused)
            self.podman.run("rm", "--force", "--time", "0", "--volumes", *names)
        if network:
            self.podman.run("network", "rm", str(network["name"]))
            names.append(f"network {network['name']}")
        return [f"{name} removed" for name in names]


def _subnet(network: Mapping[str, Any]) -> str:
    """The IPv4 subnet of a network as podman tells it, or an empty string."""
    found = (str(item["subnet"]) for item in network.get("subnets") or [] if "." in str(item["subnet"]))
    return next(found, "")


def _ssh_banner(address: str) -> str:
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            return connection.recv(64).decode(errors="replace") if connection else ""
    except OSError:
        return ""


def write_file(path: Path, content: str, mode: int = 0o644) -> bool:
    """Write a file whole or not at all; returns whether it differed."""
    if path.is_file() and not path.is_symlink() and path.read_text(encoding="utf-8") == content:
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(content)
    draft.chmod(mode)
    draft.replace(path)
    return True
