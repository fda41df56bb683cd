"""What backups decide: retention, the point to restore, the name of a failure, the report."""

from __future__ import annotations

import datetime
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import backup_core as core
from ansible.module_utils.backup_core import BackupError, Point
from ansible.module_utils.backup_tar import receive, send, tree

NOW = 1_900_000_000.0
DAY = core.DAY


def test_retention_keeps_the_last_of_seven_days_and_of_four_weeks() -> None:
    times = {f"{day:02d}-{hour:02d}": NOW - day * DAY - hour * 3600 for day in range(60) for hour in (0, 6)}
    kept = sorted(set(times) - set(core.expired(times, 7, 4)))
    days = [name for name in kept if name < "07"]
    assert days == [f"{day:02d}-00" for day in range(7)]
    weeks = {datetime.datetime.fromtimestamp(times[name], datetime.UTC).isocalendar()[:2] for name in kept}
    assert len(weeks) == 4
    assert max(NOW - times[name] for name in kept) < 28 * DAY


def test_retention_never_lets_the_only_backup_go() -> None:
    assert core.expired({"old": NOW - 900 * DAY}, 7, 4) == []
    assert core.expired({"old": NOW - 900 * DAY}, 0, 0) == []
    assert core.expired({}, 7, 4) == []


def test_a_gap_does_not_use_up_days() -> None:
    times = {f"{day:03d}": NOW - day * DAY for day in range(100, 110)}
    assert len(set(times) - set(core.expired(times, 7, 4))) >= 7


def test_retention_keeps_what_a_point_is_restored_from() -> None:
    times = {f"{day:02d}": NOW - day * DAY for day in range(60)}
    labelled = NOW - 33.5 * DAY
    assert "34" in core.expired(times, 7, 4)
    expired = core.expired(times, 7, 4, [labelled, NOW - 100 * DAY])
    assert "34" not in expired and {"33", "35", "59"} <= set(expired)
    left = {name: at for name, at in times.items() if name not in expired}
    assert core.choose_base(left, labelled) == "34"


def test_dates_in_the_future_are_named() -> None:
    assert core.from_the_future({"a": NOW, "b": NOW + 299, "c": NOW + 301}, NOW) == ["c"]


POINTS = [
    Point("s1", 100.0, "a", None, "daily"),
    Point("s2", 200.0, "a", "before", "labelled"),
    Point("s3", 300.0, "a", None, "increment"),
]


@pytest.mark.parametrize(
    ("label", "at", "wanted"), [(None, None, "s3"), ("before", None, "s2"), (None, 250.0, "s2"), (None, 300.0, "s3")]
)
def test_the_point_to_restore(label: str | None, at: float | None, wanted: str) -> None:
    assert core.choose(POINTS, label, at).snapshot == wanted


@pytest.mark.parametrize(
    ("label", "at", "says"),
    [("nothing", None, "Labels: before"), (None, 99.0, "The oldest backup is of 1970-01-01T00:01:40Z")],
)
def test_a_point_that_is_not_there(label: str | None, at: float | None, says: str) -> None:
    with pytest.raises(BackupError, match=says):
        core.choose(POINTS, label, at)
    with pytest.raises(BackupError, match="no backup in the repository"):
        core.choose([], label, at)


def test_the_base_ends_before_the_moment_that_is_wanted() -> None:
    bases = {"b1": 100.0, "b2": 200.0}
    assert core.choose_base(bases, None) == "b2"
    assert core.choose_base(bases, 199.9) == "b1"
    with pytest.raises(BackupError, match="No base backup"):
        core.choose_base(bases, 99.0)


def test_points_come_from_restic() -> None:
    snapshots: list[dict[str, Any]] = [
        {
            "id": "ff",
            "time": "2030-01-31T02:00:00.123456789+01:00",
            "hostname": "app1",
            "tags": ["kind=labelled", "label=x=y"],
        },
        {"id": "ee", "time": "2030-01-31T00:30:00Z", "hostname": "app1", "tags": None},
    ]
    first, second = core.points(snapshots)
    assert (first.snapshot, first.kind, first.label) == ("ee", "increment", None)
    assert (second.label, second.kind, core.rfc3339(second.at)) == ("x=y", "labelled", "2030-01-31T01:00:00Z")


@pytest.mark.parametrize("label", ["", "Up", "a b", "../x", "-x", "x" * 49, "a;b", "ä"])
def test_labels_that_are_refused(label: str) -> None:
    with pytest.raises(BackupError):
        core.check_label(label)


