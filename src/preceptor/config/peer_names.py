"""Names that other trainers, and earlier versions of Preceptor, have for the keys of a run file.

The names are those of transformers' TrainingArguments, TRL's SFTConfig and ModelConfig, peft's LoraConfig, Axolotl and
LLaMA-Factory. A key here is written as in the run file, a list with `[]`; after a colon may follow what to know of its
value.
"""

from collections.abc import Iterable

from preceptor.config.peer_defaults import DIRECT, OF_ADAPTERS

RENAMED: dict[str, str] = {
    "data.template": "data.chat_template",
    "data.template_kwargs": "data.chat_template_kwargs",
    "data.targets": "data.train_on",
    "data.max_row_tokens": "data.max_length",
    "data.too_long": "data.overflow: `refuse` is now `reject`",
    "data.group_prompts": "data.share_prefixes",
    "data.max_refused": "data.max_rejected",
    "data.refusals": "data.allow_rejected: `{too_long: allow}` is now `[too_long]`",
    "train.rows_per_step": "train.batch_size",
    "train.learning_rate": "optimizer.learning_rate",
    "train.schedule": "optimizer.lr_scheduler",
    "train.warmup": "optimizer.warmup",
    "train.final_learning_rate_share": "optimizer.min_lr_ratio",
    "train.weight_decay": "optimizer.weight_decay",
    "train.beta1": "optimizer.betas: such as `[0.9, 0.95]`",
    "train.beta2": "optimizer.betas: such as `[0.9, 0.95]`",
    "train.max_grad_norm": "optimizer.max_grad_norm",
    "train.normalize": "loss.reduction",
    "train.label_smoothing": "loss.label_smoothing",
    "train.z_loss": "loss.z_loss",
    "train.dft": "loss.type: `dft: true` is now `type: dft`",
    "train.kl_to_base": "loss.kl_coef",
    "train.context_gradient": "memory.context_gradient: `none` is now `detach`",
    "train.recompute": "memory.activation_checkpointing",
    "train.save_every": "checkpoint.every",
    "train.keep_checkpoints": "checkpoint.keep",
    "train.eval_every": "eval.every",
    "train.num_samples": "eval.num_samples",
    "train.max_new_tokens": "eval.max_new_tokens",
}
"""Keys of earlier versions."""

_BATCH = "train.batch_size: packed sequences per optimizer step, over all devices"
_BETAS = "optimizer.betas: such as `[0.9, 0.95]`"
_CHECKPOINT = "checkpoint.every: such as `100 steps` or `10 minutes`"
_BEST = "checkpoint.best: such as `loss`; the best weights are then saved as the model"
_PATIENCE = "train.patience: evaluations without improvement of the held-out loss after which the run ends"
_EVALUATION = "eval.every: such as `100 steps` or `1 epoch`"
_COLUMNS = "data.train[].columns: such as `{text: body}`"

