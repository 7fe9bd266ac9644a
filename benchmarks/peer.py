"""Training steps against TRL: the same model, conversations, batches, precision and loss, each in a process of its own.

    python benchmarks/peer.py [--only a b c d large lora start] [--steps 1] [--again 1]
    python benchmarks/peer.py --model llama-3.1-8b --dtype bfloat16 --precisions bfloat16 --only a b c d      (a GPU)

Work, on a Qwen3 of 8 layers, hidden 384 (random weights), vocabulary 32,000 unless said otherwise:

    a      short chats, llama3 template
    b      long answers to short prompts, llama3 template
    c      retrieval: long context, short answer (6:1), llama3 template
    d      multi-turn reasoning, Qwen3 template: TRL trains one sample a turn, which is what inference sees
    large  a with a vocabulary of 151,936
    lora   a with a frozen base and LoRA of rank 16 on all linear layers, the same first values on both sides
    start  from the start of the process to the end of the first step, on a, from a file of messages

Each step has conversations that were not seen before, as in an epoch of training. TRL is measured in every
configuration that it documents for this machine: padded batches, a batch of one, padding-free and packing, without
activation checkpointing, in float32 and bfloat16 autocast; its best counts. It is given our tokens and labels, so that
both train the same; the losses of the first and of the last step are reported for both. Ours are rows of at most 1,024
and of at most 4,096 tokens. `seconds` is that of the steps after the first, together; a configuration of TRL's whose
first step takes half as long again as the shortest first one so far is not measured further. The fastest of each side
and precision are then measured again, in turn, since a machine is not equally fast for long; the shorter time counts.
Adds to benchmarks/results/peer.json, with --model to peer-MODEL.json (with machine, versions, date).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_work import WORK, Work, make_model, prepare
from shapes import SHAPES

from machine import describe

RESULTS = Path(__file__).parent / "results"
SIDES = Path(__file__).with_name("peer_sides.py")
OURS = ("1024", "4096")  # tokens of a row at most: shorter ones need less memory
THEIRS = ("single", "padded", "packing", "padding_free")
PRECISIONS = ("float32", "bfloat16")
HOPELESS = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*WORK, "start"], default=[*WORK, "start"])
    parser.add_argument("--steps", type=int, default=1, help="measured steps, after one that is not")
    parser.add_argument("--model", choices=list(SHAPES), help="a published shape in place of the small one")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of the weights, on both sides")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--again", type=int, default=1, help="further measurements of the fastest, in turn")
    arguments = parser.parse_args()
    about = {**describe(), "trl": version("trl")}
    file, command = RESULTS / "peer.json", "python benchmarks/peer.py"
    if arguments.model:
        file = RESULTS / f"peer-{arguments.model}.json"
        command += f" --model {arguments.model} --dtype {arguments.dtype}"
    result: dict[str, Any] = {"command": command}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for work in (WORK[name] for name in arguments.only if name != "start"):
            result[work.name] = about | measure(work, folder / work.name, arguments)
            write(file, result)
            print(json.dumps(result[work.name]["summary"]), flush=True)
        if "start" in arguments.only:
            result["start"] = about | measure_start(folder / "start")
            print(json.dumps(result["start"]), flush=True)
            write(file, result)


def write(file: Path, result: dict[str, Any]) -> None:
    """After each work, so that what was measured is kept when the rest is not wanted."""
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(work: Work, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in every configuration, the fastest again, and what the best of them come to."""
    shape, precisions = arguments.model, arguments.precisions
    make_model(folder / "model", work, shape, arguments.dtype)
    about = prepare(work, folder, arguments.steps + 1) | {
        "vocabulary": SHAPES[shape]["vocab_size"] if shape else work.vocab_size
    }
    common = {"dtype": arguments.dtype, "folder": str(folder)}
    sides = [("ours", precision, how) for precision in precisions for how in OURS]
    sides += [("theirs", precision, how) for precision in precisions for how in THEIRS]
    measured: list[dict[str, Any]] = []
    for side, precision, how in sides:
        options = {"side": side, "precision": precision, "how": how, **common}
        known = [e["first_seconds"] for e in measured if e["side"] == side == "theirs" and "first_seconds" in e]
        options["hopeless_seconds"] = HOPELESS * min(known) if known else None
        measured.append({"side": side, "precision": precision, "how": how} | run_side(options))
        print(json.dumps(measured[-1]), flush=True)
    fastest = [fastest_of(measured, side, precision) for precision in precisions for side in ("ours", "theirs")]
    for entry in fastest * arguments.again:
        found = run_side({key: entry[key] for key in ("side", "precision", "how")} | common)
        if "seconds" not in found:
            continue
        entry["all_seconds"] = [*entry.get("all_seconds", [entry["seconds"]]), found["seconds"]]
        if found["seconds"] < entry["seconds"]:
            entry |= found
        print(json.dumps(entry), flush=True)
    return {"work": about, "measured": measured, "summary": summarise(work, precisions, measured)}


def fastest_of(measured: list[dict[str, Any]], side: str, precision: str) -> dict[str, Any]:
    entries = [e for e in measured if (e["side"], e["precision"]) == (side, precision) and "seconds" in e]
    return min(entries, key=lambda entry: entry["seconds"])


def run_side(options: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a fresh process; a failure is a result too."""
    command = [sys.executable, str(SIDES), json.dumps(options)]
    # Modules of a checkout are compiled once, as an installed package's are.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summarise(work: Work, precisions: list[str], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of our speed and memory to TRL's best: at the same precision, and of any."""
    worked = [entry for entry in measured if "seconds" in entry]
    ours = [entry for entry in worked if entry["side"] == "ours"]
    theirs = [entry for entry in worked if entry["side"] == "theirs"]

    def best(key: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return min(entries, key=lambda entry: entry[key])

    found: dict[str, Any] = {"work": work.name}
    for precision in precisions:
        own, same = (fastest_of(measured, side, precision) for side in ("ours", "theirs"))
        found[f"speed_{precision}"] = round(same["seconds"] / own["seconds"], 2)
        found[f"best_{precision}"] = [own["how"], same["how"]]
        found[f"loss_{precision}"] = [own["loss"], same["loss"]]
    fastest = best("seconds", theirs)
    if "bfloat16" in precisions:
        own = fastest_of(measured, "ours", "bfloat16")
        found["speed_bfloat16_over_any"] = round(fastest["seconds"] / own["seconds"], 2)
    least = best("peak_bytes", ours)
    leanest = best("peak_bytes", [e for e in measured if e["side"] == "theirs" and "peak_bytes" in e])
    found["memory_share_of_fastest"] = round(least["peak_bytes"] / fastest["peak_bytes"], 2)
    found["memory_share_of_leanest"] = round(least["peak_bytes"] / leanest["peak_bytes"], 2)
    found["leanest"] = [least["how"], least["precision"]]
    found["trl_fastest"], found["trl_leanest"] = ([e["how"], e["precision"]] for e in (fastest, leanest))
    return found


def measure_start(folder: Path) -> dict[str, Any]:
    """Seconds from starting the process to the end of the first step; the faster of two runs each."""
    work = WORK["a"]
    make_model(folder / "model", work)
    prepare(work, folder)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for attempt in range(2):
        for side in seconds:
            started = time.time()
            options = {"side": f"start_{side}", "folder": str(folder), "out": str(folder / f"{side}-{attempt}")}
            seconds[side].append(run_side(options)["finished"] - started)
    best = {side: round(min(values), 2) for side, values in seconds.items()}
    return best | {"share": round(best["ours"] / best["theirs"], 2)}


if __name__ == "__main__":
    main()
