"""Counts of the conversations that are trained: template arguments, system prompts, what a template leaves out."""

from collections import Counter
from typing import Any

from preceptor.chat.left_out import LeftOut
from preceptor.chat.thinking import TrainedArguments
from preceptor.data.examples import Conversation, Example
from preceptor.data.forest import Tree

_MOST_PROMPTS = 20_000  # that are counted one by one; of more, the rarest half is forgotten


class TrainedCounts:
    """Counts of some examples, to which those of others can be added."""

    def __init__(self, arguments: TrainedArguments) -> None:
        """arguments: which has counted nothing yet."""
        self.arguments, self.left_out = arguments, LeftOut()
        self.num_conversations = 0
        self.system_prompts: Counter[str] = Counter()  # "" for none: in how many conversations

    def add(self, example: Example, tree: Tree) -> None:
        self.arguments.add(example, tree)
        self.left_out.add(tree)
        if isinstance(example, Conversation):
            first = example.messages[0]
            self.num_conversations += 1
            self.system_prompts[first.content if first.role in ("system", "developer") else ""] += 1
            self._forget_rare_prompts()

    def _forget_rare_prompts(self) -> None:
        if len(self.system_prompts) > _MOST_PROMPTS:
            self.system_prompts = Counter(dict(self.system_prompts.most_common(_MOST_PROMPTS // 2)))

    def of_table(self, name: str) -> dict[str, Any]:
        """All counts as plain values, without the name of the table whose examples were counted."""
        return {
            "arguments": self.arguments.counted(),
            "left_out": self.left_out.counted(name),
            "num_conversations": self.num_conversations,
            "system_prompts": dict(self.system_prompts),
        }

    def include(self, counted: dict[str, Any], name: str) -> None:
        """Add what `of_table` gave, for a table of this name."""
        self.arguments.include(counted["arguments"])
        self.left_out.include(counted["left_out"], name)
        self.num_conversations += counted["num_conversations"]
        self.system_prompts.update(counted["system_prompts"])
        self._forget_rare_prompts()
