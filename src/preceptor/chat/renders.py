"""The renders of one conversation that the proof asks for, and where their characters came from.

Texts are made by the template itself: one by one (`OneByOne`), or, for conversations of many turns, in one run of it
(`one_pass.py`), of which the longest is compared with the template's own. Where the characters of a turn stand is found
by alignment (`alignment.py`), else by a render with marks (`WithOrigins`), which must give the same text, byte for
byte. Renders of the template are compared with transformers' own: the first of a run, and then a few in a thousand.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import accumulate, chain
from typing import Any

import jinja2

from preceptor.chat.environment import plain_environment
from preceptor.chat.growing_tree import shared_length
from preceptor.chat.limits import condemned, limits
from preceptor.chat.marked import Marked
from preceptor.chat.marked_environment import compiled_marked, marked_environment, marked_message, pieces_of
from preceptor.chat.message_forms import Forms
from preceptor.chat.one_pass import LooksAhead, OnePass, Request, Written, raised_in_pass, texts_of
from preceptor.chat.one_pass_form import compiled_one_pass
from preceptor.chat.origins import Alignments, Leaf, Rendered, kind_of, map_leaves
from preceptor.chat.template import Template
from preceptor.chat.turns import Followed, Turn
from preceptor.data.rejections import Rejected
from preceptor.errors import TemplateError

_FEW_TURNS = 8  # up to here a run of the template for each render is faster than one pass
_MANY_TURNS = 12  # from here on a pass is faster also where it runs what stands before the main loop again each time
_COMPARED_RENDERS = 16
_COMPARED_PASSES = 4
_COMPARE_EVERY = 499


@dataclass(eq=False, slots=True)
class Chat:
    """A conversation as its template sees it.

    messages: in forms that the template takes. own_leaves: the strings of each; leaves: of all. text: the template's.
    """

    template: Template
    forms: Forms
    messages: Sequence[Mapping[str, Any]]
    own_leaves: InitVar[Sequence[Sequence[Leaf]]]
    tools: Sequence[Mapping[str, Any]] | None
    as_given: bool = False
    text: str = field(init=False)
    leaves: list[Leaf] = field(init=False)
    _seen: list[dict[str, Any]] = field(init=False)
    starts: list[int] = field(init=False)
    _arguments: dict[str, Mapping[str, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self, own_leaves: Sequence[Sequence[Leaf]]) -> None:
        self.text = self.template.text_for(self.tools)
        self._seen = [self.template.message_rules.apply(message) for message in self.messages]
        self.leaves = list(chain.from_iterable(own_leaves))
        self.starts = [0, *accumulate(map(len, own_leaves))]

    def own(self, k: int) -> range:
        """The leaves of message k."""
        return range(self.starts[k], self.starts[k + 1])

    def arguments(self, request: Request) -> Mapping[str, Any]:
        return self._arguments[request.arguments]

    @property
    def followers(self) -> range:
        """The number by which what came from a message after a turn is known."""
        return range(len(self.leaves), len(self.leaves) + 1)

    def key(self, arguments: Mapping[str, Any]) -> str:
        """What stands for these arguments in a request."""
        key = repr(arguments) if arguments else ""
        self._arguments[key] = arguments
        return key

    def variables(self, request: Request, messages: Sequence[Any]) -> dict[str, Any]:
        """The template's variables; messages: those of the request."""
        prompted, arguments = request.add_generation_prompt, self._arguments[request.arguments]
        return self.template.all_variables(messages, self.tools, prompted, arguments)

    def shown(self, request: Request) -> list[dict[str, Any]]:
        """The messages of a request."""
        shown = self._seen[: request.num_messages]
        return [*shown, self._follower(request)] if request.follower else shown

    def marked(self, request: Request, only: int | None) -> list[dict[str, Any]]:
        """The messages of a request with marks on their strings, or on those of message `only` and the follower."""
        shown = self.shown(request)
        for k in range(request.num_messages) if only is None else (only,):
            shown[k] = self.template.message_rules.apply(marked_message(self.messages[k], self.starts[k]))
        if request.follower:
            number = self.followers[0]
            shown[-1] = map_leaves(shown[-1], lambda text: Marked.leaf(number, text))
        return shown

    def _follower(self, request: Request) -> dict[str, Any]:
        if request.follower == "user":
            return dict(self.forms.fit([{"role": "user", "content": "And then?"}])[0])
        call = self.messages[request.num_messages - 1]["tool_calls"][0]
        taken = {"tool_call_id": call.get("id"), "name": call.get("function", call).get("name")}
        names = {name: text for name, text in taken.items() if isinstance(text, str)}
        return dict(self.forms.fit([{"role": "tool", "content": "done", **names}])[0])


