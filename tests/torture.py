"""The table of a torture run: what was done to runs of the command, and how many then ended as if nothing had been."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch
from children import TORTURE

FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "torture.json"


def write_table(rows, seconds):
    """Rows of one fault, kind and place become one, with how many runs there were and how many ended well."""
    counts = {}
    for row in rows:
        own = counts.setdefault((row["fault"], row["kind"], row["place"]), {"num": 0, "as_uninterrupted": 0})
        own["num"] += 1
        own["as_uninterrupted"] += not row["wrong"]
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "times": TORTURE,
        "minutes": round(seconds / 60, 1),
        "rows": [
            {"fault": fault, "kind": kind, "place": place, **own}
            for (fault, kind, place), own in sorted(counts.items())
        ],
        "wrong": [row for row in rows if row["wrong"]],
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
