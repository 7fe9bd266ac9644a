"""Rendering with two processes, before and after trees were kept on disk; and a stream: its rate and its memory.

    python benchmarks/streaming.py --before CHECKOUT [--repetitions 3]
    python benchmarks/streaming.py --passing-over              that part alone; the others stay in the result

*rendering*: `prepare` of 3,000 conversations (the scholar, chatml) with `num_processes=2`, in a program of its own:
in CHECKOUT, a work tree of the commit before the cache (3c32ada^), and here without a cache, with an empty one, and
with one that is full; they take turns, each figure is the fastest. *streams*: a run's batches of all windows of so many
short conversations, with nothing trained. *passing over*: how fast a run that goes on reads ten million examples that
it has trained, in one process, of a file in the cache of the disk. Memory is the peak resident set of the process that
would train, less what it had when torch and transformers were imported, and of the one that reads.
Writes benchmarks/results/streaming.json.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rendering_work import SIZES, write

from machine import describe

RESULT = Path(__file__).parent / "results" / "streaming.json"
ROOT = Path(__file__).parents[1]
WINDOW = 2_000


def run_of(file: str, folder: str, **data: Any) -> Any:
    from preceptor import config

    own = {"train": [{"path": file}], "chat_template": "chatml", "max_length": 16_384, **data}
    tree = {"model": {"path": "scholar"}, "data": own, "train": {"duration": "1000000 steps"}, "out": f"{folder}/run"}
    return config.build(tree, "benchmark")


def prepared_in(file: str, folder: str) -> None:
    """One measurement, in this process: seconds of `prepare`."""
    from preceptor.train.prepare import prepare

    run = run_of(file, folder)
    started = time.perf_counter()
    prepared = prepare(run, num_processes=2)
    print(json.dumps([time.perf_counter() - started, prepared.num_examples, prepared.tokens.computed]))


def side(source: Path, what: str, file: str, folder: str, cache: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "PRECEPTOR_CACHE": cache}
    command = [sys.executable, __file__, "--side", what, file, folder]
    shown = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(shown.splitlines()[-1])


def rendering(before: Path, repetitions: int, folder: str) -> dict[str, Any]:
    file = write(Path(folder) / "medium.jsonl", SIZES["medium"]._replace(num_conversations=3_000))
    cache = Path(folder) / "cache"
    found: dict[str, float] = {}
    for _ in range(repetitions):
        shutil.rmtree(cache, ignore_errors=True)
        for name, source, place in (
            ("before", before, "off"),
            ("without a cache", ROOT, "off"),
            ("empty cache", ROOT, str(cache)),
            ("full cache", ROOT, str(cache)),
        ):
            seconds, num, tokens = side(source, "prepare", file, folder, place)
            found[name] = min(found.get(name, seconds), seconds)
    rates = {name: round(num / seconds) for name, seconds in found.items()}
    return {"conversations": num, "tokens": tokens, "conversations_per_second": rates}


def _peak_megabytes(pid: int | str = "self") -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def streamed_in(file: str, folder: str) -> None:
    """One measurement, in this process: the batches of all windows, and passing over them."""
    import preceptor.train.run  # noqa: F401 (what a run has imported)
    from preceptor.train.prepare import prepare

    run, imported = run_of(file, folder, streaming=True, window=WINDOW), _peak_megabytes()
    with open(file, "rb") as lines:  # noqa: PTH123 (the fastest way to count)
        num_windows = sum(1 for _ in lines) // WINDOW
    started = time.perf_counter()
    prepared = prepare(run, num_processes=2)
    first = time.perf_counter() - started
    assert prepared.stream is not None and prepared.stream.windows._process is not None
    with prepared.streaming():
        loader, step, num = prepared.loader(), 0, 0
        while True:
            batch = loader.batch(step)
            if loader.position is None or loader.position.window == num_windows:
                break
            num, step = num + sum(sequence.num_tokens for sequence in batch), step + 1
        seconds = time.perf_counter() - started
        peaks = _peak_megabytes() - imported, _peak_megabytes(prepared.stream.windows._process.pid)
    result = {
        "examples": num_windows * WINDOW,
        "tokens": num,
        "first_window_seconds": round(first, 1),
        "examples_per_second": round(num_windows * WINDOW / seconds),
        "peak_megabytes_of_training": peaks[0],
        "peak_megabytes_of_reading": peaks[1],
    }
    print(json.dumps(result))


def stream(num: int, folder: str) -> dict[str, Any]:
    file = write(Path(folder) / f"short-{num}.jsonl", SIZES["short"]._replace(num_conversations=num))
    found: dict[str, Any] = side(ROOT, "stream", file, folder, "off")
    return found


def passed_over_in(file: str, num: str) -> None:
    """One measurement, in this process; the file is begun again where it ends."""
    from preceptor.config import Source
    from preceptor.data.stream import WindowReader

    reader = WindowReader([Source(path=file)], WINDOW, None)  # type: ignore[arg-type] # none is rendered
    started = time.perf_counter()
    for _ in range(int(num) // WINDOW):
        reader.read_next(None)
    seconds = time.perf_counter() - started
    found = {"file": "".join(Path(file).suffixes)[1:], "examples": int(num), "seconds": round(seconds, 1)}
    print(json.dumps(found | {"examples_per_second": round(int(num) / seconds), "peak_megabytes": _peak_megabytes()}))


def passing_over(folder: str) -> list[dict[str, Any]]:
    """Of ten million lines; of what takes longer of fewer."""
    import pyarrow.json
    import pyarrow.parquet

    file = Path(write(Path(folder) / "passed.jsonl", SIZES["short"]._replace(num_conversations=100_000)))
    packed, columns = Path(f"{file}.gz"), file.with_suffix(".parquet")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    blocks = pyarrow.json.ReadOptions(block_size=1 << 28)
    pyarrow.parquet.write_table(pyarrow.json.read_json(file, read_options=blocks), columns)
    nums = {file: 10_000_000, packed: 1_000_000, columns: 1_000_000}
    return [side(ROOT, "passing over", str(each), str(num), "off") for each, num in nums.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a work tree of the commit before the cache")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--examples", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--side", nargs=3, metavar=("WHAT", "FILE", "FOLDER"), help="one measurement, in this process")
    parser.add_argument("--passing-over", action="store_true", help="only this part")
    options = parser.parse_args()
    if options.before is None and options.side is None and not options.passing_over:
        parser.error("--before is required")
    if options.side:
        what, file, folder = options.side
        {"prepare": prepared_in, "stream": streamed_in, "passing over": passed_over_in}[what](file, folder)
        return
    if options.passing_over:
        with tempfile.TemporaryDirectory() as folder:
            found = {"command": "python benchmarks/streaming.py --passing-over", **describe()}
            result = json.loads(RESULT.read_text()) | {"passing_over": found | {"files": passing_over(folder)}}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["passing_over"], indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        streams = []
        for num in options.examples:
            streams.append(stream(num, folder))
            print(streams[-1], flush=True)
        result = {
            "command": "python benchmarks/streaming.py --before CHECKOUT",
            **describe(),
            "rendering": rendering(options.before, options.repetitions, folder),
            "window": WINDOW,
            "streams": streams,
            "passing_over": {"files": passing_over(folder)},
        }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
