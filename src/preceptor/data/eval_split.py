"""The part of the training examples that is held out for evaluation (`data.eval_size`).

The side of an example follows from the hash of how it begins: of a conversation all messages before the first trained
one. So examples that are equal, or answer the same prompt, are on the same side; and examples that are added later, a
change of their order or of `train.seed` move no other one. The share is met in the mean, as if each prompt were drawn.
"""

import hashlib
from dataclasses import dataclass

from preceptor.data.examples import Completion, Conversation, Example, Rejection, trainable_turns


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


def _drawn(example: Example) -> float:
    """A number from 0 to 1 that hangs on the beginning of the example alone."""
    beginning = repr(_beginning(example)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(beginning, digest_size=8).digest()) / 2**64


def _beginning(example: Example) -> object:
    if isinstance(example, Conversation):
        first = next(iter(trainable_turns(example.messages)), 0)
        return [message.given for message in example.messages[: first or None]]
    return (example.prompt or example.completion) if isinstance(example, Completion) else example.text
