"""Proof that a model which reads one conversation at a time is causal, by the attention that its authors wrote.

Legend: T tokens, D hidden size.
"""

import torch
from torch import nn

from preceptor.model.attention.runs import attention_implementation
from preceptor.model.forward import gathered
from preceptor.model.numerics import require_close
from preceptor.model.parts import decoder_of, evaluating, model_type

_PROBE_TOKENS = 24


@gathered
@torch.no_grad()
def check_sequential(model: nn.Module) -> None:
    """Prove on random tokens that each reads the tokens before it only.

    Raises ModelError if a token's hidden state follows a later token, or differs under eager attention.
    """
    decoder = decoder_of(model)
    weight_VD = decoder.get_input_embeddings().weight
    n, generator = _PROBE_TOKENS, torch.Generator().manual_seed(0)
    ids_2T = torch.randint(len(weight_VD), (2, 2 * n), generator=generator).to(weight_VD.device)
    ids_2T[1, :n] = ids_2T[0, :n]
    with evaluating(model):
        first_TD, second_TD = (decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in ids_2T)
        eager_TD = first_TD  # of a model that has no other attention than its own
        if decoder._can_set_attn_implementation():
            with attention_implementation(decoder, "eager"):
                eager_TD = decoder(input_ids=ids_2T[:1], use_cache=False).last_hidden_state[0]
    follows = f"{model_type(model)}: its hidden states follow later tokens: it is no causal model"
    require_close(second_TD[:n], first_TD[:n], follows)
    own = f"`{decoder.config._attn_implementation}` attention is not the eager one"
    require_close(first_TD, eager_TD, f"{model_type(model)}: {own}")
