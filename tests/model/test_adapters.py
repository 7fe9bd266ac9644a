"""LoRA behind the same forward pass: what is trained, that it starts at nothing, and that merging is exact."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel

from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.adapters.pissa import lora_layers
from preceptor.model.checks import check_head, check_isolation
from preceptor.model.forward import Engine
from preceptor.model.loss.linear_cross_entropy import output_head
from preceptor.model.options import LoraOptions
from tiny import SEEING, chain, merged, seeing_model, tiny_model
from tiny_types import tiny_of

NEW = [60, 63]


def sequence():
    """New tokens occur as inputs and as targets."""
    rng = np.random.default_rng(0)
    return pack_trees([chain(rng, (6, 9, 3, 8)), chain(rng, (4, 30))])


def adapted(kind, new_token_ids=NEW, seed=0, dtype=torch.float32, **options):
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": None, **options}
    return add_adapter(tiny_model(kind, dtype=dtype), new_token_ids=new_token_ids, seed=seed, **settings)


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        Engine(model)(sequence()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma2", "gpt_oss"])
def test_an_adapter_starts_as_nothing_and_the_proofs_hold(kind):
    base, model = tiny_model(kind), adapted(kind)
    assert Engine(model)(sequence()).item() == pytest.approx(Engine(base)(sequence()).item(), rel=1e-6)
    check_head(model)
    check_isolation(model)
    train(model)
    check_head(model)
    check_isolation(model)


@pytest.mark.parametrize(("kind", "tables"), [("llama", 2), ("qwen3", 1)])
def test_exactly_the_new_sequences_and_the_low_rank_factors_are_trained(kind, tables):
    model = adapted(kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: p for name, p in trained.items() if "trainable_tokens" in name}
    assert len(rows) == tables
    assert all(p.shape == (len(NEW), 32) for p in rows.values())
    assert all("lora_" in name for name in trained.keys() - rows.keys())
    assert not any("lm_head" in name for name in trained.keys() - rows.keys())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged_before = merged(model).get_input_embeddings().weight.detach().clone()
    train(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained), name
    moved = (merged(model).get_input_embeddings().weight != merged_before).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == NEW


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gradients_of_new_sequences_equal_those_of_full_training(kind):
    full, model = tiny_model(kind), adapted(kind)
    Engine(full)(sequence()).backward()
    Engine(model)(sequence()).backward()
    tables = {"embed_tokens": full.get_input_embeddings(), "lm_head": full.get_output_embeddings()}
    for name, p in model.named_parameters():
        if "trainable_tokens" in name:
            table = next(table for key, table in tables.items() if key in name)
            torch.testing.assert_close(p.grad, table.weight.grad[NEW], rtol=1e-4, atol=1e-4)


MIXER = {"mamba_d_state": 4, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize("kind", ["falcon_h1", *SEEING])
def test_every_adapter_has_a_part_in_the_loss(kind):
    """None on a mixer whose kernels take the weights, a router that returns more than scores, a tower."""
    base = seeing_model(kind) if kind in SEEING else tiny_model(kind, **MIXER)
    model = add_adapter(base, 4, 8.0, 0.0, None, [], seed=0)
    names = {name.rpartition(".lora_A")[0].rpartition(".")[2] for name in model.state_dict() if ".lora_A" in name}
    assert names >= {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert ("in_proj" in names) == (kind == "falcon_h1")
    Engine(model)(pack_trees([chain(np.random.default_rng(0), (6, 30))], alone=True)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["mixtral", "minimax_m2", "qwen3_moe", "olmoe", "qwen3_next", "qwen2_moe", "gpt_oss"])
def test_no_router_that_returns_more_than_scores_is_adapted(kind):
    model = add_adapter(tiny_model(kind, num_experts=4, num_experts_per_tok=2), 4, 8.0, 0.0, None, [], seed=0)
    adapted = {at.replace(".base_layer", "").rpartition(".")[2] for at, _ in lora_layers(model)}
    assert "experts" in adapted and adapted.isdisjoint({"gate", "router"})
    assert not any("gate.weight" in target for target in model.peft_config["default"].target_parameters)


def test_a_router_that_is_a_linear_layer_is_adapted():
    model = add_adapter(tiny_of("afmoe"), 4, 8.0, 0.0, None, [], seed=0)
    assert any(at.endswith("router.gate") for at, _ in lora_layers(model))


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")  # peft, of its own pattern
def test_no_adapter_is_on_a_towers_convolution_either():
    """For a mixture of experts peft takes the ends of names: `proj` of the tower's attention, and of its patches."""
    model = add_adapter(tiny_of("glm4v_moe"), 4, 8.0, 0.0, None, [], seed=0)
    assert not [name for name, p in model.named_parameters() if "visual" in name and p.requires_grad]


def test_what_peft_rejects_is_a_model_error():
    with pytest.raises(ModelError, match=r"adapter: .*'out_proj' is incompatible with Mamba"):
        add_adapter(tiny_model("falcon_h1", **MIXER), 4, 8.0, 0.0, ["out_proj"], [], seed=0)


