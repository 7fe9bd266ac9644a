"""Products with float32 results: in float32 plain ones; of half-precision factors, on a GPU, never rounded."""

import numpy as np
import pytest
import torch

from preceptor.data.forest import pack_trees
from preceptor.model import forward, numerics
from preceptor.model.activations.passes import StepContext
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import add_product
from preceptor.model.loss.softmax import LOGITS_BYTES, most_tokens
from preceptor.model.numerics import wide_product
from preceptor.model.options import KEEP_ALL
from preceptor.train.optimizer import accumulate_in_float32
from tiny import chain, tiny_model

ROWS = [slice(0, 5), slice(5, 10)]
GENERATOR = torch.Generator().manual_seed(0)
TOTAL, LEFT, RIGHT = (torch.randn(shape, generator=GENERATOR) for shape in ((10, 6), (10, 300), (300, 6)))
HALVES = LEFT.bfloat16(), RIGHT.bfloat16()
SUM = TOTAL + HALVES[0].float() @ HALVES[1].float()


@pytest.fixture
def on_gpu(monkeypatch):
    """The choices of a GPU, and stand-ins for torch's products there, which a CPU has not."""
    asked = []
    plain_mm, plain_addmm = torch.mm, torch.addmm

    def mm(left, right, *, out_dtype):
        asked.append(out_dtype)
        return plain_mm(left.float(), right.float())

    def addmm(total, left, right, *, out_dtype, out):
        asked.append(out_dtype)
        assert out is total and total.dtype == out_dtype and left.dtype == right.dtype
        return plain_addmm(total, left.float(), right.float(), out=out)

    monkeypatch.setattr(numerics, "device_type_of", lambda _: "cuda")
    monkeypatch.setattr(numerics.torch, "mm", mm)
    monkeypatch.setattr(numerics.torch, "addmm", addmm)
    return asked


def test_in_float32_it_is_the_plain_product():
    total = TOTAL.clone()
    add_product(total, LEFT, RIGHT, ROWS)
    assert torch.equal(total, torch.addmm(TOTAL, LEFT, RIGHT))
    assert torch.equal(wide_product(LEFT, RIGHT), LEFT @ RIGHT)


def test_of_halves_a_gpu_rounds_nothing(on_gpu):
    total = TOTAL.clone()
    add_product(total, *HALVES, ROWS)
    assert torch.allclose(total, SUM, atol=1e-5) and on_gpu == [torch.float32]
    assert torch.allclose(wide_product(*HALVES), SUM - TOTAL, atol=1e-5) and len(on_gpu) == 2


def test_of_halves_a_cpu_rounds_the_product():
    total = TOTAL.clone()
    add_product(total, *HALVES, ROWS)
    error = (total - SUM).abs().max()
    assert 1e-4 < error < 0.2
    found = wide_product(*HALVES)
    assert found.dtype == torch.float32 and torch.equal(found, (HALVES[0] @ HALVES[1]).float())


def test_a_gpu_has_room_for_more_logits():
    assert most_tokens(2**20, 4, None, "cpu") == LOGITS_BYTES // 2**22 and most_tokens(2**20, 4, None, "cuda") == 2**8


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_bfloat16_head_takes_its_gradient_in_place_where_that_is_float32(accumulates, monkeypatch):
    given = []
    loss = forward.linear_cross_entropy
    monkeypatch.setattr(
        forward, "linear_cross_entropy", lambda *a, **named: given.append(named["head_grad_VD"]) or loss(*a, **named)
    )
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    if accumulates:
        accumulate_in_float32(model)
    sequence = pack_trees([chain(np.random.default_rng(0), (9, 12, 5, 8))])
    for _ in range(2):
        Engine(model)(sequence, KEEP_ALL, step=StepContext(accumulates=True)).backward()
    weight = model.lm_head.weight
    if accumulates:
        assert given[0] is given[1] is weight.grad and weight.grad.dtype == torch.float32
        assert model.get_input_embeddings().weight.grad.dtype == torch.float32
    else:
        assert given == [None, None] and weight.grad.dtype == torch.bfloat16
    single = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    Engine(single)(sequence, KEEP_ALL).backward()
    for own, p in zip(single.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad.float(), 2 * own.grad.float(), rtol=0.05, atol=1e-4)
