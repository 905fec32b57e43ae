"""The events that the server answers; a new event adds one line."""

from lesson_server.events.event import Event
from lesson_server.events.join_lesson import JOIN_LESSON

EVENTS: tuple[Event, ...] = (JOIN_LESSON,)
