"""The data of another trainer's file -> the section `data` of a run file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.config.peer_defaults import OFF
from preceptor.config.peer_files import dataset_info
from preceptor.config.peer_settings import Conversion
from preceptor.config.peer_without import NO_COUNTERPART, OF_IMAGES, table
from preceptor.config.python_source import public
from preceptor.errors import short

HUB_ID = re.compile(r"[\w.-]+/(?!.*\.(jsonl?|parquet|arrow|csv|tsv|txt|gz|zst)$)[\w.-]+")
_OF_SOURCES = table("""
field_thinking template_thinking_key: reasoning is read from `reasoning_content`, or from tags in the content: rename it
column_names skiprows: a table is read with its own header: write its names in `columns`
roles_to_train: only assistant turns, the last one, or all can be trained, see data.train_on
train_on_inputs: data.train_on: `all` trains the prompt as well, of every source
split: a file is read whole; write that part to a file of its own, and name that
fraction: a share of the mixture there; `count` of a source is so many examples, set it by hand
""")
_ROLES = {"user", "human", "assistant", "gpt", "model", "chatgpt", "system", "tool", "observation"}
_SAME = {"id": "path", "source": "path", "config": "name", "subset": "name"}
_OF_TEXT = ("completion", "pretrain")
_MESSAGE_KEYS = ("role", "content", "from", "value")
_OF_PROMPTS = {f"field_{name}": name for name in ("system", "instruction", "input", "output")}
OF_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""What LLaMA-Factory reads of an example, by its names, where the entry of the data set says nothing."""
_COLUMNS = {**OF_ALPACA, **{part: part for part in ("history", "system", "tools", "messages")}}
_IMAGES = {"images", "videos", "audios"}
_READERS = ("json", "csv", "parquet", "text", "arrow", "webdataset")  # of `load_dataset`, and no data sets
_PLAIN = re.compile(r"[\w.-]+")  # the name of a split, and no part of one
_FIRST, _REST = re.compile(r"([\w.-]+)\[:(\d{1,2})%\]"), re.compile(r"([\w.-]+)\[(\d{1,2})%:\]")


def data_section(given: Conversion, folder: Path, packed: bool) -> None:
    """Set the keys of the section `data`. folder: where the file lies, for what it names."""
    texts = _set_sources(given, folder)
    streaming = bool(given.on("streaming", "dataset_streaming", "pretraining_dataset"))
    for key in ("val_set_size", "val_size", "test_split_size"):
        share = given.number(key, given.on(key) or 0)
        if share and (streaming or share >= 1):
            why = "a stream has no end to choose from" if streaming else "data.eval_size is a share, such as 0.05"
            given.note(key, f"{why}; or name held-out files in data.eval")
        elif share:
            given.set("data.eval_size", share)
    if streaming:
        _set_stream(given, folder)
    given.takes("dataset_text_field", "text")  # as here
    _set_chat_template(given)
    _set_train_on(given)
    for key, value in long_examples(given, packed, texts).items():
        given.set(key, value)


def _set_stream(given: Conversion, folder: Path) -> None:
    given.set("data.streaming", True)
    for source in given.tree["data"].get("train", ()):
        if HUB_ID.fullmatch(path := source["path"]) and not (folder / path).exists():
            given.note(
                "streaming",
                f"{path} is of the Hub: a stream reads its files, hf://datasets/{path} or a folder or pattern in it; "
                "`split` chooses by their names, and `name` is a folder",
            )
    key = "streaming_multipack_buffer_size" if given.peer == "Axolotl" else "buffer_size"
    given.carry({key: ("data.window", int)})


def _set_chat_template(given: Conversion) -> None:
    given.takes("chat_template", "jinja")  # that is, the template of chat_template_jinja
    named = given.value("chat_template_jinja", "chat_template_path", "chat_template", "template")
    name, own = str(named), "absent here: the model's own, else chatml"
    if named is None or (given.peer == "Axolotl" and name in ("tokenizer_default", "default", "empty")):
        return
    if name in ("chatml", "llama3", "tokenizer") or name.endswith(".jinja"):
        given.set("data.chat_template", name)
    elif "{%" in name or "{{" in name:
        why = "a template in the file itself: write it to a file that ends in .jinja, and name that"
        given.note("chat_template", f"{why} in data.chat_template; {own}")
    else:
        why = f"{short(named)} is a template of {given.peer}'s own; {own} (`preceptor show` shows it)"
        given.note("chat_template", why)


