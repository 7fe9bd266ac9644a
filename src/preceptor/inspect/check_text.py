"""What `preceptor check` found, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.chat.thinking import left_out_lines, thinking_lines
from preceptor.data.truncation import Shortened
from preceptor.errors import counted


def to_text(found: dict[str, Any]) -> str:
    """The result of `to_json` as lines of text."""
    parts = [_file_lines(found["files"]), _tokens(found), _mixture_lines(found["mixture"])]
    parts += [_repeated(found), _rejections(found), _verdict(found)]
    return "\n\n".join(part for part in parts if part)


def _file_lines(files: Sequence[dict[str, Any]]) -> str:
    lines = ["Files"]
    for file in files:
        rejected = f", {file['num_rejected']:,} rejected" if file["num_rejected"] else ""
        use = {"train": "", "eval": "  (evaluation)", "replay": "  (replay)"}[file["part"]]
        lines.append(f"  {format_line(file['name'], file['formats'])}{rejected}{use}")
    return "\n".join(lines)


def format_line(name: str, formats: Mapping[str, int]) -> str:
    """The number of examples of each format in a file."""
    return f"{name}: " + ", ".join(f"{form} ({counted(count, 'example')})" for form, count in formats.items())


def _tokens(found: dict[str, Any]) -> str:
    if not found["num_tokens"]:
        return ""
    saved = (
        f"one sample per turn would take {found['num_tokens_one_sample_a_turn']:,} tokens; the trees save "
        f"{found['num_tokens_saved_by_trees']:,} of them ({found['share_saved_by_trees']:.1%})"
    )
    more = str(Shortened(**found["shortened"])).splitlines()
    more += thinking_lines(found["thinking"], found["template_defaults"], found["unread_template_kwargs"])
    more += left_out_lines(found["left_out"])
    if found["no_header"]:
        more.append(
            "the template adds nothing that asks for an answer, so the model writes the header of its message itself; "
            "a template that has add_generation_prompt does it for the model"
        )
    if found["template_unused"]:
        more.append(
            "no example uses data.chat_template: none is a conversation. Two texts under prompt and completion, and "
            "text, are trained as they are; `columns: {prompt: ..., response: ...}` makes a question and its answer"
        )
    return "\n".join([*_lengths("Tokens", found), *(f"  {line}" for line in [saved, *more])])


def _lengths(title: str, found: Mapping[str, Any]) -> list[str]:
    """The table of lengths, and the share of the trained tokens."""
    known = {kind: lengths for kind, lengths in found["lengths"].items() if lengths is not None}
    where = "  longest at" if any("longest_at" in lengths for lengths in known.values()) else ""
    lines = [f"{title:<12}{'number':>10}{'median':>10}{'mean':>10}{'95 %':>10}{'longest':>10}{where}"]
    for kind, lengths in known.items():
        numbers = [lengths[column] for column in ("median", "mean", "percentile_95", "longest")]
        cells = f"{lengths['count']:>10,}" + "".join(f"{number:>10,.0f}" for number in numbers)
        lines.append(f"  {kind:<10}{cells}" + (f"  {lengths['longest_at']}" if where else ""))
    share = f"{found['num_trained']:,} of {found['num_tokens']:,} tokens ({found['share_trained']:.1%}) are trained"
    return [*lines, f"  {share}"]


def _mixture_lines(mixture: Mapping[str, Any] | None) -> str:
    """The counts of an epoch with the sources' weights and counts."""
    if mixture is None or not mixture["num_tokens"]:
        return ""
    lines = _lengths("One epoch", mixture)
    for source in mixture["sources"]:
        share = source["num_tokens"] / mixture["num_tokens"]
        trained = source["num_trained"] / max(1, mixture["num_trained"])
        examples = counted(source["num_examples"], "example")
        lines.append(f"  {source['path']}: {examples}, {share:.1%} of the tokens, {trained:.1%} of the trained")
    return "\n".join(lines)


def _repeated(found: dict[str, Any]) -> str:
    near = f"nearly ({found['near_means_similarity']:.0%} of their five-word sequences in common)"
    said = [
        (key, kind, "repeats", "repeat", f"{where} {how}")
        for key, where in (("duplicates", "an earlier one"), ("in_the_evaluation_set", "one of the evaluation set"))
        for kind, how in (("exact", "exactly"), ("near", near))
    ]
    asked, which = ("has the prompt of", "have the prompt of"), "one of the evaluation set, with another answer"
    lines = ["Repeated examples"]
    for key, kind, one, several, what in (*said, ("in_the_evaluation_set", "prompt", *asked, which)):
        if found[key] is not None:
            matched = found[key][kind]
            verb = one if matched["count"] == 1 else several
            lines.append(f"  {counted(matched['count'], 'training example')} {verb} {what}")
            lines.extend(f"      {pair['source']} {one} {pair['repeats']}" for pair in matched["first"])
    return "\n".join(lines)


def _rejections(found: dict[str, Any]) -> str:
    if not found["rejections"]:
        return ""
    lines = [f"Rejected: {found['num_rejected']:,} of {counted(found['num_examples'], 'example')}"]
    for reason in found["rejections"]:
        allowed = "  allowed by data.allow_rejected" if reason["allowed"] else ""
        lines.append(f"  {reason['count']:>8,}  {reason['share']:>6.1%}  {reason['code']}{allowed}")
        lines.append(f"      first at {reason['first_at']}: {reason['message']}")
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    lines = [found["few_steps"]] if found["few_steps"] else []
    if found["only_first_window"]:
        lines.append(
            "of the stream only the first window was read (data.window); what comes later is proved when it does"
        )
    if found["allowed_but_never_seen"]:
        codes = ", ".join(found["allowed_but_never_seen"])
        lines.append(f"data.allow_rejected allows {codes}, but no example was rejected for it")
    if found["num_rejected_not_allowed"]:
        new = [reason["code"] for reason in found["rejections"] if not reason["allowed"]]
        seen = [reason["code"] for reason in found["rejections"] if reason["allowed"]]
        codes = ", ".join([*sorted(seen + found["allowed_but_never_seen"]), *new])
        helps = f", or let such examples be left out with `data.allow_rejected: [{codes}]`"
        lines.append(
            f"not passed: {counted(found['num_rejected_not_allowed'], 'example')} rejected. Fix the data"
            f"{helps if found['num_tokens'] else ': no example is left to train'}"
        )
    elif found["holds_out_nothing"]:
        lines.append(f"not passed: {found['holds_out_nothing']}")
    elif not found["passed"]:
        lines.append("not passed: no example is left to train")
    else:
        allowed = f" except {counted(found['num_rejected'], 'rejected example')}, which the run file allows"
        lines.append(f"passed: every example is proved{allowed if found['num_rejected'] else ''}")
    return "\n".join(lines)
