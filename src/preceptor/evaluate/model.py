"""A model under evaluation, and the tokens that it is given for a prompt.

Messages are rendered by the chat template, as a server would do it. A model without one (a base model) is given plain
text: each message's content on a line of its own; the answer is to be written on the next. A plain-text prompt is plain
text for every model. The bos token comes first if the tokenizer adds it by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from preceptor.chat.format import ChatFormat, learned_positions, load_trained_format
from preceptor.chat.reasoning import content_text
from preceptor.errors import ConfigError, DataError, TemplateError
from preceptor.evaluate.generate import GeneratedAnswer, Sampling, generate
from preceptor.evaluate.likelihood import must_read_alone
from preceptor.evaluate.tasks import TaskPrompt
from preceptor.hub import CONFIG, place_of, resolve_model_path
from preceptor.model.forward import Engine
from preceptor.model.load import load_model, stored_dtype
from preceptor.model.sharding import is_sharded
from preceptor.world import ONE, World

WINDOW_TOKENS = 4096  # tokens of one forward pass, and the window in which longer texts are read

TokenIds = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A loaded model with its chat format; without a template, messages are given as plain text.

    world: over whose processes tasks are shared out.
    """

    name: str
    model: Any
    chat: ChatFormat
    alone: bool = False  # one chain per forward pass (likelihood.py)
    world: World = ONE

    @property
    def prompt_format(self) -> str:
        """How messages are given to the model, for results."""
        return "plain text" if self.chat.template is None else f"chat template ({self.chat.template.name})"

    @property
    def max_tokens(self) -> int | None:
        """The number of positions that the model knows; None: its config does not say."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @property
    def window_tokens(self) -> int:
        return min(WINDOW_TOKENS, self.max_tokens or WINDOW_TOKENS)

    def prompt_text(self, prompt: TaskPrompt) -> str:
        """The prompt as the text that the model is given. Raises TemplateError if the template rejects the messages."""
        if prompt.messages is None:
            return prompt.text or ""
        if self.chat.template is None:
            return "".join(f"{content_text(message)}\n" for message in prompt.messages)
        return self.chat.prompt(prompt.messages, prompt.tools, prompt.template_kwargs)

    def prompt_ids(self, prompt: TaskPrompt) -> TokenIds:
        return (*(self.chat.bos if self.is_plain(prompt) else ()), *self.chat.ids(self.prompt_text(prompt)))

    def is_plain(self, prompt: TaskPrompt) -> bool:
        """Whether the prompt is given as plain text, in which tokens may join its end with what follows."""
        return prompt.messages is None or self.chat.template is None

    def context(self, prompt: TaskPrompt, source: str, num_new: int = 0) -> TokenIds:
        """The tokens before an answer of at most `num_new` tokens.

        Raises DataError if there is none, or if the model does not know enough positions.
        """
        try:
            ids = self.prompt_ids(prompt)
        except TemplateError as error:
            raise TemplateError(f"{source}: {error}") from None
        if not ids:
            raise DataError(f"{source}: the prompt has no token; an answer needs at least one token before it")
        if self.max_tokens is not None and len(ids) + num_new > self.max_tokens:
            raise DataError(
                f"{source}: {len(ids)} tokens and an answer of {num_new} are more than the {self.max_tokens} of the "
                "model's context; shorten the item, or lower --max-new-tokens (of a task of lm-eval: its max_gen_toks)"
            )
        return ids

    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 64,
        sampling: Sampling | None = None,
        until: Sequence[Sequence[str]] = (),
        shared_out: bool = False,
    ) -> list[GeneratedAnswer]:
        """The answer to each context (generate.py), as long as the model has learned positions for it at most.

        shared_out: each process of the world answers a part, and has all answers; without it each answers all of them.
        Where answers are drawn, that would give others than one process does. Raises DataError for a context that
        leaves no position.
        """
        chat, engine = self.chat, Engine.of(self.model)
        positions, longest = learned_positions(self.model.config), max(map(len, contexts), default=0)
        if positions is not None and longest + max_new_tokens > positions:
            if longest >= positions:
                raise DataError(f"a prompt of {longest:,} tokens; the model has learned positions for {positions:,}")
            limits = [min(max_new_tokens, positions - len(context)) for context in contexts]
            parts = {limit: [k for k, own in enumerate(limits) if own == limit] for limit in limits}
            answered: dict[int, GeneratedAnswer] = {}
            for limit, part in parts.items():
                of_part = [contexts[k] for k in part], limit, batch_size, sampling, [until[k] for k in part if until]
                answered |= zip(part, self.generate(*of_part, shared_out=shared_out), strict=True)
            return [answered[k] for k in range(len(contexts))]
        world = self.world if shared_out else ONE
        by_length = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
        own = by_length[world.rank :: world.size]
        own += by_length[:1] * (math.ceil(len(contexts) / world.size) - len(own))  # each as many, as in likelihood.py
        given = [contexts[index] for index in own]
        ends = [until[index] for index in own] if until else ()
        settings = (chat.stop_token_ids, max_new_tokens, batch_size, sampling, ends)
        answers = engine.call(
            lambda: generate(self.model, chat.tokenizer, given, *settings, in_step=is_sharded(engine))
        )
        found = dict(pair for of_rank in world.gather(list(zip(own, answers, strict=True))) for pair in of_rank)
        return [found[index] for index in range(len(contexts))]


def load_evaluated_model(
    path: str, dtype: str, device: str, template: str | None = None, trust_remote_code: bool = False
) -> EvaluatedModel:
    """Load a model to evaluate.

    template: as in a run file, or `plain` for none; None: the model's own, plain text if it has none. dtype: `auto` for
    `default_dtype`. trust_remote_code: run the code that comes with the model; its folder alone never decides that.
    Raises ModelError and TemplateError as `load_trained_format`, ConfigError as `device_named`.
    """
    place, chat = device_named(device), load_trained_format(path, template, trust_remote_code)
    if dtype == "auto":
        folder, revision = place_of(resolve_model_path(path, adapters=True), CONFIG)
        dtype = default_dtype(stored_dtype(folder, trust_remote_code, revision), place)
    model = load_model(path, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    return EvaluatedModel(path, model, chat, must_read_alone(model))


def device_named(device: str) -> torch.device:
    """`auto`: the GPU, if there is one. Raises ConfigError for `cuda` where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use `auto` or `cpu`")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def default_dtype(stored: torch.dtype | None, device: torch.device) -> str:
    """bfloat16 for weights that are stored in it, on a GPU that has it; else float32."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it and stored == torch.bfloat16 else "float32"
