"""Tells systemd how this process is: ready, alive, stopping (sd_notify(3) over a datagram socket)."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """The service manager's socket, taken out of the environment so that no child speaks in our name.

    Without systemd every call does nothing.
    """

    def __init__(self) -> None:
        self.address = os.environ.pop("NOTIFY_SOCKET", None)
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        meant_for = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        self.timeout = int(microseconds) / 1e6 if microseconds.isdigit() and meant_for == str(os.getpid()) else None

    @property
    def interval(self) -> float:
        """Seconds between two pings: a third of the watchdog's patience, at most five."""
        return min(5.0, self.timeout / 3) if self.timeout else 5.0

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def ping(self) -> None:
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if not self.address:
            return
        # A leading @ stands for the NUL of an abstract socket.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.sendto("\n".join(lines).encode(), address)