COUNTERPARTS: dict[str, str] = {
    **{key: ours for key, (ours, _) in DIRECT.items() if key != ours.rpartition(".")[2]},
    # the model
    "model_id": "model.path",
    "torch_dtype": "model.dtype: of the weights; of matrix products: train.precision",
    "pure_bf16": "model.dtype: bfloat16 trains bfloat16 weights, see optimizer.rounding",
    "unfrozen_parameters": "model.train_only: patterns of names, not regular expressions",
    "freeze_trainable_layers": 'model.train_only: such as `["model.layers.3[01].*"]` for layers 30 and 31',
    "freeze_trainable_modules": 'model.train_only: such as `["*.mlp.*"]`',
    # the data
    "datasets": "data.train: such as `[{path: train.jsonl}]`",
    "dataset": "data.train: such as `[{path: train.jsonl}]`",
    "dataset_name": "data.train: such as `[{path: train.jsonl}]`",
    "data_files": "data.train: such as `[{path: train.jsonl}]`",
    "train_file": "data.train: such as `[{path: train.jsonl}]`",
    "dataset_config": "data.train[].name",
    "dataset_train_split": "data.train[].split",
    "dataset_text_field": _COLUMNS,
    "field_messages": "data.train[].columns: such as `{messages: conversation}`",
    "max_samples": "data.train[].count",
    "dataset_streaming": "data.streaming",
    "buffer_size": "data.window: with data.streaming",
    "streaming_multipack_buffer_size": "data.window: with data.streaming",
    "pretraining_dataset": "data.train: such as `[{path: text.jsonl}]`, with `data.streaming: true`",
    "interleave_probs": "data.train[].weight: how often each example is seen in an epoch",
    "test_datasets": "data.eval: such as `[{path: heldout.jsonl}]`",
    "train_dataset": "data.train: such as `[{path: train.jsonl}]`",
    "eval_dataset": "data.eval: such as `[{path: heldout.jsonl}]`",
    "val_set_size": "data.eval_size: a share of the examples, such as 0.05",
    "val_size": "data.eval_size: a share of the examples, such as 0.05",
    "chat_template_path": "data.chat_template",
    "chat_template_jinja": "data.chat_template: a file",
    "template": "data.chat_template",
    "excess_length_strategy": "data.overflow: or `data.allow_rejected: [too_long]`, which leaves them out",
    "truncation_mode": "data.overflow: or `data.allow_rejected: [too_long]`, which leaves them out",
    "assistant_only_loss": "data.train_on: `assistant` trains every assistant turn",
    "completion_only_loss": "data.train_on: `assistant` trains what the model answers, `all` the prompt as well",
    "train_on_inputs": "data.train_on: `all` trains the prompt as well",
    "train_on_prompt": "data.train_on: `all` trains the prompt as well",
    "mask_history": "data.train_on: `last` trains the last assistant turn alone",
    "roles_to_train": "data.train_on: `assistant`, `last` or `all`",
    # training
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "gradient_accumulation_steps": "train.batch_size: of an optimizer step; each sequence is a pass of its own",
    "num_train_epochs": "train.duration: such as `3 epochs`",
    "num_epochs": "train.duration: such as `3 epochs`",
    "epochs": "train.duration: such as `3 epochs`",
    "max_steps": "train.duration: such as `500 steps`",
    "bf16": "train.precision: bfloat16",
    "bf16_full_eval": "train.precision: bfloat16",
    "fp16": "train.precision: bfloat16; float16 is not offered",
    "data_seed": "train.seed",
    "use_cpu": "train.device: cpu",
    "device_map": "train.device",
    "report_to": "tracker: such as `[tensorboard]`",
    "use_wandb": "tracker: wandb",
    # the optimizer
    "lr_scheduler_type": "optimizer.lr_scheduler",
    "warmup_ratio": "optimizer.warmup: such as `5 %`",
    "warmup_steps": "optimizer.warmup: such as `20 steps`",
    "lr_scheduler_kwargs": "optimizer.min_lr_ratio: of `wsd` also optimizer.decay, the length of the last part",
    "num_decay_steps": "optimizer.decay: such as `20 %` or `100 steps`",
    "optim": "optimizer.name: adamw, adamw_8bit, muon, adafactor or sgd",
    "loraplus_lr_ratio": "adapter.lr_ratio: such as 16",
    "loraplus_lr_embedding": 'optimizer.lr_factors: `{"*.trainable_tokens_delta*": 0.1}`, of the rows of new tokens',
    "embedding_lr": 'optimizer.lr_factors: a factor of the learning rate, `{"*.embed_tokens": 0.1}`',
    "embedding_lr_scale": 'optimizer.lr_factors: `{"*.embed_tokens": 0.1}`',
    "lr_groups": "optimizer.lr_factors: by name, factors of the learning rate",
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    # the loss
    "loss_type": "loss.type",
    "use_dft_loss": "loss.type: dft",
    "output_router_logits": "loss.router_aux_coef: the coefficient, such as router_aux_loss_coef in the model's config",
    # memory
    "gradient_checkpointing": "memory.activation_checkpointing: `all`, or the first so many layers",
    # checkpoints and evaluation
    "save_steps": _CHECKPOINT,
    "save_strategy": _CHECKPOINT,
    "saves_per_epoch": _CHECKPOINT,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "early_stopping": _PATIENCE,
    "early_stopping_patience": _PATIENCE,
    "early_stopping_steps": _PATIENCE,
    "adapter_name_or_path": "model.from_run: the `out` of the run whose adapter is trained on",
    "lora_model_dir": "model.from_run: the `out` of the run whose adapter is trained on",
    "eval_steps": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "evals_per_epoch": _EVALUATION,
    # quantized bases
    "load_in_4bit": "model.quantization: nf4",
    "load_in_8bit": "model.quantization: int8",
    "quantization_bit": "model.quantization: nf4 for 4, int8 for 8",
    "quantization_type": "model.quantization: nf4",
    "bnb_4bit_quant_type": "model.quantization: nf4",
    "bnb_4bit_compute_dtype": "train.precision: the type of all matrix products",
    "use_bnb_nested_quant": "model.double_quantization",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    # adapters
    **{key: f"adapter.{ours}" for key, (ours, _) in OF_ADAPTERS.items()},
    "lora_target_modules": "adapter.target_modules",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save: a list of names",
    "use_dora": "adapter.kind: dora",
    "peft_use_dora": "adapter.kind: dora",
    "peft_use_rslora": "adapter.use_rslora",
    "init_lora_weights": "adapter.init: kaiming, gaussian, pissa or pissa_fast",
    "peft_init_lora_weights": "adapter.init: kaiming, gaussian, pissa or pissa_fast",
    "pissa_init": "adapter.init: pissa",
    "pissa_iter": "adapter.init: pissa_fast, of 16 iterations",
    "layers_to_transform": "adapter.target_modules: names; ranks by layer: adapter.rank_pattern",
    "peft_layers_to_transform": "adapter.target_modules: names; ranks by layer: adapter.rank_pattern",
    "exclude_modules": "adapter.target_modules: the layers that are adapted",
    "lora_target": "adapter.target_modules: a list of names; absent: all linear layers of the decoder",
    "lora_target_linear": "adapter.target_modules: absent: all linear layers of the decoder",
    "finetuning_type": "adapter.kind: lora; without the section `adapter` all weights are trained",
    "peft_type": "adapter.kind: lora",
    "use_peft": "adapter.kind: lora",
    # Unsloth's own
    "model_name": "model.path",
    "load_in_16bit": "model.dtype: bfloat16",
    "full_finetuning": "adapter: without this section all weights are trained",
    "use_gradient_checkpointing": "memory.activation_checkpointing: `all`, or the first so many layers",
}
"""Keys of other trainers -> the key here."""

