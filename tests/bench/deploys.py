"""The speed of deploys, beside a plain role on the same hosts in one run: make bench-deploy. See docs/proof.md.

Owns the lab test-bench, which it raises and removes. Gates are on throughout; what they wait on purpose is counted apart.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "molecule"))

import ansible.module_utils
import yaml
from labtest import PROJECT, SERVICES, Lab, slot_in_service
from prooftest import Step, archive, play, roll_back

from tests.load.witness import Witness

ansible.module_utils.__path__.append(str(PROJECT / "plugins" / "module_utils"))

from ansible.module_utils.deploy_plan import batch  # noqa: E402

LAB = "test-bench"
CACHE = PROJECT / ".cache" / "bench-plain"
FEW, MANY = 2, 6
PROBE_SECONDS = 1
"""For so long every edge is asked for the new release before a deploy is finished (roles/deploy/tasks/verify.yml)."""


class Row(NamedTuple):
    """One line of the table: *figure* and *target* in *unit*; a target of None is only reported."""

    what: str
    figure: float
    unit: str
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.figure <= self.target


def gates() -> dict[str, Any]:
    """Return the gates of the bench's fleet: staging's own, and the role's defaults."""
    found: dict[str, Any] = {}
    for name in ("roles/deploy/defaults/main.yml", "inventories/staging/group_vars/all/main.yml"):
        found |= yaml.safe_load((PROJECT / name).read_text())
    return found


def waits(rolling: bool, hosts: int, settings: Mapping[str, Any]) -> float:
    """Return the seconds that a deploy waits on purpose: for services to stay healthy, and while it watches and asks them in traffic.

    A rolling deploy waits for health on the first host and then on each batch of the others, a blue/green one on all at once.
    """
    at_once = batch(hosts, {"capacity_percent": settings["deploy_minimum_capacity"]})
    times = 1 + math.ceil((hosts - 1) / at_once) if rolling else 1
    return float(
        times * settings["deploy_minimum_healthy_seconds"]
        + sum(s["seconds"] for s in settings["deploy_canary_steps"])
        + PROBE_SECONDS
    )


