"""nftables_ruleset on a real kernel firewall, in a network namespace of its own, with both Debians' nft."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.templates.checks import CODENAMES, Container
from tests.templates.render import PROJECT, render

pytestmark = pytest.mark.timeout(900)  # the first run makes the images

# Stands in for systemd, which does not run in these containers: --on-active=Ns … COMMAND.
SYSTEMD_RUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
  case "$1" in --on-active=*) seconds=${1#--on-active=};; esac
  shift
done
(sleep "${seconds%s}"; exec "$@") </dev/null >/dev/null 2>&1 &
echo $! > /run/return.pid
"""
SYSTEMCTL = """#!/bin/sh
case "$1 $2" in
stop*) kill $(cat /run/return.pid) 2>/dev/null;;
"enable --quiet") touch "/run/at-boot-$3";;
is-enabled*) test -e "/run/at-boot-$2";;
esac
"""


@pytest.fixture(scope="module", params=CODENAMES)
def host(request: pytest.FixtureRequest) -> Iterator[Container]:
    with Container(request.param, "--privileged", "--network=none") as container:
        core = (PROJECT / "plugins/module_utils/nftables_ruleset.py").read_text()
        container.write({"/srv/check/nftables_ruleset.py": core})
        container.write({"/usr/local/bin/systemd-run": SYSTEMD_RUN, "/usr/local/bin/systemctl": SYSTEMCTL})
        yield container


def ruleset(host: Container, port: int) -> str:
    opening = {"name": "http", "ports": [port], "sources": ["any"]}
    return render("base", "nftables.conf.j2", host.codename, base_firewall_openings=[opening])


def call(host: Container, function: str, text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys, nftables_ruleset as n; print(n.{}(sys.stdin.read(), *{!r}))"
    return host.shell(f"cd /srv/check && python3 -c '{program.format(function, arguments)}'", text)


def live(host: Container) -> str:
    return host.shell("nft --stateless list ruleset").stdout


def boot_file(host: Container) -> str:
    return host.shell("cat /etc/nftables.conf").stdout


def test_confirmed_stays_and_boots(host: Container) -> None:
    text = ruleset(host, 80)
    expected = call(host, "expected", text).stdout.rstrip("\n")
    assert "dport 80 accept" in expected and live(host).strip() != expected
    assert call(host, "apply", text, 3).returncode == 0
    assert live(host).strip() == expected
    assert call(host, "confirm", text).returncode == 0
    assert boot_file(host) == text
    time.sleep(4)  # longer than the return would have taken
    assert live(host).strip() == expected


def test_unconfirmed_returns_by_itself(host: Container) -> None:
    good, bad = ruleset(host, 80), ruleset(host, 81)
    assert call(host, "apply", good, 60).returncode == 0
    assert call(host, "confirm", good).returncode == 0
    before = live(host)
    assert call(host, "apply", bad, 5).returncode == 0
    assert "dport 81 accept" in live(host)
    deadline = time.monotonic() + 30
    while live(host) != before:
        assert time.monotonic() < deadline, "the previous firewall did not come back"
        time.sleep(0.1)
    late = call(host, "confirm", bad)
    assert late.returncode != 0 and "base_ssh_sources" in late.stderr
    assert boot_file(host) == good


def test_an_invalid_ruleset_changes_nothing(host: Container) -> None:
    before = live(host)
    broken = call(host, "expected", ruleset(host, 80).replace("policy drop", "policy refuse"))
    assert broken.returncode != 0 and "the ruleset is not valid" in broken.stderr
    assert live(host) == before


def test_a_rule_added_by_hand_is_a_difference(host: Container) -> None:
    text = ruleset(host, 80)
    assert call(host, "apply", text, 60).returncode == 0
    assert call(host, "confirm", text).returncode == 0
    expected = call(host, "expected", text).stdout.strip()
    assert live(host).strip() == expected
    host.shell("nft add rule inet filter input tcp dport 4444 accept")
    assert live(host).strip() != expected


def test_a_firewall_that_was_put_right_stays_although_the_boot_file_was_right_all_the_time(host: Container) -> None:
    text = ruleset(host, 80)
    assert call(host, "apply", text, 60).returncode == 0
    assert call(host, "confirm", text).returncode == 0
    assert call(host, "compared", text).stdout.strip().endswith("False)")
    host.shell("nft add table inet planted")
    assert call(host, "apply", text, 60).returncode == 0
    assert call(host, "compared", text).stdout.strip().endswith("True)"), "nobody would confirm it"
    assert call(host, "confirm", text).returncode == 0
    assert call(host, "compared", text).stdout.strip().endswith("False)")
    # Of a process that nobody has collected yet only the number is left.
    waits = host.shell("cat /proc/$(cat /run/return.pid)/cmdline").stdout
    assert waits == "", "what was planted would come back"
    assert "planted" not in live(host)


def test_a_firewall_that_boot_would_not_load_is_a_difference(host: Container) -> None:
    text = ruleset(host, 80)
    assert call(host, "apply", text, 60).returncode == 0
    assert call(host, "confirm", text).returncode == 0
    assert call(host, "compared", text).stdout.strip().endswith("False)")
    host.shell("rm /run/at-boot-nftables.service")
    assert call(host, "compared", text).stdout.strip().endswith("True)")
    assert call(host, "apply", text, 60).returncode == 0
    assert call(host, "confirm", text).returncode == 0
    assert call(host, "compared", text).stdout.strip().endswith("False)")


def test_a_return_that_is_faster_than_the_confirmation_is_noticed(host: Container) -> None:
    good, other = ruleset(host, 80), ruleset(host, 82)
    assert call(host, "apply", good, 60).returncode == 0
    assert call(host, "confirm", good).returncode == 0
    assert call(host, "apply", other, 60).returncode == 0
    # The timer elapses while it is cancelled.
    racing = '#!/bin/sh\nif [ "$1" = stop ]; then nft --file /run/atlas-firewall/previous.nft; fi\n'
    host.write({"/usr/local/bin/systemctl": racing})
    late = call(host, "confirm", other)
    host.write({"/usr/local/bin/systemctl": SYSTEMCTL})
    assert late.returncode != 0 and "has returned to the previous one" in late.stderr
    assert boot_file(host) == good
    assert call(host, "apply", good, 60).returncode == 0
    assert call(host, "confirm", good).returncode == 0
