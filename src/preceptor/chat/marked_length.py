"""The length of a marked string (`marked.Marked`): templates compare lengths, and what they learn is observed."""

import operator
from collections.abc import Callable
from typing import Any

from preceptor.chat.marked import Marked


class MarkedLength(int):
    """The length of a marked string: how it compares is observed, not its exact value."""

    source: Marked

    @classmethod
    def of(cls, text: Marked) -> "MarkedLength":
        length = cls(str.__len__(text))
        length.source = text
        return length

    def _compared(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        tape = self.source.tape
        value = function(int(self), other)
        if isinstance(other, int | float):
            tape.guard(tape.step(function, tape.step(len, self.source.whole()), tape.constant(other)), value)
        return value

    def __eq__(self, other: object) -> Any:
        return self._compared(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compared(operator.ne, other)

    def __lt__(self, other: Any) -> Any:
        return self._compared(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._compared(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._compared(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._compared(operator.ge, other)

    def __bool__(self) -> bool:
        return bool(self._compared(operator.ne, 0))

    def exactly(self) -> int:
        """The plain number; it is observed."""
        return len(self.source)

    def __hash__(self) -> int:
        return hash(self.exactly())

    def __str__(self) -> str:
        return str(self.exactly())


def _arithmetic(name: str) -> Callable[..., Any]:
    method = getattr(int, name)
    return lambda self, *others: method(self.exactly(), *others)


_ARITHMETIC = "add radd sub rsub mul rmul mod rmod floordiv rfloordiv truediv rtruediv neg index"
for _name in _ARITHMETIC.split():
    setattr(MarkedLength, f"__{_name}__", _arithmetic(f"__{_name}__"))
