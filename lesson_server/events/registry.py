"""The events that the server answers, and those that it sends; a new event adds one line."""

from lesson_server.events.event import Event, ServerEvent
from lesson_server.events.join_lesson import JOIN_LESSON
from lesson_server.events.leave_seat import LEAVE_SEAT
from lesson_server.events.seat_changed import SEAT_CHANGED
from lesson_server.events.take_seat import TAKE_SEAT

EVENTS: tuple[Event, ...] = (JOIN_LESSON, TAKE_SEAT, LEAVE_SEAT)

SERVER_EVENTS: tuple[ServerEvent, ...] = (SEAT_CHANGED,)
