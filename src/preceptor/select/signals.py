"""Quality signals from the text of an answer alone, each a number that grows with the fault.

No signal knows whether an answer is right; those of measure.py, which ask a model, come closer to that.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

# Refusals count where an answer begins, boilerplate wherever it stands.
_REFUSAL = re.compile(
    r"^\W*((i['’]m|i am) (very |so |really )?(sorry|afraid)\b|sorry, (but )?i\b|unfortunately, i (can|am)\b|"
    r"i (can['’]t|cannot|can not|am not able to|['’]m not able to|am unable to|won['’]t) "
    r"(help|assist|answer|provide|fulfil|fulfill|do that|comply|discuss|write|create|generate))",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"as an? (ai|artificial intelligence|(large )?language model)\b|"
    r"\bi['’]?( a)?m (just |only )?an? (ai|(large )?language model)\b|"
    r"my (knowledge|training) (cut-?off|data)|i do(n['’]t| not) have (personal|access to real)|"
    r"(developed|trained|created) by (openai|anthropic|google|meta)\b",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"i hope (this|that) helps|let me know if (you have|there is|you need)|feel free to (ask|reach)|"
    r"(is there anything else|how (else )?(can|may) i (help|assist))|it['’]s important to (note|remember) that",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^\s*```.*?^\s*```\s*?$", re.DOTALL | re.MULTILINE)
_FENCE_LINE = re.compile(r"^\s*```", re.MULTILINE)
_LIST_MARK = re.compile(r"^\s*\(?\w{1,4}\)", re.MULTILINE)
_SMILEY = re.compile(r"[:;=8]['’]?-?[()\[\]]")
_BROKEN = re.compile("\ufffd|Ã.|â€|[\x00-\x08\x0b\x0c\x0e-\x1f]")
_PUNCTUATION = re.compile(r"[.,;:!?…。、，；：！？।؟]")
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))

_CAPITAL_LETTERS = 20  # fewer may well be an acronym
_UNPUNCTUATED_WORDS = 15
_REPEATED_WORDS = 4
_COMPRESSED_BYTES = 200  # below, a compressor's own overhead decides


@dataclass(frozen=True, slots=True)
class TextSignals:
    """The signals of a conversation, each from its worst answer."""

    num_characters: int  # mean of the answers
    refusal: float  # 0, 0.5 (filler phrases) or 1 (a refusal, or a mention of being a language model)
    formatting: float  # 0.5 for each flaw, at most 1
    repeated: float  # share of four-word sequences that occurred before
    compression: float  # bytes over compressed bytes; 1 for short answers
    found: tuple[str, ...]  # the findings in words


def text_signals(answers: Sequence[str]) -> TextSignals:
    """The signals of the answers of a conversation, at least one."""
    refusals, flaws = [_refusal(answer) for answer in answers], [_flaws(answer) for answer in answers]
    worst_refusal, worst_flaws = max(refusals, key=lambda r: r[0]), max(flaws, key=len)
    return TextSignals(
        num_characters=round(sum(map(len, answers)) / len(answers)),
        refusal=worst_refusal[0],
        formatting=min(1.0, len(worst_flaws) / 2),
        repeated=max(map(repeated_share, answers)),
        compression=max(map(compression_ratio, answers)),
        found=(*([worst_refusal[1]] if worst_refusal[0] else []), *worst_flaws),
    )


def _refusal(answer: str) -> tuple[float, str]:
    for severity, pattern in ((1.0, _REFUSAL), (1.0, _BOILERPLATE), (0.5, _FILLER)):
        match = pattern.search(answer)
        if match:
            return severity, f"{' '.join(match.group().split())!r}"
    return 0.0, ""


def _flaws(answer: str) -> list[str]:
    """The formatting flaws of an answer, in words."""
    flaws = []
    if len(_FENCE_LINE.findall(answer)) % 2:
        flaws.append("an open code fence")
    prose = _FENCE.sub("", answer)
    brackets = _SMILEY.sub("", _LIST_MARK.sub("", prose))
    if any(brackets.count(left) != brackets.count(right) for left, right in _PAIRS):
        flaws.append("unmatched brackets")
    letters = [character for character in prose if character.isupper() or character.islower()]
    if len(letters) >= _CAPITAL_LETTERS and sum(map(str.isupper, letters)) > 0.7 * len(letters):
        flaws.append("capitals only")
    if len(prose.split()) >= _UNPUNCTUATED_WORDS and not _PUNCTUATION.search(prose):
        flaws.append("no punctuation")
    if _BROKEN.search(prose):
        flaws.append("broken characters")
    if prose.rstrip()[-1:] in (",", ";", "(", "-") or answer.rstrip().endswith((" and", " the", " of", " a", " to")):
        flaws.append("an end in mid-sentence")
    return flaws


def repeated_share(text: str) -> float:
    """Share of the four-word sequences that occurred earlier in the text; 0 for fewer than five words."""
    words = text.lower().split()
    sequences = [tuple(words[k : k + _REPEATED_WORDS]) for k in range(len(words) - _REPEATED_WORDS + 1)]
    return 1 - len(set(sequences)) / len(sequences) if len(sequences) > 1 else 0.0


def compression_ratio(text: str) -> float:
    """Bytes over bytes after zlib: 1.5 to 3 for prose, more for repetitions."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 6)) if len(data) >= _COMPRESSED_BYTES else 1.0
