"""One file of another trainer: its settings, with their defaults, and the run file that comes of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from preceptor.config.peer_defaults import DEFAULTS, NAMES, OFF, Direct, Peer
from preceptor.config.yaml_text import dump_yaml
from preceptor.errors import short

T = TypeVar("T")

_HEADINGS = {
    True: "# Not carried over, so that something else is trained than there:",
    False: "# Not carried over, or not as it was:",
}
_OF_LOADING = {
    "TRL": ("model_init_kwargs", "quantization_config"),
    "Unsloth": ("model_init_kwargs", "quantization_config"),
    "Axolotl": ("overrides_of_model_config",),
}
"""Keys whose value is a table of further keys, of how the model is loaded."""
_NULLS: Mapping[Peer, Mapping[str, Any]] = {
    "TRL": {"max_grad_norm": 0},
    "Unsloth": {"max_grad_norm": 0},
    "Axolotl": {"bf16": False},
}
"""Keys of which null says that something is off, which an absent key does not."""
_OF_SCHEDULE = {"lr_scheduler": "lr_scheduler_type", "min_lr_ratio": "lr_scheduler_type", "warmup": "warmup_steps"}
_OF_FOUR_BITS = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}  # defaults of BitsAndBytesConfig


def _finite(value: Any) -> float:
    """Raises ValueError for a number that is not finite, or below 0."""
    if 0 <= (number := float(value)) < math.inf:
        return number
    raise ValueError


@dataclass
class PeerFile:
    """settings: their keys and values. unread: what the file says in a way that cannot be read, as sentences.

    unoffered: those without which something else is trained. defaults: values that come before the trainer's own where
    the file has no key. is_open: there may be further keys, so that no absent one has a default.
    """

    peer: Peer
    settings: dict[str, Any]
    unread: list[str] = field(default_factory=list)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unoffered: list[str] = field(default_factory=list)
    is_open: bool = False


class Conversion:
    """A file of another trainer that becomes a run file.

    settings: without keys that have no value. used: the keys that became part of the run, or of a note. tree: the run
    file, which lacks the keys of `missing`. notes: key of the file -> what became of it. unoffered: those of them
    without which something else is trained, with what is offered.
    """

    def __init__(self, file: PeerFile) -> None:
        self.peer, given = file.peer, dict(file.settings)
        for key in _OF_LOADING.get(file.peer, ()):  # the one within the other
            if isinstance(given.get(key), Mapping):
                inner = given.pop(key)
                four_bits = key == "quantization_config" and inner.get("load_in_4bit")
                given |= {**(_OF_FOUR_BITS if four_bits else {}), **inner}
        none_is_a_value = file.peer in ("TRL", "Unsloth")  # elsewhere a key without a value is as good as absent
        given |= {key: off for key, off in _NULLS.get(file.peer, {}).items() if given.get(key, off) is None}
        self.settings = {key: value for key, value in given.items() if value is not None}
        names = {NAMES.get(key, key) for key in (given if none_is_a_value else self.settings)}
        unread = (sentence.partition(":")[0] for sentence in file.unread)
        names |= {NAMES.get(key, key) for key in unread}  # given, though not as a value
        self._unknown = DEFAULTS[file.peer].keys() - names if file.is_open else frozenset[str]()
        defaults = {} if file.is_open else {**DEFAULTS[file.peer], **file.defaults}
        self.defaults = {key: value for key, value in defaults.items() if NAMES.get(key, key) not in names}
        self.used: set[str] = set()
        self.tree: dict[str, Any] = {}
        self.missing: list[str] = []
        self.notes: list[tuple[str, str]] = []
        self.unoffered: list[tuple[str, str]] = []
        for sentence in file.unoffered:
            key, _, why = sentence.partition(": ")
            self.not_offered(key, why)

    def value(self, *names: str) -> Any:
        """The first of these keys that is given, else a default of the trainer; None where there is neither."""
        for name in names:
            if name in self.settings:
                self.used.add(name)
                return self.settings[name]
        return next((self.defaults[name] for name in names if name in self.defaults), None)

    def on(self, *names: str) -> Any:
        """The first of these keys that is given and not off; None where there is none."""
        return next((self.value(name) for name in names if self.settings.get(name) not in OFF), None)

    def takes(self, key: str, *values: Any) -> bool:
        """Whether the key is given with one of these values, and so part of the run."""
        if self.settings.get(key) not in values:
            return False
        self.used.add(key)
        return True

    def set(self, ours: str, value: Any) -> None:
        """Give a key of the run file its value, unless that is None or the key has one."""
        section, _, name = ours.partition(".")
        if value is not None:
            inside = self.tree.setdefault(section, {}) if name else self.tree
            inside.setdefault(name or section, value)

    def carry(self, rows: Direct) -> None:
        """Set keys of the run file whose values need no more than a type."""
        for key, (ours, cast) in rows.items():
            if (value := self.value(key)) is not None:
                self.set(ours, self.cast(key, value, cast))

    def cast(self, key: str, value: Any, cast: Callable[[Any], T]) -> T | None:
        """None for no value, and, with a note, for one that the cast does not take."""
        try:
            return None if value is None else cast(value)
        except (TypeError, ValueError, OverflowError):
            self.not_offered(key, f"{short(value)} is not a value that can be carried over")
            return None

    def number(self, name: str, value: Any) -> float | None:
        """None, with a note, also for one that is negative or infinite: no run has such a number."""
        return self.cast(name, value, _finite)

    def note(self, key: str, why: str) -> None:
        """Nothing is said of a key that the file may hold where it cannot be read."""
        if key not in self._unknown:
            self.notes.append((key, why))

    def not_offered(self, key: str, why: str, instead: str = "") -> None:
        """A note on a value without which something else is trained. instead: what then is."""
        self.note(key, why + instead)
        if key not in self._unknown:
            self.unoffered.append((key, why))

    def drop_absent(self) -> None:
        """Take out of `optimizer` what stands for a key that the file may hold where it cannot be read."""
        for ours, theirs in _OF_SCHEDULE.items():
            if theirs in self._unknown:
                self.tree.get("optimizer", {}).pop(ours, None)
        if not self.tree.get("optimizer"):
            self.tree.pop("optimizer", None)

    def changes(self, key: str, why: str) -> bool:
        """Whether a note is on one of `unoffered`."""
        return any(key == own and why.startswith(reason) for own, reason in self.unoffered)

    def text(self, source: str) -> str:
        """The run file, with the notes as comments."""
        lines = [f"# Made by `preceptor convert` from {source} ({self.peer})."]
        lines += [f"# To be filled in: {key}" for key in self.missing]
        for changes, heading in _HEADINGS.items():
            own = [f"#   {key}: {why}" for key, why in self.notes if self.changes(key, why) == changes]
            lines += [heading, *own] if own else []
        lines = [" ".join(line.splitlines()) for line in lines]  # each is one comment
        return "\n".join(lines) + "\n" + dump_yaml(self.tree)
