"""The renders of one conversation that the proof asks for, and where their characters came from.

A conversation whose like has not been met is rendered as often as the proof asks. From the second of a *shape* on (the
same roles and fields, whatever the words) what the template does is recorded (`tape.Tape`) and replayed for all later
ones of that shape for which the template would decide the same way. Every render with origins is compared, byte for
byte, with the plain render of the same messages; of a replayed conversation, the longest is; and plain renders are
compared with transformers' own for the first of a run and then for a few in a thousand.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.data.refusals import Refused
from preceptor.data.rendering.marked import Marked
from preceptor.data.rendering.origins import Leaf, Rendered, leaves_of, places_of, shape_of
from preceptor.data.rendering.proof import Followed, Turn
from preceptor.data.rendering.provenance import marked_message, render_marked
from preceptor.data.rendering.tape import Atom, Tape
from preceptor.data.template import Template
from preceptor.errors import TemplateError

_MAX_SHAPES = 512
_MAX_PLANS_PER_SHAPE = 8
_MAX_REFS = 500_000  # of all plans together; about 20 bytes each
_CHECKED_RENDERS = 16
_CHECK_EVERY = 499


@dataclass(frozen=True, slots=True)
class Request:
    """Which render is asked for: of the first `num_messages` and, if named, a message of role `follower`."""

    num_messages: int
    add_generation_prompt: bool
    arguments: str
    follower: str = ""


class Output:
    """One render on a tape: the values that its pieces are, the leaves that they come from, and the pieces by leaf.

    Pieces by leaf are kept from `first_leaf` on, those of the last message: a plan of many turns has many outputs.
    """

    __slots__ = ("_first_leaf", "_origins", "_places", "refs")

    def __init__(self, atoms: Sequence[Atom], first_leaf: int) -> None:
        self.refs = [atom.ref for atom in atoms]
        self._origins = [atom.origin for atom in atoms]
        self._places = places_of(self._origins, first_leaf)
        self._first_leaf = first_leaf

    def rendered(self, values: Sequence[str]) -> Rendered:
        return Rendered([values[ref] for ref in self.refs], self._origins, self._places, self._first_leaf)


@dataclass(eq=False, slots=True)
class Plan:
    """What the template does with conversations of one shape: a tape, and each render on it."""

    tape: Tape
    outputs: dict[Request, Output] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.tape.exact and all(-1 not in output.refs for output in self.outputs.values())

    @property
    def num_refs(self) -> int:
        return sum(len(output.refs) for output in self.outputs.values())


@dataclass(eq=False, slots=True)
class Shape:
    """All conversations with the same roles, fields and arguments: how many were met, and the plans for them."""

    num_met: int = 0
    plans: list[Plan] = field(default_factory=list)
    recordable: bool = True


class RenderCache:
    """The shapes that were met, the least recently used forgotten; and how many renders there were."""

    def __init__(self, tokenizer: Any) -> None:
        self._shapes: OrderedDict[Any, Shape] = OrderedDict()
        self._num_refs = 0
        self._tokenizer = tokenizer
        self._num_renders = 0

    def shape(self, key: Any) -> Shape:
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = Shape()
            self._forget_some()
        else:
            self._shapes.move_to_end(key)
        shape.num_met += 1
        return shape

    def add(self, shape: Shape, plan: Plan) -> None:
        shape.plans.insert(0, plan)
        self._num_refs += plan.num_refs
        self._forget_some()

    def _forget_some(self) -> None:
        while len(self._shapes) > _MAX_SHAPES or (self._num_refs > _MAX_REFS and len(self._shapes) > 1):
            _, shape = self._shapes.popitem(last=False)
            self._num_refs -= sum(plan.num_refs for plan in shape.plans)
            shape.plans.clear()

    def remove(self, shape: Shape, plan: Plan) -> None:
        shape.plans.remove(plan)
        self._num_refs -= plan.num_refs

    def compares(self) -> bool:
        """Whether the next plain render is to be compared with transformers'."""
        self._num_renders += 1
        return self._num_renders <= _CHECKED_RENDERS or self._num_renders % _CHECK_EVERY == 0

    def transformers_render(self, template: Template, messages: Sequence[Any], tools: Any, **arguments: Any) -> str:
        text = template.text_for(tools)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, chat_template=text, tokenize=False, **arguments
                )
            )
        except Exception as error:  # transformers refuses what the sandbox here allows
            raise Refused("render_differs", f"template {template.name} in transformers: {error}") from error


