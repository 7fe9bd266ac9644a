"""Durations as values: `3 epochs`, `500 steps`, `5 %`, `10 minutes`."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

Unit = Literal["epochs", "steps", "percent", "seconds", "minutes", "hours"]
_UNITS: dict[str, Unit] = {
    name: unit for unit in get_args(Unit) for name in ("%" if unit == "percent" else unit.removesuffix("s"), unit)
}
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_LARGEST = 10**9


def plain(number: float) -> str:
    """As `Duration.parse` reads it: without an exponent, however large or small."""
    return f"{number:.12f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, slots=True)
class Duration:
    """A stretch of training. In a run file it is written as text, `<number> epochs|steps|%|minutes|hours`."""

    count: float
    unit: Unit

    @classmethod
    def parse(cls, value: object) -> "Duration":
        """Raises ValueError (which pydantic turns into an error with the key) for anything else than such a text."""
        if isinstance(value, Duration):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]+)\s*", value) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS:
            raise ValueError("a duration is written as `3 epochs`, `500 steps`, `5 %` or `10 minutes`")
        if float(match[1]) > _LARGEST:
            raise ValueError(f"no duration may be over {_LARGEST:,}")
        duration = cls(float(match[1]), _UNITS[match[2]])
        if duration.unit == "steps" and not duration.count.is_integer():
            raise ValueError("steps are whole numbers")
        return duration

    @property
    def seconds(self) -> float | None:
        """Its seconds, if it is in time; None for epochs, steps and percent."""
        return self.count * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def steps(self, steps_per_epoch: int, total_steps: int = 0) -> int:
        """Whole steps; part epochs are rounded up. `percent` is a share of `total_steps`. Not for time."""
        per_unit = {"epochs": steps_per_epoch, "steps": 1, "percent": total_steps / 100}[self.unit]
        return math.ceil(round(self.count * per_unit, 6))

    def __str__(self) -> str:
        return f"{plain(self.count)} {'%' if self.unit == 'percent' else self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^\s*\d+(\.\d+)?\s*({'|'.join(_UNITS)})\s*$"}
