"""Models with limits, and damaged ones: named before data is rendered, or before step 1."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import conversations
from preceptor import config
from preceptor.chat.format import read_limits
from preceptor.errors import DataError, ModelError
from preceptor.evaluate.model import load_evaluated_model
from preceptor.model.checks import check_isolation
from preceptor.model.parts import exact_routing
from preceptor.serve.chat import Speaker
from preceptor.train.build import require_room_to_read
from tiny import tiny_model, tiny_tokenizer

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {},
}


@pytest.fixture
def base(tmp_path):
    """Writes a base model, and changes one of its JSON files."""

    def write(model, file=None, **changes):
        tokenizer = tiny_tokenizer()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        if file is not None:
            path = tmp_path / "base" / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return str(tmp_path / "base")

    return write


def llama():
    return tiny_model("llama", vocab_size=len(tiny_tokenizer()))


def gpt2(positions):
    size = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size, eos_token_id=0, bos_token_id=0))


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantized_checkpoints_are_named(command, method, base, preceptor, run_file):
    path = base(llama(), "config.json", quantization_config={"quant_method": method, "bits": 4})
    code, _, err = preceptor(command, run_file(model__path=path))
    assert code == 5 and f"quantized ({method})" in err and "Traceback" not in err


@pytest.mark.parametrize("eos", ["a", -5, 99999999, [0, 400], {"a": 1}, 0.5])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_odd_stop_tokens_are_named(eos, file, base, preceptor, run_file, tmp_path):
    path = base(llama(), file, eos_token_id=eos)
    if file == "config.json":
        (tmp_path / "base" / "generation_config.json").unlink()
    code, _, err = preceptor("train", run_file(model__path=path))
    assert code == 5 and file in err and "Traceback" not in err


@pytest.mark.parametrize(
    "changes", [{"vocab_size": "many"}, {"hidden_size": []}, {"model_type": 5}, {"rope_parameters": 1}]
)
def test_a_config_of_wrong_types_is_a_model_error(changes, base, preceptor, run_file):
    code, _, err = preceptor("train", run_file(model__path=base(llama(), "config.json", **changes)))
    assert code == 5 and "error:" in err and "This is a bug" not in err


def test_a_token_of_the_data_that_has_no_row_is_named(base, preceptor, run_file):
    model = tiny_model("llama", vocab_size=64)
    code, _, err = preceptor("train", run_file(model__path=base(model)))
    assert code == 5 and "64 embeddings" in err and ":1 holds, has none. Tokenizer and model do not belong" in err


def test_weights_that_are_no_weights_are_a_model_error(base, preceptor, run_file, tmp_path):
    path = base(llama())
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"no weights")
    code, _, err = preceptor("train", run_file(model__path=path))
    assert code == 5 and "error:" in err and "This is a bug" not in err


def test_an_adapter_of_any_rank_is_refused_that_no_machine_can_hold(base, preceptor, run_file):
    run = run_file(model__path=base(llama()), adapter={"kind": "lora", "rank": 10**9})
    code, _, err = preceptor("train", run)
    assert code in (2, 5) and "rank" in err and "Traceback" not in err


def test_examples_beyond_learned_positions_are_too_long(base, preceptor, run_file, tmp_path):
    rows = [
        *conversations(3),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 90}]},
    ]
    run = run_file(rows, model__path=base(gpt2(72)), data__max_rejected=0.9)
    _, out, _ = preceptor("check", run)
    assert "learned positions for 72" in out
    code, out, err = preceptor("train", run)
    assert code == 0, err
    assert "attn_pdrop of 0.1 is off" in out + err
    assert "learned positions for 72" in (tmp_path / "run" / "rejections.jsonl").read_text()


def test_answers_end_where_learned_positions_do(base, preceptor, run_file, tmp_path):
    """Of each prompt on its own; in a chat the conversation that is too long is named, and the next one answered."""
    rows = conversations(4, turns=2)
    limits = {"data__max_length": 512, "eval__num_samples": 4, "eval__max_new_tokens": 140}
    run = run_file(rows, eval_rows=rows, model__path=base(gpt2(140)), **limits)
    code, out, err = preceptor("train", run)
    assert code == 0, out + err
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) >= 8

    evaluated = load_evaluated_model(str(tmp_path / "base"), "float32", "cpu")
    evaluated = replace(evaluated, chat=replace(evaluated.chat, stop_token_ids=()))
    contexts = [[5] * length for length in (135, 3, 139, 70)]
    assert [len(answer.ids) for answer in evaluated.generate(contexts, 60)] == [5, 60, 1, 60]
    assert evaluated.generate(contexts, 60)[1] == evaluated.generate(contexts[1:2], 60)[0]
    until = [[], [], ["x"], ["y"]]
    assert len(evaluated.generate(contexts, 60, until=until)) == 4
    with pytest.raises(DataError, match="140 tokens; the model has learned positions for 140"):
        evaluated.generate([[5] * 140], 4)
    speaker = Speaker(evaluated, 4)
    assert "learned positions for 140" in speaker.reply("word " * 200) and speaker.messages == []
    assert "learned" not in speaker.reply("word")


def test_the_models_that_have_learned_positions(tmp_path):
    learned = {}
    for kind in (
        "gpt2",
        "opt",
        "gpt_neo",
        "gpt_bigcode",
        "biogpt",
        "llama",
        "qwen3",
        "bloom",
        "falcon",
        "mamba",
        "gemma3_text",
    ):
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        learned[kind] = read_limits(str(tmp_path / kind)).longest
    assert {kind for kind, longest in learned.items() if longest} == {"gpt2", "opt", "gpt_neo", "gpt_bigcode", "biogpt"}
    assert learned["gpt2"] == 1024 and learned["opt"] == 2048


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, base, preceptor, run_file, tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    code, _, err = preceptor("train", run_file(model__path=base(model)))
    assert code == 5 and "model.layers.0.mlp.up_proj.weight holds 1 value" in err
    assert not (tmp_path / "run").exists()


def test_a_host_without_room_for_the_weights_is_named_before_they_are_read(base, run_file, monkeypatch):
    """On their way to the GPUs, where each process reads all of them, or to be quantized: where they are converted."""
    model = llama().to(torch.bfloat16)
    run = config.load(run_file(model__path=base(model)))
    each = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("preceptor.train.build.host_memory_bytes", lambda: (10**12, 3 * each // 2))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    require_room_to_read(run, cuda, 1)
    require_room_to_read(run, cpu, 2)  # where they stay: the plan says so
    words = r"each of 2 processes on this machine reads all weights, .* in float32, .*to the GPU.*shard \(one.*or fewer"
    with pytest.raises(ModelError, match=words):
        require_room_to_read(run, cuda, 2)
    quantized = run.model_copy(update={"model": run.model.model_copy(update={"quantization": "nf4"})})
    with pytest.raises(ModelError, match=r"are quantized\. .* host RAM is free\. Use fewer processes or model"):
        require_room_to_read(quantized, cpu, 2)
    monkeypatch.setattr("preceptor.train.build.host_memory_bytes", lambda: (10**12, each // 2))
    with pytest.raises(ModelError, match=r"free\. Use model\.dtype: bfloat16 or a machine with more memory$"):
        require_room_to_read(run, cuda, 1)
    same = run.model_copy(update={"model": run.model.model_copy(update={"dtype": "bfloat16"})})
    monkeypatch.setattr("preceptor.train.build.host_memory_bytes", lambda: (10**12, 1))
    require_room_to_read(same, cuda, 2)  # mapped
    base(tiny_model("mixtral", vocab_size=300, dtype=torch.bfloat16, **EXPERTS["mixtral"]))
    with pytest.raises(ModelError, match=r"free\. Use a machine with more memory$"):  # its experts are joined
        require_room_to_read(same, cuda, 1)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_router_that_rounding_moves_is_no_leak(kind, seed):
    model = tiny_model(kind, vocab_size=300, seed=seed, dtype=torch.bfloat16, **EXPERTS[kind])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    check_isolation(model)
    after = model.state_dict()
    assert all(
        after[name].dtype == weight.dtype and torch.equal(after[name], weight) for name, weight in before.items()
    )


def test_exact_routing_is_of_models_with_experts():
    for kind, exact in (("mixtral", torch.float32), ("llama", torch.bfloat16)):
        model = tiny_model(kind, dtype=torch.bfloat16, **EXPERTS.get(kind, {}))
        with exact_routing(model):
            assert {weight.dtype for weight in model.parameters()} == {exact}
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_mixture_of_experts_is_packed_in_bfloat16_and_says_what_lora_covers(
    kind, base, preceptor, run_file, tmp_path, with_pictures
):
    extra = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    path = base(tiny_model(kind, vocab_size=len(tiny_tokenizer()), **EXPERTS[kind], **extra))
    run = run_file(
        model__path=path, model__dtype="bfloat16", train__precision="bfloat16", adapter={"kind": "lora", "rank": 2}
    )
    code, out, err = preceptor("train", run)
    assert code == 0, err
    assert "each conversation goes through the model alone" not in out
    assert "the adapter trains the experts too" in out
    assert "load-balancing loss: 0.5 times that of 2 routers (as the model's config asks)" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(2.0 <= line["router_aux_loss"] < 8.0 for line in lines)  # 2 experts a token: balanced is 2
    assert "Load-balancing loss" in (tmp_path / "run" / "report.html").read_text()


def test_routers_are_not_balanced_unless_they_are_to_be(base, preceptor, run_file, tmp_path):
    mixture = tiny_model("mixtral", vocab_size=len(tiny_tokenizer()), **EXPERTS["mixtral"], router_aux_loss_coef=0.02)
    code, out, err = preceptor("train", run_file(model__path=base(mixture)), "train.duration=1 steps")
    assert code == 0, err
    assert "load-balancing loss: off (loss.router_aux_coef); router_aux_loss_coef in the model's config is 0.02" in out
    assert "router_aux_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_model_without_routers_cannot_balance_them(base, preceptor, run_file, tmp_path):
    code, _, err = preceptor("train", run_file(model__path=base(llama()), loss__router_aux_coef=0.1))
    assert code == 5 and "loss.router_aux_coef: no router was found in this llama model" in err
    assert not (tmp_path / "run").exists()