class Runs:
    """The ways to run a template: as it is, in one pass for many renders, with marks. Knows what came of earlier runs.

    counts: conversations rendered in one pass and one by one, the latter by the reason; turns with marks.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._num_renders = self._num_passes = 0
        self._pass_is_wrong = False
        self._looks_ahead: set[str] = set()  # templates: before the main loop, for some conversation
        self.alignments = Alignments()
        self.counts: Counter[str] = Counter()

    def plain(self, chat: Chat, request: Request) -> str:
        """The template's own render. Raises Rejected where the template rejects the messages."""
        shown = chat.shown(request)
        try:
            text = chat.template.run(chat.text, chat.variables(request, shown))
        except TemplateError as error:
            if error.condemns:
                raise
            raise Rejected("template_rejects", f"up to messages[{request.num_messages - 1}]: {_told(error)}") from error
        self._num_renders += 1
        if self._num_renders <= _COMPARED_RENDERS or self._num_renders % _COMPARE_EVERY == 0:
            self._compare(chat, request, text)
        return text

    def _compare(self, chat: Chat, request: Request, text: str) -> None:
        """Compare a render with transformers'; of a template whose date is fixed, that of today.

        One difference condemns the template: raises TemplateError.
        """
        if chat.template.clock:
            today = {k: v for k, v in chat.variables(request, chat.shown(request)).items() if k != "strftime_now"}
            text = chat.template.run(chat.text, today)
        name = chat.template.name
        given = [*chat.messages[: request.num_messages], *chat.shown(request)[request.num_messages :]]
        try:
            expected = self._tokenizer.apply_chat_template(
                given,
                tools=chat.tools,
                chat_template=chat.text,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt,
                **chat.arguments(request),
            )
        except Exception as error:  # transformers rejects what the sandbox here allows
            raise condemned(
                f"template {name}: transformers refuses to render what is rendered here, so no server could use the "
                f"model: {error}. Choose another template"
            ) from error
        if expected != text:
            raise condemned(
                f"template {name}: transformers renders another text, so the model would be trained on what no server "
                f"builds (does the template write a random choice or the time of day?): {_difference(text, expected)}. "
                "Choose another template"
            )

    def in_one_pass(self, chat: Chat, requests: Sequence[Request], head_again: bool) -> dict[Request, str]:
        """The renders, by one run of the template for each of the arguments; {} where that cannot be done.

        head_again: also if what stands before the main loop has to be run again for each render.
        """
        if self._pass_is_wrong or (chat.text in self._looks_ahead and not head_again):
            return {}
        for again in (False, True) if head_again else (False,):
            if not again and chat.text in self._looks_ahead:
                continue
            template = compiled_one_pass(plain_environment(), chat.text, again)
            if template is None:
                self.counts["one by one: the template has another form"] += 1
                return {}
            try:
                made = texts_of(_written(chat, template, requests))
            except LooksAhead:
                if not again:
                    self._looks_ahead.add(chat.text)
                continue
            except TemplateError:  # a limit
                raise
            except Exception as error:
                if raised_in_pass(error):
                    raise
                return {}  # what the template rejects, it rejects one by one too, and there it is told
            return made if self._pass_holds(chat, made) else {}
        self.counts["one by one: the template looks ahead"] += 1
        return {}

    def _pass_holds(self, chat: Chat, made: Mapping[Request, str]) -> bool:
        """Whether the longest render of a pass, and now and then each of them, is the template's own."""
        self._num_passes += 1
        compared: Iterable[Request] = made
        if self._num_passes > _COMPARED_PASSES and self._num_passes % _COMPARE_EVERY:
            compared = [max(made, key=lambda request: request.num_messages)]
        if all(made[request] == self.plain(chat, request) for request in compared):
            self.counts["one pass"] += 1
            return True
        self._pass_is_wrong = True
        self.counts["one by one: a pass gave another text"] += 1
        return False

    def marked_in_one_pass(self, chat: Chat, requests: Sequence[Request]) -> dict[Request, list[str]]:
        """What the template writes with marks on all messages; {} where one pass does not come to its end."""
        self.counts["passes with marks"] += 1
        for again in (False, True):
            template = compiled_one_pass(marked_environment(), chat.text, again)
            if template is None:
                return {}
            try:
                written = _written(chat, template, requests, marked=True)
            except LooksAhead:
                continue
            except TemplateError:
                raise
            except Exception:
                return {}  # and `marked` tells why
            return {request: made.all_outputs() for request, made in written.items()}
        return {}

    def marked(self, chat: Chat, request: Request, text: str, only: int | None = None) -> Rendered:
        """A render with the origins of its characters; text: the template's own. only: mark that message alone."""
        self.counts["renders with marks"] += 1
        template = compiled_marked(chat.text)
        context = template.new_context(chat.variables(request, chat.marked(request, only)))
        try:
            with limits(chat.template.name):
                pieces, origins = pieces_of(template.root_render_func(context))
        except TemplateError:
            raise
        except jinja2.TemplateError as error:  # whose text may be anything: none of it is shown
            raise Rejected("render_differs", f"template {chat.template.name} fails with origins") from error
        except Exception as error:  # the template has rendered plain strings: what failed are the marked ones
            raise AssertionError("marked strings fail where plain ones do not") from error
        if "".join(pieces) != text:
            raise Rejected("render_differs", f"template {chat.template.name} renders otherwise with origins")
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
    for pattern, meaning in _TOLD.items():
        found = re.search(pattern, str(error))
        if found:
            return f"{meaning.format(*found.groups())} ({error})"
    return str(error)


