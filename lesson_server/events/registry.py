"""The events that the server answers; a new event adds one line."""

from lesson_server.events.event import Event
from lesson_server.events.join_lesson import JOIN_LESSON
from lesson_server.events.leave_seat import LEAVE_SEAT
from lesson_server.events.take_seat import TAKE_SEAT

EVENTS: tuple[Event, ...] = (JOIN_LESSON, TAKE_SEAT, LEAVE_SEAT)
