"""Token-distribution shift: how the base model ranks the tokens of the tuned model's answers (Lin et al. 2023, "URIAL",
arXiv:2312.01552).

The tuned model answers greedily. Then both models process context and answer, and for each answer token:

    rank   1 + the number of tokens that are more likely under the base: 1 unshifted, 2 and 3 marginal, > 3 shifted
    prob   its probability under the base
    kl     sum_v p(v) (log p(v) - log q(v)), p of the tuned model, q of the base, both over the vocabulary they share

The base is given the same rendered context as plain text: the same ids where its tokenizer has the same tokens. A token
that it lacks (an added <|im_end|>) is replaced by the base's own tokens of its text. A generated token that the base
lacks has no rank, probability or kl: its `rank` is 0, and it is counted apart.

Legend: N answer tokens of all prompts, K those that the base has, C a chunk of them, D hidden size, V rows of a head,
S tokens that both models have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preceptor.chat.tokenise import decode
from preceptor.compare.verdict import MARGINAL, SHIFTED
from preceptor.data.forest import Segment, Tree
from preceptor.errors import DataError, ModelError
from preceptor.evaluate.intervals import interval
from preceptor.evaluate.likelihood import read_trees
from preceptor.evaluate.model import EvaluatedModel, TokenIds
from preceptor.model.loss.linear_cross_entropy import Head, output_head

CHUNK_BYTES = 256 * 2**20  # of one model's float32 logits over a chunk of answer tokens


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """A context and its answer, in the tuned model's tokens, with the stop token if there was one."""

    source: str
    context: TokenIds
    ids: TokenIds


@dataclass(frozen=True, eq=False, slots=True)
class TargetStates:
    """The hidden state that predicts each target of all trees, in order, on the CPU, and the model's head."""

    hidden_ND: Tensor
    head: Head


@dataclass(frozen=True, eq=False, slots=True)
class Shift:
    """The shift of each answer token."""

    answer_N: np.ndarray  # index of its answer
    position_N: np.ndarray  # place in the answer, from 1
    token_N: np.ndarray
    rank_N: np.ndarray  # under the base; 0: the base lacks the token
    prob_N: np.ndarray
    kl_N: np.ndarray


def shared_ids(
    base_vocabulary: Mapping[str, int], tuned_vocabulary: Mapping[str, int], num_rows: int
) -> frozenset[int]:
    """The ids of the same token in both, below `num_rows` of the heads: a tokenizer may have more tokens than rows.

    Raises ModelError if these are less than 90 % of the base's.
    """
    shared = frozenset(id_ for token, id_ in base_vocabulary.items() if tuned_vocabulary.get(token) == id_ < num_rows)
    if len(shared) < 0.9 * len(base_vocabulary):
        raise ModelError(
            f"only {len(shared):,} of the base's {len(base_vocabulary):,} tokens are also the tuned model's: the two "
            "have different tokenizers, so tokens of one have no rank under the other; compare tasks and texts only"
        )
    return shared


def tuned_tree(answer: AnswerTokens) -> Tree:
    return Tree(answer.source, (Segment("context", answer.context, None), Segment("target", answer.ids, 0)))


def base_tree(answer: AnswerTokens, shared: frozenset[int], spell: Callable[[TokenIds], TokenIds]) -> Tree:
    """Context and answer in the base's tokens; the targets are the answer tokens that it has."""
    context = [ids for _, ids in _runs(answer.context, shared, spell)]
    segments = [Segment("context", tuple(id_ for ids in context for id_ in ids), None)]
    for known, ids in _runs(answer.ids, shared, spell):
        if ids:
            segments.append(Segment("target" if known else "context", ids, len(segments) - 1))
    return Tree(answer.source, tuple(segments))


