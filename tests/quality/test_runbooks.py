"""Every alarm has its page: what checks, doctor, /health and the backup host find; each page says how to look and how to mend."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible.module_utils import backup_core, ops_runbook

PROJECT = Path(__file__).resolve().parents[2]
RUNBOOKS = PROJECT / "docs/runbooks"
PAGES = sorted(path.stem for path in RUNBOOKS.glob("*.md") if path.stem != "README")
SERVICE = PROJECT / "app/src/atlas"

each_page = pytest.mark.parametrize("name", PAGES)


@each_page
def test_page_has_a_title_and_commands_and_is_in_the_index(name: str) -> None:
    page, index = (RUNBOOKS / f"{name}.md").read_text(), (RUNBOOKS / "README.md").read_text()
    assert re.match(r"# \S.*\n", page)
    assert "`" in page, "no command"
    assert f"]({name}.md)" in index
    if name in ops_runbook.KINDS and "**Look**" in page:
        assert page.index("**Look**") < page.index("**Mend**")


@each_page
def test_playbooks_and_pages_that_are_named_exist(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text()
    for playbook in re.findall(r"playbooks/([\w*]+\.yml)", page):
        assert list((PROJECT / "playbooks").glob(playbook)), playbook
    for link in re.findall(r"\]\(([^)#]+\.md)", page):
        assert (RUNBOOKS / link).is_file(), link


def test_every_finding_has_its_page() -> None:
    assert sorted(ops_runbook.KINDS.keys() - set(PAGES)) == []
    assert {
        *ops_runbook.DOCTOR.values(),
        *ops_runbook.HEALTH.values(),
        *ops_runbook.BACKUP_JOBS.values(),
    } <= ops_runbook.KINDS.keys()


def test_whatever_doctor_finds_has_its_kind() -> None:
    source = (SERVICE / "doctor.py").read_text()
    checks = set(re.findall(r"""(?:_error|_warning|Finding)\(\s*"([a-z-]+)",""", source))
    assert len(checks) > 15, "the pattern finds nothing any more"
    assert checks == ops_runbook.DOCTOR.keys()


def test_whatever_health_checks_has_its_kind() -> None:
    source = (SERVICE / "api/health.py").read_text()
    literal = re.search(r"results = \{(.*?)\} \| shared", source)
    assert literal
    checks = {*re.findall(r'"(\w+)": "ok"', literal[1]), *re.findall(r'results\["(\w+)"\] =', source)}
    assert checks == ops_runbook.HEALTH.keys()


def test_every_job_of_the_backup_host_has_its_kind() -> None:
    source = (PROJECT / "plugins/module_utils/backup_host.py").read_text()
    jobs = re.search(r"^JOBS = \{(.*)\}$", source, re.MULTILINE)
    assert jobs
    assert set(re.findall(r': "(\w+)"', jobs[1])) == ops_runbook.BACKUP_JOBS.keys()
    report = backup_core.noted({}, {"drill": 1.0}, "drill", {"ok": False, "message": "no"}, 5.0)
    assert backup_core.problems(report, 6.0)[0].split()[0] in ops_runbook.BACKUP_JOBS


def test_every_metric_in_the_index_is_documented() -> None:
    named = set(re.findall(r"`(atlas_\w+)", (RUNBOOKS / "README.md").read_text()))
    described = (PROJECT / "docs/monitoring.md").read_text() + (SERVICE / "backups.py").read_text()
    assert named and all(name in described for name in named)
