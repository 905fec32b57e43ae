"""Makes small defects in a module: each is one edit of its source, such as a removed statement or a negated condition.

Text that only people read is not edited: log messages, exception messages, docstrings, annotations, ``__repr__``.
"""

import ast
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

# Lua scripts, which run in Redis. A line that opens or closes a block can't be removed alone.
LUA_CALL = "redis.call("
LUA_OPENS = re.compile(r"\b(then|do|function|repeat)\b|[({[]")
LUA_CLOSES = re.compile(r"\b(end|until)\b|[)}\]]")
LUA_CONDITION = re.compile(r"\b(if|elseif) (.+?) then\b")
LUA_SWAPS = {" == ": " ~= ", " ~= ": " == ", " < ": " <= ", " > ": " >= ", " and ": " or ", " or ": " and "}

LOGGERS = {"logger", "logging"}
# Functions whose results only people read, and calls whose arguments only people or type checkers read.
SILENT_FUNCTIONS = {"__repr__", "__str__"}
ASSERTIONS = {"strict"}  # the argument of zip: asserts what can't happen
SILENT_CALLS = {"TypeVar", "NewType", "cast", "getLogger"}

NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
COMPARISONS: dict[type[ast.cmpop], str] = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip

# The description of an edit of a text shorter than this, in characters, includes the source line.
TELLING = 20

Edit = tuple[int, int, str]  # begin and end as byte offsets in the module, and the replacement


@dataclass(frozen=True)
class Defect:
    """One edit of a module.

    Attributes:
        module: path of the module, from the root of the project.
        place: qualified name of the function or class; empty at the level of the module.
        change: the edit, on one line.
        source: the source of the whole module with the defect.
        lines: a test that has run one of these lines may see the defect.
    """

    module: str
    place: str
    change: str
    source: str
    lines: frozenset[int]

    @property
    def name(self) -> str:
        """Return an id that stays the same when other places of the module change."""
        return f"{self.module} {self.place}: {self.change}"


def defects(module: str, source: str) -> list[Defect]:
    """Return every defect that can be planted into a module.

    Args:
        module: the module's path, from the root of the project.
        source: the module's source.
    """
    planter = Planter(module, source)
    planter.visit(ast.parse(source))
    return planter.found


