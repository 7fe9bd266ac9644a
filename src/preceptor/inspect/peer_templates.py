"""Chat templates of LLaMA-Factory, by the names that its files use: texts around the messages of each role.

From its source (0.9.5, Apache-2.0); `python benchmarks/peer_labels.py` compares them with an installed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


_THOUGHT = ("<think>\n", "\n</think>\n\n")
_CHATML = PeerTemplate(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{}<|im_end|>\n",
)
_QWEN = replace(_CHATML, stop="<|im_end|>")
_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
_GEMMA = PeerTemplate(
    prefix=BOS,
    system="{}\n\n",
    user="<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{}<end_of_turn>\n",
    system_in_user=True,
    stop="<end_of_turn>",
)
_DEEPSEEK_3 = PeerTemplate(prefix=BOS, user="<｜User｜>{}<｜Assistant｜>", assistant="{}" + EOS)

TEMPLATES: Mapping[str, PeerTemplate] = {
    "alpaca": PeerTemplate(
        user="### Instruction:\n{}\n\n### Response:\n",
        assistant="{}" + EOS + "\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n",
    ),
    "chatml": _QWEN,
    "cohere": PeerTemplate(
        prefix=BOS,
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        assistant="{}" + EOS,
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
    "granite3": PeerTemplate(
        system="<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n",
        user="<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        assistant="{}<|end_of_text|>\n",
    ),
    "llama2": PeerTemplate(
        system="<<SYS>>\n{}\n<</SYS>>\n\n", user=BOS + "[INST] {} [/INST]", assistant="{}" + EOS, system_in_user=True
    ),
    "llama3": PeerTemplate(
        prefix=BOS,
        system=_LLAMA_3.format("system") + "{}<|eot_id|>",
        user=_LLAMA_3.format("user") + "{}<|eot_id|>" + _LLAMA_3.format("assistant"),
        assistant="{}<|eot_id|>",
        stop="<|eot_id|>",
    ),
    "llama4": PeerTemplate(
        prefix=BOS,
        system="<|header_start|>system<|header_end|>\n\n{}<|eot|>",
        user="<|header_start|>user<|header_end|>\n\n{}<|eot|><|header_start|>assistant<|header_end|>\n\n",
        assistant="{}<|eot|>",
        stop="<|eot|>",
    ),
    "ministral": PeerTemplate(
        prefix=BOS, system="{}\n\n", user="[INST]{}[/INST]", assistant="{}" + EOS, system_in_user=True
    ),
    "mistral": PeerTemplate(
        prefix=BOS, system="{}\n\n", user="[INST] {}[/INST]", assistant=" {}" + EOS, system_in_user=True
    ),
    "mistral_small": PeerTemplate(
        prefix=BOS, system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", user="[INST]{}[/INST]", assistant="{}" + EOS
    ),
    "phi": PeerTemplate(
        system="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n<|assistant|>\n",
        assistant="{}<|end|>\n",
        stop="<|end|>",
    ),
    "phi4": PeerTemplate(
        system="<|im_start|>system<|im_sep|>{}<|im_end|>",
        user="<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{}<|im_end|>",
        stop="<|im_end|>",
    ),
    "phi4_mini": PeerTemplate(
        system="<|system|>{}<|end|>", user="<|user|>{}<|end|><|assistant|>", assistant="{}<|end|>", stop="<|end|>"
    ),
    "qwen": replace(_QWEN, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen2_vl": replace(_QWEN, default_system="You are a helpful assistant."),
    "qwen3": replace(_QWEN, thought=_THOUGHT),
    "qwen3_nothink": _QWEN,
    "qwen3_vl": replace(_QWEN, thought=_THOUGHT),
    "qwen3_vl_nothink": _QWEN,
    "qwen3_5": replace(_QWEN, thought=_THOUGHT),
    "qwen3_5_nothink": _QWEN,
    "qwen3_6": replace(_QWEN, thought=_THOUGHT),
    "smollm": _CHATML,
    "smollm2": replace(_CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "vicuna": PeerTemplate(
        user="USER: {} ASSISTANT:",
        assistant="{}" + EOS,
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _CHATML,
    "zephyr": PeerTemplate(
        system="<|system|>\n{}" + EOS,
        user="<|user|>\n{}" + EOS + "<|assistant|>\n",
        assistant="{}" + EOS,
        default_system="You are Zephyr, a helpful assistant.",
    ),
}
