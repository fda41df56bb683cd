"""What test_crash runs in a mount namespace: documents are taken in and processed while their disk fills up.

Arguments: a directory, over which a small file system is mounted, and how many documents. The output is what was found.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO

from crash_worker import work_for_ever
from cryptography.fernet import Fernet
from pysqlite3 import dbapi2 as sqlite
from scratch import wait_for
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from atlas import admission, migrations
from atlas.crypto import Keyring
from atlas.db import Database
from atlas.documents import Documents, Submission
from atlas.queue import Queue
from atlas.schema import job_events
from atlas.settings import Settings

TIMES, CLIENTS, WORKERS = 3, 4, 2


def main(directory: str, count: int) -> None:
    # The store needs some 8 kB for a document, and as much for its log.
    size = 8 + count // 40
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", directory], check=True)
    url = f"sqlite:///{directory}/atlas.db"
    database = Database.from_url(url)
    migrations.migrate(database)
    admission.admit(database, 1)
    settings = Settings(environment="development", database_url=url)
    keyring = Keyring([Fernet.generate_key().decode()])
    entry = Documents(database, Queue(database, "test"), keyring, settings)
    context = multiprocessing.get_context("spawn")

    def started(number: int) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work_for_ever, args=(url, None, f"a-{number}", "fenced"), daemon=True)
        process.start()
        return process

    workers = [started(number) for number in range(WORKERS)]
    acknowledged: list[str] = []
    refusals: list[str] = []

    def send(number: int) -> None:
        """Until it is acknowledged."""
        while True:
            try:
                taken = entry.submit(Submission(content=f"{number} " + "word " * 500, content_type="text/plain"))
            except OperationalError as error:
                refusals.append(str(error.orig))
                time.sleep(0.02)
                continue
            acknowledged.append(taken.id)
            return

    def finished() -> dict[str, int]:
        counted = select(job_events.c.document_id, func.count()).where(job_events.c.event == "finished")
        with database.read() as connection:
            return dict(connection.execute(counted.group_by(job_events.c.document_id)).all())

    def fill(file: BinaryIO) -> None:
        """Leave no room, neither on the disk nor in the log: what is written back there frees its space."""
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        with suppress(sqlite.Error), closing(sqlite.connect(f"{directory}/atlas.db", timeout=1)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    times_full = 0
    filler = Path(directory, "filler")
    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = []
        for turn in range(TIMES):
            part = range(count * turn // TIMES, count * (turn + 1) // TIMES)
            sent += [pool.submit(send, number) for number in part[: len(part) // 2]]
            wait_for(lambda: len(acknowledged) > count * turn // TIMES, 60, "documents are taken in")  # noqa: B023
            before = len(refusals)
            with filler.open("wb", buffering=0) as file:
                fill(file)
                sent += [pool.submit(send, number) for number in part[len(part) // 2 :]]

                def is_refused(file: BinaryIO = file, before: int = before) -> bool:
                    fill(file)
                    return len(refusals) > before

                wait_for(is_refused, 60, "a document is refused for want of space")
            workers.pop(0).kill()
            workers.append(started(WORKERS + turn))
            filler.unlink()
            times_full += 1
        for each in sent:
            each.result()
    wait_for(lambda: len(finished()) == count, 60 + count / 10, "every document is finished")
    with database.read() as connection:
        integrity = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
    for worker in workers:
        worker.kill()
        worker.join()
    found = {"acknowledged": acknowledged, "finishes": finished(), "integrity": integrity}
    print(json.dumps(found | {"refusals": refusals, "times_full": times_full}))
    database.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