_PACKED = "conversations are always packed into sequences, and do not see each other: nothing to set"
_UNPADDED = "sequences hold no padding: nothing to set"
_LOGGED = "every step is written to metrics.jsonl in the folder `out`: nothing to set"
_NAMED = "a run is named by its folder `out`; WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT name the project"
_STRATEGY = "parallel.strategy: by default chosen from memory; the processes are started by torchrun or --nproc"
_TOKENS = "the tokens that the chat template needs are added to the tokenizer and the model: nothing to set"
_QUANTIZED = "model.quantization says all of quantized weights but model.double_quantization: remove the key"
_ATTENTION = "attention is chosen for the device and checked before the first step: nothing to set"
_HUB = "nothing is uploaded: `hf upload` uploads the folder `model` in `out`"
_PREPARED = "the data is rendered before the first step, by several processes where it is large: nothing to set"
_SFT = "supervised fine-tuning is all that is done: remove the key"
_RESUME = "the same command continues a run that was stopped; `--from OUT` starts from the model of another run"
_LOGITS = "the loss computes logits of trained tokens only, in parts: nothing to set"
_PLAIN_LORA = "this variant of LoRA is not offered: remove the key"
_ADAPTED = "an adapter has an exact path of its own in the engine, chosen by itself: nothing to set"
_EXPERTS = "experts that are one tensor are adapted unless adapter.target_modules names layers: nothing to set"
_SAVED = "adapter.save says whether the adapter, the merged model or both are saved: remove the key"

_WATCHED = (
    "a step whose loss is not finite is left out and named; `preceptor watch` shows a loss that rises: remove the key"
)
_LOOP = "part of the loop of transformers' Trainer, which is another one here: remove the key"

