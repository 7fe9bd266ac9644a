"""What the published files of other trainers showed: other tasks are refused by name, and SFT is carried over whole."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

import peer_files
from preceptor import config
from preceptor.config.convert import convert, convert_file
from preceptor.config.peer_defaults import DIRECT
from preceptor.config.peer_files import PeerFile
from preceptor.config.peer_names import CHANGES_IF_LEFT_OUT, COUNTERPARTS
from preceptor.config.peer_without import NO_COUNTERPART
from preceptor.config.sections import Source
from preceptor.data.formats.tables import find_tables
from preceptor.data.sources import OpenSource
from preceptor.errors import ConfigError

TORCHTUNE = {
    "checkpointer": {"checkpoint_dir": "/m"},
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-5},
    "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "own/chats"},
    "output_dir": "out",
}


def converted(folder, content, name="file.yaml"):
    (folder / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return convert_file(folder / name)


def notes_of(found):
    return dict(found.notes)


def of(peer, **settings):
    settings = {**(TORCHTUNE if peer == "torchtune" else {}), **settings}
    found = convert(PeerFile(peer, {"model_name_or_path": "m", "output_dir": "out", **settings}), Path())
    tree = {**found.tree, "model": {"path": "m", **found.tree.get("model", {})}}
    config.build(
        {**tree, "data": {"train": [{"path": "d"}], **{k: v for k, v in tree["data"].items() if k != "streaming"}}}, "x"
    )
    return found


OTHERS = [
    ({"base_model": "m", "rl": "kto"}, "`rl: 'kto'`: it trains on preferences"),
    ({"base_model": "m", "reward_model": True}, "trains a model that scores"),
    ({"base_model": "m", "plugins": ["axolotl.integrations.kd.KDPlugin"]}, "what a teacher model predicts"),
    ({"base_model": "m", "diffusion": {"eps": 0.1}}, "diffusion"),
    ({"stage": "dpo", "model_name_or_path": "m"}, "`stage: 'dpo'`: it trains on preferences"),
    ({"stage": "sft", "do_predict": True}, "it trains nothing"),
    ({"template": "llama3", "export_dir": "merged", "do_train": False}, "it trains nothing"),
    ({"model_name_or_path": "m", "beta": 0.1, "output_dir": "o"}, "`beta: 0.1`: it trains on preferences"),
    ({"model_name_or_path": "m", "loss_type": "apo_zero"}, "preferences"),
    ({**TORCHTUNE, "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}, "preferences"),
    ({**TORCHTUNE, "teacher_model": {"_component_": "x"}}, "teacher"),
    ({"checkpointer": {"checkpoint_dir": "m"}, "quantizer": {"groupsize": 256}}, "no `optimizer`: it trains nothing"),
    ({"distributed_type": "FSDP", "fsdp_config": {}}, "is a configuration of accelerate"),
    ({"zero_optimization": {"stage": 3}}, "is a configuration of DeepSpeed"),
    ({"model": "m", "model_class": "llm", "micro_batch_size": 1}, "is a file of LLaMA-Factory's v1"),
]


@pytest.mark.parametrize(("tree", "says"), OTHERS)
def test_a_file_of_another_task_is_refused_by_name(tmp_path, tree, says):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, tree)
    assert says in str(caught.value) and str(caught.value).startswith(str(tmp_path))


SCRIPTS = [
    ("DPOTrainer(model='m', args=DPOConfig('o'))", "DPOTrainer: it is another trainer than SFTTrainer"),
    ("PatchDPOTrainer()\nORPOTrainer('m')\nLoraConfig(r=8)", "ORPOTrainer, PatchDPOTrainer: it is"),
    (
        "m = FastModel.from_pretrained('m', auto_model=A, num_labels=6)\nTrainer(m, TrainingArguments('o'))",
        "`num_labels: 6`",
    ),
    ("p = TrlParser((SFTConfig, ModelConfig))\nSFTTrainer(m, args=a)", "takes its settings from a command line"),
    ("m, t = FastModel.from_pretrained('m')\nm.generate()", "calls neither SFTConfig nor SFTTrainer"),
]


@pytest.mark.parametrize(("text", "says"), SCRIPTS)
def test_a_script_of_another_task_is_refused_by_name(tmp_path, text, says):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, text, "a.py")
    assert says in str(caught.value)


def test_of_a_script_with_both_the_part_of_sft_is_converted(tmp_path):
    found = converted(tmp_path, "SFTTrainer('m', SFTConfig('o', learning_rate=1e-4))\nGRPOTrainer('m')\n", "a.py")
    assert found.tree["optimizer"]["learning_rate"] == 1e-4 and "left out" in notes_of(found)["GRPOTrainer"]


@pytest.mark.parametrize("kind", ["FastVisionModel", "AutoModelForImageTextToText", "Qwen3VLForConditionalGeneration"])
def test_a_script_of_a_model_that_sees_says_that_text_is_trained(tmp_path, kind):
    text = f'm = {kind}.from_pretrained("m")\nSFTTrainer(m, SFTConfig("o"), UnslothVisionDataCollator(m))\n'
    found = converted(tmp_path, text, "a.py")
    assert "only text is trained" in notes_of(found)[kind] and "only text" in notes_of(found)["data_collator"]


def test_unsloths_own_trainer_is_one_of_sft(tmp_path):
    text = """m, t = FastLanguageModel.from_pretrained("m", 512)
data = load_dataset("own/texts", split="train")
args = UnslothTrainingArguments("o", learning_rate=5e-5, embedding_learning_rate=1e-5)
UnslothTrainer(m, train_dataset=data, args=args)
"""
    found = converted(tmp_path, text, "a.py")
    assert found.tree["optimizer"]["learning_rate"] == 5e-5 and found.tree["data"]["train"][0]["path"] == "own/texts"
    assert "optimizer.lr_factors" in notes_of(found)["embedding_learning_rate"]


# Commands ------------------------------------------------------------------------------------------------------------

COMMAND = """# more memory
accelerate launch --config_file zero3.yaml --num_processes 4 \\
    examples/scripts/sft.py \\
    --model_name_or_path m --dataset_name own/chats  # any other
    --lora_target_modules q_proj, v_proj --use_peft --per_device_train_batch_size 2 --output_dir out
