"""What must be true of the seats and of the answers after all has settled: contract, section 12. See explorer.py."""

from collections.abc import Iterator

from explorer_rules import UNAVAILABLE, is_live
from explorer_scenarios import Tab, tab_of
from explorer_world import Begun, World

from lesson_server.events.take_seat import LessonHasNoSeats, LessonIsFull, NoSuchSeat, NotJoined, SeatIsTaken
from lesson_server.gateway.handlers import Answer
from lesson_server.stores.redis.seats import Taking


def seat_violations(world: World) -> list[str]:
    """Everything that is wrong with the seats after all has settled."""
    return [*_answers(world), *_holders(world), *_lost_seats(world)]


def _answers(world: World) -> Iterator[str]:
    """Each event is answered, with what the script has answered."""
    for begun in world.begun:
        verb, who = begun.event
        tab = world.tabs.get(tab_of(who))
        if verb not in ("take", "leave_seat") or not world.members[tab.node].alive:
            continue
        answer = begun.task.result()
        allowed = [UNAVAILABLE] if world.injected else []
        if tab.sid in world.left:
            allowed.append(None)
        if not _has_joined_before(world, begun, tab):
            allowed.append(_refused(NotJoined()))
        allowed.append(_told(world, begun) if verb == "take" else {"status": "SUCCESS", "data": {}})
        if answer not in allowed:
            yield f"{begun.label} was answered {answer}"


def _told(world: World, begun: Begun) -> Answer | None:
    outcome, seat = world.seats.outcomes.get(begun.label.strip("()"), (None, 0))
    _, _, wanted = begun.event[1].partition("@")
    match outcome:
        case Taking.TAKEN | Taking.HELD:
            return {"status": "SUCCESS", "data": {"seat": seat}}
        case Taking.FULL:
            return _refused(LessonIsFull())
        case Taking.NO_SEATS:
            return _refused(LessonHasNoSeats())
        case Taking.NO_SUCH_SEAT:
            return _refused(NoSuchSeat(seat=wanted))
        case Taking.HELD_BY_ANOTHER:
            return _refused(SeatIsTaken(seat=wanted))
    return None


def _refused(refusal: Exception) -> Answer:
    return {"status": "ERROR", "message": str(refusal)}


def _has_joined_before(world: World, begun: Begun, tab: Tab) -> bool:
    """Whether the tab had joined before anything of the schedule was chosen."""
    return any(other.event == ("join", tab.sid) and other.label.startswith("(") for other in world.begun)


def _holders(world: World) -> Iterator[str]:
    """Seats are held by those who are there, and by nobody who is not; nothing is left that has a deadline."""
    for lesson_id, seats in world.seats.maps.items():
        live = {tab.subject for tab in world.tabs.values() if tab.lesson_id == lesson_id and is_live(world, tab)}
        for seat, person in seats.items():
            if person not in live:
                yield f"lesson {lesson_id}: seat {seat} is kept for {person}, who is not there"
        for known in set(world.redis.hkeys(f"lesson_node_seats:{{lesson_seat_{lesson_id}}}")) - {"", *live}:
            yield f"lesson {lesson_id}: the index knows {known!r}, who is not there"
        for seat, holder in world.seats.told[lesson_id].items():
            if holder in live and seats.get(seat) != holder:
                yield f"lesson {lesson_id}: {holder} was told to have seat {seat}, and it is {seats.get(seat)}'s"


def _lost_seats(world: World) -> Iterator[str]:
    """After FLUSHALL the seats of those who were there and still are have been written again."""
    for lesson_id, seats in world.seats.lost.items():
        for seat, person in seats.items():
            tabs = (tab for tab in world.tabs.values() if (tab.lesson_id, tab.subject) == (lesson_id, person))
            if any(tab.sid in world.seats.joined_before and is_live(world, tab) for tab in tabs):
                found = world.seats.maps[lesson_id].get(seat)
                if found != person:
                    yield f"lesson {lesson_id}: seat {seat} of {person} was lost, and is {found}'s now"
