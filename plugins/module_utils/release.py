"""The release archive: its layout, digests and signature, and how it is checked and unpacked.

Owns every rule that the builder (``bin/build-release``) and the hosts (module ``release_on_host``) share, with the
standard library and ``ssh-keygen`` alone, so that both sides read one definition. An archive is a gzip file of several
members, which any gunzip reads as one: project files first, then one ready-compressed member per dependency tree.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

PYTHONS = ("3.11", "3.13")
"""The Python of each supported Debian (12 and 13)."""

NAMESPACE = "atlas-release"
PRINCIPAL = "atlas-release"
MANIFEST = "manifest.json"
SBOM = "sbom.cdx.json"
LAUNCHER = "bin/atlas"
PACKAGE = "atlas"
"""The project's own part of a tree; the others are dependencies."""

_COMPRESSION = 4  # measured: level 6 takes twice the time for 4 % less
_BLOCK = 1 << 20


class ReleaseError(Exception):
    """A release that cannot be built or must not be used; the message names the cause and the remedy."""


class Member(NamedTuple):
    """One regular file of an archive."""

    path: str
    content: bytes
    mtime: int


def release_id(version: str, digest: str) -> str:
    """Return the name of a release: *version* and the first 12 hex digits of the archive's SHA-256 *digest*."""
    return f"{version}-{digest[:12]}"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the file at *path*, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(files: Mapping[str, str]) -> str:
    """Return one digest for *files* (path → SHA-256 in hex): that of the sorted lines ``DIGEST  PATH``."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_mode(path: str) -> int:
    """Return the permissions of the archive's file *path*: only what lies in ``bin/`` can be executed."""
    return 0o755 if path.startswith("bin/") else 0o644


def pack(files: Mapping[str, bytes], mtime: int) -> bytes:
    """Return one gzip member with *files* (path → content) in sorted order, owned by 0:0, all dated *mtime* (Unix seconds).

    The same input gives the same bytes on every machine: nothing is taken from the file system, and the gzip header has
    neither name nor time.
    """
    compressor = _gzip()
    chunks = []
    for path in sorted(files):
        content = files[path]
        info = tarfile.TarInfo(path)
        info.size = len(content)
        info.mode = file_mode(path)
        info.mtime = mtime
        chunks.append(compressor.compress(info.tobuf(tarfile.GNU_FORMAT)))
        chunks.append(compressor.compress(content + bytes(-len(content) % tarfile.BLOCKSIZE)))
    chunks.append(compressor.flush())
    return b"".join(chunks)


def archive_end() -> bytes:
    """Return the gzip member that ends an archive."""
    compressor = _gzip()
    return compressor.compress(bytes(2 * tarfile.BLOCKSIZE)) + compressor.flush()


def _gzip() -> zlib._Compress:
    return zlib.compressobj(_COMPRESSION, zlib.DEFLATED, 16 + zlib.MAX_WBITS)


def members(archive: Path) -> Iterator[Member]:
    """Yield the files of *archive*; a name or type that could write outside the target raises :class:`ReleaseError`."""
    seen: set[str] = set()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for info in tar:
                _refuse_unsafe(archive, info, seen)
                file = tar.extractfile(info)
                content = file.read() if file else b""
                if len(content) != info.size:
                    raise EOFError
                yield Member(info.name, content, int(info.mtime))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ReleaseError(
            f"{archive}: the archive is truncated or damaged. Build it again: make release (or copy it again)."
        ) from error


def _refuse_unsafe(archive: Path, info: tarfile.TarInfo, seen: set[str]) -> None:
    path = PurePosixPath(info.name)
    remedy = "Nothing was unpacked into service. Do not use this file; build one with: make release."
    if path.is_absolute() or ".." in path.parts or str(path) != info.name or info.name == "." or "\0" in info.name:
        raise ReleaseError(f"{archive}: entry {info.name!r} would be written outside the release. {remedy}")
    if not info.isreg():
        raise ReleaseError(
            f"{archive}: entry {info.name!r} is not a regular file (links and devices are refused). {remedy}"
        )
    if info.name in seen:
        raise ReleaseError(f"{archive}: entry {info.name!r} occurs twice. {remedy}")
    seen.add(info.name)


