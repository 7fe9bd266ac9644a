"""The token-distribution shift: what of a tuned model's answers the base would have said (Lin et al. 2023, "URIAL",
arXiv:2312.01552).

The tuned model answers greedily. Then both models read context and answer, and for each answer token:

    rank   1 + the number of tokens that the base finds more likely there:  1 unshifted, 2 and 3 marginal, > 3 shifted
    prob   its probability under the base
    kl     sum_v p(v) (log p(v) - log q(v)), p of the tuned model, q of the base, both over the vocabulary they share

The base reads the same rendered context as plain text: token for token the same ids where its tokenizer has them under
the same name; a token that it lacks (an added <|im_end|>) is spelled, and its text tokenised by the base's own
tokenizer. A generated token that the base lacks has no rank, no probability and no kl: `rank` 0, counted apart.

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

from preceptor.chat.token_text import decode
from preceptor.data.forest import Segment, Tree
from preceptor.errors import DataError, ModelError
from preceptor.evaluate.intervals import interval
from preceptor.evaluate.likelihood import read_trees
from preceptor.evaluate.model import EvaluatedModel, Ids
from preceptor.model.forward import Head, output_head

CHUNK_BYTES = 256 * 2**20  # of one model's float32 logits over a chunk of answer tokens
MARGINAL, SHIFTED = 2, 4  # the first rank of each class


@dataclass(frozen=True, slots=True)
class Said:
    """A context and the answer to it, in the tuned model's tokens, the stop token included where there was one."""

    source: str
    context: Ids
    answer: Ids


@dataclass(frozen=True, eq=False, slots=True)
class States:
    """The hidden state before each target of all trees, in order, on the CPU, and the head that reads them."""

    hidden_ND: Tensor
    head: Head


@dataclass(frozen=True, eq=False, slots=True)
class Shift:
    """Of each answer token: its answer, its place in it (from 1), its id, the base's rank (0: the base lacks it)."""

    answer_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    rank_N: np.ndarray
    prob_N: np.ndarray
    kl_N: np.ndarray


def shared_ids(base_vocabulary: Mapping[str, int], tuned_vocabulary: Mapping[str, int]) -> frozenset[int]:
    """The ids that name the same token in both. Raises ModelError where these are not nearly all of the base's."""
    shared = frozenset(id_ for token, id_ in base_vocabulary.items() if tuned_vocabulary.get(token) == id_)
    if len(shared) < 0.9 * len(base_vocabulary):
        raise ModelError(
            f"only {len(shared):,} of the base's {len(base_vocabulary):,} tokens are the tuned model's too: the two "
            "have different tokenizers, so there is no rank of a token under the other; compare tasks and texts only"
        )
    return shared


def tuned_tree(said: Said) -> Tree:
    return Tree(said.source, (Segment("context", said.context, None), Segment("target", said.answer, 0)))


def base_tree(said: Said, shared: frozenset[int], spell: Callable[[Ids], Ids]) -> Tree:
    """Context and answer as the base reads them; its targets are the answer tokens that it has."""
    context = [ids for _, ids in _runs(said.context, shared, spell)]
    segments = [Segment("context", tuple(id_ for ids in context for id_ in ids), None)]
    for known, ids in _runs(said.answer, shared, spell):
        segments.append(Segment("target" if known else "context", ids, len(segments) - 1))
    return Tree(said.source, tuple(segments))


def _runs(ids: Ids, shared: frozenset[int], spell: Callable[[Ids], Ids]) -> Iterator[tuple[bool, Ids]]:
    """The ids in runs that the base has, and runs that it lacks, spelled."""
    for known, run in groupby(ids, key=shared.__contains__):
        own = tuple(run)
        yield known, own if known else spell(own)


def speller(tuned_tokenizer: Any, base_tokenizer: Any) -> Callable[[Ids], Ids]:
    """Tokens of the tuned model -> the base's tokens of their text."""
    return lambda ids: tuple(base_tokenizer(decode(ids, tuned_tokenizer), add_special_tokens=False)["input_ids"])


