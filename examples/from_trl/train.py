"""A TRL script, as `preceptor convert` reads it: SmolLM2 on Capybara with LoRA."""

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

MODEL = "HuggingFaceTB/SmolLM2-360M"

dataset = load_dataset("trl-lib/Capybara")
args = SFTConfig(
    output_dir="runs/smollm2-capybara",
    num_train_epochs=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_ratio=0.03,
    max_length=2048,
    packing=True,
    assistant_only_loss=True,
    gradient_checkpointing=True,
    bf16=True,
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    report_to="none",
)
trainer = SFTTrainer(
    model=MODEL,
    args=args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=LoraConfig(r=32, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
