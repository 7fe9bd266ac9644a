"""Names of other trainers: each leads to a key that exists, or to a sentence."""

import re

import pytest

from preceptor import config
from preceptor.config.peer_names import COUNTERPARTS, INSTEAD_OF_SECTIONS
from preceptor.config.peer_without import NO_COUNTERPART
from preceptor.config.run import all_keys
from preceptor.errors import ConfigError

KEYS = set(all_keys())
PEERS = """
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps lr_scheduler_type warmup_ratio
    warmup_steps adam_beta1 adam_beta2 bf16 fp16 gradient_checkpointing logging_steps save_steps save_total_limit
    eval_steps eval_strategy output_dir max_seq_length packing assistant_only_loss completion_only_loss
    chat_template_path dataset_text_field neftune_noise_alpha loss_type model_name_or_path torch_dtype lora_r lora_alpha
    lora_dropout lora_target_modules r base_model sequence_len sample_packing micro_batch_size num_epochs val_set_size
    datasets load_in_4bit lora_target_linear train_on_inputs flash_attention special_tokens cutoff_len template dataset
    stage finetuning_type lora_rank lora_target per_device_eval_batch_size mask_history train_on_prompt resize_vocab
    report_to deepspeed fsdp push_to_hub""".split()  # noqa: SIM905


def mistakes(**changes):
    """What is wrong with a minimal run file that has these keys."""
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "out": "o"}
    for place, value in changes.items():
        node = tree
        *parents, last = place.split("__")
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[last] = value
    with pytest.raises(ConfigError) as caught:
        config.build(tree, "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize(("name", "counterpart"), COUNTERPARTS.items())
def test_a_key_of_another_trainer_leads_to_one_that_exists(name, counterpart):
    key, _, note = counterpart.partition(": ")
    assert key in KEYS
    for section in ("", "train__"):
        assert (
            f"{name}: unknown key; here it is {key}" in (found := mistakes(**{f"{section}{name}": 1})) and note in found
        )


@pytest.mark.parametrize(("name", "sentence"), NO_COUNTERPART.items())
def test_a_key_of_another_trainer_without_counterpart_has_a_sentence(name, sentence):
    place = name.replace("data.train.", "data__train__0__").replace(".", "__")
    assert f"unknown key; {sentence}" in mistakes(**{place: 1})
    for key in re.findall(r"\b[a-z]+\.[a-z_]+\b(?!\()", sentence):
        assert key in KEYS or key in ("metrics.jsonl", "report.html", "torch.compile"), f"{name} names {key}"


def test_the_commonest_names_are_known_and_none_is_a_key_of_this_program_at_another_place():
    known = COUNTERPARTS.keys() | NO_COUNTERPART.keys()
    assert set(PEERS) <= known and len(known) >= 60
    assert not COUNTERPARTS.keys() & NO_COUNTERPART.keys()
    assert not known & {key.rpartition(".")[2] for key in KEYS}, "a name of both would hide where ours goes"


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("learning_rate", "learning_rate: unknown key; here it is optimizer.learning_rate"),
        ("seed", "seed: unknown key; here it is train.seed"),
        ("target_modules", "target_modules: unknown key; here it is adapter.target_modules"),
        ("chat_template", "chat_template: unknown key; here it is data.chat_template"),
        ("max_length", "max_length: unknown key; here it is data.max_length"),
        ("train__weight_decay", "train.weight_decay: unknown key; here it is optimizer.weight_decay"),
        ("data__train__0__max_length", "data.train.0.max_length: unknown key; here it is data.max_length"),
        ("split", "split: unknown key; here it is data.train[].split or data.eval[].split or replay.data[].split"),
        ("lora", "lora: unknown key; here it is adapter (such as `{kind: lora, rank: 16}`)"),
        ("optimizer__weight_decy", "optimizer.weight_decy: unknown key; did you mean 'weight_decay'?"),
    ],
)
def test_a_key_of_this_program_in_the_wrong_place_leads_to_the_right_one(place, sentence):
    assert mistakes(**{place: 1}) == f"run.yaml: {sentence}"


@pytest.mark.parametrize(
    ("key", "nested"),
    [
        ("model.dtype", "model: {dtype: ...}"),
        ("train.seed", "train: {seed: ...}"),
        ("adapter.rank", "adapter: {rank: ...}"),
    ],
)
def test_a_dotted_key_in_the_file_is_written_out(key, nested):
    with pytest.raises(ConfigError) as caught:
        config.build({"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "out": "o", key: 1}, "run.yaml")
    said = f"run.yaml: {key}: unknown key; write `{nested}`; dotted keys are for the command line"
    assert str(caught.value) == said


@pytest.mark.parametrize(("place", "sentence"), INSTEAD_OF_SECTIONS.items())
def test_a_section_written_as_one_word(place, sentence):
    assert mistakes(**{place.replace(".", "__"): "word"}) == f"run.yaml: {place}: {sentence}; found 'word'"
