"""A host takes a release only when digest, signature and contents are right, and then takes all of it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import release_on_host
from ansible.module_utils import release
from ansible.module_utils.testing import patch_module_args

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = ".".join(platform.python_version_tuple()[:2])
OTHER = "3.98"
TREE = f"python{PYTHON}"
MTIME = 1_700_000_000

Run = Callable[..., dict[str, Any]]


class Signed(NamedTuple):
    """A release archive with its signature, and who may have made it."""

    archive: Path
    signature: Path
    signers: str

    @property
    def digest(self) -> str:
        return str(release.file_digest(self.archive))

    @property
    def name(self) -> str:
        return str(release.release_id("1.2.3", self.digest))


def files() -> dict[str, bytes]:
    own = {
        f"{TREE}/atlas/__init__.py": b'__version__ = "1.2.3"\n',
        f"{TREE}/atlas/cli.py": b"import sys\ndef main():\n    print('ran', *sys.argv[1:])\n",
        f"{TREE}/atlas/not_python.py": b"{% raise %}\n",
        f"python{OTHER}/atlas/__init__.py": b"",
    }
    return own | {"bin/atlas": (PROJECT / "app/bin/atlas").read_bytes(), "sbom.cdx.json": b"{}\n"}


def manifest_of(contents: dict[str, bytes]) -> dict[str, Any]:
    parts: dict[str, dict[str, str]] = {}
    for path, content in contents.items():
        parts.setdefault(path.split("/")[0], {})[path] = hashlib.sha256(content).hexdigest()
    return {
        "version": "1.2.3",
        "pythons": [PYTHON, OTHER],
        "digests": {part: release.tree_digest(digests) for part, digests in parts.items()},
        "bytes": {TREE: 1000},
        "schema": {"head": "a", "revisions": ["a"]},
    }


def packed(contents: dict[str, bytes], manifest: dict[str, Any]) -> bytes:
    first = release.pack({"manifest.json": release.as_json(manifest)}, MTIME)
    return bytes(first + release.pack(contents, MTIME) + release.archive_end())


def signed(directory: Path, content: bytes) -> Signed:
    directory.mkdir(parents=True, exist_ok=True)
    archive = directory / "atlas-1.2.3.tar.gz"
    archive.write_bytes(content)
    key = release.make_key(directory / "keys")
    return Signed(archive, release.sign(archive, key), key.with_name("allowed_signers").read_text())


@pytest.fixture
def good(tmp_path: Path) -> Signed:
    return signed(tmp_path / "incoming", packed(files(), manifest_of(files())))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "opt" / "atlas"


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the module on a Signed release; keyword arguments replace its parameters."""

    def run_module(it: Signed, check: bool = False, **replaced: str) -> dict[str, Any]:
        parameters = {
            "archive": str(it.archive),
            "signature": str(it.signature),
            "allowed_signers": it.signers,
            "digest": it.digest if it.archive.exists() else "0" * 64,
            "root": str(root),
            "_ansible_check_mode": check,
            **replaced,
        }
        capsys.readouterr()
        with patch_module_args(parameters), pytest.raises(SystemExit):
            release_on_host.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run_module


def refused(result: dict[str, Any], cause: str, remedy: str, root: Path) -> None:
    assert result.get("failed") is True, result
    assert cause in result["msg"]
    assert remedy in result["msg"]
    assert "\n" not in result["msg"]
    assert not [path for path in root.rglob("*") if path.is_file()], "something was put on the host"


