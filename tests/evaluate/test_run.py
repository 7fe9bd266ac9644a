"""What a model chooses, predicts and answers, against direct computations on a tiny model in float64."""

import math
from dataclasses import replace

import pytest
import torch

from preceptor.chat.format import ChatFormat
from preceptor.chat.template import load_template
from preceptor.errors import DataError, ModelError, TemplateError
from preceptor.evaluate.figures import comparison, figures, summary
from preceptor.evaluate.likelihood import segment_losses
from preceptor.evaluate.model import EvaluatedModel, default_dtype, load_evaluated_model
from preceptor.evaluate.run import choice_tree, run_task, text_windows
from preceptor.evaluate.tasks import Task, TaskItem, TaskPrompt
from tiny import tiny_model, tiny_tokenizer

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER = {"role": "user", "content": "the user and"}


def tiny_evaluated(kind="llama", chat=False, alone=False, bos=False, stop=()):
    tokenizer = tiny_tokenizer(special_tokens=CHATML)
    if bos:
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.add_bos_token = True
    model = tiny_model(kind, vocab_size=len(tokenizer)).double()
    template = load_template("chatml", tokenizer) if chat else None
    chat = ChatFormat(tokenizer, template, tuple(stop) or (tokenizer.eos_token_id,))
    return EvaluatedModel("tiny", model, chat, alone)


def log_likelihood(model, ids, start):
    """Of the tokens from `start` on, one forward pass, no cache, no packing."""
    log_probs_TV = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
    return sum(log_probs_TV[place - 1, ids[place]].item() for place in range(start, len(ids)))