def test_times() -> None:
    assert core.parse_time("2030-01-31T02:00:00Z") == core.parse_time("2030-01-31T03:00:00+01:00")
    assert core.parse_time("2030-01-31 02:00:00") == core.parse_time("2030-01-31T02:00:00Z")
    with pytest.raises(BackupError, match="is not a time"):
        core.parse_time("yesterday")


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("Fatal: wrong password or no key found", "wrong password"),
        (
            "error for tree 1a2b:\n  id 12 not found in repository\nLoad(<data/12>) returned error: ciphertext verification failed",
            "damaged repository",
        ),
        ("pack 0bc: not referenced in any index", "damaged repository"),
        ("Pack ID does not match, want 1, got 2", "damaged repository"),
        ('ERROR: pg_verifybackup: error: "base/5/1" is present in the manifest but not on disk', "damaged repository"),
        ('error: "base/5/1" has size 6000 on disk but size 81920 in the manifest', "damaged repository"),
        (
            "EXCEPTION: {'err': \"[Errno 2] No such file or directory: '/x/barman/atlas/wals/0/1'\"}",
            "damaged repository",
        ),
        ("EXCEPTION: {'err': 'Error -3 while decompressing data: invalid block type'}", "damaged repository"),
        ("DETAIL: invalid page in block 0 of relation base/16385/16412", "damaged repository"),
        ("FATAL:  recovery ended before configured recovery target was reached", "damaged repository"),
        ("Fatal: unable to save snapshot: write /x: no space left on device", "full disk"),
        (
            "Fatal: unable to open config file: stat /x/config: no such file\nIs there a repository at the following location?",
            "missing repository",
        ),
        ("ssh: connect to host 192.0.2.1 port 22: Connection timed out", "source cannot be reached"),
        ('FATAL:  password authentication failed for user "x"', "credentials of the source"),
        ("something else", "failed: something else"),
        ("", "failed: no output"),
    ],
)
def test_failures_have_names(output: str, name: str) -> None:
    message = str(core.explain("storing", output))
    assert message.startswith("storing") and name in message


def test_rows_are_compared_with_the_manifest() -> None:
    manifest = {"rows": {"documents": 5, "audit": [3, 4]}}
    assert core.row_faults(manifest, {"documents": 5, "audit": 3, "more": 1}) == []
    assert core.row_faults(manifest, {"documents": 4, "audit": 5}) == [
        "table audit has 5 rows, the manifest says 3 to 4",
        "table documents has 4 rows, the manifest says 5",
    ]
    assert core.row_faults(manifest, {"audit": 4}) == ["table documents is missing"]
    assert core.bounds({"a": 2, "b": 1}, {"a": 1, "c": 1}) == {"a": [1, 2]}


LIMITS = {"backup": 100.0, "drill": 1000.0}


def test_the_report_remembers_the_last_success() -> None:
    report = core.noted({}, LIMITS, "backup", {"ok": True}, 1000)
    report = core.noted(report, LIMITS, "backup", {"ok": False, "message": "full disk"}, 1050)
    assert report["jobs"]["backup"]["succeeded_at"] == 1000
    assert core.problems(report, 1060) == ["backup failed: full disk"]
    report = core.noted(report, LIMITS, "backup", {"ok": True}, 1070)
    assert "message" not in report["jobs"]["backup"]
    assert core.problems(report, 1100) == []
    assert core.problems(report, 1171) == ["backup is overdue: last success 1970-01-01T00:17:50Z"]
    assert core.problems(report, 2001)[1] == "drill is overdue: last success never"
    assert core.problems({}, 1) == ["backups have never reported"]


def test_figures_of_the_last_good_drill_survive_a_bad_one() -> None:
    report = core.noted({}, LIMITS, "drill", {"ok": True, "rpo_seconds": 2.0, "rto_seconds": 9.0}, 1000)
    report = core.noted(report, LIMITS, "drill", {"ok": False, "message": "damaged"}, 1001)
    assert report["jobs"]["drill"]["rpo_seconds"] == 2.0
    shown = core.table(report, 1002)
    assert "failed" in shown and "damaged" in shown and "9.0 s" in shown


# Streams


def stream(*members: tuple[str, bytes, bytes]) -> io.BytesIO:
    """A tar with (name, type, content) members and the end mark."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, content in (*members, ("end-of-stream", tarfile.REGTYPE, b"")):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    out.seek(0)
    return out


def test_what_is_sent_arrives(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"x" * 3_000_000)
    target.mkdir()
    out = io.BytesIO()
    send(out, tree(source, "pgdata"))
    out.seek(0)
    assert receive(out, target, 4_000_000) == ["pgdata/deep/file"]
    assert (target / "pgdata/deep/file").read_bytes() == b"x" * 3_000_000
    assert (target / "pgdata/deep/file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../out", tarfile.REGTYPE),
        ("a/../../out", tarfile.REGTYPE),
        ("/tmp/out", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("link", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("pipe", tarfile.FIFOTYPE),
    ],
)
def test_a_hostile_stream_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    target = tmp_path / "in"
    target.mkdir()
    with pytest.raises(BackupError, match="has no place here|neither file nor directory"):
        receive(stream((name, kind, b"")), target, 1000)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in"]


def test_a_stream_over_the_limit_or_cut_short_is_refused(tmp_path: Path) -> None:
    content = ("a", tarfile.REGTYPE, b"x" * 600), ("b", tarfile.REGTYPE, b"y" * 600)
    (tmp_path / "1").mkdir()
    with pytest.raises(BackupError, match="full disk"):
        receive(stream(*content), tmp_path / "1", 1000)
    whole = stream(*content).getvalue()
    for length in (0, 100, 512, 1024, 1500, 2048):
        directory = tmp_path / f"cut{length}"
        directory.mkdir()
        with pytest.raises(BackupError, match="cut short|damaged"):
            receive(io.BytesIO(whole[:length]), directory, 10_000)


def test_a_time_that_lies_ahead_is_refused() -> None:
    assert core.check_past(1000.0, 1000.0) == 1000.0
    with pytest.raises(
        BackupError, match="1970-01-01T00:16:41Z lies ahead: it is 1970-01-01T00:16:40Z now. Times are in UTC"
    ):
        core.check_past(1001.0, 1000.0)
