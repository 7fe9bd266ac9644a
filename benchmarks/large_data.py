"""Data larger than memory: how long a run takes to its first step with a warm cache, its memory, and its disk.

    python benchmarks/large_data.py [--examples 100000 1000000 10000000] [--folder FOLDER]

The cache is written here and not rendered, which for ten million examples takes hours: portions of 10,000 two-turn
conversations whose lengths are drawn as in packing.py (log-normal, median 200 tokens, at most 1,024), 1,000 different
ones in each; the table names them all. The data file is a stand-in, as a warm start does not read it. Then a run of the
scholar (sequences of 1,024 tokens) is started in a process of its own, twice up to the first batch and twice up to the
end of the first step (with all proofs and records of a run); the faster counts.
Files are in the page cache as far as there is room. Seconds are since the process started, with all imports; memory is
the largest resident set so far. `plan` is how long the first sequences take when lengths are there. Writes
benchmarks/results/large_data.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from machine import describe
from preceptor import config
from preceptor.chat.format import load_chat_format
from preceptor.data.cache import Cache, key_of
from preceptor.data.forest import Segment, Tree
from preceptor.data.reading import SourceReader
from preceptor.data.records import digest, encode_tree
from preceptor.data.sources import OpenSource
from preceptor.data.truncation import Fitter, Shortened

RESULT = Path(__file__).parent / "results" / "large_data.json"
PER_PORTION, DIFFERENT, MAX_LENGTH = 10_000, 1_000, 1_024


def run_of(folder: Path) -> config.Run:
    tree = {
        "model": {"path": "scholar"},
        "data": {"train": [{"path": str(folder / "data.jsonl")}], "chat_template": "chatml", "max_length": MAX_LENGTH},
        "train": {"duration": "1 steps", "batch_size": 1},
        "eval": {"every": None},
        "out": str(folder / "run"),
    }
    tree["data"]["cache"] = str(folder / "cache")  # type: ignore[index]
    return config.build(tree, "benchmark")


def drawn_trees(rng: np.random.Generator) -> list[Tree]:
    trees = []
    for length in rng.lognormal(np.log(200), 0.9, DIFFERENT).astype(int).clip(16, MAX_LENGTH).tolist():
        ids = rng.integers(10, 4000, length).tolist()
        cuts = [0, length // 4, length // 2, 3 * length // 4, length]
        segments = [
            Segment(
                "target" if k % 2 else "context",
                tuple(ids[cuts[k] : cuts[k + 1]]),
                k - 1 if k else None,
                message=k if k % 2 else None,
            )
            for k in range(4)
        ]
        trees.append(Tree("", tuple(segments)))
    return trees


def write_cache(folder: Path, num: int) -> int:
    """Write the portions and the table of `num` examples; the bytes on the disk."""
    (folder / "data.jsonl").write_text(json.dumps({"text": "a stand-in"}) + "\n" + " " * (2 << 20) + "\n")
    run, cache = run_of(folder), Cache(folder / "cache", print)
    source = OpenSource(run.data.train[0])
    chat = load_chat_format(run.model, run.data, [source])
    fitter = Fitter(chat.renderer(run.data), MAX_LENGTH, "reject", chat.num_positions)
    key = SourceReader(fitter, cache)._key(cache, source, source.tables[0])
    rng, times = np.random.default_rng(0), PER_PORTION // DIFFERENT
    parts: dict[str, list[np.ndarray]] = {}
    portions, portion_bytes = [], []
    for number in range(num // PER_PORTION):
        trees = drawn_trees(rng)
        records = [encode_tree(tree) for tree in trees] * times
        sizes = np.array([len(record) for record in records])
        content = np.frombuffer(b"".join(records), np.uint8)
        portions.append(key_of("benchmark", num, number))
        file = cache.write(cache.portion_path(portions[-1]), {"rejections": []}, {"records": content, "sizes": sizes})
        assert file is not None
        portion_bytes.append(file.num_bytes)
        rows = np.arange(PER_PORTION) + number * PER_PORTION + 1
        pointers = np.zeros((PER_PORTION, 6), np.int64)
        pointers[:, :4] = np.stack([np.full(PER_PORTION, number), np.cumsum(sizes) - sizes, sizes, rows], axis=1)
        digests = np.frombuffer(b"".join(map(digest, records[:DIFFERENT])), np.uint8).reshape(-1, 16)
        targets = np.array([[len(tree.segments[1].ids), len(tree.segments[3].ids)] for tree in trees], np.int32)
        lengths = np.array([tree.num_tokens for tree in trees], np.int32)
        of_portion = {
            "lengths": np.tile(lengths, times),
            "trained": np.tile(targets.sum(axis=1, dtype=np.int32), times),
            "samples": np.tile(lengths.astype(np.int64), times),
            "num_targets": np.full(PER_PORTION, 2, np.int32),
            "targets": np.tile(targets.ravel(), times),
            "branches": np.zeros(PER_PORTION, np.uint8),
            "pointers": pointers,
            "digests": np.tile(digests, (times, 1)),
        }
        for name, array in of_portion.items():
            parts.setdefault(name, []).append(array)
    arrays = {name: np.concatenate(found) for name, found in parts.items()}
    arrays |= {"token_ids": np.arange(10, 4000), "records": np.empty(0, np.uint8)}
    counts = {"arguments": {}, "turns": [], "left_out": [], "num_conversations": num}
    about = {
        "names": [source.tables[0].name],
        "num_trees": num,
        "place": ":",
        "portions": portions,
        "portion_bytes": portion_bytes,
        "formats": {"messages": num},
        "rejections": [],
        "counts": {**counts, "system_prompts": {"": num}},
        "shortened": asdict(Shortened()),
    }
    assert key is not None and cache.write(cache.table_path(key), about, arrays) is not None
    return sum(path.stat().st_size for path in (folder / "cache").rglob("*.flat"))


def start(folder: Path, what: str) -> dict[str, Any]:
    """Seconds and memory of a start in a process of its own, up to the first `batch` or `step`."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, __file__, "--start", str(folder)]
    began = time.time()
    shown = subprocess.run([*command, str(began), what], check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return found


def in_the_process(folder: Path, began: float, what: str) -> None:
    from preceptor.console import standard_console
    from preceptor.train import loop
    from preceptor.train.prepare import prepare
    from preceptor.train.run import Training
    from preceptor.train.run_folder import claim
    from preceptor.train.signals import StopRequest

    found: dict[str, Any] = {}

    def note(what: str) -> None:
        # Not ru_maxrss, which begins with that of the process that started this one.
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        found[what] = {"seconds": round(time.time() - began, 2), "peak_megabytes": round(int(line.split()[1]) / 1024)}

    note("imported")
    prepared = prepare(run_of(folder))
    note("prepared")
    if what == "batch":
        planned = time.perf_counter()
        prepared.loader().batch(0)
        note("first_batch")
        print(json.dumps(found | {"plan_seconds": round(time.perf_counter() - planned, 2)}))
        return
    take_step = loop.__dict__["take_step"]

    def noted(*arguments: Any) -> Any:
        result = take_step(*arguments)
        note("first_step")
        return result

    loop.__dict__["take_step"] = noted
    with claim(prepared.run) as run_folder:
        for _ in Training(run_folder, prepared, standard_console(), StopRequest()).steps():
            pass
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--start", nargs=3, metavar=("FOLDER", "TIME", "WHAT"), help="one start, in this process")
    options = parser.parse_args()
    if options.start:
        in_the_process(Path(options.start[0]), float(options.start[1]), options.start[2])
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for num in options.examples:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            num_bytes = write_cache(Path(folder), num)
            best: dict[str, Any] = {}
            for what in ("batch", "step"):
                starts = [start(Path(folder), what) for _ in range(2)]
                best |= min(starts, key=lambda found: float(found[f"first_{what}"]["seconds"]))
            rows.append({"examples": num, "gigabytes_on_disk": round(num_bytes / 1e9, 3), **best})
        print(rows[-1], flush=True)
    result = {"command": "python benchmarks/large_data.py", **describe(), "starts": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
