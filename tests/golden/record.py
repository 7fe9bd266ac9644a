"""Records the golden values again, or compares with them.

    python tests/golden/record.py trees losses demo              write trees.json, losses.json and demo.json
    python tests/golden/record.py demo --compare                 print what differs; exit code 1 where something does

tests/test_golden.py compares trees and losses; the demo takes a minute or two and is compared by hand. Record
only where a change of behaviour is wanted.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from golden import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=("trees", "losses", "demo"))
    parser.add_argument("--compare", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums are then taken in one order
    differences = []
    for name in arguments.names:
        values = {"trees": data.all_trees, "losses": data.all_losses, "demo": data.demo}[name]()
        if arguments.compare:
            differences += [f"{name}: {line}" for line in data.differences(name, values)]
        else:
            data.record(name, values)
    print("\n".join(differences) or ("no difference" if arguments.compare else "recorded"))
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
