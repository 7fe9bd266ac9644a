"""The shift of a model with itself is nothing; ranks, probabilities and KL against direct computations in float64."""

import numpy as np
import pytest
import torch

from preceptor.chat.format import ChatFormat, add_tokens
from preceptor.compare.shift import (
    AnswerTokens,
    TargetStates,
    base_tree,
    measure_shift,
    shared_ids,
    shift_figures,
    speller,
    target_states,
    tuned_tree,
)
from preceptor.errors import DataError, ModelError
from preceptor.evaluate.generate import generate
from preceptor.evaluate.model import EvaluatedModel
from preceptor.model.loss.linear_cross_entropy import Head, output_head
from tiny import tiny_model, tiny_tokenizer

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPTS = ("the user and", "a message of the start", "assistant")


def tiny_evaluated(kind="llama", seed=0, special_tokens=ADDED, rows=None):
    tokenizer = tiny_tokenizer(special_tokens=special_tokens)
    model = tiny_model(kind, vocab_size=rows or len(tokenizer), seed=seed).double()
    return EvaluatedModel(f"seed {seed}", model, ChatFormat(tokenizer, None, (tokenizer.eos_token_id,)))


def answered(tuned, num_new=12):
    contexts = [tuned.chat.ids(prompt) for prompt in PROMPTS]
    answers = generate(tuned.model, tuned.chat.tokenizer, contexts, tuned.chat.stop_token_ids, num_new)
    return [
        AnswerTokens(f"p:{n}", context, answer.ids)
        for n, (context, answer) in enumerate(zip(contexts, answers, strict=True))
    ]


def shift_of(base, tuned, said, **settings):
    rows = [len(output_head(each.model).weight_VD) for each in (base, tuned)]
    shared = shared_ids(base.chat.tokenizer.get_vocab(), tuned.chat.tokenizer.get_vocab(), min(rows))
    spell = speller(tuned.chat.tokenizer, base.chat.tokenizer, rows[0])
    trees = [base_tree(each, shared, spell) for each in said]
    ours, theirs = target_states(base, trees), target_states(tuned, [tuned_tree(each) for each in said])
    return measure_shift(said, ours, theirs, shared, **settings), shared


def test_a_model_is_not_shifted_from_itself():
    model = tiny_evaluated()
    said = answered(model)
    shift, _ = shift_of(model, model, said)
    assert (shift.rank_N == 1).all() and len(shift.rank_N) == sum(len(each.ids) for each in said) > 20
    assert np.abs(shift.kl_N).max() < 1e-12
    found = shift_figures(shift, said, model.chat.tokenizer)
    assert found["shares"]["unshifted"]["value"] == 1.0 and found["shares"]["shifted"]["high"] == 0.0
    assert found["most_shifted"] == [] and found["num_added"] == 0 and found["mean_kl"]["value"] < 1e-12


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
def test_ranks_probabilities_and_kl_are_those_of_a_direct_computation(kind, chunk_tokens):
    base, tuned = tiny_evaluated(kind, seed=1), tiny_evaluated(kind, seed=2)
    drawn = np.random.default_rng(0).integers(5, 280, size=(3, 12))  # greedy answers of such models repeat themselves
    said = [AnswerTokens(f"p:{n}", tuned.chat.ids(PROMPTS[n]), tuple(drawn[n].tolist())) for n in range(3)]
    shift, _ = shift_of(base, tuned, said, chunk_tokens=chunk_tokens)
    expected = []
    for each in said:
        ids = torch.tensor([each.context + each.ids])
        ours, theirs = (side.model(ids).logits[0].log_softmax(-1) for side in (base, tuned))
        for place, token in enumerate(each.ids, start=len(each.context)):
            p, q = theirs[place - 1], ours[place - 1]
            rank = 1 + int((q > q[token]).sum())
            expected.append((rank, q[token].exp().item(), (p.exp() * (p - q)).sum().item()))
    ranks, probs, kls = (np.array(values) for values in zip(*expected, strict=True))
    assert (shift.rank_N == ranks).all() and ranks.max() > 3
    assert shift.prob_N == pytest.approx(probs, rel=1e-6) and shift.kl_N == pytest.approx(kls, rel=1e-6)
    assert shift.position_N.tolist() == [n + 1 for each in said for n in range(len(each.ids))]


