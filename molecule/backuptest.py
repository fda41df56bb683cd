"""What the checks of backups share: documents to lose, the backup program, and ways to hurt a repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from labtest import Lab

REPOSITORY = "/var/lib/atlas-backup"


def ingest(lab: Lab, names: list[str]) -> dict[str, str]:
    """Take in one document for each name, each with a private note; returns id → text of what was acknowledged."""
    taken = {}
    for name in names:
        text = f"The lighthouse keeper writes down every passing vessel before breakfast, entry {name}"
        body = {"content": text, "content_type": "text/plain", "sensitive": {"notes": f"note of {name}"}}
        answer = lab.http("POST", "/v1/documents", body)
        assert answer.status == 202, answer
        taken[answer.body["id"]] = text
    return taken


def processed(lab: Lab, documents: dict[str, str], wait_for: Callable[..., Any]) -> None:
    """Wait until every one of *documents* is processed exactly once, with its text."""

    def look() -> bool:
        found = {name: lab.http("GET", f"/v1/documents/{name}").body for name in documents}
        return all(
            isinstance(body, dict)
            and body.get("status") == "processed"
            and body["text"] == documents[name]
            and body["applied"] == 1
            for name, body in found.items()
        )

    wait_for(look, 60, f"{len(documents)} documents are there, whole, and applied once")


def gone(lab: Lab, documents: dict[str, str]) -> list[str]:
    """Those of *documents* that are not there."""
    return [name for name in documents if lab.http("GET", f"/v1/documents/{name}").status == 404]


def run(lab: Lab, host: str, *arguments: str) -> tuple[int, Any]:
    """Run ``atlas-backup`` on *host*: status, and its JSON or what it said."""
    done = lab.ssh(host, f"atlas-backup {' '.join(arguments)}", timeout=300)
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


def fails(lab: Lab, host: str, job: str, name: str) -> str:
    """Run *job*, which has to fail and to name its cause *name*, there and in /health; returns what it said."""
    status, said = run(lab, host, job)
    assert status == 1, said
    assert name in said, said
    reported = {"daily": "backup"}.get(job, job)
    health = lab.http("GET", "/health").body
    assert health["status"] == "degraded", health["backup"]
    assert any(line.startswith(f"{reported} failed") and name in line for line in health["backup"]["problems"]), health[
        "backup"
    ]
    return str(said)


def points(lab: Lab, host: str) -> list[str]:
    """The snapshots in the repository."""
    status, found = run(lab, host, "points")
    assert status == 0, found
    return [point["snapshot"] for point in found]


def replace_credential(lab: Lab, host: str, name: str, value: str) -> None:
    """Encrypt another *value* for the backup program of *host*, keeping the right one aside."""
    lab.ssh(
        host,
        f"cd /etc/atlas/backup-credentials && cp -a {name} /root/{name}.kept"
        f" && printf %s '{value}' | systemd-creds encrypt --name=atlas_{name} - - > /root/{name}.new && cat /root/{name}.new > {name}",
    )


def return_credential(lab: Lab, host: str, name: str) -> None:
    """Put the right one back."""
    lab.ssh(host, f"mv /root/{name}.kept /etc/atlas/backup-credentials/{name}")
