"""The release is the same to the byte wherever it is built, and its contents are what the manifest says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from ansible.module_utils import release
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

PROJECT = Path(__file__).resolve().parents[2]
INPUTS = (
    "app/bin",
    "app/src",
    "app/requirements.lock",
    "bin/build-release",
    "bin/verify-release",
    "plugins/module_utils/release.py",
)
IDENTITY = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")

pytestmark = pytest.mark.timeout(300)  # the first build on a machine installs the dependencies


def copy_project(target: Path) -> Path:
    """Copy what a release is made from to *target*; the dependency cache is shared, keys and output are not."""
    for name in INPUTS:
        source, copy = PROJECT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy)
    (PROJECT / ".cache").mkdir(exist_ok=True)
    (target / ".cache").symlink_to(PROJECT / ".cache")
    (target / ".gitignore").write_text(".cache\n.keys/\ndist/\n")
    return target


def run(project: Path, script: str, umask: int = 0o022, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, project / "bin" / script],
        text=True,
        capture_output=True,
        umask=umask,
        env={**os.environ, **environment},
        cwd="/",
    )


def built(project: Path, umask: int = 0o022, **environment: str) -> Path:
    done = run(project, "build-release", umask, **environment)
    assert done.returncode == 0, done.stderr
    return next((project / "dist").glob("atlas-*.tar.gz"))


def git(project: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *IDENTITY, "-C", str(project), *arguments], text=True).strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed copy of the project with a release built from it."""
    copy = copy_project(tmp_path_factory.mktemp("one"))
    git(copy, "init", "-q")
    git(copy, "add", "-A")
    git(copy, "commit", "-q", "-m", "all")
    built(copy, 0o022, TZ="UTC", LANG="C")
    return copy


@pytest.fixture(scope="module")
def archive(project: Path) -> Path:
    return next((project / "dist").glob("atlas-*.tar.gz"))


