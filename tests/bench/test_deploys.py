"""What the bench of deploys counts and prints, without hosts; the plain role is valid Ansible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.deploys import MANY, Row, gates, table, waits

PROJECT = Path(__file__).resolve().parents[2]


def test_waits_are_those_of_the_gates() -> None:
    settings = {
        "deploy_minimum_healthy_seconds": 3,
        "deploy_minimum_capacity": 60,
        "deploy_canary_steps": [{"seconds": 4, "percent": 5}, {"seconds": 5, "percent": 100}],
    }
    assert waits(rolling=True, hosts=6, settings=settings) == 4 * 3 + 9 + 1, "the first, and then two at a time"
    assert waits(rolling=False, hosts=6, settings=settings) == 3 + 9 + 1


def test_the_gates_of_the_bench_are_on() -> None:
    found = gates()
    assert found["deploy_minimum_healthy_seconds"] >= 1
    assert len(found["deploy_canary_steps"]) >= 2
    assert all(step["seconds"] >= 1 for step in found["deploy_canary_steps"])


def test_a_missed_target_shows() -> None:
    rows = [Row("a", 1.0, "s", 2.0), Row("b", 3.0, "s", 2.0, "slow"), Row("c", 5.0, "ms")]
    assert [row.met for row in rows] == [True, False, None]
    text = table(rows).splitlines()
    assert "met" in text[1] and "MISSED" in text[2] and "slow" in text[2]
    assert "≤" not in text[3]


def test_the_fleet_is_what_the_bench_says() -> None:
    hosts = yaml.safe_load((PROJECT / "tests/bench/fleet/hosts.yml").read_text())
    assert len(hosts["all"]["children"]["app"]["hosts"]) == MANY
    assert (PROJECT / "tests/bench/fleet/group_vars/app/main.yml").exists()


def test_the_plain_role_is_valid() -> None:
    done = subprocess.run(
        ["ansible-playbook", "-i", "app,", "--syntax-check", "tests/bench/plain.yml"],
        cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
