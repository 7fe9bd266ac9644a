"""The renders of one conversation that the proof asks for, and where their characters came from.

Texts are made by the template itself: one by one, or, of many turns, in one run of it (`one_pass.py`), of which the
longest is compared with the template's own. Where the characters of a turn stand is found by alignment (`origins.py`),
else by a render with marks (`marked.py`), which must give the same text, byte for byte. Renders of the template are
compared with transformers' own: the first of a run, and then a few in a thousand.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from typing import Any

import jinja2

from preceptor.chat.environment import fatal_template_error, limits
from preceptor.chat.marked import Marked, compiled_marked, marked_message, split_by_origin
from preceptor.chat.message_forms import Forms
from preceptor.chat.one_pass import LooksAhead, OnePass, Request, one_pass, raised_in_pass
from preceptor.chat.origins import Alignments, Leaf, MessageList, Rendered, Tools, kind_of, map_leaves, shared_length
from preceptor.chat.template import Template
from preceptor.chat.turns import Turn
from preceptor.data.examples import Rejected
from preceptor.errors import TemplateError

_FEW_TURNS = 8  # up to here a run of the template for each render is faster than one pass
_MANY_TURNS = 12  # from here on a pass is faster also where it runs what stands before the main loop again each time
_COMPARED_RENDERS = 16
_COMPARED_PASSES = 4
_COMPARE_EVERY = 499


class Runs:
    """The ways to run a template: as it is, in one pass for many renders, with marks. Knows what came of earlier runs.

    counts: conversations rendered in one pass and one by one, the latter by the reason; turns with marks.
    """

    def __init__(self, tokenizer: Any, template: Template, forms: Forms, counts: Counter[str]) -> None:
        self._tokenizer, self.template, self.forms, self.counts = tokenizer, template, forms, counts
        self._num_renders = self._num_passes = 0
        self._pass_is_wrong = False
        self._looks_ahead: set[str] = set()  # templates: before the main loop, for some conversation
        self.alignments = Alignments()

    def plain(self, renders: "Renders", request: Request) -> str:
        """The template's own render. Raises Rejected where the template rejects the messages."""
        shown = renders.shown(request)
        try:
            text = self.template.run(renders.text, renders.variables(request, shown))
        except TemplateError as error:
            if error.is_fatal:
                raise
            raise Rejected("template_rejects", f"up to messages[{request.num_messages - 1}]: {_told(error)}") from error
        self._num_renders += 1
        if self._num_renders <= _COMPARED_RENDERS or self._num_renders % _COMPARE_EVERY == 0:
            self._compare(renders, request, shown, text)
        return text

    def _compare(self, renders: "Renders", request: Request, shown: Sequence[Any], text: str) -> None:
        """Raises a fatal TemplateError if transformers renders something else; a fixed date is left out of it."""
        if self.template.clock:
            today = {k: v for k, v in renders.variables(request, shown).items() if k != "strftime_now"}
            text = self.template.run(renders.text, today)
        name = self.template.name
        given = [*renders.messages[: request.num_messages], *shown[request.num_messages :]]
        try:
            expected = self._tokenizer.apply_chat_template(
                given,
                tools=renders.tools,
                chat_template=renders.text,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt,
                **renders.arguments[request.arguments],
            )
        except Exception as error:  # transformers rejects what the sandbox here allows
            raise fatal_template_error(
                f"template {name}: transformers refuses to render what is rendered here, so no server could use the "
                f"model: {error}. Choose another template"
            ) from error
        if expected != text:
            at = shared_length(text, expected)
            here, there = (each[max(at - 20, 0) : at + 40] for each in (text, expected))
            raise fatal_template_error(
                f"template {name}: transformers renders another text, so the model would be trained on what no server "
                f"builds (does the template write a random choice or the time of day?): {here!r} here, {there!r} "
                "there. Choose another template"
            )

    def in_one_pass(self, renders: "Renders", requests: Sequence[Request], head_again: bool) -> dict[Request, str]:
        """The renders, by one run of the template for each of the arguments; {} where that cannot be done.

        head_again: also if what stands before the main loop has to be run again for each render.
        """
        ways = [again for again in (False, True)[: 1 + head_again] if again or renders.text not in self._looks_ahead]
        if self._pass_is_wrong or not ways:
            return {}
        for again in ways:
            template = one_pass(renders.text, again)
            if template is None:
                self.counts["one by one: the template has another form"] += 1
                return {}
            try:
                made: dict[Request, str] = {}
                for key in dict.fromkeys(request.arguments for request in requests):
                    asked = [request for request in requests if request.arguments == key]
                    with limits(self.template.name):
                        done = OnePass(renders.shown(max(asked)), asked)
                        made |= done.run(template, renders.variables(max(asked), ()))
            except LooksAhead:
                self._looks_ahead.add(renders.text)
                continue
            except Exception as error:
                if isinstance(error, TemplateError) or raised_in_pass(error):  # a limit, or a fault of this program
                    raise
                return {}  # what the template rejects, it rejects one by one too, and there it is told
            return made if self._pass_holds(renders, made) else {}
        self.counts["one by one: the template looks ahead"] += 1
        return {}

    def _pass_holds(self, renders: "Renders", made: Mapping[Request, str]) -> bool:
        """Whether the longest render of a pass, and now and then each of them, is the template's own."""
        self._num_passes += 1
        compared: Iterable[Request] = made
        if self._num_passes > _COMPARED_PASSES and self._num_passes % _COMPARE_EVERY:
            compared = [max(made, key=lambda request: request.num_messages)]
        if all(made[request] == self.plain(renders, request) for request in compared):
            self.counts["one pass"] += 1
            return True
        self._pass_is_wrong = True
        self.counts["one by one: a pass gave another text"] += 1
        return False

    def marked(self, renders: "Renders", request: Request, text: str, only: int | None = None) -> Rendered:
        """A render with the origins of its characters; text: the template's own. only: that message alone is marked."""
        self.counts["renders with marks"] += 1
        shown, rules = renders.shown(request), self.template.message_rules
        for k in range(request.num_messages) if only is None else (only,):
            shown[k] = rules.apply(marked_message(renders.messages[k], renders.starts[k]))
        if request.follower:
            shown[-1] = map_leaves(shown[-1], lambda text: Marked.leaf(len(renders.leaves), text))
        variables = renders.variables(request, shown)
        template = compiled_marked(renders.text)
        with limits(self.template.name):
            try:
                pieces, origins = split_by_origin(template.root_render_func(template.new_context(variables)))
            except jinja2.TemplateError as error:  # whose text may be anything: none of it is shown
                raise Rejected("render_differs", f"template {self.template.name} fails with origins") from error
            except Exception as error:  # the template has rendered plain strings: what failed are the marked ones
                raise AssertionError("marked strings fail where plain ones do not") from error
        if "".join(pieces) != text:
            raise Rejected("render_differs", f"template {self.template.name} renders otherwise with origins")
        return Rendered(text, pieces, origins)


