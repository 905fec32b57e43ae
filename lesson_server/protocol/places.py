"""Bounded numbers of connections and of Engine.IO sockets."""

from collections.abc import Callable

from lesson_server.errors import ServiceBusy


class Places:
    """A bounded number of places.

    When all are taken, a new connection gets the oldest place that is not kept. So however many clients connect and
    send nothing, the newest ones have time for their handshake.

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
            give_way: ends what has the place, when a newer one needs it.

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
        """Have something else hold the place from now on; ``give_way`` ends it when a newer one needs the place."""
        for places in (self._places.provisional, self._places.kept):
            if self in places:
                places[self] = give_way

    def keep(self) -> None:
        """Give the place to no new connection from now on."""
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
