"""What a run is made of, written into its folder when it starts, so that it can be looked at and repeated.

OUT/environment.json   command, versions, machine; the model and every data file with their hashes
OUT/data.json          how many rows, tokens and steps; how long the trees and targets are
OUT/examples.jsonl     a few of the trained trees, token by token
"""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preceptor import config
from preceptor.chat.token_text import pieces_of, special_ids
from preceptor.data.forest import Segment, Tree
from preceptor.data.loader import Loader
from preceptor.data.sources import resolve
from preceptor.model.load import resolve_model_path
from preceptor.train.metrics import append_line
from preceptor.train.prepare import Prepared

PACKAGES = "preceptor torch transformers tokenizers peft safetensors datasets numpy jinja2".split()  # noqa: SIM905
EXAMPLE_TOKENS = 800  # of one tree; a longer one is recorded with gaps, each with its length
EXAMPLE_SEGMENTS = 40
NUM_BINS = 30


def record_start(folder: Path, prepared: Prepared, loader: Loader, num_steps: int, device: torch.device) -> None:
    """Write the three files of a run that begins."""
    environment = {**session(device), **origins(prepared), "resumed": []}
    _write(folder / "environment.json", environment)
    _write(folder / "data.json", amounts(prepared, loader, num_steps))
    (folder / "examples.jsonl").touch()
    for line in examples(prepared.train, prepared.voice.tokenizer):
        append_line(folder / "examples.jsonl", line)


def record_resume(folder: Path, device: torch.device, step: int) -> None:
    """Add to the record of a run that it goes on from `step`, and where."""
    file = folder / "environment.json"
    if file.is_file():
        environment = json.loads(file.read_text(encoding="utf-8"))
        environment["resumed"].append({"step": step, **session(device)})
        _write(file, environment)


def _write(file: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


# Where and with what -------------------------------------------------------------------------------------------------


def session(device: torch.device) -> dict[str, Any]:
    """The process that trains: what was typed and where, the versions, the machine."""
    cuda = device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "directory": str(Path.cwd()),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "torch": torch.__version__,  # with its build, which a package's own version may leave out
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def origins(prepared: Prepared) -> dict[str, Any]:
    """What the run was made from, with hashes (SHA-256): model, data files, chat template, and all trained trees."""
    run, template = prepared.run, prepared.voice.template
    return {
        "model": _model(run.model),
        "data": [
            {"use": use, **file}
            for use, sources in (("train", run.data.train), ("held out", run.data.eval))
            for source in sources
            for file in _files(source)
        ],
        "template": template and {"name": template.name, "sha256": hashlib.sha256(template.text.encode()).hexdigest()},
        "trees_sha256": trees_hash(prepared.train),
    }


def _model(model: config.Model) -> dict[str, Any]:
    path = resolve_model_path(model.path)
    folder = Path(path)
    found: dict[str, Any] = {"path": model.path, "folder": path if folder.is_dir() else None}
    found["revision"] = model.revision
    if folder.is_dir():
        found["config_sha256"] = _file_hash(folder / "config.json")
        weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        found["weights"] = [{"name": file.name, "num_bytes": file.stat().st_size} for file in weights]
    return found


def _files(source: config.Source) -> Iterator[dict[str, Any]]:
    """The files of a source; a data set of the Hub has none here, and is known by its id and revision."""
    for table in resolve(source):
        place = getattr(table, "file", None) or getattr(table, "place", None)
        files = [place] if isinstance(place, Path) else []
        if files and files[0].is_dir():
            files = sorted(file for file in files[0].rglob("*") if file.is_file())
        for file in files:
            name = table.name if len(files) == 1 else f"{table.name}/{file.name}"
            yield {"name": name, "num_bytes": file.stat().st_size, "sha256": _file_hash(file)}
        if not files:
            yield {"name": table.name, "revision": source.revision, "num_bytes": None, "sha256": None}


def _file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def trees_hash(trees: Sequence[Tree]) -> str:
    """Changes with any token that is computed, and with which tokens are trained."""
    digest = hashlib.sha256()
    for tree in trees:
        for segment in tree.segments:
            digest.update(repr((segment.kind, segment.parent, segment.weight, len(segment.ids))).encode())
            digest.update(np.array(segment.ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


# How much ------------------------------------------------------------------------------------------------------------


def amounts(prepared: Prepared, loader: Loader, num_steps: int) -> dict[str, Any]:
    """Counts of rows, tokens and steps, and histograms of lengths."""
    targets = [len(s.ids) for tree in prepared.train for s in tree.segments if s.kind == "target"]
    return {
        "num_examples": prepared.num_examples,
        "num_rejected": len(prepared.rejections),
        "examples_per_epoch": prepared.examples_per_epoch,
        "num_held_out": len(prepared.held_out),
        "tokens": asdict(prepared.tokens),
        "shortened": asdict(prepared.shortened),
        "formats": {name: dict(counts) for name, counts in prepared.formats.items()},
        "new_tokens": list(prepared.voice.tokens.added),
        "fill": loader.fill,
        "steps_per_epoch": loader.steps_per_epoch,
        "num_steps": num_steps,
        "lengths": {
            "trees": histogram([tree.num_tokens for tree in prepared.train]),
            "targets": histogram(targets),
        },
    }


def histogram(lengths_tokens: Sequence[int]) -> dict[str, Any]:
    """Counts between `edges` (the last edge included), with quantiles; lengths are whole numbers, so edges are too."""
    lengths = np.array(lengths_tokens, dtype=np.int64)
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high + 1 - low) // NUM_BINS))
    edges = np.arange(low, high + 1 + width, width)
    counts, _ = np.histogram(lengths, edges)
    quantiles = {name: int(np.quantile(lengths, share)) for name, share in (("median", 0.5), ("p95", 0.95))}
    return {"edges": edges.tolist(), "counts": counts.tolist(), "min": low, "max": high, **quantiles}


# Examples ------------------------------------------------------------------------------------------------------------


def examples(trees: Sequence[Tree], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The shortest tree, the median, the longest, the first, and the first that branches, each once."""
    order = sorted(range(len(trees)), key=lambda index: trees[index].num_tokens)
    chosen: dict[int, list[str]] = {0: ["the first"]}
    for name, place in (("of median length", len(order) // 2), ("the shortest", 0), ("the longest", -1)):
        chosen.setdefault(order[place], []).append(name)
    branching = next((index for index in range(len(trees)) if branches(trees[index])), None)
    if branching is not None:
        chosen.setdefault(branching, []).append("the first that branches")
    specials = special_ids(tokenizer)
    for index, why in chosen.items():
        yield example(trees[index], tokenizer, specials) | {"why": why, "number": index + 1}


def branches(tree: Tree) -> bool:
    parents = [segment.parent for segment in tree.segments]
    return len(parents) != len(set(parents))


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
