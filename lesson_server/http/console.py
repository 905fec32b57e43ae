"""The console: pages for operators, live by server-sent events (contract, section 11)."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from tornado.web import HTTPError, StaticFileHandler

from lesson_server.errors import StoreUnavailable
from lesson_server.events.event import Event
from lesson_server.http.access import Access, require_same_origin
from lesson_server.http.page import LOGIN_PATH, PageHandler
from lesson_server.http.roster import formatted, participant, summary, teacher
from lesson_server.http.stream import StreamHandler
from lesson_server.http.watch import Watch
from lesson_server.stores.rds.lesson import LESSON_ID
from lesson_server.stores.redis.roster import LessonCounts, Roster

# Lessons, and participants of a lesson, on a page of the console.
LESSONS_ON_PAGE = 50
PEOPLE_ON_PAGE = 100
# Seconds between two reads of a lesson, and between two looks at what the nodes have told, which may be a second old.
READ_INTERVAL = 1.0
LOOK_INTERVAL = 0.5
SORT_KEYS = ("lesson_id", "teachers", "participants", "guests", "seats", "taken")


def charts_of(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the charts of events, as the templates show them."""
    return [
        {"event": event.name, "client": client, "sentences": dict(cls.CHART.STATES)}
        for event in events
        for client, cls in sorted(event.regions.items())
    ]


class RootHandler(PageHandler):
    """Leads from ``/`` to the console, when it is on."""

    async def prepare(self) -> None:
        self.access.require_on(self.request)

    def get(self) -> None:
        self.redirect("/console", status=HTTPStatus.FOUND)


class ConsoleHandler(PageHandler):
    """The overview."""

    def initialize(self, access: Access, charts: list[dict[str, Any]]) -> None:  # type: ignore[override]
        super().initialize(access)
        self.charts = charts

    def get(self) -> None:
        self.show("console.html", charts=self.charts, login_required=self.access.needs_login)


class LessonPageHandler(PageHandler):
    """One lesson."""

    def get(self, lesson_id: str) -> None:
        if LESSON_ID.fullmatch(lesson_id) is None:
            raise HTTPError(404)
        self.show("lesson.html", lesson_id=lesson_id, login_required=self.access.needs_login)


class LoginHandler(PageHandler):
    """The login with the admin token."""

    async def prepare(self) -> None:
        self.access.require_on(self.request)
        require_same_origin(self.request)

    async def get(self) -> None:
        if await self.access.has_session(self):
            self.redirect("/console", status=HTTPStatus.SEE_OTHER)
        else:
            self.show("login.html", error="")

    async def post(self) -> None:
        if await self.access.login(self, self.get_body_argument("token", "")):
            self.redirect("/console", status=HTTPStatus.SEE_OTHER)
        else:
            self.set_status(HTTPStatus.UNAUTHORIZED)
            self.show("login.html", error="This is not the admin token.")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == HTTPStatus.TOO_MANY_REQUESTS:
            self.set_header("Retry-After", "60")
            self.show("login.html", error="Too many failed tries. Try again in a minute.")
        else:
            super().write_error(status_code, **kwargs)


class LogoutHandler(PageHandler):
    """The logout."""

    async def post(self) -> None:
        await self.access.logout(self)
        self.redirect(LOGIN_PATH, status=HTTPStatus.SEE_OTHER)


class ChartHandler(PageHandler):
    """The drawing of a statechart."""

    def get(self, event: str, client: str) -> None:
        path = files("statecharts").joinpath("diagrams", event, f"{client}.svg")
        if not path.is_file():
            raise HTTPError(404)
        self.set_header("Content-Type", "image/svg+xml")
        self.finish(path.read_bytes())


class AssetHandler(StaticFileHandler):
    """Scripts, styles and pictures of the console. They are not secret: the login page needs some."""

    # As for pages: the headers also with errors, and no URL in the log.
    set_default_headers = PageHandler.set_default_headers
    write_error = PageHandler.write_error
    log_exception = PageHandler.log_exception

    def initialize(self, path: str, access: Access) -> None:  # type: ignore[override]
        super().initialize(path)
        self._access = access

    def prepare(self) -> None:
        self._access.require_on(self.request)

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Cache-Control", "no-cache")  # an upgrade shows at once; the ETag saves the transfer


