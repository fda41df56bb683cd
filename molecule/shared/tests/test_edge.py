"""Edge hosts: HAProxy, its map and its backends."""

from __future__ import annotations

import http.client
import socket
import ssl
from urllib.parse import urlsplit

import pytest
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


@pytest.fixture
def encrypted(lab: Lab) -> ssl.SSLContext:
    """What a client of the lab trusts; the checks that want it are for environments with HTTPS."""
    assert (lab.ca is not None) == lab.url.startswith("https:") == bool(lab.group("database"))
    # A context of its own: what a check offers on it must not reach the lab's client.
    return ssl.create_default_context(cafile=lab.ca)


def handshake(lab: Lab, edge: str, context: ssl.SSLContext) -> tuple[str | None, str | None]:
    """Return version and protocol that the edge agrees to."""
    with (
        socket.create_connection((lab.hosts[edge], 443), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=lab.hosts[edge]) as connection,
    ):
        return connection.version(), connection.selected_alpn_protocol()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it asks for what is deprecated
def test_every_edge_speaks_modern_tls_and_http2(lab: Lab, encrypted: ssl.SSLContext) -> None:
    for edge in lab.group("edge") if lab.ca else []:
        encrypted.set_alpn_protocols(["h2", "http/1.1"])
        assert handshake(lab, edge, encrypted) == ("TLSv1.3", "h2")
        old = ssl.create_default_context(cafile=lab.ca)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            handshake(lab, edge, old)
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(lab, edge, ssl.create_default_context())


def test_in_clear_there_is_only_the_way_to_the_encrypted_port(lab: Lab, encrypted: ssl.SSLContext) -> None:
    def ask(method: str, path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(urlsplit(lab.url).hostname or "", 80, timeout=5)
        connection.request(method, path, headers=headers)
        return connection.getresponse()

    assert ask("GET", "/healthz").status == 200
    if lab.ca:
        answer = ask("POST", "/v1/documents?a=b")
        assert (answer.status, answer.headers["Location"]) == (308, f"{lab.url}/v1/documents?a=b")
        assert ask("GET", "/v1/documents", Authorization="Bearer x").status == 403


def test_no_log_or_file_that_others_can_read_holds_the_private_key(lab: Lab, encrypted: ssl.SSLContext) -> None:
    for edge in lab.group("edge") if lab.ca else []:
        assert lab.ssh(edge, "stat -c '%a %U' /etc/haproxy/tls /etc/haproxy/tls/*").stdout.split() == [
            "700",
            "root",
            "600",
            "root",
        ]
        key = (lab.folder / "tls" / f"{edge}.pem").read_text().split("PRIVATE KEY-----\n")[1].splitlines()[0]
        assert len(key) == 64
        assert lab.ssh(edge, f"grep -rl '{key}' /etc /var /tmp /root /home /run --exclude-dir=tls; true").stdout == ""
        assert lab.ssh(edge, f"journalctl --no-pager | grep -c '{key}' | grep -v grep").stdout.strip() == "0"
