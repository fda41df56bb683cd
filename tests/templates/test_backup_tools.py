"""The programs that keep backups, as each Debian has them: what the backup host reads of theirs is what they write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backup_program
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.templates.checks import CODENAMES, Container
from tests.templates.render import render

pytestmark = pytest.mark.timeout(900)  # the first run makes the images

ROOT = "/usr/local/lib/atlas"
HOME = "/var/lib/atlas-backup"
DATABASE = f"""
set -e
useradd --system --create-home --home-dir {HOME} atlas-backup
mkdir -p {HOME}/barman /etc/atlas /tmp/secrets
printf '[atlas]\\nhost=/tmp\\nport=5432\\nuser=atlas_backup\\n' > /tmp/secrets/atlas_pg_service
chown -R atlas-backup {HOME}
bin=$(ls -d /usr/lib/postgresql/*/bin)
install -d -o postgres /tmp/db
cd /tmp
runuser -u postgres -- $bin/initdb -D /tmp/db -A trust --no-sync > /dev/null
runuser -u postgres -- $bin/pg_ctl -D /tmp/db -w -l /tmp/db/log -o "-k /tmp -c listen_addresses= -c fsync=off" start > /dev/null
runuser -u postgres -- psql -h /tmp -XAtqc 'CREATE ROLE atlas_backup SUPERUSER LOGIN REPLICATION'
"""
AS_USER = f"cd {HOME} && runuser -u atlas-backup -- env HOME={HOME} CREDENTIALS_DIRECTORY=/tmp/secrets PGSERVICEFILE=/tmp/secrets/atlas_pg_service"
RECEIVE = f"{AS_USER} setsid barman -c /etc/atlas/barman.conf receive-wal atlas > /tmp/receive.log 2>&1 < /dev/null &"
LOG = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from ansible.module_utils.backup_core import BackupError
from ansible.module_utils.backup_wal import Wal

def verified():
    try:
        return wal.verify_log()
    except BackupError as error:
        return str(error)

wal = Wal({{"address": "here"}}, Path({HOME!r}))
wal.base_backup(at_once=True)
wal.mark()
tended = wal.tend()
noted = json.loads((wal.home / "received.json").read_text())
wals = wal.home / "wals"
catalogue = max(wals.glob("*xlog.db"), key=lambda path: path.stat().st_size)
oldest = min(path for path in wals.glob("*/*") if len(path.name) == 24)
found = {{"catalogue": catalogue.name, "oldest": oldest.name, "bases": len(wal.bases()), "whole": verified(), "tended": tended, "noted": noted}}
data, listed = oldest.read_bytes(), catalogue.read_text()
oldest.write_bytes(data[:2000] + b"XXXX" + data[2004:])
found["flipped"] = verified()
oldest.unlink()
found["missing"] = verified()
oldest.write_bytes(data)
catalogue.write_text("".join(line for line in listed.splitlines(True) if oldest.name not in line))
found["unlisted"] = verified()
wal.barman("building the list anew", "rebuild-xlogdb", "atlas")
found["mended"] = verified()
print(json.dumps(found))
"""
RESTORE = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from ansible.module_utils.backup_host import Backups
from ansible.module_utils.backup_proof import Proof, _ask
from ansible.module_utils.backup_wal import Wal

class Bare(Proof):
    def _release(self, *_):
        return Path("/")

    def _try(self, _, scratch, *given):
        return {{"rows": int(_ask(scratch / "run", "SELECT count(*) FROM rows").output)}}

home = Path({HOME!r})
wal, backups, found = Wal({{"address": "here"}}, home), Backups.__new__(Backups), {{}}
backups.store, backups.wal, backups.proof = "postgresql", wal, Bare(home, 1, "")
wal.sql("CREATE ROLE atlas; CREATE ROLE atlas_a LOGIN IN ROLE atlas; CREATE TABLE rows (number int); INSERT INTO rows VALUES (1)")
time.sleep(1.1)
at = int(time.time())
time.sleep(2.1)
wal.catch_up()
for name, to in (("quiet", {{"time": at, "timeline": 1}}), ("newest", {{}})):
    scratch = home / name
    scratch.mkdir()
    wal.recover(max(wal.bases()), scratch / "pgdata", to)
    found[name] = backups._judge(scratch, {{"deployed": {{}}}}, False, to.get("time"))["rows"]
print(json.dumps(found))
"""
OPENING = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from ansible.module_utils.backup_wal import Wal

home = Path({HOME!r})
wal = Wal({{"address": "here"}}, home)
"""
MISTAKE = f"""{OPENING}
wal.base_backup(at_once=True)
at = int(time.time()) + 1
time.sleep(2.1)
wal.sql("CREATE TABLE mistake AS SELECT generate_series(1, 1500000) AS number")
wal.catch_up()
wal.recover(max(wal.bases()), home / "before", {{"time": at, "timeline": 1}})
for number in range(3):
    last = wal.sql(f"INSERT INTO mistake VALUES ({{number}}) RETURNING pg_walfile_name(pg_current_wal_insert_lsn())")[0]
    wal.sql("SELECT pg_switch_wal()")
while not wal._has(last):
    time.sleep(0.1)
print(json.dumps({{"at": at, "last": last, "whole": sorted(path.name for path in (wal.home / "streaming").glob("?" * 24))}}))
"""
EXCHANGE = f"""
set -e
pkill -u atlas-backup 'barman|pg_receivewal'
bin=$(ls -d /usr/lib/postgresql/*/bin)
cd /tmp
runuser -u postgres -- $bin/pg_ctl -D /tmp/db -w -m fast stop > /dev/null
while pgrep -u atlas-backup -r D,R,S 'barman|pg_receivewal'; do sleep 0.1; done
rm -rf /tmp/db
mv {HOME}/before /tmp/db
sed -i 's|/.*barman_wal/|barman_wal/|' /tmp/db/postgresql.auto.conf
chown -R postgres /tmp/db
chmod 700 /tmp/db
runuser -u postgres -- $bin/pg_ctl -D /tmp/db -w -l /tmp/log -o "-k /tmp -c listen_addresses= -c fsync=off" start > /dev/null || {{ cat /tmp/log; exit 1; }}
"""
TAKE_UP = f"""{OPENING}
wal.restart()
print(json.dumps({{}}))
"""
GO_ON = f"""{OPENING}
wal.base_backup(at_once=True)
mark = wal.mark(10)
wal.recover(min(wal.bases()), home / "after", {{"time": time.time(), "timeline": 1}})
log = home / "after" / "barman_wal"
print(json.dumps({{"timeline": mark["timeline"], "bases": len(wal.bases()), "past": sorted(path.name for path in log.glob("00000001*"))}}))
"""
READ = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from ansible.module_utils import backup_host
from ansible.module_utils.backup_core import BackupError

os.environ["CREDENTIALS_DIRECTORY"] = "/tmp/secrets"
Path("/tmp/secrets/atlas_restic_password").write_text("here")
config = {{"directory": "/tmp/repository", "store": "sqlite", "sources": {{}}, "limits": {{}}, "api_port": 1}}
backups = backup_host.Backups(config)
backups.directory.mkdir()
backups.restic("making it", "init")
Path("/tmp/data").write_bytes(os.urandom(40 << 20))
backups.restic("filling it", "backup", "/tmp/data")
backup_host.PART_BYTES = 16 << 20
found = {{"parts": backups._parts(), "whole": backups.check(), "named": []}}
packs = sorted((backups.directory / "restic" / "data").glob("*/*"))
for pack in packs:
    data = pack.read_bytes()
    pack.chmod(0o600)
    pack.write_bytes(data[:900] + b"XXXX" + data[904:])
    try:
        backups.check()
    except BackupError as error:
        found["named"].append("damaged repository" in str(error))
    pack.write_bytes(data)
found["packs"] = len(packs)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=CODENAMES)
def host(request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container of each Debian release, with the program of the backup host."""
    with Container(request.param, "--network=none") as container:
        files = backup_program.wanted_files("host", Path(ROOT))
        container.write({str(path): text for path, (text, _) in files.items()})
        yield container


def answer(host: Container, before: str, program: str) -> dict[str, Any]:
    """What the Python *program* prints in *host*, run by the shell's *before*."""
    host.write({"/tmp/program.py": program})
    done = host.shell(f"{before} python3 -IB /tmp/program.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_log_is_read_by_the_list_that_barman_keeps(host: Container) -> None:
    """The list has another name on Debian 13."""
    config = render("backup", "barman.conf.j2", host.codename, backup_database_address="here")
    host.write({"/etc/atlas/barman.conf": config})
    for script in (DATABASE, RECEIVE):
        done = host.shell(script)
        assert done.returncode == 0, done.stdout + done.stderr
    found = answer(host, AS_USER, LOG)
    assert found["catalogue"] == {"bookworm": "xlog.db", "trixie": "atlas-xlog.db"}[host.codename]
    assert found["bases"] == 1 and found["whole"] >= 2 and found["mended"] == found["whole"]
    # What the database is asked for is there to be asked for.
    assert found["tended"].keys() == {"rpo_seconds", "behind_bytes"} and list(found["noted"]) == ["1"]
    oldest = found["oldest"]
    assert f"damaged repository ({oldest}" in found["flipped"]
    assert f"damaged repository ({oldest} is missing)" in found["missing"]
    assert f"damaged repository ({oldest} is not in Barman's list." in found["unlisted"]
    # A moment after the last commit is the end of the log.
    assert answer(host, AS_USER, RESTORE) == {"quiet": 1, "newest": 1}


def test_the_log_goes_on_after_a_restore_to_before_much_of_it(host: Container) -> None:
    """The receiver would go on behind the last whole segment that it finds, where the restored database has not come to yet."""
    before = answer(host, AS_USER, MISTAKE)
    assert before["whole"], "nothing whole was waiting to be put in order"
    done = host.shell(EXCHANGE)
    assert done.returncode == 0, done.stdout + done.stderr
    answer(host, AS_USER, TAKE_UP)
    assert host.shell(RECEIVE).returncode == 0
    after = answer(host, AS_USER, GO_ON)
    assert after["timeline"] == 2 and after["bases"] == 3
    assert before["last"] in after["past"], "whoever restored to the wrong moment wants the rest of that past"


def test_the_parts_that_restic_reads_are_together_all_of_the_repository(host: Container) -> None:
    """Whichever of its files is damaged, one of them names it."""
    found = answer(host, "mkdir -p /tmp/secrets &&", READ)
    assert len(found["parts"]) > 2 and found["whole"] == {"backups": 1}
    assert found["packs"] > 2 and found["named"] == [True] * found["packs"]
