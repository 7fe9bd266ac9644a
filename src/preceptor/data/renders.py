"""The renders of one conversation that the proof asks for, and where their characters came from.

A conversation whose like has not been met is rendered as often as the proof asks. From the second of a *shape* on (the
same roles and fields, whatever the words) the operations of the template are recorded (`marked.Tape`) and replayed for
all later ones of that shape for which the template would decide the same way. Every render with origins is compared
with the plain render of the same messages; of a replayed conversation, the longest is.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.data.marked import Atom, Marked, Tape
from preceptor.data.proof import Followed, Turn
from preceptor.data.provenance import Leaf, Rendered, leaves_of, marked_message, render_marked
from preceptor.data.refusals import Refused
from preceptor.data.template import Template
from preceptor.errors import TemplateError

_MAX_SHAPES = 2048
_MAX_PLANS_PER_SHAPE = 8
_CHECKED_RENDERS = 16  # compared with transformers' own; then one in _CHECK_EVERY
_CHECK_EVERY = 499


@dataclass(frozen=True, slots=True)
class Request:
    """Which render is asked for: of the first `num_messages`, and of a message of role `follower` after them, if any."""

    num_messages: int
    add_generation_prompt: bool
    arguments: str
    follower: str = ""


@dataclass(eq=False, slots=True)
class Plan:
    """What the template does with conversations of one shape: a tape, and the atoms of each render on it."""

    tape: Tape
    outputs: dict[Request, tuple[list[int], list[int | None]]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.tape.exact and all(-1 not in refs for refs, _ in self.outputs.values())


@dataclass(eq=False, slots=True)
class Shape:
    """All conversations with the same roles, fields and arguments: how many were met, and the plans for them."""

    num_met: int = 0
    plans: list[Plan] = field(default_factory=list)
    recordable: bool = True


class RenderCache:
    """The shapes that were met, the least recently used forgotten; and how often renders were compared."""

    def __init__(self, tokenizer: Any) -> None:
        self._shapes: OrderedDict[Any, Shape] = OrderedDict()
        self._tokenizer = tokenizer
        self._num_renders = 0

    def shape(self, key: Any) -> Shape:
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = Shape()
            if len(self._shapes) > _MAX_SHAPES:
                self._shapes.popitem(last=False)
        else:
            self._shapes.move_to_end(key)
        shape.num_met += 1
        return shape

    def check(self, template: Template, text: str, messages: Sequence[Any], tools: Any, **arguments: Any) -> None:
        """Compare a plain render with transformers', for the first of a run and then a few in a thousand."""
        self._num_renders += 1
        if self._num_renders > _CHECKED_RENDERS and self._num_renders % _CHECK_EVERY:
            return
        expected = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template.text_for(tools), tokenize=False, **arguments
        )
        if text != expected:
            raise Refused("render_differs", f"template {template.name} renders otherwise in transformers")