class EventsHandler(StreamHandler):
    """What the overview or the page of a lesson shows, live."""

    def initialize(self, access: Access, watch: Watch, roster: Roster) -> None:  # type: ignore[override]
        super().initialize(access)
        self.watch = watch
        self.roster = roster

    async def get(self) -> None:
        lesson_id = self.get_query_argument("lesson", None)
        page = self._page()
        if lesson_id is None:
            sort = self.get_query_argument("sort", SORT_KEYS[0])
            order = self.get_query_argument("order", "asc")
            if sort not in SORT_KEYS or order not in ("asc", "desc"):
                raise HTTPError(400)
            search = self.get_query_argument("search", "")
            await self.serve(self._overview(search, sort, order == "desc", page), only_changes=True)
        elif LESSON_ID.fullmatch(lesson_id):
            await self.serve(self._lesson(lesson_id, page), only_changes=True)
        else:
            raise HTTPError(400)

    def _page(self) -> int:
        text = self.get_query_argument("page", "1")
        if re.fullmatch(r"[1-9][0-9]{0,5}", text) is None:
            raise HTTPError(400)
        return int(text)

    async def _overview(self, search: str, sort: str, descending: bool, page: int) -> AsyncIterator[Any]:
        with self.watch.looking():
            await self.watch.is_current.wait()
            while await self._may_go_on():
                yield "overview", self.watch.overview()
                yield "lessons", lessons_page(self.watch.lessons, self.watch.guests(), search, sort, descending, page)
                yield None
                await asyncio.sleep(LOOK_INTERVAL)

    async def _lesson(self, lesson_id: str, page: int) -> AsyncIterator[Any]:
        with self.watch.looking():
            while await self._may_go_on():
                with contextlib.suppress(StoreUnavailable):  # the page shows that nothing arrives any more
                    yield "lesson", await self._read_lesson(lesson_id, page)
                yield None
                await asyncio.sleep(READ_INTERVAL)

    async def _may_go_on(self) -> bool:
        """Return whether the session has not ended; while Redis, which has the sessions, is down, it goes on."""
        if "Authorization" in self.request.headers:
            return True  # a token, checked at the beginning, does not end
        try:
            return await self.access.has_session(self)
        except StoreUnavailable:
            return True

    async def _read_lesson(self, lesson_id: str, page: int) -> dict[str, Any]:
        found = await self.roster.lesson(lesson_id)
        people = [] if found is None else found.participants
        seats = {} if found is None else found.seats
        present = {person.id for person in people}
        pages = max(-(-len(people) // PEOPLE_ON_PAGE), 1)
        page = min(page, pages)
        return {
            "lesson_id": lesson_id,
            "found": found is not None,
            "guests": self.watch.guests().get(lesson_id, 0),
            "total": len(people),
            "page": page,
            "pages": pages,
            "seats": seats,
            # The seats that are kept for those who have gone, for the grace.
            "away": [seat for seat, occupant in seats.items() if occupant and occupant not in present],
            "teachers": [] if found is None else await formatted(found.teachers, teacher),
            "participants": await formatted(people[(page - 1) * PEOPLE_ON_PAGE :][:PEOPLE_ON_PAGE], participant),
        }


def lessons_page(
    lessons: list[LessonCounts], guests: dict[str, int], search: str, sort: str, descending: bool, page: int
) -> dict[str, Any]:
    """Return a page of the lessons whose id contains ``search``, sorted.

    Args:
        lessons: the lessons in which somebody is; lessons in which only guests are have no counts in Redis.
        guests: the number of guests by lesson.
        search: part of a lesson id, in any case.
        sort: one of SORT_KEYS.
        descending: whether the largest comes first.
        page: from 1.
    """
    counted = {lesson.lesson_id for lesson in lessons}
    all_lessons = [
        *({**summary(lesson), "guests": guests.get(lesson.lesson_id, 0)} for lesson in lessons),
        *(
            {**summary(LessonCounts(lesson_id, 0, 0, 0, 0)), "guests": count}
            for lesson_id, count in guests.items()
            if lesson_id not in counted
        ),
    ]
    found = [lesson for lesson in all_lessons if search.lower() in str(lesson["lesson_id"]).lower()]
    found.sort(key=lambda lesson: _natural(str(lesson["lesson_id"])))
    if sort != "lesson_id":
        found.sort(key=lambda lesson: int(lesson[sort]), reverse=descending)  # type: ignore[call-overload]
    elif descending:
        found.reverse()
    pages = max(-(-len(found) // LESSONS_ON_PAGE), 1)
    page = min(page, pages)
    return {
        "total": len(found),
        "page": page,
        "pages": pages,
        "lessons": found[(page - 1) * LESSONS_ON_PAGE :][:LESSONS_ON_PAGE],
    }


def _natural(lesson_id: str) -> tuple[tuple[int, str], ...]:
    """Return a key by which 9 comes before 10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", lesson_id))
