"""Chat templates of LLaMA-Factory, by the names that its files use: texts around the messages of each role.

From its source (0.9.5, Apache-2.0); `python benchmarks/peer_labels.py` compares them with an installed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

EOS, BOS = "\0eos\0", "\0bos\0"  # these tokens, apart from the texts around them


@dataclass(frozen=True)
class PeerTemplate:
    """system, user, assistant: with {} for the content. default_system: where the conversation has none.

    system_in_user: the system text is written into the first user message. efficient_eos: the next turn's first token
    is to be answered by eos. stop: takes the place of the tokenizer's eos. thought: an answer without these two texts
    gets them, empty, before it.
    """

    user: str
    assistant: str
    system: str = "{}"
    prefix: str = ""
    default_system: str = ""
    system_in_user: bool = False
    efficient_eos: bool = False
    stop: str | None = None
    thought: tuple[str, str] | None = None


def _headed(
    header: str, end: str, roles: tuple[str, str, str] = ("system", "user", "assistant"), **settings: Any
) -> PeerTemplate:
    """Every content stands between a header, in which {role} is the role, and an end."""
    system, user, assistant = (header.replace("{role}", role) for role in roles)
    texts = {"system": f"{system}{{}}{end}", "user": f"{user}{{}}{end}{assistant}", "assistant": f"{{}}{end}"}
    return PeerTemplate(**{**texts, **settings})


_THOUGHT = ("<think>\n", "\n</think>\n\n")
_CHATML = _headed("<|im_start|>{role}\n", "<|im_end|>\n")
_QWEN = replace(_CHATML, stop="<|im_end|>")
_QWEN_3 = replace(_QWEN, thought=_THOUGHT)
_GEMMA = _headed(
    "<start_of_turn>{role}\n", "<end_of_turn>\n", ("system", "user", "model"), system="{}\n\n", prefix=BOS,
    system_in_user=True, stop="<end_of_turn>",
)  # fmt: skip
_DEEPSEEK_3 = PeerTemplate(prefix=BOS, user="<｜User｜>{}<｜Assistant｜>", assistant="{}" + EOS)

TEMPLATES: Mapping[str, PeerTemplate] = {
    "alpaca": PeerTemplate(
        user="### Instruction:\n{}\n\n### Response:\n",
        assistant="{}" + EOS + "\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n",
    ),
    "chatml": _QWEN,
    "cohere": _headed(
        "<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        ("SYSTEM", "USER", "CHATBOT"),
        assistant="{}" + EOS,
        prefix=BOS,
    ),
    "deepseek": PeerTemplate(prefix=BOS, system="{}\n\n", user="User: {}\n\nAssistant:", assistant="{}" + EOS),
    "deepseek3": _DEEPSEEK_3,
    "deepseekr1": replace(_DEEPSEEK_3, thought=_THOUGHT),
    "default": PeerTemplate(
        system="System: {}" + EOS + "\n", user="Human: {}" + EOS + "\nAssistant:", assistant="{}" + EOS + "\n"
    ),
    "empty": PeerTemplate(user="{}", assistant="{}"),
    "falcon": PeerTemplate(user="User: {}\nFalcon:", assistant="{}\n", efficient_eos=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, efficient_eos=True, stop=None),
    "gemma3": _GEMMA,
    "glm4": PeerTemplate(
        prefix="[gMASK]<sop>",
        system="<|system|>\n{}",
        user="<|user|>\n{}<|assistant|>",
        assistant="\n{}",
        efficient_eos=True,
    ),
    "granite3": _headed("<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n"),
    "llama2": PeerTemplate(
        system="<<SYS>>\n{}\n<</SYS>>\n\n", user=BOS + "[INST] {} [/INST]", assistant="{}" + EOS, system_in_user=True
    ),
    "llama3": _headed("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", prefix=BOS, stop="<|eot_id|>"),
    "llama4": _headed("<|header_start|>{role}<|header_end|>\n\n", "<|eot|>", prefix=BOS, stop="<|eot|>"),
    "ministral": PeerTemplate(
        prefix=BOS, system="{}\n\n", user="[INST]{}[/INST]", assistant="{}" + EOS, system_in_user=True
    ),
    "mistral": PeerTemplate(
        prefix=BOS, system="{}\n\n", user="[INST] {}[/INST]", assistant=" {}" + EOS, system_in_user=True
    ),
    "mistral_small": PeerTemplate(
        prefix=BOS, system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", user="[INST]{}[/INST]", assistant="{}" + EOS
    ),
    "phi": _headed("<|{role}|>\n", "<|end|>\n", stop="<|end|>"),
    "phi4": _headed("<|im_start|>{role}<|im_sep|>", "<|im_end|>", stop="<|im_end|>"),
    "phi4_mini": _headed("<|{role}|>", "<|end|>", stop="<|end|>"),
    "qwen": replace(_QWEN, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen2_vl": replace(_QWEN, default_system="You are a helpful assistant."),
    **dict.fromkeys(("qwen3", "qwen3_vl", "qwen3_5", "qwen3_6"), _QWEN_3),
    **dict.fromkeys(("qwen3_nothink", "qwen3_vl_nothink", "qwen3_5_nothink"), _QWEN),
    "smollm": _CHATML,
    "smollm2": replace(_CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "vicuna": PeerTemplate(
        user="USER: {} ASSISTANT:",
        assistant="{}" + EOS,
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _CHATML,
    "zephyr": _headed("<|{role}|>\n", EOS, default_system="You are Zephyr, a helpful assistant."),
}
