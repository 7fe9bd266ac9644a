"""Files of other trainers that do something else than supervised fine-tuning: what, and the sign of it."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from preceptor.config.peer_defaults import OFF, Peer
from preceptor.errors import ConfigError, short

_PREFERENCES = "trains on preferences or rewards"
_SCORES = "trains a model that scores or classifies"
_TEACHER = "trains on what a teacher model predicts"
_NOTHING = "trains nothing"

_SIGNS: tuple[tuple[Peer, str, str, str], ...] = (
    ("Axolotl", "rl", "", _PREFERENCES),
    ("Axolotl", "reward_model process_reward_model num_labels", "", _SCORES),
    ("Axolotl", "plugins", r"\.kd\.", _TEACHER),
    ("Axolotl", "diffusion", "", "trains a diffusion model"),
    ("LLaMA-Factory", "stage", "dpo|kto|ppo|rm", _PREFERENCES),
    ("LLaMA-Factory", "export_dir infer_backend do_predict", "", _NOTHING),
    ("TRL", "beta max_prompt_length max_completion_length num_generations", "", _PREFERENCES),
    ("TRL", "reward_funcs reward_model_path", "", _PREFERENCES),
    ("TRL", "loss_type", "sigmoid|hinge|ipo|apo|kto|orpo|simpo|grpo", _PREFERENCES),
    ("Unsloth", "num_labels", "", _SCORES),
    ("Unsloth", "whisper_task", "", "trains a model that hears"),
    ("torchtune", "loss", "rlhf|grpo", _PREFERENCES),
    ("torchtune", "reward_functions", "", _PREFERENCES),
    ("torchtune", "teacher_model", "", _TEACHER),
    ("torchtune", "tasks prompt", "", _NOTHING),
)
"""Trainer, keys, a pattern of their value, and what a file with such a key does."""

_TASKS = re.compile(
    "(^|_)(a2po|bco|cpo|distillation|dpo|gkd|grpo|gspo|kto|minillm|mpo|nash_md|orpo|ppo|prm|reward|rloo|sdpo|tpo|xpo)"
    "(_|$)|^(gold|opd|sdft|ssd)$"  # short ones, that may be of a name's data or model, as the whole name alone
)
OTHER_FILES = {
    "distributed_type": "a configuration of accelerate, and of no run: torchrun or --nproc start the processes here",
    "zero_optimization": "a configuration of DeepSpeed, and of no run: parallel.strategy spreads a model here",
    "model_class": "a file of LLaMA-Factory's v1, which is not read; those of its stable version are",
}
"""Keys of known files that are none of a run -> what they are."""


def refuse_others(peer: Peer, settings: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a file that does something else than supervised fine-tuning."""
    loaded = settings.get("from_pretrained")
    settings = {**settings, **(loaded if isinstance(loaded, Mapping) else {})}
    trains = settings.get("do_train") not in OFF
    for trainer, keys, pattern, what in _SIGNS:
        if trainer != peer or (what == _NOTHING and trains):
            continue
        for key in keys.split():
            if (value := settings.get(key)) not in OFF and re.search(pattern, str(value)):
                raise refusal(where, f"`{key}: {short(value)}`", what)
    if peer == "torchtune" and "optimizer" not in settings:
        raise refusal(where, "no `optimizer`", _NOTHING)


_TWO_PARTS = "Seq2Seq|(T5|Bart|BART|Pegasus|Whisper)[A-Za-z]*For"
_OTHERS = re.compile(
    _TWO_PARTS + "|For(?!CausalLM|ImageTextToText|Vision2Seq|MultimodalLM|ConditionalGeneration|PreTraining)[A-Z]"
)
_MODELS = {
    "Classification|QuestionAnswering|MultipleChoice": _SCORES,
    "MaskedLM": "trains a masked language model",
    _TWO_PARTS: "trains an encoder and a decoder",
    "": "trains another model than a causal language model",
}
"""A pattern of the class of a model that is no causal one -> what a script does that trains it."""


def refuse_models(classes: Collection[str], where: str) -> None:
    """classes: of which one is the model that is trained. Raises ConfigError where none is a causal language model."""
    others = [name for name in classes if _OTHERS.search(name)]
    if others and len(others) == len(classes):
        what = next(what for pattern, what in _MODELS.items() if re.search(pattern, others[0]))
        raise refusal(where, others[0], what)


def is_another_task(name: str) -> bool:
    """name: of a trainer's command or script, such as `dpo`."""
    return "diffusion" in name or bool(_TASKS.search(name) and "sft" not in name)


def refuse_task(name: str, where: str) -> None:
    """Raises ConfigError for a command or script that is not of SFT."""
    if is_another_task(name):
        raise refusal(where, f"`{name}`", "is another task than `sft`")


def refusal(where: str, sign: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: {sign}: it {what}; only supervised fine-tuning is done here (docs/limits.md)")