class Renders:
    """The renders of one conversation under one template; `messages` are in a form that the template takes."""

    def __init__(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        cache: RenderCache,
        key: Any = None,
    ) -> None:
        """key: what the renders hang on besides the messages (tools, arguments, turns); None: do not use the cache."""
        self.messages = messages
        self._template, self._tools, self._cache = template, tools, cache
        self._seen = [template.message_rules.apply(message) for message in messages]
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
        if key is not None:
            self._use_plan(cache.shape((key, tuple(map(shape_of, messages)))))

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
            self._marked = self._mark(self._recording.tape, len(self.messages))

    def _mark(self, tape: Tape, upto: int) -> list[dict[str, Any]]:
        return [self._mark_one(tape, index) for index in range(upto)]

    def _mark_one(self, tape: Tape, index: int) -> dict[str, Any]:
        marked = marked_message(self.messages[index], tape, self._starts[index])
        return self._template.message_rules.apply(marked)

    def finish(self) -> bool:
        """Call when a conversation is done: keeps what was recorded; False if what was replayed proves stale."""
        if self._shape is None:
            return True
        if self._recording is not None:
            self._shape.recordable = self._recording.exact
            if self._recording.exact:
                self._cache.add(self._shape, self._recording)
        if self._plan is None or self._longest is None:
            return True
        if self._replayed(self._longest).text == self._plain(self._longest):
            return True
        self._cache.remove(self._shape, self._plan)
        return False

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
            full=self._rendered(full, only=k),
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
                return Followed(self._rendered(Request(k + 1, False, key, role), only=k), end)
            except Refused:
                continue
        return None

    def _rendered(self, request: Request, only: int | None = None) -> Rendered:
        """A render with all leaves marked; `only`: those of that message suffice."""
        if self._plan is not None and request in self._plan.outputs:
            return self._replayed(request)
        if self._recording is not None:
            rendered, atoms = self._marked_render(request, self._recording.tape, self._marked)
            self._recording.outputs[request] = Output(atoms, self._starts[max(request.num_messages - 1, 0)])
            return rendered
        tape = Tape(len(self.leaves))
        if only is None:
            return self._marked_render(request, tape, self._mark(tape, request.num_messages))[0]
        seen = self._seen.copy()
        seen[only] = self._mark_one(tape, only)
        return self._marked_render(request, tape, seen)[0]

    def _replayed(self, request: Request) -> Rendered:
        assert self._plan is not None
        if self._longest is None or request.num_messages >= self._longest.num_messages:
            self._longest = request
        return self._plan.outputs[request].rendered(self._values)

    def _marked_render(
        self, request: Request, tape: Tape, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[Rendered, list[Atom]]:
        shown = list(messages[: request.num_messages])
        if request.follower:
            shown.append(self._follower(request, tape))
        arguments = self._arguments[request.arguments]
        variables = self._template.all_variables(shown, self._tools, request.add_generation_prompt, arguments)
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
        origin, start = len(self.leaves), self._starts[request.num_messages - 1]
        own = self.leaves[start : self._starts[request.num_messages]]
        marked: dict[str, Any] = {}
        for name, text in self._plain_follower(request).items():
            source = next((start + at for at, leaf in enumerate(own) if leaf.text == text), None)
            ref = tape.constant(text) if source is None or name == "content" else source
            marked[name] = text if name == "role" else Marked.make(tape, text, (Atom(len(text), origin, ref),))
        return marked

    def _plain_follower(self, request: Request) -> dict[str, Any]:
        if request.follower == "user":
            return {"role": "user", "content": "And then?"}
        call = self.messages[request.num_messages - 1]["tool_calls"][0]
        taken = {"tool_call_id": call.get("id"), "name": call.get("function", call).get("name")}
        return {
            "role": "tool",
            "content": "done",
            **{name: text for name, text in taken.items() if isinstance(text, str)},
        }

    def _plain(self, request: Request) -> str:
        """The render of plain strings. Raises Refused where the template refuses the messages."""
        seen = self._seen[: request.num_messages]
        follower = [self._plain_follower(request)] if request.follower else []
        arguments = self._arguments[request.arguments]
        try:
            text = self._template.render_seen(seen + follower, self._tools, request.add_generation_prompt, arguments)
        except TemplateError as error:
            raise Refused("template_refuses", str(error)) from error
        if self._cache.compares():
            given = [*self.messages[: request.num_messages], *follower]
            prompted = {"add_generation_prompt": request.add_generation_prompt, **arguments}
            if self._cache.transformers_render(self._template, given, self._tools, **prompted) != text:
                raise Refused("render_differs", f"template {self._template.name} renders otherwise in transformers")
        return text
