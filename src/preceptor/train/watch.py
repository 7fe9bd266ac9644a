"""Looking at the model while it trains: held-out loss, and its answers to the same prompts each time."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.data.conversation import Conversation, trainable_turns
from preceptor.data.forest import Row, Tree, path_ids
from preceptor.study.evaluate import held_out
from preceptor.study.generate import generate
from preceptor.train.checkpoint import State
from preceptor.train.metrics import append_line
from preceptor.train.precision import autocast


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: its context tokens, the words that a person reads, and the reference answer."""

    source: str
    context: tuple[int, ...]
    asked: str
    reference: str


@dataclass
class Watch:
    """Writes `eval.jsonl` (one line a look) and `samples.jsonl` (one line a prompt and look)."""

    folder: Path
    rows: list[Row]
    prompts: list[Prompt]
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    precision: str
    enabled: bool
    say: Any
    last: dict[str, Any] = field(default_factory=dict)

    def look(self, state: State) -> None:
        """Measure and sample; nothing that influences training changes."""
        if not self.enabled:
            return
        if self.rows:
            with autocast(state.model.device, self.precision):
                measured = held_out(state.model, self.rows)
            self.last = {
                "step": state.step,
                "loss": measured.loss,
                "token_accuracy": measured.token_accuracy,
                "num_trained": measured.num_trained,
            }
            append_line(self.folder / "eval.jsonl", self.last)
            self.say(
                f"held out after {state.step} steps: loss {measured.loss:.4f}, tokens {measured.token_accuracy:.1%}"
            )
        answers = generate(
            state.model, self.tokenizer, [p.context for p in self.prompts], self.stop_token_ids, self.max_new_tokens
        )
        for prompt, answer in zip(self.prompts, answers, strict=True):
            append_line(
                self.folder / "samples.jsonl",
                {
                    "step": state.step,
                    "source": prompt.source,
                    "prompt": prompt.asked,
                    "answer": answer.text,
                    "stopped": answer.stopped,
                    "reference": prompt.reference,
                },
            )


def first_prompt(conversation: Conversation, tree: Tree) -> Prompt:
    """The conversation's first trained turn as a prompt."""
    turn = trainable_turns(conversation.messages)[0]
    target = next(segment for segment in tree.segments if segment.kind == "target")
    return Prompt(
        source=conversation.source,
        context=path_ids(tree, target.parent),
        asked=conversation.messages[turn - 1].content if turn else "",
        reference=conversation.messages[turn].content,
    )
