"""The folder of a run.

OUT/config.yaml      the resolved run file
OUT/rejections.jsonl examples that were not trained: source, code, message
OUT/environment.json command, versions, machine; the model and every data file with their hashes
OUT/data.json        counts of examples, tokens and steps; lengths of trees and targets
OUT/examples.jsonl   a few of the trained trees, token by token
OUT/metrics.jsonl    one line a step
OUT/eval.jsonl       one line an evaluation
OUT/samples.jsonl    one line a sampled answer to a held-out prompt
OUT/checkpoints/     with checkpoint.every: what `--resume` needs
OUT/model/           a complete Hugging Face folder (with an adapter: merged; the adapter in model/adapter)
OUT/summary.json     the results
OUT/report.html      all of it on one page, written last (report/page.py)
"""

import hashlib
import os
import platform
import shlex
import shutil
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
from preceptor.data.dataset import Dataset
from preceptor.data.forest import Segment, Tree
from preceptor.data.loader import Loader
from preceptor.data.sources import OpenSource
from preceptor.errors import CheckpointError
from preceptor.files import (
    read_json,
    read_json_lines,
    sha256_of,
    write_atomically,
    write_json,
    write_json_lines,
    writing,
)
from preceptor.hub import resolve_model_path
from preceptor.train.prepare import Prepared

PACKAGES = "preceptor torch transformers tokenizers peft safetensors datasets numpy jinja2".split()  # noqa: SIM905
EXAMPLE_TOKENS = 800  # of one tree; a longer one is recorded with gaps, each with its length
EXAMPLE_SEGMENTS = 40
NUM_BINS = 30


def check_out(out: str, replace: bool) -> Path:
    """The run's folder, which must not exist, or be a run's folder that may be replaced. Raises CheckpointError."""
    folder = Path(out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if not replace:
        raise CheckpointError(f"{out}: exists already; choose another `out`, or replace that run with --replace")
    if not (folder.is_dir() and (folder / "config.yaml").is_file()):
        raise CheckpointError(f"{out}: is not the folder of a run, so --replace leaves it alone; choose another `out`")
    return folder


def start_run(
    folder: Path,
    prepared: Prepared,
    loader: Loader,
    num_steps: int,
    device: torch.device,
    optimisations: Collection[str],
    replace: bool,
) -> None:
    """Make the folder and write what the run is made of. Raises CheckpointError if it cannot be written.

    optimisations: names of the engine's that are on.
    """
    check_out(str(folder), replace)
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
            (folder / name).touch()
    write_atomically(folder / "config.yaml", config.dump(prepared.run))
    write_json_lines(folder / "rejections.jsonl", map(asdict, prepared.rejections))
    engine = {"mode": prepared.run.engine, "optimisations": sorted(optimisations)}
    environment = {**session(device), **origins(prepared), "engine": engine, "resumed": []}
    write_json(folder / "environment.json", environment)
    write_json(folder / "data.json", amounts(prepared, loader, num_steps))
    write_json_lines(folder / "examples.jsonl", examples(prepared.train, prepared.chat.tokenizer))


def resume_run(folder: Path, step: int, device: torch.device) -> None:
    """Take the run's files back to `step`, from where it goes on, and record that it was resumed, and where."""
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        if (folder / name).is_file():
            lines = read_json_lines(folder / name)
            write_json_lines(folder / name, (line for line in lines if line["step"] <= step))
    environment = read_json(folder / "environment.json")
    if environment:
        environment["resumed"].append({"step": step, **session(device)})
        write_json(folder / "environment.json", environment)


# Where and with what


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
    run, template = prepared.run, prepared.chat.template
    return {
        "model": _model(run.model),
        "data": [{"use": use, **file} for use, sources in prepared.sources.items() for file in _files(sources)],
        "template": template and {"name": template.name, "sha256": hashlib.sha256(template.text.encode()).hexdigest()},
        "trees_sha256": prepared.train.sha256,
    }


def _model(model: config.Model) -> dict[str, Any]:
    path = resolve_model_path(model.path)
    folder = Path(path)
    found: dict[str, Any] = {"path": model.path, "folder": path if folder.is_dir() else None}
    found["revision"] = model.revision
    if folder.is_dir():
        found["config_sha256"] = sha256_of(folder / "config.json")
        weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        found["weights"] = [{"name": file.name, "num_bytes": file.stat().st_size} for file in weights]
    return found


def _files(sources: Sequence[OpenSource]) -> Iterator[dict[str, Any]]:
    """The files of sources; a data set of the Hub has none here, and is known by its id and revision."""
    for source in sources:
        for table in source.tables:
            files = table.files()
            for file in files:
                name = table.name if len(files) == 1 else f"{table.name}/{file.name}"
                yield {"name": name, "num_bytes": file.stat().st_size, "sha256": sha256_of(file)}
            if not files:
                yield {"name": table.name, "revision": source.source.revision, "num_bytes": None, "sha256": None}


# How much


def amounts(prepared: Prepared, loader: Loader, num_steps: int) -> dict[str, Any]:
    """Counts of examples, tokens and steps, and histograms of lengths."""
    targets = [len(s.ids) for tree in prepared.train for s in tree.segments if s.kind == "target"]
    return {
        "num_examples": prepared.num_examples,
        "num_rejected": len(prepared.rejections),
        "examples_per_epoch": prepared.examples_per_epoch,
        "num_held_out": len(prepared.held_out),
        "tokens": asdict(prepared.tokens),
        "shortened": asdict(prepared.shortened),
        "thinking": prepared.arguments.to_json(),
        "left_out": prepared.left_out.to_json(),
        "formats": {name: dict(counts) for name, counts in prepared.formats.items()},
        "new_tokens": list(prepared.chat.added),
        "fill": loader.fill,
        "steps_per_epoch": loader.steps_per_epoch,
        "num_steps": num_steps,
        "lengths": {
            "trees": histogram(prepared.train.lengths),
            "targets": histogram(np.array(targets)),
        },
    }


def histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Counts between `edges` (the last edge included), with quantiles; lengths are whole numbers, so edges are too."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high + 1 - low) // NUM_BINS))
    edges = np.arange(low, high + 1 + width, width)
    counts, _ = np.histogram(lengths, edges)
    quantiles = {name: int(np.quantile(lengths, share)) for name, share in (("median", 0.5), ("p95", 0.95))}
    return {"edges": edges.tolist(), "counts": counts.tolist(), "min": low, "max": high, **quantiles}


# Examples


def examples(dataset: Dataset, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The shortest tree, the median, the longest, the first, and the first that branches, each once."""
    order = np.argsort(dataset.lengths, stable=True).tolist()
    chosen: dict[int, list[str]] = {0: ["the first"]}
    for name, place in (("of median length", len(order) // 2), ("the shortest", 0), ("the longest", -1)):
        chosen.setdefault(order[place], []).append(name)
    branching = next((index for index, tree in enumerate(dataset) if branches(tree)), None)
    if branching is not None:
        chosen.setdefault(branching, []).append("the first that branches")
    specials = special_ids(tokenizer)
    for index, why in chosen.items():
        (tree,) = dataset.trees([index])
        yield example(tree, tokenizer, specials) | {"why": why, "number": index + 1}


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
