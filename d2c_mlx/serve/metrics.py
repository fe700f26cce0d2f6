"""Counters of a server, for Prometheus. Needs the extra `serve`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]


class Metrics:
    """Counters of one server, each in a registry of its own; prompts and answers are not kept.

    Attributes:
        replies: requests answered, by HTTP status.
        requests: requests started, by task; "" is the base model.
        prompt_tokens: tokens of prompts.
        answer_tokens: tokens generated.
        disconnected: clients that left before their answer ended.
        open: requests that run or wait.
        first_token: seconds from a request to its first token.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"d2c_mlx_{name}", about, labels, registry=self._registry)

        self.replies = counter("replies", "requests answered, by HTTP status", "status")
        self.requests = counter("requests", "requests started, by task", "task")
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.answer_tokens = counter("answer_tokens", "tokens generated")
        self.disconnected = counter("vanished", "clients that left before their answer ended")
        self.open = Gauge("d2c_mlx_open", "requests that run or wait", registry=self._registry)
        self.first_token = Histogram(
            "d2c_mlx_first_token_seconds", "from the request to its first token",
            registry=self._registry, buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
        )  # fmt: skip

    def count_start(self, task: str | None, n_prompt_tokens: int) -> None:
        """Count a request that starts; task None is the base model."""
        self.requests.labels("" if task is None else task).inc()
        self.prompt_tokens.inc(n_prompt_tokens)

    def render(self) -> bytes:
        """All counters in Prometheus' text format, which `/metrics` returns."""
        return generate_latest(self._registry)
