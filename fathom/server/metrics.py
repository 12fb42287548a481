"""What a server counts and times, for Prometheus; each server has a registry of its own. Names follow vLLM's where the meaning does."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fathom.engine.request import Stats

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
TOKENS = tuple(4**power for power in range(11))

# name, what it is, how it follows from the engine's counters
GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("num_requests_running", "Requests that are being computed.", lambda stats: stats.running),
    ("num_requests_waiting", "Requests that wait for a place.", lambda stats: stats.waiting),
    ("kv_cache_usage_perc", "Cache blocks that running requests hold, 1 is all.", lambda stats: stats.blocks_used / max(1, stats.blocks)),
    ("prefix_cache_usage_perc", "Cache blocks that only the prefix cache holds, 1 is all.",
     lambda stats: stats.blocks_cached / max(1, stats.blocks)),
    ("state_bytes", "Bytes of window states in memory.", lambda stats: stats.state_bytes),
    ("kv_disk_bytes", "Bytes of the prefix cache on disk.", lambda stats: stats.disk_bytes))
COUNTERS: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("prompt_tokens", "Tokens of prompts that were started.", lambda stats: stats.prompt_tokens),
    ("generation_tokens", "Tokens written.", lambda stats: stats.generated_tokens),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda stats: stats.prompt_tokens),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda stats: stats.hit_tokens),
    ("num_preemptions", "Requests that had to give up their memory and start again.", lambda stats: stats.preemptions),
    ("spec_decode_num_draft_tokens", "Tokens drafted.", lambda stats: stats.drafted_tokens),
    ("spec_decode_num_accepted_tokens", "Drafted tokens that stayed.", lambda stats: stats.accepted_tokens),
    ("kv_disk_errors", "Failed reads and writes of the prefix cache on disk.", lambda stats: stats.disk_errors),
    ("kv_disk_dropped", "Damaged files of the prefix cache that were removed.", lambda stats: stats.disk_dropped))


@dataclass
class Record:
    """What the log and the metrics say of one HTTP request beside method, path and status."""

    request_id: str = ""
    tenant: str = ""
    prompt_tokens: int = 0
    hit_tokens: int = 0
    output_tokens: int = 0


class Metrics:
    """The counters and histograms of one server; `stats` gives the engine's own when they are asked for."""

    def __init__(self, model_name: str, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(model_name, stats))
        self._http = Counter(
            "fathom:http_requests", "HTTP requests by route.", ("handler", "method", "status"), registry=self._registry)
        self._success = Counter(
            "fathom:request_success", "Choices that ended.", ("model_name", "finished_reason"), registry=self._registry)
        self._model_name = model_name
        self._first = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "Between the outputs of a request.", SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Tokens that a request wrote.", TOKENS)

    def http(self, handler: str, method: str, status: int) -> None:
        """An HTTP request was answered; `handler` is the route's template."""
        self._http.labels(handler, method, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """A request's first output came so long after the request."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A further output came so long after the one before."""
        self._between.observe(seconds)

    def choice_ended(self, reason: str) -> None:
        """A choice ended for this reason."""
        self._success.labels(self._model_name, reason).inc()

    def request_ended(self, seconds: float, prompt_tokens: int, output_tokens: int) -> None:
        """All choices of a request ended, so long after it came."""
        self._whole.observe(seconds)
        self._prompt.observe(prompt_tokens)
        self._output.observe(output_tokens)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"fathom:{name}", words, ("model_name",), buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)


class _EngineMetrics(Collector):
    """The engine's counters, read when Prometheus asks."""

    def __init__(self, model_name: str, stats: Callable[[], Stats]):
        self._model_name, self._stats = model_name, stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for families, family in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, words, value in families:
                metric = family(f"fathom:{name}", words, labels=["model_name"])
                metric.add_metric([self._model_name], value(stats))
                yield metric
