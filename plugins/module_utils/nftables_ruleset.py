"""Owns how a host's firewall changes: as one transaction, compared whole, and undone by itself unless confirmed."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

NFT = "/usr/sbin/nft"
BOOT_FILE = Path("/etc/nftables.conf")
STATE_DIRECTORY = Path("/run/atlas-firewall")
RETURN_UNIT = "atlas-firewall-return"
BOOT_UNIT = "nftables.service"


class FirewallError(Exception):
    """What went wrong, in one sentence for the user."""


def run(argv: list[str], *, what: str, stdin: str | None = None) -> str:
    """Run *argv* and return its output; raise FirewallError that begins with *what* when it fails."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FirewallError(f"{what}: {error}") from error
    if done.returncode:
        raise FirewallError(f"{what}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def installed() -> bool:
    """Return whether the host has nftables at all."""
    return Path(NFT).exists()


def live() -> str:
    """Return the whole ruleset in force, without counters."""
    return run([NFT, "--stateless", "list", "ruleset"], what="cannot list the ruleset in force")


def expected(ruleset: str) -> str:
    """Return *ruleset* as nftables itself would list it, by loading it into an empty network namespace.

    That both checks it and makes it comparable with :func:`live`: sets are sorted, names and defaults written alike.
    """
    script = f"{NFT} --file - && {NFT} --stateless list ruleset"
    return run(["unshare", "--net", "sh", "-c", script], what="the ruleset is not valid", stdin=ruleset)


def compared(ruleset: str) -> tuple[str, str, bool]:
    """Return the ruleset in force, the wanted one as nftables lists it, and whether something is to do.

    A ruleset that is in force but not confirmed is something to do: it goes away by itself.
    """
    before, after = live(), expected(ruleset)
    unconfirmed = (STATE_DIRECTORY / "previous.nft").exists()
    return before, after, before != after or unconfirmed or not boots(ruleset)


def boots(ruleset: str) -> bool:
    """Return whether the next boot loads *ruleset*."""
    if not BOOT_FILE.exists() or BOOT_FILE.read_text() != ruleset:
        return False
    asked = subprocess.run(["systemctl", "is-enabled", BOOT_UNIT], capture_output=True, timeout=30, check=False)
    return asked.returncode == 0


def write(path: Path, text: str) -> None:
    """Replace *path* (0644, root's) by *text* atomically and durably."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)  # noqa: S103 - rules are no secret; Debian's own file has this mode
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def disarm() -> None:
    """Cancel a pending return, if there is one."""
    units = [f"{RETURN_UNIT}.timer", f"{RETURN_UNIT}.service"]
    subprocess.run(["systemctl", "stop", *units], capture_output=True, timeout=30, check=False)
    subprocess.run(["systemctl", "reset-failed", *units], capture_output=True, timeout=30, check=False)


def apply(ruleset: str, return_after: int) -> None:
    """Put *ruleset* into force; after *return_after* seconds the previous one comes back unless confirmed.

    The previous ruleset is kept from the first of several unconfirmed changes: an unconfirmed one is no state to return to.
    """
    previous = STATE_DIRECTORY / "previous.nft"
    if not previous.exists():
        write(previous, "flush ruleset\n" + live())
    disarm()
    undo = f"{NFT} --file {previous} && rm -f {previous}"
    run(
        [
            "systemd-run",
            "--quiet",
            f"--unit={RETURN_UNIT}",
            f"--on-active={return_after}s",
            "--timer-property=AccuracySec=1s",
            "--description=Return to the previous firewall",
            "/bin/sh",
            "-c",
            undo,
        ],
        what="cannot arm the return to the previous firewall, so nothing was changed",
    )
    run([NFT, "--file", "-"], what="the ruleset was refused and nothing was changed", stdin=ruleset)


def confirm(ruleset: str) -> None:
    """Keep *ruleset*: cancel the return and make it the one that boot loads. Raises when it is no longer in force."""
    wanted = expected(ruleset)
    if live() == wanted:
        disarm()
    # The return may have been faster.
    if live() != wanted:
        raise FirewallError(
            "the new firewall kept SSH out, so the host has returned to the previous one. "
            "Does base_ssh_sources hold the address Ansible comes from, and base_ssh_port the port of sshd? "
            "Mend them in group_vars/all and run the playbook again"
        )
    write(BOOT_FILE, ruleset)
    run(["systemctl", "enable", "--quiet", BOOT_UNIT], what="the new firewall is in force, but boot would not load it")
    (STATE_DIRECTORY / "previous.nft").unlink(missing_ok=True)
