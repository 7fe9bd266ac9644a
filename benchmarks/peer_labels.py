"""Labels that other trainers make, against our emulation of them (`preceptor convert FILE --data DATA`).

    pip install --no-deps --target peers llamafactory==0.9.5 torchtune==0.6.1 axolotl==0.19.0 addict
    PYTHONPATH=peers python benchmarks/peer_labels.py

Their own code reads conversations and makes ids and labels; a trainer that is not installed is skipped by name.
Packages for pictures, sound and quantization, which they import and a text does not need, are replaced by empty
modules. The tokenizer is a small byte-level one with the special tokens of all templates; its merges cross the ends of
words, so a text that is tokenised in other parts has other ids. It tokenises the texts of torchtune's tokenizers too.
TRL is compared in tests/inspect/test_peer_rules.py. Writes benchmarks/results/peer_labels.json: per case a digest of
what the trainer itself makes, which a test compares with the emulation.
"""

import argparse
import copy
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preceptor.chat.template import load_template
from preceptor.data.examples import Rejection
from preceptor.data.formats.rows import read_row
from preceptor.inspect.peer_rules import rule_of
from preceptor.inspect.peer_templates import TEMPLATES

RESULT = Path(__file__).parent / "results" / "peer_labels.json"
PACKAGES = {"LLaMA-Factory": "llamafactory", "torchtune": "torchtune", "Axolotl": "axolotl"}
ABSENT = ("torchaudio", "torchao", "torchdata", "omegaconf", "sentencepiece", "tiktoken")
IGNORED = -100

SPECIAL = """<unk> <s> </s> <|endoftext|> <|im_start|> <|im_end|> <|im_sep|> <|begin_of_text|> <|end_of_text|>
<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|header_start|> <|header_end|> <|eot|> <|eom|>
<start_of_turn> <end_of_turn> <eos> <|system|> <|user|> <|assistant|> <|end|> <|observation|> [gMASK] <sop>
<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|start_of_role|>
<|end_of_role|> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] <｜User｜> <｜Assistant｜> <think> </think>""".split()  # noqa: SIM905
MERGES = ("ĊĊ", ".Ċ", "Ġt", "th", "he", "Ġ(", ":Ġ", "sĊ", "eĊ", "Ċ<", "ĠA", "AS", "e.", "t.", "Ċ#", ">Ċ")

