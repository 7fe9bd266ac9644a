"""Replay: text of the kind that the base learned from, mixed into fine-tuning so that it forgets less of it.

(Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"; Ouyang et al. 2022, arXiv:2203.02155, mix
pretraining gradients into tuning against what they call the alignment tax.)
"""

import random
from collections.abc import Sequence

from preceptor.data.forest import Tree


def draw_replay(replay: Sequence[Tree], tuning: Sequence[Tree], share: float, seed: int) -> list[Tree]:
    """A seeded choice of `replay` with `share` of all trained tokens, beside `tuning`; within one record's length.

    No record is drawn again before all were. share: over 0, under 1.
    """
    wanted = share / (1.0 - share) * sum(tree.num_trained for tree in tuning)
    usable = [tree for tree in replay if tree.num_trained]
    rng = random.Random(f"replay {seed}")
    drawn: list[Tree] = []
    num_trained = 0
    while usable and num_trained < wanted:
        for tree in rng.sample(usable, len(usable)):
            if num_trained >= wanted:
                break
            drawn.append(tree)
            num_trained += tree.num_trained
    return drawn
