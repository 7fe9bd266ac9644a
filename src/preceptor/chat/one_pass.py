"""The renders of many beginnings of one conversation in one run of the template: linear where one by one is quadratic.

The proof asks for the prompt before, and the render up to, every turn. Nearly all templates have the form

    HEAD {% for message in messages %} BODY {% endfor %} TAIL

and what they have written when they come to message i depends on little that comes after it. So the template is
compiled as

    HEAD {% for world in worlds %} {% for message in loop_from(messages) %} BODY {% endfor %} TAIL {% endfor %}

and run once. A *world* is one requested render: that of the first n messages, shorter ones first; in it the
conversation has n messages, whichever way the template asks. What BODY writes for a message holds in longer worlds too
unless it has read what depends on the end: that there is no message n, how many there are, whether a generation prompt
is wanted. As long as it has not, a world leaves what it wrote, and the state that it came to (the template's
namespaces: the only variables that outlive a turn of a loop), to the next, which goes on from there.

    n=2   HEAD 0 1 TAIL       n=3   2 TAIL       n=4   2 3 TAIL       (at n=3, message 2 has read that it is the last)

Where HEAD itself asks such things (which user's message is the last, say) it is run again in each world, and worlds go
on from others in which it came to the same. `LooksAhead` is raised where that saves nothing; then, and for templates
of another form, renders are made one by one.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from traceback import walk_tb
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Namespace, missing
from jinja2.visitor import NodeTransformer

from preceptor.chat.environment import plain_environment

_WORTH = 0.75  # of the turns of the main loop that one by one would take; a pass that takes more saves nothing
_FEW_TURNS = 24
_PROMPTED = "add_generation_prompt"
_OTHER_FORMS = (nodes.Break, nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport)
_STATEFUL = {"cycler", "joiner"}  # what besides namespaces changes while a template runs


class LooksAhead(BaseException):
    """The template asked for what differs in a shorter conversation. No Exception, for the reason of `RenderLimit`."""


class Request(NamedTuple):
    """Which render is asked for: of the first `num_messages` and, if named, a message of role `follower`.

    One pass gives renders with the same arguments, and without a follower.
    """

    num_messages: int
    add_generation_prompt: bool
    arguments: str = ""  # `Renders.key` of the template's arguments
    follower: str = ""


@dataclass(eq=False, slots=True)
class Line:
    """What worlds have in common that go on from one another: the outputs, and where and in which state they end."""

    outputs: list[str]
    item: int = 0  # the message that comes next
    state: list[dict[str, Any]] = field(default_factory=list)  # of the namespaces, in the order of their making


def raised_in_pass(error: Exception) -> bool:
    """Whether an error was raised by what stands in this file, and not by the template."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == __name__


