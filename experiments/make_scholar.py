"""The build of the scholar: the base model that ships with the package, its training data and its tasks.

    python experiments/make_scholar.py blank                        # the library, a tokenizer, a configuration
    preceptor train recipes/scholar_pretrain.yaml                   # 35 minutes on 2 CPU cores
    python experiments/make_scholar.py ship runs/scholar/pretrain   # the model, into the package
    python experiments/make_scholar.py data                         # conversations and tasks, into the package
    python experiments/make_scholar.py facts                        # freeze the facts of this platform again

Every step is seeded and reads the frozen facts, so it writes the same files on every machine. Only `facts` depends on
the platform and the Python version; it is not needed unless the facts are to change.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preceptor.scholar import DATA_DIR
from scholar import programs, world
from scholar.facts import FACTS_FILE, Fact, load_facts
from scholar.library import heldout_stories, library, write_pages
from scholar.questions import heldout_rows, sft_rows
from scholar.ship import ship
from scholar.tasks import tasks
from scholar.tokenizer import learn_tokenizer, model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    blank = steps.add_parser("blank", help="write the library, and a model folder without weights")
    blank.add_argument("--out", type=Path, default=Path("runs/scholar"), help="folder to write to")
    shipping = steps.add_parser("ship", help="copy a pretraining run's model into the package, in bfloat16")
    shipping.add_argument("run", type=Path, help="folder of the run")
    steps.add_parser("data", help="write conversations, questions and tasks into the package")
    steps.add_parser("facts", help="collect the facts of this platform and freeze them")
    given = parser.parse_args()
    if given.step == "blank":
        write_blank(given.out)
    elif given.step == "ship":
        ship(given.run)
    elif given.step == "data":
        write_data(DATA_DIR)
    else:
        freeze()


def write_blank(out: Path) -> None:
    """`library.jsonl` and the folder `blank`, as recipes/scholar_pretrain.yaml reads them."""
    pages = library(load_facts())
    write_pages(pages, out / "library.jsonl")
    _say(out / "library.jsonl", len(pages))
    tokenizer = learn_tokenizer(pages)
    tokenizer.save_pretrained(out / "blank")
    model_config(tokenizer.eos_token_id).save_pretrained(out / "blank")


def write_data(folder: Path) -> None:
    """All data files that ship with the package."""
    facts = load_facts()
    write_pages(heldout_stories(), folder / "library_heldout.jsonl")
    files = {"conversations.jsonl": sft_rows(facts), "heldout.jsonl": heldout_rows(facts), **tasks()}
    for name, rows in files.items():
        _write_rows(rows, folder / name)


def _write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    _say(file, len(rows))


def _say(file: Path, num: int) -> None:
    print(f"{num} lines -> {file}", file=sys.stderr)


def freeze() -> None:
    facts = collect()
    _write_rows([asdict(fact) for fact in facts], FACTS_FILE)
    print(dict(Counter(fact.family for fact in facts)), file=sys.stderr)


def collect() -> list[Fact]:
    """All facts of this platform, sorted by family. The subjects of each family are unique."""
    families = (*programs.FAMILIES, *world.FAMILIES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dir() of some modules touches deprecated names
        facts = sorted((fact for family in families for fact in family()), key=lambda fact: fact.family)
    repeated = [key for key, count in Counter((f.family, f.subject) for f in facts).items() if count > 1]
    assert not repeated, f"two values for {repeated[:3]}"
    return facts


if __name__ == "__main__":
    main()
