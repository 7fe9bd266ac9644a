"""What the template was seen to do with conversations of one shape, kept so that it can be done again without it.

A *shape* is what a template can see of a conversation without reading its text: the roles and fields. A `Plan` holds
the tape of one run (`tape.Tape`) and, for each render of it, which of the tape's values its pieces are. It serves all
conversations whose shape the recorded one begins with: a render of the first messages knows nothing of later ones.
Renders that begin alike share a *line*: the open world of `onepass`, of which each has the first so many pieces.

    line      v0 v7 v1 v8 v2 ...
    P of 2    └─ 2 ─┘ v9          F of 3    └─── 3 ───┘ v10 v11
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from preceptor.chat.origins import NO_HEAD, Head, Leaf, Rendered, places_of
from preceptor.chat.stencil import Stencil
from preceptor.chat.tape import Atom, Tape
from preceptor.chat.template import Template
from preceptor.data.rejections import Rejected

_MAX_PLANS = 512
_MAX_PLANS_PER_SHAPE = 8
_MAX_NUMBERS = 100_000
_MAX_REFS = 500_000  # of all plans together; about 20 bytes each
_CHECKED_RENDERS = 16
_CHECKED_PASSES = 4
_CHECKED_STENCILS = 8
_CHECK_EVERY = 499


@dataclass(frozen=True, slots=True)
class Request:
    """Which render is asked for: of the first `num_messages` and, if named, a message of role `follower`."""

    num_messages: int
    add_generation_prompt: bool
    arguments: str
    follower: str = ""


class Strand:
    """Pieces on a tape: the values that they are, and the leaves that they come from."""

    __slots__ = ("_highest", "origins", "refs")

    def __init__(self, atoms: Sequence[Atom]) -> None:
        self.refs = [atom.ref for atom in atoms]
        self.origins = [atom.origin for atom in atoms]
        self._highest: list[int] | None = None

    def num_before(self, leaf: int, num: int) -> int:
        """How many of the first `num` pieces stand before the first that came from this leaf or a later one."""
        if self._highest is None:  # leaf up to each piece
            self._highest = list(accumulate([-1 if origin is None else origin for origin in self.origins], max))
        return bisect_left(self._highest, leaf, 0, num)


class Output(Strand):
    """One render on a tape: the first `num_shared` pieces of a line, then its own.

    Leaves from `first_leaf` on, those of the last message, do not occur in the line's part.
    """

    __slots__ = ("first_leaf", "line", "num_shared", "places")

    def __init__(self, line: Strand, num_shared: int, atoms: Sequence[Atom], first_leaf: int) -> None:
        super().__init__(atoms)
        before = line.num_before(first_leaf, num_shared)
        self.refs = line.refs[before:num_shared] + self.refs
        self.origins = line.origins[before:num_shared] + self.origins
        self.line, self.num_shared = line, before
        self.first_leaf = first_leaf
        self.places = places_of(self.origins, first_leaf)

    @property
    def all_refs(self) -> list[int]:
        """The line's part, and its own."""
        return self.line.refs[: self.num_shared] + self.refs

    @property
    def all_origins(self) -> list[int | None]:
        return self.line.origins[: self.num_shared] + self.origins


class Recorded(NamedTuple):
    """The conversation that a plan was recorded with.

    leaves: of all messages; `starts[k]` is the first of message k. turns: the messages that are trained, and the key of
    the arguments of each.
    """

    messages: Sequence[Mapping[str, Any]]
    leaves: Sequence[Leaf]
    starts: Sequence[int]
    turns: Sequence[tuple[int, str]]

    def own(self, k: int) -> range:
        """The leaves of message k."""
        return range(self.starts[k], self.starts[k + 1])


@dataclass(eq=False, slots=True)
class Plan:
    """What the template does with conversations of one shape: a tape, and each render on it.

    stencil: made at the plan's first replay (`stencil_tried`); None if there can be none.
    """

    recorded: Recorded
    tape: Tape
    outputs: dict[Request, Output] = field(default_factory=dict)
    stencil: Stencil | None = None
    stencil_tried: bool = False

    def replay(self, leaves: Sequence[Leaf]) -> list[Any] | None:
        """The tape's values for a conversation of this shape, or of the shape that this one begins with.

        The texts that it lacks are those of the recorded one, for which all guards hold.
        """
        both = (*leaves, *self.recorded.leaves[len(leaves) :])
        return self.tape.replay([leaf.text for leaf in both])

    @property
    def exact(self) -> bool:
        return self.tape.exact and all(-1 not in strand.refs for strand in self._strands())

    @property
    def num_refs(self) -> int:
        return sum(len(strand.refs) for strand in self._strands())

    def _strands(self) -> Sequence[Strand]:
        return [*{id(output.line): output.line for output in self.outputs.values()}.values(), *self.outputs.values()]


