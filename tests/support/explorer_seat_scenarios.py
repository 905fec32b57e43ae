"""What is explored of seats: who takes, leaves and loses them in which scenario. See explorer.py and Scenario.

If nothing else is said, the grace is 0: a seat is due as soon as its holder departs, so that a sweep of the seats, at
whatever moment it comes, is held back only by what the sweep looks at. Where the grace matters, it is MINUTE, and the
event ``pass:time`` makes everything due.
"""

from explorer_scenarios import CRASH, FLUSH, LATE, LOST, UNANSWERED, Scenario, participant

MINUTE = 60.0

SEAT_SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "one-seat",
            "two people on two nodes want the one seat, one of them any seat",
            tabs=(participant("1", "a"), participant("2", "b", "ben")),
            before=(("join", "1"), ("join", "2")),
            actors=((("take", "1"),), (("take", "2@1"),)),
            seat_count=1,
        ),
        Scenario(
            "change-seats",
            "one moves to the seat of another, who leaves it and takes that of the first",
            tabs=(participant("1", "a"), participant("2", "b", "ben")),
            before=(("join", "1"), ("take", "1"), ("join", "2"), ("take", "2")),
            actors=((("take", "1@2"),), (("leave_seat", "2"), ("take", "2@1"))),
        ),
        Scenario(
            "take-and-go",
            "the connection ends while its take is under way, and seats are swept",
            tabs=(participant("1", "a"),),
            before=(("join", "1"),),
            actors=((("take", "1"), ("leave", "1")), (("sweep", "b"),)),
        ),
        Scenario(
            "move-and-go",
            "the connection ends while it moves to another seat, and seats are swept",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("take", "1")),
            actors=((("take", "1@2"), ("leave", "1")), (("sweep", "b"),)),
            # Not LATE: where the grace is shorter than a write may be late, a move whose script comes after the sweep
            # of the seat that it gives up, and whose deadline came before the departure, keeps its seat.
            faults=(LOST, UNANSWERED, CRASH, FLUSH),
        ),
        Scenario(
            "leave-and-take",
            "a seat is left and taken again on one connection, which ends meanwhile",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("take", "1")),
            witness=("b",),
            actors=((("leave_seat", "1"), ("take", "1"), ("leave", "1")),),
        ),
        Scenario(
            "early-take",
            "a seat is taken before its connection has joined, which ends in the middle of the join",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("take", "1"), ("leave", "1")),),
            max_faults=0,
        ),
        Scenario(
            "reconnect",
            "the holder of a seat is gone, and comes back on another node while a third one sweeps",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "1"), ("take", "1"), ("leave", "1")),
            actors=((("join", "2"), ("take", "2")), (("sweep", "c"),)),
        ),
        Scenario(
            "handover",
            "one connection of the holder ends while another one joins, and seats are swept",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "1"), ("take", "1"), ("pass", "time")),
            actors=((("leave", "1"),), (("join", "2"),), (("sweep", "c"),)),
        ),
        Scenario(
            "grace",
            "the holder goes, the grace passes, and the holder comes back at any time",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "1"), ("take", "1"), ("pass", "time")),
            actors=((("leave", "1"),), (("pass", "time"), ("sweep", "c")), (("join", "2"),)),
            grace=MINUTE,
            max_faults=0,
        ),
        Scenario(
            "two-tabs",
            "a person's two tabs end, the seat with the last one",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "1"), ("join", "2"), ("take", "1"), ("pass", "time")),
            actors=((("leave", "1"),), (("leave", "2"),), (("sweep", "c"),)),
        ),
        Scenario(
            "holder-dies",
            "the node of the holder may die, and another person wants the seat",
            tabs=(participant("1", "a"), participant("2", "b", "ben")),
            before=(("join", "1"), ("take", "1"), ("join", "2"), ("pass", "time")),
            actors=((("take", "2"),), (("sweep", "b"),)),
            seat_count=1,
            faults=(CRASH,),
        ),
        Scenario(
            "swept-taker",
            "a take against a sweep of its node, which lives and was silent",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("tick", "b")),
            actors=((("take", "1"),), (("tick", "b"),)),
            stalled=("a",),
            faults=(LOST, UNANSWERED, CRASH),
        ),
        Scenario(
            "seats-lost",
            "Redis loses everything while somebody takes the seat of another",
            tabs=(participant("1", "a"), participant("2", "b", "ben")),
            before=(("join", "1"), ("take", "1"), ("join", "2")),
            actors=((("take", "2@1"),),),
            faults=(FLUSH,),
        ),
        Scenario(
            "left-and-lost",
            "Redis loses everything after a seat has been left",
            tabs=(participant("1", "a"), participant("2", "b", "ben")),
            before=(("join", "1"), ("take", "1"), ("leave_seat", "1")),
            actors=((("join", "2"),),),
            faults=(FLUSH,),
        ),
        Scenario(
            "two-faults-of-a-take",
            "the connection ends while its take is under way, and two faults",
            tabs=(participant("1", "a"),),
            before=(("join", "1"),),
            witness=("b",),
            actors=((("take", "1"), ("leave", "1")),),
            faults=(LATE, CRASH),
            max_faults=2,
        ),
        Scenario(
            "cluster-seats",
            "take-and-go on a cluster of as many masters as there are keys",
            tabs=(participant("1", "a"),),
            before=(("join", "1"),),
            actors=((("take", "1"), ("leave", "1")), (("sweep", "b"),)),
            faults=(LOST, UNANSWERED, FLUSH),  # as in the scenario "cluster"
            cluster=True,
        ),
        Scenario(
            "cluster-reconnect",
            "reconnect on a cluster",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "1"), ("take", "1"), ("leave", "1")),
            actors=((("join", "2"), ("take", "2")), (("sweep", "c"),)),
            faults=(LOST, UNANSWERED, FLUSH),
            cluster=True,
        ),
    )
}
