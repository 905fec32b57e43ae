"""The scenarios that are explored."""

from explorer import Scenario, Tab

def participant(sid: str, node: str, subject: str = "anna", lesson_id: str = "1") -> Tab:
    return Tab(sid, node, "participant", subject, lesson_id)

def teacher(sid: str, node: str, subject: str = "hill", lesson_id: str = "1") -> Tab:
    return Tab(sid, node, "teacher", subject, lesson_id)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "join",
            "one join and its end",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("leave", "1")),),
        ),
        Scenario(
            "again",
            "a join, which is tried again, and its end",
            tabs=(participant("1", "a"),),
            witness=("b",),
            actors=((("join", "1"), ("join", "1"), ("leave", "1")),),
        ),
        Scenario(
            "twice",
            "one person joins twice, on two nodes",
            tabs=(participant("1", "a"), participant("2", "b")),
            actors=((("join", "1"),), (("join", "2"),)),
        ),
        Scenario(
            "teacher",
            "one teacher joins twice, on two nodes",
            tabs=(teacher("1", "a"), teacher("2", "b")),
            actors=((("join", "1"),), (("join", "2"),)),
        ),
        Scenario(
            "tabs",
            "the later of two tabs ends while the earlier one joins",
            tabs=(participant("1", "a"), participant("2", "b")),
            before=(("join", "2"),),
            actors=((("join", "1"),), (("leave", "2"),)),
        ),
        Scenario(
            "move",
            "a teacher moves between lessons",
            tabs=(teacher("1", "a"), teacher("2", "b", lesson_id="2")),
            before=(("join", "1"),),
            actors=((("join", "2"),), (("leave", "1"),)),
        ),
        Scenario(
            "sweep",
            "a join against a sweep of its node, which lives and was silent",
            tabs=(participant("1", "a"), participant("2", "a", "ben")),
            before=(("join", "1"), ("tick", "b")),
            actors=((("join", "2"),), (("tick", "b"),)),
            stalled=("a",),
        ),
        Scenario(
            "comeback",
            "a node that was silent comes back while it is being swept",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("tick", "b")),
            actors=((("tick", "a"),), (("tick", "b"),)),
            stalled=("a",),
        ),
        Scenario(
            "sweepers",
            "two nodes sweep a third one",
            tabs=(participant("1", "a"),),
            before=(("join", "1"), ("tick", "b"), ("tick", "c")),
            actors=((("tick", "b"),), (("tick", "c"),)),
            stalled=("a",),
        ),
        Scenario(
            "check",
            "a join against a check of all records",
            tabs=(participant("1", "a"), participant("2", "a")),
            before=(("join", "1"),),
            witness=("b",),
            actors=((("join", "2"),), (("check", "a"),)),
        ),
    )
}
