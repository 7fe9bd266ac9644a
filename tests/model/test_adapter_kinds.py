"""Kinds of LoRA: each has the gradient of plain autograd, merges into base + adapter, and loads in plain peft."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.model.adapters.folder import merge_folder
from preceptor.model.adapters.lora import add_adapter, load_adapter, merge
from preceptor.model.adapters.pissa import lora_layers
from preceptor.model.forward import Engine
from preceptor.model.kl import ReferenceModel
from preceptor.model.load import save_model
from preceptor.model.options import ActivationPolicy, LoraOptions, lr_factors
from preceptor.train.optimizer import build_optimizer
from tiny import chain, merged, tiny_model, tiny_tokenizer

KINDS = {
    "lora": LoraOptions(),
    "gaussian": LoraOptions(init="gaussian"),
    "rslora": LoraOptions(rslora=True),
    "dora": LoraOptions(dora=True),
    "pissa": LoraOptions(init="pissa"),
    "pissa_fast": LoraOptions(init="pissa_fast", rslora=True),
    "pissa_dora": LoraOptions(init="pissa", dora=True),
    "patterns": LoraOptions(rank_pattern=(("down_proj", 2), ("layers.0", 3)), alpha_pattern=(("*.q_proj", 1.0),)),
    "whole": LoraOptions(modules_to_save=("lm_head", "embed_tokens", "model.norm")),
}
POLICIES = [ActivationPolicy("full"), ActivationPolicy("recompute"), ActivationPolicy("full", "all")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def adapted(kind, options, dtype=torch.float64, new_token_ids=(), rank=4, **more):
    return add_adapter(
        tiny_model(kind, dtype=dtype), rank, 8.0, 0.0, None, new_token_ids, seed=0, options=options, **more
    )


def trees():
    rng = np.random.default_rng(0)
    return [chain(rng, (6, 9, 3, 8)), chain(rng, (4, 12))]


def shake(model, deviation=0.05):
    """Values that are no first values any more, where an adapter may have any."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = deviation * torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.add_(moved_part(model, name, noise))
    return model


def moved_part(model, name, tensor):
    """Without what PiSSA keeps, which no training moves."""
    layer = next((own for at, own in lora_layers(model) if f".{at}.lora_" in name), None)
    if layer is None or not getattr(model, "pissa", False) or "magnitude" in name:
        return tensor
    tensor, half = tensor.clone(), layer.r["default"] // 2
    experts = getattr(layer, "num_experts", 1)
    if "lora_A" in name:
        tensor.view(experts, -1, tensor.shape[-1])[:, half:] = 0
    else:
        tensor.view(tensor.shape[0], -1, experts)[:, half:] = 0
    return tensor


def make(name, kind="llama", **more):
    model = adapted(kind, KINDS[name], **more)
    model.pissa = KINDS[name].keeps_first_values
    return model


def plain_loss(model):
    """Each conversation alone, by the model's own forward pass and torch's cross entropy."""
    total = 0.0
    for tree in trees():
        ids = torch.tensor([[token for segment in tree.segments for token in segment.ids]])
        targets = torch.tensor([segment.kind == "target" for segment in tree.segments for _ in segment.ids])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + cross_entropy(logits[targets[1:]], ids[0, 1:][targets[1:]], reduction="sum")
    return total


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "llama") for name in KINDS]
    + [(name, kind) for name in ("lora", "pissa") for kind in ("mixtral", "gpt_oss")]
    + [(name, "gpt2") for name in ("lora", "pissa", "dora", "pissa_dora")],
)
def test_the_gradient_is_that_of_plain_autograd_in_every_mode(name, kind):
    model = shake(make(name, kind)).eval()  # GPT-2 has a dropout
    if kind == "mixtral":
        model.get_base_model().set_experts_implementation("eager")  # the grouped kernels know no float64
    plain_loss(model).backward()
    expected = gradients(model)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    for policy in POLICIES:
        Engine(model)(pack_trees(trees()), policy).backward()
        for own_name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[own_name], rtol=1e-6, atol=1e-9)