def table(rows: Sequence[Row]) -> str:
    """Return *rows* for people."""
    words = {None: "", True: "met", False: "MISSED"}
    lines = [("", "figure", "target", "", "")] + [
        (
            row.what,
            f"{row.figure:.2f} {row.unit}",
            "" if row.target is None else f"≤ {row.target:.2f} {row.unit}",
            words[row.met],
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def run(*argv: str, timeout: float = 1800) -> float:
    """Run a command of the checkout; return its seconds. It has to end well."""
    began = time.monotonic()
    env = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    done = subprocess.run(argv, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return time.monotonic() - began


def plain_archive() -> Path:
    """Return what the plain role deploys: the sources of the service and the wheels of its dependencies."""
    CACHE.mkdir(parents=True, exist_ok=True)
    wheels, lock = CACHE / "wheels", PROJECT / "app" / "requirements.lock"
    stamp = CACHE / "requirements.lock"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        shutil.rmtree(wheels, ignore_errors=True)
        run(
            sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--only-binary", ":all:", "--no-deps",
            "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64",
            "--dest", str(wheels), "--requirement", str(lock),
        )  # fmt: skip
        stamp.write_bytes(lock.read_bytes())
    target = CACHE / "plain.tar.gz"
    with tarfile.open(target, "w:gz", compresslevel=1) as tar:
        tar.add(PROJECT / "app" / "src", "src", filter=lambda item: None if "__pycache__" in item.name else item)
        tar.add(lock, "requirements.lock")
        tar.add(wheels, "wheels")
    return target


class Bench:
    """The measurements, in the order in which one leads to the next."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.lab = Lab.open(LAB)
        self.rows: list[Row] = []
        self.releases = 0

    def add(self, what: str, figure: float, unit: str = "s", target: float | None = None, note: str = "") -> None:
        """Add a line to the table, and say it at once."""
        self.rows.append(Row(what, figure, unit, target, note))
        print(table(self.rows[-1:]).splitlines()[1], flush=True)

    def deploy(self, strategy: str, hosts: int) -> Step:
        """Deploy a release that no host has yet to the first *hosts* app hosts."""
        self.releases += 1
        names = self.lab.group("app")[:hosts]
        settings = {
            "deploy_strategy": strategy,
            "deploy_hosts": names,
            "release": str(archive(f"good_{self.releases}")),
        }
        limit = [] if hosts == MANY else ["--limit", ",".join(["edge", "database", *names])]
        return play(self.lab, "deploy", "-e", json.dumps(settings), *limit).succeeded()

    def median(self, strategy: str, hosts: int) -> tuple[float, list[Step]]:
        """Return the median wall time of such deploys, and all of them."""
        steps = [self.deploy(strategy, hosts) for _ in range(self.repeats)]
        return statistics.median(step.ended - step.began for step in steps), steps

    # The parts

    def few_hosts(self) -> dict[str, float]:
        """Return strategy → seconds of a deploy to FEW hosts."""
        self.deploy("rolling", FEW)
        return {strategy: self.median(strategy, FEW)[0] for strategy in ("rolling", "blue_green")}

    def plain(self) -> float:
        """Return the seconds of a plain deploy to MANY hosts."""
        slot = slot_in_service(self.lab, self.lab.group("app")[0])
        variables = {
            "plain_archive": str(plain_archive()),
            "plain_settings_slot": slot,
            "plain_slot": "green" if slot == "blue" else "blue",
        }

        def play_plain(tag: str, number: int = 0) -> float:
            extra = json.dumps(variables | {"plain_release": f"{number:03}"})
            return run(
                "ansible-playbook", "-i", str(self.lab.inventory), "tests/bench/plain.yml", "-e", extra, "--tags", tag
            )  # fmt: skip

        self._idle("stop")
        play_plain("prepare")
        play_plain("deploy")
        taken = statistics.median(play_plain("deploy", 1 + number) for number in range(self.repeats))
        play_plain("remove")
        self.add(f"a plain role, {MANY} hosts one by one", taken, note="upload, unpack, venv, link, restart, health")
        return taken

    def many_hosts(self, plain: float, few: dict[str, float]) -> None:
        """Both strategies on MANY hosts, against the plain role, and what each further host costs."""
        for strategy, share, each in (("rolling", 3, 2.5), ("blue_green", 4, 1.5)):
            rolling = strategy == "rolling"
            taken, steps = self.median(strategy, MANY)
            waited = waits(rolling, MANY, gates())
            self.add(
                f"{strategy}, {MANY} hosts",
                taken - waited,
                target=plain / share,
                note=f"and {waited:.0f} s of gates that wait",
            )
            self.add(f"{strategy} / the plain role", (taken - waited) / plain, "", 1 / share, "without waits")
            further = (taken - waited - few[strategy] + waits(rolling, FEW, gates())) / (MANY - FEW)
            self.add(f"{strategy}, each further host", further, target=each, note="without waits")
        switches = [one["switches"] for one in map(self._report, steps)]
        self.add("the switch on an edge", max(each["milliseconds"] for one in switches for each in one), "ms", 10)
        skews = [1000 * (max(each["at"] for each in one) - min(each["at"] for each in one)) for one in switches]
        self.add("between the edges", statistics.median(skews), "ms")

    def floor(self) -> None:
        """What systemd needs to start the four services, without any tool."""
        for hosts, what in ((1, "one host"), (MANY, f"{MANY} hosts at once")):
            self._idle("stop")
            self.add(f"floor: systemctl start, {what}", self._idle("start", hosts))
        self._idle("stop")

    def rollbacks(self) -> None:
        """From the command to traffic: the old slot warm, cold, and host by host."""
        self.deploy("blue_green", MANY)
        self.add("rollback, slot warm", self._rollback(), target=5, note="from command to traffic")
        self.deploy("blue_green", MANY)
        self._idle("stop")
        self.add("rollback, slot cold", self._rollback(), note="from command to traffic")
        self.deploy("rolling", MANY)
        step = roll_back(self.lab).succeeded()
        self.add("rollback of a rolling deploy", step.ended - step.began, note="to the end of the command")

    def converged(self) -> None:
        """What a second run costs."""
        self.add(
            f"site.yml, converged, {MANY} hosts",
            run("ansible-playbook", "-i", str(self.lab.inventory), "playbooks/site.yml"),
            target=60,
        )
        self.deploy("rolling", MANY)
        settings = json.dumps({"release": str(archive(f"good_{self.releases}"))})
        step = play(self.lab, "deploy", "-e", settings).succeeded()
        self.add("deploy with nothing to do", step.ended - step.began, target=10)

    # What they need

    def _report(self, step: Step) -> dict[str, Any]:
        """Return the report that a deploy wrote."""
        name = next(line.split()[1] for line in step.output.splitlines() if line.startswith("report: "))
        found: dict[str, Any] = json.loads((PROJECT / name).with_suffix(".json").read_text())
        return found

    def _idle(self, action: str, hosts: int = MANY) -> float:
        """Start or stop the services of the idle slot; return the seconds until all hosts have."""
        names = self.lab.group("app")[:hosts]
        slot = "green" if slot_in_service(self.lab, names[0]) == "blue" else "blue"
        command = f"systemctl {action} {' '.join(f'atlas-{service}@{slot}.service' for service in SERVICES)}"
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            done = list(pool.map(lambda name: self.lab.ssh(name, command), names))
        assert action == "stop" or all(one.returncode == 0 for one in done), [one.stderr for one in done]
        return time.monotonic() - began

    def _rollback(self) -> float:
        """Return the seconds from the command to the switch of the last edge, as seen from beside HAProxy."""
        witnesses = [Witness(lambda script, edge=edge: self.lab.start(edge, script)) for edge in self.lab.group("edge")]  # type: ignore[misc]
        # Where the slot is cold, its own strategy would be that of the inventory: host by host.
        step = roll_back(self.lab, "-e", "deploy_strategy=blue_green").succeeded()
        for witness in witnesses:
            witness.stop()
        return max(witness.switches[-1][0] for witness in witnesses) - step.began


def main() -> int:
    """Run the bench; a missed target is told, and fails nothing."""
    parser = argparse.ArgumentParser(prog="make bench-deploy", description=__doc__)
    parser.add_argument(
        "--size", choices=["small", "full"], default="full", help="small: each deploy once; full: medians of three"
    )
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--keep", action="store_true", help="leave the lab as it is afterwards")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    try:
        run(
            "ansible-playbook", "-i", "localhost,", "playbooks/lab.yml", "-e", f"lab_name={LAB}",
            "-e", f"lab_inventories={PROJECT / 'tests' / 'bench'}", "-e", "lab_environment=fleet",
        )  # fmt: skip
        run("ansible-playbook", "-i", f".lab/{LAB}/inventory", "playbooks/site.yml")
        bench = Bench(1 if options.size == "small" else 3)
        few = bench.few_hosts()
        bench.deploy("rolling", MANY)
        bench.many_hosts(bench.plain(), few)
        bench.floor()
        bench.rollbacks()
        bench.converged()
    finally:
        if not options.keep:
            run("ansible-playbook", "-i", "localhost,", "playbooks/lab_down.yml", "-e", f"lab_name={LAB}")
    print(f"\n{table(bench.rows)}\n{os.cpu_count()} processors for all hosts together; load before: {load:.1f}")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() | {"met": row.met} for row in bench.rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
