"""What the server counts, for Prometheus, in a registry of its own: names begin with `luthier_`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters that any thread may raise. Labels take values of ours only: paths and models there are."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "luthier_requests", "Requests by path and HTTP status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "luthier_request_seconds", "From a request to the end of its answer", ["path"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first = Histogram(
            "luthier_first_token_seconds", "From a place in the queue to the first token", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "luthier_prompt_tokens", "Tokens of prompts that were queued", ["model"], registry=registry
        )
        self.tokens = Counter("luthier_generated_tokens", "Tokens that were written", ["model"], registry=registry)
        self.step = Histogram(
            "luthier_step_seconds", "One step of an engine: a token of each of its texts", ["model"],
            buckets=_STEPS, registry=registry,
        )  # fmt: skip
        self.cancelled = Counter(
            "luthier_cancelled", "Answers that were ended before their end: client gone, time up, stopping",
            registry=registry,
        )  # fmt: skip
        self.faults = Counter("luthier_engine_faults", "Steps that failed", ["model"], registry=registry)
        self.running = Gauge("luthier_running", "Texts that are being written", registry=registry)
        self.waiting = Gauge("luthier_waiting", "Texts that wait for a slot", registry=registry)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