def _set_train_on(given: Conversion) -> None:
    only_completion, roles = given.value("completion_only_loss"), given.value("roles_to_train")
    if given.on("train_on_inputs", "train_on_prompt") or only_completion is False:
        given.set("data.train_on", "all")
    elif given.on("mask_history"):
        given.set("data.train_on", "last")
    elif only_completion not in (None, True):
        given.note("completion_only_loss", f"{short(only_completion)}: set data.train_on")
    elif roles not in (None, ["assistant"]):
        given.note("roles_to_train", f"{short(roles)}: only assistant turns, the last one, or all can be trained")
    elif given.peer in ("TRL", "Unsloth") and not given.on("assistant_only_loss"):
        given.note(
            "assistant_only_loss",
            "off, so TRL trains all tokens of `messages` (of prompt and completion: the completion); here what the "
            "model answers is trained; `data.train_on: all` trains the prompt as well",
        )


def _set_sources(given: Conversion, folder: Path) -> bool:
    """Set `data.train` and `data.eval`, where they are named. Whether it is trained on plain texts."""
    texts = bool(given.settings.get("stage") == "pt")
    mixture = given.settings.get("dataset_mixture")
    if isinstance(mixture, Mapping):  # of the alignment handbook
        given.used.add("dataset_mixture")
        given.settings |= {key: mixture[key] for key in ("datasets", "test_split_size") if mixture.get(key)}
    if given.peer == "LLaMA-Factory":
        _set_named_data(given, folder, "dataset", "data.train")
        _set_named_data(given, folder, "eval_dataset", "data.eval")
    else:
        train, held_out = (_several(entries) for entries in _halves(given, *_entries(given)))
        if train:
            texts = all(isinstance(one, Mapping) and one.get("type") in _OF_TEXT for one in train)
        for key, each in (("data.train", train), ("data.eval", held_out)):
            sources = [source for one in each if (source := _source(given, key, one, folder)) is not None]
            given.set(key, sources or None)
    if given.settings.get("max_samples") and given.value("max_samples"):
        given.note("max_samples", "at most so many there; `count` of a source is exactly so many, so set it by hand")
    return texts


def _entries(given: Conversion) -> tuple[Any, Any]:
    """What is said of training and of held-out data: an entry, or a list of them."""
    if given.peer != "Axolotl":
        train, held_out = given.value("train_dataset", "datasets"), given.value("eval_dataset")
        if train is None and (name := given.value("dataset_name")) is not None:
            found = {"path": name, "name": given.value("dataset_config")}
            train = {**found, "split": given.value("dataset_train_split")}
            if given.on("eval_strategy", "evaluation_strategy") and held_out is None:
                held_out = {**found, "split": given.value("dataset_test_split") or "test"}
        return train, held_out
    train, held_out, texts = given.on("datasets"), given.value("test_datasets"), given.on("pretraining_dataset")
    if train is not None and texts is not None:
        given.note("pretraining_dataset", f"{short(texts)}: left out, for `datasets` is there too")
        del given.settings["pretraining_dataset"]  # nor does it ask for a stream
    elif texts is not None:
        each = texts if isinstance(texts, list) else [texts]
        train = [{"type": "pretrain", **(one if isinstance(one, Mapping) else {"path": one})} for one in each]
    return train, held_out


def _halves(given: Conversion, train: Any, held_out: Any) -> tuple[Any, Any]:
    """Of the first and the last part of a file, `train[:90%]` and `train[90%:]`, the share that is held out."""
    if not isinstance(train, Mapping) or not isinstance(held_out, Mapping) or "data_files" not in train:
        return train, held_out
    splits = str(train.get("split")), str(held_out.get("split"))
    for (first, rest), sign in ((splits, -1), (splits[::-1], 1)):
        one, other = _FIRST.fullmatch(first), _REST.fullmatch(rest)
        same = {**train, "split": None} == {**held_out, "split": None}
        if same and one and other and one.groups() == other.groups() and (share := int(one[2]) / 100) > 0:
            given.set("data.eval_size", share if sign > 0 else round(1 - share, 2))
            return {**train, "split": one[1]}, None
    return train, held_out


def _several(entries: Any) -> list[Any]:
    """The entries of a list, or the one that there is; of several files, one for each."""
    found = []
    for entry in (entries if isinstance(entries, list) else [entries]) if entries else ():
        files = entry.get("data_files") if isinstance(entry, Mapping) else None
        found += [{**entry, "data_files": file} for file in files] if isinstance(files, list) else [entry]
    return found


