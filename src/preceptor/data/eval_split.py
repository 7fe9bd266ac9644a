"""The part of the training examples that is held out for evaluation (`data.eval_size`).

The side of an example follows from a hash of its question: of a conversation the first message of the user. White space
and case do not count, as where `check` compares prompts (duplicates.py). So examples that are equal, or answer the same
question, are on the same side; and examples that are added later, a change of their order or of `train.seed` move no
other one. The share is met in the mean, as if each question were drawn.
"""

import hashlib
from dataclasses import dataclass

from preceptor.data.examples import Completion, Conversation, Example, Rejection


@dataclass(frozen=True, slots=True)
class Side:
    """What is read of a source: of its examples, those that are held out, or the others. share: that is held out."""

    share: float
    held_out: bool

    def has(self, example: Example | Rejection) -> bool:
        """Rejections are counted with what is trained."""
        if isinstance(example, Rejection):
            return not self.held_out
        return (_drawn(example) < self.share) == self.held_out


def holds_out_nothing(share: float) -> str:
    """What to say where no example is held out that can be measured."""
    return (
        f"data.eval_size: {share:g} holds out no example that can be measured; there are few, or they ask the same. "
        "Set a larger share, or name a file in data.eval"
    )


def _drawn(example: Example) -> float:
    """A number from 0 to 1 that depends on the question alone."""
    asked = " ".join(_question(example).split()).lower().encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(asked, digest_size=8).digest()) / 2**64


def _question(example: Example) -> str:
    """Where nothing is asked, all of the text."""
    if isinstance(example, Conversation):
        asked = next((message.content for message in example.messages if message.role == "user"), "")
        return asked or " ".join(message.content for message in example.messages)
    return (example.prompt or example.completion) if isinstance(example, Completion) else example.text
