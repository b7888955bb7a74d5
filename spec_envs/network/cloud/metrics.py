"""Metrics of a cloud for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from spec_envs.network.cloud.engine import Answer, Job
from spec_envs.network.wire import CODES

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
REASONS = ("full", "address", "greeting", "token", "frames", "unread", "idle", "files")
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one cloud, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "spec_envs_cloud_{}".format
        self.sessions = Gauge(name("sessions"), "Texts held.", registry=registry)
        self.received = Counter(name("received_bytes"), "Bytes of messages from edges.", registry=registry)
        self.sent = Counter(name("sent_bytes"), "Bytes of messages to edges.", registry=registry)
        self.emitted = Counter(name("emitted_tokens"), "Tokens decided.", registry=registry)
        self.drafted = Counter(name("drafted_tokens"), "Drafted tokens verified.", registry=registry)
        self.accepted = Counter(name("accepted_tokens"), "Drafted tokens accepted.", registry=registry)
        self.refused = Counter(name("refused"), "Messages refused.", ["code"], registry=registry)
        self.turned_away = Counter(
            name("turned_away"), "Connections closed or not made.", ["reason"], registry=registry
        )
        for code in CODES:  # so that every label exists from the start
            self.refused.labels(code)
        for reason in REASONS:
            self.turned_away.labels(reason)
        self.batch = Histogram(name("batch_size"), "Requests of a forward.", buckets=SIZES, registry=registry)
        self.forward = Histogram(name("forward_seconds"), "Seconds of a forward.", buckets=SECONDS, registry=registry)
        self.queued = Histogram(name("queued_seconds"), "Seconds before it.", buckets=SECONDS, registry=registry)

    def answered(self, job: Job, answer: Answer, queued: float) -> None:
        """Count the answer to a job that waited ``queued`` seconds."""
        self.drafted.inc(len(job.draft))
        self.accepted.inc(answer.accepted)
        self.emitted.inc(answer.accepted + (answer.token is not None))
        self.queued.observe(queued)

    def page(self) -> tuple[str, bytes]:
        """Return content type and text of `/metrics`."""
        return CONTENT_TYPE_LATEST, generate_latest(self.registry)
