"""What one rendering of a chat template may take at most: steps, characters, seconds, and the size of what it works on.

A template comes with a stranger's tokenizer. Jinja's sandbox keeps it from files and programs, not from loops without
end or a text of 10 GB. Here each pass of a loop, call and filter is a step, longer texts and lists are more of them,
and what would make a text longer by much is asked for before it is made. So a template that is over a bound is so on
any machine; only the clock, for what steps do not see, is not.

    source        1 MiB of characters (bounds.TEMPLATE)
    steps         20 million: a pass of a loop, a call, a filter, 64 characters or one item that they look at
    output        64 Mi characters; any text on the way to it alike
    made          512 Mi characters of all texts on the way
    numbers       4,096 bits; widths 1,000
    clock         60 seconds, looked at every 64 steps

Each is far above what templates take: of a conversation of a thousand messages some ten thousand steps, and half a
million where a template looks at all messages for each (Gemma 4).
"""

import functools
import re
import time
from collections.abc import Callable, Iterable
from datetime import date
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_STEPS = 20_000_000
MOST_CHARACTERS = 1 << 26  # of any one text
MOST_MADE = 1 << 29  # characters of all texts of one rendering
MOST_SECONDS = 60
_MOST_BITS = 1 << 12
_MOST_WIDTH = 1_000  # of what is filled up, indented, rounded, batched; and of numbers in formats
_MOST_SLOW = 1 << 16  # characters for a filter of _SLOW

_A_STEP = 64  # characters
_CLOCK = 64  # steps
_STEP, _WEIGH = "__step", "__weigh"
_CHAIN = 8  # additions in a row, of which the last is looked at
_SCOPES = ("_loop_vars", "_block_vars")  # which compiled templates give to every call
_NUMBER = re.compile(r"\d+")
_SLOW = ("pprint", "striptags", "urlize", "wordwrap")  # take a time that is no multiple of the length
_WIDE = ("batch", "center", "indent", "round", "slice", "tojson", "wordwrap")
_PLAIN = ("e", "escape", "forceescape", "safe", "string")  # of a text as it is
_AT_ONCE = ("abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length")
_LISTING = ("batch", "list", "map", "reject", "reverse", "select", "slice", "sort", "unique")  # of characters


