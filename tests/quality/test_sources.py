"""No file of the project holds a secret, a path of the machine it was written on, or the name of a package host."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]

# Written in parts, so that this file does not hold what it forbids.
PACKAGE_HOSTS = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("docker", "io"),
        ("quay", "io"),
        ("ghcr", "io"),
        ("npmjs", "org"),
        ("galaxy", "ansible", "com"),
        ("deb", "debian", "org"),
        ("ftp", "debian", "org"),
        ("security", "debian", "org"),
        ("snapshot", "debian", "org"),
    ]
]
FORBIDDEN = {
    "name of a package host: leave it to the machine's own settings": "|".join(map(re.escape, PACKAGE_HOSTS)),
    "path of one machine: make it relative": r"(?<![\w./}$])/(?:work|home/[a-z]\w*|root/\.\w+)/",
    "private key": "-----BEGIN [A-Z ]*PRIVATE " + "KEY-----",
    "API token": r"\batl_[A-Za-z0-9_-]{43}\b",
    "Fernet key": r"(?<![\w/+-])[A-Za-z0-9_-]{43}=(?![\w=])",
}


def sources() -> list[Path]:
    """Every file that is in the repository or could be added to it."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.check_output(command, cwd=PROJECT, text=True).split("\0")
    return [PROJECT / name for name in sorted(set(names)) if name and (PROJECT / name).is_file()]


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_sources_are_free_of(rule: str) -> None:
    pattern = re.compile(FORBIDDEN[rule])
    found = [
        f"{path.relative_to(PROJECT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == [], rule


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (0, "see https://" + "pypi" + ".org/simple"),
        (1, "cd " + "/work" + "/main"),
        (2, "-----BEGIN OPENSSH PRIVATE " + "KEY-----"),
        (3, "token: atl_" + "a" * 43),
        (4, "key: " + "b" * 43 + "="),
    ],
)
def test_rules_can_fail(rule: int, line: str) -> None:
    assert re.search(list(FORBIDDEN.values())[rule], line)


def test_vault_files_are_encrypted() -> None:
    plain = [path for path in sources() if path.name.startswith("vault") and path.suffix == ".yml"]
    plain = [path for path in plain if not path.read_text().startswith("$ANSIBLE_VAULT;1.2;")]
    assert [str(path.relative_to(PROJECT)) for path in plain] == []


def test_what_must_stay_out_is_ignored() -> None:
    names = [".keys/release", ".lab/x/vault-password", "dist/atlas-1.tar.gz", ".venv/bin/python", ".cache/release/x"]
    ignored = subprocess.check_output(["git", "-c", "safe.directory=*", "check-ignore", *names], cwd=PROJECT, text=True)
    assert ignored.split() == names
