"""Counters of a server for Prometheus, and its log of requests. Needs the extra `serve`."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter as Count
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

__all__ = ["Metrics", "log_request", "log_requests_to"]

_REASONS = ("stop", "length", "abort")
_requests = logging.getLogger("d2c_mlx.requests")


class Metrics:
    """Counters of one server, each in a registry of its own; prompts and answers are not kept.

    Those that begin with `vllm:` have vLLM's names, with the task as their `model_name`.

    Attributes:
        replies: requests answered, by HTTP status.
        requests: requests started, by task; "" is the base model.
        prompt_tokens: tokens of prompts.
        answer_tokens: tokens generated.
        disconnected: clients that left before their answer ended.
        open: requests that run or wait.
        first_token: seconds from a request to its first token.
        loads: adapters put into memory, by name.
        evictions: adapters that had to leave it for others, by name.
        prefix_nbytes: bytes of keys and values of beginnings that prompts share.
        running: name of the model of every request that runs, as it is now.
        waiting: name of the model of every request that waits.
        most_adapters: number of adapters that memory has room for.
    """

    def __init__(self, base_name: str) -> None:
        """Count requests without a task under the base model's name."""
        self._base_name = base_name
        self._registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, registry=self._registry)

        def seconds(name: str, about: str, *labels: str) -> Histogram:
            buckets = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
            return Histogram(name, about, labels, registry=self._registry, buckets=buckets)

        self.replies = counter("d2c_mlx_replies", "requests answered, by HTTP status", "status")
        self.requests = counter("d2c_mlx_requests", "requests started, by task", "task")
        self.prompt_tokens = counter("d2c_mlx_prompt_tokens", "tokens of prompts")
        self.answer_tokens = counter("d2c_mlx_answer_tokens", "tokens generated")
        self.disconnected = counter("d2c_mlx_vanished", "clients that left before the end")
        self.loads = counter("d2c_mlx_adapter_loads", "adapters put into memory", "adapter")
        self.evictions = counter(
            "d2c_mlx_adapter_evictions", "adapters that left it for others", "adapter"
        )
        self.prefix_nbytes = Gauge("d2c_mlx_prefix_bytes", "of beginnings that prompts share",
                                   registry=self._registry)  # fmt: skip
        self.open = Gauge("d2c_mlx_open", "requests that run or wait", registry=self._registry)
        self.first_token = seconds("d2c_mlx_first_token_seconds", "from request to first token")
        model = "model_name"
        self._prompt_tokens = counter("vllm:prompt_tokens", "tokens of prompts", model)
        self._tokens = counter("vllm:generation_tokens", "tokens generated", model)
        self._queries = counter("vllm:prefix_cache_queries", "tokens looked up", model)
        self._hits = counter("vllm:prefix_cache_hits", "tokens found there", model)
        self._ended = counter(
            "vllm:request_success", "requests that ended", model, "finished_reason"
        )
        self._queued = seconds("vllm:request_queue_time_seconds", "until it runs", model)
        self._first = seconds("vllm:time_to_first_token_seconds", "until its first token", model)
        self._between = seconds("vllm:inter_token_latency_seconds", "between two tokens", model)
        self._whole = seconds("vllm:e2e_request_latency_seconds", "of a whole request", model)
        self.running: Sequence[str] = ()
        self.waiting: Sequence[str] = ()
        self.most_adapters = 0
        self._registry.register(self)
        # Memory and open files, on Linux.
        ProcessCollector(registry=self._registry)

    def name(self, task: str | None) -> str:
        """The name of a task's model; None is the base model."""
        return self._base_name if task is None else task

    def started(self, task: str | None, n_prompt: int, n_cached: int, waited: float) -> None:
        """Count a request that runs now.

        Args:
            task: None is the base model.
            n_prompt: tokens of its prompt.
            n_cached: those of them that another request had processed.
            waited: seconds since it was made.
        """
        name = self.name(task)
        self.requests.labels("" if task is None else task).inc()
        self.prompt_tokens.inc(n_prompt)
        self._prompt_tokens.labels(name).inc(n_prompt)
        self._queries.labels(name).inc(n_prompt)
        self._hits.labels(name).inc(n_cached)
        self._queued.labels(name).observe(waited)

    def token(self, task: str | None, seconds: float, is_first: bool) -> None:
        """Count a token, so many seconds after the one before, or after the request was made."""
        name = self.name(task)
        self.answer_tokens.inc()
        self._tokens.labels(name).inc()
        (self._first if is_first else self._between).labels(name).observe(seconds)
        if is_first:
            self.first_token.observe(seconds)

    def ended(self, task: str | None, reason: str | None, seconds: float) -> None:
        """Count a request that ended so many seconds after it was made; reason None is no end."""
        self._ended.labels(self.name(task), reason or "abort").inc()
        self._whole.labels(self.name(task)).observe(seconds)

    def forget(self, name: str) -> None:
        """Drop what is counted by the name of a model that is not served any more."""
        for one in (self._prompt_tokens, self._tokens, self._queued, self._first, self._between,
                    self._whole, self._queries, self._hits, self.requests, self.loads,
                    self.evictions):  # fmt: skip
            _drop(one, name)
        for reason in _REASONS:
            _drop(self._ended, name, reason)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is true now; the registry asks for it."""
        running, waiting = Count(self.running), Count(self.waiting)
        for name, counts in (("running", running), ("waiting", waiting)):
            family = GaugeMetricFamily(f"vllm:num_requests_{name}", f"requests {name}",
                                       labels=["model_name"])  # fmt: skip
            for model in sorted({*running, *waiting}) or [""]:
                family.add_metric([model], counts[model])
            yield family
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "adapters in use", labels=labels)
        used = [str(self.most_adapters), ",".join(sorted(running)), ",".join(sorted(waiting))]
        info.add_metric(used, time.time())
        yield info

    def render(self) -> bytes:
        """All counters in Prometheus' text format, which `/metrics` returns."""
        return generate_latest(self._registry)


def _drop(metric: Counter | Histogram, *labels: str) -> None:
    try:
        metric.remove(*labels)
    except KeyError:
        pass


def log_requests_to(path: Path) -> None:
    """Append a line of JSON to a file for every request; raises OSError if it cannot be written."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    _requests.addHandler(handler)
    _requests.setLevel(logging.INFO)
    _requests.propagate = False


def log_request(**facts: object) -> None:
    """Log a request, if a file was given: numbers and names, nothing of what was said."""
    if _requests.handlers:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        _requests.info(json.dumps({"time": now, **facts}, ensure_ascii=False))