def head(archive: Path) -> bytes:
    """Return the beginning of *archive*: manifest and the project's own files, one gzip member each. Dependencies follow."""
    found = b""
    with archive.open("rb") as file:
        for _ in range(2):
            member = zlib.decompressobj(16 + zlib.MAX_WBITS)
            file.seek(len(found))
            while not member.eof:
                block = file.read(_BLOCK)
                try:
                    member.decompress(block)
                except zlib.error:
                    block = b""
                if not block:
                    raise ReleaseError(f"{archive}: the archive is truncated or damaged. Build it again: make release.")
                found += block[: len(block) - len(member.unused_data)]
    return found


def complete(beginning: bytes, digest: str, target: Path) -> bool:
    """Write the archive with the SHA-256 *digest*, whose head is *beginning*, to *target*; tell whether that could be done.

    What follows the head, the dependencies, is taken from an archive beside *target* that goes on with the very same bytes.
    """
    for donor in sorted(target.parent.glob("[!.]*.tar.gz"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            start = len(head(donor))
        except ReleaseError:
            continue
        with donor.open("rb") as file:
            file.seek(start)
            whole = hashlib.sha256(beginning)
            while block := file.read(_BLOCK):
                whole.update(block)
            if whole.hexdigest() == digest:
                file.seek(start)
                _write_durably(target, chain([beginning], iter(partial(file.read, _BLOCK), b"")))
                return True
    return False


def read_manifest(archive: Path) -> dict[str, Any]:
    """Return the manifest of *archive*; it is the first entry, so that this is fast."""
    for member in members(archive):
        if member.path == MANIFEST:
            return parse_manifest(member.content, archive)
        break
    raise ReleaseError(
        f"{archive}: not an Atlas release: it does not begin with {MANIFEST}. Build one with: make release."
    )


def parse_manifest(content: bytes, source: Path) -> dict[str, Any]:
    """Return the manifest in *content*, which was read from *source*."""
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"version", "digests", "pythons", "schema"} <= manifest.keys():
        raise ReleaseError(f"{source}: {MANIFEST} is not that of an Atlas release. Build one with: make release.")
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z.+-]*", str(manifest["version"])):
        raise ReleaseError(
            f"{source}: {MANIFEST} has the impossible version {manifest['version']!r}. Build it again: make release."
        )
    return manifest


def part_of(path: str) -> str:
    """Return the part of the release that holds *path*: a tree such as ``python3.11``, ``bin``, or a file at the top."""
    return path.split("/", 1)[0]


def check_digests(found: Mapping[str, Mapping[str, str]], manifest: Mapping[str, Any], source: Path) -> None:
    """Compare the parts that were *found* (part → path → SHA-256) with the manifest's digests."""
    for part, files in sorted(found.items()):
        if part != MANIFEST and tree_digest(files) != manifest["digests"].get(part):
            raise ReleaseError(
                f"{source}: {part} does not match its digest in {MANIFEST}. Build the release again: make release."
            )


def check_contents(archive: Path) -> dict[str, Any]:
    """Check every part of *archive* against its manifest, and return the manifest."""
    manifest = read_manifest(archive)
    found: dict[str, dict[str, str]] = {part: {} for part in manifest["digests"]}
    for member in members(archive):
        found.setdefault(part_of(member.path), {})[member.path] = hashlib.sha256(member.content).hexdigest()
    check_digests(found, manifest, archive)
    return manifest


