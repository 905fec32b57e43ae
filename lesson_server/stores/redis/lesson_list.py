"""Redis: the list of the lessons in which somebody is, ``lesson_node_lessons``.

A sorted set whose scores are all 0, so that its order is that of the lesson ids. A lesson is added with each write of a
record, and removed when its last record has been removed. The list may be behind the records after an outage; each
check of the records adds their lessons again, and a reader removes the empty lessons that it finds.
"""

from collections.abc import Iterable, Sequence

from lesson_server.stores.redis import keys
from lesson_server.stores.redis.store import Command, Store


class LessonList:
    """The list of the lessons in which somebody is.

    Args:
        store: the connection to Redis.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def addition(self, lesson_ids: Iterable[str]) -> Command:
        """Return the command that adds lessons, of which there is at least one."""
        return ("ZADD", self._key, *(word for lesson_id in lesson_ids for word in (0, lesson_id)))

    async def page(self, after: str | None, limit: int) -> list[str]:
        """Return the lessons that follow ``after``, in the order of their ids.

        Args:
            after: a lesson id; None: from the first lesson on.
            limit: the maximum number of lessons.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        start = "-" if after is None else f"({after}"
        (lesson_ids,) = await self._store.execute(("ZRANGEBYLEX", self._key, start, "+", "LIMIT", 0, limit))
        return list(lesson_ids)

    async def remove_empty(self, lesson_ids: Sequence[str]) -> None:
        """Remove those of the lessons in which nobody is.

        Raises:
            StoreUnavailable: Redis failed or was too slow.
        """
        empty = await self._empty(lesson_ids)
        if not empty:
            return
        await self._store.execute(("ZREM", self._key, *empty))
        # Somebody may have joined between the check and the removal. A join adds its lesson first, so whoever joins
        # after this second check is in the list.
        again = sorted(set(empty) - set(await self._empty(empty)))
        if again:
            await self._store.execute(self.addition(again))

    async def _empty(self, lesson_ids: Sequence[str]) -> list[str]:
        answers = await self._store.execute(
            *(
                ("EXISTS", self._store.key(name))
                for lesson_id in lesson_ids
                for name in (keys.teachers(lesson_id), keys.students(lesson_id))
            )
        )
        pairs = zip(answers[::2], answers[1::2], strict=True)
        return [lesson_id for lesson_id, found in zip(lesson_ids, pairs, strict=True) if not any(found)]

    @property
    def _key(self) -> str:
        return self._store.key(keys.LESSONS)
