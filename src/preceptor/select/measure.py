"""Scores of a conversation by a base model: how well it predicts the answers, with and without the prompt, and an
embedding of the prompt.

The model is given plain text, one message per line, as in evaluate/model.py: a base model has no chat template, and it
does not know the tokens that a template would add. Each conversation makes one tree with all of it, and one tree for
each answer alone, after a line end; many trees share a forward pass (data/forest.py).

    loss          mean over the answers' tokens of -log p(token | all before it), in nats
    loss_alone    the same without the prompt: of each answer alone
    difficulty    loss / loss_alone, the instruction-following difficulty (IFD) of Li et al. 2023 (arXiv:2308.12032);
                  1 or more: the prompt does not help to predict the answer
    loss_rest     as loss, without the first token of each answer: that an answer follows at all is what training
                  teaches, so this token surprises a base model however good the answer is
    embedding     mean over the prompts' tokens of the last hidden states, of length 1

The last hidden states come from the same forward pass. The model has normalised them, so that no single outlying
dimension dominates the mean; pooled, they served best for choosing instruction data in Ivison et al. 2025
(arXiv:2503.01807). Beyond EMBEDDING_SIZE they are projected at random (Johnson and Lindenstrauss 1984; seeded), which
keeps distances to some 10 %.

Legend: T tokens of a sequence, D hidden size, E embedding size, N answer tokens, U conversations at a time.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from preceptor.chat.reasoning import block_of
from preceptor.chat.tokenise import bos_ids
from preceptor.data.examples import Completion, Message, Rejection, trainable_turns
from preceptor.data.forest import Segment, Tree, pack_trees
from preceptor.data.packing import plan_sequences
from preceptor.errors import ModelError
from preceptor.model.checks import check_head, check_isolation
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import output_head, token_losses
from preceptor.model.parts import decoder_of
from preceptor.select.pool import AnsweredExample

EMBEDDING_SIZE = 256

_SEQUENCES_AT_A_TIME = 16  # planned together, so that they are full


class ModelScores(NamedTuple):
    """The scores of one conversation: the numbers of SCORES and the embedding."""

    loss: float
    loss_alone: float
    loss_rest: float
    difficulty: float
    num_prompt_tokens: int
    num_answer_tokens: int
    embedding_E: np.ndarray  # float32


SCORES = np.dtype(
    [(name, float) for name in ("loss", "loss_alone", "loss_rest", "difficulty")]
    + [(name, int) for name in ("prompt_tokens", "answer_tokens")]
)


def plain_text(message: Message) -> str:
    """A message as plain text: reasoning, content, and tool calls as JSON, one per line."""
    calls = [json.dumps(call, ensure_ascii=False, default=str) for call in message.tool_calls]
    return "\n".join(part for part in (message.reasoning_content, message.content, *calls) if part)


def answers_of(example: AnsweredExample) -> list[str]:
    """The texts of the answers that training would train."""
    return [answer for _, answer in exchanges_of(example)]


def said_in(example: AnsweredExample) -> list[str]:
    """Of each answer that training would train, what it says: without reasoning and tool calls."""
    if isinstance(example, Completion):
        texts = [example.completion]
    else:
        texts = [example.messages[k].content for k in trainable_turns(example.messages)]
    return [text if (block := block_of(text)) is None else block.answer for text in texts]


def exchanges_of(example: AnsweredExample) -> list[tuple[str, str]]:
    """For each answer that training would train, the text since the answer before, and its own."""
    if isinstance(example, Completion):
        return [(example.prompt, example.completion)]
    texts = list(map(plain_text, example.messages))
    turns = pairwise([-1, *trainable_turns(example.messages)])
    return [("".join(f"{text}\n" for text in texts[before + 1 : k]), texts[k]) for before, k in turns]


class BaseScorer:
    """Scores conversations with a base model.

    max_length: tokens of one forward pass; a conversation longer than this, or than the model's own limit, is
    rejected. Raises ModelError if the model cannot keep the conversations of one pass apart.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        check_head(model)
        check_isolation(model)
        self._model, self._tokenizer = model.eval(), tokenizer
        settings = decoder_of(model).config
        self._max_length = max_length
        self._max_tokens = min(max_length, getattr(settings, "max_position_embeddings", None) or max_length)
        self._bos = bos_ids(tokenizer)
        self._start = [*self._bos, *self._ids("\n")]
        if not self._start:
            raise ModelError("the tokenizer has neither a bos token nor a token for a line end; choose another --model")
        self._projection_DE = _projection(settings.hidden_size).to(model.device)
        self.embedding_size = self._projection_DE.shape[1]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def score(
        self, examples: Iterable[tuple[int, AnsweredExample]]
    ) -> Iterator[tuple[int, AnsweredExample, ModelScores | Rejection]]:
        """Each numbered example with its scores or rejection, in order."""
        waiting: list[tuple[int, AnsweredExample, list[Tree] | Rejection]] = []
        num_tokens = 0
        for number, example in examples:
            trees = self.trees_of(example)
            waiting.append((number, example, trees))
            num_tokens += 0 if isinstance(trees, Rejection) else sum(tree.num_tokens for tree in trees)
            if num_tokens >= _SEQUENCES_AT_A_TIME * self._max_length:
                yield from self._measured(waiting)
                waiting, num_tokens = [], 0
        yield from self._measured(waiting)

    def trees_of(self, example: AnsweredExample) -> list[Tree] | Rejection:
        """The whole conversation, then each of its answers alone; or why the model cannot score it."""
        segments: list[Segment] = []
        alone: list[Tree] = []
        for text, answer in exchanges_of(example):
            text = "\n" + text if segments else text
            before = [*(() if segments else self._bos), *self._ids(text)] if text else self._start
            target = tuple(self._ids(answer))
            if not target:
                return Rejection(example.source, "nothing_to_predict", "the tokenizer makes no token of an answer")
            context = Segment("context", tuple(before), len(segments) - 1 if segments else None)
            segments += [context, Segment("target", target, len(segments))]
            alone.append(
                Tree(example.source, (Segment("context", tuple(self._start), None), Segment("target", target, 0)))
            )
        whole = Tree(example.source, tuple(segments))
        longest = max(tree.num_tokens for tree in (whole, *alone))
        if longest > self._max_tokens:
            return Rejection(
                example.source,
                "too_long",
                f"the conversation has {longest:,} tokens; --max-length and the model allow {self._max_tokens:,}",
            )
        return [whole, *alone]

    @torch.no_grad()
    def _measured(
        self, waiting: Sequence[tuple[int, AnsweredExample, list[Tree] | Rejection]]
    ) -> Iterator[tuple[int, AnsweredExample, ModelScores | Rejection]]:
        """The scores of the waiting examples, whose trees are packed together."""
        trees = [
            (unit, k, tree) for unit, (_, _, t) in enumerate(waiting) if isinstance(t, list) for k, tree in enumerate(t)
        ]
        loss_U3 = np.zeros((len(waiting), 3))
        embedding_UE = np.zeros((len(waiting), self.embedding_size), np.float32)
        lengths = [tree.num_tokens for _, _, tree in trees]
        for indices in plan_sequences(lengths, self._max_length, seed=0):
            chosen = [trees[index] for index in indices]
            hidden_TD, losses = self._forward([tree for _, _, tree in chosen])
            token, pair = 0, 0
            for unit, k, tree in chosen:
                own_N = losses[pair : pair + tree.num_trained]
                loss_U3[unit, min(k, 1)] += own_N.sum()
                if k == 0:
                    loss_U3[unit, 2] = own_N[_is_rest(tree)].mean()
                    embedding_UE[unit] = self._embedding(hidden_TD[token : token + tree.num_tokens], tree)
                token, pair = token + tree.num_tokens, pair + tree.num_trained
        for unit, (number, example, found) in enumerate(waiting):
            if isinstance(found, list):
                yield number, example, self._result(example.source, found[0], loss_U3[unit], embedding_UE[unit])
            else:
                yield number, example, found

    def _forward(self, trees: Sequence[Tree]) -> tuple[Tensor, np.ndarray]:
        """The last hidden states of a sequence and the losses (float64) of its targets, both in layout order."""
        sequence = pack_trees(trees)
        hidden_TD = Engine(self._model).hidden_states(sequence)
        pairs = (torch.from_numpy(each_N).to(hidden_TD.device) for each_N in (sequence.source_N, sequence.target_N))
        losses_N, _ = token_losses(hidden_TD, output_head(self._model), *pairs)
        return hidden_TD, losses_N.double().cpu().numpy()

    def _embedding(self, hidden_TD: Tensor, tree: Tree) -> np.ndarray:
        is_context_T = np.concatenate([np.full(len(s.ids), s.kind == "context") for s in tree.segments])
        mean_D = hidden_TD[torch.from_numpy(is_context_T).to(hidden_TD.device)].float().mean(dim=0)
        embedding_E = mean_D @ self._projection_DE
        unit_E: np.ndarray = (embedding_E / embedding_E.norm().clamp_min(1e-12)).cpu().numpy()
        return unit_E

    def _result(self, source: str, whole: Tree, loss_3: np.ndarray, embedding_E: np.ndarray) -> ModelScores:
        num_answer_tokens = whole.num_trained
        loss, loss_alone = (loss_3[:2] / num_answer_tokens).tolist()
        if not (math.isfinite(loss) and math.isfinite(loss_alone) and np.isfinite(embedding_E).all()):
            raise ModelError(f"{source}: the model's loss on this example is not finite; choose another --model")
        num_prompt_tokens, difficulty = whole.num_tokens - num_answer_tokens, loss / max(loss_alone, 1e-9)
        return ModelScores(
            loss, loss_alone, float(loss_3[2]), difficulty, num_prompt_tokens, num_answer_tokens, embedding_E
        )


def _is_rest(tree: Tree) -> np.ndarray:
    """Which answer tokens are not the first of an answer; all if no answer has a second token."""
    lengths = [len(segment.ids) for segment in tree.segments if segment.kind == "target"]
    is_rest_N = np.ones(sum(lengths), bool)
    is_rest_N[np.cumsum([0, *lengths[:-1]])] = False
    return is_rest_N if is_rest_N.any() else ~is_rest_N


def _projection(hidden_size: int) -> Tensor:
    """(D, E): the identity, or random directions that keep lengths on average."""
    if hidden_size <= EMBEDDING_SIZE:
        return torch.eye(hidden_size)
    directions = np.random.default_rng(0).standard_normal((hidden_size, EMBEDDING_SIZE)) / math.sqrt(EMBEDDING_SIZE)
    return torch.from_numpy(directions.astype(np.float32))
