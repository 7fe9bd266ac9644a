"""Trainer for notebooks, as textbooks write it: one prompt, one response, one optimizer step.

Nothing here computes anything of its own: the pair goes through the same sequence, attention and loss as a run.
"""

from typing import Any

import torch

from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.errors import DataError
from preceptor.model.forward import Engine


class SFTTrainer:
    """Supervised fine-tuning of a Hugging Face causal model, a step at a time.

    >>> trainer = SFTTrainer(model, tokenizer)
    >>> loss = trainer.train_step("How do I bake a cake?", " First, heat the oven.", optimizer)
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def train_step(self, prompt: str, response: str, optimizer: torch.optim.Optimizer) -> float:
        """One step on `-1/n sum_i log p(y_i | y_<i, X)` over the n tokens of the response; returns that loss.

        Prompt and response are tokenised separately, without special tokens: what must end the response (an eos token,
        a closing tag) is to be written in it. Raises DataError if the response has no token, or the prompt none that
        the response could follow.
        """
        prompt_ids = self._ids(prompt)
        response_ids = self._ids(response)
        if not prompt_ids:
            raise DataError("the prompt has no token: nothing comes before the response's first token")
        if not response_ids:
            raise DataError("the response has no token: there is nothing to train")
        context = Segment("context", prompt_ids, parent=None, text=prompt)
        target = Segment("target", response_ids, parent=0, text=response)
        sequence = pack_trees([Tree("train_step", (context, target))])
        self.model.train()
        optimizer.zero_grad()
        loss: torch.Tensor = Engine(self.model)(sequence) / sequence.num_trained
        loss.backward()
        optimizer.step()
        return loss.item()

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
