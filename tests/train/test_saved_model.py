"""What a run saves is what it trained, in plain transformers and peft."""

import io
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor import config
from preceptor.chat.format import load_tokenizer, load_trained_format
from preceptor.errors import ModelError
from preceptor.model.load import load_model, save_model, unusable_settings
from preceptor.train.build import build_model
from preceptor.train.prepare import prepare
from runs import execute
from tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "find", "description": "Find it.", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "a user"}]
CHAT_TOKENS = ("<|im_end|>", "<|im_start|>", "<think>", "</think>")


def write_base(folder, kind="llama", special=CHAT_TOKENS, template=CHATML, rows=None, dtype=torch.float32, **config):
    tokenizer = tiny_tokenizer(special_tokens=special)
    tokenizer.chat_template = template
    model = tiny_model(kind, vocab_size=rows or len(tokenizer), dtype=dtype, **config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(run_file, folder, console=None, rows=None, **changes):
    """The folder of the model that a run of two steps saves."""
    file = run_file(
        rows,
        model__path=str(folder),
        **{"data__chat_template": None, "train__duration": "2 steps", "data__max_length": 256} | changes,
    )
    with mock.patch("preceptor.train.finish.write_report"):  # it draws for longer than such a run takes
        execute(prepare(config.load(file, [])), console or Console(quiet=True))
    return folder.parent / "run" / "model"


def said(console):
    return " ".join(console.export_text(clear=False).split())


def recording():
    return Console(record=True, width=400, file=io.StringIO())


# Templates and decoding ----------------------------------------------------------------------------------------------


def test_all_named_templates_are_saved_and_the_one_of_training_is_chosen(run_file, tmp_path):
    with_tools = "{% if tools %}TOOLS: {{ tools | tojson }}\n{% endif %}" + CHATML
    base = write_base(tmp_path / "base", template={"default": CHATML, "tool_use": with_tools, "rag": "{{ documents }}"})
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "yes"}], "tools": [TOOL]}] * 4
    model = trained(run_file, base, rows=rows)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, model))
    assert after.chat_template == before.chat_template and set(after.chat_template) == {"default", "tool_use", "rag"}
    prompts = [
        each.apply_chat_template(ASKED, [TOOL], tokenize=False, add_generation_prompt=True) for each in (before, after)
    ]
    assert prompts[0] == prompts[1] and prompts[0].startswith("TOOLS: ")


@pytest.mark.parametrize(
    ("given", "saved", "dropped"),
    [
        ({"temperature": 0.0, "do_sample": False}, {}, ["temperature=0.0"]),
        ({"temperature": 0.9, "top_p": 0.6}, {}, ["temperature=0.9", "top_p=0.6"]),
        ({"top_k": 5, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}, ["top_k=5"]),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5}, []),
        ({"num_beams": 2, "length_penalty": 0.5}, {"num_beams": 2, "length_penalty": 0.5}, []),
        ({"length_penalty": 0.5, "max_new_tokens": 9}, {"max_new_tokens": 9}, ["length_penalty=0.5"]),
    ],
)
def test_decoding_settings_stay_and_sampling_is_never_switched_on(given, saved, dropped, tmp_path):
    base, model = write_base(tmp_path / "base"), tmp_path / "model"
    (base / "generation_config.json").write_text(json.dumps({**given, "eos_token_id": 0}))
    for init in ("pretrained", "random"):
        loaded = load_model(base, "float32", "cpu", init=init)
        named = [f"{name}={value}" for name, value in unusable_settings(loaded.generation_config).items()]
        assert named == dropped
        save_model(loaded, load_tokenizer(base), model / init)
        written = json.loads((model / init / "generation_config.json").read_text())
        kept = {key: value for key, value in written.items() if not key.endswith(("_token_id", "_version"))}
        assert {key: value for key, value in kept.items() if value not in (False, None)} == saved
    ids = AutoTokenizer.from_pretrained(model / "random")("a user", return_tensors="pt")
    AutoModelForCausalLM.from_pretrained(model / "random").generate(**ids, max_new_tokens=2)


def test_a_run_says_which_decoding_settings_it_leaves_out(run_file, tmp_path):
    base, console = write_base(tmp_path / "base"), recording()
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}))
    model = trained(run_file, base, console)
    assert "temperature=0.9, top_p=0.6 does not validate" in said(console)
    assert not json.loads((model / "generation_config.json").read_text()).get("do_sample")


