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
            "twice",
            "one person joins twice, on two nodes",
            tabs=(participant("1", "a"), participant("2", "b")),
            actors=((("join", "1"),), (("join", "2"),)),
        ),
    )
}