def delta(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * b @ a


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "llama") for name in KINDS] + [(name, "gpt2") for name in ("lora", "pissa", "dora", "pissa_dora")],
)
def test_merged_is_base_plus_adapter(name, kind):
    """GPT-2's matrices lie turned: (inputs, outputs)."""
    base, model = tiny_model(kind, dtype=torch.float64).eval(), make(name, kind).eval()
    bare = dict(base.named_modules())
    for at, layer in lora_layers(model):  # the base of an adapter is the untouched one, PiSSA's too
        assert torch.equal(layer.get_base_layer().weight, bare[at].weight)
    torch.testing.assert_close(plain_loss(model), plain_loss(base), rtol=1e-12, atol=0)
    shake(model)
    whole = dict(merged(model).named_modules())
    for at, layer in lora_layers(model):
        weight, found = (each[at].weight.T if kind == "gpt2" else each[at].weight for each in (bare, whole))
        expected = weight + delta(layer)
        if KINDS[name].dora:
            length = layer.lora_magnitude_vector["default"].weight[:, None]
            expected = length * expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(plain_loss(merged(model)), plain_loss(model), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "kind", "new", "dtype"),
    [(name, "llama", [], torch.float32) for name in KINDS if name != "gaussian"]
    + [("whole", "llama", [60, 70], torch.float32), ("lora", "mixtral", [], torch.float32)]
    + [("pissa", "gpt_oss", [], torch.bfloat16), ("whole", "llama", [], torch.bfloat16)],
)
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")  # peft, of its own pattern
def test_what_is_saved_loads_in_plain_peft_on_the_untouched_base(name, kind, new, dtype, tmp_path, tokenizer):
    base = tiny_model(kind, dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    model = tiny_model(kind, dtype=dtype)
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    if new:
        model.resize_token_embeddings(72, mean_resizing=False)
    model = add_adapter(model, 4, 8.0, 0.0, None, new, seed=0, options=KINDS[name])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.pissa = KINDS[name].keeps_first_values
    shake(model).eval()
    save_model(model, tokenizer, tmp_path / "saved")
    ids = torch.tensor([[1, 2, 3, 60]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = copy.deepcopy(base)
        if new:
            plain.resize_token_embeddings(72, mean_resizing=False)
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "saved" / "adapter")).eval()
        if name != "whole" or dtype == torch.float32:  # what is trained whole is then held in bfloat16
            assert torch.equal(loaded(input_ids=ids).logits, expected)
        again = merge_folder(copy.deepcopy(base), tmp_path / "saved" / "adapter")
        whole = type(base).from_pretrained(tmp_path / "saved", dtype=dtype)
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        for other in (again, whole, loaded):
            torch.testing.assert_close(other.eval()(input_ids=ids).logits.float(), expected.float(), **tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pissa_starts_at_the_largest_singular_values_and_keeps_them(kind):
    model = make("pissa", kind, dtype=torch.float32).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _, layer in lora_layers(model):
        weight = layer.get_base_layer().weight.T if kind == "gpt2" else layer.get_base_layer().weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        u, s, v = torch.linalg.svd(weight)
        best = u[:, :4] * s[:4] @ v[:4]
        torch.testing.assert_close(layer.scaling["default"] * b[:, :4] @ a[:4], best, rtol=1e-3, atol=1e-5)
        assert torch.equal(a[:4], a[4:]) and torch.equal(b[:, :4], -b[:, 4:])
    optimizer = build_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(2):
        Engine(model)(pack_trees(trees())).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(p[4:], before[name][4:]) and not torch.equal(p[:4], before[name][:4])
        if "lora_B" in name:
            assert torch.equal(p[:, 4:], before[name][:, 4:]) and not torch.equal(p[:, :4], before[name][:, :4])


def test_a_rank_above_the_singular_values_is_named():
    with pytest.raises(ModelError, match=r"adapter\.rank: 40, but .*q_proj has \d+ singular values"):
        make("pissa", rank=40)


@pytest.mark.parametrize("name", ["dora", "pissa", "whole"])
def test_the_base_is_still_at_hand_beside_it(name):
    """What `loss.kl_coef` compares with."""
    base, model = tiny_model("llama"), shake(make(name, dtype=torch.float32))
    reference = ReferenceModel.of(model, 64)
    sequence = pack_trees(trees())
    hidden_TD, head = reference.read(sequence)
    expected_TD = Engine(base.eval()).hidden_states(sequence)
    torch.testing.assert_close(hidden_TD, expected_TD, rtol=1e-5, atol=1e-5)
    assert torch.equal(head.weight_VD, base.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["dora", "pissa_dora"])
def test_dora_starts_at_a_bfloat16_base_and_merges_as_it_was_trained(kind, name, tmp_path):
    """The lengths of rows are float32: rounded to bfloat16 they are off by up to 0.4 %."""
    base = tiny_model(kind, dtype=torch.bfloat16)
    model = make(name, kind, dtype=torch.bfloat16)
    for _, layer in lora_layers(model):
        weight = layer.get_base_layer().weight.double()
        lengths = (weight.T if kind == "gpt2" else weight).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.double(), lengths, rtol=1e-6, atol=0)
    if name == "dora":
        sequence = pack_trees(trees())
        with torch.no_grad():
            found, expected = (Engine(each.eval()).hidden_states(sequence) for each in (model, base))
        assert (found - expected).norm() < 2e-3 * expected.norm()
    shake(model).save_pretrained(tmp_path)
    bare = dict(base.named_modules())
    for merged_model in (merged(model), merge(copy.deepcopy(model)), merge_folder(copy.deepcopy(base), tmp_path)):
        whole = dict(merged_model.named_modules())
        for at, layer in lora_layers(model):
            weight, found = (each[at].weight.T if kind == "gpt2" else each[at].weight for each in (bare, whole))
            turned = weight.double() + delta(layer).double()
            lengths = layer.lora_magnitude_vector["default"].weight.double()[:, None]
            expected = lengths * turned / turned.norm(dim=1, keepdim=True)
            error = (found.double() / expected - 1).mean(dim=1)  # rounding of each number cancels in a row
            assert error.abs().max() < 1e-3


def test_rank_and_alpha_by_pattern():
    model = make("patterns")
    found = {at: (layer.r["default"], layer.scaling["default"]) for at, layer in lora_layers(model)}
    assert found["model.layers.1.mlp.down_proj"] == found["model.layers.0.mlp.down_proj"] == (2, 8 / 2)
    assert found["model.layers.0.mlp.up_proj"] == (3, 8 / 3) and found["model.layers.1.mlp.up_proj"] == (4, 8 / 4)
    assert found["model.layers.0.self_attn.q_proj"] == (3, 1 / 3)
    rslora = adapted("llama", LoraOptions(rslora=True, rank_pattern=(("q_proj", 9),)))
    assert {(layer.r["default"], layer.scaling["default"]) for _, layer in lora_layers(rslora)} == {
        (9, 8 / 3),
        (4, 8 / 2),
    }
    by_full_name = adapted("llama", LoraOptions(rank_pattern=(("model.layers.0.*", 2),)))
    assert {(".0." in at, layer.r["default"]) for at, layer in lora_layers(by_full_name)} == {(True, 2), (False, 4)}


@pytest.mark.parametrize("pattern", ["dwn_proj", "down_proj"])
def test_a_pattern_of_no_adapted_layer_is_refused_as_it_was_written(pattern):
    options = LoraOptions(rank_pattern=((pattern, 2),))
    with pytest.raises(ModelError, match=rf"adapter\.rank_pattern: '{pattern}' matches no adapted layer; near it: "):
        add_adapter(tiny_model("llama"), 4, 8.0, 0.0, ["q_proj", "up_proj"], [], seed=0, options=options)


def test_experts_of_a_mixture_have_ranks_too():
    model = adapted("gpt_oss", LoraOptions(rank_pattern=(("experts", 2),)), dtype=torch.float32)
    ranks = {at.rpartition(".")[2]: layer.r["default"] for at, layer in lora_layers(model)}
    assert ranks["q_proj"] == 4 and {r for at, r in ranks.items() if not at.endswith("_proj")} == {2}


FUSED = ("mixtral", "minimax_m2", "qwen3_moe", "olmoe", "deepseek_v3")
"""Types whose experts peft rewrites: gate and up, two layers once, are one tensor with twice the rank."""
SMALL = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4) | {
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}