ASK, ANSWER = {"role": "user", "content": "the user asks"}, {"role": "assistant", "content": "The message is here."}
AGAIN, LAST = {"role": "user", "content": "and then?\n"}, {"role": "assistant", "content": "\nan end.\n"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nso it is\n</think>\n\nThe message."}
ROWS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [SYSTEM, ASK, ANSWER, AGAIN, LAST]},
    "plain": {"messages": [ASK, ANSWER]},
    "spaces": {
        "messages": [
            {"role": "user", "content": "  a {}  "},
            {"role": "assistant", "content": " b \n\n"},
            *[ASK, ANSWER],
        ]
    },
    "thought": {"messages": [ASK, THOUGHT, AGAIN, THOUGHT]},
    "half_thought": {"messages": [ASK, THOUGHT, AGAIN, LAST]},
    "two_users": {"messages": [ASK, AGAIN, ANSWER]},
    "no_answer": {"messages": [ASK, ANSWER, AGAIN]},
    "alpaca": {"instruction": "the task", "input": "a text", "output": "The end."},
    "alpaca_short": {"instruction": "the task", "input": "", "output": "The end."},
}
COMMON = tuple(ROWS)  # with every setting
ROWS |= {
    "alpaca_more": {**ROWS["alpaca"], "system": "Be brief.", "history": [["the user asks", "The message is here."]]},
    "renamed": {"asked": "the task", "said": "The end.", "about": "Be brief."},
    "beside": {"messages": [ASK, ANSWER], "system": "Be brief."},
    "thinking": {"messages": [{"role": "system", "content": "detailed thinking on"}, ASK, ANSWER]},
    "from_value": {
        "conversations": [
            {"from": "human", "value": "the user asks"},
            {"from": "gpt", "value": "The message is here."},
            {"from": "human", "value": "and then?"},
            {"from": "model", "value": "an end."},
        ]
    },
    "text": {"text": "The message is here."},
    "text_ended": {"text": "The message is here.</s>"},
}
STRIPS_THOUGHTS = (  # as Qwen3's: thoughts of earlier turns are left out, the last answer always has some
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_SPACES = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
OWN_SYSTEM = (  # a system prompt of its own, and an empty thought before every answer
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """settings: as `preceptor convert` reads them from the trainer's file. row: a name of ROWS."""

    peer: str
    settings: dict[str, Any]
    row: str
    template: str = "chatml"
    changes: dict[str, Any] = field(default_factory=dict)  # of the tokenizer

    @property
    def name(self) -> str:
        """Of all but the row."""
        return f"{self.template} {json.dumps({**self.settings, **self.changes}, sort_keys=True)}"


def cases() -> Iterator[Case]:
    """Every emulated form with every setting that changes what is trained."""
    yield from llama_factory_cases()
    yield from torchtune_cases()
    yield from axolotl_cases()


def llama_factory_cases() -> Iterator[Case]:
    basic: list[dict[str, Any]] = [{}, {"mask_history": True}, {"train_on_prompt": True}]
    for name, form in TEMPLATES.items():
        thinking = [{"enable_thinking": False}, {"enable_thinking": False, "mask_history": True}]
        for option in [*basic, *(thinking if form.thought else [])]:
            yield from (Case("LLaMA-Factory", {"template": name, **option}, row) for row in COMMON)
    for option in ({"default_system": "Answer."}, {"formatting": "openai"}):
        yield from (Case("LLaMA-Factory", {"template": "qwen", **option}, row) for row in ("chat", "plain", "thinking"))
    alpaca = {"prompt": "instruction", "query": "input", "response": "output"}
    for more in ({}, {"system": "system"}, {"history": "history"}, {"system": "system", "history": "history"}):
        yield Case("LLaMA-Factory", {"template": "qwen", "columns": {**alpaca, **more}}, "alpaca_more")
        yield Case("LLaMA-Factory", {"template": "qwen", "columns": {"messages": "messages", **more}}, "beside")
    renamed = {"prompt": "asked", "response": "said", "system": "about"}
    yield Case("LLaMA-Factory", {"template": "qwen", "columns": renamed}, "renamed")
    yield Case("LLaMA-Factory", {"template": "qwen", "train_on_prompt": True, "mask_history": True}, "chat")
    for name, row in itertools.product(("qwen", "llama3", "default", "gemma2"), ("text", "text_ended")):
        yield Case("LLaMA-Factory", {"template": name, "stage": "pt", "columns": {"prompt": "text"}}, row)
    for template, option in itertools.product(("chatml", "strips_spaces", "own_system"), basic):  # no template is named
        yield from (Case("LLaMA-Factory", dict(option), row, template) for row in COMMON)


def torchtune_cases() -> Iterator[Case]:
    tokenizers = ("llama3", "qwen2", "qwen2_5", "phi3_mini", "phi4", "gemma", "mistral", "llama2")
    for own, inputs, system, row in itertools.product(tokenizers, (False, True), (None, "Answer."), COMMON):
        kind = "alpaca_dataset" if row.startswith("alpaca") else "chat_dataset"
        data = {"_component_": f"torchtune.datasets.{kind}", "new_system_prompt": system}
        file = {"tokenizer": {"_component_": f"torchtune.models.{own}.{own}_tokenizer"}, "dataset": data}
        if system is None or kind == "chat_dataset":
            yield Case("torchtune", {"train_on_inputs": inputs, "torchtune": file}, row)
    for own, ends in itertools.product(("llama3", "qwen2", "gemma", "mistral", "llama2"), (True, False)):
        texts = {"_component_": "torchtune.datasets.text_completion_dataset", **({} if ends else {"add_eos": False})}
        file = {"tokenizer": {"_component_": f"torchtune.models.{own}.{own}_tokenizer"}, "dataset": texts}
        yield Case("torchtune", {"torchtune": file}, "text")


def axolotl_cases() -> Iterator[Case]:
    options: list[dict[str, Any]] = [{}, {"train_on_inputs": True}, {"eot_tokens": ["<|im_end|>"]}]
    options += [{"datasets": [{"train_on_eos": when}]} for when in ("all", "last", "none")]
    options += [{"datasets": [{"roles_to_train": roles}]} for roles in (["user"], ["assistant", "system"])]
    templates = ("chatml", "llama3", "strips_thoughts", "strips_spaces")
    rows = [name for name in COMMON if "messages" in ROWS[name]]
    for template, eos, option in itertools.product(templates, ("<|im_end|>", "<|eot_id|>", "</s>"), options):
        yield from (Case("Axolotl", option, row, template, {"eos_token": eos}) for row in rows)
    for inputs, row in itertools.product((False, True), ("alpaca", "alpaca_short")):
        yield Case("Axolotl", {"train_on_inputs": inputs, "datasets": [{"type": "alpaca"}]}, row)
    im_end, places = {"eos_token": "<|im_end|>"}, {"message_property_mappings": {"role": "from", "content": "value"}}
    entries: list[dict[str, Any]] = [
        {},
        {"roles_to_train": ["gpt"]},
        {"roles_to_train": ["human"]},
        {"roles": {"assistant": ["gpt", "model"], "user": ["human"]}},
        {"roles": {"bot": ["gpt"], "user": ["human"]}, "roles_to_train": ["bot", "model"]},
        {"roles_to_train": []},
    ]
    for entry in entries:
        entry = {"field_messages": "conversations", **places, **entry}
        yield Case("Axolotl", {"datasets": [entry]}, "from_value", "chatml", im_end)
    for row, drops in itertools.product(("chat", "beside"), (False, True)):
        yield Case("Axolotl", {"datasets": [{"drop_system_message": drops}]}, row, "chatml", im_end)
    ignored = {"roles_to_train": ["user"], "train_on_eos": "none", "train_on_eot": "none"}
    yield Case("Axolotl", ignored, "chat", "chatml", im_end)
    for row in ("text", "text_ended"):
        yield Case("Axolotl", {"datasets": [{"type": "completion"}]}, row)


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with MERGES and SPECIAL."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *MERGES]))}
    pairs = [(merge[0], merge[1]) for merge in MERGES]
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(SPECIAL)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|endoftext|>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=found, **settings)


_kept_tokenizer = cache(tokenizer)  # the trainers change theirs


@cache
def template_text(name: str) -> str:
    own = {"strips_thoughts": STRIPS_THOUGHTS, "strips_spaces": STRIPS_SPACES, "own_system": OWN_SYSTEM}
    return own[name] if name in own else load_template(name, tokenizer()).text


def ours(case: Case) -> tuple[list[int], list[bool]] | None:
    """The emulation; None where it says that there are no labels."""
    row, named = ROWS[case.row], {"prompt": "instruction", "query": "input", "response": "output"}
    columns = {named.get(part, part): column for part, column in case.settings.get("columns", {}).items()}
    _, example = read_row({**row, **{part: row[column] for part, column in columns.items() if column in row}}, "rows:1")
    if isinstance(example, Rejection):
        return None
    own = _kept_tokenizer(**case.changes)
    rule = rule_of(case.peer, case.settings, own, template_text(case.template))  # type: ignore[arg-type]
    found = rule.tokens(example, row)
    return None if isinstance(found, str) else (found.ids, found.trained)


def digest(found: tuple[list[int], list[bool]] | None) -> str:
    return "none" if found is None else hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


# The trainers --------------------------------------------------------------------------------------------------------


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class _EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of ABSENT packages, where they are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def llama_factory(case: Case) -> tuple[list[int], list[bool]] | None:
    from llamafactory.data import template as templates
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor.pretrain import PretrainDatasetProcessor
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments

    row = dict(ROWS[case.row])
    given = {key: value for key, value in case.settings.items() if key not in ("formatting", "columns", "stage")}
    try:
        arguments = DataArguments(**{"template": None, "cutoff_len": 1 << 20, **given})
    except ValueError:  # refused
        return None
    own = tokenizer(**case.changes)
    own.chat_template = template_text(case.template)
    kept = copy.deepcopy(templates.TEMPLATES)
    try:
        form = templates.get_template_and_fix_tokenizer(own, arguments)
    except ValueError:  # refused
        return None
    finally:
        templates.TEMPLATES.update(kept)
    form.mm_plugin = get_mm_plugin("base")  # that of a model of pictures asks for its processor, and leaves texts alone
    about = DatasetAttr("file", dataset_name="rows")
    about.formatting = "alpaca"
    if "columns" in case.settings:
        about.join({"columns": case.settings["columns"]})
    elif "messages" not in row:
        about.prompt, about.query, about.response = "instruction", "input", "output"
    if "messages" in row:
        about.formatting = case.settings.get("formatting", "sharegpt")
        about.messages, about.role_tag, about.content_tag = "messages", "role", "content"
        about.user_tag, about.assistant_tag, about.system_tag = "user", "assistant", "system"
    read = get_dataset_converter(about.formatting, about, arguments)(row)
    if case.settings.get("stage") == "pt":
        arguments.packing = True  # as its parser sets it
        processor = PretrainDatasetProcessor(template=form, tokenizer=own, processor=None, data_args=arguments)
        arguments.cutoff_len = len(own(read["_prompt"][0]["content"], add_special_tokens=False)["input_ids"]) + 1
        (ids,) = processor.preprocess_dataset({"_prompt": [read["_prompt"]]})["input_ids"]
        return list(ids), [True] * len(ids)
    processor = SupervisedDatasetProcessor(template=form, tokenizer=own, processor=None, data_args=arguments)
    found = processor.preprocess_dataset({key: [value] for key, value in read.items()})
    return _marked(found["input_ids"][0], found["labels"][0]) if found.get("input_ids") else None


def torchtune(case: Case) -> tuple[list[int], list[bool]] | None:
    from torchtune.data import AlpacaToMessages, OpenAIToMessages
    from torchtune.datasets._sft import SFTTransform
    from torchtune.datasets._text_completion import TextCompletionDataset

    inputs, file = case.settings.get("train_on_inputs"), case.settings["torchtune"]
    if "text" in ROWS[case.row]:
        name = file["tokenizer"]["_component_"].rpartition(".")[2].removesuffix("_tokenizer")
        texts = TextCompletionDataset.__new__(TextCompletionDataset)  # its maker loads a data set
        texts._tokenizer, texts._column = _torchtune_tokenizer(name), "text"
        texts.add_eos = file["dataset"].get("add_eos", True)
        found = texts._prepare_sample(ROWS[case.row])
        return _marked(found["tokens"], found["labels"])
    transform = OpenAIToMessages(train_on_input=inputs, new_system_prompt=file["dataset"]["new_system_prompt"])
    if case.row.startswith("alpaca"):
        transform = AlpacaToMessages(train_on_input=inputs)
    name = file["tokenizer"]["_component_"].rpartition(".")[2].removesuffix("_tokenizer")
    try:
        found = SFTTransform(transform, _torchtune_tokenizer(name))(copy.deepcopy(ROWS[case.row]))
    except ValueError:
        return None
    return _marked(found["tokens"], [int(label) for label in found["labels"]])


def _torchtune_tokenizer(name: str) -> Any:
    """Its own class for a model, whose texts are tokenised by ours."""
    own = tokenizer()
    ids = own.get_vocab()

    class Base:
        def __init__(self, *_: Any, **given: Any) -> None:
            self.bos_id, self.eos_id = given.get("bos_id", own.bos_token_id), given.get("eos_id", own.eos_token_id)
            self.pad_id = 0

        def encode(self, text: str, add_bos: bool = True, add_eos: bool = True, **_: Any) -> list[int]:
            ids = list(own(text, add_special_tokens=False)["input_ids"]) if text else []
            around = [self.bos_id] if add_bos else [], [self.eos_id] if add_eos else []
            return [each for each in (*around[0], *ids, *around[1]) if each is not None]

    classes = {
        "llama3": ("llama3", "Llama3Tokenizer", "TikTokenBaseTokenizer"),
        "qwen2": ("qwen2", "Qwen2Tokenizer", None),
        "qwen2_5": ("qwen2_5", "Qwen2_5Tokenizer", None),
        "phi3_mini": ("phi3", "Phi3MiniTokenizer", "SentencePieceBaseTokenizer"),
        "phi4": ("phi4", "Phi4Tokenizer", "GPT2BaseTokenizer"),
        "gemma": ("gemma", "GemmaTokenizer", "SentencePieceBaseTokenizer"),
        "mistral": ("mistral", "MistralTokenizer", "SentencePieceBaseTokenizer"),
        "llama2": ("llama2", "Llama2Tokenizer", "SentencePieceBaseTokenizer"),
    }
    folder, kind, base = classes[name]
    module = importlib.import_module(f"torchtune.models.{folder}._tokenizer")
    named = {f"<|{token}|>": 0 for token in ("finetune_right_pad_id", "step_id", "python_tag", "image", "dummy_85")}
    special = {**named, "<tool_call>": 0, "</tool_call>": 0, **{token: ids[token] for token in SPECIAL}}
    if base is None:
        found = getattr(module, kind).__new__(getattr(module, kind))
        found.im_start_id, found.im_end_id, found.eos_id = (ids[f"<|im_{end}|>"] for end in ("start", "end", "end"))
        found.max_seq_len = found.prompt_template = None
        found.encode = Base(bos_id=None, eos_id=found.eos_id).encode
        return found
    setattr(module, base, Base)
    if name == "llama3":
        return getattr(module, kind)("", special_tokens=special)
    if name == "phi4":
        return getattr(module, kind)("", "", special_tokens=special)
    return getattr(module, kind)("", **({"special_tokens": special} if name == "phi3_mini" else {}))


def axolotl(case: Case) -> tuple[list[int], list[bool]] | None:
    from axolotl.prompt_strategies import chat_template, completion
    from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
    from axolotl.prompters import AlpacaPrompter
    from axolotl.utils.dict import DictDefault

    own = tokenizer(**case.changes)
    entry = dict((case.settings.get("datasets") or [{}])[0])
    settings = {key: value for key, value in case.settings.items() if key != "datasets"}
    cfg = DictDefault({"sequence_len": 1 << 20, "chat_template": "jinja", **settings})
    kind = entry.pop("type", None)
    if kind == "completion":
        strategy = completion.load(own, cfg, entry)
        found = strategy.tokenize_prompt({key: [value] for key, value in ROWS[case.row].items()})
        return _marked(found["input_ids"][0], found["labels"][0])
    if kind == "alpaca":
        strategy = AlpacaPromptTokenizingStrategy(
            AlpacaPrompter(), own, case.settings.get("train_on_inputs", False), 1 << 20
        )
    else:
        cfg["chat_template_jinja"] = template_text(case.template)
        strategy = chat_template.load(own, cfg, entry)
    found = strategy.tokenize_prompt(copy.deepcopy(ROWS[case.row]))
    return _marked(found["input_ids"], found["labels"])


def _marked(ids: list[int], labels: list[int]) -> tuple[list[int], list[bool]]:
    return list(ids), [label != IGNORED for label in labels]


MAKERS: dict[str, Callable[[Case], tuple[list[int], list[bool]] | None]] = {
    "LLaMA-Factory": llama_factory,
    "torchtune": torchtune,
    "Axolotl": axolotl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sys.meta_path.append(_EmptyModules())
    logging.disable(logging.WARNING)
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # LLaMA-Factory's, of the transformers that it trains with
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for peer, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{peer}: not installed, so not compared: pip install --no-deps --target peers {package}")
            continue
        found: dict[str, Any] = {"version": version(package), "transformers": version("transformers"), "cases": {}}
        differing, num = [], 0
        for case in (each for each in cases() if each.peer == peer):
            theirs = MAKERS[peer](case)
            found["cases"].setdefault(case.name, {})[case.row] = digest(theirs)
            num += 1
            if theirs != ours(case):
                differing.append(case)
        result[peer] = found
        print(f"{peer} {found['version']}: {num - len(differing)} of {num} cases equal")
        for case in differing[:10]:
            _print_difference(case, MAKERS[peer](case), ours(case))
    RESULT.write_text(json.dumps(result, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def _print_difference(case: Case, theirs: Any, own: Any) -> None:
    print(f"  {case.row}, {case.name}")
    words = tokenizer()
    for name, found in (("theirs", theirs), ("ours", own)):
        pieces = (
            "none"
            if found is None
            else [("+" if mark else "-") + words.decode([id_]) for id_, mark in zip(*found, strict=True)]
        )
        print(f"    {name}: {pieces}")


if __name__ == "__main__":
    main()