def test_what_the_base_lacks_is_spelled_in_its_context_and_has_no_rank():
    base = tiny_evaluated(special_tokens=ADDED[:1], rows=320)
    tokenizer = tiny_tokenizer(special_tokens=ADDED[:1])
    add_tokens(tokenizer, ADDED[1:])  # the base's own ids stay, new ones come after
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=2).double()
    tuned = EvaluatedModel("tuned", model, ChatFormat(tokenizer, None, (0,)))
    start, end = tokenizer.convert_tokens_to_ids(list(ADDED[1:]))
    words, more = tuned.chat.ids("the user"), tuned.chat.ids(" and")
    said = [AnswerTokens("p:1", (start, *words), (*more, end, *words, end))]
    shift, shared = shift_of(base, tuned, said)
    assert start not in shared and end not in shared and set(words) <= shared
    known = np.array([token != end for token in said[0].ids])
    assert ((shift.rank_N > 0) == known).all()
    assert (shift.prob_N[~known] == 0).all() and (shift.kl_N[~known] == 0).all()
    spelled = {name: base.chat.ids(text) for name, text in (("start", ADDED[1]), ("end", ADDED[2]))}
    assert len(spelled["end"]) > 1
    read = [*spelled["start"], *words, *more, *spelled["end"], *words]
    logits = base.model(torch.tensor([read])).logits[0].log_softmax(-1)
    first = len(spelled["start"]) + len(words)
    second = first + len(more) + len(spelled["end"])
    places = [*range(first, first + len(more)), *range(second, second + len(words))]
    assert shift.prob_N[known] == pytest.approx([logits[p - 1, read[p]].exp().item() for p in places], rel=1e-6)
    found = shift_figures(shift, said, tokenizer)
    assert found["num_added"] == 2 and found["num_tokens"] == known.sum()
    assert found["answers"][0]["texts"][-1] == "<|im_end|>" and found["answers"][0]["ranks"][-1] == 0


def test_kl_is_over_the_shared_vocabulary():
    """The tuned model's weight on tokens that the base lacks is left out of both distributions."""
    hidden_ND = torch.eye(3, dtype=torch.float64)[:2]
    base_head = torch.log(torch.tensor([[0.5, 0.3], [0.25, 0.3], [0.25, 0.4]], dtype=torch.float64))
    tuned_head = torch.log(torch.tensor([[0.1, 0.2], [0.2, 0.2], [0.2, 0.1], [0.5, 0.5]], dtype=torch.float64))

    def head(columns_VN):
        return Head(torch.cat([columns_VN, torch.zeros(len(columns_VN), 1, dtype=torch.float64)], 1))

    said = [AnswerTokens("p:1", (0,), (1, 0))]
    both = (TargetStates(hidden_ND, head(base_head)), TargetStates(hidden_ND, head(tuned_head)))
    shift = measure_shift(said, *both, frozenset({0, 1, 2}))
    p, q = np.array([0.2, 0.4, 0.4]), np.array([0.5, 0.25, 0.25])
    assert shift.kl_N[0] == pytest.approx((p * np.log(p / q)).sum())
    assert shift.rank_N.tolist() == [2, 2] and shift.prob_N == pytest.approx([0.25, 0.3])


def test_shares_and_positions_are_counted():
    model = tiny_evaluated()
    said = [AnswerTokens("p:1", (5,), (10, 11, 12)), AnswerTokens("p:2", (5,), (10, 13))]
    shift, _ = shift_of(model, model, said)
    ranks = np.array([1, 2, 4, 9, 3])
    shift = type(shift)(shift.answer_N, shift.position_N, shift.token_N, ranks, shift.prob_N, np.arange(5.0))
    found = shift_figures(shift, said, model.chat.tokenizer)
    assert {name: own["value"] for name, own in found["shares"].items()} == {
        "unshifted": 0.2,
        "marginal": 0.4,
        "shifted": 0.4,
    }
    first, second, third = found["by_position"]
    assert (first["position"], first["num"], first["unshifted"], first["shifted"]) == (1, 2, 0.5, 0.5)
    assert first["mean_kl"] == 1.5 and second["marginal"] == 1.0 and third["num"] == 1
    shifted = {row["token"]: (row["num"], row["num_shifted"]) for row in found["most_shifted"]}
    decode = model.chat.tokenizer.decode
    assert shifted == {decode([10]): (2, 1), decode([12]): (1, 1)}


def test_other_vocabularies_and_too_long_answers_are_rejected():
    with pytest.raises(ModelError, match="have different tokenizers"):
        shared_ids({"a": 0, "b": 1}, {"a": 1, "b": 0}, 2)
    model = tiny_evaluated()
    with pytest.raises(DataError, match="p:1: with its answer it has 300 tokens"):
        target_states(model, [tuned_tree(AnswerTokens("p:1", (5,) * 290, (5,) * 10))])


@pytest.mark.parametrize("lacking", ["base", "tuned"])
def test_a_token_without_a_row_in_one_head_is_not_shared(lacking):
    """A tokenizer may have more tokens than its model has rows (Llama 2's <pad>)."""
    full = tiny_evaluated()
    last = len(full.chat.tokenizer) - 1
    models = {"base": full, "tuned": tiny_evaluated(seed=2)} | {lacking: tiny_evaluated(seed=3, rows=last)}
    drawn = tuple(np.random.default_rng(0).integers(5, last, size=12).tolist())
    words = full.chat.ids("the user")
    said = [AnswerTokens("p:1", words, (*drawn[:6], *([last] if lacking == "base" else []), *drawn[6:]))]
    shift, shared = shift_of(models["base"], models["tuned"], said)
    assert shared == frozenset(range(last))
    assert ((shift.rank_N == 0) == (shift.token_N == last)).all() and len(shift.rank_N) == 12 + (lacking == "base")
    assert (shift.kl_N[shift.rank_N > 0] > 0).all()