"""


def test_a_launchers_flags_are_no_settings_and_its_processes_count(tmp_path):
    found = converted(tmp_path, COMMAND.replace("# any other", "\\"), "a.sh")
    assert found.tree["train"]["batch_size"] == 8 and "on 4 devices" in notes_of(found)["batch size"]
    assert found.tree["adapter"]["target_modules"] == ["q_proj", "v_proj"] and "config_file" not in notes_of(found)
    several = COMMAND.replace("accelerate launch", "torchrun --nnodes 2").replace("num_processes", "nproc_per_node")
    assert converted(tmp_path, several.replace("# any other", "\\"), "b.sh").tree["train"]["batch_size"] == 16


def test_a_script_of_sft_may_be_named_for_its_data(tmp_path):
    found = converted(tmp_path, "python sft_gold.py --model_name_or_path m --output_dir o\n", "a.sh")
    assert found.tree["model"]["path"] == "m"


@pytest.mark.parametrize("name", ["train_gold", "own_ssd_run", "opd_sdft"])
def test_short_names_of_tasks_are_parts_of_other_names(tmp_path, name):
    found = converted(tmp_path, f"python {name}.py --model_name_or_path m\n", "a.sh")
    assert found.tree["model"]["path"] == "m"
    for command in ("trl gold", "python sdft.py", "python train_dpo.py"):
        with pytest.raises(ConfigError, match="another task"):
            converted(tmp_path, f"{command} --model_name_or_path m\n", "a.sh")


@pytest.mark.parametrize("word", ["*_proj", "&x", "2024-13-45", "[a"])
def test_words_that_are_no_yaml_are_words(tmp_path, word):
    command = f"trl sft --model_name_or_path m --use_peft --run_name '{word}' --lora_target_modules '*_proj' v_proj\n"
    found = converted(tmp_path, command, "a.sh")
    assert found.tree["adapter"]["target_modules"] == ["*_proj", "v_proj"]


def test_a_file_that_trains_and_then_predicts_is_one_of_training(tmp_path):
    found = converted(tmp_path, {"stage": "sft", "do_train": True, "do_predict": True, "export_dir": "merged"})
    assert found.tree["adapter"]["kind"] == "lora" and notes_of(found).keys() >= {"do_predict", "export_dir"}


def test_a_remark_in_a_command_is_none_of_its_values(tmp_path):
    found = converted(tmp_path, "trl sft --model_name_or_path m --num_processes 2 # or more\n", "a.sh")
    assert found.tree["train"]["batch_size"] == 16
    found = converted(tmp_path, "trl sft --model_name_or_path m `# its name` \\\n --max_steps 7 `#few`\n", "a.sh")
    assert found.tree["model"]["path"] == "m" and found.tree["train"]["duration"] == "7 steps"


def test_a_command_that_names_a_file_of_settings(tmp_path):
    (tmp_path / "sft.yaml").write_text("model_name_or_path: m\nlearning_rate: 1.0e-3\nmax_length: 77\n")
    found = converted(tmp_path, "trl sft --config sft.yaml --learning_rate 1e-5\n", "a.sh")
    assert found.tree["optimizer"]["learning_rate"] == 1e-5 and found.tree["data"]["max_length"] == 77
    with pytest.raises(ConfigError, match="is not here, and holds the settings"):
        converted(tmp_path, "trl sft --config other.yaml\n", "b.sh")


FILES = {
    "ax.yml": {"base_model": "m", "micro_batch_size": 1, "learning_rate": 1.0e-3, "num_epochs": 4},
    "lf.yaml": {"stage": "sft", "model_name_or_path": "m", "learning_rate": 1.0e-3, "num_train_epochs": 4},
    "tt.yaml": {**TORCHTUNE, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1.0e-3}, "epochs": 4},
    "sft.yaml": {"model_name_or_path": "m", "learning_rate": 1.0e-3, "num_train_epochs": 4},
}


@pytest.mark.parametrize(
    ("command", "peer", "rate", "epochs", "size"),
    [
        ("axolotl train ax.yml", "Axolotl", 1e-3, 4, 1),
        ("axolotl preprocess ax.yml\naxolotl train ax.yml --learning-rate 1e-4 --num-epochs=2", "Axolotl", 1e-4, 2, 1),
        ("accelerate launch --num_processes 2 -m axolotl.cli.train ax.yml --num_epochs 2", "Axolotl", 1e-3, 2, 2),
        ("axolotl train ax.yml --num-epochs 2 --launcher torchrun -- --nproc_per_node=2", "Axolotl", 1e-3, 2, 2),
        ("GPUS=0 llamafactory-cli train lf.yaml learning_rate=1e-4 num_train_epochs=2", "LLaMA-Factory", 1e-4, 2, 8),
        ("python -m llamafactory.cli train lf.yaml num_train_epochs=2", "LLaMA-Factory", 1e-3, 2, 8),
        ("tune run lora_finetune_single_device --config ./tt.yaml", "torchtune", 1e-3, 4, 1),
        ("tune run full_finetune --config=tt.yaml epochs=2 optimizer.lr=1e-4", "torchtune", 1e-4, 2, 1),
        (
            "tune run --nproc_per_node 2 full_finetune_distributed --config tt.yaml batch_size=3",
            "torchtune",
            1e-3,
            4,
            6,
        ),
        ("tune run full_finetune --config tt.yaml optimizer=torch.optim.AdamW ~epochs", "torchtune", 1e-3, 1, 1),
        ("accelerate launch scripts/run_sft.py sft.yaml --learning_rate=1e-4 --bf16", "TRL", 1e-4, 4, 8),
    ],
)
def test_a_command_of_any_trainer_that_names_a_file_of_settings(tmp_path, command, peer, rate, epochs, size):
    for name, tree in FILES.items():
        (tmp_path / name).write_text(yaml.safe_dump(tree))
    found = converted(tmp_path, command + "\n", "a.sh")
    assert (found.peer, found.tree["optimizer"]["learning_rate"]) == (peer, rate)
    assert (found.tree["train"]["duration"], found.tree["train"]["batch_size"]) == (f"{epochs} epochs", size)
    assert {key for key, why in found.notes if "not known" in why} <= {"launcher"}


@pytest.mark.parametrize(
    "command",
    [
        "python tune.py --model_name_or_path ~/m --output_dir ~/o --learning_rate 1e-5",
        "accelerate launch --config_file axolotl.yml s.py "
        "--model_name_or_path ~/m --output_dir ~/o --learning_rate 1e-5",
        "llamafactory-cli train --stage sft --model_name_or_path ~/m --output_dir ~/o --learning_rate 1e-5",
    ],
)
def test_names_and_values_of_a_command_are_no_programs_or_settings(tmp_path, command):
    tree = converted(tmp_path, command + "\n", "a.sh").tree
    assert (tree["model"]["path"], tree["out"], tree["optimizer"]["learning_rate"]) == ("~/m", "~/o", 1e-5)


def test_a_setting_of_a_command_that_leads_nowhere_in_its_file_is_named(tmp_path):
    (tmp_path / "tt.yaml").write_text(yaml.safe_dump(FILES["tt.yaml"]))
    found = converted(tmp_path, "tune run full_finetune --config tt.yaml epochs.x=2 epochs=$N\n", "a.sh")
    assert "leads to no section of tt.yaml" in notes_of(found)["epochs.x"]
    assert notes_of(found)["epochs"] == "$N: a variable of the shell"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("axolotl train none.yml --learning-rate 1e-4", "none.yml: is not here, and holds the settings"),
        ("axolotl train $CONFIG --learning-rate 1e-4", "a YAML file of Axolotl.*: convert that YAML"),
        ("accelerate launch -m axolotl.cli.train --num_epochs 2", "a YAML file of Axolotl"),
        ("llamafactory-cli train $A/lf.yaml learning_rate=1e-5", "a YAML file of LLaMA-Factory"),
        ("tune run full_finetune --config $CONFIG epochs=2", "a YAML file of torchtune"),
        ("tune run full_finetune --config llama3_1/8B_full epochs=2", "tune cp llama3_1/8B_full config.yaml"),
        ("tune run lora_dpo_single_device --config tt.yaml", "`lora_dpo_single_device`: it is another task"),
        ("trl dpo --model_name_or_path m", "`dpo`: it is another task than `sft`"),
        ("python examples/scripts/sft_diffusion_gemma.py --output_dir o", "another task"),
        ("python examples/scripts/sft_gemma3.py", "convert the script that it starts"),
    ],
)
def test_commands_that_hold_no_run_of_sft(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        converted(tmp_path, text, "a.sh")


SFT = "trl sft --model_name_or_path m --learning_rate 2e-5 --output_dir out/sft"
FACTORY = "llamafactory-cli train --stage sft --model_name_or_path m --dataset d --output_dir out --learning_rate 1e-4"


@pytest.mark.parametrize(
    ("text", "others"),
    [
        (f"{SFT}\ntrl dpo --model_name_or_path out/sft --learning_rate 5e-7\n", ["trl dpo"]),
        (f"{SFT}\npython merge.py --base m --output_dir merged\n", ["python merge.py"]),
        (f"python3 prepare.py --output_dir data && {SFT} && echo done\n", ["python3 prepare.py"]),
        (f"python eval.py --model_name_or_path out; {SFT} & wait\n", ["python eval.py"]),
        (f"pip install --upgrade trl\nmkdir -p out | cat\n{SFT} 2>&1 | tee train.log\n", []),
        (f"{SFT} > log.txt\n", []),
        (f"nohup {SFT} &> 'the log.txt' &\n", []),
        (f"if [ -d x ]; then {SFT}; fi\n", []),
        (f"python -m pip install -r requirements.txt\n{SFT.replace('trl sft', 'python run_clm.py')}\n", []),
        (f"python data.py --to d\n{SFT.replace('trl sft', 'python run_clm.py')}\n", ["python data.py"]),
        (f"python -m torch.distributed.run -m trl.scripts.{SFT.removeprefix('trl ')}\n", []),
    ],
)
def test_of_several_commands_the_one_that_trains_is_read(tmp_path, text, others):
    found = converted(tmp_path, text, "a.sh")
    assert (found.tree["model"]["path"], found.tree["out"]) == ("m", "out/sft")
    assert found.tree["optimizer"]["learning_rate"] == 2e-5
    assert [key for key, why in found.notes if "another command" in why] == others
    assert not [why for _, why in found.notes if "not known" in why]


def test_flags_of_a_script_after_training_are_none_of_training(tmp_path):
    found = converted(tmp_path, f"{FACTORY}\n\npython3 merge_lora.py --adapter_path out --template qwen3\n", "a.sh")
    assert found.tree["model"]["path"] == "m" and found.tree["optimizer"]["learning_rate"] == 1e-4
    assert "chat_template" not in notes_of(found) and "python3 merge_lora.py" in notes_of(found)


@pytest.mark.parametrize(
    "text",
    [
        f"{SFT}\n{SFT}\n",
        f"{FACTORY} && {FACTORY}",
        "python a.py --x 1\npython b.py --x 2\n",
        "python a.py --x 1\npython $RUN --model_id m\n",
        "python train.py --output_dir o\npython eval.py --model_name_or_path o\n",
    ],
)
def test_which_of_several_commands_trains_is_not_guessed(tmp_path, text):
    name = " ".join(text.split()[:2])
    with pytest.raises(ConfigError, match=rf"holds several commands \({name}[^;]*; .*: write the one that trains into"):
        converted(tmp_path, text, "a.sh")


def test_a_script_that_a_variable_names(tmp_path):
    found = converted(tmp_path, f"RUN=train.py\npython $RUN {SFT.removeprefix('trl sft')}\n", "a.sh")
    assert found.tree["model"]["path"] == "m"


def test_processes_of_a_module_count(tmp_path):
    text = "torchrun --nproc_per_node 4 -m trl.scripts.sft --model_name_or_path m --max_steps 100 >log.txt\n"
    found = converted(tmp_path, text, "a.sh")
    assert found.tree["train"]["batch_size"] == 32 and found.tree["train"]["duration"] == "100 steps"


FLAGS = ["--model_name_or_path m", "--learning_rate 2e-5", "--output_dir out/sft", "--max_steps 7"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("args.txt", "\n".join(FLAGS) + "\n"),
        ("args.txt", "\n".join(FLAGS).replace(" ", "\n")),
        ("a.sh", "trl sft \\\n" + " \\ \n".join(FLAGS)),
        ("a.sh", "trl sft \\\n" + "\n    ".join(FLAGS)),
        ("a.sh", "args=(\n" + "\n".join(FLAGS) + '\n)\ntrl sft "${args[@]}"\n'),
        ("a.sh", f"args=(sft {FLAGS[0]})\nargs+=({' '.join(FLAGS[1:])})\ntrl ${{args[@]}}\n"),
        ("a.sh", f'ARGS="{FLAGS[0]} {FLAGS[1]}"\nexport ARGS="$ARGS {FLAGS[2]}"\ntrl sft $ARGS {FLAGS[3]}\n'),
    ],
)
def test_flags_on_lines_of_their_own_and_in_variables_are_read(tmp_path, name, text):
    found = converted(tmp_path, text, name)
    assert (found.tree["model"]["path"], found.tree["out"]) == ("m", "out/sft")
    assert (found.tree["optimizer"]["learning_rate"], found.tree["train"]["duration"]) == (2e-5, "7 steps")
    assert not [why for _, why in found.notes if "variable" in why or "another command" in why]
    if "args=(" in text:
        with pytest.raises(ConfigError, match="another task"):
            converted(tmp_path, text.replace("trl sft", "trl dpo").replace("(sft ", "(dpo "), name)


def test_an_apostrophe_in_a_variable_ends_no_conversion(tmp_path):
    text = f'SAID="it\'s on"\nNAME="--run_name it\'s"\nARGS+=(--max_steps 7)\n{SFT} $ARGS $NAME\n'
    assert converted(tmp_path, text, "a.sh").tree["train"]["duration"] == "7 steps"


def test_flags_in_variables_that_are_not_read_are_named(tmp_path):
    found = converted(tmp_path, f"MORE='--max_steps 7'\n{SFT}\neval \"echo $MORE\"\n", "a.sh")
    assert "no command names" in notes_of(found)["MORE"]
    branches = "if [ $x ]; then ARGS='--max_steps 7'; else\nARGS='--max_steps 8'\nARGS+=' --seed 1'\nfi\n"
    found = converted(tmp_path, f"{branches}{SFT} $ARGS\n", "a.sh")
    assert found.tree["train"]["duration"] == "3 epochs" and "under a condition" in notes_of(found)["ARGS"]
    assert notes_of(converted(tmp_path, SFT.replace("sft", "sft $MORE"), "a.sh"))["$MORE"] == "a variable of the shell"


@pytest.mark.parametrize(
    ("launcher", "batch_size"),
    [
        ("python -m accelerate.commands.launch --num_processes 8 train.py", 16),
        ("numactl -m 0 torchrun --nproc_per_node 4 train.py", 8),
        ("PYTHONPATH=. numactl -m 0 python train.py", 2),
        ("python3 -m torch.distributed.run --nproc_per_node 2 -m own.train", 4),
        ("accelerate launch --num_processes 2 -m trl.cli sft", 4),
        ("deepspeed --num_gpus 4 train.py", 8),
        ("deepspeed --num_gpus 4 --num_nodes 2 train.py", 16),
        ("accelerate launch --num_processes 2 --num_machines 2 train.py", 4),
        ("python -m debugpy --listen 5678 train.py", 2),
        ("$PYTHON -m trl.scripts.sft", 2),
    ],
)
def test_what_a_launcher_starts_is_found(tmp_path, launcher, batch_size):
    found = converted(tmp_path, f"{launcher} --model_name_or_path m --per_device_train_batch_size 2\n", "a.sh")
    assert found.tree["model"]["path"] == "m" and found.tree["train"]["batch_size"] == batch_size
    assert not [why for _, why in found.notes if "not known" in why]


@pytest.mark.parametrize(
    "command", ["python -m deepspeed.launcher.runner --num_gpus 4 dpo_train.py", "python -m trl.cli dpo", "trl dpo"]
)
def test_another_task_is_refused_behind_a_launcher(tmp_path, command):
    with pytest.raises(ConfigError, match="another task"):
        converted(tmp_path, f"{command} --model_name_or_path m\n", "a.sh")


@pytest.mark.parametrize(
    "text",
    [
        f"{SFT}\nHF_TOKEN=hf_x1 python merge.py --model out\n",
        f"{SFT}\nhf --token hf_x1 upload.py --model out\n",
        f"{SFT}\n--hf_token=hf_x1\n",
        f"{SFT} --hf_token $hf_x1\n",
        "HF_TOKEN=hf_x1 python a.py --model m\nHF_TOKEN=hf_x1 python b.py --hf_token hf_x1 --model m\n",
        f"{SFT}\nRUN='HF_TOKEN=hf_x1 python merge.py --model out'\n$RUN\n",
        "A_KEY=hf_x1 B_KEY=hf_x1 a --model m\nhf_x=hf_x1 b --token=hf_x1 --model m\n",
    ],
)
def test_no_token_of_a_command_is_copied(tmp_path, text):
    try:
        said = converted(tmp_path, text, "a.sh").text("a.sh")
    except ConfigError as error:
        said = str(error)
    assert "hf_x1" not in said and ("another command" in said or "several commands" in said or "hf_token" in said)


def test_no_token_of_a_file_is_copied():
    found = of("TRL", wandb_api_key="hf_x1", odd={"token": "hf_x1", "other": 1})
    assert "hf_x1" not in found.text("a.yaml") and {"wandb_api_key", "odd"} <= notes_of(found).keys()
    found = of("Axolotl", datasets=[{"path": "a/b", "hf_token": "hf_x1"}])
    assert "hf_x1" not in found.text("a.yaml") and "data.train hf_token" in notes_of(found)
    found = of("torchtune", optimizer={"_component_": "torch.optim.AdamW", "api_key": "hf_x1"})
    assert "hf_x1" not in found.text("a.yaml") and "optimizer.api_key" in notes_of(found)


def test_a_value_of_several_lines_breaks_no_comment(tmp_path):
    found = converted(tmp_path, "trl sft --model_name_or_path m --run_name \"a\n$X: 1\" --output_dir 'o;1'\n", "a.sh")
    assert yaml.safe_load(found.text("a.sh")) == found.tree and found.tree["out"] == "o;1"


def test_a_checkout_is_tried_and_counted(tmp_path):
    (tmp_path / "trl" / "scripts").mkdir(parents=True)
    (tmp_path / "trl" / "scripts" / "sft.py").write_text("")
    (tmp_path / "examples").mkdir()
    for name, text in (("a", "SFTTrainer('m', SFTConfig('o', learning_rate=1e-5))"), ("b", "DPOTrainer('m')")):
        (tmp_path / "examples" / f"{name}.py").write_text(text)
    (tmp_path / "page.md").write_text("```\ntrl sft --model_name_or_path m \\\n  --odd 1\n```\ntrl dpo --beta 1\n")
    scripts, commands = peer_files.tried(tmp_path)
    assert [scripts[key] for key in ("files", "converted", "accepted", "failed", "unknown")] == [2, 1, 1, 0, 0]
    assert scripts["refused"] == {"it calls another trainer than SFTTrainer": 1}
    assert (commands["converted"], commands["keys"], commands["unknown_keys"]) == (1, 2, {"odd": 1})


# Data ----------------------------------------------------------------------------------------------------------------


def test_a_mixture_of_the_alignment_handbook():
    mixture = {
        "datasets": [
            {"id": "own/chats-3.1k", "config": "SFT", "split": "train_sft", "columns": ["messages"], "weight": 0.5},
            {"id": "own/more", "weight": 1.0},
        ],
        "seed": 7,
        "test_split_size": 0.05,
    }
    found = of("TRL", dataset_mixture=mixture)
    assert found.tree["data"]["train"] == [
        {"path": "own/chats-3.1k", "split": "train_sft", "name": "SFT", "weight": 0.5},
        {"path": "own/more", "split": "train"},
    ]
    assert found.tree["data"]["eval_size"] == 0.05 and found.tree["train"]["seed"] == 42
    assert not [key for key in notes_of(found) if key.startswith("data")]


def test_a_mixture_of_trls_command():
    found = of("TRL", datasets=[{"path": "own/chats", "fraction": 0.3}])
    assert found.tree["data"]["train"] == [{"path": "own/chats", "split": "train"}]
    assert "share of the mixture" in notes_of(found)["data.train fraction"]


def test_files_of_a_data_set_of_the_hub():
    found = of("Axolotl", datasets=[{"path": "own/set", "data_files": ["a.jsonl", "b/c.parquet"], "type": "sharegpt"}])
    paths = [source["path"] for source in found.tree["data"]["train"]]
    assert paths == ["hf://datasets/own/set/a.jsonl", "hf://datasets/own/set/b/c.parquet"]


@pytest.mark.parametrize(
    ("peer", "entry", "is_named"),
    [
        ("Axolotl", {"path": "json", "data_files": "a.jsonl", "split": "train[:1%]", "type": "chat_template"}, True),
        ("Axolotl", {"path": "json", "data_files": "a.jsonl", "split": "train+test", "type": "chat_template"}, True),
        ("Axolotl", {"path": "json", "data_files": "a.jsonl", "split": "train_sft", "type": "chat_template"}, False),
        ("TRL", {"path": "json", "data_files": "a.jsonl", "split": "train[90%:]"}, True),
    ],
)
def test_a_part_of_a_file_is_named(peer, entry, is_named):
    found = of(peer, **{"datasets" if peer == "Axolotl" else "train_dataset": [entry]})
    assert found.tree["data"]["train"] == [{"path": "a.jsonl"}]
    assert ("a file is read whole" in notes_of(found).get("data.train split", "")) == is_named


def test_a_part_of_a_file_of_torchtune_is_named(tmp_path):
    data = {"_component_": "x.chat_dataset", "source": "json", "data_files": "a.json", "split": "train[:90%]"}
    assert "data.train split" in notes_of(converted(tmp_path, {**TORCHTUNE, "dataset": data}))


@pytest.mark.parametrize("path", ["./data", "/data/own", "own/chats", "chats", "json"])
def test_files_of_a_local_folder(tmp_path, path):
    (tmp_path / "own" / "chats").mkdir(parents=True)
    (tmp_path / "chats").mkdir()
    (tmp_path / "json").mkdir()  # yet `json` is what reads the file
    (tmp_path / "run").mkdir()
    data = [{"path": path, "data_files": "train.jsonl", "type": "chat_template"}]
    found = converted(tmp_path, {"base_model": "m", "datasets": data})
    wanted = "train.jsonl" if path == "json" else str(Path(path) / "train.jsonl")
    assert found.tree["data"]["train"] == [{"path": wanted}]


def test_a_data_set_that_is_named_without_its_owner_is_not_lost():
    data = [{"path": "squad", "data_files": "train.jsonl", "type": "chat_template"}]
    assert "hf://datasets/OWNER/squad/train.jsonl" in notes_of(of("Axolotl", datasets=data))["data.train path"]


def test_columns_that_axolotl_names():
    prompt = {"field_instruction": "query", "field_output": "reply", "format": "Q: {instruction} A:"}
    found = of("Axolotl", datasets=[{"path": "own/set", "type": prompt}])
    assert found.tree["data"]["train"][0]["columns"] == {"instruction": "query", "output": "reply"}
    roles = {"assistant": ["gpt", "model"], "user": ["human"]}
    found = of("Axolotl", datasets=[{"path": "own/set", "type": "chat_template", "roles": roles}])
    assert not [key for key in notes_of(found) if key.startswith("data")]
    roles["user"].append("narrator")
    found = of("Axolotl", datasets=[{"path": "own/set", "type": "chat_template", "roles": roles}])
    assert "data.train roles" in notes_of(found)


@pytest.mark.parametrize("key", ["datasets", "pretraining_dataset"])
def test_texts_are_trained_whole_and_cut_into_pieces(key):
    found = of("Axolotl", max_steps=9, **{key: [{"path": "own/texts", "type": "completion", "field": "chapter"}]})
    data = found.tree["data"]
    assert data["train"] == [{"path": "own/texts", "split": "train", "columns": {"text": "chapter"}}]
    assert data["overflow"] == "split" and ("streaming" in data) == (key == "pretraining_dataset")


def test_rows_of_token_ids_are_named():
    assert "token ids" in notes_of(of("Axolotl", datasets=[{"path": "own/ids"}]))["data.train type"]


def test_an_entry_that_does_not_say_where_the_data_is_is_left_out_and_named():
    entries = [{"type": "chat_template"}, {"path": None, "type": "sharegpt"}, {"path": "own/set", "type": "sharegpt"}]
    found = of("Axolotl", datasets=entries)
    assert [source["path"] for source in found.tree["data"]["train"]] == ["own/set"]
    assert "does not say where the data is" in notes_of(found)["data.train"]
    assert convert(PeerFile("Axolotl", {"base_model": "m", "datasets": entries[:1]}), Path()).missing == [
        "data.train",
        "out",
    ]


def test_a_data_set_of_llama_factory_keeps_its_part_split_and_number(tmp_path, monkeypatch):
    known = {
        "a": {"hf_hub_url": "own/set", "subset": "easy", "num_samples": 50, "columns": {"prompt": "q", "images": "i"}},
        "b": {"hf_hub_url": "own/chats", "split": "sft", "formatting": "sharegpt", "tags": {"role_tag": "who"}},
        "c": {"file_name": "texts.jsonl", "columns": {"prompt": "body"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(known))
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")  # the file is named by a path that says nothing of the folder above
    Path("a.yaml").write_text("stage: sft\ndataset: a,b\n")
    found = convert_file(Path("a.yaml"))
    assert found.tree["data"]["train"] == [
        {"path": "own/set", "name": "easy", "split": "train", "count": 50, "columns": {"instruction": "q"}},
        {"path": "own/chats", "split": "sft", "columns": {"messages": "conversations"}},
    ]
    said = [why for key, why in found.notes if key == "dataset"]
    assert "only text is trained" in said[0] and "messages have who: rename them" in said[1]
    Path("b.yaml").write_text("stage: pt\ndataset: c\n")
    data = convert_file(Path("b.yaml")).tree["data"]
    assert data["train"][0]["columns"] == {"text": "body"} and data["overflow"] == "split"


@pytest.mark.parametrize(
    ("files", "named", "split"),
    [
        (["part1.jsonl"], None, None),
        (["part1.jsonl"], "train", None),
        (["train.jsonl", "test.jsonl"], None, "train"),
        (["train/1.jsonl", "test/1.jsonl"], "test", "test"),
        ([], None, None),
        ([], "train", "train"),
    ],
)
@pytest.mark.parametrize("peer", ["TRL", "Axolotl", "torchtune"])
def test_a_folder_whose_files_name_no_split_is_read_whole(tmp_path, peer, files, named, split):
    for name in files:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text('{"text": "a"}\n')
    path = "./mine"
    content = {
        "TRL": {"output_dir": "o", "dataset_name": path, "dataset_train_split": named},
        "Axolotl": {"base_model": "m", "datasets": [{"path": path, "type": "sharegpt", "split": named}]},
        "torchtune": {**TORCHTUNE, "dataset": {**TORCHTUNE["dataset"], "source": path}},
    }[peer]
    if peer == "torchtune" and named is not None:
        content["dataset"]["split"] = named
    (source,) = converted(tmp_path, content).tree["data"]["train"]
    assert source == {"path": path, **({"split": split} if split else {})}
    if files:
        assert find_tables(Source(**{**source, "path": str(tmp_path / "mine")}))


def of_entry(tmp_path, entry, stage="sft"):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    return converted(tmp_path, {"stage": stage, "dataset": "a", "dataset_dir": str(tmp_path)})


OF_ALPACA = {"instruction": "instruction", "input": "input", "output": "output"}


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"hf_hub_url": "own/code", "folder": "python"}, {"path": "hf://datasets/own/code/python", "split": "train"}),
        (
            {"hf_hub_url": "own/code", "folder": "python", "revision": "v2"},
            {"path": "hf://datasets/own/code@v2/python", "split": "train"},
        ),
        ({"hf_hub_url": "own/code", "revision": "v2"}, {"path": "own/code", "split": "train", "revision": "v2"}),
        ({"file_name": "/b.json", "split": "train", "subset": "x"}, {"path": "/b.json"}),
    ],
)
def test_a_data_set_of_llama_factory_keeps_its_folder_and_revision(tmp_path, entry, place):
    found = of_entry(tmp_path, entry)
    assert found.tree["data"]["train"] == [{**place, "columns": OF_ALPACA}]
    assert not {"dataset", "dataset_dir"} & notes_of(found).keys()


SHAREGPT = {"formatting": "sharegpt"}
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, ["Q\n\nMORE", "A"]),
        ({"columns": {"prompt": "instruction", "response": "output"}}, ["Q", "A"]),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output"}}, ["Q\n\nMORE", "A"]),
        ({"columns": {"prompt": "instruction", "response": "output", "system": "system"}}, ["SYS", "Q", "A"]),
        ({"columns": {"prompt": "instruction", "response": "output", "history": "history"}}, ["a", "b", "Q", "A"]),
        (SHAREGPT, ["Q", "A"]),
        ({**SHAREGPT, "columns": {"messages": "conversations"}}, ["Q", "A"]),
        ({**SHAREGPT, "columns": {"messages": "conversations", "system": "system"}}, ["SYS", "Q", "A"]),
    ],
)
def test_of_a_data_set_only_the_columns_that_llama_factory_reads_are_trained(tmp_path, entry, said):
    row = {"system": "SYS", "instruction": "Q", "input": "MORE", "output": "A", "history": [["a", "b"]]}
    row = {"system": "SYS", "conversations": TURNS} if "formatting" in entry else row
    (tmp_path / "b.json").write_text(json.dumps([row]))
    found = of_entry(tmp_path, {"file_name": "b.json", **entry})
    (example,) = OpenSource(Source(**found.tree["data"]["train"][0])).examples()
    assert [message.content for message in example.messages] == said


@pytest.mark.parametrize("named", [{}, {"columns": {"prompt": "instruction", "query": "input"}}])
def test_a_text_of_llama_factory_is_its_column_of_the_prompt(tmp_path, named):
    (source,) = of_entry(tmp_path, {"hf_hub_url": "own/texts", **named}, "pt").tree["data"]["train"]
    assert source["columns"] == {"text": "instruction"}


@pytest.mark.parametrize("entry", [{"ranking": True}, {"columns": {"prompt": "q", "response": "a", "kto_tag": "t"}}])
def test_preferences_of_llama_factory_are_left_out_as_there(tmp_path, entry):
    found = of_entry(tmp_path, {"file_name": "b.json", **entry})
    assert "data.train" in found.missing
    assert "chosen and rejected" in notes_of(found)["dataset"]


@pytest.mark.parametrize("entry", [{"script_url": "s"}, {"cloud_file_name": "s"}, "mine.json", None])
def test_an_entry_of_llama_factory_without_a_place_is_named(tmp_path, entry):
    known = {"a": entry, "b": {"file_name": "b.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(known))
    found = converted(tmp_path, {"stage": "sft", "dataset": "a,b", "dataset_dir": str(tmp_path)})
    assert found.tree["data"]["train"] == [{"path": str(tmp_path / "b.json"), "columns": OF_ALPACA}]
    assert notes_of(found)["dataset"].startswith("'a': its entry has neither")
    (tmp_path / "dataset_info.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds list, not data sets"):
        converted(tmp_path, {"stage": "sft", "dataset": "a", "dataset_dir": str(tmp_path)})


# Training ------------------------------------------------------------------------------------------------------------


def test_axolotl_warms_up_for_three_percent_unless_told():
    assert of("Axolotl").tree["optimizer"]["warmup"] == "3 %"
    assert "at most 100 steps there" in notes_of(of("Axolotl"))["warmup_steps"]


@pytest.mark.parametrize(
    ("peer", "settings", "warmup", "note"),
    [
        ("Axolotl", {"warmup_steps": 0}, "0 steps", ""),
        ("Axolotl", {"warmup_ratio": 0.05}, "5 %", ""),
        ("Axolotl", {"max_steps": 90}, "2 steps", ""),
        ("Axolotl", {"max_steps": 50_000}, "100 steps", ""),
        ("Axolotl", {"max_steps": 50_000, "warmup_ratio": 0.03}, "3 %", ""),
        ("Axolotl", {"lr_scheduler": "constant"}, "0 steps", ""),
        ("Unsloth", {"lr_scheduler_type": "constant"}, "0 steps", ""),
        ("Unsloth", {}, "10 %", ""),
        ("TRL", {"lr_scheduler_type": "constant", "warmup_ratio": 0.03}, "0 steps", "warmup_ratio"),
        ("TRL", {"lr_scheduler_type": "constant", "warmup_steps": 9}, "0 steps", "warmup_steps"),
        ("TRL", {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.03}, "3 %", ""),
        ("TRL", {"warmup_ratio": 0.03, "warmup_steps": 7}, "7 steps", ""),
        ("TRL", {"warmup_ratio": 0.03, "warmup_steps": 0}, "3 %", ""),
        ("TRL", {"warmup_steps": -5}, None, "warmup_steps"),
        ("TRL", {"warmup_steps": 7.5}, "7 steps", ""),
    ],
)
def test_the_warm_up_is_that_of_the_trainer(peer, settings, warmup, note):
    found = of(peer, **settings)
    assert found.tree["optimizer"].get("warmup") == warmup
    assert {key for key in notes_of(found) if key.startswith("warmup")} == ({note} if note else set())


@pytest.mark.parametrize("steps", [float("inf"), float("nan"), -5])
def test_a_number_of_steps_that_none_is_makes_no_moment(steps):
    found = of("TRL", save_steps=steps)
    assert "checkpoint" not in found.tree and "save_steps" in notes_of(found)


@pytest.mark.parametrize(
    ("peer", "settings", "runs_again"),
    [
        ("TRL", {}, True),
        ("TRL", {"gradient_checkpointing": False}, False),
        ("TRL", {"activation_checkpointing": False}, False),
        ("LLaMA-Factory", {"activation_checkpointing": False}, False),
        ("Axolotl", {"activation_checkpointing": True}, True),
        ("LLaMA-Factory", {}, True),
        ("LLaMA-Factory", {"disable_gradient_checkpointing": True}, False),
        ("Axolotl", {}, False),
        ("Axolotl", {"gradient_checkpointing": "offload"}, True),
        ("Axolotl", {"fsdp_config": {"fsdp_activation_checkpointing": True}}, True),
        ("Axolotl", {"fsdp_config": {"activation_checkpointing": False}}, False),
    ],
)
def test_what_runs_again_in_backward(peer, settings, runs_again):
    found = of(peer, **settings)
    assert found.tree.get("memory") == ({"activation_checkpointing": "all"} if runs_again else None)
    assert ("gradient_checkpointing" in notes_of(found)) == ("offload" in settings.values())


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"bf16": "auto"}, "bfloat16"),
        ({"bf16": True, "fsdp_config": {"fsdp_version": 2}}, None),
        ({"bf16": True, "deepspeed": "zero3.json"}, None),
        ({"bf16": False}, None),
        ({"bf16": None}, None),
        ({}, "bfloat16"),
        ({"adapter": "lora", "lora_target_linear": True}, "bfloat16"),
        ({"fp16": True}, None),
        ({"fsdp_config": {"fsdp_version": 2}}, None),
        ({"bf16": True, "deepspeed": "zero3.json", "adapter": "lora", "lora_target_linear": True}, "bfloat16"),
    ],
)
def test_axolotl_loads_weights_in_the_type_of_training(settings, dtype):
    assert of("Axolotl", **settings).tree.get("model", {}).get("dtype") == dtype


def test_axolotls_whole_batch_size_holds_the_accumulation():
    assert of("Axolotl", micro_batch_size=2, batch_size=8).tree["train"]["batch_size"] == 8


def test_steps_come_before_epochs():
    found = of("Axolotl", max_steps=7, num_epochs=3)
    assert found.tree["train"]["duration"] == "7 steps" and "num_epochs" not in notes_of(found)


def test_without_clipping_no_gradient_is_scaled():
    found = of("TRL", max_grad_norm=0)
    assert found.tree["optimizer"]["max_grad_norm"] == 1e9 and "not clipped" in notes_of(found)["max_grad_norm"]


@pytest.mark.parametrize("peer", ["TRL", "Unsloth"])
def test_null_is_no_clipping_where_it_is_a_value(peer):
    assert of(peer, max_grad_norm=None).tree["optimizer"]["max_grad_norm"] == 1e9
    assert of("Axolotl", max_grad_norm=None).tree["optimizer"]["max_grad_norm"] == 1.0


@pytest.mark.parametrize(
    ("peer", "settings", "precision"),
    [
        ("TRL", {"bf16": False}, "float32"),
        ("TRL", {"bf16": False, "fp16": True}, "bfloat16"),
        ("TRL", {"bf16": False, "dtype": "bfloat16"}, "bfloat16"),
        ("TRL", {}, None),
        ("Axolotl", {"bf16": False, "fp16": False}, "float32"),
        ("Axolotl", {"bf16": None}, "float32"),
        ("Axolotl", {"bf16": False, "fp16": True}, "bfloat16"),
        ("LLaMA-Factory", {"bf16": False}, None),  # an adapter, on a base in the type of its files
        ("LLaMA-Factory", {"finetuning_type": "full"}, "float32"),
        ("LLaMA-Factory", {"finetuning_type": "full", "bf16": False, "fp16": False}, "float32"),
        ("LLaMA-Factory", {"finetuning_type": "full", "use_badam": True}, None),  # trains half-precision weights
        ("LLaMA-Factory", {"finetuning_type": "full", "bf16": True}, "bfloat16"),
        ("LLaMA-Factory", {"finetuning_type": "full", "fp16": True}, "bfloat16"),
        ("LLaMA-Factory", {"finetuning_type": "full", "pure_bf16": True}, "bfloat16"),
        ("torchtune", {"dtype": "fp32"}, "float32"),
        ("torchtune", {"dtype": "bf16"}, "bfloat16"),
    ],
)
def test_a_type_that_is_switched_off_is_float32(peer, settings, precision):
    assert of(peer, **settings).tree["train"].get("precision") == precision


@pytest.mark.parametrize(
    ("peer", "key", "drawn", "not_drawn"),
    [
        ("torchtune", "shuffle", True, False),
        ("Axolotl", "shuffle_merged_datasets", True, False),
        ("TRL", "train_sampling_strategy", "random", "sequential"),
        ("LLaMA-Factory", "train_sampling_strategy", "random", "sequential"),
        ("LLaMA-Factory", "disable_shuffling", None, True),
    ],
)
def test_an_order_that_is_not_drawn_is_named(peer, key, drawn, not_drawn):
    said = [why for name, why in of(peer, **{key: not_drawn}).notes if name == key]
    assert len(said) == 1 and said[0].startswith(f"{str(not_drawn).lower()}: the order of the file there")
    assert notes_of(of(peer, **{key: drawn})).get(key, "nothing to set").endswith("nothing to set")


def test_a_mean_of_each_device_is_named():
    assert notes_of(of("TRL", average_tokens_across_devices=False))["average_tokens_across_devices"].startswith(
        "false: "
    )
    found = notes_of(of("TRL", average_tokens_across_devices=True))["average_tokens_across_devices"]
    assert found.endswith("nothing to set")


def test_reasoning_that_is_switched_off():
    found = of("LLaMA-Factory", template="qwen3", enable_thinking=False)
    assert found.tree["data"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "removed from the answers there" in notes_of(found)["enable_thinking"]
    assert "chat_template_kwargs" not in of("LLaMA-Factory", template="qwen3").tree["data"]


@pytest.mark.parametrize("name", ["default", "empty"])
def test_templates_of_llama_factory_with_plain_names_are_real_ones(name):
    assert "of LLaMA-Factory's own" in notes_of(of("LLaMA-Factory", template=name))["chat_template"]
    assert "chat_template" not in notes_of(of("Axolotl", chat_template="tokenizer_default"))


@pytest.mark.parametrize("given", [{}, {"use_rslora": True}])
def test_alpha_of_llama_factory_is_twice_the_rank(given):
    assert of("LLaMA-Factory", lora_rank=64, **given).tree["adapter"]["alpha"] == 128.0
    assert of("LLaMA-Factory", lora_rank=64, lora_alpha=16, **given).tree["adapter"]["alpha"] == 16.0


@pytest.mark.parametrize("name", ["polynomial", "rex", "cosine_with_restarts"])
def test_what_runs_instead_of_a_schedule_that_is_not_offered(name):
    found = of("TRL", lr_scheduler_type=name)
    assert (found.tree["optimizer"]["lr_scheduler"], found.tree["optimizer"]["min_lr_ratio"]) == ("cosine", 0.0)
    assert "it is cosine here, down to 0" in notes_of(found)["lr_scheduler_type"]


@pytest.mark.parametrize(
    ("peer", "given"),
    [("TRL", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}), ("Axolotl", {"cosine_min_lr_ratio": 0.1})],
)
def test_the_last_share_of_the_rate_that_runs_instead_is_that_of_the_file(peer, given):
    found = of(peer, lr_scheduler="rex", **given)
    assert found.tree["optimizer"]["min_lr_ratio"] == 0.1
    assert "it is cosine here, down to 0.1 of the rate" in notes_of(found)["lr_scheduler_type"]


@pytest.mark.parametrize(
    ("peer", "given", "ratio"),
    [
        ("TRL", {"learning_rate": 1e-5}, 0.1),
        ("TRL", {}, 0.05),  # of 2e-5
        ("LLaMA-Factory", {"learning_rate": 1e-4}, 0.01),
        ("Axolotl", {"lr": 1e-4}, 0.01),
    ],
)
def test_a_last_rate_is_a_share_of_the_peak(peer, given, ratio):
    found = of(peer, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6}, **given)
    assert found.tree["optimizer"]["min_lr_ratio"] == pytest.approx(ratio)
    assert "lr_scheduler_kwargs" not in notes_of(found)
    odd = of(peer, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": "x"}, **given)
    assert "is not a value that can be carried over" in notes_of(odd)["lr_scheduler_kwargs"]


@pytest.mark.parametrize("switch", ["relora", "use_qalora"])
def test_settings_of_a_variant_of_lora_say_nothing_without_its_switch(switch):
    settings = {"relora_steps": 150, "relora_prune_ratio": 0.9, "qalora_group_size": 16}
    off, on = (of("Axolotl", **settings, **{switch: value}) for value in (False, True))
    assert not off.unoffered and {**settings}.keys() <= notes_of(off).keys()
    assert [key for key, _ in on.unoffered] == [switch]


def test_what_is_trained_instead_of_an_adapter_that_is_not_offered():
    found = of("LLaMA-Factory", finetuning_type="oft")
    assert "all weights are trained here" in notes_of(found)["adapter"] and "adapter" not in found.tree


@pytest.mark.parametrize("key", ["fsdp", "fsdp_config"])
def test_the_size_of_an_update_of_muon_under_fsdp_is_named(key):
    muon = {"optimizer": "muon", "learning_rate": 1e-3}
    assert "sqrt(rows / columns)" in notes_of(of("Axolotl", **muon, **{key: ["full_shard"]}))["learning_rate"]
    assert "learning_rate" not in notes_of(of("Axolotl", **muon))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_galore": True},
        {"relora": True},
        {"use_eaft": True},
        {"lisa_n_layers": 2},
        {"oft_block_size": 8},
        {"bias": "all"},
        {"eva_config": {"rho": 2}},
        {"optim": "lion_8bit"},
        {"load_in_4bit": True},
        {"unfrozen_parameters": ["^lm_head.weight$"]},
        {"adapter_name_or_path": "saves/x"},
        {"lora_model_dir": "saves/x", "use_peft": True},
        {"exclude_modules": ["lm_head"]},
        {"layers_to_transform": [1]},
        {"peft_layers_to_transform": [1]},
        {"load_best_model_at_end": True},
        {"early_stopping_patience": 3},
        {"early_stopping_steps": 3},
        {"interleave_probs": "0.5,0.5"},
        {"embedding_learning_rate": 1e-5},
        {"lr_groups": [{"name": "head"}]},
    ],
)
def test_what_changes_the_training_comes_first(settings):
    found = of("TRL", do_train=True, save_strategy="best", **settings)
    lines = found.text("x").splitlines()
    first = next(
        at
        for at, line in enumerate(lines)
        if line == "# Not carried over, so that something else is trained than there:"
    )
    key = "quantization" if "load_in_4bit" in settings else next(iter(settings))
    assert lines[first + 1].startswith(f"#   {key}: ") and lines[first + 2] == "# Not carried over, or not as it was:"
    assert [name for name, _ in found.unoffered] == [key]


def test_what_is_to_be_set_by_hand_is_known_to_have_a_key_here():
    assert COUNTERPARTS.keys() >= CHANGES_IF_LEFT_OUT and not CHANGES_IF_LEFT_OUT & {*NO_COUNTERPART, *DIRECT}


def test_another_epsilon_needs_action_and_the_same_one_none():
    assert not notes_of(of("TRL", adam_epsilon=1e-6))["adam_epsilon"].endswith("remove the key")
    assert "adam_epsilon" not in notes_of(of("TRL", adam_epsilon=1e-8)) and not of("TRL", bias="none").unoffered


@pytest.mark.parametrize("key", ["lora_target_modules", "target_modules"])
def test_a_regular_expression_is_no_name_of_a_layer(key):
    found = of("TRL", use_peft=True, **{key: r"model.layers.[\d]+.mlp.(up|down)_proj"})
    assert "target_modules" not in found.tree["adapter"]
    assert "is a regular expression" in notes_of(found)["lora_target_modules"]


def test_all_linear_layers_beside_names_are_all():
    found = of("Axolotl", adapter="lora", lora_target_linear=True, lora_target_modules=["q_proj"])
    assert "target_modules" not in found.tree["adapter"] and "lora_target_modules" not in notes_of(found)


def test_settings_of_an_adapter_without_one_ask_for_nothing():
    found = of("Axolotl", lora_r=8, lora_alpha=16)
    assert "adapter" not in found.tree and notes_of(found)["lora_r"].endswith("nothing to set")


def test_methods_and_images_that_are_not_offered_change_the_training():
    settings = {"use_galore": True, "galore_rank": 8, "image_max_pixels": 9, "qat": {"weight_dtype": "int4"}}
    found = of("LLaMA-Factory", **settings)
    assert {key for key, _ in found.unoffered} == settings.keys()
    assert "only text is trained" in notes_of(found)["image_max_pixels"]


def test_a_template_in_the_file_is_to_be_written_to_one():
    found = of("TRL", chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}")
    assert "chat_template" not in found.tree["data"] and ".jinja" in notes_of(found)["chat_template"]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"tokens": ["<my_tool>"]}, "tokens"),
        ({"add_tokens": "<my_tool>"}, "add_tokens"),
        ({"add_special_tokens": "<my_tool>"}, "add_special_tokens"),
        ({"new_special_tokens": "<my_tool>"}, "new_special_tokens"),
        ({"added_tokens_overrides": {128041: "<my_tool>"}}, "added_tokens_overrides"),
        (
            {"special_tokens": {"additional_special_tokens": ["<my_tool>"], "eos_token": "</s>"}},
            "special_tokens.additional_special_tokens",
        ),
    ],
)
def test_tokens_of_the_data_are_not_added_and_that_is_said_before_what_needs_no_action(settings, key):
    found = of("Axolotl", eos_token="</s>", **settings)
    assert "their text is read as ordinary tokens: add them to the model's folder" in notes_of(found)[key]
    keys = [each for each, _ in found.notes]
    assert keys.index(key) < keys.index("eos_token") and "special_tokens" not in keys
    assert notes_of(of("Axolotl", special_tokens={"pad_token": "x"}))["special_tokens"].endswith("nothing to set")


def test_trackers_by_their_own_keys():
    found = of("Axolotl", use_tensorboard=True, trackio_project_name="p", use_swanlab=True)
    assert found.tree["tracker"] == ["tensorboard", "trackio"] and "use_swanlab" in notes_of(found)


@pytest.mark.parametrize(
    ("peer", "settings", "trackers"),
    [
        ("TRL", {"report_to": "none", "wandb_project": "p"}, None),
        ("LLaMA-Factory", {"use_wandb": True}, None),
        ("Axolotl", {"wandb_project": "p"}, ["wandb"]),
        ("Axolotl", {"mlflow_experiment_name": "e"}, ["mlflow"]),
        ("Axolotl", {"mlflow_tracking_uri": "http://u"}, None),
    ],
)
def test_keys_that_stand_for_a_tracker_are_axolotls(peer, settings, trackers):
    found = of(peer, **settings)
    assert found.tree.get("tracker") == trackers
    assert not [why for _, why in found.notes if "not known here" in why]
    assert (trackers is None) == bool(settings.keys() & notes_of(found).keys())


@pytest.mark.parametrize(("key", "value"), [("eval_strategy", "no"), ("eval_strategy", "epoch"), ("x", "epoch")])
def test_held_out_data_of_a_strategy_that_is_off_is_not_named(key, value):
    found = of("TRL", dataset_name="own/chats", **{key: value})
    assert ("eval" in found.tree["data"]) == ((key, value) == ("eval_strategy", "epoch"))


@pytest.mark.parametrize(("given", "dropout"), [({}, 0.05), ({"lora_dropout": 0.1}, 0.1), ({"lora_dropout": 0}, 0.0)])
def test_an_adapter_of_trl_drops_five_percent_unless_told(given, dropout):
    found = of("TRL", use_peft=True, **given)
    assert found.tree["adapter"]["dropout"] == dropout
    assert "target_modules" not in of("TRL", use_peft=True, lora_target_modules=[]).tree["adapter"]


def test_a_stream_has_no_epochs_to_save_after():
    found = convert(PeerFile("Axolotl", {"streaming": True, "saves_per_epoch": 2, "datasets": ["a"]}), Path())
    assert "checkpoint" not in found.tree and "set checkpoint.every" in notes_of(found)["save"]


# torchtune -----------------------------------------------------------------------------------------------------------


def test_what_torchtune_takes_where_a_key_is_absent(tmp_path):
    """No clipping, no limit of length, a checkpoint after each epoch."""
    found = converted(tmp_path, {**TORCHTUNE, "clip_grad_norm": None})
    assert found.tree["optimizer"]["max_grad_norm"] == 1e9 and found.tree["checkpoint"] == {"every": "1 epochs"}
    assert "no limit there" in notes_of(found)["max_length"] and "max_length" not in found.tree["data"]
    config.build(found.tree, "converted")


def test_several_data_sets_steps_of_an_epoch_and_evaluation_of_torchtune(tmp_path):
    texts = {"_component_": "torchtune.datasets.text_completion_dataset", "source": "own/texts", "column": "body"}
    held_out = {"_component_": "torchtune.datasets.chat_dataset", "source": "own/chats", "split": "test"}
    more = {"max_steps_per_epoch": 50, "epochs": 3, "metric_logger": {"_component_": "x.WandBLogger"}, "device": "cpu"}
    tree = {**TORCHTUNE, **more, "dataset": [TORCHTUNE["dataset"], texts], "dataset_val": held_out}
    found = converted(tmp_path, {**tree, "run_val_every_n_steps": 20, "save_every_n_steps": 30})
    data = found.tree["data"]
    assert data["train"] == [
        {"path": "own/chats", "split": "train"},
        {"path": "own/texts", "split": "train", "columns": {"text": "body"}},
    ]
    assert data["eval"] == [{"path": "own/chats", "split": "test"}] and found.tree["eval"] == {"every": "20 steps"}
    assert found.tree["train"]["duration"] == "3 epochs" and found.tree["tracker"] == ["wandb"]
    assert notes_of(found)["max_steps_per_epoch"].startswith("at most 50 steps an epoch there")
    assert found.tree["checkpoint"] == {"every": "30 steps"} and "use_cpu" in notes_of(found)
    found = converted(tmp_path, tree)
    assert "eval" not in found.tree["data"] and "run_val_every_n_steps" in notes_of(found)["dataset_val"]


@pytest.mark.parametrize("every", [None, 20])
def test_how_held_out_data_of_torchtune_is_read_says_nothing_of_training(tmp_path, every):
    held_out = {"_component_": "torchtune.datasets.alpaca_dataset", "packed": True, "train_on_input": True, "odd": 1}
    found = converted(tmp_path, {**TORCHTUNE, "dataset_val": held_out, "run_val_every_n_steps": every})
    assert "train_on" not in found.tree["data"] and "batch_size" in found.tree["train"]
    assert "each by itself" in notes_of(found)["batch size"]
    assert ("dataset.odd" in notes_of(found)) == ("eval" in found.tree["data"]) == (every is not None)


@pytest.mark.parametrize(("own", "trained"), [((True, True), "all"), ((True, False), None), ((False, False), None)])
def test_prompts_of_some_data_sets_of_torchtune_are_not_those_of_all(tmp_path, own, trained):
    each = [{**TORCHTUNE["dataset"], "train_on_input": value} for value in own]
    found = converted(tmp_path, {**TORCHTUNE, "dataset": each})
    assert found.tree["data"].get("train_on") == trained
    assert ("train_on_input" in notes_of(found)) == (len(set(own)) == 2)


def test_keys_within_the_values_of_keys(tmp_path):
    more = {"base": "/tmp", "name": "${base}/x", "output_dir": "${name}/o", "loop": "${loop}${loop}"}
    assert converted(tmp_path, {**TORCHTUNE, **more}).tree["out"] == "/tmp/x/o"


def test_an_adapter_of_torchtune_on_no_layer_is_named(tmp_path):
    found = converted(tmp_path, {**TORCHTUNE, "model": {"_component_": "x.lora_llama3", "lora_attn_modules": []}})
    assert "target_modules" not in found.tree["adapter"] and "names no layer" in notes_of(found)["lora_attn_modules"]
    config.build(found.tree, "converted")


@pytest.mark.parametrize(
    ("named", "own"), [({}, (8, 16.0)), ({"lora_rank": 32}, (32, 16.0)), ({"lora_alpha": 4}, (8, 4.0))]
)
def test_an_adapter_of_torchtune_has_the_rank_of_its_builders_unless_told(tmp_path, named, own):
    model = {"_component_": "torchtune.models.llama3_1.lora_llama3_1_8b", "lora_attn_modules": ["q_proj"]}
    adapter = converted(tmp_path, {**TORCHTUNE, "model": {**model, **named}}).tree["adapter"]
    assert (adapter["rank"], adapter["alpha"]) == own


def test_a_model_of_torchtune_that_sees_is_named(tmp_path):
    model = {"_component_": "torchtune.models.llama3_2_vision.llama3_2_vision_11b", "encoder_trainable": True}
    found = converted(tmp_path, {**TORCHTUNE, "model": {**model, "decoder_trainable": "frozen"}})
    assert "only text is trained" in notes_of(found)["model"] and "model.encoder_trainable" not in notes_of(found)
    assert "here it is all that is trained" in notes_of(found)["model.decoder_trainable"]


def test_checkpoints_and_prompts_of_torchtune(tmp_path):
    more = {
        "checkpointer": {"checkpoint_dir": "/m", "keep_last_n_checkpoints": 3},
        "tokenizer": {"prompt_template": "torchtune.data.QuestionAnswerTemplate"},
    }
    found = converted(tmp_path, {**TORCHTUNE, **more})
    assert found.tree["checkpoint"] == {"keep": 3, "every": "1 epochs"}
    assert "data.chat_template" in notes_of(found)["tokenizer.prompt_template"]


# Any value -----------------------------------------------------------------------------------------------------------

ODD = (3.5, [["x"]], {"a": None}, [{"path": None}])


@pytest.mark.parametrize("peer", ["TRL", "Axolotl", "LLaMA-Factory", "torchtune"])
def test_no_value_of_a_known_key_is_a_bug_of_ours(peer):
    """A value of a type that no trainer takes becomes a note, or is refused by the run file's own checks."""
    base = {**TORCHTUNE, "model": {"_component_": "lora_llama"}} if peer == "torchtune" else {"use_peft": True}
    known = ("lr_scheduler", "tokenizer", "metric_logger", "dataset_val", *base, *COUNTERPARTS, "fsdp_config")
    for key, odd in itertools.product(dict.fromkeys(known), ODD):
        assert convert(PeerFile(peer, {**base, key: odd}), Path()).text("x"), (key, odd)
    if peer == "torchtune":
        for key, odd in itertools.product(("lora_attn_modules", "lora_rank", "_component_"), ODD):
            assert convert(PeerFile(peer, {**base, "model": {**base["model"], key: odd}}), Path()).text("x"), (key, odd)


def test_large_numbers_of_steps_are_written_out():
    found = of("TRL", max_steps=2_000_000, save_steps=1_234_567, warmup_steps=1_000_001)
    assert found.tree["checkpoint"] == {"every": "1234567 steps"}
    assert found.tree["optimizer"]["warmup"] == "1000001 steps"
    found = convert(PeerFile("Axolotl", {"max_steps": 10**400}), Path())  # no float holds it
    assert found.tree["optimizer"]["warmup"] == "100 steps"
