"""messages.py: the messages between nodes."""

import asyncio

import pytest
from fakes import store_down
from waiting import until

from lesson_server.errors import StoreUnavailable

CHANNEL = "lesson_node_messages"


@pytest.fixture
def nodes(io_loop, start_server):
    nodes = [start_server() for _ in range(2)]
    for node in nodes:
        io_loop.run_sync(node._subscription.ping)
    return nodes


@pytest.fixture
def messages(nodes):
    return [node._removal._messages for node in nodes]


def received(messages, kind):
    boxes = [[] for _ in messages]

    async def receive(box, message):
        box.append(message)

    for each, box in zip(messages, boxes, strict=True):
        each.on(kind, lambda message, box=box: receive(box, message))
    return boxes


async def echoed(nodes):
    await asyncio.gather(*(node._subscription.ping() for node in nodes))


@pytest.mark.gen_test
async def test_a_message_reaches_every_node_with_its_data_also_the_sender(nodes, messages):
    boxes = received(messages, "news")
    await messages[0].publish("news", number=1, text="é\n", nothing=None, items=["a"])
    await echoed(nodes)
    assert boxes == [[{"number": 1, "text": "é\n", "nothing": None, "items": ["a"]}]] * 2


@pytest.mark.gen_test
async def test_messages_arrive_in_order_and_only_at_the_handler_of_their_kind(nodes, messages):
    boxes, others = received(messages, "news"), received(messages, "other")
    for number in range(20):
        await messages[0].publish("news", number=number)
    await messages[1].publish("other")
    await messages[1].publish("a kind without a handler")
    await echoed(nodes)
    assert [[message["number"] for message in box] for box in boxes] == [list(range(20))] * 2
    assert others == [[{}], [{}]]


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "7", "null", '"kind"', "{}", '{"kind": []}', '{"kind": {}}', '{"other": 1}', "\x00"]
)
@pytest.mark.gen_test
async def test_a_foreign_message_is_logged_and_the_next_one_arrives(nodes, messages, redis_client, caplog, text):
    boxes = received(messages, "news")
    assert redis_client.publish(CHANNEL, text) == 2
    await messages[0].publish("news")
    await echoed(nodes)
    assert boxes == [[{}], [{}]]
    assert [record.getMessage() for record in caplog.records] == [f"a message on {CHANNEL} is none of a node's"] * 2


@pytest.mark.gen_test
async def test_a_handler_that_fails_is_logged_and_the_next_message_arrives(nodes, messages, caplog):
    async def defect(message):
        raise LookupError("a defect")

    messages[0].on("news", defect)
    boxes = received(messages, "later")
    await messages[1].publish("news")
    await messages[1].publish("later")
    await until(lambda: all(boxes))
    assert [record.getMessage() for record in caplog.records] == [f"a message on {CHANNEL} could not be handled"]


@pytest.mark.gen_test
async def test_a_message_that_can_not_be_sent_is_an_error_of_the_sender(nodes, messages, monkeypatch):
    asked = []

    async def down(*commands, bookkeeping=()):
        asked.append(commands)
        raise store_down()

    with monkeypatch.context() as patch:
        patch.setattr(nodes[0]._redis, "execute", down)
        with pytest.raises(StoreUnavailable):
            await messages[0].publish("news")
    assert asked


@pytest.fixture
def strangers(start_server):
    return start_server(LESSON_REDIS_KEY_PREFIX="a:"), start_server(LESSON_REDIS_KEY_PREFIX="b:")


@pytest.mark.gen_test
async def test_nodes_with_another_key_prefix_do_not_hear_it(strangers):
    await echoed(strangers)
    messages = [node._removal._messages for node in strangers]
    boxes = received(messages, "news")
    await messages[0].publish("news")
    await echoed(strangers)
    assert boxes == [[{}], []]