def _runs(
    ids: TokenIds, shared: frozenset[int], spell: Callable[[TokenIds], TokenIds]
) -> Iterator[tuple[bool, TokenIds]]:
    """The ids in runs that the base has, and runs that it lacks, respelled in its own tokens."""
    for known, run in groupby(ids, key=shared.__contains__):
        own = tuple(run)
        yield known, own if known else spell(own)


def speller(tuned_tokenizer: Any, base_tokenizer: Any, num_rows: int) -> Callable[[TokenIds], TokenIds]:
    """Tokens of the tuned model -> the base's tokens of their text, without those for which it has no row."""

    def spell(ids: TokenIds) -> TokenIds:
        found = base_tokenizer(decode(ids, tuned_tokenizer), add_special_tokens=False)["input_ids"]
        return tuple(id_ for id_ in found if id_ < num_rows)

    return spell


def target_states(evaluated: EvaluatedModel, trees: Sequence[Tree]) -> TargetStates:
    """The hidden states at the targets of chains. Raises DataError for a chain longer than the model's context."""
    for tree in trees:
        if evaluated.max_tokens is not None and tree.num_tokens > evaluated.max_tokens:
            raise DataError(
                f"{tree.source}: with its answer it has {tree.num_tokens} tokens for {evaluated.name}, more than the "
                f"{evaluated.max_tokens} of its context; shorten the prompt or the answer's limit"
            )
    head = output_head(evaluated.model)
    found: list[list[Tensor]] = [[] for _ in trees]
    for states in read_trees(evaluated.model, trees, evaluated.window_tokens, evaluated.alone):
        hidden_ND = states.hidden_MD[states.source_N].cpu()
        for number, _, own in states.owners:
            found[number].append(hidden_ND[own])
    nothing_ND = torch.zeros(0, head.weight_VD.shape[1], dtype=head.weight_VD.dtype)
    return TargetStates(torch.cat([nothing_ND, *(part for parts in found for part in parts)]), head)


@torch.inference_mode()
def measure_shift(
    answers: Sequence[AnswerTokens],
    base: TargetStates,
    tuned: TargetStates,
    shared: frozenset[int],
    chunk_tokens: int | None = None,
) -> Shift:
    """Rank, probability and KL of each answer token; at most `chunk_tokens` tokens have logits at a time.

    base and tuned: the states of `base_tree`s and of `tuned_tree`s of the answers, in their order.
    """
    token_N = np.array([token for each in answers for token in each.ids], dtype=np.int64)
    known_N = np.array([token in shared for token in token_N.tolist()], dtype=bool)
    assert len(token_N) == len(tuned.hidden_ND) and known_N.sum() == len(base.hidden_ND)
    rank_N, prob_N, kl_N = (np.zeros(len(token_N)) for _ in range(3))
    rows = max(base.head.weight_VD.shape[0], tuned.head.weight_VD.shape[0])
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * rows))
    shared_S = torch.tensor(sorted(shared))
    places_K = np.flatnonzero(known_N)
    for start in range(0, len(places_K), chunk):
        places_C = places_K[start : start + chunk]
        target_C = torch.from_numpy(token_N[places_C])
        base_CV = _log_probs(base.head, base.hidden_ND[start : start + chunk])
        tuned_CV = _log_probs(tuned.head, tuned.hidden_ND[torch.from_numpy(places_C)])
        own_C1 = base_CV.gather(1, target_C.to(base_CV.device)[:, None])
        base_CS, tuned_CS = (each_CV.cpu()[:, shared_S].log_softmax(dim=-1) for each_CV in (base_CV, tuned_CV))
        rank_N[places_C] = 1 + (base_CV > own_C1).sum(dim=-1).cpu().numpy()
        prob_N[places_C] = own_C1[:, 0].exp().cpu().numpy()
        kl_N[places_C] = (tuned_CS.exp() * (tuned_CS - base_CS)).sum(dim=-1).numpy()
    return Shift(
        answer_N=np.repeat(np.arange(len(answers)), [len(each.ids) for each in answers]),
        position_N=np.concatenate([np.arange(1, len(each.ids) + 1) for each in answers]),
        token_N=token_N,
        rank_N=rank_N.astype(np.int64),
        prob_N=prob_N,
        kl_N=np.maximum(kl_N, 0.0),  # rounding may leave a zero a little below
    )


