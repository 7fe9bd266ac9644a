"""The windows of a stream as a run meets them: compared between its processes, checked, recorded.

OUT/windows.jsonl has a line for each window that was begun; data.json has the sums, rejections.jsonl what was rejected.
"""

from collections.abc import Callable
from dataclasses import asdict

from preceptor.data.examples import Rejection, RejectionCounts
from preceptor.data.loader import WindowFacts
from preceptor.errors import DataError, StreamError
from preceptor.files import append_line, read_json, read_json_lines, write_json, write_json_lines
from preceptor.train.prepare import Prepared
from preceptor.train.run_folder import WINDOWS, RunFolder
from preceptor.world import World


class WindowRecord:
    """Called with each window that a run begins, or the error where this process cannot.

    Raises StreamError, in all processes the same, where one of them cannot train the window.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, world: World, say: Callable[[str], None]) -> None:
        self._run, self._folder, self._world, self._say = prepared.run, folder, world, say
        self._num_beside = prepared.num_examples_beside, len(prepared.rejections_beside)
        self._counts = RejectionCounts(prepared.run.data.allow_rejected)
        self._begun = False

    def __call__(self, begun: WindowFacts | StreamError) -> None:
        facts, own = self._of_all(begun)
        rejections = [rejection for table in facts.window.tables for rejection in table.rejections]
        self._require_few_rejected(facts, rejections)
        if self._world.is_first:
            self._write(facts, own, rejections)

    def _of_all(self, begun: WindowFacts | StreamError) -> tuple[WindowFacts, str]:
        """The window and the hash of what is trained of it, where all processes have the same."""
        error = str(begun) if isinstance(begun, StreamError) else ""
        own = "" if isinstance(begun, StreamError) or begun.dataset is None else begun.dataset.sha256
        of_ranks = self._world.gather((error, own))
        for text in (text for text, _ in of_ranks if text):
            raise StreamError(text)
        assert isinstance(begun, WindowFacts), "no process has an error"
        for rank, (_, other) in enumerate(of_ranks):
            if other != of_ranks[0][1]:
                raise StreamError(f"window {begun.window.number}: process {rank} has other examples than process 0")
        return begun, own

    def _require_few_rejected(self, facts: WindowFacts, rejections: list[Rejection]) -> None:
        for rejection in rejections:
            self._counts.add(rejection)
        allowed = self._run.data.allow_rejected
        num = sum(count for code, count in facts.so_far.rejected.items() if code not in allowed)
        try:
            self._counts.require_few(num, facts.so_far.num_examples, self._run.data.max_rejected)
        except DataError as error:
            raise StreamError(f"window {facts.window.number}: {error}") from None

    def _write(self, facts: WindowFacts, sha256: str, rejections: list[Rejection]) -> None:
        place, number = self._folder.path, facts.window.number
        if not self._begun:  # what an earlier session recorded of this window and of later ones
            for name in (WINDOWS, "rejections.jsonl"):
                lines = read_json_lines(place / name, lambda _: None)
                write_json_lines(place / name, [line for line in lines if line.get("window", -1) < number])
            self._begun = True
        for rejection in rejections:
            append_line(place / "rejections.jsonl", {**asdict(rejection), "window": number})
        dataset = facts.dataset
        line = {
            "window": number,
            "first_step": facts.first_step,
            "num_steps": facts.num_steps,
            "num_examples": facts.window.num_examples,
            "num_rejected": len(rejections),
            "num_tokens": 0 if dataset is None else int(dataset.lengths.sum()),
            "num_trained": 0 if dataset is None else int(dataset.num_trained.sum()),
            "sha256": sha256,
        }
        append_line(place / WINDOWS, line)
        so_far = facts.so_far
        sums = {
            "num_windows": number + 1,
            "num_examples": self._num_beside[0] + so_far.num_examples,
            "num_rejected": self._num_beside[1] + sum(so_far.rejected.values()),
        }
        known = read_json(place / "data.json")
        known["tokens"] |= {"computed": so_far.num_tokens, "trained": so_far.num_trained}
        write_json(place / "data.json", {**known, **sums})
        if rejections and number:
            self._say(f"window {number}: {len(rejections):,} of {facts.window.num_examples:,} examples rejected")