class OnePass:
    """One run of a template in its one-pass form over `messages`, for the renders `asked`."""

    def __init__(self, messages: Sequence[Any], asked: Sequence[Request]) -> None:
        self._messages = messages
        self._asked = sorted(asked)
        self._now: Request | None = None  # the world; None: before the first, in what is common to all
        self._read_the_end = False  # since the main loop began, something was read that depends on how many there are
        self._lines: dict[Any, Line] = {}
        self._line = Line([])
        self._namespaces: list[Namespace] = []
        self._outputs: list[str] = []  # that are no line's yet
        self._common: list[str] = []  # outputs before the first world
        self._turns_left = _FEW_TURNS + _WORTH * sum(one.num_messages for one in asked)
        # What was written for each render: the first outputs of a line, how many, and what follows them.
        self._written: dict[Request, tuple[Line, int, list[str]]] = {}

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> dict[Request, str]:
        """The renders; those of a line are made one from another. Raises LooksAhead, and what the template raises."""
        own = {
            "messages": Messages(self, 0),
            "namespace": self._namespace,
            "__worlds__": self._worlds(),
            "__pass__": self,
        }
        for output in template.root_render_func(template.new_context({**variables, **own})):
            self._outputs.append(output)  # which is another list in each world
        texts: dict[Request, str] = {}
        heads: dict[Line, tuple[int, str]] = {}  # of the last render on a line: the next begins with a little more
        for asked, (line, num_shared, outputs) in self._written.items():
            num, head = heads.pop(line, (0, ""))
            head += "".join(line.outputs[num:num_shared])  # where nothing else holds it, Python lengthens it in place
            heads[line] = num_shared, head
            texts[asked] = head + "".join(outputs)
        return texts

    def _worlds(self) -> Iterator[None]:
        self._common, self._outputs = self._outputs, []
        state = self._state(len(self._namespaces))
        for asked in self._asked:
            self._now = asked
            del self._namespaces[len(state) :]
            self._put_back(state)
            yield None
            self._written[asked] = self._line, len(self._line.outputs), self._outputs
            self._outputs = []

    # What the template asks ------------------------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        """Whether there is a message of this number."""
        if self._now is None and index >= self._asked[0].num_messages:
            raise LooksAhead
        there_is = self._now is None or index < self._now.num_messages
        self._read_the_end = self._read_the_end or not there_is
        return there_is

    def message(self, index: int) -> Any:
        if not self.has(index):
            raise IndexError(index)
        return self._messages[index]

    def world(self) -> Request:
        """For what is not the same in longer worlds."""
        if self._now is None:
            raise LooksAhead
        self._read_the_end = True
        return self._now

    def prompted(self) -> bool:
        return self.world().add_generation_prompt

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        self._namespaces.append(Namespace(*args, **kwargs))
        return self._namespaces[-1]

    # The main loop ---------------------------------------------------------------------------------------------------

    def loop_from(self, messages: Any, of_head: Sequence[Any] | None) -> Any:
        """What the main loop goes over in this world; of_head: what HEAD has set, None where it is run only once."""
        if not isinstance(messages, Messages):
            self._line = Line([])
            self._outputs = [*self._common, *self._outputs]
            self._turns_left -= self.world().num_messages
            return messages
        came_to = None
        if of_head is not None:
            came_to = _frozen([of_head, [_attributes(n) for n in self._namespaces], self._outputs])
        key = messages.start, came_to
        line = self._lines.get(key)
        if line is None:
            state = self._state(len(self._namespaces))
            line = self._lines[key] = Line([*self._common, *self._outputs], messages.start, state)
        self._put_back(line.state)
        self._line, self._outputs, self._read_the_end = line, [], False
        assert self._now is not None
        return LoopFrom(self, messages, line.item - messages.start, self._now.num_messages)

    def ends_turn(self, item: int) -> None:
        """BODY is through with the message before `item`."""
        self._turns_left -= 1
        if self._turns_left < 0:
            raise LooksAhead
        if not self._read_the_end:
            self._line.outputs += self._outputs
            self._outputs = []
            self._line.item, self._line.state = item, self._state(len(self._line.state))

    def _state(self, num_namespaces: int) -> list[dict[str, Any]]:
        return [dict(_attributes(namespace)) for namespace in self._namespaces[:num_namespaces]]

    def _put_back(self, state: Sequence[dict[str, Any]]) -> None:
        for namespace, attributes in zip(self._namespaces, state, strict=False):
            namespace._Namespace__attrs = dict(attributes)  # type: ignore[attr-defined]


def _attributes(namespace: Namespace) -> dict[str, Any]:
    attributes: dict[str, Any] = namespace._Namespace__attrs  # type: ignore[attr-defined]
    return attributes


def _frozen(value: Any) -> Any:
    """The same for values that a template cannot tell apart."""
    if type(value) in (str, int, float, bool, type(None)):
        return type(value), value
    if isinstance(value, Messages):
        return Messages, value.start
    if isinstance(value, Undefined):
        return Undefined
    if isinstance(value, Namespace):
        return Namespace  # their attributes are frozen by themselves
    if isinstance(value, list | tuple):
        return (type(value), *map(_frozen, value))
    if isinstance(value, dict):
        return (dict, *[(key, _frozen(inner)) for key, inner in value.items()])
    return type(value), id(value)


class Messages(Sequence[Any]):
    """The messages from number `start` on, as many as this world has; tells the pass what it is asked."""

    def __init__(self, one_pass: OnePass, start: int) -> None:
        self._pass, self.start = one_pass, start

    def __bool__(self) -> bool:
        return self._pass.has(self.start)

    def __len__(self) -> int:
        return max(0, self._pass.world().num_messages - self.start)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            first = key.start or 0
            if first >= 0 and key.stop is None and key.step in (None, 1):
                return Messages(self._pass, self.start + first)
            return list(self)[key]
        index = operator.index(key)
        index += len(self) if index < 0 else 0
        if index < 0:
            raise IndexError(key)
        return self._pass.message(self.start + index)

    def __eq__(self, other: object) -> bool:
        raise LooksAhead

    __hash__ = None  # type: ignore[assignment]


class LoopFrom:
    """Messages from `at` on, up to number `end`, for a loop that believes to have come there from the first."""

    def __init__(self, one_pass: OnePass, messages: Messages, at: int, end: int) -> None:
        self.one_pass, self.messages, self.at, self.end = one_pass, messages, at, end

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Any]:
        for item in range(self.messages.start + self.at, self.end):
            yield self.one_pass.message(item)
            self.one_pass.ends_turn(item + 1)