def check_digest(archive: Path, digest: str) -> None:
    """Raise :class:`ReleaseError` unless *archive* has the SHA-256 *digest* (64 hex digits)."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ReleaseError(f"digest {digest!r} is not a SHA-256 in hex (64 digits). Take it from: sha256sum ARCHIVE.")
    if not archive.is_file():
        raise ReleaseError(f"{archive}: there is no such archive. Build it with: make release, then copy it here.")
    found = file_digest(archive)
    if found != digest:
        raise ReleaseError(
            f"{archive}: its SHA-256 is {found}, expected {digest}: the file was changed, truncated or is another release. "
            "Copy it again; if that does not help, build it again: make release."
        )


def sign(archive: Path, key: Path) -> Path:
    """Sign *archive* with the private *key* and return the signature's path, ``ARCHIVE.sig``."""
    signature = archive.with_name(archive.name + ".sig")
    signature.unlink(missing_ok=True)  # ssh-keygen asks before it overwrites
    done = _ssh_keygen(["-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE, str(archive)])
    if done.returncode:
        raise ReleaseError(
            f"{archive}: cannot be signed with {key}: {_said(done)}. Check that the key is readable and unencrypted."
        )
    return signature


def check_signature(archive: Path, signature: Path, allowed_signers: str) -> str:
    """Raise :class:`ReleaseError` unless *signature* is one of *archive* by an allowed signer; return the key's fingerprint.

    *allowed_signers* is the text of an OpenSSH allowed_signers file with the principal ``atlas-release``.
    """
    if not signature.is_file() or not signature.stat().st_size:
        raise ReleaseError(
            f"{archive}: the release is not signed ({signature} is missing or empty). Sign it: make release."
        )
    if not allowed_signers.strip():
        raise ReleaseError(
            "No signer is allowed: deploy_allowed_signers is empty. Set it to the text of .keys/allowed_signers."
        )
    with tempfile.NamedTemporaryFile("w", prefix="allowed_signers.") as signers:
        signers.write(allowed_signers.strip() + "\n")
        signers.flush()
        arguments = ["-Y", "verify", "-f", signers.name, "-I", PRINCIPAL, "-n", NAMESPACE, "-s", str(signature)]
        verified = _ssh_keygen(arguments, archive)
    if not verified.returncode:
        return _fingerprint(verified)
    # This second look tells a foreign key from changed content: it accepts any key.
    matching = _ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature)], archive)
    if matching.returncode:
        raise ReleaseError(
            f"{archive}: {signature.name} is not a valid signature of this file ({_said(verified)}): "
            "one of the two was changed. Copy both again, or build and sign again: make release."
        )
    raise ReleaseError(
        f"{archive}: signed by {_fingerprint(matching) or 'a key'}, which deploy_allowed_signers does not allow for {PRINCIPAL}. "
        "Add the signer's line from its .keys/allowed_signers if you trust it; else build your own: make release."
    )


