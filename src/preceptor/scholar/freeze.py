"""Collect the facts of this platform and freeze them: `python -m preceptor.scholar.freeze` writes `facts.jsonl`."""

import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict

from preceptor.scholar import programs, world
from preceptor.scholar.facts import FACTS_FILE, Fact


def collect() -> list[Fact]:
    """All facts of this platform, sorted by family; each family's subjects occur once."""
    families = (*programs.FAMILIES, *world.FAMILIES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dir() of some modules touches deprecated names
        facts = sorted((fact for family in families for fact in family()), key=lambda fact: fact.family)
    repeated = [key for key, count in Counter((f.family, f.subject) for f in facts).items() if count > 1]
    assert not repeated, f"two values for {repeated[:3]}"
    return facts


if __name__ == "__main__":
    frozen = collect()
    lines = [json.dumps(asdict(fact), ensure_ascii=False) for fact in frozen]
    FACTS_FILE.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(frozen)} facts -> {FACTS_FILE}: {dict(Counter(fact.family for fact in frozen))}", file=sys.stderr)
