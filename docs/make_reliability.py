"""Writes two tables of docs/reliability.md: kills and disks, and files of other trainers, from benchmarks/results.

python docs/make_reliability.py
"""

import json
import re
from collections import defaultdict
from pathlib import Path

PAGE = Path(__file__).parent / "reliability.md"
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "torture.json"
TABLE = re.compile(r"(?<=<!-- torture -->\n).*?(?=<!-- end -->)", re.DOTALL)
PEERS = re.compile(r"(?<=<!-- peers -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table() -> str:
    """A row for each fault and kind of run: how many were tried, at what places, how many ended as uninterrupted."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows: dict[tuple[str, str], list[dict[str, int | str]]] = defaultdict(list)
    for row in found["rows"]:
        rows[row["fault"], row["kind"]].append(row)
    total = sum(row["num"] for row in found["rows"])
    well = sum(row["as_uninterrupted"] for row in found["rows"])
    lines = [
        f"`make torture SURVIVAL={found['times']}`, {found['date']}, {found['machine']}, torch "
        f"{found['versions']['torch']}, {found['minutes']:.0f} minutes: {well:,} of {total:,} runs were finished by "
        "the same command with the weights, logs and summary of an uninterrupted run.\n",
        "| fault | run | tried | as uninterrupted | where |",
        "|---|---|---|---|---|",
    ]
    for (fault, kind), own in rows.items():
        places = ", ".join(f"{row['place']} {row['num']}" for row in own)
        num, ended = (sum(int(row[key]) for row in own) for key in ("num", "as_uninterrupted"))
        lines.append(f"| {fault} | {kind} | {num} | {ended} | {places} |")
    return "\n".join(lines) + "\n"


def peers() -> str:
    """A row for each repository: its commit, files, what became of them, keys that are not known."""
    found = json.loads((MEASURED.parent / "peer_files.json").read_text(encoding="utf-8"))
    lines = [
        "| examples of | commit | files | refused | converted | accepted | keys | not known |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        refused = sum(row["refused"].values())
        figures = (row["files"], refused, row["converted"], row["accepted"], row["keys"], row["unknown"])
        lines.append(
            f"| {row['name']} | {row['commit'][:10]} | " + " | ".join(f"{number:,}" for number in figures) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(PEERS.sub(lambda _: peers(), text, count=1), encoding="utf-8")