def _source(given: Conversion, key: str, entry: Any, folder: Path) -> dict[str, Any] | None:
    """One data set of Axolotl's list, or the arguments of `load_dataset`; None where it does not say which."""
    if not isinstance(entry, Mapping):
        return {"path": str(entry)}
    values = {_SAME.get(str(name), str(name)): value for name, value in entry.items() if value not in OFF}
    if not values.keys() & {"path", "data_files"}:
        given.note(key, f"{short(entry)}: left out, for it does not say where the data is")
        return None
    found = _place(given, key, values, folder)
    if isinstance(values.get("columns"), list):  # those that are read; here the columns of the format are
        values.pop("columns")
    columns = _columns(given, key, values)
    if any(ours != theirs for ours, theirs in columns.items()):
        found["columns"] = columns
    if values.get("roles_to_train") == ["assistant"]:
        values.pop("roles_to_train")
    _format(given, key, values)
    for name, value in values.items():
        advice = NO_COUNTERPART.get(name) or _OF_SOURCES.get(name) or "not known here: see docs/data.md"
        given.note(f"{key} {name}", f"{public(name, value)}: {advice}")
    return found


def _place(given: Conversion, key: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Takes what says where the data is, and which of it, out of the values."""
    path, files = values.pop("path", None), values.pop("data_files", None)
    kind = values.pop("ds_type", None)
    if files is not None:
        if not isinstance(files, str):
            given.note(f"{key} data_files", f"{short(files)}: name each file as a source of its own")
        elif path is not None and _is_local(str(path), folder):
            path = Path(str(path)) / files
        elif path is not None and HUB_ID.fullmatch(str(path)) and "://" not in files:
            path = f"hf://datasets/{path}/{files}"
        else:
            if path is not None and "/" not in str(path) and path not in _READERS:
                why = f"of the Hub, {files} is at hf://datasets/OWNER/{path}/{files}: write that as the path"
                given.note(f"{key} path", why)
            path = files
        if _PLAIN.fullmatch(str(values.get("split"))):  # of a file there is only one
            values.pop("split", None)
    found: dict[str, Any] = {"path": str(path)}
    if kind is None and files is None and (Path(str(path)).suffix == "" or HUB_ID.fullmatch(str(path))):
        if (split := _split(str(path), values.pop("split", None), folder)) is not None:
            found["split"] = split
    elif values.get("split") == "train":  # all that a file has
        values.pop("split")
    if "name" in values and files is None:
        found["name"] = str(values.pop("name"))
    found |= {name: values.pop(name) for name in ("weight", "revision") if values.get(name) not in (None, 1)}
    values.pop("weight", None)
    return found


def _split(path: str, named: Any, folder: Path) -> str | None:
    """Where none is named, `train`; of a folder that has no such file, all files, of which there `train` is made."""
    if not _is_local(path, folder):
        return str(named or "train")
    places = [root / path for root in (folder, Path()) if (root / path).is_dir()]
    has_train = any(True for place in places for _ in place.rglob("*train*"))
    if named in (None, "train") and not has_train:
        return "train" if named and not places else None
    return str(named or "train")


def _is_local(path: str, folder: Path) -> bool:
    """Whether it is a folder: by its form, or because it is there."""
    is_name = len(path) < 200 and path not in _READERS
    return path.startswith((".", "/", "~")) or (is_name and any((root / path).is_dir() for root in (folder, Path())))


def _columns(given: Conversion, key: str, values: dict[str, Any]) -> dict[str, str]:
    """What Axolotl says of the names of columns."""
    kind, found = values.get("type"), {}
    if isinstance(kind, Mapping):  # a prompt of the user's own
        found = {ours: str(kind[theirs]) for theirs, ours in _OF_PROMPTS.items() if kind.get(theirs) not in OFF}
    if kind in _OF_TEXT and (column := values.pop("text_column", None) or values.pop("field", None)) is not None:
        found["text"] = str(column)
    if (column := values.pop("field_messages", None)) not in (None, "messages", "conversations"):
        found["messages"] = str(column)
    if kind is None and given.peer == "Axolotl":
        given.note(f"{key} type", "absent: rows of token ids there, which are not read here")
    return found


def _format(given: Conversion, key: str, values: dict[str, Any]) -> None:
    """What Axolotl says of the format of examples; here it is recognised by their keys."""
    kind = values.pop("type", None)
    roles = values.get("roles")
    if isinstance(roles, Mapping) and {name for names in roles.values() for name in names or ()} <= _ROLES:
        values.pop("roles")
    for name in ("message_field_role", "message_field_content"):
        if values.get(name) in _MESSAGE_KEYS:
            values.pop(name)
    mappings = values.get("message_property_mappings")
    if isinstance(mappings, Mapping) and set(mappings.values()) <= {*_MESSAGE_KEYS}:
        values.pop("message_property_mappings")
    if kind not in (None, "chat_template", "sharegpt", *_OF_TEXT):
        given.note(
            f"{key} type",
            f"{short(kind)} writes its own prompt there; here such an example becomes a conversation in the chat "
            "template",
        )


def _set_named_data(given: Conversion, folder: Path, key: str, ours: str) -> None:
    """LLaMA-Factory names data sets of data/dataset_info.json."""
    names = given.value(key)
    if not names:
        return
    known = dataset_info(given.settings, folder)
    given.used.add("dataset_dir")
    sources = []
    for name in names if isinstance(names, list) else str(names).split(","):
        entry = known.get(str(name).strip())
        if entry is None:
            given.note(
                key,
                f"{str(name).strip()!r} is an entry of dataset_info.json, which is not here: write its file's path",
            )
            continue
        if not (entry.get("hf_hub_url") or entry.get("file_name")):
            why = "its entry has neither hf_hub_url nor file_name: name its file or Hub id in data"
            given.note(key, f"{str(name).strip()!r}: {why}")
            continue
        if entry.get("ranking") or (entry.get("columns") or {}).get("kto_tag"):
            why = "its answers are chosen and rejected ones, of which LLaMA-Factory trains none by stage: sft; left out"
            given.note(key, f"{str(name).strip()!r}: {why}")
            continue
        sources.append({**_place_of(given, key, name, entry), **_columns_of(given, key, name, entry)})
    if sources:
        given.set(ours, sources)


def _place_of(given: Conversion, key: str, name: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Where the data of an entry of dataset_info.json is, and which of it."""
    path, split, revision = entry.get("hf_hub_url"), entry.get("split"), entry.get("revision")
    found = {"path": path, "name": entry.get("subset"), "split": split or "train", "revision": revision}
    if not path:
        found = {"path": str(Path(entry["info_folder"]) / str(entry["file_name"]))}
        if split not in (None, "train"):
            given.note(key, f"{str(name).strip()!r}: split: {short(split)}: {_OF_SOURCES['split']}")
    elif folder := entry.get("folder"):
        at = f"@{revision}" if revision else ""
        found |= {"path": f"hf://datasets/{path}{at}/{folder}", "revision": None}
    found["count"] = entry.get("num_samples")
    return {part: value for part, value in found.items() if value is not None}


def _columns_of(given: Conversion, key: str, name: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that LLaMA-Factory reads of it: those that the entry names, or its own; it reads no others."""
    is_text, is_alpaca = given.settings.get("stage") == "pt", entry.get("formatting") in (None, "alpaca")
    own = {"prompt": "instruction"} if is_text else OF_ALPACA if is_alpaca else {"messages": "conversations"}
    named = entry.get("columns", own) or {}
    if seen := sorted(_IMAGES & named.keys()):
        given.not_offered(key, f"{', '.join(seen)} of {str(name).strip()!r}: {OF_IMAGES}")
    tags = set((entry.get("tags") or {}).values()) - {*_MESSAGE_KEYS, *_ROLES, "function_call"}
    if tags:
        given.note(key, f"{str(name).strip()!r}: messages have {', '.join(sorted(tags))}: rename them")
    read = {"prompt": "text"} if is_text else _COLUMNS
    columns = {read[part]: column for part, column in named.items() if part in read and column is not None}
    return {"columns": columns} if columns else {}


def long_examples(given: Conversion, packed: bool, texts: bool) -> dict[str, Any]:
    """What becomes of examples over the maximum length, which end no run of another trainer: keys of the run file.

    There they are cut, split or dropped.
    """
    if given.value("max_length", "max_seq_length", "sequence_len", "cutoff_len") is None:
        given.note("max_length", "no limit there; here data.max_length, and what is longer is rejected")
        return {}
    found: dict[str, Any] = {"data.allow_rejected": ["too_long"]}
    if texts:
        given.note("data", "plain texts, trained whole; there they are joined and cut, here cut (data.overflow)")
        return {**found, "data.overflow": "split"}
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
