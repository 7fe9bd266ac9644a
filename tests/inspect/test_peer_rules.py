"""Which tokens other trainers would train: the emulation of their documented rules, and TRL's own labels."""

import itertools
import json

import pytest

import peer_labels
from preceptor import config
from preceptor.chat.template import load_template
from preceptor.data.sources import OpenSource
from preceptor.inspect.peer_rules import rule_of
from tiny import tiny_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = [
    {"role": "system", "content": "a start"},
    {"role": "user", "content": "the user"},
    {"role": "assistant", "content": "The message is."},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "and an assistant"},
]
PAIR = {"prompt": [CHAT[1]], "completion": [CHAT[2]]}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    found = tiny_tokenizer(special_tokens=SPECIAL)
    found.eos_token = "<|im_end|>"
    return found


def template_text(tokenizer):
    return load_template("chatml", tokenizer).text


def trained(peer, settings, row, tokenizer, write_jsonl, template=None):
    """The trained pieces of text, joined where they touch."""
    source = OpenSource(config.Source(path=write_jsonl([row])))
    (example,) = source.examples()
    found = rule_of(peer, settings, tokenizer, template or template_text(tokenizer)).tokens(example, row)
    if isinstance(found, str):
        return found
    runs, before = [], False
    for id_, own in zip(found.ids, found.trained, strict=True):
        if own:
            runs = [*runs[:-1], [*runs[-1], id_]] if before else [*runs, [id_]]
        before = own
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("peer", "settings", "expected"),
    [
        ("TRL", {"assistant_only_loss": True}, ["The message is.<|im_end|>", "and an assistant<|im_end|>"]),
        (
            "Unsloth",
            {
                "assistant_only_loss": True,
                "train_on_responses_only": {
                    "instruction_part": "<|im_start|>user\n",
                    "response_part": "<|im_start|>assistant\n",
                },
            },
            ["The message is.<|im_end|>\n", "and an assistant<|im_end|>\n"],
        ),
        ("Axolotl", {}, ["The message is.<|im_end|>", "and an assistant<|im_end|>"]),
        ("Axolotl", {"train_on_eos": "none"}, ["The message is.", "and an assistant"]),
        ("Axolotl", {"train_on_eos": "last"}, ["The message is.", "and an assistant<|im_end|>"]),
        ("Axolotl", {"roles_to_train": ["user"]}, ["the user<|im_end|>", "and then<|im_end|>"]),
        ("LLaMA-Factory", {"template": "chatml"}, ["The message is.<|im_end|>\n", "and an assistant<|im_end|>\n"]),
        (
            "LLaMA-Factory",
            {"template": "qwen3_nothink"},
            ["The message is.<|im_end|>\n", "and an assistant<|im_end|>\n"],
        ),
        ("LLaMA-Factory", {"template": "chatml", "mask_history": True}, ["and an assistant<|im_end|>\n"]),
        (
            "torchtune",
            {},
            [
                "<|im_start|>assistant\nThe message is.<|im_end|>\n",
                "<|im_start|>assistant\nand an assistant<|im_end|>\n",
            ],
        ),
    ],
)
def test_what_a_conversation_is_trained_on(peer, settings, expected, tokenizer, write_jsonl):
    assert trained(peer, settings, {"messages": CHAT}, tokenizer, write_jsonl) == expected


@pytest.mark.parametrize(
    ("peer", "settings"),
    [
        ("TRL", {}),
        ("LLaMA-Factory", {"template": "chatml", "train_on_prompt": True}),
        ("torchtune", {"train_on_inputs": True}),
    ],
)
def test_all_of_a_conversation(peer, settings, tokenizer, write_jsonl):
    (whole,) = trained(peer, settings, {"messages": CHAT}, tokenizer, write_jsonl)
    assert whole.startswith("<|im_start|>system") and "the user" in whole and "an assistant<|im_end|>" in whole


def test_axolotl_with_inputs_trains_contents_and_ends_but_no_headers(tokenizer, write_jsonl):
    found = trained("Axolotl", {"train_on_inputs": True}, {"messages": CHAT}, tokenizer, write_jsonl)
    assert found == [f"{message['content']}<|im_end|>" for message in CHAT]


