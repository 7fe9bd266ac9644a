"""One measurement of benchmarks/peer.py, in a process of its own; the last line printed is the result as JSON."""

import argparse
import json
import os
import pickle
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LEARNING_RATE = 1e-5


def ours(options: dict[str, Any]) -> dict[str, Any]:
    """Steps as `preceptor train` takes them."""
    from shapes import matrix_product_rate, operations_of

    from preceptor import config
    from preceptor.data.dataset import Dataset
    from preceptor.data.loader import Loader
    from preceptor.model.load import load_model
    from preceptor.train.checkpoint import State
    from preceptor.train.optimizer import build_optimizer
    from preceptor.train.step import take_step

    folder = Path(options["folder"])
    steps = pickle.loads((folder / "trees.pickle").read_bytes())
    model = _with_adapter(load_model(folder / "model", dtype=options["dtype"], device=_device()), folder)
    settings = config.Optimizer()
    state = State(model, build_optimizer(model, settings.weight_decay, settings.betas))
    seconds, losses = [], []
    for trees in steps:
        longest = max(tree.num_tokens for tree in trees)
        loader = Loader(Dataset.of(trees), max_length=max(int(options["how"]), longest), batch_size=len(trees), seed=0)
        started = time.perf_counter()
        losses.append(take_step(state, loader.batch(0), LEARNING_RATE, settings.max_grad_norm, options["precision"])[0])
        seconds.append(time.perf_counter() - started)
    found = {"seconds": sum(seconds[1:]), "loss": losses[0], "last_loss": losses[-1], "first_seconds": seconds[0]}
    found["peak_bytes"] = _peak_bytes()
    if (folder / "adapter").exists():
        return found
    work = sum(operations_of(model, _turns(tree)) for trees in steps[1:] for tree in trees)
    rate = matrix_product_rate(options["precision"], model.device)
    return found | {
        "tflops": work / found["seconds"] / 1e12,
        "share_of_matrix_product_rate": work / found["seconds"] / rate,
    }


def _turns(tree: Any) -> tuple[tuple[int, int], ...]:
    """Tokens of context and target of each turn; each segment of a tree counts once."""
    turns: list[tuple[int, int]] = []
    for segment in tree.segments:
        if segment.kind == "context":
            turns.append((len(segment.ids), 0))
        elif turns:
            turns[-1] = (turns[-1][0], turns[-1][1] + len(segment.ids))
    return tuple(turns)


def theirs(options: dict[str, Any]) -> dict[str, Any]:
    """The same steps by TRL's SFTTrainer in one of its configurations: a trainer each, one model and optimizer."""
    import datasets
    from transformers import AutoModelForCausalLM

    folder = Path(options["folder"])
    model = _with_adapter(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=options["dtype"]), folder)
    optimizer, losses = None, []
    seconds: list[float] = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        trainer = _trainer(options, datasets.Dataset.from_list(json.loads(line)), model, optimizer)
        trainer.add_callback(_clock(seconds))
        trainer.train()
        optimizer = trainer.optimizer.optimizer  # with its state, out of accelerate's wrapper
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        if seconds[0] > (options.get("hopeless_seconds") or float("inf")):
            break
    found = {"loss": float(losses[0]), "first_seconds": seconds[0], "peak_bytes": _peak_bytes()}
    return found | ({"seconds": sum(seconds[1:]), "last_loss": float(losses[-1])} if len(seconds) > 1 else {})


def _trainer(options: dict[str, Any], data: Any, model: Any, optimizer: Any) -> Any:
    """All of `data` in one optimizer step, in the batches that the configuration asks for."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder, how = Path(options["folder"]), options["how"]
    longest = max(len(ids) for ids in data["input_ids"])
    batch_size = {"single": 1, "packing": 1}.get(how, min(8, len(data)))
    num_batches = -(-len(data) // batch_size)
    if how == "packing":
        from trl import pack_dataset

        num_batches = len(pack_dataset(data, max(2048, longest), "bfd"))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=num_batches,
        max_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=options["precision"] == "bfloat16",
        gradient_checkpointing=False,
        padding_free=how == "padding_free",
        packing=how == "packing",
        max_length=None if how == "padding_free" else max(2048, longest),
        use_cpu=_device() == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.bos_token
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def _clock(seconds: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Wall time of each optimizer step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    return Clock()


def start_ours(options: dict[str, Any]) -> dict[str, Any]:
    """`preceptor train` for one step over all conversations; its end is when metrics.jsonl is written."""
    folder, out = Path(options["folder"]), Path(options["out"])
    run_file = folder / "run.yaml"
    run_file.write_text(
        f"model: {{path: {folder}/model}}\ndata: {{train: [{{path: {folder}/messages.jsonl}}]}}\nout: {out}\n"
        "train: {duration: 1 steps, batch_size: 16}\neval: {every: null}\n"
    )
    from preceptor.cli import app

    app(["train", str(run_file)], standalone_mode=False)
    return {"finished": (out / "metrics.jsonl").stat().st_mtime}


def start_theirs(options: dict[str, Any]) -> dict[str, Any]:
    """A script as TRL's documentation has it: messages in, loss on the assistant's turns, a batch of one."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(options["folder"])
    data = datasets.load_dataset(
        "json", data_files=str(folder / "messages.jsonl"), split="train", cache_dir=options["out"]
    )
    finished: list[float] = []

    class Finish(TrainerCallback):
        """Notes when the first step ends."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            finished.append(time.time())

    arguments = SFTConfig(
        output_dir=options["out"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(data),
        max_steps=1,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=_device() == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=str(folder / "model"), args=arguments, train_dataset=data, callbacks=[Finish()])
    trainer.train()
    return {"finished": finished[0]}


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model, with the adapter that the work has, if it has one."""
    if not (folder / "adapter").exists():
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", help="a JSON object: side, folder, and what else the side needs")
    asked = json.loads(parser.parse_args().options)
    print(json.dumps(globals()[asked["side"]](asked)))