class LoopFromContext(LoopContext):
    """Jinja's `loop`; over a LoopFrom it counts from the first message, and looks at the next one without taking it."""

    def __init__(self, iterable: Any, *args: Any) -> None:
        super().__init__(iterable, *args)
        if isinstance(iterable, LoopFrom):
            self.index0 = iterable.at - 1
            if iterable.at > 0:
                self._current = iterable.one_pass.message(iterable.messages.start + iterable.at - 1)

    def _peek_next(self) -> Any:
        loop = self._iterable
        if not isinstance(loop, LoopFrom):
            return super()._peek_next()
        item = loop.messages.start + self.index0 + 1
        return loop.one_pass.message(item) if loop.one_pass.has(item) else missing


# The one-pass form ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def one_pass(text: str, head_again: bool = False) -> jinja2.Template | None:
    """The template in its one-pass form, compiled once; None if it has not the form that this takes.

    head_again: what comes before the main loop is run again in each world.
    """
    environment = plain_environment().overlay()
    # It asks the pass by filters, which Jinja calls at a third of a function's cost.
    environment.filters = {**environment.filters, "__loop_from__": OnePass.loop_from, "__prompted__": OnePass.prompted}
    try:
        return _compiled(environment, text, head_again)
    except Exception:  # one loop more than Python can nest, say
        return None


def _compiled(environment: jinja2.Environment, text: str, head_again: bool) -> jinja2.Template | None:
    tree = _Prompted().visit(environment.parse(text))
    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For) and node.find(nodes.Output)]
    if not loops or _keeps_state(tree):
        return None
    if any(name.ctx == "store" and name.name == _PROMPTED for name in tree.find_all(nodes.Name)):
        return None
    head, main, tail = tree.body[: loops[-1]], tree.body[loops[-1]], tree.body[loops[-1] + 1 :]
    if main.test is not None or main.else_ or main.recursive:
        return None
    again = head if head_again else []
    of_head = {name.name: None for node in again for name in node.find_all(nodes.Name) if name.ctx == "store"}
    set_by_head = nodes.Tuple([nodes.Name(name, "load") for name in of_head], "load")
    main.iter = _ask("__loop_from__", main.iter, set_by_head if head_again else nodes.Const(None))
    world = nodes.Name("__world__", "store")
    worlds = nodes.For(world, nodes.Name("__worlds__", "load"), [*again, main, *tail], [], None, False)
    tree.body = [worlds] if head_again else [*head, worlds]
    worlds.set_lineno(main.lineno)
    worlds.set_environment(environment)
    code = environment.compile(tree)
    template = environment.template_class.from_code(environment, code, environment.make_globals({}))
    template.root_render_func.__globals__["LoopContext"] = LoopFromContext
    return template


def _ask(name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(nodes.Name("__pass__", "load"), name, list(arguments), [], None, None)


def _keeps_state(tree: nodes.Template) -> bool:
    """Whether anything but a namespace outlives a turn of the loop, or the template is spread over several files."""
    stateful = any(name.name in _STATEFUL for name in tree.find_all(nodes.Name))
    changed = any(attribute.attr == "changed" for attribute in tree.find_all(nodes.Getattr))
    if stateful or changed or any(tree.find(kind) is not None for kind in _OTHER_FORMS):
        return True
    # A namespace that is held by anything but the name that it was made under would not be put back.
    made = [node for node in tree.find_all(nodes.Assign) if _makes_namespace(node.node)]
    names = {node.target.name for node in made if isinstance(node.target, nodes.Name)}
    held = (node.node for node in tree.find_all(nodes.Assign) if isinstance(node.node, nodes.Name))
    num_calls = sum(_makes_namespace(call) for call in tree.find_all(nodes.Call))
    named = all(isinstance(node.target, nodes.Name) for node in made)
    return not named or num_calls != len(made) or any(name.name in names for name in held)


def _makes_namespace(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "namespace"


class _Prompted(NodeTransformer):
    """Asks for `add_generation_prompt` again wherever it is read: it is not the same in every world."""

    def visit_If(self, node: nodes.If) -> nodes.Node | list[nodes.Node]:
        self.generic_visit(node)
        test = node.test.node if isinstance(node.test, nodes.Not) else node.test
        never = isinstance(test, nodes.Const) and bool(test.value) == isinstance(node.test, nodes.Not)
        return node.else_ if never and not node.elif_ else node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        if isinstance(node.node, nodes.Name) and node.node.name == _PROMPTED and node.name in ("defined", "undefined"):
            return nodes.Const(node.name == "defined", lineno=node.lineno, environment=node.environment)
        return self.generic_visit(node)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name != _PROMPTED or node.ctx != "load":
            return node
        asked = _ask("__prompted__").set_lineno(node.lineno)
        return asked.set_environment(node.environment) if node.environment else asked
