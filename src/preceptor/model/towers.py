"""What no text goes through: the vision and audio towers of a model, and the projectors that lead to its decoder.

A checkpoint that has them is loaded and saved whole; training leaves them as they are, since no loss here depends on
them. That nothing but decoder and head has a part in the logits is what `check_head` (forward.py) proves.
"""

from collections.abc import Iterator

from torch import nn

from preceptor.model.attention.runs import causal_lm, decoder_of


def tower_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those that are neither the decoder's nor the head's; none in a model that knows text only."""
    bare = causal_lm(model)
    parts = (decoder_of(bare), bare.get_input_embeddings(), bare.get_output_embeddings())
    of_text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return (parameter for parameter in bare.parameters() if id(parameter) not in of_text)


def freeze_towers(model: nn.Module) -> None:
    for parameter in tower_parameters(model):
        parameter.requires_grad_(False)
