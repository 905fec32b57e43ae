"""Bounded numbers of sockets and sessions: however many clients come, the newest have time to say what they want."""

from collections.abc import Callable

from lesson_server.errors import ServiceBusy


class Places:
    """A bounded number of places.

    When all are taken, a newcomer gets the one that was taken first of those that are not kept: however many come and
    say nothing, whoever has just come has time to say what it wants.

    Args:
        limit: how many there are.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # In the order in which they were taken, with what ends those that have them.
        self.provisional: dict[Place, Callable[[], object]] = {}
        self.kept: dict[Place, Callable[[], object]] = {}

    def __len__(self) -> int:
        return len(self.provisional) + len(self.kept)

    def take(self, give_way: Callable[[], object]) -> "Place":
        """Take a place.

        Args:
            give_way: ends what has the place, when a newcomer needs it.

        Raises:
            ServiceBusy: all are kept.
        """
        if len(self) >= self._limit:
            if not self.provisional:
                raise ServiceBusy
            oldest = next(iter(self.provisional))
            self.provisional.pop(oldest)()
        place = Place(self)
        self.provisional[place] = give_way
        return place


class Place:
    """One of the :class:`Places`, from :meth:`Places.take` to :meth:`leave`. Later calls do nothing."""

    __slots__ = ("_places",)

    def __init__(self, places: Places) -> None:
        self._places = places

    def hand_over(self, give_way: Callable[[], object]) -> None:
        """Something else has the place from now on, which a newcomer ends by this."""
        for places in (self._places.provisional, self._places.kept):
            if self in places:
                places[self] = give_way

    def keep(self) -> None:
        """No newcomer gets the place from now on."""
        self._move(self._places.provisional, self._places.kept)

    def release(self) -> None:
        """Let a new connection have the place again, after those that are not kept at this moment."""
        self._move(self._places.kept, self._places.provisional)

    def _move(
        self, origin: "dict[Place, Callable[[], object]]", destination: "dict[Place, Callable[[], object]]"
    ) -> None:
        if self in origin:
            destination[self] = origin.pop(self)

    def leave(self) -> None:
        """Free the place."""
        self._places.provisional.pop(self, None)
        self._places.kept.pop(self, None)
