"""One quality between 0 and 1 from all signals, with the reasons.

Each signal s lowers the quality by a fault f_s between 0 and 1, times its weight w_s, the most that it can take away:

    quality = prod over s of (1 - w_s * f_s)

    refusal       1 if an answer, after its reasoning, refuses or speaks of being a language model, 0.5 for filler
                  phrases
    formatting    0.5 for one flaw, 1 for two
    repetition    repeated four-word sequences from 20 % (0) to 60 % (1), or compression from 4 to 8 times
    length        log of the answers' mean length, from 2 (0) to 4 (1) robust deviations from the pool's median
    difficulty    IFD from 0.95 (0) to 1 (1): the prompt does not help to predict the answer; limited by 1 (0) to 3 (1)
                  robust deviations above the pool's median, because a base model that never saw answers expects
                  another question after a question, and then no prompt helps
    loss          mean loss of the answers after their first tokens, from 1 (0) to 3 (1) robust deviations above the
                  pool's median. Answers that are unlikely under the base are broken, wrong, or state facts that it does
                  not know; training on those teaches it to invent (Gekhman et al. 2024, arXiv:2405.05904)

A robust deviation is 1.4826 times the median distance from the median, the standard deviation of a normal pool.
Examples more than 4 of them away are set aside and median and deviation are computed again, until none is: both
describe the bulk of the pool, whatever else it holds. A deviation is at least _LEAST, so that a pool of equals has no
outliers. An example without a fault has quality 1: among good examples, diversity chooses.

Signals from the text of an answer alone are found here, each a number that grows with the fault. None of them knows
whether an answer is right; those of measure.py, which ask a model, come closer to that.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.errors import ConfigError

# Refusals count where an answer begins, boilerplate wherever it stands. To be sorry, or to name a firm, is no refusal.
_I_CANNOT = (
    r"i (can['’]t|cannot|can not|won['’]t|will not|do(n['’]t| not) (have|know|understand|feel comfortable))|"
    r"i(['’]m| am) (not|unable)"
)
_UNABLE = rf"({_I_CANNOT}|(it|that|this)(['’]s| is) (not|beyond|impossible))\b"
_REFUSAL = re.compile(
    rf"^\W*(((i['’]m|i am) )?((very|so|really|terribly) )?(sorry|afraid)\b(\W+|[^.!?\n]{{1,80}}\W){_UNABLE}|"
    rf"((i['’]m|i am) )?((very|so|really|terribly) )?sorry,? but "
    rf"(no\b|as an? |(this|that)(['’]s| is) (beyond|something i)\b)|unfortunately,? ({_I_CANNOT})\b|"
    r"i (can['’]t|cannot|can not|am not able to|['’]m not able to|am unable to|won['’]t) "
    r"(help|assist|answer|provide|fulfil|fulfill|do that|comply|discuss|write|create|generate))",
    re.IGNORECASE,
)
_FIRMS = r"(developed|trained|created|made|built) by (openai|anthropic|google|meta)\b"
_BOILERPLATE = re.compile(
    r"as an? (ai|artificial intelligence|(large )?language model)( (language )?(model|assistant|chatbot|system))?"
    rf"(?=\s*([,.;:!?)]|$|i\b|my\b|{_FIRMS}))|"
    r"\bi['’]?( a)?m (just |only )?an? (ai|(large )?language model)\b|"
    rf"\bi(['’]m| am| was)( \w+,)?( [^.!?\n]{{0,60}}\b(model|assistant|ai|chatbot),?)?( that was)? {_FIRMS}|"
    r"my (knowledge|training) (cut-?off|data)|i do(n['’]t| not) have (personal|access to real)",
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
_SMILEY = re.compile(r"(?<![\d(\[])[:;=]['’]?-?([()\[\]])\1*+(?!\w)")
_AFTER = "\x80-\xbf" + bytes(range(0x80, 0xA0)).decode(
    "cp1252", "ignore"
)  # the second byte of UTF-8, read as a character
_BROKEN = re.compile(
    f"\ufffd|â€|[\x00-\x08\x0b\x0c\x0e-\x1f]|Ã(?![\xa0»…’”–—])[{_AFTER}]|"
    f"(?<![A-ZÀ-Þ])Ã[{_AFTER}]"  # elsewhere such a character may follow a word in capitals
)
_PUNCTUATION = re.compile(r"[.,;:!?…。、，；：！？।॥؟،؛۔։።၊။།។៕]")
_UNPUNCTUATED = re.compile("[\u0e00-\u0eff]")  # Thai and Lao
_CUT = re.compile(r"([,(]|(\s|[^\W\d_]{3})-)$")  # not a grade, an ion, a rule of dashes
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))

_CAPITAL_LETTERS = 20  # fewer may well be an acronym
_UNPUNCTUATED_WORDS = 15
_REPEATED_WORDS = 4
_COMPRESSED_BYTES = 200  # below, a compressor's own overhead decides


@dataclass(frozen=True, slots=True)
class TextSignals:
    """The signals of a conversation, each from its worst answer."""

    num_answers: int  # that are trained
    num_characters: int  # mean of the answers
    refusal: float  # 0, 0.5 (filler phrases) or 1 (a refusal, or a mention of being a language model)
    formatting: float  # 0.5 for each flaw, at most 1
    repeated: float  # share of four-word sequences that occurred before
    compression: float  # bytes over compressed bytes; 1 for short answers
    found: tuple[str, ...]  # the findings in words


def text_signals(answers: Sequence[str], said: Sequence[str] | None = None) -> TextSignals:
    """The signals of the answers of a conversation, at least one. said: what they say after their reasoning, if any."""
    refusals, flaws = [_refusal(text) for text in said or answers], [_flaws(answer) for answer in answers]
    worst_refusal, worst_flaws = max(refusals, key=lambda r: r[0]), max(flaws, key=len)
    return TextSignals(
        num_answers=len(answers),
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
    brackets = _LIST_MARK.sub("", prose)
    if not _match(brackets) and not _match(_SMILEY.sub("", brackets)):
        flaws.append("unmatched brackets")
    letters = [character for character in prose if character.isupper() or character.islower()]
    if len(letters) >= _CAPITAL_LETTERS and sum(map(str.isupper, letters)) > 0.7 * len(letters):
        flaws.append("capitals only")
    words = [word for word in prose.split() if not _UNPUNCTUATED.search(word)]
    if len(words) >= _UNPUNCTUATED_WORDS and not _PUNCTUATION.search(prose):
        flaws.append("no punctuation")
    if _BROKEN.search(prose):
        flaws.append("broken characters")
    if _CUT.search(prose.rstrip()) or answer.rstrip().endswith((" and", " the", " of", " a", " to")):
        flaws.append("an end in mid-sentence")
    return flaws


def _match(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in _PAIRS)


def repeated_share(text: str) -> float:
    """Share of the four-word sequences that occurred earlier in the text; 0 for fewer than five words."""
    words = text.lower().split()
    sequences = [tuple(words[k : k + _REPEATED_WORDS]) for k in range(len(words) - _REPEATED_WORDS + 1)]
    return 1 - len(set(sequences)) / len(sequences) if len(sequences) > 1 else 0.0


def compression_ratio(text: str) -> float:
    """Bytes over bytes after zlib: 1.5 to 3 for prose, more for repetitions."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 6)) if len(data) >= _COMPRESSED_BYTES else 1.0


