"""What a run writes about itself when it starts: command, machine and versions, what it is made from, how much it is.

And its record, environment.json: of a run that begins, or of one that goes on and must be the same. run_folder.py lists
the files.
"""

import hashlib
import math
import os
import platform
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from preceptor import config
from preceptor.chat.tokenise import pieces_of, special_ids
from preceptor.config.code import load_code
from preceptor.config.held import LiveModel, LiveSource
from preceptor.data.dataset import Dataset
from preceptor.data.forest import Segment, Tree
from preceptor.data.loader import Loader, StreamLoader
from preceptor.errors import CheckpointError, ModelError
from preceptor.evaluate.tasks import Task
from preceptor.files import read_json, read_json_lines, sha256_of, write_json, write_json_lines
from preceptor.hub import find_file, resolve_model_path
from preceptor.train.differences import (
    base_differences,
    changed_keys,
    content_differences,
    evaluation_differences,
    rounding_differences,
)
from preceptor.train.earlier_run import record_of_start
from preceptor.train.finish import Say
from preceptor.train.prepare import Prepared
from preceptor.train.run_folder import RunFolder
from preceptor.world import World, command_words, package_version

PACKAGES = "preceptor torch transformers tokenizers peft bitsandbytes safetensors datasets numpy jinja2".split()  # noqa: SIM905
EXAMPLE_TOKENS = 800  # of one tree; a longer one is recorded with gaps, each with its length
EXAMPLE_SEGMENTS = 40
NUM_BINS = 30
MOST_PROMPTS = 3  # system prompts that are recorded


def write_start(folder: Path, prepared: Prepared, amounts: Mapping[str, Any]) -> None:
    """Write rejections, counts and examples of a run that begins. Raises CheckpointError."""
    write_json_lines(folder / "rejections.jsonl", map(asdict, prepared.rejections_beside))
    write_json(folder / "data.json", amounts)
    write_json_lines(folder / "examples.jsonl", examples(prepared.train, prepared.chat.tokenizer))


def renew_held_out(folder: Path, prepared: Prepared) -> None:
    """Of a run that goes on, whose held-out examples may be others: their counts, and what is rejected of them.

    Raises CheckpointError.
    """
    file, rejections = folder / "data.json", folder / "rejections.jsonl"
    known, now = read_json(file), _held_out_amounts(prepared)
    before = known.get("held_out")
    if before is None:  # of an older version
        return
    for key in ("num_examples", "num_rejected"):
        known[key] += now["held_out"][key] - before[key]
    of_windows = [line for line in read_json_lines(rejections, lambda _: None) if "window" in line]
    write_json_lines(rejections, [*map(asdict, prepared.rejections_beside), *of_windows])
    write_json(file, {**known, **now})


# Where and with what


def session(device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """The processes that train: what was typed and where, the versions, the machine."""
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(command_words()),
        "directory": str(Path.cwd()),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
            "torch": torch.__version__,  # with its build, which a package's own version may leave out
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
    }