class Replay:
    """The renders of a plan for one conversation, whose values the tape gave."""

    __slots__ = ("_head", "_line", "plan", "values")

    def __init__(self, plan: Plan, values: Sequence[str]) -> None:
        self.plan = plan
        self.values = values
        self._line: Strand | None = None  # of the last render
        self._head: Head = NO_HEAD

    def text(self, request: Request) -> str:
        output, values = self.plan.outputs[request], self.values
        return self._shared(output).text + "".join([values[ref] for ref in output.refs])

    def rendered(self, request: Request) -> Rendered:
        output, values = self.plan.outputs[request], self.values
        pieces = [values[ref] for ref in output.refs]
        return Rendered(pieces, output.origins, self._shared(output), output.first_leaf, output.places)

    def _shared(self, output: Output) -> Head:
        """What the render has of its line: the last render's, and a little more, if turns come in order."""
        if output.num_shared == 0:
            return NO_HEAD
        if output.line is not self._line:
            self._line = output.line
            self._head = Head("", [self.values[ref] for ref in output.line.refs], output.line.origins, 0)
        self._head = self._head.upto(output.num_shared)
        return self._head


@dataclass(eq=False, slots=True)
class Shape:
    """All conversations with the same roles, fields and arguments: how many were met, and the plans for them."""

    num_met: int = 0
    plans: list[Plan] = field(default_factory=list)
    recordable: bool = True


class RenderCache:
    """The shapes that were met and the plans, the least recently used forgotten; and how many renders there were."""

    def __init__(self, tokenizer: Any) -> None:
        self._numbers: dict[tuple[int, Any], int] = {}  # (of what comes before, what comes next) -> of a shape
        self._shapes: dict[int, Shape] = {}
        self._plans: OrderedDict[Plan, list[Shape]] = OrderedDict()
        self._num_refs = 0
        self._tokenizer = tokenizer
        self._num_renders = 0
        self._num_passes = 0
        self._num_filled = 0
        self.one_pass = True  # until one gives another text than the template
        self.stencils = True  # until one gives another tree than the proof turn by turn

    def shapes(self, base: Any, messages: Sequence[tuple[Any, bool]]) -> list[Shape]:
        """The shapes of a conversation up to each of its turns; the last is its own, which is met once more.

        base: what they hang on besides the messages. messages: what a template can see of each, and whether it is a
        turn; the last is.
        """
        if len(self._numbers) > _MAX_NUMBERS:
            self._numbers.clear()
            self._shapes.clear()
            self._plans.clear()
            self._num_refs = 0
        numbers, shapes = self._numbers, []
        number = numbers.setdefault((-1, base), len(numbers))
        for seen, is_turn in messages:
            number = numbers.setdefault((number, (seen, is_turn)), len(numbers))
            if is_turn:
                shapes.append(self._shapes.setdefault(number, Shape()))
        shapes[-1].num_met += 1
        return shapes

    def use(self, plan: Plan) -> None:
        self._plans.move_to_end(plan)

    def add(self, shapes: Sequence[Shape], plan: Plan) -> None:
        """From now on the plan serves these shapes."""
        served = [shape for shape in shapes if len(shape.plans) < _MAX_PLANS_PER_SHAPE]
        if not served:
            return
        for shape in served:
            shape.plans.insert(0, plan)
        self._plans[plan] = served
        self._num_refs += plan.num_refs
        while len(self._plans) > _MAX_PLANS or (self._num_refs > _MAX_REFS and len(self._plans) > 1):
            self.remove(next(iter(self._plans)))

    def remove(self, plan: Plan) -> None:
        for shape in self._plans.pop(plan):
            shape.plans.remove(plan)
        self._num_refs -= plan.num_refs

    def compares(self) -> bool:
        """Whether the next plain render is to be compared with transformers'."""
        self._num_renders += 1
        return self._num_renders <= _CHECKED_RENDERS or self._num_renders % _CHECK_EVERY == 0

    def compares_pass(self) -> bool:
        """Whether all renders of the next pass, and not its longest alone, are to be compared with plain ones."""
        self._num_passes += 1
        return self._num_passes <= _CHECKED_PASSES or self._num_passes % _CHECK_EVERY == 0

    def compares_stencil(self) -> bool:
        """Whether the next conversation that a stencil gives is to be proved turn by turn too."""
        self._num_filled += 1
        return self._num_filled <= _CHECKED_STENCILS or self._num_filled % _CHECK_EVERY == 0

    def transformers_render(self, template: Template, messages: Sequence[Any], tools: Any, **arguments: Any) -> str:
        text = template.text_for(tools)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, chat_template=text, tokenize=False, **arguments
                )
            )
        except Exception as error:  # transformers rejects what the sandbox here allows
            raise Rejected("render_differs", f"template {template.name} in transformers: {error}") from error
