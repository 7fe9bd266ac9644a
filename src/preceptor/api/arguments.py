"""Arguments of TRL's trainer, by their names there -> settings that `preceptor convert` knows, and data.

What changes the training is carried over, or refused with what to do.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from preceptor.api.values import refuse_iterable
from preceptor.config.convert import known_settings
from preceptor.config.peer_defaults import DEFAULTS, NAMES
from preceptor.config.peer_training import OF_SCHEDULES
from preceptor.config.peer_without import NO_COUNTERPART
from preceptor.config.sections import nearest
from preceptor.data.formats.columns import has_format
from preceptor.errors import ConfigError, short

_OF_PEFT = ("r", "lora_alpha", "lora_dropout", "target_modules")  # carried over
_KINDS_OF_PEFT = ("use_dora", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save")
_OF_NO_EFFECT = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
_MEASURED = {"loss": "loss", "mean_token_accuracy": "token_accuracy"}  # of held-out examples
_EPSILON = 1e-8  # of AdamW
_CONVERSATIONS = ("prompt", "messages", "conversations")  # which TRL looks for before it looks for a text
_OFF = """
activation_offloading assistant_only_loss auto_find_batch_size batch_eval_metrics bf16_full_eval dataloader_drop_last
dataloader_persistent_workers dataloader_pin_memory disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
eval_on_start eval_use_gather_object fp16 fp16_full_eval full_determinism hub_always_push ignore_data_skip
load_best_model_at_end logging_first_step packing padding_free prediction_loss_only push_to_hub
restore_callback_states_from_checkpoint save_on_each_node save_only_model shuffle_dataset torch_compile
trust_remote_code use_cache use_cpu use_liger_kernel
"""
_ON = """
average_tokens_across_devices bf16 dataloader_in_order eval_do_concat_batches log_on_each_node logging_nan_inf_filter
remove_unused_columns skip_memory_metrics
"""
_READ: dict[str, Any] = {
    **dict.fromkeys(_OFF.split(), False),
    **dict.fromkeys(_ON.split(), True),
    "adam_epsilon": _EPSILON,
    "dataloader_num_workers": 0,
    "dataset_text_field": "text",
    "ddp_timeout": 1800,
    "debug": [],
    "eval_batch_size": 8,
    "eval_delay": 0,
    "eval_strategy": "no",
    "hub_strategy": "every_save",
    "include_for_metrics": [],
    "include_num_input_tokens_seen": "no",
    "label_smoothing_factor": 0.0,
    "length_column_name": "length",
    "local_rank": -1,
    "log_level": "passive",
    "log_level_replica": "warning",
    "logging_strategy": "steps",
    "loss_type": "nll",
    "max_steps": -1,
    "optim": "adamw_torch_fused",
    "packing_strategy": "bfd",
    "per_device_eval_batch_size": 8,
    "project": "huggingface",
    "report_to": [],
    "save_steps": 500,
    "save_strategy": "steps",
    "train_batch_size": 8,
    "train_sampling_strategy": "random",
    "truncation_mode": "keep_start",
}
"""TRL's defaults (1.16) that `preceptor convert` does not ask for."""