NO_COUNTERPART: dict[str, str] = {
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "eval_packing": _PACKED,
    "eval_sample_packing": _PACKED,
    "neat_packing": _PACKED,
    "packing_strategy": _PACKED,
    "group_by_length": _PACKED,
    "pad_to_sequence_len": _UNPADDED,
    "pad_to_multiple_of": _UNPADDED,
    "padding_free": _UNPADDED,
    "pad_token": _UNPADDED,
    "padding_side": _UNPADDED,
    "per_device_eval_batch_size": "held-out examples are packed into sequences of data.max_length: nothing to set",
    "eval_batch_size": "held-out examples are packed into sequences of data.max_length: nothing to set",
    "eval_on_start": "the model is always evaluated before the first step: nothing to set",
    "do_train": _SFT,
    "do_eval": "held-out files in data.eval are always evaluated: nothing to set",
    "stage": _SFT,
    "optim_args": "the settings of an optimizer are keys of the section `optimizer`: remove the key",
    "optim_target_modules": "low-rank gradients (GaLore, APOLLO) are not offered: optimizer.name: adamw_8bit is small",
    "adam_epsilon": "AdamW's epsilon is 1e-8: remove the key",
    "auto_find_batch_size": "the largest sequence is tried before the first step, and a run that cannot fit ends there",
    "average_tokens_across_devices": "a step's loss is divided by its trained tokens, over all devices: nothing to set",
    "full_determinism": "on a CPU a run follows from train.seed to the bit, on a GPU up to rounding: nothing to set",
    "ignore_data_skip": "the order of the data is a function of the step: nothing is skipped, nothing to set",
    "dataloader_drop_last": "every example is trained in every epoch: nothing to set",
    "dataloader_pin_memory": "sequences are small beside a step: nothing to set",
    "activation_offloading": "activations stay on the device: memory.activation_checkpointing lets layers run again",
    "torch_empty_cache_steps": "memory is tried before the first step: nothing to set",
    "tf32": "matrix products are in float32 or in bfloat16, see train.precision: remove the key",
    "gradient_checkpointing_kwargs": "memory.activation_checkpointing says which layers run again: remove the key",
    "torch_compile": "set `engine: compiled` (by decoder layer; `auto` does so on a GPU)",
    "use_liger_kernel": _LOGITS,
    "enable_liger_kernel": _LOGITS,
    "attn_implementation": _ATTENTION,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "logging_first_step": _LOGGED,
    "logging_dir": _LOGGED,
    "plot_loss": "report.html in the folder `out` shows the loss: nothing to set",
    "run_name": _NAMED,
    "wandb_project": _NAMED,
    "project": _NAMED,
    "deepspeed": _STRATEGY,
    "fsdp": _STRATEGY,
    "fsdp_config": _STRATEGY,
    "ddp_find_unused_parameters": "parameters without a gradient need no setting: remove the key",
    "ddp_timeout": "a process that waits for another one gives up after 30 minutes: nothing to set",
    "loss_watchdog_threshold": _WATCHED,
    "loss_watchdog_patience": _WATCHED,
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "greater_is_better": "the direction of each metric of checkpoint.best is known: nothing to set",
    "early_stopping_threshold": "an improvement counts where it is beyond chance, by a 95 % interval: nothing to set",
    "resume_from_checkpoint": _RESUME,
    "auto_resume_from_checkpoints": _RESUME,
    "overwrite_output_dir": "`preceptor train RUN.yaml --replace` replaces an earlier run in the same folder",
    "save_safetensors": "models are always saved as safetensors: nothing to set",
    "save_only_model": "a checkpoint holds all that a resumed run needs: nothing to set",
    "dataset_num_proc": _PREPARED,
    "dataset_processes": _PREPARED,
    "preprocessing_num_workers": _PREPARED,
    "dataloader_num_workers": _PREPARED,
    "dataset_prepared_path": _PREPARED,
    "remove_unused_columns": "columns that no format has are ignored: nothing to set",
    "train_on_eos": "the token that ends a turn is always trained: nothing to set",
    "default_system": "a system prompt is part of the data: give each example a `system` key or message",
    "default_system_message": "a system prompt is part of the data: give each example a `system` key or message",
    "special_tokens": _TOKENS,
    "additional_special_tokens": _TOKENS,
    "add_special_tokens": _TOKENS,
    "eos_token": _TOKENS,
    "resize_vocab": _TOKENS,
    "resize_token_embeddings_to_32x": _TOKENS,
    "model_type": "the architecture is that of the model's folder: remove the key",
    "tokenizer_name": "the model's own tokenizer is used: remove the key",
    "tokenizer_config": "the model's own tokenizer is used: remove the key",
    "tokenizer_type": "the model's own tokenizer is used: remove the key",
    "token": "the environment variable HF_TOKEN or `hf auth login` holds it: remove the key",
    "random_state": "train.seed draws the first values of an adapter as well: nothing to set",
    "train_on_responses_only": "what the model answers is trained; no part of a template needs a name: nothing to set",
    "bnb_4bit_quant_storage": _QUANTIZED,
    "llm_int8_threshold": "int8 quantizes weights alone, so no activation is an outlier: remove the key",
    "quantization_method": _QUANTIZED,
    "quantization_device_map": _QUANTIZED,
    "bias": "an adapter trains no biases: remove the key",
    "lora_bias": "an adapter trains no biases: remove the key",
    "fan_in_fan_out": "how a layer holds its weight is known: nothing to set",
    "lora_fan_in_fan_out": "how a layer holds its weight is known: nothing to set",
    "target_parameters": _EXPERTS,
    "lora_target_parameters": _EXPERTS,
    "trainable_token_indices": _TOKENS,
    "ensure_weight_tying": "tied tables stay tied: nothing to set",
    "layers_pattern": "adapter.rank_pattern takes whole names of layers: remove the key",
    "peft_layers_pattern": "adapter.rank_pattern takes whole names of layers: remove the key",
    "loftq_config": "LoftQ is not offered; adapter.init: pissa also starts from singular values: remove the key",
    "eva_config": _PLAIN_LORA,
    "corda_config": _PLAIN_LORA,
    "lora_ga_config": _PLAIN_LORA,
    "velora_config": _PLAIN_LORA,
    "monteclora_config": _PLAIN_LORA,
    "kasa_config": _PLAIN_LORA,
    "arrow_config": _PLAIN_LORA,
    "alora_invocation_tokens": _PLAIN_LORA,
    "use_qalora": _PLAIN_LORA,
    "qalora_group_size": _PLAIN_LORA,
    "use_bdlora": _PLAIN_LORA,
    "layer_replication": "layers are those of the model: remove the key",
    "megatron_config": _STRATEGY,
    "megatron_core": _STRATEGY,
    "runtime_config": _ADAPTED,
    "lora_mlp_kernel": _ADAPTED,
    "lora_qkv_kernel": _ADAPTED,
    "lora_o_kernel": _ADAPTED,
    "lora_on_cpu": "an adapter is small and stays on the device: remove the key",
    "pissa_convert": "an adapter of PiSSA is always saved as plain LoRA on the untouched base: nothing to set",
    "create_new_adapter": "with model.from_run of a run with an adapter, that adapter is trained on; a run without the "
    "section `adapter` makes its merged model the base",
    "merge_lora": _SAVED,
    "relora": "restarts of LoRA are not offered: remove the key",
    "relora_steps": "restarts of LoRA are not offered: remove the key",
    "qlora_sharded_model_loading": "quantized weights are not sharded: remove the key",
    "lora_task_type": _SFT,
    "auto_mapping": _SFT,
    "inference_mode": _SFT,
    "peft_version": _SFT,
    "base_model_name_or_path": "the base is model.path: remove the key",
    "task_type": _SFT,
    "do_predict": _SFT,
    "model_init_kwargs": "the keys of the section `model` say how a model is loaded: remove the key",
    "dataset_kwargs": _PREPARED,
    "shuffle_dataset": "the order of the examples is drawn again for each epoch: nothing to set",
    "train_sampling_strategy": "the order of the examples is drawn again for each epoch: nothing to set",
    "length_column_name": _PACKED,
    "activation_checkpointing_kwargs": "memory.activation_checkpointing says which layers run again: remove the key",
    "eval_delay": "the model is always evaluated before the first step: remove the key",
    "fp16_full_eval": "float16 is not offered: remove the key",
    "liger_kernel_config": _LOGITS,
    **dict.fromkeys(
        ("torch_compile_backend", "torch_compile_mode"), "`engine: compiled` takes torch's default: remove the key"
    ),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _NAMED),
    **dict.fromkeys(
        (
            "accelerator_config",
            "parallelism_config",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "local_rank",
        ),
        _STRATEGY,
    ),
    **dict.fromkeys(
        (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        _PREPARED,
    ),
    **dict.fromkeys(
        (
            "log_on_each_node",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "skip_memory_metrics",
        ),
        _LOGGED,
    ),
    **dict.fromkeys(
        (
            "use_cache",
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "save_on_each_node",
            "enable_jit_checkpoint",
            "restore_callback_states_from_checkpoint",
            "label_names",
            "debug",
        ),
        _LOOP,
    ),
    "data.train.type": "the format of an example is recognised by its keys, `columns` renames them: remove the key",
    "data.train.ds_type": "the type of a file is recognised by its name and content: remove the key",
}
"""Keys of other trainers that are not needed or not offered here -> what to do; with a section: only there."""

