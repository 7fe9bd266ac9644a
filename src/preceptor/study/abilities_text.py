"""What `preceptor template` found, in plain lines."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PLACES = {
    "own": "in a place of its own",
    "merged": "merged into the user's message",
    "dropped": "LEFT OUT: the model never sees it",
    "refused": "refused by the template",
}
_ARGUMENTS = {
    "object": "arguments as objects (strings of JSON are converted)",
    "string": "arguments as strings of JSON (objects are converted)",
    "both": "arguments as objects or as strings of JSON",
    "neither": "not rendered",
}
_HISTORY = {"several turns": "plain", "reasoning_content": "reasoning", "reasoning with tool calls": "tool calls"}


def to_text(found: dict[str, Any]) -> str:
    """What `abilities.to_json` gives, as lines."""
    given = ", ".join(f"{name}={json.dumps(value)}" for name, value in found["arguments_given"].items())
    lines = [f"Template {found['template']}" + (f" with {given}" if given else "")]
    if found["assumed_special"] is not None:
        lines += [f"  {line}" for line in _assumed(found["assumed_special"])]
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


def _assumed(tokens: Sequence[str]) -> Iterator[str]:
    named = ", ".join(tokens) if tokens else "none"
    yield f"without a model: special tokens assumed from the template's text ({named}),"
    yield "its bos and eos called <bos> and <eos>; --model M asks with a real tokenizer"


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
    yield "default system prompt: " + (f'"{_shortened(system["default"])}"' if system["default"] else "none")
    if system["default_stays"]:
        yield "    stays when a system prompt is given"
    yield f"developer prompt: {'shown' if system['developer'] else 'refused or left out'}"
    for setting, opening in found["openings"].items():
        yield f"asking for an answer{f' ({setting})' if setting else ''}: {_opening(opening)}"


def _opening(opening: Mapping[str, Any]) -> str:
    if opening["text"] is None:
        return "changes what stood before it"
    if not opening["text"]:
        return "adds nothing"
    text = f"adds {_quoted(opening['text'])}"
    if opening["opens"]:
        return f"{text}, which opens {opening['opens']}: every answer must reason"
    return f"{text}, which closes an empty reasoning block" if opening["closes"] else text


def _answer(found: dict[str, Any]) -> Iterator[str]:
    written = {
        "turn": "",
        "next_message": ", which only the next message brings",
        "appended": ", appended: the template itself ends the turn with nothing",
    }
    for kind in ("answer", "tool call"):
        stop = found["stops"].get(kind)
        if stop is None:
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
    yield f"content as a list of text parts: {'taken' if found['text_parts'] else 'not taken'}"


def _history(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for outcome in outcomes:
        name = _HISTORY.get(outcome["kind"])
        if name is None:
            continue
        if not outcome["proved"]:
            yield f"{name}: not known, the turn is refused ({outcome['code']})"
        elif outcome["shape"] == "chain":
            yield f"{name}: kept as generated, so a conversation is a chain"
        else:
            yield f"{name}: rewritten, so a conversation is a tree; {_rewritten(outcome['rewrite'])}"
            if outcome["rewrite"]:
                yield f"    generated {_quoted(outcome['rewrite']['generated'])}"
                yield f"    becomes   {_quoted(outcome['rewrite']['becomes'])}"


def _rewritten(rewrite: Mapping[str, Any] | None) -> str:
    if rewrite is None:
        return "the turns share only what stands before them"
    if rewrite["dropped"]:
        return f"earlier {' and '.join(rewrite['dropped'])} dropped"
    return "what stands before a turn moves" if rewrite["moves"] else "the words are kept, what is around them is not"


def _conversations(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    width = max(len(outcome["kind"]) for outcome in outcomes)
    for outcome in outcomes:
        left_out = "".join(f"; the template LEAVES OUT the {name}" for name in outcome["left_out"])
        if outcome["proved"]:
            rewrite = outcome["rewrite"]
            shape = outcome["shape"] if outcome["shape"] == "chain" else f"tree: {_rewritten(rewrite)}"
            yield f"proved   {outcome['kind']:<{width}}  {shape}{left_out}"
        else:
            yield f"refused  {outcome['kind']:<{width}}  {outcome['code']}{left_out}"
            yield f"    {outcome['message']}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:80] + "…"
