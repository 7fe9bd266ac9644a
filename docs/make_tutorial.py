"""Runs the commands of docs/tutorial.md, about five minutes on 2 cores, and writes what they print below each.

python docs/make_tutorial.py [--folder DIR]     (of DIR the run stays, for docs/make_pictures.py)
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe

PAGE = Path(__file__).parent / "tutorial.md"
STEP = re.compile(r"^```sh\n(?P<commands>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.DOTALL | re.MULTILINE)
STAMP = re.compile(r"(?<=<!-- machine -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="tutorial-"))
    folder.mkdir(exist_ok=True)
    facts = describe()
    stamp = (
        "The output on this page is that of `python docs/make_tutorial.py`: "
        f"{facts['machine']}, {facts['date']}, torch {facts['torch']}, transformers {facts['transformers']}."
    )
    page = STEP.sub(lambda step: ran(step, folder), PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(STAMP.sub(stamp, page), encoding="utf-8")


def ran(step: re.Match[str], folder: Path) -> str:
    print(step["commands"], end="", flush=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "96",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step["commands"]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    block = f"```sh\n{step['commands']}```\n"
    if step["printed"] is None:
        return block
    printed = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
    return f"{block}\n```text\n{printed}\n```\n"


if __name__ == "__main__":
    main()
