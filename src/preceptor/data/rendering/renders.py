"""The renders of one conversation that the proof asks for, and where their characters came from.

All of them are made in one run of the template where it allows that (`onepass.py`), else one by one. What the template
did is recorded (`tape.Tape`) and replayed for all later conversations of that *shape* (the same roles and fields,
whatever the words) for which it would decide the same way; one by one, from the second of a shape on. Every render with
origins is compared, byte for byte, with the plain render of the same messages; of a pass and of a replay, the longest
is, and all of the first passes; and plain renders are compared with transformers' own for the first of a run and then
for a few in a thousand.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from preceptor.data.refusals import Refused
from preceptor.data.rendering.marked import Marked
from preceptor.data.rendering.onepass import Asked, Line, LooksAhead, Pass
from preceptor.data.rendering.origins import Head, Leaf, Rendered, leaves_of, shape_of
from preceptor.data.rendering.plans import Output, Plan, Recorded, RenderCache, Replay, Request, Shape, Strand
from preceptor.data.rendering.proof import Followed, Stops, Turn
from preceptor.data.rendering.provenance import compiled_one_pass, marked_message, pieces_of, render_marked
from preceptor.data.rendering.reasoning import has_reasoning
from preceptor.data.rendering.stencil import Filled
from preceptor.data.rendering.stencil_form import stencil_of
from preceptor.data.rendering.tape import Atom, Tape
from preceptor.data.rendering.tokenise import Tokeniser
from preceptor.data.template import Template
from preceptor.errors import TemplateError

Turns = Sequence[tuple[int, Mapping[str, Any]]]


class Renders:
    """The renders of one conversation under one template; `messages` are in a form that the template takes."""

    def __init__(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        cache: RenderCache,
        key: Any = None,
        turns: Turns = (),
        leaves: Sequence[Sequence[Leaf]] | None = None,
    ) -> None:
        """key: what the renders hang on besides messages and turns (tools, arguments); None: do not use the cache.

        turns: those that will be asked for, with the arguments that will be tried first; the last message is one.
        leaves: `leaves_of` each message, where they are known already.
        """
        self.messages = messages
        self._template, self._tools, self._cache = template, tools, cache
        self._seen = [template.message_rules.apply(message) for message in messages]
        self._arguments: dict[str, Mapping[str, Any]] = {}
        self.leaves: list[Leaf] = []
        self._starts = [0]
        for index, message in enumerate(messages):
            self.leaves += leaves_of(message, index) if leaves is None else leaves[index]
            self._starts.append(len(self.leaves))
        self._num_leaves = len(self.leaves)  # of the plan where one is replayed, which may have more
        self._turns = turns
        self._shapes: list[Shape] = []
        self._replay: Replay | None = None
        self._longest: Request | None = None  # of the replayed renders
        self._live: dict[Request, Rendered] = {}  # of one pass
        self._recording: Plan | None = None
        self._marked: list[dict[str, Any]] = []
        if key is not None:
            self._shapes = cache.shapes(key, self._seen_of_messages())
            self._use_plan()

    def _seen_of_messages(self) -> list[tuple[Any, bool]]:
        """What a template can see of each message, and whether it is a turn."""
        seen: list[tuple[Any, bool]] = [(shape_of(message), False) for message in self.messages]
        for k, _ in self._turns:
            seen[k] = (seen[k][0], has_reasoning(self.messages[k])), True
        return seen

    def _use_plan(self) -> None:
        shape = self._shapes[-1]
        for plan in shape.plans:
            values = plan.replay(self.leaves)
            if values is not None:
                self._replay = Replay(plan, values)
                self._cache.use(plan)
                self._num_leaves = plan.tape.num_leaves
                return
        if self._cache.one_pass and any(self._run_once(head_again) for head_again in (False, True)):
            return
        if shape.num_met > 1 and shape.recordable:
            self._recording = self._new_plan()
            self._marked = self._mark(self._recording.tape, len(self.messages))

    @property
    def layer(self) -> str:
        """What gives the renders."""
        if self._replay is not None:
            return "replay"
        return "one pass" if self._live else "one by one"

    def _new_plan(self) -> Plan:
        turns = [(k, self._key(arguments)) for k, arguments in self._turns]
        return Plan(Recorded(self.messages, self.leaves, self._starts, turns), Tape(len(self.leaves)))

    def _run_once(self, head_again: bool) -> bool:
        """Makes all renders in one pass for each of the arguments; whether that can be done."""
        template = compiled_one_pass(self._template.text_for(self._tools), head_again)
        if template is None:
            return False
        plan = self._new_plan()
        marked = self._mark(plan.tape, len(self.messages))
        asked: dict[str, list[Asked]] = {}
        for k, key in plan.recorded.turns:
            asked.setdefault(key, []).extend((Asked(k, True), Asked(k + 1, False)))
        try:
            for key, several in asked.items():
                done = Pass(marked, several)
                done.run(template, self._template.all_variables((), self._tools, False, self._arguments[key]))
                self._keep(plan, key, done)
        except (LooksAhead, Exception):  # what the template refuses, it refuses one by one too, and there it is told
            self._live.clear()
            return False
        compared = list(self._live) if self._cache.compares_pass() else [max(self._live, key=lambda r: r.num_messages)]
        if any(self._live[request].text != self._plain(request) for request in compared):
            self._cache.one_pass = False
            self._live.clear()
            return False
        self._recording = plan
        return True

    def _keep(self, plan: Plan, key: str, done: Pass) -> None:
        strands: dict[Line, tuple[list[str], Strand, list[int]]] = {}  # pieces, strand, how many pieces by outputs
        heads: dict[Line, Head] = {}  # of the last render on the line: the next begins with a little more
        for asked, (line, num_outputs, outputs) in done.written.items():
            if line not in strands:
                each = [pieces_of(plan.tape, [output]) for output in line.outputs]
                ends = [0, *accumulate(len(pieces) for pieces, _ in each)]
                strand = Strand([atom for _, atoms in each for atom in atoms])
                strands[line] = [piece for pieces, _ in each for piece in pieces], strand, ends
                heads[line] = Head("", strands[line][0], strand.origins, 0)
            shared, strand, ends = strands[line]
            pieces, atoms = pieces_of(plan.tape, outputs)
            output = Output(strand, ends[num_outputs], atoms, self._starts[max(asked.num_messages - 1, 0)])
            pieces = shared[output.num_shared : ends[num_outputs]] + pieces
            heads[line] = head = heads[line].upto(output.num_shared)
            request = Request(asked.num_messages, asked.add_generation_prompt, key)
            plan.outputs[request] = output
            self._live[request] = Rendered(pieces, output.origins, head, output.first_leaf, output.places)

    def _key(self, arguments: Mapping[str, Any]) -> str:
        key = json.dumps(arguments, sort_keys=True, default=str) if arguments else ""
        self._arguments[key] = arguments
        return key

    def _mark(self, tape: Tape, upto: int) -> list[dict[str, Any]]:
        return [self._mark_one(tape, index) for index in range(upto)]

    def _mark_one(self, tape: Tape, index: int) -> dict[str, Any]:
        marked = marked_message(self.messages[index], tape, self._starts[index])
        return self._template.message_rules.apply(marked)

    def finish(self) -> bool:
        """Call when a conversation is done: keeps what was recorded; False if what was replayed proves stale."""
        if self._recording is not None:
            self._shapes[-1].recordable = self._recording.exact
            if self._recording.exact:
                self._cache.add(self._shapes, self._recording)
        if self._replay is None or self._longest is None:
            return True
        if self._replay.text(self._longest) == self._plain(self._longest):
            return True
        self._cache.remove(self._replay.plan)
        return False

    def fill(self, tokeniser: Tokeniser, stops: Stops, stop_token_ids: Collection[int]) -> list[Filled] | None:
        """The turns by the stencil of the plan that is replayed; None where they must be proved one by one."""
        if self._replay is None or not (self._cache.stencils and tokeniser.goes_by_words):
            return None
        plan = self._replay.plan
        if not plan.stencil_tried:
            plan.stencil, plan.stencil_tried = stencil_of(plan, tokeniser, stops, stop_token_ids), True
        if plan.stencil is None:
            return None
        turns = [k for k, _ in self._turns]
        filled = plan.stencil.fill(turns, self._replay.values, self.leaves, self.messages, tokeniser)
        if filled is not None:
            last, arguments = self._turns[-1]
            self._note(Request(last + 1, False, self._key(arguments)))
        return filled

    def turn(self, k: int, arguments: Mapping[str, Any]) -> Turn:
        """What the proof needs to know of turn k. Raises Refused where the template refuses the messages."""
        key = self._key(arguments)
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
        if self._replay is not None and request in self._replay.plan.outputs:
            self._note(request)
            return self._replay.text(request)
        if request in self._live or self._recording is not None:
            return self._rendered(request).text
        return self._plain(request)

    def _followed(self, k: int, key: str) -> Followed | None:
        """F with a message after turn k: a tool's result after tool calls, else a user's words; None if refused."""
        end = range(self._num_leaves, self._num_leaves + 1)
        for role in ("tool", "user") if self.messages[k].get("tool_calls") else ("user",):
            try:
                return Followed(self._rendered(Request(k + 1, False, key, role), only=k), end)
            except Refused:
                continue
        return None

    def _rendered(self, request: Request, only: int | None = None) -> Rendered:
        """A render with all leaves marked; `only`: those of that message suffice."""
        if self._replay is not None and request in self._replay.plan.outputs:
            self._note(request)
            return self._replay.rendered(request)
        if request in self._live:
            return self._live[request]
        if self._recording is not None:
            if not self._marked:
                self._marked = self._mark(self._recording.tape, len(self.messages))
            rendered, atoms = self._marked_render(request, self._recording.tape, self._marked)
            first_leaf = self._starts[max(request.num_messages - 1, 0)]
            self._recording.outputs[request] = Output(Strand(()), 0, atoms, first_leaf)
            return rendered
        tape = Tape(len(self.leaves))
        if only is None:
            return self._marked_render(request, tape, self._mark(tape, request.num_messages))[0]
        seen = self._seen.copy()
        seen[only] = self._mark_one(tape, only)
        return self._marked_render(request, tape, seen)[0]

    def _note(self, request: Request) -> None:
        if self._longest is None or request.num_messages >= self._longest.num_messages:
            self._longest = request

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
        origin, start = self._num_leaves, self._starts[request.num_messages - 1]
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
