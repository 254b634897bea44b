"""Spans for OpenTelemetry, from the HTTP request down to the stages of its video.

A process makes spans where `ENDPOINT_VARIABLE` names a collector, which is OpenTelemetry's own
variable: the others that it knows hold as well.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from magihuman.runtime.hooks import OpenTelemetryHooks

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
VARIABLES = (ENDPOINT_VARIABLE, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
NAME = "magihuman"
SEND_EVERY_MS = 1000  # a process that is ended loses what it has not sent
QUIET = ("/health", "/ready", "/metrics")  # asked all the time
Carrier = dict[str, str]  # headers of W3C Trace Context
Item = TypeVar("Item")


@cache
def provider() -> TracerProvider | None:
    """What makes the spans of this process; None where no collector is named."""
    if not any(os.environ.get(name) for name in VARIABLES):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", NAME)
    made = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    exporter = OTLPSpanExporter()
    made.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=SEND_EVERY_MS))
    return made


def hooks() -> list[OpenTelemetryHooks]:
    """Hooks of an engine, which make a span for each request and each of its stages."""
    made = provider()
    return [] if made is None else [OpenTelemetryHooks(made)]


def flush() -> None:
    """Send what has not been sent, for a process that ends."""
    made = provider()
    if made is not None:
        made.force_flush(SEND_EVERY_MS)


def traced(app: ASGIApp) -> ASGIApp:
    """The application, with a span for each request, below the client's own where it names one."""
    made = provider()
    if made is None:
        return app
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = made.get_tracer(NAME)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): text.decode("latin-1") for key, text in scope["headers"]}
        parent = TraceContextTextMapPropagator().extract(headers)
        method = scope["method"]
        with tracer.start_as_current_span(method, parent, SpanKind.SERVER) as span:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            span.set_attribute("http.request.method", method)
            try:
                await app(scope, receive, noted)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)

    return call


@contextmanager
def attempt(video: str) -> Iterator[Carrier]:
    """A span around a video that an engine is to make; gives what the engine's process needs.

    It is below the span of the request that asked for the video, whose context its task has.
    """
    made = provider()
    if made is None:
        yield {}
        return
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = made.get_tracer(NAME).start_span(
        "magihuman.video", attributes={"magihuman.video": video}
    )
    carrier: Carrier = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    try:
        yield carrier
    finally:
        span.end()


async def below(carrier: Carrier, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """What a generator yields, which runs below the span that the carrier names."""
    async with aclosing(items):
        if provider() is None or not carrier:
            async for item in items:
                yield item
            return
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent: Any = TraceContextTextMapPropagator().extract(carrier)
        while True:
            token = context.attach(parent)  # never across a yield, whose caller has another
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
            finally:
                context.detach(token)
            yield item
