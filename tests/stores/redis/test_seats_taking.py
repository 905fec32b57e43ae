"""seats.py: taking, moving, leaving and restoring, against a real Valkey."""

import asyncio

import pytest
from seat_maps import DEADLINES, FREED, GRACE, INDEX, MAP, Onlooker, deadlines, known, taken
from valkeys import Valkeys

from lesson_server.stores.redis import seat_scripts
from lesson_server.stores.redis.client import RedisStore
from lesson_server.stores.redis.seats import Seats, Taking

RETENTION = 1000


@pytest.fixture
def observed():
    return []


@pytest.fixture
def seats(store, observed):
    return Seats(store, RETENTION, GRACE, observed.append)


@pytest.fixture
def onlooker(redis_client):
    onlooker = Onlooker(redis_client)
    yield onlooker
    onlooker.close()


async def take(seats, person, seat=None, count=3):
    return await seats.take("1", person, seat, count)


@pytest.mark.gen_test
async def test_the_lowest_free_seat_is_taken(seats, redis_client, onlooker, observed):
    await seats.ensure_map("1", 3)
    assert [await take(seats, person) for person in ("anna", "ben")] == [(Taking.TAKEN, 1), (Taking.TAKEN, 2)]
    assert taken(redis_client) == {1: "anna", 2: "ben"}
    assert onlooker.changes(2) == [(1, "anna"), (2, "ben")]
    assert observed == ["taken", "taken"]


@pytest.mark.gen_test
async def test_who_has_a_seat_keeps_it_and_nothing_is_told(seats, redis_client, onlooker, observed):
    await take(seats, "anna", 2)
    assert await take(seats, "anna") == await take(seats, "anna", 2) == (Taking.HELD, 2)
    assert taken(redis_client) == {2: "anna"}
    assert onlooker.changes(1) == [(2, "anna")]
    assert observed == ["taken"]


@pytest.mark.gen_test
async def test_a_move_gives_up_the_first_seat_and_is_two_changes(seats, redis_client, onlooker, observed):
    await take(seats, "anna", 2)
    assert await take(seats, "anna", 3) == (Taking.TAKEN, 3)
    assert taken(redis_client) == {3: "anna"}
    assert onlooker.changes(3) == [(2, "anna"), (2, None), (3, "anna")]
    assert observed == ["taken", "taken"]


@pytest.mark.parametrize(
    ("person", "seat", "outcome"),
    [
        ("ben", 1, Taking.HELD_BY_ANOTHER),
        ("ben", 4, Taking.NO_SUCH_SEAT),
        ("ben", 0, Taking.NO_SUCH_SEAT),
        ("ben", -1, Taking.NO_SUCH_SEAT),
        ("anna", 4, Taking.NO_SUCH_SEAT),
    ],
)
@pytest.mark.gen_test
async def test_a_seat_that_cannot_be_had_changes_nothing(seats, redis_client, onlooker, person, seat, outcome):
    await take(seats, "anna")
    before = redis_client.hgetall(MAP), redis_client.hgetall(INDEX)
    assert await take(seats, person, seat) == (outcome, 0)
    assert (redis_client.hgetall(MAP), redis_client.hgetall(INDEX)) == before
    assert onlooker.changes(1) == [(1, "anna")]


@pytest.mark.gen_test
async def test_a_full_lesson_has_no_seat_until_one_is_left(seats, redis_client):
    for person in ("anna", "ben", "cem"):
        await take(seats, person)
    assert await take(seats, "dora") == (Taking.FULL, 0)
    await seats.leave("1", "ben")
    assert await take(seats, "dora") == (Taking.TAKEN, 2)
    assert taken(redis_client) == {1: "anna", 2: "dora", 3: "cem"}


@pytest.mark.parametrize("seat", [None, 1])
@pytest.mark.gen_test
async def test_a_lesson_without_seats_has_none(seats, redis_client, seat):
    assert await take(seats, "anna", seat, 0) == (Taking.NO_SEATS, 0)
    assert redis_client.keys("lesson_*") == [DEADLINES]


@pytest.mark.gen_test
async def test_a_map_that_redis_has_lost_is_made_again_by_a_take(seats, redis_client):
    assert await take(seats, "anna", 3) == (Taking.TAKEN, 3)
    assert redis_client.hgetall(MAP) == {"1": "", "2": "", "3": "anna"}


