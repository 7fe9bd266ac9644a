"""Batched decoding gives what one prompt at a time gives, and stops where it should."""

import pytest
import torch

from preceptor.errors import ModelError
from preceptor.evaluate.generate import Sampling, generate
from tiny import seeing_model, tiny_model, tiny_tokenizer

CONTEXTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [8, 3]]


def greedy(model, context, stop, limit):
    """One token at a time, no cache, no padding."""
    ids = list(context)
    for _ in range(limit):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            return ids[len(context) :], True
        ids.append(token)
    return ids[len(context) :], False


def test_batches_equal_single_prompts_and_keep_their_order():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    free = [greedy(model, context, set(), 12)[0] for context in CONTEXTS]
    stop = {free[0][4], free[2][7]}
    expected = [greedy(model, context, stop, 12) for context in CONTEXTS]
    assert {stopped for _, stopped in expected} == {True, False} or all(stopped for _, stopped in expected)
    for batch_size in (1, 3, 64):
        answers = generate(model, tokenizer, CONTEXTS, sorted(stop), 12, batch_size=batch_size)
        assert [(list(answer.ids), answer.stopped) for answer in answers] == expected
        assert [answer.text for answer in answers] == [tokenizer.decode(ids) for ids, _ in expected]


@pytest.mark.parametrize("kept", [True, False])
def test_answers_that_have_ended_are_no_longer_computed(kept, monkeypatch):
    """Of unequal answers, those that go on are passed alone, and stay those of one prompt at a time."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    contexts = [[first, *rest] for first in range(20, 24) for rest in CONTEXTS]
    free = [greedy(model, context, set(), 24)[0] for context in contexts]
    stop = {ids[2] for ids in free[:2]}
    expected = [greedy(model, context, stop, 24) for context in contexts]
    assert 8 <= sum(stopped for _, stopped in expected) < 16
    whole, sizes, reused = model.generate, [], []

    def counted(input_ids, **settings):
        sizes.append(len(input_ids))
        reused.append("past_key_values" in settings)
        return whole(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", counted)
    if not kept:  # a cache of which no rows can be taken
        monkeypatch.setattr("preceptor.evaluate.generate._KEYS_AND_VALUES", ())
    answers = generate(model, tokenizer, contexts, sorted(stop), 24)
    assert [(list(answer.ids), answer.stopped) for answer in answers] == expected
    until = [[tokenizer.decode(ids[2:10])] for ids in free]
    ended = generate(model, tokenizer, contexts, sorted(stop), 24, until=until)
    for answer, ids, (text,) in zip(ended, free, until, strict=True):
        assert list(answer.ids) == ids[: len(answer.ids)] and (answer.stopped or text in answer.text)
    assert sizes.count(16) == 2 and min(sizes) < 9 and any(reused) == kept


def _passes_of(model, tokenizer, monkeypatch, num=9):
    """How many it takes for sixteen prompts, of which half end early; the answers are those of one prompt at a time."""
    contexts = [[first, *rest] for first in range(20, 24) for rest in CONTEXTS]
    alone = [generate(model, tokenizer, [context], [], 16)[0].ids for context in contexts]
    stop = sorted({ids[1] for ids in alone[:num]})
    expected = [generate(model, tokenizer, [context], stop, 16)[0] for context in contexts]
    whole, sizes = model.generate, []

    def counted(input_ids, **settings):
        sizes.append(len(input_ids))
        return whole(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", counted)
    assert generate(model, tokenizer, contexts, stop, 16) == expected
    assert sum(answer.stopped for answer in expected) > 6
    return len(sizes)


@pytest.mark.parametrize("kind", ["qwen3_vl"])
def test_a_model_that_keeps_positions_of_the_whole_batch(kind, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = seeing_model(kind, vocab_size=len(tokenizer)).double()
    assert _passes_of(model, tokenizer, monkeypatch) == 1


def test_a_model_that_fills_no_cache(monkeypatch):
    tokenizer = tiny_tokenizer()
    model = tiny_model("openai-gpt", vocab_size=len(tokenizer)).double()
    assert _passes_of(model, tokenizer, monkeypatch, num=2) > 1


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"cache_implementation": "dynamic"}, 1),
        ({"begin_suppress_tokens": [7]}, 1),
        ({"min_new_tokens": 2}, 1),
        ({"repetition_penalty": 1.2}, 2),
        ({"num_beams": 2}, 2),
    ],
)
def test_settings_of_the_models_own(settings, passes, monkeypatch):
    """What counts from the beginning of an answer is counted once; beams are not taken."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert (_passes_of(model, tokenizer, monkeypatch) > 1) == (passes > 1)


