"""A real training step of a tiny model, measured, and sequences to train it on."""

import gc

import numpy as np
import torch

from preceptor.data.forest import pack_trees
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel, kl_to_base
from preceptor.model.loss.linear_cross_entropy import HeadCast
from preceptor.model.numerics import autocast
from preceptor.model.options import CROSS_ENTROPY
from preceptor.plan.timeline import LiveBytes
from preceptor.train.optimizer import accumulate_in_float32, build_optimizer
from tiny import chain

ONE = (((300, 100),),)
SEVERAL = (((120, 40),), ((60, 20), (50, 30)), ((0, 90),), ((30, 0),))


def sequence_of(conversations, alone=False):
    """Conversations of (context, target) tokens, packed."""
    rng = np.random.default_rng(0)
    return pack_trees([chain(rng, tuple(n for turn in turns for n in turn)) for turns in conversations], alone)


def measured_peak(
    model, sequence, policy, precision="float32", num_sequences=1, options=CROSS_ENTROPY, base_tokens=0, **of_optimizer
):
    """The most bytes of tensors that live at one time in the second step, when the optimizer has its state.

    base_tokens: with the divergence from the base, over so many tokens.
    """
    base = ReferenceModel.of(model, base_tokens) if base_tokens else None
    held = [model, base.model] if base and base.is_copy else [model]

    def divergence(hidden_MD, source_N, head, sequence, divisor):
        return kl_to_base(hidden_MD, source_N, head, base, sequence) / divisor

    optimizer = build_optimizer(model, **of_optimizer)
    if num_sequences > 1:
        accumulate_in_float32(model)
    engine = Engine(model)
    gc.collect()
    with LiveBytes([tensor for each in held for tensor in (*each.parameters(), *each.buffers())]) as live:
        for _ in range(2):
            gc.collect()
            live.peak_bytes = live.live_bytes
            step = StepContext(accumulates=True, head_cast=HeadCast())
            for _ in range(num_sequences):
                with autocast(torch.device("cpu"), precision):
                    loss = engine(sequence, policy, options, step, divergence if base else None)
                loss.backward()
                del loss
            del step
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak_bytes
