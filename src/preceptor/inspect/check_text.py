"""The counts of `preceptor check` for the eye: plain lines, so that they can also be searched and compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.data.truncation import Shortened


def to_text(found: dict[str, Any]) -> str:
    """What `check.to_json` gives, as lines."""
    parts = [_files(found["files"]), _tokens(found), _mixture(found["mixture"])]
    parts += [_repeated(found), _rejections(found), _verdict(found)]
    return "\n\n".join(part for part in parts if part)


def _files(files: Sequence[dict[str, Any]]) -> str:
    lines = ["Files"]
    for file in files:
        rejected = f", {file['num_rejected']:,} rejected" if file["num_rejected"] else ""
        held_out = "  (evaluation)" if file["part"] == "eval" else ""
        lines.append(f"  {format_line(file['name'], file['formats'])}{rejected}{held_out}")
    return "\n".join(lines)


def format_line(name: str, formats: Mapping[str, int]) -> str:
    """The formats of a file's rows, and how many there are of each."""
    return f"{name}: " + ", ".join(f"{form} ({_plural(count, 'row')})" for form, count in formats.items())


def _tokens(found: dict[str, Any]) -> str:
    if not found["num_tokens"]:
        return ""
    lines = [*_lengths("Tokens", found["lengths"])]
    saved = (
        f"one sample a turn would take {found['num_tokens_one_sample_a_turn']:,} tokens; the trees save "
        f"{found['num_tokens_saved_by_trees']:,} of them ({found['share_saved_by_trees']:.1%})"
    )
    shortened = [f"  {line}" for line in str(Shortened(**found["shortened"])).splitlines()]
    return "\n".join([*lines, f"  {_share_trained(found)}", f"  {saved}", *shortened])


def _lengths(title: str, lengths_by_kind: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    found = {kind: lengths for kind, lengths in lengths_by_kind.items() if lengths is not None}
    where = "  longest at" if any("longest_at" in lengths for lengths in found.values()) else ""
    lines = [f"{title:<12}{'number':>10}{'median':>10}{'mean':>10}{'95 %':>10}{'longest':>10}{where}"]
    for kind, lengths in found.items():
        numbers = [lengths[column] for column in ("median", "mean", "percentile_95", "longest")]
        cells = f"{lengths['count']:>10,}" + "".join(f"{number:>10,.0f}" for number in numbers)
        lines.append(f"  {kind:<10}{cells}" + (f"  {lengths['longest_at']}" if where else ""))
    return lines


def _share_trained(found: Mapping[str, Any]) -> str:
    return f"{found['num_trained']:,} of {found['num_tokens']:,} tokens ({found['share_trained']:.1%}) are trained"


def _mixture(mixture: Mapping[str, Any] | None) -> str:
    """What an epoch holds after the sources' weights and counts."""
    if mixture is None or not mixture["num_tokens"]:
        return ""
    lines = [*_lengths("One epoch", mixture["lengths"]), f"  {_share_trained(mixture)}"]
    for source in mixture["sources"]:
        share = source["num_tokens"] / mixture["num_tokens"]
        trained = source["num_trained"] / mixture["num_trained"] if mixture["num_trained"] else 0.0
        rows = _plural(source["num_examples"], "row")
        lines.append(f"  {source['path']}: {rows}, {share:.1%} of the tokens, {trained:.1%} of the trained")
    return "\n".join(lines)


def _repeated(found: dict[str, Any]) -> str:
    near = f"nearly ({found['near_means_similarity']:.0%} of their five-word sequences in common)"
    lines = ["Repeated rows"]
    for key, where in (("duplicates", "an earlier row"), ("in_the_evaluation_set", "a row of the evaluation set")):
        for kind, how in (("exact", "exactly"), ("near", near)):
            if found[key] is not None:
                repeated = found[key][kind]
                verb = "repeats" if repeated["count"] == 1 else "repeat"
                lines.append(f"  {_plural(repeated['count'], 'row')} to train on {verb} {where} {how}")
                lines.extend(f"      {pair['source']} repeats {pair['repeats']}" for pair in repeated["first"])
    prompted = (found["in_the_evaluation_set"] or {}).get("prompt")
    if prompted is not None:
        verb = "has" if prompted["count"] == 1 else "have"
        lines.append(
            f"  {_plural(prompted['count'], 'row')} to train on {verb} the prompt of a row of the evaluation set, "
            "with another answer"
        )
        lines.extend(f"      {pair['source']} asks what {pair['repeats']} asks" for pair in prompted["first"])
    return "\n".join(lines)


def _rejections(found: dict[str, Any]) -> str:
    if not found["rejections"]:
        return ""
    lines = [f"Rejected: {found['num_rejected']:,} of {_plural(found['num_examples'], 'row')}"]
    for reason in found["rejections"]:
        allowed = "  allowed by data.allow_rejected" if reason["allowed"] else ""
        lines.append(f"  {reason['count']:>8,}  {reason['share']:>6.1%}  {reason['code']}{allowed}")
        lines.append(f"      first at {reason['first_at']}: {reason['message']}")
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    lines = []
    if found["allowed_but_never_seen"]:
        codes = ", ".join(found["allowed_but_never_seen"])
        lines.append(f"data.allow_rejected allows {codes}, for which no row was rejected; check the spelling")
    if found["num_rejected_not_allowed"]:
        codes = ", ".join(reason["code"] for reason in found["rejections"] if not reason["allowed"])
        lines.append(
            f"not passed: {_plural(found['num_rejected_not_allowed'], 'row')} rejected. Fix the data, or let "
            f"such rows be left out with `data.allow_rejected: [{codes}]`"
        )
    elif not found["passed"]:
        lines.append("not passed: not a single row is left to train")
    else:
        left_out = f" but {_plural(found['num_rejected'], 'row')} that may be left out" if found["num_rejected"] else ""
        lines.append(f"passed: every row is proved{left_out}")
    return "\n".join(lines)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