def test_a_frozen_head_never_gets_a_gradient_of_all_sequences():
    head = output_head(adapted("llama"))
    assert head.trained_rows.rows_R.tolist() == NEW
    assert output_head(adapted("llama", new_token_ids=[])).weight_VD.requires_grad is False


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_merging_gives_the_same_loss_and_leaves_the_adapter_as_it_is(kind):
    model = adapted(kind)
    train(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = Engine(model)(sequence()).item()
    plain = merged(model)
    assert Engine(plain)(sequence()).item() == pytest.approx(expected, rel=1e-5)
    assert not any("lora" in name or "token_adapter" in name for name, _ in plain.named_modules())
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == plain.config.tie_word_embeddings
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert Engine(model)(sequence()).item() == expected


def test_trained_parameters_are_float32_beside_a_bfloat16_base():
    model = adapted("llama", dtype=torch.bfloat16)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    check_head(model)
    train(model)
    assert merged(model).dtype == torch.bfloat16


def test_first_values_follow_the_seed_and_nothing_else():
    state = torch.random.get_rng_state()
    first, again, other = (adapted("llama", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_target_modules():
    model = adapted("llama", target_modules=["q_proj", "up_proj"], new_token_ids=[])
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "up_proj"}
    with pytest.raises(
        ModelError, match=r"query.*it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        adapted("llama", target_modules=["q_proj", "query"])


def test_linear_layers_whose_matrices_lie_turned_are_named_like_others():
    """GPT-2's Conv1D."""
    names = ("c_attn", "c_fc", "c_proj")
    options = LoraOptions(rank_pattern=(("c_attn", 2),))
    for targets in (list(names), None):
        model = add_adapter(tiny_model("gpt2"), 4, 8.0, 0.0, targets, [], 0, options)
        ranks = {at.rpartition(".")[2]: layer.r["default"] for at, layer in lora_layers(model)}
        assert ranks == {"c_attn": 2, "c_fc": 4, "c_proj": 4}
    model = add_adapter(tiny_model("gpt2"), 4, 8.0, 0.0, ["c_attn"], [], 0)
    assert {at.rpartition(".")[2] for at, _ in lora_layers(model)} == {"c_attn"}
    inside = add_adapter(tiny_model("gpt2"), 4, 8.0, 0.0, None, [], 0, LoraOptions(modules_to_save=("h.0.mlp",)))
    assert not any("h.0.mlp" in at for at, _ in lora_layers(inside))
    with pytest.raises(ModelError, match=r"no linear layer named q_proj; it has c_attn, c_fc, c_proj"):
        add_adapter(tiny_model("gpt2"), 4, 8.0, 0.0, ["q_proj"], [], 0)


def test_the_names_of_adapted_layers_have_one_order_in_every_process(tmp_path):
    """peft keeps them as a set, whose order changes with the hash seed: the same run would write other bytes."""
    settings = adapted("llama").peft_config["default"]
    assert isinstance(settings.target_modules, list) and settings.target_modules == sorted(settings.target_modules)
    assert len(settings.target_modules) == 2 * 7


def logits(model, ids=(1, 60, 7, 63, 5)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits


@pytest.mark.parametrize(("kind", "whole"), [("phi", "lm_head"), ("gptj", "lm_head"), ("inkling_text", "embed_tokens")])
def test_a_table_that_is_more_than_rows_is_trained_whole(kind, whole, tmp_path):
    """The bias of a head, the norm of an embedding: where peft trains rows, it leaves them out."""
    base = tiny_of(kind)
    for module in (base.get_output_embeddings(), getattr(base.get_input_embeddings(), "embed_norm", None)):
        for p in [] if module is None else module.parameters():
            torch.nn.init.normal_(p.data)
    plain = copy.deepcopy(base)
    model = add_adapter(base, 4, 8.0, 0.0, None, NEW, seed=0)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    alone = pack_trees([chain(np.random.default_rng(0), (6, 9, 3, 8))], alone=True)
    loss = Engine(model)(alone)
    assert loss.item() == pytest.approx(Engine(plain)(alone).item(), rel=1e-5)
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02).step()
    trained = logits(model)
    assert (trained - logits(plain)).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged(model)), trained, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path)), trained, rtol=1e-4, atol=1e-5)
    assert [name.rpartition(".")[2] for name in model.peft_config["default"].modules_to_save] == [whole]


def test_a_tied_table_that_is_more_than_rows_takes_no_new_tokens():
    assert add_adapter(tiny_of("modernbert-decoder"), 4, 8.0, 0.0, None, [], seed=0)
    words = r"adapter: .*decoder of ModernBertDecoderForCausalLM has more than a row .*a bias.* are one table"
    with pytest.raises(ModelError, match=words):
        add_adapter(tiny_of("modernbert-decoder"), 4, 8.0, 0.0, None, NEW, seed=0)
