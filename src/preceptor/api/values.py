"""What a program gives to `Run` -> the settings of a run: live models, data in memory, overrides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.config import Source
from preceptor.config.code import HeldCode
from preceptor.config.held import LiveModel, LiveSource
from preceptor.data.formats.tables import HuggingFaceDataset, RecordList
from preceptor.errors import ConfigError, short
from preceptor.files import LIVE, MEMORY

_OF_FILES = ("dtype", "init", "revision", "trust_remote_code", "from_run", "quantization", "double_quantization")
_FORMS = (
    "a path, a list of records such as {'messages': [...]}, a datasets.Dataset, a generator of records, or a list of "
    "these"
)


def settings_of(
    tree: dict[str, Any],
    where: str,
    tokenizer: Any = None,
    beside: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> config.Run:
    """A tree whose `model` and `data` may hold live objects -> the run. Raises ConfigError and ModelError.

    tokenizer: of a live model; absent: that of the name that it was loaded from. beside: the run file's folder.
    """
    tree = {key: value for key, value in tree.items() if value is not None}
    live = _LiveValues()
    if "model" in tree:
        tree["model"] = live.model(tree["model"], tokenizer, tree.get("out"))
    if "data" in tree:
        tree["data"] = live.data(tree["data"])
    if isinstance(tree.get("replay"), Mapping) and "data" in tree["replay"]:
        tree["replay"] = {**tree["replay"], "data": live.sources(tree["replay"]["data"], "replay.data")}
    for section in ("loss", "eval"):
        if isinstance(tree.get(section), Mapping) and "code" in tree[section]:
            tree[section] = {**tree[section], "code": live.code(tree[section]["code"])}
    if "out" in tree and isinstance(tree["out"], Path):
        tree["out"] = str(tree["out"])
    run = config.build(tree, where, environment)
    return live.put(run if beside is None else config.beside(run, beside))


class _LiveValues:
    """Takes live objects out of a tree, and puts them into the run that was made of it."""

    def __init__(self) -> None:
        self._held: Any = None
        self._tables: dict[str, Any] = {}
        self._functions: dict[str | None, HeldCode] = {}

    def model(self, given: Any, tokenizer: Any, out: str | Path | None) -> dict[str, Any]:
        section = dict(given) if isinstance(given, Mapping) else {"path": given}
        section = {key: value for key, value in section.items() if value is not None}
        path = section.get("path")
        if path is None or isinstance(path, str | Path):
            if tokenizer is not None:
                raise ConfigError("tokenizer: goes with a live model; one that is named by its path has its own")
            return section if path is None else {**section, "path": str(path)}
        from preceptor.model.held import HeldModel

        for key in _OF_FILES:
            if section.get(key) is not None:
                raise ConfigError(f"model.{key}: says how a model is loaded, and this one is; remove it")
        own = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor: its tokenizer
        known = HeldModel.of_unfinished(path, own, out)
        self._held = known or HeldModel(path, _tokenizer_of(path) if own is None else own)
        return {**section, "path": f"{LIVE}{self._held.name}", "dtype": self._held.dtype}

    def data(self, given: Any) -> dict[str, Any]:
        _refuse_splits(given, "data")
        is_section = isinstance(given, Mapping) and "train" in given
        if isinstance(given, Mapping) and not is_section and "path" not in given:
            raise ConfigError(f"data: {short(dict(given))} has no `train`; give {_FORMS}, or a dict of the section")
        section = dict(given) if is_section else {"train": given}
        for part in ("train", "eval"):
            if part in section:
                section[part] = self.sources(section[part], f"data.{part}")
        return section

    def sources(self, given: Any, name: str) -> list[dict[str, Any]]:
        """The sources that one value stands for."""
        listed = list(given) if isinstance(given, list | tuple) else None
        if listed == []:
            raise ConfigError(f"{name}: an empty list; give {_FORMS}")
        if listed is None or _is_record(listed[0]):
            return [self._source(given if listed is None else listed, name)]
        if len(listed) == 1:
            return [self._source(listed[0], name)]
        return [self._source(each, f"{name}[{place}]") for place, each in enumerate(listed)]

    def _source(self, given: Any, name: str) -> dict[str, Any]:
        section = dict(given) if isinstance(given, Mapping) and not _is_record(given) else {"path": given}
        if "code" in section:
            section["code"] = self.code(section["code"])
        path = section.get("path")
        if isinstance(path, str | Path):
            return {**section, "path": str(path)}
        self._tables[f"{MEMORY}{name}"] = _table(path, f"{MEMORY}{name}", name)
        return {**section, "path": f"{MEMORY}{name}"}

    def code(self, given: Any) -> Any:
        """A function becomes its name, which `put` makes a function again."""
        if not callable(given):
            return given
        held = HeldCode.of(given)
        if self._functions.get(str(held), held).function is not given:  # another one of this name
            held = HeldCode.of(given, f"_{len(self._functions)}")
        self._functions[str(held)] = held
        return str(held)

    def _coded(self, section: Any) -> Any:
        held = self._functions.get(section.code)
        return section if held is None else section.model_copy(update={"code": held})

    def put(self, run: config.Run) -> config.Run:
        def sources(of: Sequence[Source]) -> list[Source]:
            return [
                LiveSource.model_construct(**dict(source), table=self._tables[source.path])
                if source.path in self._tables
                else source
                for source in map(self._coded, of)
            ]

        data = run.data.model_copy(update={"train": sources(run.data.train), "eval": sources(run.data.eval)})
        replay = run.replay and run.replay.model_copy(update={"data": sources(run.replay.data)})
        model = run.model if self._held is None else LiveModel.model_construct(**dict(run.model), held=self._held)
        own = {"loss": self._coded(run.loss), "eval": self._coded(run.eval)}
        return run.model_copy(update={"data": data, "replay": replay, "model": model, **own})


def _is_record(value: Any) -> bool:
    """Whether it is a record of data and not the section of a source."""
    if not isinstance(value, Mapping):
        return False
    return "path" not in value or not set(value) <= set(Source.model_fields)


def _table(given: Any, name: str, place: str) -> Any:
    if isinstance(given, list | tuple):
        return RecordList(given, name)
    refuse_iterable(given, place)
    if type(given).__module__.startswith("datasets"):
        _refuse_splits(given, place)
        if getattr(given, "format", {}).get("type") == "custom":
            raise ConfigError(
                f"{place}: a data set with a transform (with_transform), which is not applied here. Write its examples "
                "out: dataset.with_format(None).map(function, batched=True)"
            )
        if hasattr(given, "select_columns") and hasattr(given, "num_rows"):
            return HuggingFaceDataset(given, name)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        call = "; call it, it is a function" if isinstance(given, Callable) else ""  # type: ignore[arg-type]
        raise ConfigError(f"{place}: {short(given)} is no data{call}; give {_FORMS}")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        raise ConfigError(f"{place}: a data frame; give its records: frame.to_dict('records')")
    records = list(given)  # a generator can be read once, and data is read several times
    if not records:
        raise ConfigError(f"{place}: the {type(given).__name__} gave no record; one that was read before is empty")
    return RecordList(records, name)


def refuse_iterable(given: Any, place: str) -> None:
    """Raises ConfigError for a data set that is streamed: its examples would all be held in memory."""
    if any(each.__name__ == "IterableDataset" for each in type(given).__mro__):
        raise ConfigError(
            f"{place}: a streamed data set (IterableDataset) cannot be read twice. Load it without streaming=True, "
            "give list(dataset) if it fits in memory, or use preceptor.Run(data={'train': "
            "'hf://datasets/OWNER/NAME', 'streaming': True})"
        )


def _refuse_splits(given: Any, place: str) -> None:
    if isinstance(given, Mapping) and type(given).__module__.startswith("datasets"):
        names = ", ".join(map(repr, given))
        raise ConfigError(f"{place}: a data set with the splits {names}; give one of them, such as dataset['train']")


def _tokenizer_of(model: Any) -> Any:
    from preceptor.chat.format import load_tokenizer
    from preceptor.errors import ModelError

    name = getattr(model, "name_or_path", "")
    try:
        if name:
            return load_tokenizer(name)
        reason = "the model does not say which name it was loaded from"
    except ModelError as error:
        reason = str(error)
    raise ConfigError(f"tokenizer: needed with a live model: Run(model=model, tokenizer=tokenizer, ...): {reason}")


def over_model_and_data(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a run file, whose `model` and `data` may be a value instead of a section: then their main key."""
    found = dict(changes)
    if "model" in found and not isinstance(found["model"], Mapping):
        loading = {} if isinstance(found["model"], str | Path) else dict.fromkeys(_OF_FILES)
        found["model"] = {**loading, "path": found["model"]}
    if "data" in found and not (isinstance(found["data"], Mapping) and {*found["data"]} <= {*config.Data.model_fields}):
        found["data"] = {"train": found["data"]}
    return found


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """The tree with other values: dotted keys, or sections, of which the keys that are given change.

    What stands in a section is a value, a table (`lr_factors`, `columns`) too: its keys may have dots.
    """
    found = dict(tree)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        before = found.get(first)
        is_data = first in ("train", "eval", "data") and type(value).__module__.startswith("datasets")  # a whole value
        section = before if isinstance(before, Mapping) else {}
        if isinstance(before, list) and rest:
            found[first] = _in_list(before, rest, value, f"{within}{first}")
        elif rest:
            found[first] = merged(section, {rest: value}, f"{within}{first}.")
        elif isinstance(value, Mapping) and not within and not is_data:
            found[first] = {**section, **value}
        else:
            found[first] = value
    return found


def _in_list(before: list[Any], rest: str, value: Any, key: str) -> list[Any]:
    """As an override of the command line has it: data.train.0.weight."""
    place, _, inner = rest.partition(".")
    if not (place.isdecimal() and int(place) < len(before)):
        raise ConfigError(f"{key}.{place}: {place!r} is not an index of a list of {len(before)}")
    found = list(before)
    found[int(place)] = merged(before[int(place)], {inner: value}, f"{key}.{place}.") if inner else value
    return found
