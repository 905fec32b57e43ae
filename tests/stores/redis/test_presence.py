"""presence.py against a real Valkey. ``redis_client.keys()`` are those of the diagrams, without the server's own."""

import pytest
from presences import CLIENT, DAY, RECORDS, RETENTION, TEACHER, other, own_keys

from lesson_server.stores.redis.records import decode, encode


@pytest.mark.gen_test
async def test_a_teacher_stands_in_both_records_with_the_lives_of_the_contract(presence, redis_client):
    await presence.write(TEACHER)
    assert redis_client.hgetall("lesson_teacher_1") == {"ms-hill": "sid-t"}
    assert redis_client.hgetall("ms-hill") == {"lesson_id": "1"}
    assert redis_client.ttl("lesson_teacher_1") == DAY
    assert redis_client.ttl("ms-hill") == RETENTION


@pytest.mark.gen_test
async def test_a_participant_stands_in_both_records_with_the_lives_of_the_contract(presence, redis_client):
    await presence.write(CLIENT)
    assert redis_client.hgetall("lesson_student_1") == {"p1": "sid-p"}
    assert redis_client.hgetall("p1") == {"sid": "sid-p", "client_id": "p1", "role": "student"}
    assert redis_client.ttl("lesson_student_1") == RETENTION
    assert redis_client.ttl("p1") == DAY


@RECORDS
def test_what_the_server_adds_of_its_own_lives_as_long_as_the_record(io_loop, presence, redis_client, record):
    io_loop.run_sync(lambda: presence.write(record))
    claims = [key for key in own_keys(redis_client) if "claims" in key]
    assert len(claims) == 2
    for key in claims:
        entry = key.partition("{")[2].removesuffix("}")
        assert redis_client.ttl(key) == redis_client.ttl(entry)


@RECORDS
def test_each_write_renews_the_ttl(io_loop, presence, elsewhere, redis_client, record):
    io_loop.run_sync(lambda: presence.write(record))
    before = {key: redis_client.ttl(key) for key in redis_client.keys("*")}
    for key in redis_client.keys("*") + own_keys(redis_client):
        redis_client.expire(key, 10)
    io_loop.run_sync(lambda: elsewhere.write(other(record, "new")))
    assert {key: redis_client.ttl(key) for key in redis_client.keys("*")} == before


@pytest.mark.gen_test
async def test_the_index_and_the_count_of_the_node_are_written_with_the_record(presence, redis_client):
    node_id = presence.claims.incarnation.node_id
    await presence.write(TEACHER)
    await presence.write(CLIENT)
    assert list(map(decode, redis_client.hvals(f"lesson_node_{node_id}"))) == [TEACHER, CLIENT]
    assert redis_client.hgetall("lesson_node_counts") == {node_id: "2"}
    assert presence.claims.incarnation.acknowledged == 2


@RECORDS
def test_a_record_is_the_same_when_it_has_been_in_the_index(record):
    assert decode(encode(record).decode()) == record


def test_nodes_of_another_version_find_what_they_know_in_the_index():
    assert encode(TEACHER) == b'["teacher","sid-t","1","ms-hill"]'
    assert encode(CLIENT) == b'["participant","sid-p","1","p1","student"]'