CHANGES_TRAINING = ("optim_args", "optim_target_modules", "relora", "loftq_config")
"""Keys without a counterpart that change what is trained."""

_OWN_LOOP = "whoever owns the loop writes it there: for step in run.steps(): ... (docs/python.md)"
_METRIC = "write it as `eval={'code': function}` of preceptor.Run (docs/python.md)"

OF_TRAINER: dict[str, str] = {
    "callbacks": _OWN_LOOP,
    "data_collator": "conversations are packed with their targets here, by no collator; remove it",
    "compute_loss_func": "write it as `loss={'code': function}` of preceptor.Run",
    "compute_metrics": _METRIC,
    "preprocess_logits_for_metrics": f"logits of all tokens never exist here; of an answer: {_METRIC}",
    "optimizers": "its settings are arguments of SFTConfig, or the section `optimizer` of preceptor.Run",
    "optimizer_cls_and_kwargs": "its settings are arguments of SFTConfig, or the section `optimizer` of preceptor.Run",
}
"""Arguments of TRL's SFTTrainer that have no counterpart -> what to do."""

INSTEAD_OF_SECTIONS: dict[str, str] = {
    "model": "write `model: {path: ...}`",
    "data": "write `data: {train: [{path: ...}]}`",
    "data.train": "write `train: [{path: ...}]`",
    "data.eval": "write `eval: [{path: ...}]`",
    "optimizer": "write `optimizer: {name: adamw}`; other settings are keys of this section, such as `learning_rate`",
    "adapter": "write `adapter: {kind: lora}`; QLoRA is that with `model: {quantization: nf4}`",
}
"""Sections and lists that other trainers write as one word -> what to write."""


def advice(place: str, keys: Iterable[str]) -> str | None:
    """The sentence that says what to write instead of an unknown key; None where its name is known from nowhere.

    place: the key, dotted, with the indices of lists. keys: all keys of the run file. Looked up in this order: this
    very key in earlier versions, a name that other trainers have, the same name in another section, a name of earlier
    versions in any section.
    """
    key = ".".join(part for part in place.split(".") if not part.isdigit())
    name = key.rpartition(".")[2]
    if key in RENAMED:
        return f"{place} is now {_with_note(RENAMED[key])}"
    instead = NO_COUNTERPART.get(key) or NO_COUNTERPART.get(name)
    if instead is not None:
        return f"{place}: unknown key; {instead}"
    found = COUNTERPARTS.get(name)
    found = found or " or ".join(ours for ours in keys if ours.rpartition(".")[2] == name)
    found = found or next((new for old, new in RENAMED.items() if old.rpartition(".")[2] == name), "")
    return f"{place}: unknown key; here it is {_with_note(found)}" if found else None


def _with_note(counterpart: str) -> str:
    key, _, note = counterpart.partition(": ")
    return f"{key} ({note})" if note else key
