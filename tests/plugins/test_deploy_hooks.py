"""Hooks of a deploy: what is wrong with them, when they are due, what commands and webhooks are told, and what their failure does."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deploy_hooks as module
import pytest
from ansible.module_utils import deploy_hooks


class ExitError(Exception):
    """How the module ended: its result."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(str(result))
        self.result = result


# What is wrong with them


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("announce", "must be a list of hooks"),
        ([{"name": "a", True: ["failed"], "command": ["x"]}], "unknown key True"),
        ([{"events": ["failed"], "command": ["x"]}], "entry 1: lacks a name"),
        ([{"name": "a", "command": ["x"]}], "lacks events"),
        (
            [{"name": "a", "events": ["after_everything"], "command": ["x"]}],
            "unknown event after_everything; known are",
        ),
        ([{"name": "a", "events": ["failed"]}], "needs either command or url"),
        ([{"name": "a", "events": ["failed"], "command": ["x"], "url": "https://x"}], "needs either command or url"),
        ([{"name": "a", "events": ["failed"], "command": "rm -r"}], "not a list of strings"),
        ([{"name": "a", "events": ["failed"], "url": "ftp://x"}], "neither https:// nor http://"),
        ([{"name": "a", "events": ["failed"], "command": ["x"], "headers": {"a": "b"}}], "belong to a url"),
        ([{"name": "a", "events": ["failed"], "command": ["x"], "seconds": 0}], "not a number above 0"),
        ([{"name": "a", "events": ["failed"], "command": ["x"], "optional": "maybe"}], "neither true nor false"),
        ([{"name": "a", "events": ["failed"], "command": ["x"]}] * 2, "two hooks named 'a'"),
    ],
)
def test_what_is_wrong_with_a_hook_is_said_before_anything_is_touched(wrong: Any, said: str) -> None:
    assert any(said in finding for finding in deploy_hooks.findings(wrong)), deploy_hooks.findings(wrong)


def test_a_hook_that_is_right_is_no_finding() -> None:
    url = {"name": "b", "events": ["failed", "after_finish"], "url": "https://x", "headers": {"A": "b"}, "seconds": 1.5}
    assert deploy_hooks.findings([{"name": "a", "events": ["before_lock"], "command": ["x", "y"]}, url]) == []


@pytest.mark.parametrize(
    ("event", "phase"),
    [("before_switch", "switch"), ("after_stage", "stage"), ("before_finish", "verify"), ("after_verify", "verify")],
)
def test_a_hook_that_fails_before_the_end_fails_a_phase_that_can_be_undone(event: str, phase: str) -> None:
    assert deploy_hooks.phase(event) == phase


# What they are told, and what their failure does


class Ear(http.server.BaseHTTPRequestHandler):
    """Answers by the path, and remembers what it was sent."""

    heard: list[tuple[str, dict[str, str], Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append((self.path, dict(self.headers), body))
        self.send_response(int(self.path.strip("/")))
        self.send_header("Location", "/200")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def ear() -> Iterator[str]:
    Ear.heard.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), Ear) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(
    monkeypatch: pytest.MonkeyPatch, directory: Path, events: list[str], *hooks: dict[str, Any], check: bool = False
) -> dict[str, Any]:
    """Run the module and return its result."""
    filled = {"command": None, "url": None, "headers": None, "seconds": 5.0, "optional": False}

    class Module:
        def __init__(self, **_: Any) -> None:
            told = {"environment": "staging", "deploy": "d1", "release": "1.0-ab", "deployment": 7}
            self.params = {
                "hooks": [filled | hook for hook in hooks],
                "events": events,
                "told": told,
                "directory": str(directory),
            }
            self.check_mode = check

        def exit_json(self, **result: Any) -> None:
            raise ExitError(result)

        def fail_json(self, **result: Any) -> None:
            raise ExitError(result | {"failed": True})

    monkeypatch.setattr(module, "AnsibleModule", Module)
    with pytest.raises(ExitError) as ended:
        module.main()
    return ended.value.result


