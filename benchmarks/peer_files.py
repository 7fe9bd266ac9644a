"""Published files of other trainers through `preceptor convert`: how many become a run file that is accepted.

    git clone https://github.com/axolotl-ai-cloud/axolotl        # and hiyouga/LLaMA-Factory, huggingface/trl,
    python benchmarks/peer_files.py axolotl                      # pytorch/torchtune, unslothai/notebooks,
                                                                 # huggingface/alignment-handbook

A folder is a checkout of one of these repositories; several may be named. Every example in it is tried, those that
do something else than supervised fine-tuning too: they must be refused, by the reason that is printed. Commands of SFT
are taken out of TRL's documentation. A run file is accepted if it passes all checks that need neither data nor model,
with a path in the place of what the file does not say. Prints a table and writes benchmarks/results/peer_files.json.
"""

import argparse
import datetime
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preceptor import config
from preceptor.config.convert import convert_file, settings_of
from preceptor.config.peer_settings import Conversion
from preceptor.errors import ConfigError

RESULT = Path(__file__).parent / "results" / "peer_files.json"
EXAMPLES = {  # a file that only this repository has: its examples
    "src/axolotl/__init__.py": ("Axolotl", ["examples/**/*.y*ml"]),
    "src/llamafactory/__init__.py": ("LLaMA-Factory", ["examples/**/*.yaml"]),
    "trl/scripts/sft.py": ("TRL", ["examples/**/*.py", "examples/**/*.ipynb", "examples/cli_configs/*.yaml"]),
    "recipes/configs/generation.yaml": ("torchtune", ["recipes/configs/**/*.yaml"]),
    "update_all_notebooks.py": ("Unsloth", [f"{folder}/*" for folder in ("nb", "kaggle", "python_scripts", "molab")]),
    "recipes/accelerate_configs/zero3.yaml": ("alignment-handbook", ["recipes/**/*.yaml", "scripts/*.py"]),
}
KINDS = (".py", ".ipynb", ".yaml", ".yml")
COMMAND = re.compile(r"^[ \t]*((?:accelerate launch|torchrun|trl|python|uv run)\b(?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
OF_SFT = re.compile(r"trl sft\b|/sft\w*\.py")
UNKNOWN = "not known here"
DONE = "; only supervised fine-tuning is done here (docs/limits.md)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a checkout of a repository")
    rows = [row for folder in parser.parse_args().folders for row in tried(folder)]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    RESULT.write_text(json.dumps({"date": today, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['name']} ({row['commit'][:10]}): {row['files']} files, {row['converted']} converted, ", end="")
        print(f"{row['accepted']} accepted, {row['failed']} failed; {row['keys']} keys, {row['unknown']} not known")
        for why, number in row["refused"].items():
            print(f"    {number} refused: {why}")


def tried(folder: Path) -> Iterator[dict[str, Any]]:
    known = [found for sign, found in EXAMPLES.items() if (folder / sign).is_file()]
    if not known:
        raise SystemExit(f"{folder}: none of the repositories that are known here")
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    (name, patterns), own = known[0], {"commit": commit.stdout.strip()}
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.suffix in KINDS})
    yield {"name": name, **own, **counted(files)}
    if name == "TRL":
        with tempfile.TemporaryDirectory() as place:
            yield {"name": "TRL's commands", **own, **counted(commands(folder, Path(place)))}


def commands(folder: Path, place: Path) -> list[Path]:
    """A file for each command of SFT in the documentation and in the scripts."""
    texts = [path.read_text(encoding="utf-8") for path in sorted([*folder.rglob("*.md"), *folder.rglob("*.py")])]
    found = dict.fromkeys(match[1] for text in texts for match in COMMAND.finditer(text) if OF_SFT.search(match[1]))
    files = [place / f"{number}.sh" for number in range(len(found))]
    for file, command in zip(files, found, strict=True):
        file.write_text(command + "\n", encoding="utf-8")
    return files


def counted(files: list[Path]) -> dict[str, Any]:
    converted = accepted = failed = keys = 0
    refused: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for file in files:
        try:
            found = convert_file(file)
        except ConfigError as error:
            refused[reason(str(error), file)] += 1
            continue
        except Exception as error:
            failed += 1
            print(f"{file}: {type(error).__name__}: {error}")
            continue
        converted += 1
        keys += len(settings_of(file).keys() - {"torchtune", "formatting", "columns"})  # these are no keys of the file
        unknown.update(key for key, why in found.notes if UNKNOWN in why)
        try:
            config.build(filled(found), str(file))
            accepted += 1
        except ConfigError as error:
            print(error)
    sums = {"files": len(files), "converted": converted, "accepted": accepted, "failed": failed, "keys": keys}
    names = dict(unknown.most_common())
    return {**sums, "unknown": unknown.total(), "refused": dict(refused.most_common()), "unknown_keys": names}


def reason(message: str, file: Path) -> str:
    """Without the file's name, values and lists of keys, so that equal reasons are one."""
    short = message.removeprefix(f"{file}: ").partition("; it has the keys")[0]
    short = re.sub(
        r"^(\w+Trainer, )*(\w+Trainer): it is", "it calls", re.sub(r"^:\d+: ", "", short.replace(str(file), ""))
    )
    short = re.sub(r" \(lines [\d, ]+\)", "", short)
    return re.sub(r"`(\w+): .*?`: it", r"`\1`: it", short).removesuffix(DONE)


def filled(found: Conversion) -> dict[str, Any]:
    """The run file, with a path for what is left open."""
    tree = {"out": "out", **found.tree}
    tree["model"] = {"path": "model", **tree.get("model", {})}
    tree["data"] = {"train": [{"path": "data.jsonl"}], **tree.get("data", {})}
    return tree


if __name__ == "__main__":
    main()