def _ssh_keygen(arguments: list[str], stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        if stdin is None:
            return subprocess.run(
                ["ssh-keygen", *arguments], text=True, capture_output=True, env=environment, stdin=subprocess.DEVNULL
            )
        with stdin.open("rb") as content:
            return subprocess.run(
                ["ssh-keygen", *arguments], text=True, capture_output=True, env=environment, stdin=content
            )
    except FileNotFoundError:
        raise ReleaseError(
            "ssh-keygen is not installed, and signatures need it. Install it: apt-get install openssh-client."
        ) from None


def make_key(directory: Path) -> Path:
    """Return the signing key ``DIRECTORY/release``, made at first use beside its ``allowed_signers``."""
    key = directory / "release"
    if not key.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        done = _ssh_keygen(["-q", "-t", "ed25519", "-N", "", "-C", PRINCIPAL, "-f", str(key)])
        if done.returncode:
            raise ReleaseError(f"{key}: the signing key cannot be made: {_said(done)}.")
        key.chmod(0o600)
    signers = directory / "allowed_signers"
    if not signers.exists():
        algorithm, public = key.with_suffix(".pub").read_text().split()[:2]
        signers.write_text(f'{PRINCIPAL} namespaces="{NAMESPACE}" {algorithm} {public}\n')
    return key


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"exit status {done.returncode}"


def _fingerprint(done: subprocess.CompletedProcess[str]) -> str:
    match = re.search(r"SHA256:\S+", done.stdout + done.stderr)
    return match.group() if match else ""


def is_intact(directory: Path, manifest: Mapping[str, Any], python: str) -> bool:
    """Tell whether *directory* holds exactly the release of *manifest* for *python* (such as ``3.11``)."""
    try:
        found = parse_manifest((directory / MANIFEST).read_bytes(), directory)
    except (OSError, ReleaseError):
        return False
    parts: dict[str, dict[str, str]] = {part: {} for part in _wanted_parts(python) if part != MANIFEST}
    try:
        for path in directory.rglob("*"):
            name = path.relative_to(directory).as_posix()
            if path.is_symlink():
                return False
            if path.is_file() and "__pycache__" not in path.parts and name != MANIFEST:
                parts.setdefault(part_of(name), {})[name] = file_digest(path)
    except OSError:
        return False
    return found == manifest and all(
        tree_digest(files) == manifest["digests"].get(part) for part, files in parts.items()
    )


def _wanted_parts(python: str) -> set[str]:
    return {MANIFEST, SBOM, part_of(LAUNCHER), f"python{python}"}


def check_python(manifest: Mapping[str, Any], python: str) -> None:
    """Raise :class:`ReleaseError` unless the release carries a tree for *python* (such as ``3.11``)."""
    if python not in manifest["pythons"]:
        raise ReleaseError(
            f"This host has Python {python}; release {manifest['version']} carries {', '.join(manifest['pythons'])}. "
            "Use a host with a supported Debian (12 or 13)."
        )


def check_space(directory: Path, manifest: Mapping[str, Any], python: str) -> None:
    """Raise :class:`ReleaseError` unless *directory*'s file system can take the release, compiled, and stay usable."""
    needed = 2 * int(manifest.get("bytes", {}).get(f"python{python}", 0))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ReleaseError(
            f"{directory}: {free >> 20} MB free, the release needs {needed >> 20} MB. Nothing was changed. "
            f"Free space on this host (see: du -xh --max-depth=2 {directory.parent}) and run the playbook again."
        )


def unpack(archive: Path, manifest: Mapping[str, Any], python: str, directory: Path) -> None:
    """Unpack *archive*'s parts for *python* into *directory*, check and compile them; appears whole or not at all.

    Work happens in a hidden neighbour, which replaces *directory* by a rename once all of it is on disk. A neighbour that
    an interrupted run left is removed first. Dependencies that another release there has too are linked from it.
    """
    unfinished = directory.with_name(f".{directory.name}.partial")
    tree = f"python{python}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if _write_linked(archive, manifest, tree, unfinished, directory):
            _compile(unfinished / tree / PACKAGE, directory / tree / PACKAGE)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            check_digests(_write(archive, python, unfinished), manifest, archive)
            _compile(unfinished / tree, directory / tree)
        _sync(unfinished)
        _replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_linked(archive: Path, manifest: Mapping[str, Any], tree: str, target: Path, directory: Path) -> bool:
    """Write what is the project's own from *archive*, and link the rest of *tree* from a release with the same dependencies.

    Tell whether that made the release of *manifest*, by its digests. What is linked is read and checked like what is written.
    """
    for donor in _with_same_dependencies(directory, manifest):
        try:
            found = _write(archive, tree.removeprefix("python"), target, own=True)
            found[tree] |= _link(donor / tree, target / tree)
            check_digests(found, manifest, archive)
            return True
        except (OSError, ReleaseError):
            shutil.rmtree(target, ignore_errors=True)
    return False


def _with_same_dependencies(directory: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the releases beside *directory* that were built from the same lock."""
    for path in sorted(directory.parent.glob("[!.]*")):
        try:
            theirs = parse_manifest((path / MANIFEST).read_bytes(), path).get("built_from", {})
        except (OSError, ReleaseError):
            continue
        ours = manifest.get("built_from", {})
        if (
            path != directory
            and ours
            and all(theirs.get(key) == ours.get(key) for key in ("requirements_lock", "platform"))
        ):
            yield path


def _link(source: Path, target: Path) -> dict[str, str]:
    """Link the files of the tree *source* but the project's own into *target*; return their digests. Links are refused."""
    made, found = {target}, {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if name.parts[0] == PACKAGE or path.is_dir():
            continue
        if path.is_symlink():
            raise ReleaseError(f"{path} is a link, and a release holds regular files only.")
        _make_directory((target / name).parent, target, made)
        os.link(path, target / name)
        if "__pycache__" not in name.parts:
            found[f"{source.name}/{name.as_posix()}"] = file_digest(path)
    return found


def _write(archive: Path, python: str, target: Path, own: bool = False) -> dict[str, dict[str, str]]:
    """Write *archive*'s parts for *python*, or what is the project's *own*, to *target*; return their digests."""
    made: set[Path] = set()
    found: dict[str, dict[str, str]] = {part: {} for part in _wanted_parts(python)}
    for member in members(archive):
        parts = PurePosixPath(member.path).parts
        if own and parts[0].startswith("python") and parts[1:2] != (PACKAGE,):
            break  # the project's own files come first
        if parts[0] not in found:
            continue
        path = target / member.path
        _make_directory(path.parent, target, made)
        with path.open("xb") as file:
            file.write(member.content)
            os.fchmod(file.fileno(), file_mode(member.path))
        os.utime(path, (member.mtime, member.mtime))
        found[parts[0]][member.path] = hashlib.sha256(member.content).hexdigest()
    return found


def _make_directory(path: Path, top: Path, made: set[Path]) -> None:
    """Make *path* and its parents down from *top*, with mode 0755 under any umask."""
    if path in made:
        return
    if path != top:
        _make_directory(path.parent, top, made)
    path.mkdir()
    path.chmod(0o755)
    made.add(path)


def _compile(tree: Path, final: Path) -> None:
    """Compile *tree* as it will be seen at *final*. Files of a release never change, so Python need not check them.

    A dependency may carry a file that is not valid Python (a template, a test case): that is no fault of the release.
    """
    options = ["-q", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-s", str(tree), "-p", str(final)]
    subprocess.run(
        [sys.executable, "-I", "-m", "compileall", *options, str(tree)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        umask=0o022,
    )


def _sync(directory: Path) -> None:
    """Write *directory*'s file system to disk: one call instead of an fsync for each of thousands of files."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    finally:
        os.close(handle)


def _replace(unfinished: Path, directory: Path) -> None:
    damaged = directory.with_name(f".{directory.name}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if directory.exists():
        directory.rename(damaged)
    unfinished.rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(damaged, ignore_errors=True)


def keep(source: Path, target: Path) -> None:
    """Copy *source* to *target* so that *target* is whole or absent, even after a power cut."""
    with source.open("rb") as reader:
        _write_durably(target, iter(partial(reader.read, _BLOCK), b""))


def _write_durably(target: Path, blocks: Iterable[bytes]) -> None:
    unfinished = target.with_name(f".{target.name}.partial")
    try:
        with unfinished.open("wb") as writer:
            for block in blocks:
                writer.write(block)
            os.fchmod(writer.fileno(), 0o644)
            writer.flush()
            os.fsync(writer.fileno())
        unfinished.rename(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # of a disk that is full, this may be what fills it
        raise
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in *directory* durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_json(value: object) -> bytes:
    """Return *value* as JSON with sorted keys and a final newline: one form for one value."""
    buffer = io.StringIO()
    json.dump(value, buffer, indent=2, sort_keys=True, ensure_ascii=False)
    return (buffer.getvalue() + "\n").encode()