def test_a_command_gets_what_goes_on_as_json_and_in_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = {
        "name": "note",
        "events": ["before_switch"],
        "command": ["sh", "-c", "cat >told; echo $ATLAS_RELEASE $ATLAS_EVENT >known"],
    }
    result = run(monkeypatch, tmp_path, ["after_migrate", "before_switch"], hook)
    assert result == {"changed": False, "ran": ["note (before_switch)"], "troubles": []}
    told = json.loads((tmp_path / "told").read_text())
    assert (told["event"], told["environment"], told["deployment"]) == ("before_switch", "staging", 7)
    assert (tmp_path / "known").read_text() == "1.0-ab before_switch\n"


def test_a_webhook_gets_it_as_the_body_of_a_post(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ear: str) -> None:
    hook = {"name": "chat", "events": ["after_finish"], "url": f"{ear}/204", "headers": {"X-Key": "example"}}
    assert run(monkeypatch, tmp_path, ["after_finish"], hook)["troubles"] == []
    [(_, headers, body)] = Ear.heard
    assert headers["X-Key"] == "example" and headers["Content-Type"] == "application/json"
    assert body["event"] == "after_finish" and body["release"] == "1.0-ab"


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ({"command": ["sh", "-c", "echo no approval; exit 3"]}, "it ended with 3"),
        ({"command": ["sh", "-c", "echo no approval; exec sleep 30"], "seconds": 0.5}, "it did not end within 0.5 s"),
    ],
)
def test_a_command_that_fails_stops_the_deploy_and_shows_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hook: dict[str, Any], said: str
) -> None:
    result = run(monkeypatch, tmp_path, ["before_switch"], {"name": "gate", "events": ["before_switch"]} | hook)
    assert result["failed"] and result["msg"] == f"hook gate (before_switch): {said}."
    assert (result["phase"], result["log"]) == ("switch", ["no approval"])


@pytest.mark.parametrize(("path", "said"), [("500", "it answered 500"), ("302", "it answered 302")])
def test_a_webhook_without_success_fails_and_its_url_is_not_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ear: str, path: str, said: str
) -> None:
    result = run(
        monkeypatch, tmp_path, ["before_stage"], {"name": "chat", "events": ["before_stage"], "url": f"{ear}/{path}"}
    )
    assert result["failed"] and said in result["msg"] and ear not in str(result)
    assert len(Ear.heard) == 1, "a redirect is not followed"


def test_one_that_is_missing_or_away_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = run(
        monkeypatch, tmp_path, ["before_lock"], {"name": "gone", "events": ["before_lock"], "command": ["./no-such"]}
    )
    assert "hook gone (before_lock): ./no-such: No such file" in missing["msg"]
    away = run(
        monkeypatch,
        tmp_path,
        ["before_lock"],
        {"name": "away", "events": ["before_lock"], "url": "http://127.0.0.1:9/x"},
    )
    assert "it cannot be reached" in away["msg"]


def test_an_optional_one_and_one_that_comes_too_late_are_told_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = {"name": "bad", "events": ["before_switch", "after_finish"], "command": ["false"]}
    good = {"name": "good", "events": ["before_switch", "after_finish"], "command": ["touch", "there"]}
    result = run(monkeypatch, tmp_path, ["before_switch"], bad | {"optional": True}, good)
    assert result["troubles"] == ["hook bad (before_switch): it ended with 1"] and (tmp_path / "there").exists()
    assert run(monkeypatch, tmp_path, ["after_finish"], bad)["troubles"] == ["hook bad (after_finish): it ended with 1"]


def test_a_check_runs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hook = {"name": "touch", "events": ["before_lock"], "command": ["touch", "there"]}
    assert run(monkeypatch, tmp_path, ["before_lock"], hook, check=True)["ran"] == ["touch (before_lock)"]
    assert not (tmp_path / "there").exists()
