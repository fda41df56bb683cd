"""The floor: the same gunicorn, worker class and threads as the service, around a view that does nothing."""

from __future__ import annotations

import gc

from flask import Flask

from atlas.runtime import service_port
from atlas.serve import Application
from atlas.settings import load_identity, load_settings
from atlas.watchdog import Notifier


class Empty(Application):
    """The service's server, with its configuration, around another application."""

    def load_config(self) -> None:
        super().load_config()
        self.cfg.set("post_worker_init", lambda _worker: None)
        self.cfg.set("worker_exit", lambda _arbiter, _worker: None)

    def load(self) -> Flask:
        app = Flask("empty")
        app.add_url_rule("/healthz", "healthz", lambda: "")
        app.add_url_rule("/v1/documents", "submit", lambda: ("", 202), methods=["POST"])
        return app


if __name__ == "__main__":
    settings = load_settings()
    gc.freeze()
    Empty(settings, load_identity(settings), service_port("blue", "api"), Notifier()).run()
