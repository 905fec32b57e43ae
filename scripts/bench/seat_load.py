"""The load of the seats: people of one lesson, on one or more nodes, who take, change and leave seats all at once.

Every client must see the same changes in the same order: the changes that the first client has seen are kept, and those
of all others are compared with them as they arrive. With the attempts and their answers, the changes are the history
that seat_history.py checks.
"""

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import jwt
from load_generator import JOINED, TOKEN_TTL, Client, Load, execute_commands, frame
from seat_history import ANY, FULL, LEAVE, Attempt, Change, WrongHistory, check_changes, check_history

EVENT, CHANGED, END = b"42", b'42["seat_changed",', b'42["end"]'
ACK = b"431["

# In each cycle of a storm, people first want seats, and then hardly anybody does: without these times, no seat of many
# people would ever be free for long.
CYCLE, FILLING = 8, 5
# What people want at these times: the weights of a seat number, ANY and LEAVE, with a seat and without one.
FILLING_WEIGHTS = {True: (30, 20, 50), False: (40, 55, 5)}
EMPTYING_WEIGHTS = {True: (40, 5, 55), False: (10, 4, 86)}


class LostClient(Exception):
    """The server has closed the connection of a client."""


Wish = Callable[[int], int]  # the seat that a person has → what the person wants next


def storm_of(number: int, seed: int, seat_count: int) -> Iterator[Wish]:
    """Yield the wishes of a person in a storm."""
    choose = random.Random(f"{seed} {number}")
    for attempt in count():
        weights = FILLING_WEIGHTS if attempt % CYCLE < FILLING else EMPTYING_WEIGHTS

        def wish(held: int, weights: dict[bool, tuple[int, int, int]] = weights) -> int:
            return choose.choices((choose.randint(1, seat_count), ANY, LEAVE), weights[held > 0])[0]

        yield wish


def turns() -> Iterator[Wish]:
    """Yield the wishes of a person who takes and leaves a seat in turn: each attempt is one change."""
    while True:
        yield lambda held: LEAVE if held else ANY


