"""The server on Ray Serve: one process that speaks HTTP and keeps the jobs, one for each engine.

The first goes on answering while engines compute, and while they die and are replaced.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus
from starlette.types import ASGIApp

from magihuman.runtime.serving.api import create_app
from magihuman.runtime.serving.cluster.local import cluster, joined
from magihuman.runtime.serving.cluster.loopback import close_replica
from magihuman.runtime.serving.front.server import Front
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.messages import (
    EngineLost,
    Event,
    Figures,
    LiveWork,
    Make,
    Report,
    Spoken,
    Work,
)
from magihuman.runtime.serving.metrics import FOLDER_VARIABLES, EngineFigures, Metrics
from magihuman.runtime.serving.observe import relay, tracing
from magihuman.runtime.serving.replica import EngineReplica
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.shared.jobs import SharedJobs
from magihuman.runtime.serving.shared.staging import staged
from magihuman.runtime.serving.store import locked
from magihuman.runtime.serving.uploads import DECODERS

log = logging.getLogger("magihuman")

APPLICATION, API, ENGINE = "magihuman", "api", "engine"
REQUESTS_PER_API = 1000
REQUESTS_PER_ENGINE = 2  # one on the device, one that gets ready beside it
# For what an engine makes when fewer are needed: Serve stops the newest, busy or not. When the
# server stops, all are idle by then.
ENDING_S = 3600.0
STATUS_AGE_S = 1.0
POLL_S = 0.2
LOCK_WAIT_S = 60.0  # for the process before, where Serve has just given it up
TELL_S = 2.0  # for figures to reach the process that speaks HTTP

Address = tuple[str, int]  # host and port


@dataclass(frozen=True)
class Engines:
    """The engines to run.

    Attributes:
        options: of `runtime.load`.
        warmup: sizes as for `Engine.warmup`.
        gpus: that each needs, which are then its own; 0 on a CPU.
        min_replicas, max_replicas: as many as the line needs.
        encoding: of `Output`, beside its path.
    """

    options: dict[str, Any]
    warmup: tuple[tuple[int, int, float], ...]
    gpus: int
    min_replicas: int
    max_replicas: int
    encoding: dict[str, Any] = field(default_factory=dict)


class Replica(EngineReplica):
    """An engine in a process of its own, which ends where the engine has failed for good."""

    def __init__(
        self,
        options: dict[str, Any],
        warmup: Sequence[tuple[int, int, float]],
        encoding: dict[str, Any],
        is_alone: bool = True,
    ) -> None:
        """options, warmup, encoding: as of `EngineReplica`. is_alone: whether it is called from
        this machine alone.
        """
        if is_alone:
            close_replica()
        relay.set_up()
        super().__init__(options, warmup, tracing.hooks(), encoding)

    async def make(
        self, work: Work | LiveWork, carrier: tracing.Carrier | None = None
    ) -> AsyncGenerator[Event, None]:
        """Make a video, as `EngineReplica.make` does; Ray tells the caller if the process ended.

        carrier: of the span below which it is made.
        """
        try:
            making = tracing.below(carrier or {}, staged(work, super().make))
            async with aclosing(making) as events:
                async for event in events:
                    if not isinstance(
                        event, (Report, Spoken)
                    ):  # who is told of the end finds it counted
                        await self._tell()
                    yield event
        except EngineLost:
            log.exception("the engine has failed for good, and its process ends")
            await self._tell()
            relay.finish()
            os._exit(1)

    async def check_health(self) -> None:  # type: ignore[override]  # Serve awaits it
        """Raise where the engine can make no more videos. Serve asks every few seconds."""
        super().check_health()
        await self._tell()

    async def _tell(self) -> None:
        """Send what is counted to the process that speaks HTTP, or else the next time."""
        try:
            api = serve.get_deployment_handle(API, _name())
            await asyncio.wait_for(api.note.remote(self.figures()), TELL_S)
        except Exception as error:  # no figure is worth a video
            log.debug("figures have not been taken: %r", error)


class Line:
    """The application that speaks HTTP, with its jobs."""

    def open(self, engines: DeploymentHandle[Any], settings: Settings, slots: int) -> ASGIApp:
        """Take up what waits, and return the application. For an event loop."""
        relay.set_up()
        self._lock = ExitStack()  # held until the process ends
        if settings.shared is None:
            self._lock.enter_context(locked(settings.folder, LOCK_WAIT_S))
            self.jobs = Jobs(settings, _remote(engines), slots)
        else:
            settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.jobs = SharedJobs(settings, _remote(engines), slots)
        self._figures = EngineFigures()
        self._capacity = settings.capacity
        self.metrics = Metrics(self.jobs, self._figures.text)
        self._asked_s, self._is_ready = -STATUS_AGE_S, False
        self.jobs.start()
        DECODERS.warm()
        app = create_app(settings, lambda: self.jobs, self.is_ready, lambda: self.metrics)
        return tracing.traced(app)

    async def note(self, figures: Figures) -> None:
        """Take the figures of an engine."""
        self._figures.note(figures)
        if self._capacity is not None:
            self._capacity.plan(figures.room_bytes)

    async def is_ready(self) -> bool:
        """Whether an engine runs. Serve is asked once a second at most."""
        if time.monotonic() - self._asked_s >= STATUS_AGE_S:
            self._asked_s = time.monotonic()
            self._is_ready = await asyncio.to_thread(_is_running)
        return self._is_ready


class Api(Line):
    """The process that speaks HTTP, and listens itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: DeploymentHandle[Any], settings: Settings, slots: int, address: Address
    ) -> None:
        close_replica()
        self._front = Front(self.open(engines, settings, slots))
        await self._front.start(*address)

    async def drain(self, bound_s: float) -> None:
        """Take no more jobs, let those end that are being made, then answer no more."""
        await self.jobs.drain(bound_s)
        await self._front.stop()
        await asyncio.to_thread(tracing.flush)


