"""Names that other trainers have for the keys of a run file.

The names are those of transformers' TrainingArguments, TRL's SFTConfig and ModelConfig, peft's LoraConfig, Axolotl and
LLaMA-Factory. A key here is written as in the run file, a list with `[]`; after a colon may follow what to know of its
value.
"""

from collections.abc import Iterable

from preceptor.config.peer_defaults import DIRECT, OF_ADAPTERS
from preceptor.config.peer_without import NO_COUNTERPART, table

COUNTERPARTS: dict[str, str] = {
    **{key: ours for key, (ours, _) in {**DIRECT, **OF_ADAPTERS}.items() if key != ours.rpartition(".")[2]},
    **table("""
model_id model_name: model.path
torch_dtype: model.dtype: of the weights; of matrix products: train.precision
bfloat16 pure_bf16: model.dtype: bfloat16 trains bfloat16 weights, see optimizer.rounding
float16 fp16: train.precision: bfloat16; float16 is not offered
unfrozen_parameters: model.train_only: patterns of names, not regular expressions
freeze_trainable_layers: model.train_only: such as `["model.layers.3[01].*"]` for layers 30 and 31
freeze_trainable_modules: model.train_only: such as `["*.mlp.*"]`
datasets dataset dataset_name data_files train_file train_dataset: data.train: such as `[{path: train.jsonl}]`
dataset_mixer dataset_mixture: data.train: such as `[{path: train.jsonl, weight: 0.5}]`
dataset_splits dataset_train_split: data.train[].split
dataset_val test_datasets eval_dataset: data.eval: such as `[{path: heldout.jsonl}]`
dataset_config: data.train[].name
dataset_text_field: data.train[].columns: such as `{text: body}`
field_messages: data.train[].columns: such as `{messages: conversation}`
max_samples: data.train[].count
dataset_streaming: data.streaming
buffer_size streaming_multipack_buffer_size: data.window: with data.streaming
pretraining_dataset: data.train: such as `[{path: text.jsonl}]`, with `data.streaming: true`
interleave_probs: data.train[].weight: how often each example is seen in an epoch
val_set_size test_split_size val_size: data.eval_size: a share of the examples, such as 0.05
chat_template_path template: data.chat_template
enable_thinking: data.chat_template_kwargs: such as `{enable_thinking: false}`
chat_template_jinja: data.chat_template: a file
excess_length_strategy truncation_mode: data.overflow: or `data.allow_rejected: [too_long]`, which leaves them out
assistant_only_loss: data.train_on: `assistant` trains every assistant turn
completion_only_loss: data.train_on: `assistant` trains what the model answers, `all` the prompt as well
train_on_inputs train_on_prompt: data.train_on: `all` trains the prompt as well
mask_history: data.train_on: `last` trains the last assistant turn alone
roles_to_train: data.train_on: `assistant`, `last` or `all`
per_device_train_batch_size train_batch_size micro_batch_size: train.batch_size: packed sequences per optimizer step,
    over all devices
gradient_accumulation_steps: train.batch_size: of an optimizer step; each sequence is a pass of its own
num_train_epochs num_epochs epochs: train.duration: such as `3 epochs`
max_steps: train.duration: such as `500 steps`
bf16 bf16_full_eval: train.precision: bfloat16
data_seed: train.seed
use_cpu: train.device: cpu
device_map: train.device
report_to: tracker: such as `[tensorboard]`
use_wandb: tracker: wandb
use_tensorboard: tracker: tensorboard
use_mlflow: tracker: mlflow
use_trackio: tracker: trackio
use_swanlab: tracker: tensorboard, trackio, mlflow or wandb
lr_scheduler_type: optimizer.lr_scheduler
warmup_ratio: optimizer.warmup: such as `5 %`
warmup_steps: optimizer.warmup: such as `20 steps`
lr_scheduler_kwargs: optimizer.min_lr_ratio: of `wsd` also optimizer.decay, the length of the last part
eta_min: optimizer.min_lr_ratio: the last learning rate as a share of the peak
num_decay_steps: optimizer.decay: such as `20 %` or `100 steps`
optim: optimizer.name: adamw, adamw_8bit, muon, adafactor or sgd
loraplus_lr_ratio: adapter.lr_ratio: such as 16
loraplus_lr_embedding: optimizer.lr_factors: `{"*.trainable_tokens_delta*": 0.1}`, of the rows of new tokens
embedding_lr embedding_learning_rate: optimizer.lr_factors: a factor of the learning rate, `{"*.embed_tokens": 0.1}`
embedding_lr_scale: optimizer.lr_factors: `{"*.embed_tokens": 0.1}`
lr_groups: optimizer.lr_factors: by name, factors of the learning rate
adam_beta1 adam_beta2: optimizer.betas: such as `[0.9, 0.95]`
loss_type: loss.type
use_dft_loss: loss.type: dft
output_router_logits: loss.router_aux_coef: the coefficient, such as router_aux_loss_coef in the model's config
disable_gradient_checkpointing: memory.activation_checkpointing: `none`
gradient_checkpointing use_gradient_checkpointing: memory.activation_checkpointing: `all`, or the first so many layers
save_steps save_strategy saves_per_epoch save_every_n_epochs: checkpoint.every: such as `100 steps` or `10 minutes`
load_best_model_at_end metric_for_best_model: checkpoint.best: such as `loss`; the best weights are then saved as the
    model
early_stopping early_stopping_patience early_stopping_steps: train.patience: evaluations without improvement of the
    held-out loss after which the run ends
adapter_name_or_path lora_model_dir: model.from_run: the `out` of the run whose adapter is trained on
eval_steps eval_strategy evaluation_strategy evals_per_epoch: eval.every: such as `100 steps` or `1 epoch`
load_in_4bit quantization_type bnb_4bit_quant_type: model.quantization: nf4
load_in_8bit: model.quantization: int8
quantization_bit: model.quantization: nf4 for 4, int8 for 8
bnb_4bit_compute_dtype: train.precision: the type of all matrix products
use_bnb_nested_quant bnb_4bit_use_double_quant: model.double_quantization
lora_target_modules: adapter.target_modules
lora_modules_to_save: adapter.modules_to_save
additional_target: adapter.modules_to_save: a list of names
use_dora peft_use_dora: adapter.kind: dora
peft_use_rslora: adapter.use_rslora
init_lora_weights peft_init_lora_weights: adapter.init: kaiming, gaussian, pissa or pissa_fast
pissa_init: adapter.init: pissa
pissa_iter: adapter.init: pissa_fast, of 16 iterations
layers_to_transform peft_layers_to_transform: adapter.target_modules: names; ranks by layer: adapter.rank_pattern
exclude_modules: adapter.target_modules: the layers that are adapted
lora_target: adapter.target_modules: a list of names; absent: all linear layers of the decoder
lora_target_linear: adapter.target_modules: absent: all linear layers of the decoder
finetuning_type: adapter.kind: lora; without the section `adapter` all weights are trained
peft_type use_peft: adapter.kind: lora
load_in_16bit: model.dtype: bfloat16
full_finetuning: adapter: without this section all weights are trained
"""),
}
"""Keys of other trainers -> the key here."""

