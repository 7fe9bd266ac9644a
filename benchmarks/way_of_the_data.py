"""How far it is from a line of JSONL to the optimizer step: the files and functions that one conversation goes through.

python benchmarks/way_of_the_data.py [--list]

A two-turn conversation is read, rendered, packed and trained for one step on a tiny random model, in one process. Every
function of the package that is called meanwhile counts once, in the order of its first call. What only sets up a run
(tokenizer, model, proofs before step 1) is not part of the way. A *return* is a first call into a file that was left
before: a reader who follows the calls has to open that file again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import preceptor

PACKAGE = Path(preceptor.__file__).parent


class Way:
    """Functions of the package in the order of their first call, while recording."""

    def __init__(self) -> None:
        self.codes: dict[CodeType, str] = {}

    def recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._while(function, self._note)

    def pausing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._while(function, None)

    def _while(self, function: Callable[..., Any], profile: Any) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(profile)
            try:
                return function(*arguments, **keywords)
            finally:
                sys.setprofile(before)

        return called

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<")  # no comprehension
        if event == "call" and ours and code not in self.codes:
            self.codes[code] = str(Path(code.co_filename).relative_to(PACKAGE))

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self.codes.values()))

    @property
    def num_returns(self) -> int:
        left: set[str] = set()
        last, returns = "", 0
        for file in self.codes.values():
            if file != last:
                returns += file in left
                left.add(last)
                last = file
        return returns


def write_model(folder: Path) -> None:
    """A tiny random Qwen3 with a character tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<eos>": 0, **{c: i + 1 for i, c in enumerate(characters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(characters) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def write_data(file: Path, num: int = 3) -> None:
    lines = []
    for number in range(num):
        texts = [(role, f"{role} says {number}.{turn}") for turn in (1, 2) for role in ("user", "assistant")]
        messages = [{"role": role, "content": text} for role, text in texts]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def follow(folder: Path) -> Way:
    from rich.console import Console

    from preceptor import config
    from preceptor.chat.format import load_chat_format
    from preceptor.data.loader import Loader
    from preceptor.train import loop
    from preceptor.train import prepare as preparation
    from preceptor.train.run import Training
    from preceptor.train.run_folder import claim
    from preceptor.train.signals import StopRequest

    write_model(folder / "model")
    write_data(folder / "train.jsonl")
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "chat_template": "chatml"},
        "train": {"duration": "1 steps", "device": "cpu"},
        "out": str(folder / "run"),
    }
    run = config.build(tree, "way_of_the_data")
    way = Way()
    preparation.__dict__["load_chat_format"] = way.pausing(load_chat_format)
    prepared = way.recording(preparation.prepare)(run)
    Loader.batch = way.recording(Loader.batch)  # type: ignore[method-assign]
    loop.__dict__["take_step"] = way.recording(loop.__dict__["take_step"])
    with claim(run) as run_folder:
        for _ in Training(run_folder, prepared, Console(quiet=True), StopRequest()).steps():
            pass
    return way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print each function")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        way = follow(Path(folder))
    if arguments.list:
        for code, file in way.codes.items():
            print(f"{file}:{code.co_firstlineno} {code.co_qualname}")
    print(f"files {len(way.files)}, functions {len(way.codes)}, returns to a file left before {way.num_returns}")


if __name__ == "__main__":
    main()
