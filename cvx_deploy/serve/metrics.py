"""What Prometheus is told: requests as they are answered, jobs and workers as they are when it asks."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cvx_deploy.serve.jobs import JobStore
from cvx_deploy.serve.supervisor import Supervisor

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)


class Metrics:
    """See the module."""

    def __init__(self, store: JobStore, supervisor: Supervisor) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(store, supervisor))
        self._requests = Counter("cvx_requests", "Answered requests.", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "cvx_request_seconds", "Seconds to an answer's end.", ["route"], buckets=_SECONDS, registry=self._registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Note an answer; a route is its pattern, so that there are few of them."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self._registry)


class _Now(Collector):
    def __init__(self, store: JobStore, supervisor: Supervisor) -> None:
        self._store, self._supervisor = store, supervisor

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("cvx_jobs", "Jobs that are kept, by state.", labels=["status"])
        for status, count in self._store.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        yield GaugeMetricFamily("cvx_job_seconds", "Mean of the last completed jobs.", self._store.mean_seconds())
        workers = GaugeMetricFamily("cvx_workers", "Workers by state.", labels=["state"])
        states = [slot.state for slot in self._supervisor.slots]
        for state in ("starting", "ready", "busy", "stopped"):
            workers.add_metric([state], states.count(state))
        yield workers
        restarts = sum(max(slot.starts - 1, 0) for slot in self._supervisor.slots)
        yield GaugeMetricFamily("cvx_worker_restarts", "How often workers were started anew.", restarts)
