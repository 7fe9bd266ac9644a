"""The data sets of a script: `load_dataset(...)`, and the methods that are called on it, as settings."""

import ast
from collections.abc import Mapping
from typing import Any

from preceptor.config.peer_settings import PeerFile
from preceptor.config.python_source import SECRET, UNREADABLE, Script, shown

RENDERS = "the chat template renders the conversations, which is done here as well: nothing to set"
_AROUND_DATA = ("standardize_sharegpt", "standardize_data_formats")  # the format is recognised here
_CHANGES = "map filter select shuffle rename_column rename_columns remove_columns train_test_split".split()  # noqa: SIM905


def data_set(
    script: Script, name: str, value: ast.expr, split_off: ast.Call | None, found: PeerFile
) -> ast.Call | None:
    """`load_dataset(...)`, also where methods are called on it or a split is taken: those are named.

    split_off, and the result: the call by which a share of the training data is held out.
    """
    split, place, is_held_out = None, value.lineno, name == "eval_dataset"
    try:
        while True:
            value = script.resolved(value)
            if isinstance(value, ast.Subscript):
                split, value = script.constant(value.slice), value.value
            elif isinstance(value, ast.Call) and script.name_of(value) in _AROUND_DATA and value.args:
                value = value.args[0]
            elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _CHANGES:
                splits = value.func.attr == "train_test_split"
                if splits and is_held_out and value is split_off and split == "test":
                    return split_off  # what is held out of the training data
                share = _share(script, value) if splits and split == "train" and not is_held_out else None
                if share is not None:
                    found.settings["val_size"], split_off = share, value
                else:
                    of = f"{name}: .{value.func.attr}(...) (line {value.lineno})"
                    found.unread.append(f"{of}: {_changed(script, value)}")
                if splits and is_held_out:
                    return split_off  # a part of data that is read whole
                split, value = None if splits else split, value.func.value
            else:
                break
        if isinstance(value, ast.Call) and script.name_of(value) == "load_dataset":
            arguments = [script.constant(each) for each in value.args]
            keywords = [each for each in value.keywords if each.arg and not SECRET.search(each.arg)]
            named = {str(each.arg): script.constant(each.value) for each in keywords}
            found.settings[name] = _loaded(arguments, {**named, **({"split": split} if split else {})})
            return split_off
    except UNREADABLE:
        pass
    found.unread.append(f"{name}: {shown(value)} (line {place}): not a data set that can be named here")
    return split_off


def _share(script: Script, call: ast.Call) -> float | None:
    """Of `train_test_split`, where it holds a share of the data out and no number of examples."""
    given = [each.value for each in call.keywords if each.arg == "test_size"] or call.args[:1]
    try:
        size = script.constant(given[0]) if given else None
    except UNREADABLE:
        return None
    return size if isinstance(size, float) and 0 < size < 1 else None


def _changed(script: Script, call: ast.Call) -> str:
    """What to do about a method that is called on a data set."""
    method = getattr(call.func, "attr", "")
    if method == "shuffle":
        return "the order is drawn again for each epoch: nothing to set"
    if method == "train_test_split":
        return "data.eval_size holds a share of the examples out, such as 0.05: set it, or name files in data.eval"
    if method == "map" and call.args and script.renders(call.args[0]):
        return RENDERS
    return "the data is read here as it is; write what that call makes of it to a file, and name that"


def _loaded(arguments: list[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load_dataset` as a source."""
    values = dict(zip(("path", "name", "data_dir", "data_files", "split"), arguments, strict=False)) | dict(named)
    found = {key: value for key, value in values.items() if value is not None}
    files = found.get("data_files")
    if isinstance(files, Mapping) and found.get("split", "train") in files:
        files = files[found.get("split", "train")]
    return found if files is None else {**found, "data_files": files}