@pytest.mark.gen_test
async def test_the_lowest_free_seat_is_found_among_seats_that_were_left_and_seats_that_were_never_taken(
    seats, redis_client
):
    await seats.ensure_map("1", 6)
    for person, seat in (("anna", None), ("ben", None), ("cem", 4), ("dora", 6)):
        await take(seats, person, seat, 6)
    await seats.leave("1", "dora")  # above the mark
    await seats.leave("1", "anna")
    assert redis_client.zrange(FREED, 0, -1) == ["1"]
    got = [(await take(seats, f"p{number}", None, 6))[1] for number in range(4)]
    assert got == [1, 3, 5, 6]
    assert await take(seats, "eve", None, 6) == (Taking.FULL, 0)


@pytest.mark.gen_test
async def test_a_seat_that_was_left_and_taken_by_its_number_is_not_given_twice(seats):
    await take(seats, "anna")
    await take(seats, "ben")
    await seats.leave("1", "anna")
    assert await take(seats, "cem", 1) == (Taking.TAKEN, 1)
    assert await take(seats, "dora") == (Taking.TAKEN, 3)


@pytest.mark.gen_test
async def test_a_grown_lesson_is_not_full(seats):
    for person in ("anna", "ben"):
        await take(seats, person, None, 2)
    assert await take(seats, "cem", None, 2) == (Taking.FULL, 0)
    assert await take(seats, "cem", None, 3) == (Taking.TAKEN, 3)


@pytest.mark.gen_test
async def test_no_take_reads_the_whole_map(seats, redis_client):
    """But the first one on a map that another program has made."""
    await seats.ensure_map("1", 100)
    calls = [
        await _calls(seats, redis_client, f"p{number}", None if number % 3 else 90 - number) for number in range(30)
    ]
    assert max(calls) < 25
    assert redis_client.info("commandstats").get("cmdstat_hgetall") is None


async def _calls(seats, redis_client, person, seat):
    redis_client.config_resetstat()
    await take(seats, person, seat, 100)
    statistics = redis_client.info("commandstats")
    return sum(each["calls"] for name, each in statistics.items() if name.startswith("cmdstat_h") or "z" in name)


@pytest.mark.gen_test
async def test_a_map_of_another_program_is_read_once_and_its_occupants_count(seats, redis_client, onlooker):
    redis_client.hset(MAP, mapping={"1": "anna", "2": "", "3": "ben"})
    assert await take(seats, "ben") == (Taking.HELD, 3)
    assert await take(seats, "cem", 1) == (Taking.HELD_BY_ANOTHER, 0)
    assert await take(seats, "anna", 2) == (Taking.TAKEN, 2)
    assert redis_client.info("commandstats")["cmdstat_hgetall"]["calls"] == 1
    assert taken(redis_client) == {2: "anna", 3: "ben"}
    assert onlooker.changes(2) == [(1, None), (2, "anna")]


@pytest.mark.gen_test
async def test_a_seat_that_another_program_has_freed_is_found_before_anybody_is_refused_for_long(
    seats, redis_client, monkeypatch
):
    for person in ("anna", "ben", "cem"):
        await take(seats, person)
    assert await take(seats, "dora") == (Taking.FULL, 0)  # the whole map was searched
    redis_client.hset(MAP, "1", "")
    assert await take(seats, "dora") == (Taking.FULL, 0)
    mark, searched = redis_client.hget(INDEX, "").split()
    assert mark == "3"
    redis_client.hset(INDEX, "", f"3 {int(searched) - seat_scripts.SEARCH_INTERVAL}")
    assert await take(seats, "dora") == (Taking.TAKEN, 1)


@pytest.mark.gen_test
async def test_a_freed_seat_that_another_program_has_given_away_is_passed_over(seats, redis_client):
    for person in ("anna", "ben"):
        await take(seats, person)
    await seats.leave("1", "anna")
    redis_client.hset(MAP, "1", "somebody")
    assert await take(seats, "cem") == (Taking.TAKEN, 3)
    assert redis_client.zrange(FREED, 0, -1) == []


@pytest.mark.gen_test
async def test_every_write_renews_the_life_of_all_keys(seats, redis_client):
    async def leave(person):
        await seats.leave("1", person)

    for write in (lambda: take(seats, "ben"), lambda: leave("ben"), lambda: seats.restore("1", "cem", 2)):
        for person in ("anna", "dora"):
            await take(seats, person)
        await seats.leave("1", "dora")
        for key in (MAP, INDEX, FREED):
            redis_client.expire(key, 5)
        await write()
        assert [redis_client.ttl(key) for key in (MAP, INDEX)] == [RETENTION, RETENTION]
        assert redis_client.ttl(FREED) in (RETENTION, -2)


@pytest.mark.gen_test
async def test_who_leaves_has_no_seat_any_more_and_may_leave_again(seats, redis_client, onlooker, observed):
    await take(seats, "anna")
    for _ in range(2):
        await seats.leave("1", "anna")
    await seats.leave("1", "nobody")
    assert taken(redis_client) == {}
    assert onlooker.changes(2) == [(1, "anna"), (1, None)]
    assert observed == ["taken", "left"]


