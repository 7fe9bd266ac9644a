"""Quantized bases by bitsandbytes: bits, bytes, and gradients of adapters equal to plain autograd's."""

import copy

import pytest
import torch
from test_adapter_kinds import gradients, plain_loss, shake, trees
from torch import nn
from torch.nn.functional import linear

from preceptor.data.forest import pack_trees
from preceptor.errors import ConfigError, ModelError
from preceptor.model import compiled, quantization
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.adapters.pissa import keep_first_values
from preceptor.model.checks import check_head, check_isolation
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast
from preceptor.model.optimisations import install
from preceptor.model.options import KEEP_ALL, ActivationPolicy, LoraOptions
from preceptor.model.quantization import QuantizedLinear, num_parameters, quantizable, quantize, quantized_layers
from preceptor.plan.memory import quantized_bytes
from tiny import tiny_model

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quantized`)")
WAYS = [("nf4", True), ("nf4", False), ("int8", False)]


@pytest.mark.parametrize(("kind", "double"), WAYS)
@pytest.mark.parametrize("shape", [(48, 80), (3, 5), (7, 1031)], ids=str)
@torch.compiler.set_stance("force_eager")  # of sizes for which it has no kernel, bitsandbytes compiles C++: 12 s
def test_bits_values_and_bytes_are_those_of_bitsandbytes(kind, double, shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    own = QuantizedLinear(layer, kind, double, "cpu")
    weight = layer.weight.detach()
    if kind == "nf4":
        theirs = bnb.nn.Params4bit(weight, compress_statistics=double, quant_type="nf4", requires_grad=False).to("cpu")
        expected = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        state = theirs.quant_state
        tensors = [theirs.data, state.absmax]  # the 16 quantiles are known to the operators
        tensors += [state.offset, state.state2.absmax, state.state2.code] if double else []
    else:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        expected, tensors = bnb.functional.int8_vectorwise_dequant(codes, scales), [codes, scales]
    torch.testing.assert_close(own.weight, expected, rtol=1e-6, atol=1e-7)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(each.numel() * each.element_size() for each in own.buffers()) == num_bytes
    assert quantized_bytes(kind, double, shape) == num_bytes
    empty = QuantizedLinear(layer.to("meta"), kind, double, "meta")
    assert [(name, t.shape, t.dtype) for name, t in empty.named_buffers()] == [
        (name, t.shape, t.dtype) for name, t in own.named_buffers()
    ]


def quantized_model(kind="nf4", double=True, model_type="llama", options=None, dtype=torch.float32, **config):
    model = tiny_model(model_type, dtype=dtype, **config)
    quantize(model, kind, double, "cpu")
    return add_adapter(model, 4, 8.0, 0.0, None, [], seed=0, options=options or LoraOptions())


@pytest.mark.parametrize(("kind", "double"), WAYS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_layer_has_the_gradient_of_its_dequantized_weight(kind, double, precision):
    torch.manual_seed(0)
    own = QuantizedLinear(nn.Linear(80, 48), kind, double, "cpu")
    x, other = (torch.randn(5, 80).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    with autocast(torch.device("cpu"), precision):
        found, expected = own(x), linear(other, own.weight, own.bias)
    assert found.dtype == expected.dtype
    found.float().pow(2).sum().backward()
    expected.float().pow(2).sum().backward()
    tolerance = 1e-5 if precision == "float32" else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, other.grad, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("options", [LoraOptions(), LoraOptions(dora=True), LoraOptions(init="pissa")], ids=str)
@pytest.mark.parametrize(("kind", "double"), WAYS[::2])
def test_the_gradient_of_an_adapter_is_that_of_plain_autograd(kind, double, options):
    """Plain: the same model, each linear layer with its dequantized weight, by the model's own forward pass."""
    model = quantized_model(kind, double, options=options)
    shake(model)
    plain = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in plain.named_modules() if isinstance(m, QuantizedLinear)]:
        whole = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).requires_grad_(False)
        whole.weight.data = layer.weight
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, whole)
    if options.keeps_first_values:
        keep_first_values(plain)  # a copy has no hooks
    plain_loss(plain.double()).backward()
    expected = gradients(plain)
    check_head(model)
    check_isolation(model)
    for policy in (KEEP_ALL, ActivationPolicy("recompute"), ActivationPolicy("full", "all")):
        Engine(model)(pack_trees(trees()), policy).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient.double(), expected[name], rtol=2e-4, atol=3e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt_oss"])
def test_layers_with_a_bias_take_an_adapter_too(model_type, precision):
    """Whose product is added to the layer's own in its place."""
    model = quantized_model(model_type=model_type)
    shake(model)
    plain = copy.deepcopy(model)
    with autocast(torch.device("cpu"), precision):
        plain_loss(plain).backward()
        expected = gradients(plain)
        Engine(model)(pack_trees(trees())).backward()
    assert any(layer.bias is not None for layer in quantized_layers(model))
    found, true = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients(model), expected))
    assert float((found - true).norm() / true.norm()) < (1e-4 if precision == "float32" else 0.05)


def kept_by_graphs(loss):
    """What compiled functions keep for backward, found from the loss on."""
    nodes, seen, kept = [loss.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept += node.saved_tensors if "Compiled" in node.name() else ()
        nodes += [each for each, _ in node.next_functions]
    return kept


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_compiled_layer_does_not_keep_what_it_dequantizes(kind, monkeypatch):
    """As a compiler would that saw the same operation in forward and in backward."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager_decomp_partition")
    model = quantized_model(kind, num_hidden_layers=1)
    install(model.train(), "compiled")
    loss = Engine(model)(pack_trees(trees()))
    kept = [tensor.numel() for tensor in kept_by_graphs(loss) if tensor.is_floating_point()]
    weights = {layer.in_features * layer.out_features for layer in quantized_layers(model)}
    assert kept and not weights & {*kept}
    loss.backward()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_oss", "falcon_h1"])
def test_what_is_quantized(model_type):
    """Linear layers of the decoder; not the head, no router, no experts that are one tensor."""
    model = tiny_model(model_type)
    names, before = set(quantizable(model)), num_parameters(model)
    assert {name.rpartition(".")[2] for name in names} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("lm_head" in name or "embed" in name or name.endswith(".gate") for name in names)
    assert quantize(model, "int8", False, "cpu") == len(names) == len(list(quantized_layers(model)))
    assert num_parameters(model) == before


def test_a_model_without_what_can_be_quantized_is_named():
    with pytest.raises(ModelError, match=r"model\.quantization: GPT2LMHeadModel has no torch\.nn\.Linear"):
        quantize(tiny_model("gpt2"), "nf4", True, "cpu")


@pytest.mark.parametrize("name", ["q_proj", "layers.0"])
def test_what_is_quantized_is_not_trained_whole(name):
    with pytest.raises(ModelError, match=rf"adapter\.modules_to_save: .*{name} is quantized and cannot be trained"):
        quantized_model(options=LoraOptions(modules_to_save=(name,)))


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"model\.quantization: needs bitsandbytes.*preceptor\[quantized\]"):
        quantization.bitsandbytes()
