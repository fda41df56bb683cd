"""Images of lab hosts: a plain Debian server, made from Debian packages, cached by the digest of its recipe."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ansible.module_utils.labs import LabError, Podman

RECIPE_LABEL = "atlas.lab.recipe"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# What a Debian server has on its first day, and no more: roles bring the rest.
INCLUDE = (
    "systemd,systemd-sysv,libpam-systemd,dbus,python3,python3-apt,openssh-server,iproute2,iputils-ping,procps,"
    "ca-certificates,sudo,netbase,tzdata,logrotate"
)
HOOKS = (
    'chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 --user-group deploy',
    'install -d -m 0700 -o 1000 -g 1000 "$1/home/deploy/.ssh"',
    'echo "deploy ALL=(ALL) NOPASSWD: ALL" > "$1/etc/sudoers.d/deploy" && chmod 0440 "$1/etc/sudoers.d/deploy"',
    # Keys and the machine id belong to a host, not to an image.
    'rm -f "$1"/etc/ssh/ssh_host_* && : > "$1/etc/machine-id"',
    # What belongs to the machine's kernel: hosts that boot at once would wait for each other at binfmt_misc for ever.
    "for unit in systemd-modules-load.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount "
    "proc-sys-fs-binfmt_misc.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount "
    'sys-fs-fuse-connections.mount console-getty.service; do ln -sf /dev/null "$1/etc/systemd/system/$unit"; done',
    'echo force-unsafe-io > "$1/etc/dpkg/dpkg.cfg.d/lab"',
)
TARGET_FORMAT = "$(REPO_URI)|$(CODENAME)|$(COMPONENT)|$(ORIGIN)|$(CREATED_BY)"


def debian_sources(targets: Sequence[str], codename: str, release: str) -> list[str]:
    """apt lines for `release`, from the mirrors that this machine's apt uses.

    targets: lines of `apt-get indextargets --format TARGET_FORMAT`; codename: this machine's own release.
    An empty list means that apt here tells no Debian mirror, and mmdebstrap's default is used.
    """
    found: dict[str, str] = {}
    for line in targets:
        uri, suite, component, origin, created_by = (line.split("|") + [""] * 5)[:5]
        wanted = suite in (codename, f"{codename}-updates", f"{codename}-security")
        if (
            created_by == "Packages"
            and component == "main"
            and wanted
            and uri.startswith("http")
            and origin in ("Debian", "")
        ):
            found.setdefault(suite.replace(codename, release, 1), uri)
    if release not in found:
        return []
    return [f"deb [signed-by={KEYRING}] {uri} {suite} main" for suite, uri in sorted(found.items())]


def machine_sources(release: str) -> list[str]:
    """apt lines for `release` on this machine."""
    command = ["apt-get", "indextargets", "--format", TARGET_FORMAT]
    try:
        targets = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()  # noqa: S603
        system = dict(
            line.split("=", 1)
            for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
            if "=" in line
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return debian_sources(targets, system.get("VERSION_CODENAME", "").strip('"'), release)


def recipe(release: str, sources: Sequence[str]) -> str:
    """Digest of everything that decides what the image holds."""
    text = json.dumps([release, INCLUDE, HOOKS, list(sources)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ensure(podman: Podman, release: str, check: bool = False) -> tuple[str, bool]:
    """Make the image of one Debian release unless it is there; returns its name and whether it was made."""
    sources = machine_sources(release)
    digest = recipe(release, sources)
    name = f"localhost/atlas-lab:{release}-{digest}"
    if podman.run("images", "--quiet", "--filter", f"reference={name}").strip():
        return name, False
    if not check:
        build(podman, release, sources, name, digest)
    return name, True


def build(podman: Podman, release: str, sources: Sequence[str], name: str, digest: str) -> None:
    """mmdebstrap into a tar file, imported under `name` and the short name of its release."""
    # Not /tmp: it may be small, and held in memory.
    with tempfile.TemporaryDirectory(prefix="atlas-lab-", dir="/var/tmp") as directory:  # noqa: S108
        archive = str(Path(directory) / "root.tar")
        os.chmod(directory, 0o755)  # noqa: S103 - mmdebstrap's own user enters it
        arguments = ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=cleanup/apt/lists", f"--include={INCLUDE}"]
        arguments += [f"--customize-hook={hook}" for hook in HOOKS]
        try:
            podman.command(*arguments, release, archive, *sources, seconds=900)
        except LabError as error:
            raise LabError(
                f"The image of Debian {release} could not be made. Does apt work on this machine (apt-get update)? {error}"
            ) from error
        podman.run("import", "--quiet", "--change", f"LABEL {RECIPE_LABEL}={digest}", archive, name, seconds=300)
        podman.run("tag", name, f"localhost/atlas-lab:{release}")