def by_tensor(model):
    """Rank and scale of each adapted layer, and of each tensor of experts."""
    return {
        (at.replace(".base_layer", ""), getattr(layer, "parameter_name", "weight")): (
            layer.r["default"],
            layer.scaling["default"],
        )
        for at, layer in lora_layers(model)
    }


@pytest.mark.parametrize("kind", [*FUSED, "gpt_oss"])
@pytest.mark.parametrize(
    ("options", "of_gate_up"),
    [
        (LoraOptions(), (4, 4.0)),
        (LoraOptions(rslora=True), (4, 8 / math.sqrt(2))),
        (LoraOptions(init="pissa"), (8, 4.0)),
        (LoraOptions(init="pissa", rslora=True), (8, 8 / math.sqrt(2))),
        (LoraOptions(rank_pattern=(("experts.gate_up_proj", 3),)), (3, 8 / 3)),
        (LoraOptions(rank_pattern=(("*.0.*", 3),), alpha_pattern=(("experts.down_proj", 32.0),)), (3, 8 / 3)),
        (LoraOptions(alpha_pattern=(("experts.gate_up_proj", 32.0),)), (4, 32 / 4)),
        (LoraOptions(rank_pattern=(("experts.gate_up_proj", 3),), rslora=True), (3, 8 / math.sqrt(3))),
    ],
)
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")  # peft looks for layers alone
def test_rank_and_scale_of_experts_are_those_of_the_saved_adapter(kind, options, of_gate_up, tmp_path):
    base = tiny_model(kind, **SMALL)
    model = add_adapter(copy.deepcopy(base), 2, 8.0, 0.0, None, [], seed=0, options=options)
    found = by_tensor(model)
    if kind in FUSED:  # GPT-OSS's tensor was never two layers
        rank, scale = next(each for (at, tensor), each in found.items() if ".0." in at and tensor == "gate_up_proj")
        assert (rank, scale) == (of_gate_up[0], pytest.approx(of_gate_up[1]))
    model.save_pretrained(tmp_path)
    assert by_tensor(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))) == found
    again = add_adapter(base, 2, 8.0, 0.0, None, [], seed=1, options=options, first_values=False)
    load_adapter(again, tmp_path, options)


