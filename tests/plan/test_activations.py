"""What is predicted to be kept for backward against what is: every family, precision, mode, and with adapters."""

import gc
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.model import forward
from preceptor.model.activations.policy import ActivationPolicy
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.forward import Engine
from preceptor.plan.activations import _WORTH, Work, kept_for_backward
from preceptor.plan.parameters import Adapter
from preceptor.plan.saved import Precision
from preceptor.plan.shapes import FAMILIES, shape_of
from preceptor.train.precision import autocast
from tiny import SEEING, chain, seeing_model, tiny_model

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOWED = ("gemma2", "gemma3_text", "mistral", "gpt_oss")


def model_of(kind, window=4096):
    return tiny_model(kind, **SHAPE, **({"sliding_window": window} if kind in WINDOWED else {}))


def row_of(conversations):
    rng = np.random.default_rng(0)
    return pack_trees([chain(rng, tuple(n for turn in turns for n in turn)) for turns in conversations])


def saved_bytes(model, row, precision):
    """The storages that autograd saves for the backward of a whole row, but for those of the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(model.device, precision):
        Engine(model).hidden_states(row)
    return sum(count for address, (count, _) in kept.items() if address not in own)


def whole_row_bytes(model, row, precision, adapter=None, token_rows=False):
    """Predicted for a row whose last layer is not spared: all of it is read."""
    lengths = [span.end - span.start for span in row.spans]
    conversations = tuple(((0, length),) for length in lengths)
    weight_bytes = model.get_input_embeddings().weight.element_size()
    found = kept_for_backward(
        shape_of(model.config.to_dict()),
        Work(conversations),
        Precision(weight_bytes, precision == "bfloat16"),
        adapter,
        token_rows,
    )
    return found.kept_bytes + found.casts_bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [60, 300, 1100])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_what_autograd_saves_of_a_row(kind, tokens, precision):
    model = model_of(kind)
    row = row_of([((0, tokens),)])
    assert whole_row_bytes(model, row, precision) == pytest.approx(saved_bytes(model, row, precision), rel=0.001)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*sorted(FAMILIES.keys() - {"llama", "qwen3", "gemma3_text"}), "mistral3", "qwen3_vl"])
def test_other_families(kind, precision):
    model = seeing_model(kind) if kind in SEEING else model_of(kind, window=100)
    row = row_of([((0, 250),), ((0, 230),)])
    assert whole_row_bytes(model, row, precision) == pytest.approx(saved_bytes(model, row, precision), rel=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("targets", "dropout", "new_tokens"), [(None, 0.0, []), (None, 0.1, [3]), (("q_proj", "v_proj"), 0.0, [3])]
)
def test_with_an_adapter(dtype, precision, targets, dropout, new_tokens):
    model = model_of("llama").to(dtype)
    row = row_of([((0, 240),)])
    adapted = add_adapter(model, 4, 8.0, dropout, targets, new_tokens, seed=0)
    predicted = whole_row_bytes(model, row, precision, Adapter(4, targets, dropout), bool(new_tokens))
    assert predicted == pytest.approx(saved_bytes(adapted, row, precision), rel=0.005)


CONVERSATIONS = {
    "a long context": (((450, 150),),),
    "two turns beside a short chat": (((240, 60), (100, 50)), ((40, 30),)),
    "no context": (((0, 240),),),
}


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("context_gradient", ["full", "recompute", "detach"])
@pytest.mark.parametrize("conversations", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize(
    ("kind", "precision"), [("llama", "float32"), ("qwen3", "bfloat16"), ("gemma3_text", "float32")]
)
def test_every_mode(kind, conversations, context_gradient, recompute, precision):
    """Live after the forward pass and not before; the plan counts no index tensors, up to six percent at this width."""
    model = model_of(kind, window=300)
    keep = ActivationPolicy(context_gradient, recompute)
    row = row_of(conversations)
    with torch.no_grad():
        Engine(model).loss_hidden_states(row, keep)  # what it finds out about a model once, it has found out
    gc.collect()
    with tracker_of(model) as tracker:
        before = tracker.live_bytes
        with autocast(model.device, precision):
            hidden, _ = Engine(model).loss_hidden_states(row, keep)
        measured = tracker.live_bytes - before - hidden.untyped_storage().nbytes()
    work = Work(conversations, context_gradient, keep.checkpointed_layers(2))
    found = kept_for_backward(shape_of(model.config.to_dict()), work, Precision(4, precision == "bfloat16"))
    assert found.kept_bytes + found.casts_bytes == pytest.approx(measured, rel=0.06)


def tracker_of(model):
    """benchmarks/live_bytes.py, which is in no package."""
    file = Path(__file__).parents[2] / "benchmarks" / "live_bytes.py"
    spec = importlib.util.spec_from_file_location("live_bytes", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tracker([*model.parameters(), *model.buffers()])


def test_what_is_computed_again_is_less_than_what_would_be_kept():
    shape = shape_of(model_of("llama").config.to_dict())
    conversations = (((300, 100),),)
    kept = kept_for_backward(shape, Work(conversations), Precision())
    again = kept_for_backward(shape, Work(conversations, checkpointed_layers=2), Precision())
    assert again.kept_bytes < again.again_bytes < kept.kept_bytes and again.later_bytes == 0


def test_the_share_of_unread_tokens_is_that_of_the_forward_pass():
    assert _WORTH == forward._WORTH