class Planter(ast.NodeVisitor):
    def __init__(self, module: str, source: str) -> None:
        self.found: list[Defect] = []
        self._module = module
        self._code = source.encode()
        self._starts = [0, *accumulate(map(len, self._code.splitlines(keepends=True)))]
        self._scope: list[str] = []
        self._lines: frozenset[int] = frozenset()
        self._function: ast.FunctionDef | ast.AsyncFunctionDef | None = None
        self._times: Counter[tuple[str, str]] = Counter()
        self._tried: frozenset[int] = frozenset()  # lines of each `try` before this place of the function
        self._whole: set[ast.AST] = set()  # conditions that are negated as a whole

    # Traversal

    def visit_Module(self, node: ast.Module) -> None:
        self._tree = node
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        for child in node.body:
            self.visit(child)
        self._scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name in SILENT_FUNCTIONS:
            return
        outer, self._function, self._tried = self._function, node, frozenset()
        self._scope.append(node.name)
        self._lines = lines_of(node.body)
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        for child in node.body:
            self.visit(child)
        self._scope.pop()
        self._function = outer

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Try(self, node: ast.Try) -> None:
        """Count handlers and ``finally`` as reached by every test that runs the ``try``.

        On Python 3.11, coverage misses some lines that a function runs after an await that has raised.
        """
        for child in [*node.body, *node.orelse]:
            self.visit(child)
        self._tried |= lines_of([node])
        for late in (*node.handlers, *node.finalbody):
            self._lines = self._tried
            self.visit(late)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr_context | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.keyword) and node.arg in ASSERTIONS:
            return
        if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._lines = self._reached_by(node) | self._tried
            match node:
                case ast.Expr(value=ast.Constant()):
                    return  # a docstring, or the ellipsis of a protocol
                case ast.Assign(value=value) if self._function is None and is_number(value):
                    return  # a chosen duration or limit: a test that repeats the number proves nothing
            if isinstance(node, ast.Assign) and LUA_CALL in self._text(node.value):
                self._plant_all(self._lua(node.value))
                return
        self._plant_all(self._edits(node))
        if isinstance(node, ast.Raise | ast.JoinedStr) or is_silent(node):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.visit(node.value)
            return
        super().visit(node)

    def _reached_by(self, node: ast.stmt) -> frozenset[int]:
        """Return the lines that a test must reach.

        For a statement of a function: its lines, without the lines of nested statements. For a constant: the lines that
        use the constant. For any other statement at the level of the module or of a class: the lines of all functions.
        """
        if self._function is not None:
            inner = getattr(node, "body", None)
            return frozenset(range(node.lineno, inner[0].lineno if inner else node.end_lineno + 1))  # type: ignore[operator]
        names = {target.id for target in ast.walk(node) if isinstance(target, ast.Name)}
        return self._uses(names) if isinstance(node, ast.Assign) else lines_of_functions(self._tree)

    def _uses(self, names: set[str]) -> frozenset[int]:
        lines: set[int] = set()
        for node in self._tree.body:
            targets = {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
            used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
            if targets and used & names and not targets <= names:
                return self._uses(names | targets)
        for function in functions_of(self._tree):
            lines |= {n.lineno for n in ast.walk(function) if isinstance(n, ast.Name) and n.id in names}
        return frozenset(lines) or lines_of_functions(self._tree)

    # Edits

    def _edits(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.Expr(value=ast.Yield() | ast.YieldFrom()):
                pass
            case ast.Expr() | ast.Raise() | ast.Break() | ast.Continue() | ast.Delete() | ast.Return(value=None):
                yield self._instead(node, "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]) | ast.AugAssign():
                if self._function is not None and self._function.name != "__init__":
                    yield self._instead(node, "pass")
            case ast.Return(value=ast.expr() as value) if self._answers_bool():
                yield from self._negation(value)
            case ast.Return(value=ast.expr() as value) if self._text(value) != "None":
                yield self._instead(value, "None")
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                if self._text(test) not in ("TYPE_CHECKING", "True"):
                    yield from self._negation(test)
            case ast.comprehension(ifs=conditions):
                for condition in conditions:
                    yield from self._negation(condition)
            case ast.For(iter=iterable):
                yield self._instead(iterable, "()")
            case ast.With(items=items) | ast.AsyncWith(items=items):
                for item in items:
                    if item.optional_vars is None:
                        yield self._instead(item.context_expr, '__import__("contextlib").nullcontext()')
            case ast.ExceptHandler(type=ast.Tuple(elts=types) as all_types):
                for kind in types:
                    rest = "".join(f"{self._text(other)}, " for other in types if other is not kind)
                    yield self._instead(all_types, f"({rest})")
            case ast.ExceptHandler(type=ast.expr() as kind):
                yield self._instead(kind, "()")
            case ast.BoolOp(op=op, values=values):
                word = " and " if isinstance(op, ast.And) else " or "
                for value in values:
                    rest = word.join(self._text(other) for other in values if other is not value)
                    yield self._instead(node, f"({rest})")
            case ast.UnaryOp(op=ast.Not(), operand=operand) if node not in self._whole:
                yield self._instead(node, f"({self._text(operand)})")
            case ast.Compare(ops=[op], left=left, comparators=[right]) if type(op) in COMPARISONS:
                yield self._instead(node, f"{self._text(left)} {COMPARISONS[type(op)]} {self._text(right)}")
            case ast.Compare(ops=[op]) if isinstance(op, NEGATED) and node not in self._whole:
                yield self._instead(node, f"(not ({self._text(node)}))")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                if not any(self._is_text(side) for side in (left, right)):
                    yield self._instead(node, f"({self._text(left)} {OPERATORS[type(op)]} {self._text(right)})")
            case ast.Call(func=func, args=args, keywords=keywords) if not is_silent(node):
                parts = [*args, *keywords]
                for part in [*args[len(args) - (len(args) > 1) :], *keywords]:
                    if isinstance(part, ast.keyword) and part.arg in ASSERTIONS:
                        continue
                    rest = ", ".join(self._text(other) for other in parts if other is not part)
                    yield self._instead(node, f"{self._text(func)}({rest})")
            case ast.Constant(value=bool() as value):
                yield self._instead(node, str(not value))
            case ast.Constant(value=int() | float() as number):
                yield self._instead(node, str(number + 1))
            case ast.Constant(value=str() | bytes() as text):
                yield self._instead(node, repr("XX" if isinstance(text, str) else b"XX"))
            case ast.JoinedStr():
                yield self._instead(node, '"XX"')

    def _negation(self, condition: ast.expr) -> Iterator[Edit]:
        self._whole.add(condition)
        if isinstance(condition, ast.Constant) and isinstance(condition.value, bool):
            return  # the edit of the constant flips it
        if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
            yield self._instead(condition, f"({self._text(condition.operand)})")
        else:
            yield self._instead(condition, f"(not ({self._text(condition)}))")

    def _lua(self, script: ast.expr) -> Iterator[Edit]:
        assert script.end_lineno is not None
        for number in range(script.lineno, script.end_lineno + 1):
            begin, end = self._starts[number - 1], self._starts[number] - 1
            line = self._code[begin:end].decode()
            text = line.strip()
            if not text or text.startswith("--") or '"""' in text:
                continue
            condition = LUA_CONDITION.search(line)
            if condition is not None:
                yield begin, end, LUA_CONDITION.sub(rf"{condition[1]} not ({condition[2]}) then", line)
            for old, new in LUA_SWAPS.items():
                if old in line:
                    yield begin, end, line.replace(old, new, 1)
            balanced = len(LUA_OPENS.findall(text)) == len(LUA_CLOSES.findall(text))
            if balanced and text != "else" and not text.startswith("{"):  # a part shared by several scripts
                yield begin, end, ""

    def _answers_bool(self) -> bool:
        returns = self._function and self._function.returns
        return returns is not None and self._text(returns) == "bool"

    @staticmethod
    def _is_text(node: ast.expr) -> bool:
        return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))

    # Source text

    def _text(self, node: ast.AST) -> str:
        begin, end = self._span(node)
        return self._code[begin:end].decode()

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self._starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self._starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def _instead(self, node: ast.AST, text: str) -> Edit:
        return (*self._span(node), text)

    def _plant_all(self, edits: Iterator[Edit]) -> None:
        for begin, end, text in edits:
            source = (self._code[:begin] + text.encode() + self._code[end:]).decode()
            try:
                compile(source, self._module, "exec")
            except SyntaxError:
                continue  # `break` for the last statement of a `case`, and the like
            place = ".".join(self._scope)
            change = self._describe(begin, end, text)
            self._times[place, change] += 1
            if self._times[place, change] > 1:
                change += f" (place {self._times[place, change]})"
            self.found.append(Defect(self._module, place, change, source, self._lines))

    def _describe(self, begin: int, end: int, text: str) -> str:
        old, new = one_line(self._code[begin:end].decode()), one_line(text) or "nothing"
        if len(old) >= TELLING or text == "pass":
            return f"{old} → {new}"
        first, last = bisect(self._starts, begin) - 1, bisect(self._starts, end - 1)
        return f"{old} → {new} in {one_line(self._code[self._starts[first] : self._starts[last]].decode())}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def is_silent(node: ast.AST) -> bool:
    """Return whether ``node`` is a call whose arguments only people or type checkers read."""
    if not isinstance(node, ast.Call):
        return False
    func = node.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id in LOGGERS:
        return True
    return (func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")) in SILENT_CALLS


def is_number(node: ast.expr) -> bool:
    """Return whether ``node`` is a number, or an expression of numbers only."""
    parts = (ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    return all(
        type(part.value) in (int, float) if isinstance(part, ast.Constant) else isinstance(part, parts)
        for part in ast.walk(node)
    )


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(body: list[ast.stmt]) -> frozenset[int]:
    return frozenset(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))


def lines_of_functions(tree: ast.AST) -> frozenset[int]:
    return frozenset().union(*(lines_of(function.body) for function in functions_of(tree)))