def _log_probs(head: Head, hidden_CD: Tensor) -> Tensor:
    return head.logits(hidden_CD.to(head.weight_VD.device)).log_softmax(dim=-1)


NUM_POSITIONS, NUM_TOKENS, NUM_ANSWERS = 256, 50, 50


def shift_figures(
    shift: Shift, answers: Sequence[AnswerTokens], tokenizer: Any, seed: int = 0
) -> dict[str, Any] | None:
    """The figures of a shift; None if no token has a rank. tokenizer: the tuned model's."""
    known_N = shift.rank_N > 0
    if not known_N.any():
        return None
    classes = {
        "unshifted": shift.rank_N == 1,
        "marginal": (shift.rank_N >= MARGINAL) & (shift.rank_N < SHIFTED),
        "shifted": shift.rank_N >= SHIFTED,
    }

    def of_answers(value_N: np.ndarray) -> list[float]:
        return np.bincount(shift.answer_N, weights=value_N, minlength=len(answers)).tolist()

    def mean(value_N: np.ndarray, most: float = 1.0) -> dict[str, Any]:
        return asdict(interval(of_answers(value_N), of_answers(known_N), seed=seed).within(0.0, most))

    return {
        "num_prompts": len(answers),
        "num_tokens": int(known_N.sum()),
        "num_added": int((~known_N).sum()),
        "shares": {name: mean(own_N) for name, own_N in classes.items()},
        "mean_prob": mean(shift.prob_N),
        "mean_kl": mean(shift.kl_N, most=np.inf),
        "by_position": _by_position(shift, classes, known_N),
        "most_shifted": _most_shifted(shift, classes, tokenizer),
        "answers": _answer_tokens(shift, answers, tokenizer),
    }


def _by_position(shift: Shift, classes: dict[str, np.ndarray], known_N: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for position in range(1, min(int(shift.position_N.max()), NUM_POSITIONS) + 1):
        here_N = known_N & (shift.position_N == position)
        num = int(here_N.sum())
        if num:
            shares = {name: float((own_N & here_N).sum() / num) for name, own_N in classes.items()}
            means = {"mean_prob": float(shift.prob_N[here_N].mean()), "mean_kl": float(shift.kl_N[here_N].mean())}
            found.append({"position": position, "num": num, **shares, **means})
    return found


def _most_shifted(shift: Shift, classes: dict[str, np.ndarray], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens most often shifted."""
    ids, counts = np.unique(shift.token_N[classes["shifted"]], return_counts=True)
    order = sorted(zip(counts.tolist(), ids.tolist(), strict=True), key=lambda each: (-each[0], each[1]))
    return [
        {
            "token": decode([id_], tokenizer),
            "num": int(own_N.sum()),
            "num_shifted": num_shifted,
            "num_marginal": int((own_N & classes["marginal"]).sum()),
            "mean_prob": float(shift.prob_N[own_N].mean()),
        }
        for num_shifted, id_ in order[:NUM_TOKENS]
        for own_N in [shift.token_N == id_]
    ]


def _answer_tokens(shift: Shift, answers: Sequence[AnswerTokens], tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "source": each.source,
            "texts": [decode([id_], tokenizer) for id_ in each.ids],
            "ranks": shift.rank_N[own_N].tolist(),
            "probs": [round(value, 6) for value in shift.prob_N[own_N].tolist()],
            "kls": [round(value, 6) for value in shift.kl_N[own_N].tolist()],
        }
        for number, each in enumerate(answers[:NUM_ANSWERS])
        for own_N in [shift.answer_N == number]
    ]
