"""The input embedding's gradient in place: the same as autograd's, for tied, scaled and padded embeddings."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.model.activations.embedding import embedding_gradient_in_place
from preceptor.model.forward import row_loss
from tiny import chain, tiny_model


def rows():
    rng = np.random.default_rng(0)
    return [pack_trees([chain(rng, (7, 9)), chain(rng, (5, 4))]) for _ in range(2)]


def gradients(model, in_place):
    model.zero_grad()
    for row in rows():
        if in_place:
            with embedding_gradient_in_place(model):
                row_loss(model, row).backward()
        else:
            row_loss(model, row).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", False), ("qwen3", True), ("gemma", True)])
def test_the_same_gradient(kind, tied):
    model = tiny_model(kind, tie_word_embeddings=tied)
    model.get_input_embeddings().padding_idx = None
    expected, found = gradients(model, False), gradients(model, True)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_no_gradient_of_the_whole_embedding_is_made():
    model = tiny_model("qwen3", tie_word_embeddings=False)
    weight = model.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)
    buffer = weight.grad
    with embedding_gradient_in_place(model):
        loss = row_loss(model, rows()[0])
        assert torch.autograd.grad(loss, weight, allow_unused=True, retain_graph=True) == (None,)
    assert weight.grad is buffer and buffer.abs().sum() > 0


def test_what_others_watch_is_left_to_autograd():
    for change in ("frozen", "hooked", "bfloat16"):
        model = tiny_model("qwen3", tie_word_embeddings=False)
        layer = model.get_input_embeddings()
        if change == "frozen":
            layer.weight.requires_grad_(False)
        elif change == "hooked":
            layer.weight.register_hook(lambda grad: grad)
        else:
            layer.to(torch.bfloat16)
        with embedding_gradient_in_place(model):
            assert "forward" not in layer.__dict__, change


def test_all_is_as_before_afterwards():
    model = tiny_model("qwen3")
    layer = model.get_input_embeddings()
    with pytest.raises(KeyboardInterrupt), embedding_gradient_in_place(model):
        row_loss(model, rows()[0])
        raise KeyboardInterrupt
    assert "forward" not in layer.__dict__ and "weight" not in layer.__dict__
    assert layer.weight is layer._parameters["weight"]
