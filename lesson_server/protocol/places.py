"""Limits on the numbers of connections and Engine.IO sockets."""

from collections.abc import Callable

from lesson_server.errors import ServiceBusy


class Places:
    """A fixed number of places, each held by one connection or one Engine.IO socket.

    When all places are taken, a new holder evicts the holder of the oldest place that is not kept. So however many
    clients connect and send nothing, the newest clients have time for their handshake.

    Args:
        limit: the number of places.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Oldest first, each with the callback that ends its holder.
        self.provisional: dict[Place, Callable[[], object]] = {}
        self.kept: dict[Place, Callable[[], object]] = {}

    def __len__(self) -> int:
        return len(self.provisional) + len(self.kept)

    def take(self, on_evicted: Callable[[], object]) -> "Place":
        """Take a place.

        Args:
            on_evicted: ends the holder when a newer holder evicts it.

        Raises:
            ServiceBusy: all places are kept.
        """
        if len(self) >= self._limit:
            if not self.provisional:
                raise ServiceBusy
            oldest = next(iter(self.provisional))
            self.provisional.pop(oldest)()
        place = Place(self)
        self.provisional[place] = on_evicted
        return place


class Place:
    """One of the :class:`Places`, from :meth:`Places.take` to :meth:`free` or an eviction; later calls do nothing."""

    __slots__ = ("_places",)

    def __init__(self, places: Places) -> None:
        self._places = places

    def transfer(self, on_evicted: Callable[[], object]) -> None:
        """Transfer the place to another holder, which ``on_evicted`` ends when a newer holder evicts it."""
        for places in (self._places.provisional, self._places.kept):
            if self in places:
                places[self] = on_evicted

    def keep(self) -> None:
        """Prevent eviction from now on."""
        self._move(self._places.provisional, self._places.kept)

    def allow_eviction(self) -> None:
        """Allow eviction again, after the places that are not kept at this moment."""
        self._move(self._places.kept, self._places.provisional)

    def _move(
        self, origin: "dict[Place, Callable[[], object]]", destination: "dict[Place, Callable[[], object]]"
    ) -> None:
        if self in origin:
            destination[self] = origin.pop(self)

    def free(self) -> None:
        """Free the place."""
        self._places.provisional.pop(self, None)
        self._places.kept.pop(self, None)