_TOLD: Mapping[str, str] = {
    r"""str object has no element|'str object' has no attribute""": "this template expects content as text parts",
    r"""\(not "(?:list|str)"\)|'list object' has no attribute|unhashable type: 'dict'""": (
        "this template expects content as a string"
    ),
    r"""'dict object' has no attribute '(\w+)'""": "this template needs the field '{}' of a message, call or tool",
    r"""^.*: '(\w+)' is undefined""": "this template needs the argument '{}' in chat_template_kwargs",
    r"""'NoneType' object is not iterable""": "this template needs a list that is not given, tools perhaps",
    r"""is unsafe|unsafe_undefined""": "this template does what transformers does not allow, so no server can use it",
}
"""Errors of a template's code -> what they mean for the messages."""


def _told(error: TemplateError) -> str:
    """The error, with what it means where Python or Jinja says it in their own terms."""
    found = ((re.search(pattern, str(error)), meaning) for pattern, meaning in _TOLD.items())
    return next((f"{meaning.format(*match.groups())} ({error})" for match, meaning in found if match), str(error))


class Renders:
    """The renders of one conversation, as its template sees it.

    messages: in forms that the template takes. leaves: the strings of each, then of all: those of message k are the
    numbers from `starts[k]` to `starts[k + 1]`. as_given: as in `reasoning.Reading`. turns: those that will be asked
    for, with the arguments that are tried first; the renders of many are made at once, where that is faster.
    """

    def __init__(
        self,
        runs: Runs,
        messages: MessageList,
        leaves: Sequence[Sequence[Leaf]],
        tools: Tools,
        as_given: bool,
        turns: Sequence[tuple[int, Mapping[str, Any]]] = (),
    ) -> None:
        self.runs, self.messages, self.tools = runs, messages, tools
        self.text = runs.template.text_for(tools)
        self.leaves = list(chain.from_iterable(leaves))
        self.starts = [0, *accumulate(map(len, leaves))]
        self._as_given = as_given
        self._seen = [runs.template.message_rules.apply(message) for message in messages]
        self.arguments: dict[str, Mapping[str, Any]] = {}
        self._texts: dict[Request, str] = {}  # that are known before they are asked for
        if len(turns) > _FEW_TURNS:
            asked = [(k, self.key(arguments)) for k, arguments in turns]
            both = [(Request(k, True, key), Request(k + 1, False, key)) for k, key in asked]
            requests = [request for pair in both for request in pair]
            self._texts = runs.in_one_pass(self, requests, head_again=len(turns) >= _MANY_TURNS)

    def turn(self, k: int, arguments: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Turn:
        """What the proof needs to know of turn k. Raises Rejected where the template rejects the messages.

        more: arguments of the render of the turn, beside those of its prompt.
        """
        runs, own = self.runs, range(self.starts[k], self.starts[k + 1])
        prompt_key = self.key(arguments)
        key = self.key({**arguments, **more}) if more else prompt_key
        prompted, with_turn = Request(k, True, prompt_key), Request(k + 1, False, key)
        prompt = self._texts.get(prompted) or runs.plain(self, prompted)
        full = self._texts.get(with_turn) or runs.plain(self, with_turn)
        kind = prompt_key, key, *kind_of(self.text, self.messages[k], self.messages[k - 1], self.leaves, own)
        rendered = runs.alignments.fit(kind, prompt, full, self.leaves, own)
        if rendered is None:
            rendered = runs.marked(self, with_turn, full, only=k)
            runs.alignments.learn(kind, prompt, rendered, self.leaves, own)
        return Turn(
            message=k,
            given=self.messages[k],
            tags=runs.template.reasoning_tags,
            as_given=self._as_given,
            leaves=self.leaves,
            own=own,
            prompt=prompt,
            full=rendered,
            prompt_marked=lambda: runs.marked(self, prompted, prompt),
            full_marked=lambda: runs.marked(self, with_turn, full),
            followed=lambda: self._followed(k, key),
        )

    def _followed(self, k: int, key: str) -> tuple[Rendered, int] | None:
        """F with a message after turn k: a tool's result after tool calls, else a user's words; None if rejected."""
        for role in ("tool", "user") if self.messages[k].get("tool_calls") else ("user",):
            request = Request(k + 1, False, key, role)
            with suppress(Rejected):
                return self.runs.marked(self, request, self.runs.plain(self, request), only=k), len(self.leaves)
        return None

    # What the template is given --------------------------------------------------------------------------------------

    def key(self, arguments: Mapping[str, Any]) -> str:
        """What stands for these arguments in a request."""
        key = repr(arguments) if arguments else ""
        self.arguments[key] = arguments
        return key

    def variables(self, request: Request, messages: Sequence[Any]) -> dict[str, Any]:
        """The template's variables; messages: those of the request."""
        prompted, arguments = request.add_generation_prompt, self.arguments[request.arguments]
        return self.runs.template.all_variables(messages, self.tools, prompted, arguments)

    def shown(self, request: Request) -> list[dict[str, Any]]:
        """The messages of a request."""
        shown = self._seen[: request.num_messages]
        return [*shown, self._follower(request)] if request.follower else shown

    def _follower(self, request: Request) -> dict[str, Any]:
        if request.follower == "user":
            return dict(self.runs.forms.fit([{"role": "user", "content": "And then?"}])[0])
        call = self.messages[request.num_messages - 1]["tool_calls"][0]
        taken = {"tool_call_id": call.get("id"), "name": call.get("function", call).get("name")}
        names = {name: text for name, text in taken.items() if isinstance(text, str)}
        return dict(self.runs.forms.fit([{"role": "tool", "content": "done", **names}])[0])
