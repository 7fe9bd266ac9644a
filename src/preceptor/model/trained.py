"""Which parameters of a model are trained, by patterns of their names."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from preceptor.errors import ModelError

_NUM_NEAR = 3


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (`*` any text, `?` any character, `[0-3]`) is the whole name, or that of a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def require_matches(
    patterns: Iterable[str],
    names: Sequence[str],
    key: str,
    fits: Callable[[str, str], bool] = matches,
    what: str = "parameter of this model",
) -> None:
    """Raises ModelError, with near names, for a pattern that fits no name. key: of the run file. what: a name is of."""
    for pattern in patterns:
        if not any(fits(pattern, name) for name in names):
            known = {part: None for name in names for part in (*name.split("."), name.rpartition(".")[0], name)}
            near = difflib.get_close_matches(pattern.strip("*."), list(known), n=_NUM_NEAR)
            hint = ", ".join(near or names[:_NUM_NEAR])
            raise ModelError(f"{key}: {pattern!r} matches no {what}; near it: {hint}")


def choose_trained(model: nn.Module, freeze: Sequence[str], train_only: Sequence[str]) -> str:
    """Freeze what `freeze` names, or all but what `train_only` names; the sentence that says so, "" for nothing.

    A tied weight has several names, each of which stands for it. Raises ModelError for a pattern that matches nothing
    that is trained, and where nothing is left.
    """
    if not freeze and not train_only:
        return ""
    key, patterns = ("model.freeze", freeze) if freeze else ("model.train_only", train_only)
    named: Mapping[str, nn.Parameter] = {
        name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    require_matches(patterns, list(named), key)
    found = {id(p) for name, p in named.items() if any(matches(pattern, name) for pattern in patterns)}
    before = {id(p): p for p in named.values()}
    frozen = [p for p in before.values() if (id(p) in found) == bool(freeze)]
    if len(frozen) == len(before):
        raise ModelError(f"{key}: {', '.join(patterns)} leaves nothing to train")
    for parameter in frozen:
        parameter.requires_grad_(False)
    num = sum(p.numel() for p in frozen)
    return f"{key}: {len(frozen)} of {len(before)} tensors ({num:,} parameters) stay as they are"
