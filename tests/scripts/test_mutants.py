"""scripts/mutants: which defects are planted, and that a run tells those that are seen from those that are not."""

import textwrap

import pytest
from defects import defects


def changes(source):
    return [(defect.place, defect.change) for defect in defects("module.py", textwrap.dedent(source))]


def planted(body):
    """The changes to the body of a function, each as the text that the body has with it."""
    source = "async def f(a, b):\n" + textwrap.indent(body, "    ") + "\n"
    return {textwrap.dedent(defect.source.partition("\n")[2]).strip() for defect in defects("module.py", source)}


@pytest.mark.parametrize(
    ("body", "defective"),
    [
        ("a.add(b)", {"pass"}),
        ("await a", {"pass"}),
        ("a[b] = b", {"pass"}),
        ("a = b", set()),
        ("return a", {"return None"}),
        ("return None", set()),
        ("raise KeyError('text')", {"pass"}),
        ("if a:\n    a += b", {"if (not (a)):\n    a += b", "if a:\n    pass"}),
        ("if not a:\n    return", {"if (a):\n    return", "if not a:\n    pass"}),
        ("c = a and b", {"c = (a)", "c = (b)"}),
        ("c = a < b", {"c = a <= b"}),
        ("c = a is b", {"c = (not (a is b))"}),
        ("c = a + b", {"c = (a - b)"}),
        ("c = a(1)", {"c = a(2)"}),
        ("c = a(b, a)", {"c = a(b)"}),
        ("c = a(b, c=a)", {"c = a(b)"}),
        ("c = zip(a, strict=True)", set()),
        ("c = 'text', True", {"c = 'XX', True", "c = 'text', False"}),
        ("for c in a:\n    b", {"for c in ():\n    b", "for c in a:\n    pass"}),
        (
            "async with a:\n    b",
            {'async with __import__("contextlib").nullcontext():\n    b', "async with a:\n    pass"},
        ),
        (
            "try:\n    a\nexcept (KeyError, OSError):\n    b",
            {
                "try:\n    pass\nexcept (KeyError, OSError):\n    b",
                "try:\n    a\nexcept (OSError, ):\n    b",
                "try:\n    a\nexcept (KeyError, ):\n    b",
                "try:\n    a\nexcept (KeyError, OSError):\n    pass",
            },
        ),
    ],
)
def test_a_statement_is_left_out_or_changed(body, defective):
    assert planted(body) == defective


def test_what_only_people_read_is_left_alone():
    assert changes('''
        """A docstring."""
        logger = logging.getLogger("name")
        INTERVAL = 1.0
        LIMIT = -(2 * 1024)
        class Protocol:
            """A docstring."""
            def method(self, argument: "Type") -> None: ...
            def __repr__(self):
                return "text"
        def function():
            """A docstring."""
            logger.info("text %s", 1)
            assert 1 < 2
            raise ValueError("text")
    ''') == [
        ("function", 'logger.info("text %s", 1) → pass'),
        ("function", 'raise ValueError("text") → pass'),
    ]  # fmt: skip


def test_an_answer_that_is_a_bool_is_negated():
    assert changes("def f(a) -> bool:\n    return a") == [("f", "a → (not (a)) in return a")]


def test_the_default_of_an_argument_is_changed():
    assert changes("def f(*, a=False): ...") == [("f", "False → True in def f(*, a=False): ...")]


def test_lines_of_a_script_for_redis_are_left_out_and_its_conditions_negated():
    assert changes('''
        SCRIPT = """
        -- a comment
        if redis.call('GET', KEYS[1]) then
            redis.call('DEL', KEYS[1])
            for i = 1, 3 do
                if i == 2 then return end
            end
        end
        """
    ''') == [
        ("", "if redis.call('GET', KEYS[1]) then → if not (redis.call('GET', KEYS[1])) then"),
        ("", "redis.call('DEL', KEYS[1]) → nothing"),
        ("", "if i == 2 then return end → if not (i == 2) then return end"),
        ("", "if i == 2 then return end → if i ~= 2 then return end"),
        ("", "if i == 2 then return end → nothing"),
    ]  # fmt: skip


def test_equal_changes_of_one_place_have_names_of_their_own():
    names = [defect.name for defect in defects("module.py", "def f(a):\n    a.b()\n    a.b()")]
    assert names == ["module.py f: a.b() → pass", "module.py f: a.b() → pass (place 2)"]


def test_a_defect_is_seen_by_tests_that_run_its_statement_or_use_its_constant():
    source = textwrap.dedent("""
        A = True
        B = A + C
        class D:
            E = "e"
            def f(self):
                return (
                    B
                )
            def g(self, condition):
                if condition:
                    return 3
                return 4
            def h(self):
                try:
                    a
                except KeyError:
                    b
                c()
    """)
    lines = {defect.change: sorted(defect.lines) for defect in defects("module.py", source)}
    assert lines["True → False in A = True"] == [8]
    assert lines['"e" → \'XX\' in E = "e"'] == [7, 8, 9, 11, 12, 13, 15, 16, 17, 18, 19]
    assert lines["condition → (not (condition)) in if condition:"] == [11]
    assert lines["3 → 4 in return 3"] == [12]
    assert lines["KeyError → () in except KeyError:"] == [15, 16, 17, 18]
    assert lines["b → pass"] == [15, 16, 17, 18]
    assert lines["c() → pass"] == [15, 16, 17, 18, 19]