def origins(prepared: Prepared, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the run was made from, with hashes (SHA-256): model, data files, chat template, trained and held-out trees.

    recorded: an earlier record of the same run; its weights whose size and time are the same are not read again.
    """
    run, template = prepared.run, prepared.chat.template
    hashes = trees_hashes(prepared)
    return {
        "model": _model(run.model, (recorded or {}).get("model") or {}),
        "from_run": record_of_start(run),
        "data": [{"use": use, **file} for use in prepared.sources for file in _files(prepared, use)],
        "template": template and {"name": template.name, "sha256": hashlib.sha256(template.text.encode()).hexdigest()},
        "loss_sha256": run.loss.code and load_code(run.loss.code, "loss.code").sha256,
        "trees_sha256": hashes["examples"],
        "evaluation": {"held_out_sha256": hashes["held-out examples"], "tasks_sha256": hashes["tasks"]},
    }


def trees_hashes(prepared: Prepared) -> dict[str, str]:
    """What the processes of a run must have in common."""
    return {
        "examples": prepared.train.sha256,
        "held-out examples": held_out_sha256(prepared),
        "tasks": tasks_sha256(prepared.tasks),
    }


def held_out_sha256(prepared: Prepared) -> str:
    return Dataset.of([tree for _, tree in prepared.held_out]).sha256


def _model(model: config.Model, recorded: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(model, LiveModel):
        assert model.held.record is not None, "recorded when it was taken"
        return {"path": model.path, "folder": None, "revision": None, **model.held.record}
    place, files = resolve_model_path(model.path), _model_files(model)
    found: dict[str, Any] = {"path": model.path, "folder": None}
    if Path(place).is_dir():
        found["folder"] = str(Path(place).absolute())
    found["revision"] = model.revision
    if files:
        known = {
            (w["name"], w["num_bytes"], w.get("modified_ns")): w.get("sha256") for w in recorded.get("weights", ())
        }
        found["config_sha256"] = sha256_of(files[0])
        found["weights"] = [_weights(file, known) for file in files[1:]] if model.init == "pretrained" else []
    return found


def _model_files(model: config.Model) -> list[Path]:
    """config.json and the weights; none where the model has no files here."""
    config_file = find_file(resolve_model_path(model.path), "config.json", model.revision)
    if config_file is None:
        return []
    return [config_file, *sorted([*config_file.parent.glob("*.safetensors"), *config_file.parent.glob("*.bin")])]


def base_identity(model: config.Model) -> list[Any] | None:
    """What tells a base model from others, without its weights being read; None where it has no files here."""
    files = [] if isinstance(model, LiveModel) else _model_files(model)
    if not files:
        return None
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files[1:]]
    return [str(files[0].parent.resolve()), sha256_of(files[0]), about]


def _weights(file: Path, known: Mapping[tuple[str, int, int], str | None]) -> dict[str, Any]:
    about = file.stat()
    sha256 = known.get((file.name, about.st_size, about.st_mtime_ns)) or sha256_of(file)
    return {"name": file.name, "num_bytes": about.st_size, "modified_ns": about.st_mtime_ns, "sha256": sha256}


def tasks_sha256(tasks: Sequence[Task]) -> str:
    """Of what is asked, wherever it was read."""
    asked: list[object] = [(task.kind, [{**asdict(item), "source": ""} for item in task.items]) for task in tasks]
    asked += [task.max_new_tokens for task in tasks if task.max_new_tokens is not None]
    asked += [task.own.sha256 for task in tasks if task.own is not None]
    return hashlib.sha256(repr(asked).encode()).hexdigest()


def _files(prepared: Prepared, use: str) -> Iterator[dict[str, Any]]:
    """The files of a use; a data set of the Hub or a pipe has none here: the one is known by id and revision.

    Those of a stream are not hashed, and so not read, as a whole: its windows have hashes.
    """
    hashed = prepared.cache.sha256_of if prepared.cache else sha256_of
    is_stream = use == "train" and prepared.stream is not None
    for source in prepared.sources[use]:
        if source.own is not None:
            yield {"name": source.source.code, "num_bytes": None, "sha256": source.own.sha256}
        for table in source.tables:
            files = table.files()
            for file in files:
                name = table.name if len(files) == 1 else f"{table.name}/{file.name}"
                yield {"name": name, "num_bytes": file.stat().st_size, "sha256": None if is_stream else hashed(file)}
            if not files:
                known = table.identity(lambda _: "") if isinstance(source.source, LiveSource) else None  # of no file
                sha256 = None if known is None else known[-1]
                yield {"name": table.name, "revision": source.source.revision, "num_bytes": None, "sha256": sha256}


# How much


def amounts(prepared: Prepared, loader: Loader | StreamLoader, num_steps: int) -> dict[str, Any]:
    """Counts of examples, tokens and steps, and histograms of lengths."""
    return {
        "num_examples": prepared.num_examples,
        "num_rejected": len(prepared.rejections),
        "examples_per_epoch": None if prepared.stream else prepared.examples_per_epoch,
        **_held_out_amounts(prepared),
        "tokens": asdict(prepared.tokens),
        "shortened": asdict(prepared.shortened),
        "formats": {name: dict(counts) for name, counts in prepared.formats.items()},
        "thinking": prepared.counts.thinking(),
        "left_out": prepared.counts.left_out(),
        "system_prompts": {
            "num_conversations": prepared.counts.num_conversations,
            "most_common": prepared.counts.system_prompts.most_common(MOST_PROMPTS),
        },
        "new_tokens": list(prepared.chat.added),
        "fill": loader.fill,
        "steps_per_epoch": loader.steps_per_epoch or None,
        "num_steps": num_steps,
        "lengths": {"trees": histogram(prepared.train.lengths), "targets": histogram(prepared.train.target_lengths)},
    }


def _held_out_amounts(prepared: Prepared) -> dict[str, Any]:
    return {
        "num_held_out": len(prepared.held_out),
        "held_out": dict(zip(("num_examples", "num_rejected"), prepared.num_measured, strict=True)),
    }


def histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Counts between `edges` (the last edge included), with quantiles; lengths are whole numbers, so edges are too."""
    times = np.bincount(lengths)  # linear in the number of lengths, which is large
    occurring = np.flatnonzero(times)
    low, high = int(occurring[0]), int(occurring[-1])
    width = max(1, -(-(high + 1 - low) // NUM_BINS))
    edges = np.arange(low, high + 1 + width, width)
    counts, _ = np.histogram(occurring, edges, weights=times[occurring])
    quantiles = {name: _quantile(times, share) for name, share in (("median", 0.5), ("p95", 0.95))}
    return {"edges": edges.tolist(), "counts": counts.astype(int).tolist(), "min": low, "max": high, **quantiles}


def _quantile(times: np.ndarray, share: float) -> int:
    """Of numbers that each occur so many times; between two of them in proportion, rounded down."""
    ends = np.cumsum(times)
    place = share * (int(ends[-1]) - 1)
    below, above = (int(np.searchsorted(ends, at, side="right")) for at in (math.floor(place), math.ceil(place)))
    return int(below + (above - below) * (place % 1))


# Examples


def examples(dataset: Dataset, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The shortest tree, the median, the longest, the first, and the first that branches, each once."""
    num = len(dataset.lengths)
    chosen: dict[int, list[str]] = {0: ["the first"]}
    for name, place in (("of median length", num // 2), ("the shortest", 0), ("the longest", num - 1)):
        chosen.setdefault(_in_order(dataset.lengths, place), []).append(name)
    branching = dataset.first_branching
    if branching is not None:
        chosen.setdefault(branching, []).append("the first that branches")
    specials = special_ids(tokenizer)
    for index, why in chosen.items():
        (tree,) = dataset.trees([index])
        yield example(tree, tokenizer, specials) | {"why": why, "number": index + 1}


def _in_order(lengths: np.ndarray, place: int) -> int:
    """Which of them is at a place when they are sorted, those of one length as they come; without sorting them all."""
    length = np.partition(lengths, place)[place]
    same = np.flatnonzero(lengths == length)
    return int(same[place - int((lengths < length).sum())])


def example(tree: Tree, tokenizer: Any, specials: Collection[int]) -> dict[str, Any]:
    """A tree with the text of each token; `gap`: after how many pieces how many tokens are left out, or null."""
    segments = tree.segments[:EXAMPLE_SEGMENTS]
    whole = sum(len(segment.ids) for segment in segments) <= EXAMPLE_TOKENS
    room = EXAMPLE_TOKENS if whole else max(2, EXAMPLE_TOKENS // len(segments))
    return {
        "source": tree.source,
        "num_tokens": tree.num_tokens,
        "num_trained": tree.num_trained,
        "num_segments_left_out": len(tree.segments) - len(segments),
        "segments": [_segment(index, segment, room, tokenizer, specials) for index, segment in enumerate(segments)],
    }


def _segment(index: int, segment: Segment, room: int, tokenizer: Any, specials: Collection[int]) -> dict[str, Any]:
    ids = segment.ids
    left_out = len(ids) - room
    parts = (ids,) if left_out <= 0 else (ids[: room // 2], ids[len(ids) - (room - room // 2) :])
    pieces = [
        [{"text": piece.text, "ids": list(piece.ids), "special": piece.special} for piece in part]
        for part in (list(pieces_of(part, tokenizer, specials)) for part in parts)
    ]
    return {
        "id": index,
        "parent": segment.parent,
        "kind": segment.kind,
        "weight": segment.weight,
        "num_tokens": len(ids),
        "pieces": [piece for part in pieces for piece in part],
        "gap": {"after": len(pieces[0]), "num_tokens": left_out} if left_out > 0 else None,
    }


def record_of_first(
    folder: RunFolder, prepared: Prepared, device: torch.device, world: World, say: Say
) -> dict[str, Any]:
    """What is recorded of a run that begins; of one that goes on, what was recorded when it began.

    The first process finds it out for all: it reads the weights of the base model. Raises CheckpointError where the run
    that goes on was made from something else, and says what does not stop it.
    """
    if not world.is_first:
        return dict(world.published("record"))
    now = {**session(device, world.size), **origins(prepared, folder.record)}
    record = _compared(folder, prepared, now, say)
    world.publish("record", record)
    return record


def _compared(folder: RunFolder, prepared: Prepared, now: dict[str, Any], say: Say) -> dict[str, Any]:
    run = prepared.run
    if reasons := base_differences(str(run.model.from_run), now["from_run"], now["model"]):
        raise ModelError("\n".join(reasons))
    if not folder.goes_on:
        return {"run": uuid4().hex, **now, "date": folder.date.isoformat(timespec="seconds"), "resumed": []}
    changed = changed_keys(folder.run_file, run, f"{run.out}/config.yaml")
    reasons = [*changed.weights, *content_differences(folder.record, now)]
    if reasons:
        raise CheckpointError(
            f"{run.out}: holds a run that was made from something else; go on with the same, or replace that run with "
            "--replace:\n" + "\n".join(f"  {line}" for line in [*reasons, *changed.by_content])
        )
    rounding = [*changed.rounding, *rounding_differences(folder.record, now)]
    if rounding:
        say(f"no longer equal to the bit to an uninterrupted run, but up to rounding: {'; '.join(rounding)}")
    for measured in evaluation_differences(folder.record, now):
        say(f"{measured} are not those of the run so far: figures before and after cannot be compared")
    has_hash = {
        "loss.code": run.loss.code is None or now["loss_sha256"] is not None,
        "eval.code": all(task.own is None or task.own.sha256 is not None for task in prepared.tasks),
    }
    for key in (key for key, has in has_hash.items() if not has):
        say(f"{key}: nothing tells whether it is the function of the run so far: no hash of a value that it uses")
    return folder.record
