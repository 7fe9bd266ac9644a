"""Memory that runs out is no bug: wherever it does, the message says what did not fit and what to do."""

import numpy as np
import pytest
import torch

from preceptor import cli
from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError, explaining_out_of_memory, is_out_of_memory
from preceptor.model import kl
from preceptor.model.load import load_model
from preceptor.model.optimisations import install
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.step import take_step
from tiny import chain, tiny_model

ERRORS = [
    torch.OutOfMemoryError("no memory is left"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_it_is_known_whoever_says_so(error):
    assert is_out_of_memory(error)
    with pytest.raises(ModelError, match="Lower it"), explaining_out_of_memory("too much. Lower it"):
        raise error
    assert "bug" not in cli.unexpected(error) and "memory ran out" in cli.unexpected(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        ModelError("a file speaks of being out of memory"),
        OSError("out of memory of another kind"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), explaining_out_of_memory("too much"):
        raise error


def fail(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_model_that_does_not_fit_on_the_device(base_folder, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.to", fail)
    with pytest.raises(ModelError, match=r"weights, in float32, do not fit in memory\. Use bfloat16.*quantization"):
        load_model(base_folder, "float32", "cpu")


def test_a_model_that_does_not_fit_while_it_is_read(base_folder, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
    with pytest.raises(ModelError, match="do not fit in memory"):
        load_model(base_folder, "float32", "cpu")


def test_the_copy_of_the_base_that_a_divergence_needs(monkeypatch):
    monkeypatch.setattr(kl, "deepcopy", fail)
    with pytest.raises(ModelError, match=r"loss\.kl_coef: the copy of the base model does not fit"):
        kl.ReferenceModel.of(tiny_model("llama"), 64)


@pytest.mark.parametrize("what", ["clip_gradients", "step"])
def test_the_update_of_a_step(what, monkeypatch):
    model = tiny_model("llama")
    install(model)
    state = State(model, build_optimizer(model))
    if what == "step":
        monkeypatch.setattr(state.optimizer, "step", fail)
    else:
        monkeypatch.setattr("preceptor.train.step.clip_gradients", fail)
    with pytest.raises(ModelError, match=r"step 1: the update of the weights does not fit.*adamw_8bit"):
        take_step(state, [pack_trees([chain(np.random.default_rng(0), (5, 7))])], 1e-3, 1.0, "float32")
    assert state.step == 0
