"""Adapters (LoRA) through peft."""