# Revisions of the base ------------------------------------------------------------------------------------------------


def test_an_adapter_goes_on_the_revision_that_it_was_trained_on(run_file, tmp_path, monkeypatch, preceptor):
    """`main` of the Hub's cache holds other weights than `v1`."""
    hub = tmp_path / "cache/models--owner--name"
    (hub / "refs").mkdir(parents=True)
    for seed, name in enumerate(("main", "v1")):
        write_base(hub / "snapshots" / (str(seed) * 40), seed=seed)
        (hub / "refs" / name).write_text(str(seed) * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    file = run_file(
        model={"path": "owner/name", "revision": "v1"},
        data__chat_template=None,
        data__max_length=256,
        adapter={"kind": "lora", "rank": 2, "save": "adapter"},
    )
    with mock.patch("preceptor.train.finish.write_report"):
        execute(prepare(config.load(file, [])), Console(quiet=True))
    adapter = tmp_path / "run/model/adapter"
    assert 'from_pretrained("owner/name", revision="v1")' in (adapter / "README.md").read_text()
    true = PeftModel.from_pretrained(load_model("owner/name", "float32", "cpu", revision="v1"), str(adapter))
    wanted = true.merge_and_unload().state_dict()
    code, _, error = preceptor("export", tmp_path / "run", "--to", "hf")
    assert code == 0, error
    for merged in (load_model(tmp_path / "run", "float32", "cpu"), load_model(tmp_path / "run-hf", "float32", "cpu")):
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    for name in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (adapter / name).unlink()  # as peft itself writes an adapter: with its base for what it lacks
    (hub / "refs/main").write_text("2" * 40)  # not on this machine
    load_trained_format(str(adapter))


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2}])
def test_weights_are_saved_in_the_type_of_the_base(adapter, run_file, tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    console = recording()
    model = trained(run_file, base, console, adapter=adapter)
    assert "held in float32 and saved in bfloat16" in said(console)
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(model, dtype="auto").parameters()} == {torch.bfloat16}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, model)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_an_adapter_trains_whole_is_saved_in_the_type_of_the_base_too(dtype, run_file, tmp_path):
    adapter = {**LORA, "modules_to_save": ["lm_head", "norm"]}
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    model = trained(run_file, base, adapter=adapter, model__dtype="bfloat16", model__save_dtype=dtype)
    assert json.loads((model / "config.json").read_text())["dtype"] == dtype
    found = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)} and "lm_head.weight" in found


def test_a_key_says_in_which_type_weights_are_saved(run_file, tmp_path):
    model = trained(run_file, write_base(tmp_path / "base", dtype=torch.bfloat16), model__save_dtype="float32")
    assert json.loads((model / "config.json").read_text())["dtype"] == "float32"


def test_a_base_without_the_head_that_its_config_asks_for_is_refused(tmp_path):
    base = write_base(tmp_path / "base", "qwen3", special=("<|endoftext|>",), template=None, tie_word_embeddings=True)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"weights are missing .*lm_head\.weight"):
        load_model(str(base), dtype="float32", device="cpu")