def choice(text="the user", choices=(" and the message", " of a start", "s"), answer=0, messages=None):
    given = TaskPrompt(messages=messages) if messages else TaskPrompt(text=text)
    return TaskItem("task:1", given, choices=choices, answer=answer)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_scored_as_by_a_direct_computation(chat, alone):
    evaluated = tiny_evaluated(chat=chat, alone=alone)
    tokenizer = evaluated.chat.tokenizer
    item = choice(messages=(USER,) if chat else None)
    if chat:
        context = tokenizer("<|im_start|>user\nthe user and<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        wholes = [context + tokenizer(text)["input_ids"] for text in item.choices]
        start = len(context)
    else:
        context = tokenizer("the user")["input_ids"]
        wholes = [tokenizer("the user" + text)["input_ids"] for text in item.choices]
        start = next(i for i in range(99) if len({tuple(ids[: i + 1]) for ids in [[*context, -1], *wholes]}) > 1)
    expected = [log_likelihood(evaluated.model, ids, start) for ids in wholes]
    (result,) = run_task(evaluated, Task("t", "multiple choice", (item,)), 8, 2)
    assert result.record["log_likelihoods"] == pytest.approx(expected, rel=1e-6)
    per_byte = [value / len(text.encode()) for value, text in zip(expected, item.choices, strict=True)]
    assert result.record["chosen"] == max(range(3), key=expected.__getitem__)
    assert result.record["chosen_norm"] == max(range(3), key=per_byte.__getitem__)
    assert result.values["right"] == (result.record["chosen"] == 0)


@pytest.mark.parametrize("chat", [False, True])
def test_a_delimiter_is_read_before_each_choice_and_is_no_part_of_its_length(chat):
    evaluated, delimiter, texts = tiny_evaluated(chat=chat), " the message of the user and the start", (" q", " q x z")
    given = (USER,) if chat else None
    apart = replace(choice(choices=texts, messages=given), delimiter=delimiter)
    joined = choice(choices=tuple(delimiter + text for text in texts), messages=given)
    ours, plain = (run_task(evaluated, Task("t", "multiple choice", (item,)), 8, 2)[0] for item in (apart, joined))
    values = ours.record["log_likelihoods"]
    assert values == plain.record["log_likelihoods"], "the same tokens"
    assert ours.record["choices"] == plain.record["choices"] == list(joined.choices)
    per_byte = [value / len(text.encode()) for value, text in zip(values, texts, strict=True)]
    assert ours.record["chosen_norm"] == per_byte.index(max(per_byte)) == 1
    assert plain.record["chosen_norm"] == 0, "this test needs a delimiter that matters"


def test_weights_are_in_bfloat16_by_default_where_files_and_gpu_have_it(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has_it, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert default_dtype(torch.bfloat16, gpu) == expected
        assert {default_dtype(torch.float32, gpu), default_dtype(None, gpu), default_dtype(torch.bfloat16, cpu)} == {
            "float32"
        }


def test_the_shortest_and_the_best_per_byte_choice_may_differ():
    items = tuple(choice(choices=(" and", " and the message of a start"), answer=at) for at in (0, 1))
    results = run_task(tiny_evaluated(), Task("t", "multiple choice", items), 8, 2)
    assert results[0].record["chosen"] == 0, "a longer text is never likelier than its own beginning"
    assert {r.values["right"] for r in results} == {0.0, 1.0}
    found = figures(Task("t", "multiple choice", items), results)
    assert (
        found["acc"].value == 0.5 and summary(Task("t", "multiple choice", items), results)["counts"]["chance"] == 0.5
    )


def test_choices_share_what_their_tokens_share_and_no_more():
    """`message` and `messages` part in the middle of a word: all are scored from the first token that may differ."""
    evaluated = tiny_evaluated()
    tree = choice_tree(evaluated, choice("the mess", ("age", "ages")))
    ids = [tree.segments[0].ids + branch.ids for branch in tree.segments[1:]]
    assert [evaluated.chat.tokenizer.decode(each) for each in ids] == ["the message", "the messages"]
    assert [list(each) for each in ids] == [
        evaluated.chat.tokenizer(text)["input_ids"] for text in ("the message", "the messages")
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_bits_per_byte_against_a_hand_computation(bos):
    evaluated = tiny_evaluated(bos=bos)
    text = "the message — of a user"
    ids = evaluated.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = [evaluated.chat.tokenizer.bos_token_id, *ids] if bos else ids
    nats = -log_likelihood(evaluated.model, whole, 1)
    num_bytes = len(text.encode()) - (0 if bos else len(evaluated.chat.tokenizer.decode(ids[:1]).encode()))
    task = Task("t", "perplexity", (TaskItem("t:1", text=text), TaskItem("t:2", text=text)))
    results = run_task(evaluated, task, 8, 2)
    found, counted = figures(task, results)["bits_per_byte"], summary(task, results)["counts"]
    assert found.value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert counted["num_bytes"] == 2 * num_bytes and counted["num_tokens"] == 2 * (len(whole) - 1)
    assert counted["perplexity"] == pytest.approx(math.exp(nats / (len(whole) - 1)), rel=1e-6)


def test_a_group_without_a_token_to_predict_is_left_out():
    """Without a bos token, of a text of one token none is predicted."""
    texts = [("s", "one"), ("s", "one"), ("the user and the message", "many"), ("the start of it", "many")]
    items = tuple(TaskItem(f"t:{n}", text=text, groups={"kind": kind}) for n, (text, kind) in enumerate(texts))
    results = run_task(tiny_evaluated(), Task("texts", "perplexity", items), 8, 2)
    for reported in (summary, lambda task, own: comparison(task, own, own)):
        found = reported(Task("texts", "perplexity", items), results)
        assert found["groups"]["kind"].keys() == {"many"} and found["num_items"] == 4
        with pytest.raises(DataError, match="no token that could be predicted"):
            reported(Task("texts", "perplexity", items[:2]), results[:2])


def test_a_text_without_a_token_to_predict_is_an_error():
    task = Task("texts", "perplexity", (TaskItem("t:1", text="t"),))
    with pytest.raises(DataError, match="texts: its texts have no token that could be predicted"):
        figures(task, run_task(tiny_evaluated(), task, 8, 2))
    results = run_task(tiny_evaluated(), task, 8, 2)
    for report in (lambda: summary(task, results), lambda: comparison(task, results, results)):
        with pytest.raises(DataError, match="texts: its texts have no token that could be predicted"):
            report()


@pytest.mark.parametrize("bos", [(), (7,)])
def test_windows_predict_each_token_once_after_half_a_window_at_least(bos):
    ids = tuple(range(100, 137))
    trees = text_windows("t", bos, ids, 10)
    predicted, seen = [], []
    for tree in trees:
        assert tree.num_tokens <= 10
        read = [id_ for segment in tree.segments for id_ in segment.ids if id_ not in bos]
        assert read == list(range(read[0], read[-1] + 1)), "context and target follow on each other"
        target = tree.segments[-1].ids
        predicted += target
        seen.append(len(tree.segments[0].ids) if len(tree.segments) > 1 else 0)
    assert tuple(predicted) == ids
    assert all(num == 5 for num in seen[1:])
    assert text_windows("t", bos, ids[:9], 10)[0].num_tokens == 9 + len(bos)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_losses_are_those_of_each_chain_alone(kind):
    evaluated = tiny_evaluated(kind)
    trees = [choice_tree(evaluated, choice()), *text_windows("t", (), tuple(range(3, 60)), 20)]
    together = segment_losses(evaluated.model, trees, 512)
    alone = segment_losses(evaluated.model, trees, 512, alone=True)
    for ours, theirs in zip(together, alone, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            assert own.loss_N == pytest.approx(other.loss_N, rel=1e-6) and len(own) == len(other)


def test_answers_are_scored_and_their_stops_counted():
    evaluated = tiny_evaluated()
    (free,) = run_task(
        evaluated, Task("t", "generation", (TaskItem("t:1", TaskPrompt(text="the user"), ("x",)),)), 12, 4
    )
    words = free.record["answer"]
    assert free.record["stop"] == "length" and not free.values["right"]
    tokens = evaluated.chat.tokenizer(words, add_special_tokens=False)["input_ids"]
    items = (
        TaskItem("t:1", TaskPrompt(text="the user"), (words,)),
        TaskItem("t:2", TaskPrompt(text="the user"), (words[:5],), match="contains", groups={"family": "so"}),
        TaskItem("t:3", TaskPrompt(text="the user"), (words.partition(words[6])[0],), until=(words[6],)),
    )
    task = Task("t", "generation", items)
    results = run_task(evaluated, task, 12, 4)
    assert [result.values["right"] for result in results] == [1.0, 1.0, 1.0]
    assert [result.record["stop"] for result in results] == ["length", "length", "until"]
    found = summary(task, results)
    assert found["counts"]["length"] == 2 and found["counts"]["until"] == 1
    assert found["groups"] == {"family": {"so": found["groups"]["family"]["so"]}}
    assert found["repeated"].startswith("2 of 3 prompts got the same answer")
    stopping = tiny_evaluated(stop=[tokens[0], free.record["answer"] and tokens[-1]])
    (stopped,) = run_task(stopping, Task("t", "generation", items[:1]), 12, 4)
    assert stopped.record["stop"] == "stop_token"


def test_the_base_reads_messages_as_lines_and_the_tuned_model_through_its_template():
    messages = ({"role": "system", "content": "Be brief."}, USER)
    given = TaskPrompt(messages=messages)
    assert tiny_evaluated().prompt_text(given) == "Be brief.\nthe user and\n"
    chat = tiny_evaluated(chat=True)
    assert chat.prompt_text(given).endswith("<|im_start|>user\nthe user and<|im_end|>\n<|im_start|>assistant\n")
    assert chat.prompt_text(TaskPrompt(text="the user")) == "the user" and chat.is_plain(TaskPrompt(text="x"))
    assert chat.prompt_format == "chat template (chatml)" and tiny_evaluated().prompt_format == "plain text"


def test_an_item_longer_than_the_models_context_is_named():
    given = TaskPrompt(text="the user and the message of a user " * 30)
    with pytest.raises(DataError, match=r"task:9: \d+ tokens and an answer of 8 are more than the 256"):
        tiny_evaluated().context(given, "task:9", 8)
    with pytest.raises(TemplateError, match=r"has no token <\|im_start\|>"):
        load_evaluated_model("scholar", "float32", "cpu", "chatml")


@pytest.mark.parametrize("alone", [False, True])
def test_a_model_whose_logits_are_not_finite_chooses_and_answers_nothing(alone):
    """The first choice of all and the first token would be as good as any; of a text the figures show it."""
    evaluated = tiny_evaluated(alone=alone)
    with torch.no_grad():
        for parameter in evaluated.model.parameters():
            parameter.fill_(float("nan"))
    asked = TaskItem("task:1", TaskPrompt(text="the user"), ("x",))
    with pytest.raises(ModelError, match=r"^task:1: the model's logits are not finite"):
        run_task(evaluated, Task("t", "multiple choice", (choice(),)), 8, 2)
    with pytest.raises(ModelError, match="logits are not finite"):
        run_task(evaluated, Task("t", "generation", (asked,)), 8, 2)
    task = Task("t", "perplexity", (TaskItem("t:1", text="the user and"), TaskItem("t:2", text="the message")))
    assert all(math.isnan(result.values["nats"]) for result in run_task(evaluated, task, 8, 2))


def test_a_task_may_have_a_limit_of_its_own(monkeypatch):
    evaluated = tiny_evaluated(stop=[299])
    items = (TaskItem("t:1", TaskPrompt(text="the user"), ("x",)),)
    for own, expected in ((None, 6), (3, 3), (9, 9)):
        (result,) = run_task(evaluated, Task("t", "generation", items, max_new_tokens=own), 6, 4)
        assert result.values["num_tokens"] == expected and result.record["stop"] == "length"
    room = len(evaluated.context(items[0].prompt, "t:1")) + 7
    monkeypatch.setattr(type(evaluated), "max_tokens", room)
    (result,) = run_task(evaluated, Task("t", "generation", items, max_new_tokens=2048), 6, 4)
    assert result.values["num_tokens"] == 7, "as far as the context has room"
