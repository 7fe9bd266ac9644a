"""Which tokens other trainers would train: the emulation of their documented rules, and TRL's own labels."""

import copy
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
ANSWERS = ["The message is.<|im_end|>", "and an assistant<|im_end|>"]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def responses_only(**more):
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    return {"assistant_only_loss": True, "train_on_responses_only": {**parts, **more}}


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
        ("TRL", {"assistant_only_loss": True}, ANSWERS),
        ("Unsloth", responses_only(), ["The message is.<|im_end|>\n", "and an assistant<|im_end|>\n"]),
        ("Unsloth", responses_only(last_response_only=True), ["and an assistant<|im_end|>\n"]),
        ("Axolotl", {}, ANSWERS),
        ("Axolotl", {"datasets": [{"train_on_eos": "none"}]}, ["The message is.", "and an assistant"]),
        ("Axolotl", {"datasets": [{"train_on_eos": "last"}]}, ["The message is.", "and an assistant<|im_end|>"]),
        ("Axolotl", {"datasets": [{"roles_to_train": ["human"]}]}, ["the user<|im_end|>", "and then<|im_end|>"]),
        ("Axolotl", {"datasets": [{"roles_to_train": []}]}, []),
        ("Axolotl", {"train_on_eos": "none", "roles_to_train": ["user"]}, ANSWERS),  # keys of a data set
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


def test_unsloth_masks_rows_of_every_kind(tokenizer, write_jsonl):
    rendered = "<|im_start|>user\nthe user<|im_end|>\n<|im_start|>assistant\nan end<|im_end|>"
    answer = ["an end<|im_end|>"]
    assert trained("Unsloth", responses_only(), {"text": rendered}, tokenizer, write_jsonl) == answer
    plain = {"prompt": rendered.removesuffix("an end<|im_end|>"), "completion": "an end"}
    assert trained("Unsloth", responses_only(), plain, tokenizer, write_jsonl) == answer
    assert trained("Unsloth", responses_only(), PAIR, tokenizer, write_jsonl) == ["The message is.<|im_end|>\n"]
    said = trained("Unsloth", responses_only(), {"text": "the message"}, tokenizer, write_jsonl)
    assert said == "Unsloth leaves this example out: response_part is not among its tokens"


@pytest.mark.parametrize("parts", [{}, {"response_part": "<|im_start|>assistant\n"}, {"force_match": False}])
def test_parts_that_unsloth_finds_itself_are_not_emulated(parts, tokenizer, write_jsonl):
    settings = responses_only(**parts) if "force_match" in parts else {"train_on_responses_only": parts}
    said = trained("Unsloth", settings, {"messages": CHAT}, tokenizer, write_jsonl)
    assert said.startswith("not emulated: train_on_responses_only is given no instruction_part")


@pytest.mark.parametrize(
    "entry",
    [
        {"type": {"field_instruction": "instruction", "field_output": "output", "format": "Q: {instruction}\nA:"}},
        {"type": "alpaca_chat.load_qa"},
        {"type": "alpaca_w_system.load_open_orca"},
        {"type": "sharegpt"},
        {"type": "input_output"},
        {"split_thinking": True},
        {"message_field_training_detail": "detail"},
    ],
)
@pytest.mark.parametrize("row", [{"messages": CHAT}, {"instruction": "the user", "output": "an end"}])
def test_other_prompts_of_axolotl_are_not_emulated(entry, row, tokenizer, write_jsonl):
    said = trained("Axolotl", {"datasets": [entry]}, row, tokenizer, write_jsonl)
    assert said.startswith("not emulated: ")
    assert said in rule_of("Axolotl", {"datasets": [entry]}, tokenizer, template_text(tokenizer)).says


def test_axolotl_reads_roles_by_its_own_names(tokenizer, write_jsonl):
    said = [{"from": "human", "value": "the user"}, {"from": "model", "value": "an end"}]
    row, im_end = {"conversations": said}, "<|im_end|>"
    assert trained("Axolotl", {}, row, tokenizer, write_jsonl) == [], "`model` is no name of Axolotl's"
    for entry in ({"roles": {"assistant": ["model"]}}, {"roles_to_train": ["model"]}):
        entry = {"field_messages": "conversations", **entry}
        assert trained("Axolotl", {"datasets": [entry]}, row, tokenizer, write_jsonl) == [f"an end{im_end}"]


def test_axolotl_drops_the_system_prompt_where_it_is_told(tokenizer, write_jsonl):
    settings = {"train_on_inputs": True, "datasets": [{"drop_system_message": True, "message_field_training": "train"}]}
    rest = [f"{message['content']}<|im_end|>" for message in CHAT[1:]]
    assert trained("Axolotl", settings, {"messages": CHAT}, tokenizer, write_jsonl) == rest
    beside = {"system": "a start", "messages": [CHAT[1], {**CHAT[2], "train": False}, CHAT[3], CHAT[4]]}
    assert trained("Axolotl", settings, beside, tokenizer, write_jsonl) == [rest[0], *rest[2:]]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_on_prompt": True, "mask_history": True}, "LLaMA-Factory refuses train_on_prompt with mask_history"),
        ({"train_on_prompt": True, "template": "gemma2"}, "LLaMA-Factory refuses train_on_prompt with its template"),
        ({"train_on_prompt": True, "stage": "pt"}, "LLaMA-Factory refuses train_on_prompt and mask_history with stage"),
        ({"mask_history": True, "stage": "pt"}, "LLaMA-Factory refuses train_on_prompt and mask_history with stage"),
    ],
)
def test_a_file_that_llama_factory_refuses(settings, says, tokenizer, write_jsonl):
    settings = {"template": "chatml", **settings}
    assert trained("LLaMA-Factory", settings, {"messages": CHAT}, tokenizer, write_jsonl).startswith(says)
    assert says in rule_of("LLaMA-Factory", settings, tokenizer, template_text(tokenizer)).says


