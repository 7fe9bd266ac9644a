"""Agreement between the ranks of a run: what one alone does, and what all do. One process is a world of one.

torch is imported where there are several only, so that what is said before it is loaded can be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A group of ranks of their own, over the CPU; a thread that waits in one disturbs no other group.

    group: None for a world of one.
    """

    group: Any = None

    @classmethod
    def of_world(cls) -> "Ranks":
        """A new group of all ranks. All make their groups in the same order."""
        import torch.distributed as dist

        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.new_group(backend="gloo") if several else None)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else int(self.group.rank())

    @property
    def size(self) -> int:
        return 1 if self.group is None else int(self.group.size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; its results by rank. Where it fails on one, all raise the first error."""
        if self.group is None:
            return [work()]
        import torch.distributed as dist

        result: tuple[T | None, BaseException | None, BaseException | None]
        try:
            result = (work(), None, None)
        except BaseException as error:
            result = (None, error, error.__cause__)
        results: list[Any] = [None] * self.size
        dist.all_gather_object(results, result, group=self.group)
        for _, wrong, cause in results:
            if wrong is not None:
                raise wrong from cause
        return [own for own, _, _ in results]

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank alone; its result, or its error, on all."""
        results: list[Any] = self.together(lambda: work() if self.is_first else None)
        return results[0]  # type: ignore[no-any-return]

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks."""
        if self.group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in tensor.tolist()]


ALONE = Ranks()