def test_an_adapter_with_peft_s_own_pattern_of_doubled_ranks_is_trained_on(tmp_path):
    model = adapted("mixtral", LoraOptions(), dtype=torch.float32)
    settings = model.peft_config["default"]
    settings.rank_pattern, settings.alpha_pattern = {r".*\.gate_up_proj": 8}, {r".*\.gate_up_proj": 16}
    model.save_pretrained(tmp_path)
    load_adapter(adapted("mixtral", LoraOptions(), dtype=torch.float32), tmp_path)
    settings.alpha_pattern = {r".*\.gate_up_proj": 32}
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"adapter\.alpha_pattern: "):
        load_adapter(adapted("mixtral", LoraOptions(), dtype=torch.float32), tmp_path)


def test_modules_that_are_trained_whole():
    model = make("whole", dtype=torch.float32, new_token_ids=[60])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == 3 and all("modules_to_save" in name for name in trained)
    for options, words in (
        (LoraOptions(modules_to_save=("lm_hed",)), r"no module 'lm_hed'; near it: lm_head"),
        (LoraOptions(modules_to_save=("embed_tokens",)), "are one table"),
        (LoraOptions(modules_to_save=("act_fn",)), r"act_fn has no parameters to train"),
    ):
        with pytest.raises(ModelError, match=rf"adapter\.modules_to_save: .*{words}"):
            adapted("qwen3", options)
    inside = adapted("llama", LoraOptions(modules_to_save=("layers.0.mlp",)))
    assert not any("layers.0.mlp" in at for at, _ in lora_layers(inside))