def test_axolotl_trains_no_end_that_is_not_its_eos(tokenizer, write_jsonl):
    tokenizer.eos_token = "<|endoftext|>"
    row = {"messages": CHAT}
    assert trained("Axolotl", {}, row, tokenizer, write_jsonl) == ["The message is.", "and an assistant"]
    told = {"eot_tokens": ["<|im_end|>"]}
    assert trained("Axolotl", told, row, tokenizer, write_jsonl)[0] == "The message is.<|im_end|>"


def test_trl_of_a_prompt_and_its_completion(tokenizer, write_jsonl):
    assert trained("TRL", {}, PAIR, tokenizer, write_jsonl) == ["The message is.<|im_end|>\n"]
    (whole,) = trained("TRL", {"completion_only_loss": False}, PAIR, tokenizer, write_jsonl)
    assert whole.startswith("<|im_start|>user")
    plain = {"prompt": "a user ", "completion": "and an assistant"}
    found = trained("TRL", {}, plain, tokenizer, write_jsonl)
    assert found == [" and an assistant<|im_end|>"], "from where the tokens of both parts differ, here a space earlier"
    assert trained("TRL", {}, {"text": "the message"}, tokenizer, write_jsonl) == ["the message<|im_end|>"]


def test_what_is_not_emulated_is_said(tokenizer, write_jsonl):
    for name in ("breeze", "yuan"):
        own = rule_of("LLaMA-Factory", {"template": name}, tokenizer, template_text(tokenizer))
        assert own.says.endswith(
            f"the model's own chat template, in place of its template '{name}', which is not emulated"
        )
    unnamed = rule_of("LLaMA-Factory", {}, tokenizer, template_text(tokenizer))
    assert unnamed.says.endswith("what it reads off the model's own chat template: the file names no template")
    tool = [
        *CHAT[:2],
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "a", "arguments": {}}}]},
    ]
    assert "tool" in trained("LLaMA-Factory", {"template": "chatml"}, {"messages": tool}, tokenizer, write_jsonl)
    assert "documented rule" in own.says


@pytest.mark.parametrize("peer", ["LLaMA-Factory", "torchtune", "Axolotl"])
def test_the_emulations_are_the_labels_that_the_trainers_made(peer):
    """benchmarks/peer_labels.py recorded them from the trainers' own code."""
    recorded = json.loads(peer_labels.RESULT.read_text(encoding="utf-8"))[peer]["cases"]
    ours: dict[str, dict[str, str]] = {}
    for case in peer_labels.cases():
        if case.peer == peer:
            ours.setdefault(case.name, {})[case.row] = peer_labels.digest(peer_labels.ours(case))
    assert ours.keys() == recorded.keys()
    assert {name: rows for name, rows in ours.items() if rows != recorded[name]} == {}


def test_a_torchtune_tokenizer_that_this_model_cannot_stand_for_is_named(tokenizer, write_jsonl):
    file = {"tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer"}}
    said = trained("torchtune", {"torchtune": file}, {"messages": CHAT}, tokenizer, write_jsonl)
    assert said.startswith("this tokenizer has no <|begin_of_text|>")


ROWS = ({"messages": CHAT}, PAIR, {"prompt": "a user ", "completion": "and an assistant"}, {"text": "the message"})
AS_TRL_TAKES_THEM = [
    *itertools.product(ROWS, ({}, {"completion_only_loss": False}), (True, False)),
    *itertools.product(ROWS[:2], ({"assistant_only_loss": True},), (True,)),  # refused without marks, or of plain text
]


@pytest.mark.parametrize(("row", "settings", "marked"), AS_TRL_TAKES_THEM)
def test_the_emulation_of_trl_is_its_own_labels(row, settings, marked, tokenizer, write_jsonl, tmp_path):
    """Against the labels that SFTTrainer of the installed TRL makes."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: the emulation is not compared with it")
    datasets = pytest.importorskip("datasets")
    from tiny import tiny_model

    tokenizer.pad_token = "<|endoftext|>"
    template = MARKED if marked else template_text(tokenizer)
    tokenizer.chat_template = template
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None, **settings)
    trainer = trl.SFTTrainer(
        model=tiny_model("llama", vocab_size=len(tokenizer)),
        args=args,
        train_dataset=datasets.Dataset.from_list([json.loads(json.dumps(row))]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    source = OpenSource(config.Source(path=write_jsonl([row])))
    found = rule_of("TRL", settings, tokenizer, template).tokens(next(iter(source.examples())), row)
    assert found.ids == list(theirs["input_ids"])
    assert [id_ if own else -100 for id_, own in zip(found.ids, found.trained, strict=True)] == list(theirs["labels"])