def states(subject: EvaluatedModel, trees: Sequence[Tree]) -> States:
    """What a model makes of trees that are chains. Raises DataError for one longer than the model's context."""
    for tree in trees:
        if subject.max_tokens is not None and tree.num_tokens > subject.max_tokens:
            raise DataError(
                f"{tree.source}: with its answer it has {tree.num_tokens} tokens for {subject.name}, more than the "
                f"{subject.max_tokens} of its context; shorten the prompt or the answer's limit"
            )
    head = output_head(subject.model)
    found: list[list[Tensor]] = [[] for _ in trees]
    for read in read_trees(subject.model, trees, subject.row_tokens, subject.alone):
        hidden_ND = read.hidden_MD[read.source_N].cpu()
        for number, _, own in read.owners:
            found[number].append(hidden_ND[own])
    nothing_ND = torch.zeros(0, head.weight_VD.shape[1], dtype=head.weight_VD.dtype)
    return States(torch.cat([nothing_ND, *(part for parts in found for part in parts)]), head)


@torch.inference_mode()
def measure_shift(
    said: Sequence[Said], base: States, tuned: States, shared: frozenset[int], chunk_tokens: int | None = None
) -> Shift:
    """Rank, probability and KL of each answer token; logits exist for `chunk_tokens` tokens at a time only.

    base: of `base_tree`s, tuned: of `tuned_tree`s, of the same answers in the same order.
    """
    token_N = np.array([token for each in said for token in each.answer], dtype=np.int64)
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
        answer_N=np.repeat(np.arange(len(said)), [len(each.answer) for each in said]),
        position_N=np.concatenate([np.arange(1, len(each.answer) + 1) for each in said]),
        token_N=token_N,
        rank_N=rank_N.astype(np.int64),
        prob_N=prob_N,
        kl_N=np.maximum(kl_N, 0.0),  # rounding may leave a zero a little below
    )


def _log_probs(head: Head, hidden_CD: Tensor) -> Tensor:
    """log softmax(cap(scale * (h W^T + b))): products in the head's dtype, the rest in float32, float64 for float64."""
    logits_CV = hidden_CD.to(head.weight_VD) @ head.weight_VD.T
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if head.bias_V is not None:
        logits_CV = logits_CV + head.bias_V
    logits_CV = logits_CV * head.logit_scale
    if head.softcap is not None:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return logits_CV.log_softmax(dim=-1)


NUM_POSITIONS, NUM_TOKENS, NUM_ANSWERS = 256, 50, 50


def shift_figures(shift: Shift, said: Sequence[Said], tokenizer: Any, seed: int = 0) -> dict[str, Any] | None:
    """None where no token has a rank. tokenizer: the tuned model's."""
    known_N = shift.rank_N > 0
    if not known_N.any():
        return None
    classes = _classes(shift.rank_N)
    num_P = _by_answer(known_N, shift, len(said))
    return {
        "num_prompts": len(said),
        "num_tokens": int(known_N.sum()),
        "num_added": int((~known_N).sum()),
        "shares": {
            name: asdict(interval(_by_answer(own_N, shift, len(said)), num_P, seed=seed))
            for name, own_N in classes.items()
        },
        "mean_prob": asdict(interval(_by_answer(shift.prob_N, shift, len(said)), num_P, seed=seed)),
        "mean_kl": asdict(interval(_by_answer(shift.kl_N, shift, len(said)), num_P, seed=seed)),
        "by_position": _by_position(shift, classes, known_N),
        "most_shifted": _most_shifted(shift, classes, tokenizer),
        "answers": _answers(shift, said, tokenizer),
    }


def _classes(rank_N: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "unshifted": rank_N == 1,
        "marginal": (rank_N >= MARGINAL) & (rank_N < SHIFTED),
        "shifted": rank_N >= SHIFTED,
    }


def _by_answer(value_N: np.ndarray, shift: Shift, num_answers: int) -> list[float]:
    return np.bincount(shift.answer_N, weights=value_N, minlength=num_answers).tolist()


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
    found = []
    for num_shifted, id_ in order[:NUM_TOKENS]:
        own_N = shift.token_N == id_
        found.append(
            {
                "token": decode([id_], tokenizer),
                "num": int(own_N.sum()),
                "num_shifted": num_shifted,
                "num_marginal": int((own_N & classes["marginal"]).sum()),
                "mean_prob": float(shift.prob_N[own_N].mean()),
            }
        )
    return found


def _answers(shift: Shift, said: Sequence[Said], tokenizer: Any) -> list[dict[str, Any]]:
    found = []
    for number, each in enumerate(said[:NUM_ANSWERS]):
        own_N = shift.answer_N == number
        found.append(
            {
                "source": each.source,
                "texts": [decode([id_], tokenizer) for id_ in each.answer],
                "ranks": shift.rank_N[own_N].tolist(),
                "probs": [round(value, 6) for value in shift.prob_N[own_N].tolist()],
                "kls": [round(value, 6) for value in shift.kl_N[own_N].tolist()],
            }
        )
    return found
