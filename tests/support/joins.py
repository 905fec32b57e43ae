"""The join of a connection, which the tests look at and drive."""

from lesson_server.events.connection import Connection
from lesson_server.events.join_lesson import JOIN_LESSON, Join


def join_of(connection: Connection) -> Join:
    region = connection.region(JOIN_LESSON.regions[connection.handshake.client])
    assert isinstance(region, Join)
    return region
