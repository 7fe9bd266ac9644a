"""Keys of other trainers, and arguments of TRL's SFTTrainer, that have no counterpart here: why, and what to do."""

import re

OF_IMAGES = "only text is trained: what has images, sound or video is rejected, and their towers stay as they are"


def table(text: str) -> dict[str, str]:
    """`key other_key: value` on each line -> the value of each key; what is indented goes on."""
    rows = (" ".join(row.split()).partition(": ") for row in re.split(r"\n(?! )", text.strip()))
    return {key: value for keys, _, value in rows for key in keys.split()}


_NOT_OFFERED = table(f"""
optim_args: the settings of an optimizer are keys of the section `optimizer`: remove the key
optim_target_modules: low-rank gradients (GaLore, APOLLO) are not offered: optimizer.name: adamw_8bit is small
loftq_config: LoftQ is not offered; adapter.init: pissa also starts from singular values: remove the key
relora: restarts of LoRA are not offered: remove the key
bias lora_bias: an adapter trains no biases: remove the key
eva_config corda_config lora_ga_config velora_config monteclora_config kasa_config arrow_config alora_invocation_tokens
    use_qalora use_bdlora: this variant of LoRA is not offered: remove the key
layer_replication: layers are those of the model: remove the key
processor_type image_size image_resize_algorithm image_max_pixels image_min_pixels video_max_pixels video_fps
    video_maxlen freeze_vision_tower freeze_multi_modal_projector freeze_mm_modules finetune_audio_layers collate_fn:
    {OF_IMAGES}
qat quantizer qat_scheme fp8 fp8_backend fp8_enable_fsdp_float8_all_gather load_in_fp8 llmcompressor use_onebitllms
    gptq gptq_disable_exllama: weights that are quantized in this form, or act as if, are not trained: see
    model.quantization
use_galore use_apollo use_badam use_adam_mini use_llama_pro lisa_n_layers lisa_step_interval lisa_layers_attribute
    mixture_of_depths use_eaft use_eaft_loss eaft_alpha eaft_k use_asft_loss asft_alpha oft_block_size oft_target
    galore_layerwise galore_target galore_rank galore_scale apollo_layerwise apollo_target apollo_rank apollo_scale
    apollo_scale_type badam_mode badam_switch_mode badam_switch_interval badam_verbose
    jagged_restart_warmup_steps reinit_weights lr_quadratic_warmup jagged_restart_steps: this method of training is not
    offered: remove the key
""")
_NOT_NEEDED = table("""
packing sample_packing eval_packing eval_sample_packing neat_packing packing_strategy group_by_length
    length_column_name: conversations are always packed into sequences, and do not see each other: nothing to set
pad_to_sequence_len pad_to_multiple_of padding_free pad_token padding_side: sequences hold no padding: nothing to set
per_device_eval_batch_size eval_batch_size batch_size_val do_causal_lm_eval eval_causal_lm_metrics: held-out examples
    are packed into sequences of data.max_length: nothing to set
eval_on_start: the model is always evaluated before the first step: nothing to set
do_train stage lora_task_type auto_mapping inference_mode peft_version task_type do_predict: supervised fine-tuning is
    all that is done: remove the key
do_eval: held-out files in data.eval are always evaluated: nothing to set
adam_epsilon adam_eps: AdamW's epsilon is always 1e-8 here
auto_find_batch_size: the largest sequence is tried before the first step, and a run that cannot fit ends there
average_tokens_across_devices: a step's loss is divided by its trained tokens, over all devices: nothing to set
full_determinism: on a CPU a run follows from train.seed to the bit, on a GPU up to rounding: nothing to set
ignore_data_skip: the order of the data is a function of the step: nothing is skipped, nothing to set
dataloader_drop_last: every example is trained in every epoch: nothing to set
dataloader_pin_memory: sequences are small beside a step: nothing to set
activation_offloading: activations stay on the device: memory.activation_checkpointing lets layers run again
torch_empty_cache_steps: memory is tried before the first step: nothing to set
tf32: matrix products are in float32 or in bfloat16, see train.precision: remove the key
gradient_checkpointing_kwargs activation_checkpointing_kwargs: memory.activation_checkpointing says which layers run
    again: remove the key
torch_compile: set `engine: compiled` (by decoder layer; `auto` does so on a GPU)
use_liger_kernel enable_liger_kernel liger_kernel_config: the loss computes logits of trained tokens only, in parts:
    nothing to set
attn_implementation flash_attention flash_attn sdp_attention xformers_attention: attention is chosen for the device and
    checked before the first step: nothing to set
logging_steps logging_strategy logging_first_step logging_dir log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm skip_memory_metrics metric_logger
    log_every_n_steps log_peak_memory_stats profiler eval_table_size: every step is written to metrics.jsonl in the
    folder `out`: nothing to set
plot_loss: report.html in the folder `out` shows the loss: nothing to set
run_name wandb_project project trackio_space_id trackio_bucket_id trackio_static_space_id wandb_name wandb_entity
    wandb_run_id trackio_run_name trackio_project_name mlflow_experiment_name hub_model_revision: a
    run is named by its folder `out`;
    WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT name the project
deepspeed fsdp fsdp_config config_file accelerate_config megatron_config megatron_core accelerator_config
    parallelism_config ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank fsdp_version
    dp_shard_size dp_replicate_size data_parallel_shard_dim data_parallel_replicate_dim dist_config
    custom_sharded_layers fsdp_cpu_offload fsdp_reshard_after_forward use_ray ray_num_workers use_distributed_optimizer
    overlap_param_gather overlap_grad_reduce num_processes: parallel.strategy: by default chosen from memory; the
    processes are started by torchrun or --nproc
ddp_find_unused_parameters: parameters without a gradient need no setting: remove the key
ddp_timeout: a process that waits for another one gives up after 30 minutes: nothing to set
loss_watchdog_threshold loss_watchdog_patience: a step whose loss is not finite ends the run, unless train.max_skipped
    lets some be skipped; `preceptor watch` shows a loss that rises: remove the key
push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision: no run uploads anything:
    `preceptor export OUT --to hub --repo OWNER/NAME` uploads the model
greater_is_better: the direction of each metric of checkpoint.best is known: nothing to set
mlflow_tracking_uri: mlflow reads MLFLOW_TRACKING_URI of the environment: set it there
early_stopping_threshold: an improvement counts where it is beyond chance, by a 95 % interval: nothing to set
resume_from_checkpoint auto_resume_from_checkpoints: the same command continues a run that was stopped; `--from OUT`
    starts from the model of another run
overwrite_output_dir: `preceptor train RUN.yaml --replace` replaces an earlier run in the same folder
save_safetensors: models are always saved as safetensors: nothing to set
save_only_model: a checkpoint holds all that a resumed run needs: nothing to set
dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers dataset_prepared_path
    dataset_kwargs dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order overwrite_cache skip_prepare_dataset tokenized_path pretrain_multipack_attn
    pretrain_multipack_buffer_size: the data is rendered before the first step, by several processes where it is large:
    nothing to set
remove_unused_columns: columns that no format has are ignored: nothing to set
train_on_eos: the token that ends a turn is always trained: nothing to set
default_system default_system_message: a system prompt is part of the data: give each example a `system` key or message
special_tokens eos_token resize_vocab resize_token_embeddings_to_32x trainable_token_indices: the tokens that the chat
    template needs are added to the tokenizer and the model: nothing to set
tokens add_tokens added_tokens_overrides additional_special_tokens add_special_tokens new_special_tokens: tokens that
    the chat template does not need are not added, so that their text is read as ordinary tokens: add them to the
    model's folder, tokenizer and embedding
model_type: the architecture is that of the model's folder: remove the key
tokenizer_name tokenizer_config tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common: the
    model's own tokenizer is used: remove the key
token hf_use_auth_token: the environment variable HF_TOKEN or `hf auth login` holds it: remove the key
random_state: train.seed draws the first values of an adapter as well: nothing to set
train_on_responses_only: what the model answers is trained; no part of a template needs a name: nothing to set
bnb_4bit_quant_storage quantization_method quantization_device_map model_quantization_config
    model_quantization_config_kwargs bnb_config_kwargs: model.quantization says all of quantized weights but
    model.double_quantization: remove the key
llm_int8_threshold: int8 quantizes weights alone, so no activation is an outlier: remove the key
fan_in_fan_out lora_fan_in_fan_out: how a layer holds its weight is known: nothing to set
target_parameters lora_target_parameters: experts that are one tensor are adapted unless adapter.target_modules names
    layers: nothing to set
ensure_weight_tying: tied tables stay tied: nothing to set
relora_steps relora_prune_ratio qalora_group_size: a setting of a variant of LoRA that is not offered: remove the key
layers_pattern peft_layers_pattern: adapter.rank_pattern takes whole names of layers: remove the key
runtime_config lora_mlp_kernel lora_qkv_kernel lora_o_kernel: an adapter has an exact path of its own in the engine,
    chosen by itself: nothing to set
lora_on_cpu: an adapter is small and stays on the device: remove the key
pissa_convert: an adapter of PiSSA is always saved as plain LoRA on the untouched base: nothing to set
create_new_adapter: with model.from_run of a run with an adapter, that adapter is trained on; a run without the section
    `adapter` makes its merged model the base
merge_lora save_adapter_weights_only: adapter.save says whether the adapter, the merged model or both are saved: remove
    the key
qlora_sharded_model_loading: quantized weights are not sharded: remove the key
base_model_name_or_path: the base is model.path: remove the key
model_init_kwargs: the keys of the section `model` say how a model is loaded: remove the key
shuffle_dataset train_sampling_strategy shuffle shuffle_merged_datasets shuffle_before_merging_datasets
    disable_shuffling: the order of the examples is drawn again for each epoch: nothing to set
eval_delay: the model is always evaluated before the first step: remove the key
fp16_full_eval: float16 is not offered: remove the key
torch_compile_backend torch_compile_mode: `engine: compiled` takes torch's default: remove the key
use_cache prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_on_each_node enable_jit_checkpoint
    restore_callback_states_from_checkpoint label_names debug: part of the loop of transformers' Trainer, which is
    another one here: remove the key
max_memory low_cpu_mem_usage experimental_skip_move_to_device: where a model is loaded is chosen from train.device and
    the memory: nothing to set
liger_rope liger_rms_norm liger_rms_norm_gated liger_glu_activation liger_layer_norm use_kernels
    liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm
    kernel_config use_v1_kernels use_scattermoe use_sonicmoe experts_implementation fused_attn_kernel
    gemma4_hybrid_attn_impl unsloth_force_compile unsloth_tiled_mlp tiled_mlp use_unsloth flex_attn_compile_kwargs
    llama4_linearized_experts bias_activation_fusion apply_rope_fusion moe_grouped_gemm: kernels are chosen for the
    device, and give the same training: nothing to set
tensor_parallel_size tensor_parallel_dim tensor_parallel_plan context_parallel_size context_parallel_dim
    sequence_parallel_degree sequence_parallel expert_parallel_size tensor_model_parallel_size
    pipeline_model_parallel_size expert_model_parallel_size: layers and sequences are not spread over devices, only
    weights (parallel.strategy): remove the key
use_kt kt_cpu_activation kt_config kt_weight_path kt_non_expert_weight_path: weights in the host's memory are not
    offered: remove the key
model_config overrides_of_model_config: the architecture is that of the model's folder: write changes into a copy of
    its configuration
sample_packing_sequentially curriculum_sampling: the order of the examples is always drawn; that of the file is not
    offered: remove the key
fast_inference gpu_memory_utilization max_lora_rank enable_kv_cache sample_backend vllm: no engine for inference is
    part of training: remove the key
plugins: plug-ins are not loaded: kernels change no result; of others the keys that they have are named
eot_tokens: the tokens that end a turn are those of the chat template, and always trained: nothing to set
optimizer_in_bwd: an update comes after the whole backward pass, with the same result: nothing to set
offload_embedding: what is trained stays on the device; optimizer.offload is for its states: remove the key
quantize_moe_experts: experts that are one tensor are not quantized by model.quantization: remove the key
dataset_exact_deduplication: equal examples are all trained, and counted by `preceptor check`: remove the key
data.train.type: the format of an example is recognised by its keys, `columns` renames them: remove the key
data.train.ds_type: the type of a file is recognised by its name and content: remove the key
""")

NO_COUNTERPART: dict[str, str] = _NOT_NEEDED | _NOT_OFFERED
"""Keys of other trainers that are not needed or not offered here -> what to do; with a section: only there."""

CHANGES_TRAINING = frozenset(_NOT_OFFERED)
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