CUTS = {"top_k": 1, "top_p": 1e-6, "min_p": 1.0, "top_h": 1e-6, "typical_p": 1e-6}
CUTS |= {"epsilon_cutoff": 0.9, "eta_cutoff": 0.9}
OTHERS = {"stop_strings": ["a"], "token_healing": True, "num_return_sequences": 2, "prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize(("name", "value"), [*CUTS.items(), *OTHERS.items()])
def test_settings_of_the_models_own_that_are_not_taken(name, value):
    """Sampled answers are drawn from all tokens, and each context has one answer that ends at a stop token."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    samplings = (None, Sampling(2.0, 5))
    expected = [generate(model, tokenizer, CONTEXTS, [0], 12, sampling=sampling) for sampling in samplings]
    assert expected[0] != expected[1]
    setattr(model.generation_config, name, value)
    assert [generate(model, tokenizer, CONTEXTS, [0], 12, sampling=sampling) for sampling in samplings] == expected
    assert getattr(model.generation_config, name) == value, "left as it was: it is saved with the model"


def test_the_model_is_left_in_its_mode():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).train()
    generate(model, tokenizer, CONTEXTS, [0], 2)
    assert model.training
    assert generate(model, tokenizer, [], [0], 2) == []


@pytest.mark.parametrize("fits", [3, 2, 1])
def test_the_batch_is_halved_until_it_fits_in_memory(monkeypatch, fits):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    expected = generate(model, tokenizer, CONTEXTS, [0], 4)
    whole, sizes = model.generate, []

    def in_little_memory(input_ids, **settings):
        sizes.append(len(input_ids))
        if len(input_ids) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", in_little_memory)
    assert generate(model, tokenizer, CONTEXTS, [0], 4) == expected
    assert sizes == {3: [4, 2, 2], 2: [4, 2, 2], 1: [4, 2, 1, 1, 1, 1]}[fits]


def test_an_answer_that_does_not_fit_alone_is_said(monkeypatch):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))

    def never(**_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", never)
        with pytest.raises(ModelError, match=r"answers of 4 tokens to prompts of 1 tokens do not fit.*max_new"):
            generate(model, tokenizer, CONTEXTS, [0], 4)
        patch.setattr(model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, tokenizer, CONTEXTS, [0], 4)


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_said(value, sampling):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[:] = value
    with pytest.raises(ModelError, match="logits are not finite"):
        generate(model, tokenizer, CONTEXTS, [0], 4, sampling=sampling)


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0)])
@pytest.mark.parametrize("token", [1, 4])
def test_one_token_of_one_answer_is_enough(token, sampling):
    """Also where one logit of many is NaN; tokens that the model's own settings exclude are none of these."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    model.generation_config.suppress_tokens = [7]
    passes = []

    def spoil(module, arguments, output):
        passes.append(len(output.logits))
        if len(passes) == token:
            output.logits[1, -1, 5] = float("nan")

    expected = generate(model, tokenizer, CONTEXTS, [], 4, sampling=sampling)
    with model.register_forward_hook(spoil):
        with pytest.raises(ModelError, match="logits are not finite"):
            generate(model, tokenizer, CONTEXTS, [], 4, sampling=sampling)
        assert passes == [4] * 4, "no step waits for it: it is known at the end"
        passes[:] = range(9)
        assert generate(model, tokenizer, CONTEXTS, [], 4, sampling=sampling) == expected


@pytest.mark.parametrize("stop", [[], [300, 9]])
def test_a_pad_token_without_a_row(stop):
    """A tokenizer may have more tokens than the model has rows, as Llama 2's with <pad>."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    expected = generate(model, tokenizer, CONTEXTS, stop[1:], 12)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
    stop = [tokenizer.pad_token_id, *stop[1:]] if stop else []
    assert generate(model, tokenizer, CONTEXTS, stop, 12) == expected
