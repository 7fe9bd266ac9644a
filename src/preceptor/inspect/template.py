"""What a chat template supports, found by rendering and proving small conversations, not by parsing it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preceptor.chat import reasoning
from preceptor.chat.message_forms import find_forms
from preceptor.chat.origins import shared_length
from preceptor.chat.render import Renderer
from preceptor.chat.template import Template
from preceptor.chat.thinking import find_switch
from preceptor.chat.tokenise import special_ids
from preceptor.data.examples import Rejection
from preceptor.data.forest import Tree
from preceptor.inspect.probes import (
    ANSWERS,
    PROBES,
    QUESTIONS,
    SYSTEM,
    TOOL,
    Probe,
    outcome,
    says,
    shows_tools,
)

_TAG = re.compile(r"<+[^<>\s]*>+|\]~!?\w+[\[\]]|\[[^\[\]\s]*\]")


def find_abilities(renderer: Renderer, assumed_special: Sequence[str] | None = None) -> dict[str, Any]:
    """All findings about one template with one tokenizer.

    assumed_special: special tokens assumed without a model's tokenizer; None: it has one.
    """
    tokenizer, given = renderer.tokenizer, renderer.template_kwargs
    template = renderer.template.given(given)
    trees = {probe.kind: renderer.render(probe.record()) for probe in PROBES}
    asked = [says("user", QUESTIONS[0])]
    forms = find_forms(template)
    arguments = {(True, True): "both", (True, False): "object", (False, True): "string", (False, False): "neither"}
    prompt = template.render_or_none(asked, add_generation_prompt=True) or ""
    stop_tokens = tuple(str(tokenizer.convert_ids_to_tokens(id_)) for id_ in sorted(renderer.stop_token_ids))
    bos = tokenizer.bos_token or ""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return {
        "template": template.name,
        "arguments_given": given,  # template arguments of all renders
        "assumed_special": None if assumed_special is None else tuple(assumed_special),
        "bos": bos,
        "starts_with_bos": bool(bos) and prompt.startswith(bos),
        "first_token": str(tokenizer.convert_ids_to_tokens(ids[0])) if ids and ids[0] in special_ids(tokenizer) else "",
        "system": _system(template, stop_tokens),
        "openings": _openings(template, asked, given),
        "stops": _stops(template, renderer, trees),
        "stop_tokens": stop_tokens,
        "tools_shown": shows_tools(template.render_or_none(asked, [TOOL], add_generation_prompt=True) or ""),
        "tool_template": "tool_use" in template.texts and len(template.texts) > 1,
        "arguments": arguments[forms.object_arguments, forms.string_arguments],
        "text_parts": tuple(sorted(forms.parts)),  # the roles whose content may be a list of text parts
        "outcomes": tuple(outcome(probe, trees[probe.kind], template) for probe in PROBES),
    }


def asks_for_answers(renderer: Renderer) -> bool:
    """Whether add_generation_prompt changes a prompt, as far as that is known."""
    template, asked = renderer.template.given(renderer.template_kwargs), [says("user", QUESTIONS[0])]
    plain, prompt = (template.render_or_none(asked, add_generation_prompt=prompt) for prompt in (False, True))
    return plain is None or prompt is None or plain != prompt


# System prompt -------------------------------------------------------------------------------------------------------


def _system(template: Template, stop_tokens: Sequence[str]) -> dict[str, Any]:
    """Where a system prompt goes."""
    first, second = (says("user", question) for question in QUESTIONS)
    answer = says("assistant", ANSWERS[0])
    system = says("system", SYSTEM)
    plain = template.render_or_none([first], add_generation_prompt=True) or ""
    given = template.render_or_none([system, first], add_generation_prompt=True)
    longer = template.render_or_none([system, first, answer, second], add_generation_prompt=True) or ""
    developer = template.render_or_none([says("developer", SYSTEM), first], add_generation_prompt=True) or ""
    default = _default_system(template, plain)
    longest_line = max(default.splitlines(), key=len, default="").strip()
    return {
        "place": _place(plain, given, stop_tokens),
        "moves": ANSWERS[0] in longer and longer.find(SYSTEM) > longer.find(ANSWERS[0]),  # behind the first turn
        "developer": SYSTEM in developer,  # messages of role `developer` are shown
        "default": default,  # the template's own text before the first message
        "default_stays": bool(longest_line) and longest_line in (given or ""),  # also when a system prompt is given
    }


def _place(plain: str, given: str | None, stop_tokens: Sequence[str]) -> str:
    """`own`: between system prompt and user text stand the header of the user message or a stop token."""
    if given is None:
        return "rejected"
    if SYSTEM not in given:
        return "dropped"
    between = given[given.find(SYSTEM) + len(SYSTEM) : given.find(QUESTIONS[0])]
    header = _common_end(plain.partition(QUESTIONS[0])[0], between)
    return "own" if header.strip() or any(stop in between for stop in stop_tokens) else "merged"


def _default_system(template: Template, plain: str) -> str:
    """The text before the first message without tags and the message's header; "" if there is none."""
    turns = [says("user", QUESTIONS[0]), says("assistant", ANSWERS[0]), says("user", QUESTIONS[1])]
    both = template.render_or_none(turns, add_generation_prompt=True) or ""
    before = plain.partition(QUESTIONS[0])[0]
    between = both.partition(ANSWERS[0])[2].partition(QUESTIONS[1])[0]
    if not between:
        return ""
    own = before[: len(before) - len(_common_end(before, between))]
    lines = [line.strip() for line in _TAG.sub("\n", own).splitlines()]
    return "\n".join(line for line in lines if line and line.lower().strip("#: ") not in ("system", "developer"))


