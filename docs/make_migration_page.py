"""Writes docs/migration.md from the names in config/peer_names.py and config/peer_without.py.

python docs/make_migration_page.py
"""

from collections import defaultdict
from pathlib import Path

from preceptor.config.peer_names import COUNTERPARTS
from preceptor.config.peer_without import NO_COUNTERPART

PAGE = Path(__file__).parent / "migration.md"
INTRODUCTION = """# Keys of other trainers

`preceptor convert` turns a file of another trainer into a run file: [coming from another trainer](coming-from.md).

Keys of TRL and transformers, Axolotl, LLaMA-Factory, torchtune and Unsloth, and what to write in a
[run file](run-file.md) instead. A run file with one of these keys is rejected with the same advice.
`python docs/make_migration_page.py` makes this page from `config/peer_names.py` and `config/peer_without.py`.
"""


def page() -> str:
    by_section: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for theirs, ours in COUNTERPARTS.items():
        key = ours.partition(": ")[0]
        by_section[key.partition(".")[0]].append((theirs, ours))
    parts = [INTRODUCTION]
    for section, pairs in by_section.items():
        parts.append(_table(f"## {section}", "their key", "here", [(theirs, _key(ours)) for theirs, ours in pairs]))
    parts.append(_table("## Not needed, or not offered", "their key", "", list(NO_COUNTERPART.items())))
    return "\n".join(parts)


def _key(ours: str) -> str:
    key, _, note = ours.partition(": ")
    return f"`{key}`: {note}" if note else f"`{key}`"


def _table(title: str, left: str, right: str, rows: list[tuple[str, str]]) -> str:
    """Keys with the same advice share a line."""
    together: dict[str, list[str]] = defaultdict(list)
    for key, advice in rows:
        together[advice].append(f"`{key}`")
    lines = [f"| {', '.join(keys)} | {advice} |" for advice, keys in together.items()]
    return "\n".join([title, "", f"| {left} | {right} |", "|---|---|", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
