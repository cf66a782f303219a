"""Figures of a server in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class ServerMetrics:
    """Counters of one engine; a registry of its own, so that a process may have several."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("sdjax_requests", "Requests by API", ["origin"], registry=registry)
        self.ended = Counter("sdjax_jobs_ended", "Jobs by how they ended", ["state"], registry=registry)
        self.images = Counter("sdjax_images", "Images made", registry=registry)
        self.waiting = Gauge("sdjax_queue_jobs", "Jobs that wait", registry=registry)
        self.batch_fill = Gauge(
            "sdjax_batch_fill", "Share of the running batches' places with an image", registry=registry
        )
        self.stages = Histogram(
            "sdjax_stage_seconds",
            "Seconds of a turn and of its parts",
            ["stage"],
            registry=registry,
            buckets=BUCKETS,
        )

    def text(self) -> bytes:
        """All of them as text."""
        return generate_latest(self.registry)


BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