@pytest.mark.parametrize(("tied", "says"), [(True, True), (False, True), (False, False)])
def test_the_saved_config_says_whether_tables_are_tied(tied, says, run_file, tmp_path):
    """A base whose config says "tied" and that holds two tables is of two tables, and stays so when rows are added."""
    base = write_base(tmp_path / "base", "qwen3", special=("<|endoftext|>",), template=None, tie_word_embeddings=tied)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": says}))
    model = trained(run_file, base, data__chat_template="chatml")
    written = json.loads((model / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert written["tie_word_embeddings"] is tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    before = AutoModelForCausalLM.from_pretrained(base)
    num = before.lm_head.weight.shape[0]
    change = (loaded.lm_head.weight[:num] - before.lm_head.weight).abs().max()
    assert change < 0.02, "each table continues its own values"


# Adapters ------------------------------------------------------------------------------------------------------------


def logits(model, ids=((5, 6, 280, 7),)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids), use_cache=False).logits


LORA = {"kind": "lora", "rank": 2}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # untied and tied
def test_no_token_is_added_for_padding_and_the_adapter_loads_on_its_base(kind, run_file, tmp_path):
    base = write_base(tmp_path / "base", kind)
    model = trained(run_file, base, adapter=LORA, optimizer__learning_rate=0.05)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, model))
    assert len(after) == len(before) and after.pad_token is None
    assert json.loads((model / "config.json").read_text())["vocab_size"] == len(before)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), model / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(model)
    assert (logits(adapted) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_adapter_with_new_tokens_loads_with_its_tokenizer(kind, run_file, tmp_path):
    base = write_base(tmp_path / "base", kind, special=("<|endoftext|>",), template=None)
    model = trained(run_file, base, adapter=LORA, data__chat_template="chatml", optimizer__learning_rate=0.05)
    tokenizer = AutoTokenizer.from_pretrained(model / "adapter")
    assert "<|im_end|>" in tokenizer.get_vocab() and tokenizer.chat_template
    merged = logits(
        AutoModelForCausalLM.from_pretrained(model),
        [[5, 6, *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])]],
    )
    ids = [[5, 6, *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])]]
    alone = AutoPeftModelForCausalLM.from_pretrained(model / "adapter")
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(json.loads((model / "config.json").read_text())["vocab_size"])
    by_hand = PeftModel.from_pretrained(grown, model / "adapter")
    for adapted in (alone, by_hand):
        torch.testing.assert_close(
            logits(adapted, ids)[..., : len(tokenizer)], merged[..., : len(tokenizer)], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi"])  # untied, tied, and a head with a bias
@pytest.mark.parametrize(
    ("case", "special", "template", "rows"),
    [
        ("no pad token, no new token", CHAT_TOKENS, None, None),
        ("existing rows that were never trained", CHAT_TOKENS, "chatml", None),
        ("new tokens in rows that the base has in reserve", ("<|endoftext|>",), "chatml", 320),
        ("new tokens without rows", ("<|endoftext|>",), "chatml", None),
    ],
)
def test_an_adapter_loads_by_its_own_instructions(kind, case, special, template, rows, run_file, tmp_path, monkeypatch):
    """Plain peft, on the base as it was: only tokens that the base has no rows for need another line."""
    base = write_base(tmp_path / "base", kind, special, template=None if template else CHATML, rows=rows)
    if "never trained" in case:
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[:4] = table.mean(dim=0)
        model.save_pretrained(base)
    changes = {"adapter": LORA, "data__chat_template": template, "optimizer__learning_rate": 0.05}
    folder = trained(run_file, base, **changes) / "adapter"
    assert not (folder / "config.json").exists()
    readme = (folder / "README.md").read_text()
    assert ("resize_token_embeddings" in readme) == (case == "new tokens without rows")
    monkeypatch.chdir(folder)
    names = {}
    exec(readme.partition("```python\n")[2].partition("```")[0], names)
    adapted, tokenizer = names["model"], names["tokenizer"]
    ids = [[5, 6, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]), 280]]
    merged = logits(AutoModelForCausalLM.from_pretrained(folder.parent), ids)
    torch.testing.assert_close(logits(adapted, ids), merged[..., : adapted.config.vocab_size], rtol=1e-4, atol=1e-5)
    stops = adapted.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    again = load_model(folder, "float32", "cpu")
    torch.testing.assert_close(logits(again, ids), merged[..., : again.config.vocab_size], rtol=1e-4, atol=1e-5)
    assert again.generation_config.eos_token_id == adapted.generation_config.eos_token_id