class SeatLoad(Load):
    """People in one lesson.

    Args:
        ports: the ports of the nodes; the clients are distributed over the nodes.
        key: signs the access tokens.
        lesson_id: the lesson.
        seat_count: the number of its seats.
        people: the number of people, if several clients are one person; None: each client is a person.
    """

    COMMANDS = (*Load.COMMANDS, "storm", "take_turns", "finish", "check")

    def __init__(
        self, ports: Sequence[int], key: str, lesson_id: str, seat_count: int, people: int | None = None
    ) -> None:
        super().__init__("127.0.0.1", ports[0], key)
        self._ports = ports
        self._lesson_id = lesson_id
        self._seat_count = seat_count
        self._people = people
        self._changes: list[bytes] = []
        self._first_seen: list[float] = []
        self._seen = Counter[int]()  # client → the number of changes that it has seen
        self._ended: set[int] = set()
        self._attempts: list[Attempt] = []
        self._left = Counter[int]()  # client → the attempts that are left
        self._wishes: dict[int, Iterator[Wish]] = {}
        self._held = Counter[int]()  # client → the seat, according to the answers
        self._moves = 0
        self._running: dict[int, tuple[int, float]] = {}  # client → what it wants, since when

    # Commands

    def prepare(self, first: int, count: int) -> dict[str, Any]:
        """Mint the tokens of the people ``p0``, ``p1`` and so on."""
        for number in range(first, first + count):
            claims = {"sub": self._person(number), "role": "student", "exp": int(time.time()) + TOKEN_TTL}
            token = jwt.encode(claims, self._key, "HS256")
            auth = {"client": "participant", "lesson_id": self._lesson_id, "access_token": token}
            self._handshakes[number] = frame(b"40" + json.dumps(auth).encode())
        return {}

    def storm(self, attempts: int, seed: int = 1, clients: int | None = None) -> dict[str, Any]:
        """Let the first clients, or all, attempt at once.

        Args:
            attempts: the number of attempts of each client; the next one follows the last answer.
            seed: the seed of the wishes.
            clients: the number of clients; the others only see the changes.
        """
        numbers = range(len(self._clients) if clients is None else clients)
        return self._attempt({number: storm_of(number, seed, self._seat_count) for number in numbers}, attempts)

    def take_turns(self, clients: int, attempts: int) -> dict[str, Any]:
        """Let the first clients take and leave seats, each this number of times; the others only see the changes."""
        return self._attempt({number: turns() for number in range(clients)}, attempts)

    def finish(self) -> dict[str, Any]:
        """Wait until each client has received the event ``end``, which is sent after the last change."""
        return self._phase(0, lambda: None, more=lambda: len(self._ended) < len(self._clients))

    def check(self) -> dict[str, Any]:
        """Check the history after :meth:`finish`.

        If a person has several clients, only the changes are checked: the order of the person's attempts is unknown.

        Returns:
            the holders of the seats, the numbers of changes and of moves, and how often what was wanted and refused.

        Raises:
            WrongHistory: the history is wrong.
        """
        for client in self._clients.values():
            if self._seen[client.number] != len(self._changes):
                raise WrongHistory(
                    f"client {client.number} saw {self._seen[client.number]} of {len(self._changes)} changes"
                )
        history = list(self._history())
        if self._people is None:
            seats = check_history(self._attempts, history, self._seat_count)
        else:
            seats = check_changes(history, self._seat_count)
        wanted = Counter({ANY: "any", LEAVE: "leave"}.get(attempt.wanted, "number") for attempt in self._attempts)
        refused = Counter(
            "full" if attempt.refusal == FULL else "taken" for attempt in self._attempts if attempt.refusal
        )
        return {"seats": seats, "changes": len(history), "moves": self._moves, "wanted": wanted, "refused": refused}

    def _history(self) -> Iterator[Change]:
        for text, seen in zip(self._changes, self._first_seen, strict=True):
            _, change = json.loads(text[2:])
            yield Change(change["seat"], change["client_id"], seen)

    def _attempt(self, wishes: dict[int, Iterator[Wish]], attempts: int) -> dict[str, Any]:
        first = len(self._attempts)
        self._wishes = wishes
        waiting = [client for client in self._clients.values() if client.number in wishes]
        self._left = Counter(dict.fromkeys(wishes, attempts))

        def begin() -> None:
            while waiting:
                self._next(waiting.pop())

        phase = self._phase(attempts * len(wishes), begin)
        times = [attempt.ended - attempt.began for attempt in self._attempts[first:]]
        return {**phase, "ack_ms": [round(seconds * 1000, 3) for seconds in times]}

    def _person(self, number: int) -> str:
        return f"p{number if self._people is None else number % self._people}"

    # A client

    def _open(self, number: int, goal: int) -> Client:
        self._address = "127.0.0.1", self._ports[number % len(self._ports)]
        return super()._open(number, goal)

    def _packet(self, client: Client, packet: bytes) -> None:
        if packet.startswith(EVENT):
            self._see(client, packet)
        elif packet.startswith(ACK):
            self._answer(client, packet)
        else:
            super()._packet(client, packet)

    def _lose(self, client: Client, why: str) -> None:
        if client.state == JOINED:
            raise LostClient(f"client {client.number}: {why}")
        super()._lose(client, why)

    def _see(self, client: Client, packet: bytes) -> None:
        number = client.number
        if packet.startswith(CHANGED):
            position = self._seen[number]
            self._seen[number] = position + 1
            if position == len(self._changes):
                self._changes.append(packet)
                self._first_seen.append(time.perf_counter())
            elif packet != self._changes[position]:
                raise WrongHistory(
                    f"change {position}: client {number} saw {packet!r}, not {self._changes[position]!r}"
                )
        else:
            assert packet == END, packet
            self._ended.add(number)

    def _next(self, client: Client) -> None:
        number = client.number
        if self._left[number]:
            self._left[number] -= 1
            wanted = next(self._wishes[number])(self._held[number])
            event: list[object] = ["leave_seat"] if wanted == LEAVE else ["take_seat"]
            if wanted not in (ANY, LEAVE):
                event.append({"seat": wanted})
            text = frame(b"421" + json.dumps(event).encode())
            self._running[number] = wanted, time.perf_counter()
            client.socket.send(text)

    def _answer(self, client: Client, packet: bytes) -> None:
        number = client.number
        wanted, began = self._running.pop(number)
        (answer,) = json.loads(packet[3:])
        refusal = answer.get("message", "")
        seat = answer["data"].get("seat", 0) if not refusal else 0
        self._attempts.append(Attempt(self._person(number), wanted, began, time.perf_counter(), seat, refusal))
        if not refusal:
            self._moves += 0 < self._held[number] != seat > 0
            self._held[number] = seat
        self._unsettled -= 1
        self._next(client)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", required=True, help="the ports of the nodes, separated by commas")
    parser.add_argument("--lesson", required=True)
    parser.add_argument("--seats", type=int, required=True)
    args = parser.parse_args()
    ports = [int(port) for port in args.ports.split(",")]
    execute_commands(SeatLoad(ports, os.environ["BENCH_KEY"], args.lesson, args.seats))


if __name__ == "__main__":
    main()
