"""Owns the throw-away containers in which rendered files meet their programs: a lab host's image plus those programs."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

from ansible.module_utils import lab_images, labs

CODENAMES = ("bookworm", "trixie")
RECIPE = """
set -e
apt-get update -qq
mkdir -p /etc/postgresql-common/createcluster.d
echo create_main_cluster = false > /etc/postgresql-common/createcluster.d/checks.conf
apt-get install -y -qq --no-install-recommends barman haproxy nftables nginx openssh-server postgresql restic \
  unattended-upgrades
apt-get clean
ssh-keygen -A
mkdir -p /run/sshd
"""


@functools.cache
def podman() -> tuple[str, ...]:
    """The start of a podman command with the runtime that works on this machine."""
    runtime = labs.runtime_name(labs.hybrid_cgroups(), lambda tool: shutil.which(tool) is not None) or "runc"
    return (*([] if os.geteuid() == 0 else ["sudo", "-n"]), "podman", "--runtime", runtime)


def run(*arguments: str, stdin: str | None = None, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """One podman command, whatever its outcome."""
    command = [*podman(), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)


def must(*arguments: str, stdin: str | None = None, seconds: int = 60) -> str:
    """Output of a podman command that has to succeed."""
    done = run(*arguments, stdin=stdin, seconds=seconds)
    assert done.returncode == 0, f"podman {' '.join(arguments[:4])}: {done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def image(codename: str) -> str:
    """Name of the image for one Debian release; made once, again when the lab's image or the recipe changes."""
    base, _ = lab_images.ensure(labs.Podman(), codename)
    digest = hashlib.sha256(f"{base}{RECIPE}".encode()).hexdigest()[:16]
    name = f"localhost/atlas-checks:{codename}-{digest}"
    if run("image", "exists", name).returncode:
        container = f"atlas-checks-make-{codename}-{uuid.uuid4().hex[:8]}"
        limits = labs.limit_arguments()
        try:
            must("run", "--name", container, *limits, base, "sh", "-c", RECIPE, seconds=500)
            must("commit", "--quiet", container, name, seconds=300)
        finally:
            run("rm", "--force", container)
    must("tag", name, f"localhost/atlas-checks:{codename}")
    return name


class Container:
    """One running container of a checks image; use it as a context."""

    def __init__(self, codename: str, *options: str, command: tuple[str, ...] = ("sleep", "infinity")) -> None:
        self.codename = codename
        self.name = f"atlas-checks-{codename}-{uuid.uuid4().hex[:8]}"
        self._arguments = ["--name", self.name, *labs.limit_arguments(), *options, image(codename), *command]

    def __enter__(self) -> Container:
        must("run", "--detach", "--rm", *self._arguments)
        return self

    def __exit__(self, *_: object) -> None:
        run("rm", "--force", "--time", "0", self.name)

    def shell(self, script: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Outcome of a shell script in the container."""
        return run("exec", "--interactive", self.name, "sh", "-c", script, stdin=stdin)

    def write(self, files: Mapping[str, str]) -> None:
        """Put files (path to text) into the container; programs (in /usr/local) executable."""
        for path, text in files.items():
            mode = "0755" if path.startswith("/usr/local/") else "0644"
            done = self.shell(f"mkdir -p '{Path(path).parent}' && cat > '{path}' && chmod {mode} '{path}'", text)
            assert done.returncode == 0, done.stderr