def test_release_is_unpacked_whole(good: Signed, run: Run, root: Path) -> None:
    result = run(good)
    assert result["changed"] is True
    assert result["release_id"] == good.name
    assert result["manifest"]["version"] == "1.2.3"
    directory = root / "releases" / good.name
    assert result["path"] == str(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(["bin", "manifest.json", TREE, "sbom.cdx.json"])
    assert stat.S_IMODE((directory / "bin/atlas").stat().st_mode) == 0o755
    assert stat.S_IMODE((directory / TREE / "atlas/cli.py").stat().st_mode) == 0o644
    assert (directory / TREE / "atlas/cli.py").stat().st_mtime == MTIME
    assert list((directory / TREE / "atlas/__pycache__").glob("cli.*.pyc"))
    assert (root / "archives" / f"{good.name}.tar.gz").read_bytes() == good.archive.read_bytes()
    assert (root / "archives" / f"{good.name}.tar.gz.sig").read_bytes() == good.signature.read_bytes()


def test_launcher_runs_the_command(good: Signed, run: Run, root: Path) -> None:
    run(good)
    link = root / "slot"
    link.symlink_to(root / "releases" / good.name)
    ran = subprocess.run([link / "bin/atlas", "a", "b"], text=True, capture_output=True)
    assert ran.stdout == "ran a b\n", ran.stderr


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(good: Signed, run: Run, root: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run(good)
    finally:
        os.umask(before)
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path


def test_second_run_changes_nothing(good: Signed, run: Run, root: Path) -> None:
    run(good)
    inode = (root / "releases" / good.name).stat().st_ino
    assert run(good)["changed"] is False
    assert (root / "releases" / good.name).stat().st_ino == inode


def test_kept_archive_is_enough(good: Signed, run: Run) -> None:
    digest = good.digest
    run(good)
    good.archive.unlink()
    good.signature.unlink()
    result = run(good, digest=digest)
    assert result["changed"] is False
    assert result["release_id"] == release.release_id("1.2.3", digest)


def test_check_mode_predicts_and_writes_nothing(good: Signed, run: Run, root: Path) -> None:
    predicted = run(good, check=True)
    assert predicted["changed"] is True
    assert predicted["release_id"] == good.name
    assert not root.exists()
    run(good)
    assert run(good, check=True)["changed"] is False


def test_check_mode_before_the_archive_is_copied(good: Signed, run: Run) -> None:
    good.archive.unlink()
    result = run(good, check=True)
    assert (result["changed"], result["release_id"]) == (True, None)


def test_leftover_of_an_interrupted_run_is_removed(good: Signed, run: Run, root: Path) -> None:
    leftover = root / "releases" / f".{good.name}.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("")
    assert run(good)["changed"] is True
    assert [path.name for path in (root / "releases").iterdir()] == [good.name]
    assert not (root / "releases" / good.name / "half").exists()


def with_dependency(directory: Path, code: bytes, dependency: bytes = b"x = 1\n", lock: str = "L") -> Signed:
    """Make a release whose own code is *code*, as the builder orders it: the project's own files, then dependencies."""
    own = files() | {f"{TREE}/atlas/cli.py": code}
    dependencies = {f"{TREE}/other/__init__.py": dependency, f"{TREE}/other/deep/data.txt": b"data\n"}
    manifest = manifest_of(own | dependencies) | {"built_from": {"requirements_lock": lock, "platform": "p"}}
    first = release.pack({"manifest.json": release.as_json(manifest)}, MTIME)
    content = first + release.pack(own, MTIME) + release.pack(dependencies, MTIME) + release.archive_end()
    return signed(directory, bytes(content))


def test_dependencies_that_the_host_has_are_linked_and_checked(tmp_path: Path, run: Run, root: Path) -> None:
    first, second = with_dependency(tmp_path / "a", b"one = 1\n"), with_dependency(tmp_path / "b", b"two = 2\n")
    for each in (first, second):
        run(each)
    one, two = (root / "releases" / each.name / TREE for each in (first, second))
    for name in ("other/__init__.py", "other/deep/data.txt"):
        assert (one / name).stat().st_ino == (two / name).stat().st_ino
    caches = [next((tree / "other" / "__pycache__").iterdir()) for tree in (one, two)]
    assert caches[0].stat().st_ino == caches[1].stat().st_ino
    assert (one / "atlas/cli.py").read_bytes() == b"one = 1\n" and (two / "atlas/cli.py").read_bytes() == b"two = 2\n"
    assert list((two / "atlas" / "__pycache__").glob("cli.*")), "what is its own is compiled"
    assert not run(second)["changed"]


@pytest.mark.parametrize("why", ["damaged", "another lock"])
def test_what_cannot_be_linked_is_unpacked(tmp_path: Path, run: Run, root: Path, why: str) -> None:
    first = with_dependency(tmp_path / "a", b"one = 1\n", lock="K" if why == "another lock" else "L")
    run(first)
    planted = root / "releases" / first.name / TREE / "other" / "__init__.py"
    if why == "damaged":
        planted.write_bytes(b"evil = 1\n")
    second = with_dependency(tmp_path / "b", b"two = 2\n")
    run(second)
    made = root / "releases" / second.name / TREE / "other" / "__init__.py"
    assert made.read_bytes() == b"x = 1\n" and made.stat().st_ino != planted.stat().st_ino


def sent_head(it: Signed, root: Path) -> tuple[Signed, dict[str, str]]:
    """Return *it* as a host knows it that was sent no more than its head, and the module's parameters for that."""
    there = root / "archives" / f"{it.name}.tar.gz"
    parameters = {
        "head": base64.b64encode(release.head(it.archive)).decode(),
        "signature_text": it.signature.read_text(),
        "digest": it.digest,
    }
    return Signed(there, there.with_name(f"{there.name}.sig"), it.signers), parameters


def test_dependencies_that_the_host_has_are_not_sent(tmp_path: Path, run: Run, root: Path) -> None:
    first, second = with_dependency(tmp_path / "a", b"one = 1\n"), with_dependency(tmp_path / "b", b"two = 2\n")
    run(first)
    there, parameters = sent_head(second, root)
    result = run(there, **parameters)
    assert result["changed"] is True and "incomplete" not in result
    assert there.archive.read_bytes() == second.archive.read_bytes()
    assert there.signature.read_bytes() == second.signature.read_bytes()
    assert (root / "releases" / second.name / TREE / "atlas/cli.py").read_bytes() == b"two = 2\n"
    assert run(there, **parameters)["changed"] is False


@pytest.mark.parametrize("damage", ["archive", "signature"])
def test_what_a_run_that_was_cut_off_left_is_made_again(tmp_path: Path, run: Run, root: Path, damage: str) -> None:
    first, second = with_dependency(tmp_path / "a", b"one = 1\n"), with_dependency(tmp_path / "b", b"two = 2\n")
    run(first)
    there, parameters = sent_head(second, root)
    whole = second.archive.read_bytes()
    there.archive.write_bytes(whole if damage == "signature" else whole[:-5])
    there.signature.write_text("" if damage == "signature" else parameters["signature_text"])
    assert run(there, **parameters)["changed"] is True
    assert there.archive.read_bytes() == whole and there.signature.read_bytes() == second.signature.read_bytes()


@pytest.mark.parametrize("why", ["first release", "other dependencies", "damaged"])
def test_dependencies_that_the_host_lacks_are_asked_for(tmp_path: Path, run: Run, root: Path, why: str) -> None:
    second = with_dependency(tmp_path / "b", b"two = 2\n")
    if why != "first release":
        dependency = b"x = 2\n" if why == "other dependencies" else b"x = 1\n"
        first = with_dependency(tmp_path / "a", b"one = 1\n", dependency)
        run(first)
    if why == "damaged":
        flip(root / "archives" / f"{first.name}.tar.gz")
    there, parameters = sent_head(second, root)
    result = run(there, **parameters)
    assert (result["changed"], result["incomplete"]) == (False, True)
    assert not there.archive.exists() and not (root / "releases" / second.name).exists()
    there.archive.write_bytes(second.archive.read_bytes())
    assert run(there, digest=parameters["digest"])["changed"] is True


def test_a_disk_that_fills_up_keeps_no_half_archive(
    tmp_path: Path, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(with_dependency(tmp_path / "a", b"one = 1\n"))
    there, parameters = sent_head(with_dependency(tmp_path / "b", b"two = 2\n"), root)
    fsync = os.fsync

    def full(handle: int) -> None:
        if "tar.gz.partial" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device", str(root))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in run(there, **parameters)["msg"]
    assert not list((root / "archives").glob(".*"))


@pytest.mark.parametrize("damage", ["changed", "removed", "added", "linked"])
def test_damaged_release_is_replaced(good: Signed, run: Run, root: Path, damage: str) -> None:
    run(good)
    victim = root / "releases" / good.name / TREE / "atlas/cli.py"
    original = victim.read_bytes()
    if damage == "changed":
        victim.write_bytes(original + b"\n")
    elif damage == "added":
        victim.with_name("extra.py").write_text("")
    else:
        victim.unlink()
    if damage == "linked":
        elsewhere = root / "cli.py"
        elsewhere.write_bytes(original)
        victim.symlink_to(elsewhere)
    assert run(good)["changed"] is True
    assert victim.read_bytes() == original
    assert not victim.is_symlink()
    assert not victim.with_name("extra.py").exists()
    assert run(good)["changed"] is False


def test_flipped_byte(good: Signed, run: Run, root: Path) -> None:
    digest = good.digest
    flip(good.archive)
    refused(run(good, digest=digest), f"expected {digest}", "make release", root)


def test_flipped_byte_with_its_own_digest(good: Signed, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(good.archive)
    forbid_unpacking(monkeypatch)
    refused(run(good), "not a valid signature of this file", "make release", root)


def test_wrong_key(good: Signed, run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = release.make_key(tmp_path / "stranger")
    release.sign(good.archive, stranger)
    forbid_unpacking(monkeypatch)
    refused(run(good), "deploy_allowed_signers does not allow", "allowed_signers", root)


def test_key_allowed_for_other_purposes_only(good: Signed, run: Run, root: Path) -> None:
    signers = good.signers.replace('namespaces="atlas-release"', 'namespaces="git"')
    refused(run(good, allowed_signers=signers), "does not allow", "make release", root)


def test_unsigned(good: Signed, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good.signature.unlink()
    forbid_unpacking(monkeypatch)
    refused(run(good), "is not signed", "make release", root)


def test_no_signer_allowed(good: Signed, run: Run, root: Path) -> None:
    refused(run(good, allowed_signers=" \n"), "deploy_allowed_signers is empty", ".keys/allowed_signers", root)


def test_missing_archive(good: Signed, run: Run, root: Path) -> None:
    good.archive.unlink()
    refused(run(good), "there is no such archive", "make release", root)


def test_digest_that_is_none(good: Signed, run: Run, root: Path) -> None:
    refused(run(good, digest="abc"), "not a SHA-256", "sha256sum", root)


def test_ssh_keygen_missing(good: Signed, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    refused(run(good), "ssh-keygen is not installed", "apt-get install openssh-client", root)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_although_signed(tmp_path: Path, run: Run, root: Path, keep: float) -> None:
    whole = packed(files(), manifest_of(files()))
    it = signed(tmp_path / "incoming", whole[: int(len(whole) * keep)])
    refused(run(it), "truncated or damaged", "make release", root)


def test_not_a_release(tmp_path: Path, run: Run, root: Path) -> None:
    it = signed(tmp_path / "incoming", release.pack({"README": b"x"}, MTIME) + release.archive_end())
    refused(run(it), "does not begin with manifest.json", "make release", root)


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", f"{TREE}/../../escaped", f"{TREE}/./x", f"{TREE}//x"])
def test_path_traversal(tmp_path: Path, run: Run, root: Path, path: str) -> None:
    it = signed(tmp_path / "incoming", with_entry(tarfile.TarInfo(path)))
    refused(run(it), "outside the release", "make release", root)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_regular_files(tmp_path: Path, run: Run, root: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo(f"{TREE}/odd")
    entry.type, entry.linkname = kind, "/etc/passwd"
    refused(run(signed(tmp_path / "incoming", with_entry(entry))), "not a regular file", "make release", root)


def test_entry_twice(tmp_path: Path, run: Run, root: Path) -> None:
    it = signed(tmp_path / "incoming", with_entry(tarfile.TarInfo("bin/atlas")))
    refused(run(it), "occurs twice", "make release", root)


@pytest.mark.parametrize("part", [f"{TREE}/atlas/cli.py", "bin/atlas", "sbom.cdx.json", f"{TREE}/extra.py"])
def test_contents_that_are_not_the_manifests(tmp_path: Path, run: Run, root: Path, part: str) -> None:
    it = signed(tmp_path / "incoming", packed(files() | {part: b"other\n"}, manifest_of(files())))
    refused(run(it), "does not match its digest", "make release", root)


def test_python_that_is_not_carried(good: Signed, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "97", "0"))
    refused(run(good), f"This host has Python 3.97; release 1.2.3 carries {PYTHON}, {OTHER}", "Debian (12 or 13)", root)


def test_full_disk(tmp_path: Path, run: Run, root: Path) -> None:
    manifest = manifest_of(files()) | {"bytes": {TREE: 1 << 60}}
    it = signed(tmp_path / "incoming", packed(files(), manifest))
    refused(run(it), "MB free", "Free space on this host", root)


def test_disk_that_fills_up_meanwhile(good: Signed, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(root))

    monkeypatch.setattr(release, "_sync", full)
    refused(run(good), "the disk is full", "free space", root)
    assert not list((root / "releases").iterdir())


def test_launcher_without_this_hosts_python(good: Signed, run: Run, root: Path) -> None:
    run(good)
    directory = root / "releases" / good.name
    (directory / TREE).rename(directory / f"python{OTHER}")
    ran = subprocess.run([directory / "bin/atlas"], text=True, capture_output=True)
    assert ran.returncode == 1
    assert "has no packages for this host's Python" in ran.stderr
    assert "playbooks/deploy.yml" in ran.stderr
    assert "Traceback" not in ran.stderr


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forbid_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not verified must not even be read as an archive."""

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("an unverified archive was opened")

    monkeypatch.setattr(tarfile, "open", touched)


def with_entry(entry: tarfile.TarInfo) -> bytes:
    """A good archive with one more entry at its end."""
    whole = packed(files(), manifest_of(files()))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(entry)
    return whole[: -len(release.archive_end())] + buffer.getvalue()
