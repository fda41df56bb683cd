"""Edge hosts: HAProxy, its map and its backends."""

from __future__ import annotations

from labtest import Lab, slot_in_service


def test_haproxy_runs_and_its_configuration_is_valid(lab: Lab) -> None:
    for host in lab.group("edge"):
        assert lab.ssh(host, "systemctl is-active haproxy").stdout.strip() == "active", host
        assert lab.ssh(host, "haproxy -c -q -f /etc/haproxy/haproxy.cfg").returncode == 0, host


def test_the_map_in_file_and_at_run_time_names_the_slot_in_service(lab: Lab) -> None:
    slots = {slot_in_service(lab, host) for host in lab.group("app")}
    assert len(slots) == 1
    expected = f"be_{slots.pop()}"
    for host in lab.group("edge"):
        assert lab.ssh(host, "cat /etc/haproxy/slot.map").stdout.split()[-2:] == ["active", expected], host
        show = "echo 'show map /etc/haproxy/slot.map' | socat - /run/haproxy/admin.sock"
        python = (
            "#python\nimport socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('/run/haproxy/admin.sock')\n"
            "s.sendall(b'show map /etc/haproxy/slot.map\\n')\nprint(s.makefile().read())\n"
        )
        assert lab.ssh(host, python).stdout.split()[-2:] == ["active", expected], (host, show)


def test_the_runtime_socket_is_not_for_everyone(lab: Lab) -> None:
    for host in lab.group("edge"):
        assert lab.ssh(host, "stat -c %a /run/haproxy/admin.sock").stdout.strip() in ("600", "660"), host


def test_answers_name_their_release_and_request(lab: Lab) -> None:
    answer = lab.http("GET", "/readyz", token=None)
    assert answer.status == 200
    assert answer.headers["x-atlas-release"]
    assert answer.headers["x-request-id"]