class SFTConfig:
    """Arguments by the names of TRL's SFTConfig, which may be set later too, until a trainer is made of them.

    Those that are not given are read as TRL's defaults (1.16). It needs no TRL. An SFTConfig of TRL, or
    TrainingArguments of transformers, will do as well.
    """

    arguments: dict[str, Any]

    def __init__(self, output_dir: str | None = None, **arguments: Any) -> None:
        """Raises ConfigError for an argument that is none."""
        vars(self)["arguments"] = {} if output_dir is None else {"output_dir": output_dir}
        for name, value in arguments.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ConfigError for an argument that is none."""
        if name not in known_settings():
            raise ConfigError(f"{name}: unknown argument; {nearest(name, sorted(known_settings()))}")
        self.arguments[name] = value.value if isinstance(value, enum.Enum) else value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in known_settings():
            raise AttributeError(f"SFTConfig has no argument {name!r}")
        default = _READ.get(name, DEFAULTS["TRL"].get(NAMES.get(name, name)))
        return self.arguments.get(name, list(default) if isinstance(default, list) else default)

    def __repr__(self) -> str:
        return f"SFTConfig({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def arguments_of(args: Any) -> dict[str, Any]:
    """The arguments that a config has set. Raises ConfigError for what is no config."""
    if args is None:
        return {}
    if isinstance(args, SFTConfig):
        return dict(args.arguments)
    if not dataclasses.is_dataclass(args) or not hasattr(args, "output_dir"):
        raise ConfigError(f"args: {short(args)} is no SFTConfig; from preceptor import SFTConfig")
    theirs: Any = args
    unset = type(theirs)(output_dir=theirs.output_dir, use_cpu=theirs.use_cpu)
    found = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
    changed = {name: value for name, value in found.items() if value != getattr(unset, name)}
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in changed.items()}
    off = {"bf16": False} if theirs.bf16 is False else {}  # which is what TrainingArguments have where it is absent
    return {"output_dir": theirs.output_dir, "use_cpu": theirs.use_cpu, **off, **plain}


def carried(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with what a run has under another name, and the section `checkpoint` of `load_best_model_at_end`.

    Raises ConfigError for what would change the training and is not offered.
    """
    found, checkpoint = dict(settings), {}
    if (epsilon := found.pop("adam_epsilon", None)) not in (None, _EPSILON):
        raise ConfigError(f"adam_epsilon: {short(epsilon)} is not offered: AdamW's epsilon is {_EPSILON:g}; remove it")
    arguments = found.get("lr_scheduler_kwargs")
    if isinstance(arguments, Mapping) and (unknown := sorted(arguments.keys() - OF_SCHEDULES)):
        offered = ", ".join(sorted(OF_SCHEDULES))
        raise ConfigError(f"lr_scheduler_kwargs: {', '.join(unknown)} is not offered, of any schedule: {offered}")
    if found.pop("load_best_model_at_end", None):
        name = str(found.pop("metric_for_best_model", None) or "loss").removeprefix("eval_")
        if name not in _MEASURED:
            raise ConfigError(
                f"metric_for_best_model: {name!r} is not measured: {' or '.join(_MEASURED)}; or a task of "
                "preceptor.Run(checkpoint={'best': ...}, eval={'tasks': [...]})"
            )
        checkpoint["best"] = _MEASURED[name]
    return found, checkpoint


def adapter_of(peft_config: Any) -> dict[str, Any]:
    """The settings of a LoraConfig. Raises ConfigError for one of another kind, and for what no run has."""
    if peft_config is None:
        return {}
    if type(peft_config).__name__ != "LoraConfig":
        raise ConfigError(f"peft_config: {type(peft_config).__name__}: LoRA alone is offered; give a peft.LoraConfig")
    unset, kind = type(peft_config)(), {}
    for field in dataclasses.fields(peft_config):
        value = getattr(peft_config, field.name)
        if value == getattr(unset, field.name) or field.name in (*_OF_PEFT, *_OF_NO_EFFECT):
            continue
        if field.name in _KINDS_OF_PEFT:
            kind[field.name] = value
        else:
            why = NO_COUNTERPART.get(field.name, "is not offered: remove it, or choose layers by `target_modules`")
            raise ConfigError(f"peft_config.{field.name}: {why}")
    targets = peft_config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise ConfigError(
            f"peft_config.target_modules: {targets!r} is a regular expression, which is not offered: give the names of "
            "layers, ['q_proj', 'v_proj'], or 'all-linear'"
        )
    return {
        "use_peft": True,
        "r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_dropout": peft_config.lora_dropout,
        "lora_target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
        **kind,
    }


