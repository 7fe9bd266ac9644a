"""Proof that the output head found in a model gives the model's own logits."""

from dataclasses import replace

import torch
from torch import nn

from preceptor.errors import ModelError
from preceptor.model.closeness import require_close, rounding
from preceptor.model.forward import gathered
from preceptor.model.head import output_head
from preceptor.model.parts import causal_lm, decoder_of, evaluating, model_type


@gathered
@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove it on random tokens. Raises ModelError if it is not so."""
    bare, head = causal_lm(model), output_head(model)
    weight_VD = head.weight_VD
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight_VD.shape[0], (1, 8), generator=generator).to(weight_VD.device)
    with evaluating(model):
        expected_NV = bare(input_ids=ids, use_cache=False).logits[0]
        hidden_ND = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    if hidden_ND.shape[-1] != weight_VD.shape[-1]:
        raise ModelError(
            f"{model_type(model)}: the output embedding reads {weight_VD.shape[-1]} values per token, hidden states "
            f"have {hidden_ND.shape[-1]}: this model does more between them than is known here, so its loss would be "
            f"wrong. Use another model type."
        )
    require_close(
        replace(head, weight_VD=weight_VD.double()).logits(hidden_ND.double()),
        expected_NV.double(),
        f"{model_type(model)}: the logits from the output embedding differ from the model's own, as this model does "
        f"more to its logits than is known here, so its loss would be wrong",
        # a head that an adapter trains whole is float32 beside a decoder in bfloat16
        dtype=max(weight_VD.dtype, hidden_ND.dtype, expected_NV.dtype, key=rounding),
    )
