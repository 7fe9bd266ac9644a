"""A Python script or notebook as text: its calls, and the values that its names stand for.

It is read, not run. A name stands for what was assigned to it last before that place, in its function or in the module;
where it gets a value in another way, or its value is changed, it stands for nothing.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import ConfigError, short

_AS_DICT = ("dict", "BitsAndBytesConfig")
_HALF = ("is_bfloat16_supported", "is_bf16_supported")
_MUTATES = ("update", "setdefault", "pop", "clear", "append", "extend")
SECRET = re.compile(r"^((hub|hf|use_auth|auth|access|wandb)_)?token$|api_?key|secret|password", re.IGNORECASE)
UNREADABLE = (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError)
_MAGIC = re.compile(r"\s*%%(?!capture|time|timeit)")  # a cell that is not Python
_SHELL = re.compile(r"^([ \t]*)(?:!(?!=)|%(?=[A-Za-z%]))(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}

Place = tuple[int, int]


@dataclass(frozen=True)
class _Assigned:
    """A value of a name; None: it gets one in a way that is not read. block: the statements among which it stands."""

    value: ast.expr | None
    block: int
    start: Place
    end: Place


class Script:
    """A module, and what is assigned to its names. derived: its own classes on one of these `bases` -> that base."""

    def __init__(self, module: ast.Module, bases: Sequence[str] = ()) -> None:
        self._module = module
        classes = (node for node in ast.walk(module) if isinstance(node, ast.ClassDef))
        self.derived = {own.name: base for own in classes for node in own.bases if (base := _last_name(node)) in bases}
        self._assigned: dict[str, list[_Assigned]] = {}
        self._functions: dict[str, ast.FunctionDef] = {}
        self._shared: set[str] = set()  # names that a function gives a value elsewhere
        self._scopes: list[tuple[Place, Place, set[str]]] = []  # of functions, with their parameters
        self._blocks: list[tuple[Place, Place]] = []  # of statements
        self._set: list[tuple[ast.expr, str | None, ast.expr]] = []  # owner, attribute, and where it is set
        self._values: dict[ast.expr, ast.expr] = {}  # of what is set so: `args.learning_rate = 1e-5`
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not _is_cell(node):
                self._scopes.append(
                    (*_extent(node), {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)})
                )
            if isinstance(node, ast.FunctionDef):
                self._functions[node.name] = node
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = list(ast.walk(node))
                told = {name for each in inner if isinstance(each, ast.Global | ast.Nonlocal) for name in each.names}
                names = (each for each in inner if isinstance(each, ast.Name))
                self._shared |= told & {each.id for each in names if not isinstance(each.ctx, ast.Load)}
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                self._set.append((node.value, node.attr, node))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and len(node.args) == 3:
                key = getattr(node.args[1], "value", None)  # of a text
                self._set.append((node.args[0], key if isinstance(key, str) else None, node))
                self._values[node] = node.args[2]
            for target in (each for each in _other_targets(node) if not isinstance(each, ast.Attribute)):
                for name in (each for each in ast.walk(target) if isinstance(each, ast.Name)):
                    self._add(name.id, None, name, -1)  # from there on, also within the loop of that name
            for _, statements in ast.iter_fields(node):
                if isinstance(statements, list) and statements and isinstance(statements[0], ast.stmt):
                    self._blocks.append((_extent(statements[0])[0], _extent(statements[-1])[1]))
                for statement in statements if isinstance(statements, list) else ():
                    self._assign(statement, id(statements))

    def _add(self, name: str, value: ast.expr | None, node: Any, block: int) -> None:
        self._assigned.setdefault(name, []).append(_Assigned(value, block, *_extent(node)))

    def _assign(self, statement: Any, block: int) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            return
        self._values[target] = value
        several = isinstance(target, ast.Tuple)
        for place, name in enumerate(target.elts if isinstance(target, ast.Tuple) else [target]):
            if not isinstance(name, ast.Name):
                continue
            own: ast.expr | None = value
            if several and isinstance(value, ast.Tuple) and place < len(value.elts):
                own = value.elts[place]
            elif several and place:
                own = None  # the model is the first of what is unpacked
            self._add(name.id, own, statement, block)

    def set_later(self, made: Sequence[ast.expr], trainer: ast.Call | None) -> Iterator[ast.keyword]:
        """What is set of an object that one of these calls made: `args.learning_rate = 1e-5`.

        Where it changes a value, stands under a condition, or comes after the trainer is made, no value can be told:
        then its place is in the place of a value.
        """
        methods = ((call, call.func) for call in self.calls("train") if trainer is not None)
        trains = [c for c, f in methods if isinstance(f, ast.Attribute) and self.resolved(f.value) is trainer]
        for owner, name, node in self._set:
            if (
                trains
                and not self.is_repeated(node)
                and all(self.is_certain(node, call) and _extent(node) > _extent(call) for call in trains)
            ):
                continue  # after the training
            of_trainer = shown(owner).endswith(".args") and shown(owner) != "self.args"
            call = self.made(owner)
            if not of_trainer and call not in made:
                continue
            is_later = trainer is not None and self.is_certain(node, trainer) and _extent(node) > _extent(trainer)
            is_certain = (
                self.is_certain(node, call, *([trainer] if trainer else [])) and not of_trainer and not is_later
            )
            yield ast.keyword(name, self._values.get(node, node) if is_certain and name else node)

    def is_repeated(self, node: ast.AST) -> bool:
        """Whether it stands in a loop."""
        loops = (each for each in ast.walk(self._module) if isinstance(each, ast.For | ast.While))
        return any(node in ast.walk(statement) for loop in loops for statement in loop.body)

    def places_of(self, attribute: str) -> Iterator[tuple[ast.expr, ast.expr]]:
        """An object, and where this attribute of it is set, or its method `attribute_` called."""
        yield from ((owner, node) for owner, name, node in self._set if name == attribute)
        for call in self.calls(f"{attribute}_"):
            if isinstance(call.func, ast.Attribute):
                yield call.func.value, call

    def sets_false(self, place: ast.expr) -> bool:
        """place: of `places_of`."""
        value = self._values.get(place, place.args[0] if isinstance(place, ast.Call) and place.args else None)
        return isinstance(value, ast.Constant) and value.value is False

    def set_anywhere(self, name: str) -> Iterator[tuple[ast.expr, ast.expr]]:
        """An object, and what is set as this attribute of it; not None."""
        for node in (each for each in ast.walk(self._module) if isinstance(each, ast.Assign)):
            is_none = isinstance(node.value, ast.Constant) and node.value.value is None
            for target in () if is_none else node.targets:
                values = [node.value]
                if isinstance(target, ast.Tuple):
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else values * len(target.elts)
                for own, value in zip(target.elts if isinstance(target, ast.Tuple) else [target], values, strict=False):
                    if isinstance(own, ast.Attribute) and own.attr == name:
                        yield own.value, value

    def calls(self, *names: str) -> Iterator[ast.Call]:
        """In the order of the text; without a name every call."""
        every = [node for node in ast.walk(self._module) if isinstance(node, ast.Call)]
        own = [call for call in every if not names or self.name_of(call) in names]
        return iter(sorted(own, key=lambda call: (call.lineno, call.col_offset)))

    def name_of(self, call: ast.Call) -> str:
        """`from_pretrained` for `AutoModel.from_pretrained(...)`; of a class in `derived` the one it derives from."""
        name = _last_name(call.func)
        return self.derived.get(name, name)

    @staticmethod
    def owner_of(call: ast.Call) -> str:
        """`AutoModel` for `AutoModel.from_pretrained(...)` and for `transformers.AutoModel.from_pretrained(...)`."""
        return _last_name(call.func.value) if isinstance(call.func, ast.Attribute) else ""

    def resolved(self, node: ast.expr) -> ast.expr:
        """What a name stands for at its place; the name where that cannot be told."""
        for _ in range(20):
            found = self._value_of(node) if isinstance(node, ast.Name) else None
            if found is None:
                break
            node = found
        return node

    def made(self, node: ast.expr) -> ast.expr:
        """What makes it: as `resolved`, also through functions of the script that end in their only `return`."""
        for _ in range(20):
            node = self.resolved(node)
            if (passed := self._passed(node)) is not None:
                node = passed
                continue
            function = self._functions.get(getattr(node.func, "id", "")) if isinstance(node, ast.Call) else None
            returns = [each for each in ast.walk(function) if isinstance(each, ast.Return)] if function else []
            if function is None or returns != function.body[-1:] or (value := returns[0].value) is None:
                break
            node = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
        return node

    def _passed(self, node: ast.expr) -> ast.expr | None:
        """What an attribute of `self` gets where it is set once, a parameter where its function is called once."""
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            places = [place for owner, name, place in self._set if (shown(owner), name) == ("self", node.attr)]
            return self._values.get(places[0]) if len(places) == 1 else None
        if not isinstance(node, ast.Name):
            return None
        at = _extent(node)[0]
        around = [each for each in self._functions.values() if _extent(each)[0] <= at < _extent(each)[1]]
        function = max(around, key=lambda each: _extent(each)[0], default=None)
        if function is None:
            return None
        names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
        is_method = names[:1] == ["self"]
        calls = [call for call in self.calls(function.name) if isinstance(call.func, ast.Name) != is_method]
        stored = {
            each.id for each in ast.walk(function) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        }
        if len(calls) != 1 or node.id in stored or any(isinstance(each, ast.Starred) for each in calls[0].args):
            return None
        names = names[is_method:]
        given: dict[str | None, ast.expr] = dict(zip(names, calls[0].args, strict=False))
        given |= {each.arg: each.value for each in calls[0].keywords}
        return given.get(node.id)

    def is_certain(self, node: ast.AST, *others: ast.AST) -> bool:
        """Whether the statements among which it stands hold one of the others too: no condition is between them."""
        at, places = _extent(node)[0], [_extent(other)[0] for other in others]
        start, end = max((block for block in self._blocks if block[0] <= at < block[1]), default=(at, at))
        return any(start <= place < end for place in places)

    def _value_of(self, name: ast.Name) -> ast.expr | None:
        at = name.lineno, name.col_offset
        scopes = sorted((scope for scope in self._scopes if scope[0] <= at < scope[1]), reverse=True)  # inner first
        every = [] if name.id in self._shared else self._assigned.get(name.id, [])
        here: tuple[Place, Place] | None = None  # of the name's own function
        for start, end, parameters in scopes:
            here = here or (start, end)
            if name.id in parameters:
                return None
            if own := [each for each in every if start <= each.start < end]:
                every = own
                break
        else:
            every = [each for each in every if not any(start <= each.start < end for start, end, _ in self._scopes)]
        before = [each for each in every if each.end <= at]
        if not before and len(every) == 1 and not every[0].start <= at <= every[0].end:
            before = every  # of a function that is called later
        elif here and before and not here[0] <= before[0].start < here[1] and len(before) < len(every):
            return None  # changed after the function is made: which value it finds depends on when it is called
        if len({each.block for each in before}) != 1:
            return None
        return before[-1].value

    def renders(self, node: ast.expr) -> bool:
        """Whether it is a function of the script that calls apply_chat_template."""
        body = node if isinstance(node, ast.Lambda) else self._functions.get(getattr(node, "id", ""))
        inner = ast.walk(body) if body is not None else ()
        return any(isinstance(each, ast.Call) and self.name_of(each) == "apply_chat_template" for each in inner)

    def constant(self, node: ast.expr) -> Any:
        """A value that is written out, also as arithmetic. Raises ValueError and TypeError for others."""
        node = self.resolved(node)
        if isinstance(node, ast.Dict) and None not in node.keys:
            pairs = zip(node.keys, node.values, strict=True)
            return {self.constant(key): self.constant(value) for key, value in pairs if key}
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [self.constant(each) for each in node.elts]
        if isinstance(node, ast.Call) and self.name_of(node) in _AS_DICT and not node.args:
            return {str(each.arg): self.constant(each.value) for each in node.keywords}
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _computed(node.op, self.constant(node.left), self.constant(node.right))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr
        if self._asks_for_half(node):
            return "auto"
        if isinstance(node, ast.UnaryOp) and self._asks_for_half(node.operand):
            return False
        if isinstance(node, ast.IfExp) and any(self._asks_for_half(each) for each in ast.walk(node.test)):
            return self.constant(node.body)
        return ast.literal_eval(node)

    def _asks_for_half(self, node: ast.AST) -> bool:
        """Whether it asks if the device has bfloat16."""
        return isinstance(node, ast.Call) and self.name_of(node) in _HALF


def parsed_script(path: Path, text: str, unread: list[str]) -> ast.Module:
    """Of a notebook the code of its cells, without lines for a shell or for IPython (`!pip`, `%cd`).

    unread: gets the cells that are not Python. Raises ConfigError.
    """
    try:
        if path.suffix != ".ipynb":
            return _parsed(text)
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None
    except (*UNREADABLE, KeyError) as error:
        kind = "no notebook" if path.suffix == ".ipynb" else "not valid Python"
        raise ConfigError(f"{path}: is {kind}: {type(error).__name__}: {error}") from None
    code: list[ast.stmt] = []
    num_lines = 0  # of the cells before
    for number, source in enumerate(sources, 1):
        if _MAGIC.match(source):
            continue
        try:
            code += ast.increment_lineno(_parsed(source), num_lines).body
        except (SyntaxError, *UNREADABLE):
            unread.append(f"cell {number}: not Python: passed over")
        num_lines += source.count("\n") + 1
    return ast.Module(code, [])


def _parsed(text: str) -> ast.Module:
    """Without lines for a shell where there are some, as in a notebook that was saved as a script."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        try:
            return ast.parse(_SHELL.sub(r"\1pass", text))
        except SyntaxError:
            raise error from None


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _extent(node: Any) -> tuple[Place, Place]:
    return (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)