def test_what_was_trained_whole_takes_the_type_of_the_base():
    """After a merge, whoever makes it: nothing casts to float32 any more."""
    model, ids = shake(make("whole", dtype=torch.bfloat16)).eval(), torch.tensor([[1, 2, 3, 60]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for plain in (merged(model), merge(copy.deepcopy(model))):
            found = plain.to(torch.bfloat16)(input_ids=ids).logits
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    one = merge(copy.deepcopy(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


def test_lora_plus_is_a_factor_of_the_learning_rate():
    from preceptor import config

    model = make("lora", dtype=torch.float32)
    factors = lr_factors(config.Adapter(lr_ratio=16.0))
    groups = build_optimizer(model, lr_factors=factors).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        assert {("lora_B" in names[id(p)], group["lr_factor"]) for p in group["params"]} <= {(True, 16.0), (False, 1.0)}
    assert sum(group["lr_factor"] == 16.0 for group in groups) == 1
    assert lr_factors(config.Adapter()) == {} and lr_factors(None) == {}


@pytest.mark.parametrize("name", ["dora", "pissa", "whole", "patterns"])
def test_a_saved_adapter_is_trained_on(name, tmp_path, tokenizer):
    model = shake(make(name, dtype=torch.float32))
    save_model(model, tokenizer, tmp_path / "a", adapter="adapter")
    other = make(name, dtype=torch.float32)
    load_adapter(other, tmp_path / "a" / "adapter", KINDS[name])
    theirs = dict(model.named_parameters())
    for own, p in other.named_parameters():
        assert torch.equal(p, theirs[own])
    wrong = {"dora": "kind: dora there, lora here", "pissa": "rank: 8 there, 4 here", "patterns": "alpha_pattern"}
    with pytest.raises(ModelError, match=wrong.get(name, "modules_to_save|not adapted here")):
        load_adapter(make("lora", dtype=torch.float32), tmp_path / "a" / "adapter", KINDS["lora"])


@pytest.mark.parametrize(("name", "kind"), [("pissa_fast", "llama"), ("pissa", "gpt_oss")])
def test_a_pissa_is_trained_on_whatever_its_first_values_were(name, kind, tmp_path, tokenizer):
    """Found with another seed, or of a base that was quantized: here of another one. They are not computed again."""
    model = shake(make(name, kind, dtype=torch.float32))
    save_model(model, tokenizer, tmp_path / "a", adapter="adapter")
    base = tiny_model(kind, seed=1)
    other = add_adapter(base, 4, 8.0, 0.0, None, [], seed=1, options=KINDS[name], first_values=False)
    assert not any(p.any() for own, p in other.named_parameters() if "lora_B" in own)
    load_adapter(other, tmp_path / "a" / "adapter", KINDS[name])
    other.pissa = True
    theirs = dict(model.named_parameters())
    assert all(torch.equal(p, theirs[own]) for own, p in other.named_parameters() if "lora_" in own)
    Engine(other)(pack_trees(trees())).backward()
    for own, gradient in gradients(other).items():
        assert gradient.any() and torch.equal(gradient, moved_part(other, own, gradient))


def test_a_lora_of_twice_the_rank_is_no_pissa(tmp_path, tokenizer):
    plain = shake(adapted("llama", LoraOptions(), dtype=torch.float32, rank=8))
    plain.peft_config["default"].lora_alpha = 16.0
    save_model(plain, tokenizer, tmp_path / "a", adapter="adapter")
    with pytest.raises(ModelError, match=r"no first values of PiSSA there \(adapter\.init\)"):
        load_adapter(make("pissa", dtype=torch.float32), tmp_path / "a" / "adapter", KINDS["pissa"])


def test_dora_and_dropout_on_experts_say_what_to_do():
    for options, dropout in ((LoraOptions(dora=True), 0.0), (LoraOptions(), 0.1)):
        with pytest.raises(ModelError, match=r"one tensor take neither dropout nor DoRA.*target_modules"):
            add_adapter(tiny_model("mixtral"), 4, 8.0, dropout, None, [], seed=0, options=options)
    assert math.isfinite(plain_loss(add_adapter(tiny_model("gpt_oss"), 4, 8.0, 0.1, None, [], seed=0)).item())


def test_a_table_by_any_name_has_rows_for_new_tokens(tmp_path, tokenizer):
    """Mamba's is called `embeddings`."""
    base, options = tiny_model("mamba", tie_word_embeddings=False), LoraOptions(modules_to_save=("embeddings",))
    model = copy.deepcopy(base)
    model.resize_token_embeddings(72, mean_resizing=False)
    model = shake(add_adapter(model, 4, 8.0, 0.0, None, [], seed=0, options=options))
    save_model(model, tokenizer, tmp_path / "a", adapter="adapter")
    assert "resize_token_embeddings(72" in (tmp_path / "a" / "adapter" / "README.md").read_text()
    with warnings.catch_warnings():  # pyproject.toml leaves out those of transformers
        warnings.simplefilter("error", FutureWarning)
        again = merge_folder(base, tmp_path / "a" / "adapter")
    ids = torch.tensor([[1, 2, 70]])
    with torch.no_grad():
        expected = model.eval()(ids).logits[..., :64]
        torch.testing.assert_close(again(ids).logits[..., :64], expected, rtol=1e-4, atol=1e-5)


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def with_another(tensors):
    return {**tensors, "base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight": torch.ones(4, 32)}


def under_other_names(tensors):
    return {name.replace("model.layers", "layers"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "layers", "words"),
    [
        (without_one, 2, "1 weights are missing in it: base_model.model.model.layers.0"),
        (with_another, 2, r"1 of its weights fit no layer: .*x_proj"),
        (under_other_names, 2, "28 weights are missing in it"),
        (dict, 1, r"14 of its weights fit no layer: .*layers\.1"),
    ],
)
def test_an_adapter_is_merged_whole_or_not_at_all(change, layers, words, tmp_path, tokenizer):
    save_model(make("lora", dtype=torch.float32), tokenizer, tmp_path / "a", adapter="adapter")
    file = tmp_path / "a" / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"cannot be loaded as an adapter of .*: {words}"):
        merge_folder(tiny_model("llama", num_hidden_layers=layers), tmp_path / "a" / "adapter")