def loaded_as(settings: Mapping[str, Any], quantization_config: Any) -> dict[str, Any]:
    """The settings with what says how the model is loaded: beside `model_init_kwargs`, or in them."""
    loading = settings.get("model_init_kwargs") or {}
    if not isinstance(loading, Mapping):
        raise ConfigError("model_init_kwargs: must be a dict of arguments of from_pretrained")
    loading = dict(loading)
    inner = loading.pop("quantization_config", None)
    if (found := inner if quantization_config is None else quantization_config) is None:
        return dict(settings)
    return {**settings, "model_init_kwargs": loading, "quantization_config": _quantization(found)}


def _quantization(given: Any) -> dict[str, Any]:
    """What a BitsAndBytesConfig says, or a dict like one. Raises ConfigError for another kind."""
    if isinstance(given, Mapping):
        return {key: value for key, value in given.items() if key != "quant_method"}
    if type(given).__name__ != "BitsAndBytesConfig":
        raise ConfigError(
            f"quantization_config: {short(given)}: a BitsAndBytesConfig of 4 (nf4) or 8 bits (int8) is taken over; or "
            "give model={'path': ..., 'quantization': 'nf4'} to preceptor.Run"
        )
    found = {**given.to_diff_dict(), "load_in_4bit": given.load_in_4bit, "load_in_8bit": given.load_in_8bit}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def sources_of(
    given: Any, key: str, field: str | None, formatting_func: Callable[[Any], str] | None
) -> tuple[Any, list[tuple[str, str]]]:
    """Data as TRL takes it, as `preceptor.Run` does, and notes. field: of `dataset_text_field`, where it is given."""
    if key == "eval_dataset" and isinstance(given, Mapping) and given and "path" not in given:  # sets by name
        found = [sources_of(each, key, field, formatting_func) for each in given.values()]
        note = (key, f"{', '.join(map(str, given))} are one held-out set here, with one loss")
        return [source for source, _ in found], [*dict.fromkeys(note for _, notes in found for note in notes), note]
    refuse_iterable(given, key)
    if formatting_func is not None:
        if isinstance(given, Mapping):
            raise ConfigError(f"{key}: a dict; formatting_func needs one data set, such as dataset['train']")
        return _formatted(given, formatting_func), []
    names = _columns(given)
    text, own = field or "text", field not in (None, "text")
    others = [name for name in names if name != text]
    if seen := [name for name in _CONVERSATIONS if name in names]:
        why = f"{text!r} is not read: `{seen[0]}` is trained, as it is there"
        return given, [("dataset_text_field", why)] if own else []
    if text not in names:
        if own and names:
            raise ConfigError(f"dataset_text_field: {key} has no column {text!r}; {nearest(text, names)}")
        how = f"{key}={{'path': ..., 'columns': {{'text': {text!r}}}}}"
        return given, [("dataset_text_field", f"of this data say it so: {how}")] if own else []
    if own or has_format(others):  # TRL trains the texts, whatever stands beside them
        return {"path": given, "columns": {"text": text}}, []
    return given, []


def _columns(given: Any) -> list[str]:
    """The names of the columns of a data set, or of the first record of a list."""
    names = getattr(given, "column_names", None)
    if isinstance(names, list):
        return names
    is_record = isinstance(given, list | tuple) and bool(given) and isinstance(given[0], Mapping)
    return list(given[0]) if is_record and "path" not in given[0] else []


def _formatted(dataset: Any, formatting_func: Callable[[Any], str]) -> Iterator[dict[str, str]]:
    """Plain texts. Raises ConfigError where the function gives anything else."""
    for number, example in enumerate(dataset, start=1):
        text = formatting_func(example)
        if not isinstance(text, str):
            what = ". It gets one example, not a batch of them" if isinstance(text, list | tuple) else ""
            raise ConfigError(
                f"formatting_func: gave {short(text)} for example {number}; it must give one string, the example's "
                f"text{what}. Messages need no function: give the data set itself, or make them by dataset.map"
            )
        yield {"text": text}