def _is_cell(node: ast.AST) -> bool:
    """Of a marimo notebook, whose parameters are the names of other cells."""
    return any(ast.unparse(each).startswith("app.cell") for each in getattr(node, "decorator_list", ()))


def _other_targets(node: ast.AST) -> list[ast.expr]:
    """Names that a node gives a value in another way than `name = value`, or whose value it changes."""
    if isinstance(node, ast.For | ast.AsyncFor | ast.AugAssign | ast.NamedExpr):
        return [node.target]
    if isinstance(node, ast.With | ast.AsyncWith):
        return [item.optional_vars for item in node.items if item.optional_vars]
    if isinstance(node, ast.Assign):
        several = node.targets if len(node.targets) > 1 else []
        return [*several, *(each.value for each in node.targets if isinstance(each, ast.Subscript))]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATES:
        return [node.func.value] if isinstance(node.func.value, ast.Name) else []
    return []


def _computed(operation: ast.operator, left: Any, right: Any) -> Any:
    """Of numbers, or two texts or lists joined. Raises ValueError for what no setting is."""
    if not all(isinstance(each, int | float) for each in (left, right)) and not isinstance(operation, ast.Add):
        raise ValueError
    value = _ARITHMETIC[type(operation)](left, right)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError
    return value


def shown(node: ast.AST) -> str:
    """Its text, short, without the values of tokens and keys of services."""
    for each in ast.walk(node):
        for keyword in each.keywords if isinstance(each, ast.Call) else ():
            if SECRET.search(keyword.arg or ""):
                keyword.value = ast.Constant(...)
        if isinstance(each, ast.Dict):
            for place, key in enumerate(each.keys):
                if isinstance(key, ast.Constant) and SECRET.search(str(key.value)):
                    each.values[place] = ast.Constant(...)
    try:
        return ast.unparse(node)
    except RecursionError:
        return "..."


def without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_secrets(each) for key, each in value.items() if not SECRET.search(str(key))}
    return value


def public(key: str, value: Any) -> str:
    """The value of a key as it may be shown, without tokens and keys of services."""
    return "..." if SECRET.search(key) else short(without_secrets(value))
