"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Meters"]


class Meters:
    """Counters of one server; `text` is what `/metrics` says. No prompt or answer is in them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"d2c_mlx_{name}", about, labels, registry=self.registry)

        self.replies = counter("replies", "requests answered, by HTTP status", "status")
        self.tasks = counter("requests", "requests started, by task", "task")
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.answer_tokens = counter("answer_tokens", "tokens generated")
        self.vanished = counter("vanished", "clients that left before their answer ended")
        self.open = Gauge("d2c_mlx_open", "requests that run or wait", registry=self.registry)
        self.first_token = Histogram(
            "d2c_mlx_first_token_seconds", "from the request to its first token",
            registry=self.registry, buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
        )  # fmt: skip

    def started(self, task: str | None, prompt_tokens: int) -> None:
        """A request for a task, None for the base model, begins."""
        self.tasks.labels("" if task is None else task).inc()
        self.prompt_tokens.inc(prompt_tokens)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