WEIGHTS: Mapping[str, float] = {
    "refusal": 0.9,
    "formatting": 0.5,
    "repetition": 0.7,
    "length": 0.4,
    "difficulty": 0.7,
    "loss": 0.8,
}
# One quality from all signals -----------------------------------------------------------------------------------------

MODEL_SIGNALS = ("difficulty", "loss")

_LEAST = {"length": 0.35, "difficulty": 0.05, "loss": 0.1}  # length: a factor of 1.4; loss: nats
_REPEATED, _COMPRESSION, _DIFFICULTY = (0.2, 0.6), (4.0, 8.0), (0.95, 1.0)
_FAR, _HIGH = (2.0, 4.0), (1.0, 3.0)  # deviations
_SET_ASIDE = 4.0


def read_weights(given: Sequence[str]) -> dict[str, float]:
    """`SIGNAL=WEIGHT` over the defaults; 0 switches a signal off. Raises ConfigError."""
    weights = dict(WEIGHTS)
    for text in given:
        name, _, value = text.partition("=")
        if name not in WEIGHTS:
            raise ConfigError(f"--weight {text}: there is no signal {name!r}; the signals are {', '.join(WEIGHTS)}")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] <= 1:
            raise ConfigError(f"--weight {text}: a weight is a number from 0 (off) to 1, as in {name}=0.5")
    return weights


@dataclass(frozen=True, eq=False, slots=True)
class Quality:
    """The qualities and faults of N examples, all between 0 and 1, float64."""

    quality_N: np.ndarray
    fault_N: Mapping[str, np.ndarray]
    weights: Mapping[str, float]

    def reasons(self, index: int) -> list[str]:
        """The signals that lower the example's quality, the worst first."""
        cost = {name: self.weights[name] * float(fault_N[index]) for name, fault_N in self.fault_N.items()}
        return sorted((name for name in cost if cost[name] > 0), key=lambda name: -cost[name])


def judge(signals: Sequence[TextSignals], score_N: np.ndarray | None, weights: Mapping[str, float]) -> Quality:
    """The quality of N examples, at least 1. score_N: of a model (measure.py), if there is one."""
    fault_N = {
        "refusal": np.array([s.refusal for s in signals]),
        "formatting": np.array([s.formatting for s in signals]),
        "repetition": np.maximum(
            _ramp(np.array([s.repeated for s in signals]), _REPEATED),
            _ramp(np.array([s.compression for s in signals]), _COMPRESSION),
        ),
        "length": _ramp(np.abs(_deviations(np.log([max(1, s.num_characters) for s in signals]), "length")), _FAR),
    }
    if score_N is not None:
        high_N = _ramp(_deviations(score_N["difficulty"], "difficulty"), _HIGH)
        fault_N["difficulty"] = np.minimum(_ramp(score_N["difficulty"], _DIFFICULTY), high_N)
        fault_N["loss"] = _ramp(_deviations(score_N["loss_rest"], "loss"), _HIGH)
    fault_N = {name: fault for name, fault in fault_N.items() if weights[name] > 0}
    quality_N = np.ones(len(signals))
    for name, fault in fault_N.items():
        quality_N *= 1 - weights[name] * fault
    return Quality(quality_N, fault_N, weights)


def _ramp(value_N: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """0 up to the first bound, 1 from the second, linear between them."""
    ramp_N: np.ndarray = np.clip((value_N - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)
    return ramp_N


def _deviations(value_N: np.ndarray, name: str) -> np.ndarray:
    """The signed distance from the median in robust deviations."""
    bulk = value_N
    while True:
        centre = float(np.median(bulk))
        deviation = max(1.4826 * float(np.median(np.abs(bulk - centre))), _LEAST[name])
        within = bulk[np.abs(bulk - centre) <= _SET_ASIDE * deviation]
        if len(within) == len(bulk):
            result_N: np.ndarray = (value_N - centre) / deviation
            return result_N
        bulk = within