class Ingress(Line):
    """One of the processes of a cluster that speak HTTP, behind Serve's proxies."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: DeploymentHandle[Any], settings: Settings, slots: int
    ) -> None:
        self._app = self.open(engines, settings, slots)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def __del__(self) -> None:
        await self.jobs.close()


def application(settings: Settings, engines: Engines, address: Address) -> serve.Application:
    """Make what Serve runs: the process that speaks HTTP at an address, bound to the engines."""
    front = serve.deployment(
        name=API,
        num_replicas=1,  # it alone has the jobs
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
    )(Api)
    slots = REQUESTS_PER_ENGINE * engines.max_replicas
    return front.bind(_bound(engines, is_alone=True), settings, slots, address)


def clustered(settings: Settings, engines: Engines, apis: int) -> serve.Application:
    """Make what Serve runs on a cluster that others have started too.

    apis: processes that speak HTTP, which share the line of `settings.shared`.
    """
    front = serve.deployment(
        name=API,
        num_replicas=apis,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=REQUESTS_PER_API,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
    )(serve.ingress()(Ingress))
    slots = max(1, math.ceil(REQUESTS_PER_ENGINE * engines.max_replicas / apis))
    return front.bind(_bound(engines, is_alone=False), settings, slots)


def _bound(engines: Engines, is_alone: bool) -> serve.Application:
    """Make what Serve runs for the engines. is_alone: as of `Replica`."""
    threads = max(1, (os.cpu_count() or 1) // engines.max_replicas)
    variables = {"OMP_NUM_THREADS": str(threads)}  # Ray would have it be one
    if engines.options.get("context_parallel", 1) > 1:  # the processes of one talk on loopback
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        variables |= {name: os.environ.get(name, "lo") for name in names}
    replica = serve.deployment(
        name=ENGINE,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": engines.gpus,
            "runtime_env": {"env_vars": variables},
        },
        max_ongoing_requests=REQUESTS_PER_ENGINE,
        autoscaling_config={
            "min_replicas": engines.min_replicas,
            "max_replicas": engines.max_replicas,
            "target_ongoing_requests": 1,
        },
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=ENDING_S,
    )(Replica)
    return replica.bind(engines.options, engines.warmup, engines.encoding, is_alone)


def run(
    settings: Settings,
    engines: Engines,
    address: Address,
    drain_s: float,
    is_told: Callable[[], bool],
    wait: Callable[[], None],
    is_loud: bool = False,
) -> None:
    """Serve until `wait` returns, then let what is being made end.

    is_told: whether to stop while engines load. wait: called once the server is ready. is_loud:
    as of `cluster`.
    """
    for name in FOLDER_VARIABLES:  # before Ray's processes inherit it
        os.environ.pop(name, None)
    with cluster(is_loud):
        if is_told():
            return
        handle = _deploy(application(settings, engines, address))
        while not is_told() and not _has_begun():
            time.sleep(POLL_S)
        if is_told():
            return  # nothing is being made, and what waits is on disk
        wait()
        handle.drain.remote(drain_s).result(timeout_s=drain_s + 30)


def run_on(
    cluster_address: str,
    built: serve.Application,
    address: Address,
    is_told: Callable[[], bool],
    wait: Callable[[], None],
    is_loud: bool = False,
) -> None:
    """Serve on a cluster that is there, until `wait` returns; the cluster stays.

    cluster_address: of Ray, or "auto". address: of the proxies on its nodes, unless it has some
    already. is_told, wait, is_loud: as of `run`.
    """
    with joined(cluster_address, is_loud):
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        http = {"host": address[0], "port": address[1]}
        serve.start(proxy_location="EveryNode", http_options=http, logging_config=quiet)
        target = serve.RunTarget(built, APPLICATION, route_prefix="/", logging_config=quiet)
        serve.run_many([target], wait_for_applications_running=False)
        try:
            while not is_told() and not _has_begun():
                time.sleep(POLL_S)
            if not is_told():
                wait()
        finally:
            serve.delete(APPLICATION)


def _deploy(built: serve.Application) -> DeploymentHandle[Any]:
    """Have Serve start the processes, and return before they have."""
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="Disabled", logging_config=quiet)  # `Front` is in its place
    target = serve.RunTarget(built, APPLICATION, route_prefix=None, logging_config=quiet)
    return serve.run_many([target], wait_for_applications_running=False)[0]


def _has_begun() -> bool:
    """Whether all parts run. Raises `RuntimeError` where they cannot."""
    application = serve.status().applications[APPLICATION]
    if application.status == ApplicationStatus.DEPLOY_FAILED:
        raise RuntimeError(application.message)
    return application.status == ApplicationStatus.RUNNING


def _remote(engines: DeploymentHandle[Any]) -> Make:
    streaming = engines.options(stream=True)

    async def make(work: Work | LiveWork) -> AsyncGenerator[Event, None]:
        with tracing.attempt(work.name) as carrier:
            answer = streaming.make.remote(work, carrier)
            response = cast("DeploymentResponseGenerator[Event]", answer)
            try:
                async for event in response:
                    yield event
            except (RayError, RayServeException) as error:
                raise EngineLost(str(error)) from error
            except BaseException:
                response.cancel()
                raise

    return make


def _name() -> str:
    """The application's, which on a cluster its config file chooses."""
    return serve.get_replica_context().app_name


def _is_running() -> bool:
    states = serve.status().applications[_name()].deployments[ENGINE].replica_states
    return any(state == "RUNNING" and count > 0 for state, count in states.items())
