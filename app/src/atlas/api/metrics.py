"""What this API process counts, for Prometheus."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from flask import Blueprint, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector

from atlas.api.openapi import describe
from atlas.backups import BackupMetrics
from atlas.documents import Outcome, Submitted

blueprint = Blueprint("metrics", __name__)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class HttpMetrics:
    """Requests and submissions. With several worker processes, what is exposed is their sum."""

    def __init__(self, backup_status_path: str | None = None) -> None:
        self._registry = CollectorRegistry()
        self._backups = BackupMetrics(backup_status_path)
        self._registry.register(self._backups)
        self.requests = Counter(
            "atlas_http_requests_total", "Requests answered.", ["method", "endpoint", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "atlas_http_request_duration_seconds",
            "Time to answer.",
            ["endpoint"],
            registry=self._registry,
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.submissions = Counter(
            "atlas_documents_submitted_total", "Documents submitted.", ["outcome"], registry=self._registry
        )
        self._outcomes = {name: self.submissions.labels(name) for name in ("created", "duplicate", "refused")}

    @functools.cache  # noqa: B019 - one for each process
    def _children(self, method: str, endpoint: str, status: int) -> tuple[Counter, Histogram]:
        return self.requests.labels(method, endpoint, str(status)), self.seconds.labels(endpoint)

    def count(self, method: str, endpoint: str, status: int, seconds: float) -> None:
        """Count one request."""
        requests, durations = self._children(method if method in METHODS else "other", endpoint, status)
        requests.inc()
        durations.observe(seconds)

    def count_submissions(self, outcomes: Sequence[Outcome]) -> None:
        """Count what became of documents."""
        for outcome in outcomes:
            created = isinstance(outcome, Submitted) and outcome.created
            self._outcomes["created" if created else "duplicate" if isinstance(outcome, Submitted) else "refused"].inc()

    def render(self) -> bytes:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        together.register(self._backups)
        return generate_latest(together)


@blueprint.get("/metrics")
@describe({200: "text/plain"})
def metrics() -> Response:
    """Expose what this API counts, for Prometheus."""
    from atlas.api.state import state  # which needs HttpMetrics

    return Response(state().metrics.render(), content_type=CONTENT_TYPE_PLAIN_0_0_4)
