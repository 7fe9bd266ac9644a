"""The figures of a selection for the eye: plain lines, so that they can also be searched and compared."""

from typing import Any

_MEANINGS = {
    "kept": "kept",
    "covered": "good enough, and like a row that is kept",
    "low_quality": "worse than the rows that the choice was made from",
    "exact_repeat": "says exactly what an earlier row says",
    "near_repeat": "nearly says what another row says",
}


def to_text(summary: dict[str, Any]) -> str:
    """What `select` returns, as lines."""
    parts = [_codes(summary), _refused(summary), _lengths(summary), _verdict(summary)]
    return "\n\n".join(part for part in parts if part)


def _codes(summary: dict[str, Any]) -> str:
    lines = [f"{summary['num_rows']:,} rows"]
    for code, count in sorted(summary["codes"].items(), key=lambda item: (item[0] != "kept", -item[1])):
        share = count / summary["num_rows"]
        lines.append(f"  {count:>9,}  {share:>6.1%}  {code:<14} {_MEANINGS.get(code, 'refused')}")
    return "\n".join(lines)


def _refused(summary: dict[str, Any]) -> str:
    lines = [f"  {first['source']}: {first['code']}: {first['message']}" for first in summary["first_refused"]]
    return "\n".join(["The first refused rows", *lines]) if lines else ""


def _lengths(summary: dict[str, Any]) -> str:
    lines = [f"{'Lengths':<20}{'5 %':>9}{'median':>9}{'mean':>9}{'95 %':>9}"]
    for name in summary["lengths"]["before"]:
        for when, label in (("before", "all distinct"), ("after", "kept")):
            values = summary["lengths"][when][name]
            cells = "".join(f"{values[key]:>9,.0f}" for key in ("percentile_5", "median", "mean", "percentile_95"))
            title = f"{name.replace('_', ' ')}" if when == "before" else ""
            lines.append(f"  {title:<18}{cells}  {label}")
    return "\n".join(lines)


def _verdict(summary: dict[str, Any]) -> str:
    quality = summary["quality"]
    lines = [f"mean quality: {quality['before']:.3f} of all distinct rows, {quality['after']:.3f} of those kept"]
    if summary["coverage"] is not None:
        lines.append(
            f"coverage of the rows chosen from: {summary['coverage']:.3f}; "
            f"by as many drawn at random among them: {summary['random_coverage']:.3f}"
        )
    if summary["all_kept"]:
        lines.append(
            f"--keep {summary['asked_to_keep']:,} is more than there is: all {summary['num_kept']:,} rows that can be "
            "trained and repeat no other are kept, whatever their quality"
        )
    else:
        lines.append(f"kept {summary['num_kept']:,} of {summary['num_rows']:,} rows")
    return "\n".join(lines)
