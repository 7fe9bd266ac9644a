"""One chain through the model as its authors wrote it: for layers that mix tokens outside attention.

State-space layers, linear attention and convolutions carry a state from token to token that no mask can stop at the
border of two conversations; some models compute attention in a way that cannot be told a row's layout. Such a model
reads one chain at a time (`PackedSequence.alone`, prefix_sharing.py takes trees apart), with its own attention and
from an empty state, as a server would. It costs speed, never exactness.

Legend: T tokens of a row, D hidden size.
"""

import torch
from torch import Tensor, nn

from preceptor.data.forest import PackedSequence
from preceptor.errors import ModelError
from preceptor.model.attention.runs import attention_implementation, causal_lm, decoder_of
from preceptor.model.checks.levels import relative_error, rounding

_PROBE_TOKENS = 24


def plain_hidden_states(model: nn.Module, row: PackedSequence) -> Tensor:
    """The last hidden state (T, D) of each token of a row that is one chain."""
    assert row.alone and len(set(row.subtree_end_T.tolist())) == 1, "one chain"
    decoder = decoder_of(model)
    device = decoder.get_input_embeddings().weight.device
    output = decoder(input_ids=torch.from_numpy(row.ids_T).to(device)[None], use_cache=False)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


@torch.no_grad()
def check_plain(model: nn.Module) -> None:
    """Prove on random tokens that each reads the tokens before it only, by the attention that the authors wrote.

    Raises ModelError if a token's hidden state follows a later token, or differs under eager attention.
    """
    decoder = decoder_of(model)
    weight_VD = decoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids_2T = torch.randint(len(weight_VD), (2, 2 * _PROBE_TOKENS), generator=generator).to(weight_VD.device)
    ids_2T[1, :_PROBE_TOKENS] = ids_2T[0, :_PROBE_TOKENS]
    was_training = model.training
    model.eval()
    try:
        first_TD, second_TD = (decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in ids_2T)
        eager_TD = first_TD  # of a model that has no other attention than its own
        if decoder._can_set_attn_implementation():
            with attention_implementation(model, "eager"):
                eager_TD = decoder(input_ids=ids_2T[:1], use_cache=False).last_hidden_state[0]
    finally:
        model.train(was_training)
    n = _PROBE_TOKENS
    _require_equal(model, first_TD[:n], second_TD[:n], "its hidden states follow later tokens: it is no causal model")
    _require_equal(model, eager_TD, first_TD, f"`{decoder.config._attn_implementation}` attention is not the eager one")


def _require_equal(model: nn.Module, true_TD: Tensor, found_TD: Tensor, found: str) -> None:
    moved, bound = relative_error(found_TD, true_TD), rounding(true_TD.dtype)
    if not moved <= bound:
        raise ModelError(
            f"{causal_lm(model).config.model_type}: {found} (relative {moved:.1e}, rounding allows {bound:.1e}). "
            f"Use another model type."
        )