CHANGES_IF_LEFT_OUT = frozenset(
    """unfrozen_parameters adapter_name_or_path lora_model_dir exclude_modules layers_to_transform
    peft_layers_to_transform load_best_model_at_end early_stopping early_stopping_patience early_stopping_steps
    interleave_probs embedding_lr embedding_learning_rate embedding_lr_scale loraplus_lr_embedding lr_groups
    eta_min""".split()  # noqa: SIM905
)
"""Those of them that `preceptor convert` does not carry over, so that something else is trained until they are set."""

INSTEAD_OF_SECTIONS: dict[str, str] = {
    "model": "write `model: {path: ...}`",
    "data": "write `data: {train: [{path: ...}]}`",
    "data.train": "write `train: [{path: ...}]`",
    "data.eval": "write `eval: [{path: ...}]`",
    "optimizer": "write `optimizer: {name: adamw}`; other settings are keys of this section, such as `learning_rate`",
    "adapter": "write `adapter: {kind: lora}`; QLoRA is that with `model: {quantization: nf4}`",
}
"""Sections and lists that other trainers write as one word -> what to write."""

OTHER_SECTIONS = dict.fromkeys(("lora", "qlora", "peft"), "adapter: such as `{kind: lora, rank: 16}`")
"""Names that a section of a run file is sometimes given; those of other trainers are in COUNTERPARTS."""


def advice(place: str, keys: Iterable[str]) -> str | None:
    """The sentence that says what to write instead of an unknown key; None where its name is known from nowhere.

    place: the key, dotted, with the indices of lists. keys: all keys of the run file. A name that other trainers have
    comes before the same name in another section.
    """
    key = ".".join(part for part in place.split(".") if not part.isdigit())
    name = key.rpartition(".")[2]
    instead = NO_COUNTERPART.get(key) or NO_COUNTERPART.get(name)
    if instead is not None:
        return f"{place}: unknown key; {instead}"
    found = COUNTERPARTS.get(name) or OTHER_SECTIONS.get(key)
    found = found or " or ".join(ours for ours in keys if ours.rpartition(".")[2] == name)
    return f"{place}: unknown key; here it is {_with_note(found)}" if found else None


def _with_note(counterpart: str) -> str:
    key, _, note = counterpart.partition(": ")
    return f"{key} ({note})" if note else key
