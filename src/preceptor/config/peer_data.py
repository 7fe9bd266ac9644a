"""Data sets that a file of another trainer names, as the sources of a run file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.config.peer_files import dataset_info
from preceptor.config.peer_names import NO_COUNTERPART
from preceptor.config.peer_settings import OFF, PeerSettings
from preceptor.errors import short

_OF_ROLES = {
    "roles_to_train": "only assistant turns, the last one, or all can be trained, see data.train_on",
    "train_on_inputs": "data.train_on: `all` trains the prompt as well, of every source",
}


class Sources:
    """folder: where the file lies, for what it names."""

    def __init__(self, given: PeerSettings, folder: Path) -> None:
        self._given, self._folder = given, folder
        self._found: dict[str, list[dict[str, Any]]] = {}

    def _set(self, key: str, sources: list[dict[str, Any]]) -> None:
        self._found.setdefault(key, sources)

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """`data.train` and `data.eval`, where they are named."""
        train: Any = None
        held_out: Any = None
        if self._given.peer == "Axolotl":
            train, held_out = self._given.value("datasets"), self._given.value("test_datasets")
        elif self._given.peer == "LLaMA-Factory":
            self._named_data("dataset", "data.train")
            self._named_data("eval_dataset", "data.eval")
        else:
            train, held_out = self._given.value("train_dataset"), self._given.value("eval_dataset")
            if train is None and (name := self._given.value("dataset_name")) is not None:
                found = {"path": name, "name": self._given.value("dataset_config")}
                train = {**found, "split": self._given.value("dataset_train_split") or "train"}
                if {"eval_strategy", "evaluation_strategy"} & self._given.settings.keys() and held_out is None:
                    held_out = {**found, "split": self._given.value("dataset_test_split") or "test"}
        for key, entries in (("data.train", train), ("data.eval", held_out)):
            if entries:
                sources = [self._source(key, entry) for entry in (entries if isinstance(entries, list) else [entries])]
                self._set(key, [source for source in sources if source])
        if self._given.settings.get("max_samples") and self._given.value("max_samples"):
            self._given.note(
                "max_samples", "at most so many there; `count` of a source is exactly so many, so set it by hand"
            )
        return self._found

    def _source(self, key: str, entry: Any) -> dict[str, Any]:
        """One data set of Axolotl's list, or the arguments of `load_dataset`."""
        if not isinstance(entry, Mapping):
            return {"path": str(entry)}
        values = {name: value for name, value in entry.items() if value not in OFF}
        path, files = values.pop("path", None), values.pop("data_files", None)
        kind = values.pop("ds_type", None)
        if files is not None:
            if not isinstance(files, str):
                self._given.note(f"{key} data_files", f"{short(files)}: name each file as a source of its own")
            path = str(files) if isinstance(files, str) else path
            values.pop("split", None)  # of a file there is only one
        found: dict[str, Any] = {"path": str(path)}
        if kind is None and files is None and Path(str(path)).suffix == "":
            found["split"] = str(values.pop("split", "train"))
        if "name" in values and files is None:
            found["name"] = str(values.pop("name"))
        if (column := values.pop("field_messages", None)) not in (None, "messages", "conversations"):
            found["columns"] = {"messages": str(column)}
        if values.get("roles_to_train") == ["assistant"]:
            values.pop("roles_to_train")
        self._format(key, values)
        for name, value in values.items():
            advice = NO_COUNTERPART.get(name) or _OF_ROLES.get(name) or "not known here: see docs/data.md"
            self._given.note(f"{key} {name}", f"{short(value)}: {advice}")
        return found

    def _format(self, key: str, values: dict[str, Any]) -> None:
        """What Axolotl says of the format of examples; here it is recognised by their keys."""
        kind = values.pop("type", None)
        if values.get("roles") == {"user": ["user"], "assistant": ["assistant"]}:
            values.pop("roles")
        for name in ("message_field_role", "message_field_content"):
            if values.get(name) in ("role", "content", "from", "value"):
                values.pop(name)
        mappings = values.get("message_property_mappings")
        if isinstance(mappings, Mapping) and set(mappings.values()) <= {"role", "content", "from", "value"}:
            values.pop("message_property_mappings")
        if kind not in (None, "chat_template", "sharegpt", "completion", "pretrain"):
            self._given.note(
                f"{key} type",
                f"{short(kind)} writes its own prompt there; here such an example becomes a conversation in the chat "
                "template",
            )

    def _named_data(self, key: str, ours: str) -> None:
        """LLaMA-Factory names data sets of data/dataset_info.json."""
        names = self._given.value(key)
        if not names:
            return
        known = dataset_info(self._given.settings, self._folder)
        sources = []
        for name in str(names).split(",") if isinstance(names, str) else names:
            entry = known.get(str(name).strip())
            if entry is None:
                self._given.note(
                    key,
                    f"{str(name).strip()!r} is an entry of dataset_info.json, which is not here: write its file's path",
                )
                continue
            path = entry.get("hf_hub_url") or str(Path(entry["folder"]) / str(entry.get("file_name")))
            columns = {
                {"prompt": "instruction", "query": "input", "response": "output"}.get(part, part): column
                for part, column in (entry.get("columns") or {}).items()
            }
            renamed = any(part != column for part, column in columns.items() if part != "messages")
            messages = columns.get("messages", "messages") not in ("messages", "conversations")
            sources.append({"path": path, **({"columns": columns} if renamed or messages else {})})
        if sources:
            self._set(ours, sources)


def long_examples(given: PeerSettings, packed: bool) -> dict[str, Any]:
    """What becomes of examples over the maximum length, which end no run of another trainer: keys of the run file.

    There they are cut, split or dropped.
    """
    if given.value("max_length", "max_seq_length", "sequence_len", "cutoff_len") is None:
        return {}
    found: dict[str, Any] = {"data.allow_rejected": ["too_long"]}
    dropped = given.peer == "Axolotl" or (given.peer == "LLaMA-Factory" and packed)
    if given.peer == "Axolotl" and given.takes("excess_length_strategy", "raise"):
        given.note("excess_length_strategy", "here the run ends where more than `data.max_rejected` are too long")
        return {}
    if given.takes("excess_length_strategy", "drop", "truncate"):
        dropped = given.settings["excess_length_strategy"] == "drop"
    if packed and given.takes("packing_strategy", "bfd_split", "bfd-requeue", "wrapped"):
        given.note("packing_strategy", "longer examples are cut into pieces there; here no answer is (data.overflow)")
        return {**found, "data.overflow": "split"}
    if not packed and given.takes("truncation_mode", "keep_end"):
        given.note("truncation_mode", "what is too long loses its beginning; here no answer is cut (data.overflow)")
        return {**found, "data.overflow": "truncate_context"}
    given.takes("truncation_mode", "keep_start")
    there = "leaves longer examples out" if dropped else "cuts longer examples"
    choice = "To train them, set data.overflow: split or truncate_context"
    given.note("max_length", f"{given.peer} {there}; here they are left out and counted. {choice}")
    return found
