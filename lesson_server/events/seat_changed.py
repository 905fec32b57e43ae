"""``seat_changed``: the server tells everybody in the room of a lesson of each change of its seat map.

The scripts that change the map publish it: ``lesson_server/stores/redis/seat_scripts.py``.

Source: contract, section 12.
"""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from lesson_server.events.event import ServerEvent


class SeatChanged(TypedDict):
    """A seat of the lesson has been taken, or is free again."""

    seat: Annotated[int, Field(description="The number of the seat.", ge=1)]
    client_id: Annotated[str | None, Field(description="Who has the seat now; null: the seat is free.")]


SEAT_CHANGED = ServerEvent("seat_changed", SeatChanged)
