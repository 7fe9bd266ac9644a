"""Records that a program holds, as a table."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.data.formats.values import Columns, TableRows, Unreadable


@dataclass(frozen=True)
class RecordList:
    """Records as JSON lines would have them. They are read again each time, so a change of the list is seen."""

    records: Sequence[Any]
    name: str

    def files(self) -> list[Path]:
        return []

    def identity(self, sha256_of: Callable[[Path], str]) -> list[str]:
        """By the content of the records, in their order."""
        found = hashlib.sha256()
        for record in self.records:
            found.update(json.dumps(record, default=repr).encode() + b"\n")
        return ["records", found.hexdigest()]

    def columns(self) -> None:
        return None

    def num_rows(self) -> int:
        return len(self.records)

    def rows(self, wanted: Columns) -> TableRows:
        for number, record in enumerate(self.records, start=1):
            is_record = isinstance(record, Mapping)
            what = f"it is {type(record).__name__}, not a dict such as {{'messages': [...]}}"
            yield f"{self.name}:row {number}", dict(record) if is_record else Unreadable("unreadable", what)
