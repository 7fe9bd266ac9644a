"""Settings of another trainer -> a run file, and what has no counterpart.

Each key is carried over, or named with the reason why it is not. Defaults of the other trainer are written
out. What the file does not say and a run needs is left open: nothing is guessed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from preceptor.config import torchtune, unsloth
from preceptor.config.peer_data import OF_ALPACA, data_section
from preceptor.config.peer_defaults import DIRECT, NAMES, OFF, SPEAKS, TRAINER
from preceptor.config.peer_files import dataset_info, read_peer_file
from preceptor.config.peer_names import CHANGES_IF_LEFT_OUT, COUNTERPARTS
from preceptor.config.peer_settings import Conversion, PeerFile
from preceptor.config.peer_training import set_adapter, set_moments, set_optimizer, set_training, trains_adapter
from preceptor.config.peer_without import CHANGES_TRAINING, NO_COUNTERPART
from preceptor.config.python_source import public
from preceptor.config.run import Run, Tracker
from preceptor.errors import short

_UNKNOWN = "not known here; look whether it matters"
_NO_CLIPPING = 1e9
_SPREAD = ("deepspeed", "fsdp", "fsdp_config")
_TRACKER_KEYS = {
    "wandb": ("use_wandb", "wandb_project"),
    "tensorboard": ("use_tensorboard",),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "trackio": ("use_trackio", "trackio_project_name"),
}
"""Keys of Axolotl that each stand for a tracker."""


def convert_file(path: Path) -> Conversion:
    """Raises ConfigError as `read_peer_file`."""
    return convert(read_peer_file(path), path.parent)


def settings_of(path: Path) -> Mapping[str, Any]:
    """The flat settings of a file, and what says how its data is read: torchtune's sections as `torchtune`, and of
    LLaMA-Factory's first data set `formatting` and `columns`. Raises ConfigError as `read_peer_file`.
    """
    file = read_peer_file(path)
    settings = dict(_flat(file).settings)
    if file.peer == "torchtune":
        settings["torchtune"] = file.settings
    if file.peer == "LLaMA-Factory":
        names = settings.get("dataset")
        name = str(names[0] if isinstance(names, list) and names else names).split(",")[0].strip()
        entry = dataset_info(settings, path.parent).get(name, {"columns": None})
        settings |= {"formatting": entry.get("formatting"), "columns": entry.get("columns", OF_ALPACA)}
    return settings


def known_settings() -> set[str]:
    """Every key of another trainer that is carried over, or of which is known why it is not."""
    return {*COUNTERPARTS, *NO_COUNTERPART, *DIRECT, *NAMES, *TRAINER}


def _flat(file: PeerFile) -> PeerFile:
    own = {"torchtune": torchtune, "Unsloth": unsloth}.get(file.peer)
    return file if own is None else own.flattened(file)


def convert(file: PeerFile, folder: Path) -> Conversion:
    """folder: where the file lies, for what it names."""
    file = _flat(file)
    given = Conversion(file)
    packed = given.on("packing", "sample_packing") is not None
    _set_model(given)
    data_section(given, folder, packed)
    set_training(given, packed)
    set_optimizer(given)
    set_moments(given)
    set_adapter(given)
    _set_trackers(given)
    given.carry(DIRECT)
    if given.peer == "LLaMA-Factory" and given.takes("enable_thinking", False):
        given.set("data.chat_template_kwargs", {"enable_thinking": False})
    optimizer = given.tree.get("optimizer", {})
    relative = given.peer != "torchtune" and optimizer.get("name") == "adafactor"  # torchtune's is torch's, as here
    if relative and (rate := optimizer.pop("learning_rate", None)) is not None:
        why = f"{short(rate)} is the size of an update there; here it is multiplied by the size of each weight"
        given.note("learning_rate", f"{why}. Left at Adafactor's default: set optimizer.learning_rate")
    if optimizer.get("name") == "muon" and given.peer == "Axolotl" and given.settings.keys() & {*_SPREAD[1:]}:
        why = "under FSDP an update of Muon is scaled by sqrt(rows / columns) there, by 0.2 sqrt(the larger) here"
        given.note("learning_rate", f"{why}: set optimizer.learning_rate")
    if optimizer.get("max_grad_norm") == 0:
        optimizer["max_grad_norm"] = _NO_CLIPPING
        given.note("max_grad_norm", "gradients are not clipped there; here at a norm that none reaches")
    given.drop_absent()
    _note_rest(given, file.unread)
    tree = given.tree = {key: given.tree[key] for key in Run.model_fields if key in given.tree}
    needed = {
        "model.path": "path" in tree.get("model", {}),
        "data.train": "train" in tree.get("data", {}),
        "out": "out" in tree,
    }
    given.missing = [key for key, is_there in needed.items() if not is_there]
    done = ("nothing to set", "remove the key")  # what needs no action comes last
    given.notes = sorted(
        dict.fromkeys(given.notes), key=lambda note: (not given.changes(*note), note[1].endswith(done))
    )
    return given


def _set_model(given: Conversion) -> None:
    given.takes("device_map", "auto", "sequential", "balanced")  # as train.device: auto
    lora = trains_adapter(given)
    _set_quantization(given, lora)
    dtype = str(given.value("torch_dtype", "dtype") or "").removeprefix("torch.")
    absent = "auto" if given.peer == "Axolotl" and given.on("fp16", "float16") is None else None
    half = given.settings.get("bf16", absent) in (True, "auto")
    if lora and not dtype and half and given.peer in ("Axolotl", "LLaMA-Factory"):  # the base of an adapter
        dtype = "bfloat16"
    elif not lora and not dtype:
        # Axolotl loads weights so, which are spread as float32 ones
        whole = given.peer == "Axolotl" and not given.settings.keys() & {*_SPREAD}
        key = next((key for key in ("pure_bf16", "bfloat16") if given.on(key)), "bf16" if whole and half else None)
        if key is not None:
            _set_half_weights(given, key)
    if dtype in ("bfloat16", "bf16"):
        if lora:
            given.set("model.dtype", "bfloat16")
        else:
            _set_half_weights(given, "dtype")
    elif dtype == "auto":
        if "dtype" not in given.tree.get("model", {}):
            given.note("dtype", "auto: the type of the files there; here float32: set model.dtype")
    elif dtype not in ("", "float32", "fp32"):
        given.not_offered("dtype", f"{dtype} is not offered: bfloat16 or float32")


def _set_half_weights(given: Conversion, key: str) -> None:
    """Full training of bfloat16 weights."""
    given.set("model.dtype", "bfloat16")
    given.set("train.precision", "bfloat16")
    given.note(key, "there small updates of bfloat16 weights are lost; here optimizer.rounding: exact keeps them")


def _set_quantization(given: Conversion, lora: bool) -> None:
    four, eight, bits = given.on("load_in_4bit"), given.on("load_in_8bit"), given.on("quantization_bit")
    kind = "nf4" if four or str(bits) == "4" else "int8" if eight or str(bits) == "8" else None
    if kind is None and bits is not None:
        given.not_offered("quantization_bit", f"{short(bits)} is not offered: 4 (nf4) or 8 (int8)")
    elif kind is None and given.settings.get("adapter") == "qlora":
        kind = "nf4"
    if kind is None:
        return
    if not lora:
        why = "a quantized model can only be trained with an adapter: give peft_config=LoraConfig(...)"
        given.not_offered("quantization", why, "; all weights are trained here, and not quantized")
        return
    given.set("model.quantization", kind)
    given.set("model.dtype", "bfloat16")
    if (name := given.on("bnb_4bit_quant_type", "quantization_type")) not in (None, "nf4"):
        given.note("bnb_4bit_quant_type", f"{short(name)} is not offered: nf4")
    if kind == "nf4":
        nested = ("use_bnb_nested_quant", "bnb_4bit_use_double_quant", "double_quantization")
        named = [name for name in nested if name in given.settings]
        given.set("model.double_quantization", bool(given.value(*named)) if named else given.peer != "TRL")
    if "bfloat16" in str(given.settings.get("bnb_4bit_compute_dtype")):
        given.used.add("bnb_4bit_compute_dtype")
        given.set("train.precision", "bfloat16")


def _set_trackers(given: Conversion) -> None:
    named = given.on("report_to")
    words = [word.strip() for word in str(named or "").split(",") if word]
    names = [str(name) for name in named] if isinstance(named, list) else words
    own = _TRACKER_KEYS if given.peer == "Axolotl" else {}
    names += [name for name, keys in own.items() if given.on(*keys) is not None]
    offered = [name for name in dict.fromkeys(names) if name in get_args(Tracker)]
    for name in names:
        if name not in offered:
            given.note("report_to", f"{short(name)}: offered are {', '.join(get_args(Tracker))}")
    given.set("tracker", offered or None)


def _note_rest(given: Conversion, unread: Sequence[str]) -> None:
    """Keys that nothing has read, with the reason; those that are off say nothing."""
    special, more = given.settings.get("special_tokens"), "additional_special_tokens"  # of Axolotl, one in the other
    if isinstance(special, Mapping) and special.get(more):
        given.used.add("special_tokens")
        given.note(f"special_tokens.{more}", f"{short(special[more])}: {NO_COUNTERPART[more]}")
    for key, value in given.settings.items():
        own = str(value).lower()
        if (said := SPEAKS.get(f"{key}={own}")) is not None:
            given.note(key, f"{own}: {said}")
        elif key in given.used or value in OFF:
            continue
        elif key in CHANGES_TRAINING:
            given.not_offered(key, NO_COUNTERPART[key])
        elif key in NO_COUNTERPART:
            given.note(key, NO_COUNTERPART[key])
        else:
            what = f"here {COUNTERPARTS[key]}; set it by hand" if key in COUNTERPARTS else _UNKNOWN
            say = given.not_offered if key in CHANGES_IF_LEFT_OUT else given.note
            say(key, f"{public(key, value)}: {what}")
    for sentence in unread:
        key, _, why = sentence.partition(": ")
        given.note(key, why)