class Renders:
    """The renders of one conversation under one template; `messages` are in a form that the template takes."""

    def __init__(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        cache: RenderCache,
        shape_of: Any = None,
    ) -> None:
        """shape_of: what the renders hang on besides the messages (tools, arguments, turns); None: do not cache."""
        self._template, self.messages, self._tools, self._cache = template, messages, tools, cache
        self._arguments: dict[str, Mapping[str, Any]] = {}
        self.leaves: list[Leaf] = []
        self._starts = [0]
        for index, message in enumerate(messages):
            self.leaves += leaves_of(message, index)
            self._starts.append(len(self.leaves))
        self._shape: Shape | None = None
        self._plan: Plan | None = None
        self._values: list[Any] = []
        self._longest: Request | None = None  # of the replayed renders
        self._recording: Plan | None = None
        self._marked: list[dict[str, Any]] = []
        if shape_of is not None:
            self._use_plan(cache.shape((shape_of, tuple(map(shape_key, messages)))))

    def _use_plan(self, shape: Shape) -> None:
        self._shape = shape
        texts = [leaf.text for leaf in self.leaves]
        for plan in shape.plans:
            values = plan.tape.replay(texts)
            if values is not None:
                self._plan, self._values = plan, values
                return
        if shape.recordable and shape.num_met > 1 and len(shape.plans) < _MAX_PLANS_PER_SHAPE:
            self._recording = Plan(Tape(len(self.leaves)))
            self._marked = self._mark(self._recording.tape, range(len(self.messages)))

    def _mark(self, tape: Tape, which: range) -> list[dict[str, Any]]:
        apply = self._template.message_rules.apply
        return [
            apply(marked_message(message, tape, self._starts[index]) if index in which else message)
            for index, message in enumerate(self.messages)
        ]

    def finish(self) -> bool:
        """Call when a conversation is done: keeps what was recorded; False if what was replayed proves stale."""
        if self._recording is not None and self._shape is not None:
            self._shape.recordable = self._recording.exact
            if self._recording.exact:
                self._shape.plans.insert(0, self._recording)
        if self._plan is not None and self._shape is not None:
            if self._longest is not None and self._replayed(self._longest).text != self._plain(self._longest):
                self._shape.plans.remove(self._plan)
                return False
        return True

    def turn(self, k: int, arguments: Mapping[str, Any]) -> Turn:
        """What the proof needs to know of turn k. Raises Refused where the template refuses the messages."""
        key = json.dumps(arguments, sort_keys=True, default=str) if arguments else ""
        self._arguments[key] = arguments
        prompt, full = Request(k, True, key), Request(k + 1, False, key)
        return Turn(
            where=f"messages[{k}]",
            given=self.messages[k],
            leaves=self.leaves,
            own=range(self._starts[k], self._starts[k + 1]),
            prompt=self._prompt(prompt),
            full=self._rendered(full, range(k, k + 1)),
            prompt_marked=lambda: self._rendered(prompt),
            full_marked=lambda: self._rendered(full),
            followed=lambda: self._followed(k, key),
        )

    def _prompt(self, request: Request) -> str:
        if self._plan is None and self._recording is None:
            return self._plain(request)
        return self._rendered(request).text

    def _followed(self, k: int, key: str) -> Followed | None:
        """F with a message after turn k: a tool's result after tool calls, else a user's words; None if refused."""
        end = range(len(self.leaves), len(self.leaves) + 1)
        for role in ("tool", "user") if self.messages[k].get("tool_calls") else ("user",):
            try:
                return Followed(self._rendered(Request(k + 1, False, key, role), range(k, k + 1)), end)
            except Refused:
                continue
        return None

    def _rendered(self, request: Request, which: range | None = None) -> Rendered:
        """A render with the leaves of `which` messages marked, at least; None: of all."""
        if self._plan is not None and request in self._plan.outputs:
            return self._replayed(request)
        if self._recording is not None:
            rendered, atoms = self._marked_render(request, self._recording.tape, self._marked)
            self._recording.outputs[request] = [atom.ref for atom in atoms], [atom.origin for atom in atoms]
            return rendered
        tape = Tape(len(self.leaves))
        which = range(request.num_messages) if which is None else which
        return self._marked_render(request, tape, self._mark(tape, which))[0]

    def _replayed(self, request: Request) -> Rendered:
        assert self._plan is not None
        if self._longest is None or request.num_messages >= self._longest.num_messages:
            self._longest = request
        refs, origins = self._plan.outputs[request]
        values = self._values
        return Rendered([values[ref] for ref in refs], origins)

    def _marked_render(
        self, request: Request, tape: Tape, messages: Sequence[dict[str, Any]]
    ) -> tuple[Rendered, list[Atom]]:
        shown = list(messages[: request.num_messages])
        if request.follower:
            shown.append(self._follower(request, tape))
        variables = {
            **self._template.variables,
            **self._arguments[request.arguments],
            "messages": shown,
            "tools": self._tools,
            "documents": None,
            "add_generation_prompt": request.add_generation_prompt,
        }
        expected = self._plain(request)
        try:
            rendered, atoms = render_marked(self._template.text_for(self._tools), tape, variables)
        except Exception as error:
            raise Refused("render_differs", f"template {self._template.name}: {error}") from error
        if rendered.text != expected:
            raise Refused("render_differs", f"template {self._template.name} renders otherwise with origins")
        return rendered, atoms

    def _follower(self, request: Request, tape: Tape) -> dict[str, Any]:
        """The message after the turn; what it takes over from the turn's call does not count as the turn's."""
        origin = len(self.leaves)
        message = self._plain_follower(request)
        own = self.leaves[self._starts[request.num_messages - 1] : self._starts[request.num_messages]]
        marked: dict[str, Any] = {"role": message["role"]}
        for name, text in message.items():
            if name == "role":
                continue
            source = next((i for i, leaf in enumerate(own) if leaf.text == text and name != "content"), None)
            ref = tape.constant(text) if source is None else self._starts[request.num_messages - 1] + source
            marked[name] = Marked.make(tape, text, (Atom(len(text), origin, ref),))
        return marked

    def _plain_follower(self, request: Request) -> dict[str, Any]:
        if request.follower == "user":
            return {"role": "user", "content": "And then?"}
        call = self.messages[request.num_messages - 1]["tool_calls"][0]
        function = call.get("function") or call
        message = {"role": "tool", "content": "done", "tool_call_id": call.get("id"), "name": function.get("name")}
        return {name: text for name, text in message.items() if isinstance(text, str)}

    def _plain(self, request: Request) -> str:
        messages = list(self.messages[: request.num_messages])
        if request.follower:
            messages.append(self._plain_follower(request))
        arguments = self._arguments[request.arguments]
        try:
            text = self._template.render(messages, self._tools, request.add_generation_prompt, **arguments)
        except TemplateError as error:
            raise Refused("template_refuses", str(error)) from error
        self._cache.check(
            self._template,
            text,
            messages,
            self._tools,
            add_generation_prompt=request.add_generation_prompt,
            **arguments,
        )
        return text


def shape_key(value: Any) -> Any:
    """What a template can see of a message without reading its text: names, types, and values that are not text."""
    if isinstance(value, str):
        return str
    if isinstance(value, Mapping):
        return tuple([(k, v if k in ("role", "type") else shape_key(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (list, *map(shape_key, value))
    return (type(value), value)