def _common_end(one: str, other: str) -> str:
    """The longest common suffix that does not begin inside a tag."""
    start = len(one) - shared_length(one[::-1], other[::-1])
    return one[next((tag.end() for tag in _TAG.finditer(one) if tag.start() < start < tag.end()), start) :]


# Where the answer starts and ends ------------------------------------------------------------------------------------


def _openings(
    template: Template, asked: Sequence[Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What `add_generation_prompt` adds: without further arguments ("") and with each reasoning switch that is not
    `given` on and off."""
    switches = [name for name in find_switch(template, given).names if name not in given]
    tried: dict[str, dict[str, Any]] = {
        f"{name}: {str(value).lower()}": {name: value} for name in switches for value in (True, False)
    }
    found = {}
    for setting, arguments in {"": {}, **tried}.items():
        before = template.render_or_none(asked, **arguments) or ""
        prompt = template.render_or_none(asked, add_generation_prompt=True, **arguments) or ""
        found[setting] = {
            "text": prompt[len(before) :] if before and prompt.startswith(before) else None,  # None: `before` changes
            "opens": reasoning.opened_by(prompt)[0],  # the tag of a reasoning block that is left open
            "closes": reasoning.closed_by(prompt) >= 0,  # an empty reasoning block is written
        }
    return found


def _stops(template: Template, renderer: Renderer, trees: Mapping[str, Tree | Rejection]) -> dict[str, dict[str, str]]:
    """The stop token of an answer and of a tool call, from the first proved probe of each.

    written: by which message it is written; `appended`: by none, then the eos is. after: what the turn's own render
    has behind it, which belongs to the next context.
    """
    kinds = {
        "answer": ("one turn", "several turns", "reasoning_content", "inline <think>"),
        "tool call": ("tool call", "tool call without content", "reasoning with tool calls"),
    }
    probes, found = {probe.kind: probe for probe in PROBES}, {}
    for name, tried in kinds.items():
        stops = (_stop(template, renderer, probes[kind], trees[kind]) for kind in tried)
        if stop := next(filter(None, stops), None):
            found[name] = stop
    return found


def _stop(template: Template, renderer: Renderer, probe: Probe, tree: Tree | Rejection) -> dict[str, str] | None:
    own = [] if isinstance(tree, Rejection) else [segment for segment in tree.segments if segment.message == 1]
    if not own:
        return None
    token = str(renderer.tokenizer.convert_ids_to_tokens(own[-1].ids[-1]))
    text = ANSWERS[0] if not probe.messages[1].get("tool_calls") else "quokka"
    full = template.render_or_none(probe.messages[:2], probe.tools) or ""
    place = full.rfind(token, full.rfind(text))
    if place >= 0:
        return {"token": token, "written": "turn", "after": full[place + len(token) :]}
    follower = probe.messages[2] if len(probe.messages) > 2 else says("user", QUESTIONS[1])
    words = follower["content"]
    longer = (template.render_or_none([*probe.messages[:2], follower], probe.tools) or "").rpartition(words)[0]
    place = longer.rfind(token, longer.rfind(text))
    return {"token": token, "written": "next_message" if place >= 0 else "appended", "after": ""}


_PLACES = {
    "own": "in a place of its own",
    "merged": "merged into the user message",
    "dropped": "LEFT OUT: the model never sees it",
    "rejected": "rejected by the template",
}
_ARGUMENTS = {
    "object": "arguments as objects (strings of JSON are converted)",
    "string": "arguments as strings of JSON (objects are converted)",
    "both": "arguments as objects or as strings of JSON",
    "neither": "not rendered",
}
_HISTORY = {"several turns": "plain", "reasoning_content": "reasoning", "reasoning with tool calls": "tool calls"}


def to_text(found: dict[str, Any]) -> str:
    """Abilities, as plain dicts and lists, as lines of text."""
    given = ", ".join(f"{name}={json.dumps(value)}" for name, value in found["arguments_given"].items())
    lines = [f"Template {found['template']}" + (f" with {given}" if given else "")]
    if found["assumed_special"] is not None:
        named = ", ".join(found["assumed_special"]) or "none"
        lines.append(f"  without a model: special tokens assumed from the template's text ({named}),")
        lines.append("  its bos and eos called <bos> and <eos>; --model M asks with a real tokenizer")
    sections = {
        "A prompt": _prompt(found),
        "An answer": _answer(found),
        "Tools": _tools(found),
        "Earlier turns": _history(found["outcomes"]),
        "Conversations": _conversations(found["outcomes"]),
    }
    for title, section in sections.items():
        lines += ["", title, *(f"  {line}" for line in section)]
    return "\n".join(lines)


def _prompt(found: dict[str, Any]) -> Iterator[str]:
    first = found["first_token"]
    if found["starts_with_bos"]:
        yield f"starts with the BOS token {found['bos']}, written by the template"
    else:
        starts = f"starts with {first}" if first else "starts with plain text"
        yield f"{starts}; the template writes no BOS token, so a chat server adds none"
    system = found["system"]
    moves = ", which moves to the latest user message as the conversation grows" if system["moves"] else ""
    yield f"system prompt: {_PLACES[system['place']]}{moves}"
    default = " ".join(system["default"].split())
    shown = f'"{default}"' if len(default) <= 80 else f'"{default[:80]}…"'
    yield f"default system prompt: {shown if default else 'none'}"
    if system["default_stays"]:
        yield "    stays when a system prompt is given"
    yield f"developer prompt: {'shown' if system['developer'] else 'rejected or left out'}"
    for setting, opening in found["openings"].items():
        yield f"asking for an answer{f' ({setting})' if setting else ''}: {_opening_text(opening)}"


def _opening_text(opening: Mapping[str, Any]) -> str:
    if opening["text"] is None:
        return "changes the text before it"
    if not opening["text"]:
        return "adds nothing"
    text = f"adds {_quoted(opening['text'])}"
    if opening["opens"]:
        return f"{text}, which opens {opening['opens']}: every answer must reason"
    return f"{text}, which closes an empty reasoning block" if opening["closes"] else text


def _answer(found: dict[str, Any]) -> Iterator[str]:
    written = {
        "turn": "",
        "next_message": ", which only the next message writes",
        "appended": ", appended: the template itself writes nothing at the end of a turn",
    }
    for kind in ("answer", "tool call"):
        if (stop := found["stops"].get(kind)) is None:
            yield f"{kind}: none is proved"
            continue
        after = f"; what follows it, {_quoted(stop['after'])}, is not trained" if stop["after"] else ""
        yield f"{kind} ends with {stop['token']}{written[stop['written']]}{after}"
    yield f"a server stops at {', '.join(found['stop_tokens'])}"


def _tools(found: dict[str, Any]) -> Iterator[str]:
    named = ", by the template named tool_use" if found["tool_template"] else ""
    shown = f"shown to the model{named}" if found["tools_shown"] else "LEFT OUT: the model never sees them"
    yield f"tools offered: {shown}"
    yield f"tool calls: {_ARGUMENTS[found['arguments']]}"
    roles = ", ".join(found["text_parts"])
    yield f"content as a list of text parts: {f'taken ({roles})' if roles else 'joined to one string, as servers do'}"


def _history(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for found in outcomes:
        name = _HISTORY.get(found["kind"])
        if name is None:
            continue
        if not found["proved"]:
            yield f"{name}: not known, the turn is rejected ({found['code']})"
        elif found["shape"] == "chain":
            yield f"{name}: kept as generated, so a conversation is a chain"
        else:
            yield f"{name}: rewritten, so a conversation is a tree; {_rewritten(found['rewrite'])}"
            if found["rewrite"]:
                yield f"    generated {_quoted(found['rewrite']['generated'])}"
                yield f"    becomes   {_quoted(found['rewrite']['becomes'])}"


def _rewritten(rewrite: Mapping[str, Any] | None) -> str:
    if rewrite is None:
        return "the turns share only the text before them"
    if rewrite["dropped"]:
        return f"earlier {' and '.join(rewrite['dropped'])} dropped"
    return "the text before a turn changes" if rewrite["moves"] else "the texts are kept, what is around them is not"


def _conversations(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    width = max(len(found["kind"]) for found in outcomes)
    for found in outcomes:
        left_out = "".join(f"; the template LEAVES OUT the {name}" for name in found["left_out"])
        if found["proved"]:
            rewrite = found["rewrite"]
            shape = found["shape"] if found["shape"] == "chain" else f"tree: {_rewritten(rewrite)}"
            yield f"proved   {found['kind']:<{width}}  {shape}{left_out}"
        else:
            yield f"rejected  {found['kind']:<{width}}  {found['code']}{left_out}"
            yield f"    {found['message']}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
