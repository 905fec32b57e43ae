"""Every route of the HTTP pages."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lesson_server.events.event import Event
from lesson_server.gateway.removal import Removal
from lesson_server.gateway.tracing import Tracing
from lesson_server.http import console, roster, trial
from lesson_server.http.access import Access
from lesson_server.http.api import ApiNotFoundHandler
from lesson_server.http.asyncapi import AsyncApiHandler
from lesson_server.http.openapi import OpenApiHandler
from lesson_server.http.page import PACKAGE
from lesson_server.http.pages import HealthHandler, MetricsHandler, Readiness, ReadyHandler
from lesson_server.http.watch import Watch
from lesson_server.stores.redis.roster import Roster
from lesson_server.tokens import TokenVerifier


@dataclass(frozen=True, slots=True)
class Admin:
    """What the roster API and the console use.

    Attributes:
        access: who may use them.
        roster: reads who is in which lesson.
        removal: removes people from lessons.
        watch: the figures of all nodes.
        tracing: traces connections, for the page ``/try``.
        tokens: mints tokens, for the page ``/try``.
        list_lessons: returns the ids of the lessons in RDS, for the page ``/try``.
        events: the events whose charts are shown.
    """

    access: Access
    roster: Roster
    removal: Removal
    watch: Watch
    tracing: Tracing
    tokens: TokenVerifier
    list_lessons: Callable[[], Awaitable[list[str]]]
    events: Sequence[Event]


def routes(
    readiness: Readiness,
    metrics: Callable[[], bytes],
    admin: Admin | None = None,
    asyncapi: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Return the routes, for a Tornado application.

    Args:
        readiness: the readiness that /readyz reports.
        metrics: returns the text of /metrics.
        admin: None: there is no roster API and no console.
        asyncapi: the document that /asyncapi.json answers with; None: there is none.
    """
    return [
        (r"/healthz", HealthHandler),
        (r"/readyz", ReadyHandler, {"readiness": readiness}),
        (r"/metrics", MetricsHandler, {"text": metrics}),
        *([] if asyncapi is None else [(r"/asyncapi\.json", AsyncApiHandler, {"document": asyncapi})]),
        *([] if admin is None else _admin_routes(admin, readiness)),
    ]


def _admin_routes(admin: Admin, readiness: Readiness) -> list[Any]:
    access = {"access": admin.access}
    api = {**access, "roster": admin.roster, "readiness": readiness, "removal": admin.removal}
    charts = console.charts_of(admin.events)
    return [
        (r"/api/overview", roster.OverviewHandler, api),
        (r"/api/lessons", roster.LessonsHandler, api),
        (r"/api/lessons/([^/]+)", roster.LessonHandler, api),
        (r"/api/lessons/([^/]+)/(teachers|participants)/([^/]+)", roster.PersonHandler, api),
        (r"/api(?:/.*)?", ApiNotFoundHandler, access),
        (r"/openapi\.json", OpenApiHandler, access),
        (r"/", console.RootHandler, access),
        (r"/console/?", console.ConsoleHandler, {**access, "charts": charts}),
        (r"/console/lessons/([^/]+)", console.LessonPageHandler, access),
        (r"/console/events", console.EventsHandler, {**access, "watch": admin.watch, "roster": admin.roster}),
        (r"/console/charts/([a-z_]+)/([a-z_]+)\.svg", console.ChartHandler, access),
        (r"/console/login", console.LoginHandler, access),
        (r"/console/logout", console.LogoutHandler, access),
        (r"/console/static/([a-z_.]+)", console.AssetHandler, {**access, "path": str(PACKAGE.joinpath("static"))}),
        *(_trial_routes(admin, access, charts) if admin.access.is_open else []),
    ]


def _trial_routes(admin: Admin, access: dict[str, Access], charts: list[dict[str, Any]]) -> list[Any]:
    page = {**access, "charts": charts, "list_lessons": admin.list_lessons}
    return [
        (r"/try", trial.TrialPageHandler, page),
        (r"/try/token", trial.TrialTokenHandler, {**access, "tokens": admin.tokens}),
        (r"/try/steps", trial.TrialStepsHandler, {**access, "tracing": admin.tracing}),
        (r"/try/socket\.io\.esm\.min\.js", trial.TrialClientHandler, access),
    ]
