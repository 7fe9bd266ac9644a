"""The cost of `preceptor select` beside the model's own forward pass: reading, comparing, choosing.

    python benchmarks/select_cost.py [--rows 100000] [--keep 1000]

Rows of 120 words drawn at random; embeddings of size 256 round 500 directions. Writes
benchmarks/results/select_cost.json (with machine, versions, date).
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from machine import describe
from preceptor.data.sources import OpenSource
from preceptor.select.diversity import Points, facility_location, k_centre
from preceptor.select.pool import Pool
from preceptor.select.survey import survey

RESULT = Path(__file__).parent / "results" / "select_cost.json"
WORDS = 120
EMBEDDING_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--keep", type=int, default=1000)
    given = parser.parse_args()
    result = {"command": f"python benchmarks/select_cost.py --rows {given.rows} --keep {given.keep}", **describe()}
    result |= {"rows": given.rows, "keep": given.keep} | reading(given.rows) | choosing(given.rows, given.keep)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def reading(num_rows: int) -> dict[str, float]:
    """Seconds and the growth of the process's peak memory, for reading, fingerprints, repeats and text signals."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for _ in range(num_rows):
                text = " ".join(words[rng.integers(len(words), size=WORDS)])
                roles = zip(("user", "assistant"), (text[: len(text) // 4], text[len(text) // 4 :]), strict=True)
                lines.write(json.dumps({"messages": [{"role": r, "content": t + "."} for r, t in roles]}) + "\n")
        before = peak_bytes()
        started = time.perf_counter()
        survey(Pool((OpenSource(str(file)),)), None, None)
        return {
            "reading_seconds": time.perf_counter() - started,
            "reading_bytes_a_row": (peak_bytes() - before) / num_rows,
        }


def choosing(num_rows: int, keep: int) -> dict[str, float]:
    """Seconds of each way to choose, from a float16 table."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, EMBEDDING_SIZE), dtype=np.float32)
    table = np.empty((num_rows, EMBEDDING_SIZE), np.float16)
    for start in range(0, num_rows, 10_000):
        label = rng.integers(500, size=min(10_000, num_rows - start))
        noise = rng.standard_normal((len(label), EMBEDDING_SIZE), dtype=np.float32)
        table[start : start + len(label)] = centres[label] + 0.5 * noise
    before = peak_bytes()
    points, quality_N = Points(table, np.arange(num_rows)), np.ones(num_rows)
    seconds = {}
    for name, method in (("facility_location", facility_location), ("k_centre", k_centre)):
        started = time.perf_counter()
        method(points, quality_N, keep, 0)
        seconds[f"{name}_seconds"] = time.perf_counter() - started
    return seconds | {"choosing_bytes": float(peak_bytes() - before)}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