def test_a_base_that_was_named_by_a_relative_path_is_found_from_everywhere(run_file, tmp_path, monkeypatch, preceptor):
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = trained(run_file, Path("base"), adapter=LORA, out="run").absolute()
    monkeypatch.chdir(tmp_path.parent)
    assert (
        json.loads((model / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == f"{tmp_path}/base"
    )
    assert f'from_pretrained("{tmp_path}/base")' in (model / "adapter/README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(model)
    torch.testing.assert_close(logits(load_model(model / "adapter", "float32", "cpu")), logits(merged))
    assert json.loads((model.parent / "environment.json").read_text())["model"]["folder"] == f"{tmp_path}/base"
    code, _, error = preceptor("export", model.parent, "--to", "hf")
    assert code == 0, error
    assert "base_model:" not in (tmp_path / "run-hf/README.md").read_text()


@pytest.mark.parametrize(
    ("save", "files"),
    [("both", {"config.json", "adapter"}), ("merged", {"config.json"}), ("adapter", {"adapter"})],
)
def test_a_key_says_what_is_saved_of_an_adapter(save, files, run_file, tmp_path):
    base = write_base(tmp_path / "base")
    model = trained(run_file, base, adapter={**LORA, "save": save})
    assert {name for name in ("config.json", "adapter") if (model / name).exists()} == files
    prompt = load_trained_format(str(model.parent)).prompt(ASKED)
    assert prompt == "<|im_start|>user\na user<|im_end|>\n<|im_start|>assistant\n"
    assert load_model(model.parent, "float32", "cpu").generation_config.eos_token_id == 0


def test_an_adapter_of_another_model_or_without_its_base_is_named(run_file, tmp_path):
    model = trained(run_file, write_base(tmp_path / "base"), adapter=LORA)
    write_base(tmp_path / "base", rows=400, hidden_size=64)
    with pytest.raises(ModelError, match=r"cannot be loaded as an adapter of .*base"):
        load_model(model / "adapter", "float32", "cpu")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"base model of this adapter is not there: .*/base: no such folder"):
        load_model(model / "adapter", "float32", "cpu")


def test_a_users_own_token_without_a_row_gets_one(run_file, tmp_path):
    base = write_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<sql>", normalized=False)])
    tokenizer.save_pretrained(base)
    prepared = prepare(config.load(run_file(model__path=str(base), data__chat_template=None), []))
    assert build_model(prepared, torch.device("cpu")).get_input_embeddings().weight.shape[0] == 320


# The thinking switch -------------------------------------------------------------------------------------------------

SWITCHED = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n"
    "{% endif %}{% endif %}",
)
OFF = {"messages": [*ASKED, {"role": "assistant", "content": "yes"}]}
ON = {"messages": [*ASKED, {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"}]}
SAID_OFF = "2 turns without reasoning are trained with thinking off (enable_thinking=false)"
SAID_ON = "1 turn with reasoning is trained with thinking on (the template's default)"


def asked(folder, **arguments):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **arguments)


@pytest.mark.parametrize(
    ("rows", "expected", "opening"), [([OFF, OFF], SAID_OFF, "<think></think>"), ([OFF, ON, OFF], SAID_ON, "<think>\n")]
)
def test_commands_say_what_is_trained_before_it_is(rows, expected, opening, run_file, tmp_path, preceptor):
    base = write_base(tmp_path / "base", template=SWITCHED)
    file = run_file(rows, model__path=str(base), data__chat_template=None, train__duration="1 steps")
    for command in ("check", "show", "train"):
        with mock.patch("preceptor.train.finish.write_report"):
            code, out, err = preceptor(command, file)
        printed = " ".join(out.split())
        assert code == 0, err
        if command == "show":
            assert printed.count(SAID_OFF.replace("2 turns without reasoning are", "1 turn without reasoning is")) == 2
        else:
            assert SAID_OFF in printed and expected in printed
            assert ("defaults: enable_thinking=false" in printed) == (len(rows) == 2)
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())["thinking"]
    assert [count["num_turns"] for count in recorded] == ([2] if len(rows) == 2 else [2, 1])
    _, out, _ = preceptor("show", file, "--json")
    assert json.loads(out.splitlines()[0])["thinking"][0]["arguments"] == {"enable_thinking": False}
    assert asked(tmp_path / "run" / "model").endswith(opening)
    assert asked(tmp_path / "run" / "model", enable_thinking=True).endswith("<think>\n")
    assert asked(tmp_path / "run" / "model", enable_thinking=False).endswith("<think></think>")


def test_a_tuned_model_is_tuned_again_as_it_is_asked(run_file, tmp_path):
    """Its template's default is off: nothing has to be switched, and the next default stands before the last one."""
    base = write_base(tmp_path / "base", template=SWITCHED)
    first = trained(run_file, base, rows=[OFF, OFF])
    first.rename(tmp_path / "first")
    again = prepare(config.load(run_file([OFF], model__path=str(tmp_path / "first"), data__chat_template=None), []))
    assert [tree.switched for tree in again.train] == [()] and again.counts.defaults() == {}
    assert again.chat.tokenizer.chat_template.count("set enable_thinking") == 1
    second = prepare(config.load(run_file([ON], model__path=str(tmp_path / "first"), data__chat_template=None), []))
    assert second.chat.prompt(ASKED).endswith("<think>\n")


def test_held_out_turns_do_not_change_the_default(run_file, tmp_path):
    base = write_base(tmp_path / "base", template=SWITCHED)
    file = run_file([OFF], [ON], model__path=str(base), data__chat_template=None)
    assert prepare(config.load(file, [])).counts.defaults() == {"enable_thinking": False}