def _difference(ours: str, theirs: str) -> str:
    at = shared_length(ours, theirs)
    return f"{ours[max(at - 20, 0) : at + 40]!r} here, {theirs[max(at - 20, 0) : at + 40]!r} there"


def _written(
    chat: Chat, template: jinja2.Template, requests: Sequence[Request], marked: bool = False
) -> dict[Request, Written]:
    """What a template in its one-pass form writes for the renders, by a run for each of the arguments."""
    written: dict[Request, Written] = {}
    for key in dict.fromkeys(request.arguments for request in requests):
        asked = [request for request in requests if request.arguments == key]
        longest = max(asked)
        done = OnePass(chat.marked(longest, None) if marked else chat.shown(longest), asked)
        with limits(chat.template.name):
            done.run(template, chat.variables(longest, ()))
        written |= done.written
    return written


class Renders:
    """The renders of one conversation; turns: those that will be asked for, and the arguments that are tried first."""

    def __init__(self, chat: Chat, runs: Runs, turns: Sequence[tuple[int, Mapping[str, Any]]] = ()) -> None:
        self._chat, self._runs = chat, runs
        self._texts: dict[Request, str] = {}
        self._outputs: dict[Request, list[str]] | None = None
        if len(turns) > _FEW_TURNS:
            asked = [(k, chat.key(arguments)) for k, arguments in turns]
            both = [(Request(k, True, key), Request(k + 1, False, key)) for k, key in asked]
            requests = [request for pair in both for request in pair]
            self._texts = runs.in_one_pass(chat, requests, head_again=len(turns) >= _MANY_TURNS)

    def turn(self, k: int, arguments: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Turn:
        """What the proof needs to know of turn k. Raises Rejected where the template rejects the messages.

        more: arguments of the render of the turn, beside those of its prompt.
        """
        chat, runs = self._chat, self._runs
        prompt_key = chat.key(arguments)
        key = chat.key({**arguments, **more}) if more else prompt_key
        prompted, with_turn = Request(k, True, prompt_key), Request(k + 1, False, key)
        prompt = self._texts.get(prompted) or runs.plain(chat, prompted)
        full = self._texts.get(with_turn) or runs.plain(chat, with_turn)
        own = chat.own(k)
        kind = prompt_key, key, *kind_of(chat.text, chat.messages[k], chat.messages[k - 1], chat.leaves, own)
        rendered = runs.alignments.fit(kind, prompt, full, chat.leaves, own)
        if rendered is None:
            rendered = self._marked(with_turn, full)
            runs.alignments.learn(kind, prompt, rendered, chat.leaves, own)
        return Turn(
            message=k,
            given=chat.messages[k],
            tags=chat.template.reasoning_tags,
            as_given=chat.as_given,
            leaves=chat.leaves,
            own=own,
            prompt=prompt,
            full=rendered,
            prompt_marked=lambda: runs.marked(chat, prompted, prompt),
            full_marked=lambda: runs.marked(chat, with_turn, full),
            followed=lambda: self._followed(k, key),
        )

    def _marked(self, request: Request, text: str) -> Rendered:
        """The render of a turn with marks on its message: for many turns in one pass too."""
        if request in self._texts:
            if self._outputs is None:
                self._outputs = self._runs.marked_in_one_pass(self._chat, list(self._texts))
            pieces, origins = pieces_of(self._outputs.get(request, ()))
            if "".join(pieces) == text:
                return Rendered(text, pieces, origins)
        return self._runs.marked(self._chat, request, text, only=request.num_messages - 1)

    def _followed(self, k: int, key: str) -> Followed | None:
        """F with a message after turn k: a tool's result after tool calls, else a user's words; None if rejected."""
        for role in ("tool", "user") if self._chat.messages[k].get("tool_calls") else ("user",):
            request = Request(k + 1, False, key, role)
            try:
                text = self._runs.plain(self._chat, request)
                return Followed(self._runs.marked(self._chat, request, text, only=k), self._chat.followers)
            except Rejected:
                continue
        return None