class OverBound(Exception):
    """Raised where a rendering would take more than it may; str() is one line."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds. `begin` comes before each rendering."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.begin()
        self.filters = {
            name: filter if name in _AT_ONCE else self._bounded(name, filter) for name, filter in self.filters.items()
        }
        self.filters[_WEIGH] = jinja2.pass_context(lambda _, item: self._weighed(item))  # hence not folded away
        self.globals.pop("lipsum", None)  # chance, which no training data may hold

    def begin(self) -> None:
        """Give the next rendering all that it may take."""
        self._steps, self._made, self._end = MOST_STEPS, 0, time.monotonic() + MOST_SECONDS
        self._next = MOST_STEPS - _CLOCK  # how many steps are left when the clock is looked at

    def add_filter(self, name: str, filter: Callable[..., Any]) -> None:
        self.filters[name] = self._bounded(name, filter)

    def date(self, day: date) -> Callable[[str], str]:
        """Return what writes a day in a format."""

        def write(format: str) -> str:
            self._check_format(format, ())
            return day.strftime(format)

        return write

    def count(self, tree: nodes.Template) -> None:
        """Put what counts into a template's syntax tree: a step into each loop, a look at each list that it makes."""
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(nodes.Const(_STEP)))
        _Weighing().visit(tree)
        tree.set_environment(self)

    def step(self, size: int = 1) -> None:
        """Take `size` steps. Raise OverBound where none are left."""
        self._steps -= size
        if self._steps < self._next:
            if self._steps < 0:
                raise OverBound(f"it takes more than {MOST_STEPS:,} steps, the most for one conversation")
            if time.monotonic() > self._end:
                raise OverBound(f"it takes more than {MOST_SECONDS} seconds, the most for one conversation")
            self._next = max(self._steps - _CLOCK, 0)

    def make(self, length: int) -> None:
        """Say that a text or list of this length is made. Raise OverBound where it is too long."""
        self._made += length
        if length > MOST_CHARACTERS:
            raise OverBound(f"it makes a text of {length:,} characters; the most is {MOST_CHARACTERS:,}")
        if self._made > MOST_MADE:
            raise OverBound(f"it makes texts of more than {MOST_MADE:,} characters, the most for one conversation")

    # -- what compiled templates call ----------------------------------------------------------------------------

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a template, a macro or a block writes."""
        kept = list(parts)  # as many as steps allow; most texts are there already
        self.make(sum(map(len, kept)))
        return "".join(kept)

    def added(self, result: Any) -> Any:
        """Return what an addition gave."""
        if type(result) is str:
            length = len(result)
            self._made += length
            if length > MOST_CHARACTERS or self._made > MOST_MADE:
                self.make(length)
        elif isinstance(result, (list, tuple)):
            self.make(len(result))
        return result

    def shown(self, value: Any) -> str:
        """Return what is written as text."""
        kind = type(value)
        if kind is str:
            return value
        if kind is Namespace:
            raise OverBound("it writes a namespace as text")
        text = str(value)
        if kind is not int and text:
            self.make(len(text))
        return text

    def joined(self, parts: tuple[Any, ...]) -> str:
        text = "".join([part if type(part) is str else self.shown(part) for part in parts])
        self.make(len(text))
        return text

    def sliced(self, value: Any, part: slice) -> Any:
        result = value[part]
        if isinstance(result, (str, list, tuple)):
            self.make(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, (str, list, tuple)) and isinstance(other, int):
                self.make((len(one) if isinstance(one, str) else self._weigh(one)) * max(other, 0))
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}.get(operator, 0)
            if bits > _MOST_BITS:
                raise OverBound(f"it makes a number of {bits:,} bits; the most is {_MOST_BITS:,}")
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, as Jinja's own
        __self.ask(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if __obj is dict:
            __self._weigh(result)
        return result

    def ask(self, called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the steps of a call, and ask for what a text's method would make."""
        self.step()
        if type(called) is BuiltinMethodType:
            of = called.__self__
            if type(of) is str:
                self.step(len(of) // _A_STEP)
                name = called.__name__
                if name in _GROWTH:
                    self.make(_GROWTH[name](of, [*args, *(v for key, v in kwargs.items() if key not in _SCOPES)]))
                else:
                    self.make(len(of))
            elif isinstance(of, (list, tuple)):
                self.step(len(of))
        elif type(called) is Macro and (called.catch_varargs or called.catch_kwargs):
            self._weigh([*args, *(value for key, value in kwargs.items() if key not in _SCOPES)])

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what stands for a text's `format`, once it is known to be one."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            given = [item for value in args for item in (value.values() if isinstance(value, dict) else [value])]
            self._check_format(value.__self__, (*given, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return bounded

    # -- texts, filters ------------------------------------------------------------------------------------------

    def _bounded(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        """Return the filter, which counts what it looks at and asks for what it makes."""
        first = 1 if hasattr(filter, "jinja_pass_arg") else 0
        lists, plain = name in _LISTING, name in _PLAIN
        asks = name in {*_GROWTH, *_SLOW, *_WIDE, *_PLAIN, "format"}

        @functools.wraps(filter)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value: Any = args[first] if len(args) > first else None
            if type(value) is str:
                self._steps -= 1 + len(value) // _A_STEP
                if self._steps < self._next:
                    self.step(0)
            else:
                self._look(value)
            if asks and not (plain and type(value) is str):
                if name == "join" and not isinstance(value, (str, list, tuple, dict)):
                    value = list(value)
                    args = (*args[:first], value, *args[first + 1 :])
                self._ask_filter(name, value, [*args[first + 1 :], *kwargs.values()])
            elif lists and type(value) is str:
                self.step(len(value))
            return self.added(filter(*args, **kwargs))

        return bounded

    def _ask_filter(self, name: str, value: Any, given: list[Any]) -> None:
        if name in _SLOW and len(value := self.shown(value)) > _MOST_SLOW:
            raise OverBound(f"the filter {name} is given {len(value):,} characters; the most is {_MOST_SLOW:,}")
        if name in _WIDE:
            sizes = [
                abs(item) if isinstance(item, int) else len(item) for item in given if isinstance(item, (int, str))
            ]
            if max(sizes, default=0) > _MOST_WIDTH:
                raise OverBound(f"the filter {name} is given {max(sizes):,}; the most is {_MOST_WIDTH:,}")
            if name in ("batch", "slice"):  # which fill up with what they are given
                self.step(max(sizes, default=0) * self._weigh(given[1:]))
        if name == "join" and not isinstance(value, str):
            self.make(len(value) * sum(len(item) for item in given if isinstance(item, str)))
        elif name == "format":
            self._check_format(str(value), tuple(given))
        elif name in _GROWTH:
            self.make(_GROWTH[name](self.shown(value), given))
        else:
            self.shown(value)

    def _look(self, value: Any) -> None:
        """Take the steps of looking at all of a list."""
        if type(value) is Namespace:
            raise OverBound("it writes a namespace as text")
        self.step(1 + (len(value) if hasattr(value, "__len__") else 0))

    def _check_format(self, text: str, given: tuple[Any, ...]) -> None:
        """Ask for what a format makes: its widths and what it is filled with."""
        numbers = [int(found[:9]) for found in _NUMBER.findall(text)]
        if "*" in text or re.search(r"\{[^{}]*\{", text):  # a width that is given
            numbers += [abs(item) for item in given if isinstance(item, int)]
        if max(numbers, default=0) > _MOST_WIDTH:
            raise OverBound(f"it formats a text {max(numbers):,} wide; the most is {_MOST_WIDTH:,}")
        fields = 1 + text.count("%") + text.count("{")
        self.make(len(text) + sum(numbers) + fields * sum(self._weigh(item) for item in given))

    def _weighed(self, value: Any) -> Any:
        self._weigh(value)
        return value

    def _weigh(self, value: Any) -> int:
        """Return how many characters and items there are in a value, those of what stands in it twice twice."""
        weight, nodes, rest = 0, 0, [value]
        while rest:
            item = rest.pop()
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, (list, tuple, dict)):
                rest += [*item, *item.values()] if isinstance(item, dict) else item
            elif isinstance(item, Namespace):
                raise OverBound("it writes a namespace as text")
            nodes += 1
            if nodes > self._steps:
                break
        self.step(nodes + weight // _A_STEP)
        return weight + nodes


def _width(text: str, given: list[Any]) -> int:
    """Return the length of a text that is filled up to a width."""
    return len(text) + max((abs(item) for item in given if isinstance(item, int)), default=0)


def _replaced(text: str, given: list[Any]) -> int:
    old, new = (item if isinstance(item, str) else str(item) for item in (*given[:2], *("", "")[len(given) :]))
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _indented(text: str, given: list[Any]) -> int:
    widths = [item if isinstance(item, int) else len(item) for item in given if isinstance(item, (int, str))]
    width = max(widths, default=4)
    return len(text) + (text.count("\n") + 1) * width


def _filled(text: str, given: list[Any]) -> int:
    """Return the length of a text between the items of a list."""
    items = given[0] if given and isinstance(given[0], (list, tuple, str)) else []
    return sum(len(item) for item in items if isinstance(item, str)) + len(text) * len(items)


def _translated(text: str, given: list[Any]) -> int:
    table = given[0] if given and isinstance(given[0], dict) else {}
    return len(text) * max((len(value) for value in table.values() if isinstance(value, str)), default=1)


def _tabs(text: str, given: list[Any]) -> int:
    return len(text) + text.count("\t") * max((item for item in given if isinstance(item, int)), default=8)


_GROWTH: dict[str, Callable[[str, list[Any]], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    "replace": _replaced, "indent": _indented, "join": _filled, "translate": _translated, "expandtabs": _tabs,
}  # fmt: skip


# -- the syntax tree and its code -------------------------------------------------------------------------------------


def _filter(item: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(item, name, [], [], None, None)  # its fields have no keywords


class _Weighing(jinja2.visitor.NodeTransformer):
    """Puts a look at its size around each list, tuple and mapping that a template makes of more than constants, so
    that none can hold the same one twice, and that another one twice, and so on."""

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.iter_child_nodes()) else _filter(node, _WEIGH)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH) if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or not node.items else _filter(node, _WEIGH)


class _Generator(CodeGenerator):
    """Writes code that asks for what additions, joins and slices make, and what is written."""

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        if isinstance(node.node, nodes.Const) and node.node.value == _STEP:
            self.newline(node)
            self.write("environment.step()")
        else:
            super().visit_ExprStmt(node, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._write_sum(node, frame, _CHAIN)

    def _write_sum(self, node: nodes.Expr, frame: Frame, chain: int) -> None:
        """Write additions in a row, the last of `chain` with a look at what it gives."""
        if not isinstance(node, nodes.Add):
            self.visit(node, frame)
            return
        self.write("environment.added(" if chain == _CHAIN else "(")
        self._write_sum(node.left, frame, chain - 1 or _CHAIN)
        self.write(" + ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(part or nodes.Const(None), frame)
            self.write(", ")
        self.write("))")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write("environment.shown(")


BoundedSandbox.code_generator_class = _Generator
