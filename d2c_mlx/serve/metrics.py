"""Counters of a server for Prometheus, and its log of requests. Needs the extra `serve`."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter as Count
from collections.abc import Iterator, Sequence
from contextlib import suppress
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

from d2c_mlx.utils.errors import warn

__all__ = ["Metrics", "log_request", "log_requests_to"]

_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_requests = logging.getLogger("d2c_mlx.requests")


class Metrics:
    """Counters of one server, each in a registry of its own; prompts and answers are not kept.

    Those that begin with `vllm:` have vLLM's names, with the task as their `model_name`.

    Attributes:
        replies: requests answered, by HTTP status.
        disconnected: clients that left before their answer ended.
        open: requests that run or wait.
        loads: adapters put into memory, by name.
        evictions: adapters that had to leave it for others, by name.
        prefix_nbytes: bytes of keys and values of beginnings that prompts share.
    """

    def __init__(self, base_name: str) -> None:
        """Count requests without a task under the base model's name."""
        self._base_name, self._registry = base_name, CollectorRegistry()
        # Those that have the name of a model or an adapter as a label.
        self._named: list[Counter | Histogram] = []
        model, registry = "model_name", self._registry

        def counter(name: str, about: str, *labels: str) -> Counter:
            metric = Counter(name, about, labels, registry=self._registry)
            self._named += [metric] if {"task", "adapter", "model_name"} & {*labels} else []
            return metric

        def seconds(name: str, about: str) -> Histogram:
            name, labels = f"vllm:{name}_seconds", ["model_name"]
            metric = Histogram(name, about, labels, registry=registry, buckets=_BUCKETS)
            self._named.append(metric)
            return metric

        self.replies = counter("d2c_mlx_replies", "requests answered, by HTTP status", "status")
        self.disconnected = counter("d2c_mlx_vanished", "clients that left before the end")
        self.loads = counter("d2c_mlx_adapter_loads", "adapters put into memory", "adapter")
        evicted = "adapters that left it for others"
        self.evictions = counter("d2c_mlx_adapter_evictions", evicted, "adapter")
        shared = "of beginnings that prompts share"
        self.prefix_nbytes = Gauge("d2c_mlx_prefix_bytes", shared, registry=registry)
        self.open = Gauge("d2c_mlx_open", "requests that run or wait", registry=registry)
        self._requests = counter("d2c_mlx_requests", "requests started, by task", "task")
        self._answer_tokens = counter("d2c_mlx_answer_tokens", "tokens generated")
        about, name = "from request to first token", "d2c_mlx_first_token_seconds"
        self._first_token = Histogram(name, about, registry=registry, buckets=_BUCKETS)
        self._prompt_tokens = counter("vllm:prompt_tokens", "tokens of prompts", model)
        self._tokens = counter("vllm:generation_tokens", "tokens generated", model)
        self._queries = counter("vllm:prefix_cache_queries", "tokens looked up", model)
        self._hits = counter("vllm:prefix_cache_hits", "tokens found there", model)
        success, reason = "vllm:request_success", "finished_reason"
        self._ended = counter(success, "requests that ended", model, reason)
        self._queued = seconds("request_queue_time", "until it runs")
        self._first = seconds("time_to_first_token", "until its first token")
        self._between = seconds("inter_token_latency", "between two tokens")
        self._whole = seconds("e2e_request_latency", "of a whole request")
        self._running, self._waiting, self._n_adapters = Count[str](), Count[str](), 0
        registry.register(self)
        # Memory and open files, on Linux.
        ProcessCollector(registry=registry)

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
        self._requests.labels("" if task is None else task).inc()
        self._prompt_tokens.labels(name).inc(n_prompt)
        self._queries.labels(name).inc(n_prompt)
        self._hits.labels(name).inc(n_cached)
        self._queued.labels(name).observe(waited)

    def token(self, task: str | None, seconds: float, is_first: bool) -> None:
        """Count a token, so many seconds after the one before, or after the request was made."""
        name = self.name(task)
        self._answer_tokens.inc()
        self._tokens.labels(name).inc()
        (self._first if is_first else self._between).labels(name).observe(seconds)
        if is_first:
            self._first_token.observe(seconds)

    def ended(self, task: str | None, reason: str, seconds: float) -> None:
        """Count a request that ended so many seconds after it was made."""
        self._ended.labels(self.name(task), reason).inc()
        self._whole.labels(self.name(task)).observe(seconds)

    def tell(
        self, running: Sequence[str | None], waiting: Sequence[str | None], n_adapters: int
    ) -> None:
        """Take note of the tasks of all requests that run or wait now."""
        self._running = Count(map(self.name, running))
        self._waiting, self._n_adapters = Count(map(self.name, waiting)), n_adapters

    def forget(self, name: str) -> None:
        """Drop what is counted by the name of a model that is not served any more."""
        for metric in self._named:
            for reason in ("stop", "length", "abort") if metric is self._ended else (None,):
                with suppress(KeyError):
                    metric.remove(name, *([reason] if reason else []))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is true now; the registry asks for it."""
        running, waiting = self._running, self._waiting
        for name, counts in (("running", running), ("waiting", waiting)):
            metric, about = f"vllm:num_requests_{name}", f"requests {name}"
            family = GaugeMetricFamily(metric, about, labels=["model_name"])
            for model in sorted({*running, *waiting}) or [""]:
                family.add_metric([model], counts[model])
            yield family
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "adapters in use", labels=labels)
        names = [",".join(sorted(running)), ",".join(sorted(waiting))]
        info.add_metric([str(self._n_adapters), *names], time.time())
        yield info

    def render(self) -> bytes:
        """All counters in Prometheus' text format, which `/metrics` returns."""
        return generate_latest(self._registry)


class _RequestLog(logging.FileHandler):
    """Says once why it cannot write, a full disk say, and goes on without."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        if not self.failed:
            self.failed = True
            warn(f"{self.baseFilename}: requests cannot be logged there; free some space")


def log_requests_to(path: Path) -> None:
    """Append a line of JSON to a file for every request; raises OSError if it cannot be written."""
    handler = _RequestLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    _requests.addHandler(handler)
    _requests.setLevel(logging.INFO)
    _requests.propagate = False


def log_request(**facts: object) -> None:
    """Log a request, if a file was given: numbers and names, nothing of what was said."""
    if _requests.handlers:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        # In ASCII, so that nothing in a path or a name is a control sequence.
        _requests.info(json.dumps({"time": now, **facts}).replace("\x7f", "\\u007f"))
