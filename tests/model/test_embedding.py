"""The input embedding's gradient in place: the same as autograd's, for tied, scaled and padded embeddings."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from tiny import chain, tiny_model


def sequences():
    rng = np.random.default_rng(0)
    return [pack_trees([chain(rng, (7, 9)), chain(rng, (5, 4))]) for _ in range(2)]


def gradients(model, in_place):
    model.zero_grad()
    for sequence in sequences():
        Engine(model)(sequence, step=StepContext(accumulates=in_place)).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", False), ("qwen3", True), ("gemma", True)])
def test_the_same_gradient(kind, tied):
    model = tiny_model(kind, tie_word_embeddings=tied)
    expected, found = gradients(model, False), gradients(model, True)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_no_gradient_of_the_whole_embedding_is_made():
    model = tiny_model("qwen3", tie_word_embeddings=False)
    weight = model.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)
    buffer = weight.grad
    loss = Engine(model)(sequences()[0], step=StepContext(accumulates=True))
    assert torch.autograd.grad(loss, weight, allow_unused=True) == (None,)
    assert weight.grad is buffer and buffer.abs().sum() > 0


@pytest.mark.parametrize("change", ["frozen", "hooked"])
def test_what_others_watch_is_left_to_autograd(change):
    model = tiny_model("qwen3", tie_word_embeddings=False)
    weight, watched = model.get_input_embeddings().weight, []
    if change == "frozen":
        weight.requires_grad_(False)
    else:
        weight.register_hook(lambda grad: watched.append(grad.shape))
    Engine(model)(sequences()[0], step=StepContext(accumulates=True)).backward()
    assert watched == ([weight.shape] if change == "hooked" else [])
    assert (weight.grad is None) == (change == "frozen")


def test_the_layer_is_as_before_afterwards():
    model = tiny_model("qwen3")
    engine, layer = Engine(model), model.get_input_embeddings()
    before = dict(layer.__dict__)
    engine(sequences()[0], step=StepContext(accumulates=True))
    assert layer.__dict__ == before and layer.weight is layer._parameters["weight"]
    assert not engine.state.accumulates