@pytest.mark.gen_test
async def test_a_take_lists_its_deadline_before_it_takes(seats, redis_client):
    await take(seats, "anna")
    (seat, due), listed = known(redis_client, "anna"), deadlines(redis_client)["anna"]
    assert seat == 1
    for milliseconds in (due, listed):
        assert 0.9 * GRACE * 1000 < milliseconds <= GRACE * 1000
    assert listed <= due + 1


@pytest.mark.gen_test
async def test_takes_at_once_give_each_seat_to_one_person(seats, redis_client):
    await seats.ensure_map("1", 30)
    outcomes = await asyncio.gather(*(take(seats, f"p{number}", None, 30) for number in range(50)))
    assert sorted(seat for outcome, seat in outcomes if outcome == Taking.TAKEN) == list(range(1, 31))
    assert [outcome for outcome, _ in outcomes].count(Taking.FULL) == 20
    assert len(set(taken(redis_client).values())) == 30


@pytest.mark.gen_test
async def test_a_person_who_takes_many_seats_at_once_ends_with_one(seats, redis_client):
    await asyncio.gather(*(take(seats, "anna", seat, 30) for seat in range(1, 31)))
    assert list(taken(redis_client).values()) == ["anna"]


# After Redis has lost its data


@pytest.mark.gen_test
async def test_a_join_is_told_the_seat_that_the_person_has(seats):
    assert await seats.ensure_map("1", 3, "anna") == 0
    await take(seats, "anna", 2)
    assert await seats.ensure_map("1", 3, "anna") == 2
    assert await seats.ensure_map("1", 3, "ben") == await seats.ensure_map("1", 3) == 0
    await seats.leave("1", "anna")
    assert await seats.ensure_map("1", 3, "anna") == 0


@pytest.mark.gen_test
async def test_a_lost_seat_is_written_again_and_told(seats, redis_client, onlooker, observed):
    await seats.ensure_map("1", 3)
    assert await seats.restore("1", "anna", 2) == 2
    assert taken(redis_client) == {2: "anna"}
    assert known(redis_client, "anna")[0] == 2
    assert deadlines(redis_client).keys() == {"anna"}
    assert onlooker.changes(1) == [(2, "anna")]
    assert observed == ["restored"]
    assert await take(seats, "ben") == (Taking.TAKEN, 1)
    assert await take(seats, "cem") == (Taking.TAKEN, 3)


@pytest.mark.gen_test
async def test_a_seat_is_not_restored_to_who_has_moved_or_left_meanwhile_or_if_somebody_else_has_it(
    seats, redis_client, onlooker
):
    await take(seats, "anna", 2)
    await take(seats, "anna", 3)
    assert await seats.restore("1", "anna", 2) == 3
    await seats.leave("1", "anna")
    assert await seats.restore("1", "anna", 2) == 0
    await take(seats, "ben", 1)
    assert await seats.restore("1", "cem", 1) == 0
    assert taken(redis_client) == {1: "ben"}
    assert onlooker.changes(5)[-1] == (1, "ben")


@pytest.mark.gen_test
async def test_a_seat_whose_map_alone_was_lost_is_written_again(seats, redis_client):
    await take(seats, "anna", 2)
    redis_client.hset(MAP, "2", "")
    assert await seats.restore("1", "anna", 2) == 2
    assert taken(redis_client) == {2: "anna"}


@pytest.mark.gen_test
async def test_a_map_that_is_made_again_begins_with_an_empty_index(seats, redis_client):
    await take(seats, "anna", 2)
    await seats.leave("1", "anna")
    redis_client.delete(MAP)
    await seats.ensure_map("1", 3)
    assert redis_client.hgetall(INDEX) == {"": "0 0"}
    assert redis_client.exists(FREED) == 0


# A Redis before 7


@pytest.fixture
def old_redis(tmp_path):
    valkeys = Valkeys(tmp_path)
    yield valkeys, valkeys.start('rename-command SPUBLISH ""', 'rename-command SSUBSCRIBE ""')
    valkeys.kill_all()


def test_without_sharded_pubsub_the_changes_are_published_all_the_same(io_loop, old_redis):
    valkeys, port = old_redis

    async def story():
        store = RedisStore(f"redis://127.0.0.1:{port}", "", 2.0, 2)
        assert await Seats(store, RETENTION, GRACE).take("1", "anna", None, 3) == (Taking.TAKEN, 1)
        await store.close()

    io_loop.run_sync(story)
    assert "cmdstat_publish" in valkeys.ask(port, "INFO", "commandstats")