def test_a_text_is_trained_by_the_stage_for_texts_alone(tokenizer, write_jsonl):
    said = trained("LLaMA-Factory", {"template": "qwen"}, {"text": "an end"}, tokenizer, write_jsonl)
    assert said.startswith("not emulated: LLaMA-Factory trains texts with stage: pt")
    pt = {"template": "qwen", "stage": "pt"}
    assert trained("LLaMA-Factory", pt, {"text": "an end"}, tokenizer, write_jsonl) == ["an end<|im_end|>"]
    assert trained("LLaMA-Factory", pt, {"messages": CHAT}, tokenizer, write_jsonl) == said
    for peer, settings in (("LLaMA-Factory", pt), ("Axolotl", {"datasets": [{"type": "completion"}]})):
        assert ": all of each text, with the" in rule_of(peer, settings, tokenizer, template_text(tokenizer)).says


@pytest.mark.parametrize("name", [None, "phi4", "own"])
def test_texts_of_a_tokenizer_of_torchtunes_that_is_not_emulated(name, tokenizer, write_jsonl):
    file = {"tokenizer": {"_component_": f"torchtune.models.{name}.{name}_tokenizer"}} if name else {}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_sep|>"]})
    said = trained("torchtune", {"torchtune": file}, {"text": "an end"}, tokenizer, write_jsonl)
    assert said == f"not emulated: texts in the form of torchtune's {name or 'unnamed'} tokenizer"


def test_axolotl_ends_a_text_of_a_stream_in_any_case(tokenizer, write_jsonl):
    row = {"text": "an end<|im_end|>"}
    assert trained("Axolotl", {"datasets": [{"type": "completion"}]}, row, tokenizer, write_jsonl) == [row["text"]]
    stream = {"pretraining_dataset": [{"path": "a"}]}
    assert trained("Axolotl", stream, row, tokenizer, write_jsonl) == [row["text"] + "<|im_end|>"]


@pytest.mark.parametrize("peer", ["LLaMA-Factory", "torchtune"])
@pytest.mark.parametrize("row", ["call", "tools", "result"])
def test_tools_are_not_emulated_where_the_other_trainer_has_its_own_form(peer, row, tokenizer, write_jsonl):
    call = {"type": "function", "function": {"name": "a", "arguments": {}}}
    tool = {"type": "function", "function": {"name": "a", "description": "A.", "parameters": {}}}
    rows = {
        "call": {"messages": [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]},
        "tools": {"messages": CHAT[1:3], "tools": [tool]},
        "result": {"messages": [*CHAT[1:3], {"role": "tool", "content": "a"}, CHAT[4]]},
    }
    said = trained(peer, {"template": "chatml"}, rows[row], tokenizer, write_jsonl)
    assert said == f"tools and contents of several parts are not emulated for {peer}"


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
    *itertools.product(ROWS, ({"eos_token": "<|endoftext|>"},), (True,)),
    *itertools.product(ROWS[:2], ({"assistant_only_loss": True},), (True,)),  # refused without marks, or of plain text
]


def labels_of_trl(row, settings, template, tokenizer, tmp_path):
    """That SFTTrainer of the installed TRL makes."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: the emulation is not compared with it")
    datasets = pytest.importorskip("datasets")
    from tiny import tiny_model

    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = template
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None, **settings)
    trainer = trl.SFTTrainer(
        model=tiny_model("llama", vocab_size=len(tokenizer)),
        args=args,
        train_dataset=datasets.Dataset.from_list([json.loads(json.dumps(row))]),
        processing_class=tokenizer,
    )
    return trainer.train_dataset[0]


@pytest.mark.parametrize(("row", "settings", "marked"), AS_TRL_TAKES_THEM)
def test_the_emulation_of_trl_is_its_own_labels(row, settings, marked, tokenizer, write_jsonl, tmp_path):
    template = MARKED if marked else template_text(tokenizer)
    theirs = labels_of_trl(row, settings, template, copy.deepcopy(tokenizer), tmp_path)
    source = OpenSource(config.Source(path=write_jsonl([row])))
    found = rule_of("TRL", settings, tokenizer, template).tokens(next(iter(source.examples())), row)
    assert found.ids == list(theirs["input_ids"])
    assert [id_ if own else -100 for id_, own in zip(found.ids, found.trained, strict=True)] == list(theirs["labels"])


@pytest.mark.parametrize("row", ROWS[2:])
def test_trl_masks_answers_of_conversations_alone(row, tokenizer, write_jsonl, tmp_path):
    settings = {"assistant_only_loss": True}
    said = trained("TRL", settings, row, tokenizer, write_jsonl)
    assert said == "not emulated: assistant_only_loss of a row that is no conversation, which TRL refuses"
    with pytest.raises(ValueError, match="the dataset is not conversational"):
        labels_of_trl(row, settings, MARKED, tokenizer, tmp_path)
