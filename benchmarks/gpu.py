"""The first quarter of an hour on a GPU: is all of it right, how fast is it, and does the plan hold.

    python benchmarks/gpu.py --out FOLDER [--part 1|2] [--phases facts attention ...]
    python benchmarks/gpu.py --out FOLDER --tiny --device cpu

Each phase (gpu_phases.py) is a process of its own: one that hangs, crashes or leaves the GPU unusable is ended after
its budget of seconds and costs no other. What it has found goes into a file case by case, so nothing measured is lost.
Three files come of it: gpu.json, also printed; kernels.txt, the time by kernel of each timed case; log.txt, what the
processes printed. gpu.md says how to run it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASES = {
    "facts": (1, 40),
    "product": (1, 60),
    "attention": (1, 75),
    "steps_8b": (1, 150),
    "models": (1, 65),
    "trl": (2, 70),
    "memory": (2, 40),
    "lora_8b": (2, 45),
    "product_auto": (2, 50),
    "steps_small": (2, 35),
}
"""Each phase: the call it belongs to, and its budget in seconds, which includes some 10 of imports."""

_TOLD = 1500  # characters of what a failed phase printed last
_NOT_PRINTED = ("kernels", "errors", "errors_of_naive")  # in the file alone


def run_phase(command: list[str], file: Path, log: Path, seconds: float) -> dict[str, Any]:
    """What a process found, in `file` as far as it came, and why it ended where it did not come to its end."""
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    result: dict[str, Any] = {"found": json.loads(file.read_text()) if file.exists() else {}}
    result["seconds"] = time.perf_counter() - started
    if code != 0:
        printed = log.read_text(errors="replace").strip()
        why = f"the budget of {seconds:g} s is spent" if code is None else _why(code, printed)
        result |= {"error": why, "printed": printed[-_TOLD:]}
    return result


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it started. One that the system does not let go is left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def _why(code: int, printed: str) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else printed.rpartition("\n")[2] or f"exit code {code}"


def compact(found: Any) -> Any:
    """To be printed: floats to 4 digits, without what is long."""
    if isinstance(found, dict):
        return {name: compact(value) for name, value in found.items() if name not in _NOT_PRINTED}
    if isinstance(found, list):
        return [compact(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


def run_phases(names: list[str], out: Path, suffix: str = "", options: tuple[str, ...] = ()) -> dict[str, Any]:
    """What each found, written after each. options: for the processes. suffix: of the files' names."""
    found: dict[str, Any] = {}
    kernels = out / f"kernels{suffix}.txt"
    kernels.unlink(missing_ok=True)  # each process adds to it
    script = str(Path(__file__).with_name("gpu_phases.py"))
    with tempfile.TemporaryDirectory() as folder, (out / f"log{suffix}.txt").open("wb") as logs:
        for name in names:
            file, log = Path(folder) / f"{name}.json", Path(folder) / f"{name}.log"
            places = ["--file", str(file), "--folder", folder, "--kernels", str(kernels)]
            found[name] = run_phase([sys.executable, script, name, *places, *options], file, log, PHASES[name][1])
            logs.write(f"\n== {name}\n".encode() + log.read_bytes())
            logs.flush()
            (out / f"gpu{suffix}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            said = f"{name}: {found[name].get('error', 'done')} ({found[name]['seconds']:.1f} s)"
            print(said, json.dumps(compact(found[name]["found"]), separators=(",", ":")), flush=True)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script")
    parser.add_argument("--part", type=int, choices=(1, 2), help="the phases of one of two calls; absent: all")
    parser.add_argument("--phases", nargs="+", choices=PHASES)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    names = asked.phases or [name for name, (part, _) in PHASES.items() if asked.part in (None, part)]
    suffix = f"-{asked.part}" if asked.part else ""
    return run_phases(names, asked.out, suffix, ("--device", asked.device, *(["--tiny"] if asked.tiny else [])))


if __name__ == "__main__":
    main()