def test_same_bytes_elsewhere(project: Path, archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "a longer path" / "two"
    other.parent.mkdir()
    subprocess.run(["git", "clone", "-q", str(project), str(other)], check=True, umask=0o077)
    (other / ".cache").symlink_to(PROJECT / ".cache")
    second = built(other, 0o077, TZ="Pacific/Kiritimati", LANG="de_DE.UTF-8", LC_ALL="C.UTF-8", PYTHONHASHSEED="7")
    assert (other / "app/bin/atlas").stat().st_mode != (project / "app/bin/atlas").stat().st_mode
    assert release.file_digest(second) == release.file_digest(archive)


def test_a_change_makes_another_release(project: Path, archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "changed"
    subprocess.run(["git", "clone", "-q", str(project), str(other)], check=True)
    (other / ".cache").symlink_to(PROJECT / ".cache")
    with (other / "app/src/atlas/__init__.py").open("a") as file:
        file.write("# changed\n")
    second = built(other)
    assert release.file_digest(second) != release.file_digest(archive)
    assert (release.read_manifest(archive)["dirty"], release.read_manifest(second)["dirty"]) == (False, True)


def test_a_commit_that_leaves_the_service_alone_makes_no_other_release(
    project: Path, archive: Path, tmp_path: Path
) -> None:
    other = tmp_path / "documented"
    subprocess.run(["git", "clone", "-q", str(project), str(other)], check=True)
    (other / ".cache").symlink_to(PROJECT / ".cache")
    (other / "README.md").write_text("changed\n")
    git(other, "add", "README.md")
    git(other, "commit", "-q", "--date", "2001-01-01T00:00:00Z", "-m", "a change of the documentation")
    assert release.file_digest(built(other)) == release.file_digest(archive)


def test_second_build_changes_nothing(project: Path, archive: Path) -> None:
    before = (archive.stat().st_ino, archive.stat().st_mtime_ns)
    done = run(project, "build-release")
    assert "is up to date" in done.stdout
    assert (archive.stat().st_ino, archive.stat().st_mtime_ns) == before


def test_lost_signature_is_made_again(project: Path, archive: Path) -> None:
    signature = archive.with_name(archive.name + ".sig")
    signature.write_text("")
    built(project)
    signers = (project / ".keys/allowed_signers").read_text()
    assert release.check_signature(archive, signature, signers).startswith("SHA256:")


def test_entries_carry_nothing_of_the_builder(project: Path, archive: Path) -> None:
    time = int(git(project, "show", "-s", "--format=%ct", "HEAD"))
    with tarfile.open(archive) as tar:
        for entry in tar:
            assert entry.isreg()
            assert (entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, "", "")
            assert entry.mode == (0o755 if entry.name == "bin/atlas" else 0o644)
            assert not entry.name.endswith((".pyc", "/RECORD", "/INSTALLER", "/direct_url.json", "uv_cache.json"))
            own = "/atlas/" in entry.name or not entry.name.startswith("python")
            assert entry.mtime == (time if own else 946684800), entry.name
            assert not (entry.name.startswith("python") and entry.name.split("/")[1] == "bin")
    assert archive.read_bytes()[3:8] == bytes(5), "the gzip header holds flags or a time"


def test_both_pythons_have_their_binaries(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    for python, tag in (("3.11", "cpython-311"), ("3.13", "cpython-313")):
        binaries = [name for name in names if name.startswith(f"python{python}/") and ".cpython-" in name]
        assert binaries
        assert all(tag in name for name in binaries)
        assert f"python{python}/atlas/cli.py" in names


def test_manifest(project: Path, archive: Path) -> None:
    manifest = release.check_contents(archive)
    migrations = list((PROJECT / "app/src/atlas/migrations/versions").glob("[!_]*.py"))
    assert manifest["commit"] == git(project, "rev-parse", "HEAD")
    assert manifest["pythons"] == ["3.11", "3.13"]
    assert manifest["schema"]["revisions"][-1] == manifest["schema"]["head"]
    assert len(manifest["schema"]["revisions"]) == len(migrations)


def test_bill_of_materials(archive: Path) -> None:
    content = next(member.content for member in release.members(archive) if member.path == "sbom.cdx.json")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode()) is None
    listed = {entry["name"]: entry["version"] for entry in json.loads(content)["components"]}
    locked = [
        line.split(" ")[0].split("==")
        for line in (PROJECT / "app/requirements.lock").read_text().splitlines()
        if "==" in line[:80]
    ]
    assert {name: version for name, version in locked if name in listed} == listed
    assert "flask" in listed


def test_verify_release(project: Path, archive: Path) -> None:
    done = run(project, "verify-release")
    assert done.returncode == 0, done.stderr
    assert release.file_digest(archive) in done.stdout
    assert "every file matches the manifest" in done.stdout
    assert "those of the commit, computed again" in done.stdout


def test_verify_release_finds_what_does_not_come_from_its_commit(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "forged"
    subprocess.run(["git", "clone", "-q", str(project), str(other)], check=True)
    (other / ".cache").symlink_to(PROJECT / ".cache")
    # Git is told not to look: the manifest says that nothing was changed.
    git(other, "update-index", "--assume-unchanged", "app/src/atlas/db.py")
    with (other / "app/src/atlas/db.py").open("a") as file:
        file.write("# not in any commit\n")
    assert release.read_manifest(built(other))["dirty"] is False
    done = run(other, "verify-release")
    assert done.returncode == 1
    assert "was not built from commit" in done.stderr and "app/src/atlas/db.py" in done.stderr
    assert "app/bin/atlas" not in done.stderr and "its builder" not in done.stderr


def test_verify_release_refuses(project: Path, archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / archive.name
    shutil.copy(archive, copy)
    done = subprocess.run([sys.executable, project / "bin/verify-release", copy], text=True, capture_output=True)
    assert done.returncode == 1
    assert "is not signed" in done.stderr
    assert "Traceback" not in done.stderr


def test_key_is_private(project: Path) -> None:
    assert (project / ".keys/release").stat().st_mode & 0o777 == 0o600
    assert (project / ".keys").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        ("no lock", "app/requirements.lock is missing", "make lock"),
        ("no version", "__version__ is missing", "__version__ ="),
        ("two heads", "has the heads", "down_revision"),
        ("no revision", "has no revision", "down_revision"),
        ("broken source", "not valid Python", "make release"),
        ("link", "is a link", "Replace it"),
    ],
)
def test_refusals_say_what_to_do(tmp_path: Path, change: str, cause: str, remedy: str) -> None:
    copy = copy_project(tmp_path / "copy")
    package = copy / "app/src/atlas"
    versions = package / "migrations/versions"
    if change == "no lock":
        (copy / "app/requirements.lock").unlink()
    elif change == "no version":
        (package / "__init__.py").write_text("")
    elif change == "two heads":
        (versions / "stray.py").write_text('revision = "stray"\ndown_revision = None\n')
    elif change == "no revision":
        shutil.rmtree(versions)
    elif change == "broken source":
        (package / "__init__.py").write_text("def\n")
    elif change == "link":
        (package / "linked.py").symlink_to("/etc/hostname")
    done = run(copy, "build-release")
    assert done.returncode == 1
    assert cause in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy / "dist").exists()
