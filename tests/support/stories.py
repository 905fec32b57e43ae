"""Each kind of join, and what it does when nothing goes wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fakes import World

from lesson_server.events.event import Event
from lesson_server.events.registry import EVENTS

SUCCESS = {"status": "SUCCESS", "data": {}}

UNAVAILABLE = {"status": "ERROR", "message": "the lesson service is unavailable, try again"}

SEATS = {"1": "", "2": "", "3": ""}

TO_SEATED = [
    "lessons.get",
    "sockets.enter_room",
    "sockets.get_session",
    "sockets.save_session",
    "seats.ensure_map",
]


@dataclass(frozen=True)
class Story:
    """Who joins, and what a join that meets no fault does.

    ``arrows`` are the calls to the services, in order; ``session`` and ``hashes`` what they leave behind.
    """

    auth: dict[str, object]
    arrows: list[str]
    state: str
    session: dict[str, object]
    hashes: dict[str, dict[str, str]]
    before: dict[str, dict[str, str]] = field(default_factory=dict)
    reconnects: list[tuple[str, str, str, str]] = field(default_factory=list)
    trust_teacher_user_id: bool = False

    def world(self, events: Sequence[Event] = EVENTS) -> World:
        world = World(trust_teacher_user_id=self.trust_teacher_user_id, events=events)
        for key, fields in self.before.items():
            world.redis.hset(key, fields)
        return world


PARTICIPANT = Story(
    auth={"client": "participant", "lesson_id": "1", "access_token": "student:p-1"},
    arrows=[*TO_SEATED, "sockets.save_session #2", "presence.write"],
    state="registered",
    session={"seat": 3, "client_id": "p-1", "role": "student"},
    hashes={
        "lesson_seat_1": SEATS,
        "p-1": {"sid": "sid", "client_id": "p-1", "role": "student"},
        "lesson_student_1": {"p-1": "sid"},
    },
)

TEACHER = Story(
    auth={"client": "teacher", "lesson_id": "1", "access_token": "teacher:t-1"},
    arrows=[*TO_SEATED, "presence.write"],
    state="registered",
    session={"seat": 3},
    hashes={"lesson_seat_1": SEATS, "lesson_teacher_1": {"t-1": "sid"}, "t-1": {"lesson_id": "1"}},
)

STORIES = {
    "teacher": TEACHER,
    "trusted-teacher": Story(
        auth={"client": "teacher", "lesson_id": 1, "user_id": "t-1", "access_token": "expired"},
        arrows=TEACHER.arrows,
        state=TEACHER.state,
        session=TEACHER.session,
        hashes=TEACHER.hashes,
        trust_teacher_user_id=True,
    ),
    "participant": PARTICIPANT,
    "returning-participant": Story(
        auth=PARTICIPANT.auth,
        arrows=PARTICIPANT.arrows,
        state=PARTICIPANT.state,
        session=PARTICIPANT.session,
        hashes=PARTICIPANT.hashes,
        before={"p-1": {"sid": "sid-of-yesterday", "client_id": "p-1", "role": "student"}},
        reconnects=[("p-1", "sid", "1", "student")],
    ),
    "guest": Story(
        auth={"client": "participant", "lesson_id": "1"},
        arrows=TO_SEATED,
        state="seated",
        session={"seat": 3},
        hashes={"lesson_seat_1": SEATS},
    ),
    "guest-of-a-lesson-without-seats": Story(
        auth={"client": "participant", "lesson_id": "0", "access_token": None},
        arrows=TO_SEATED[:-1],
        state="seated",
        session={},
        hashes={},
    ),
}
