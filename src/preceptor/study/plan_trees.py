"""The peak memory that the plan predicts for a run whose data is rendered: its largest row is known, not sampled."""

from collections.abc import Sequence

from preceptor import config
from preceptor.data.forest import Tree
from preceptor.errors import ModelError
from preceptor.model.devices import Device
from preceptor.study.plan import make_case
from preceptor.study.plan_data import Sample, Turns
from preceptor.study.plan_model import read_model


def predict_peak_bytes(
    run: config.Run, row: Sequence[Tree], num_new_tokens: int, num_tokenizer: int, cpu: bool
) -> int | None:
    """Bytes of tensors at a step's peak on one device. row: the trees of the run's largest row.

    num_new_tokens: added to the tokenizer, which has `num_tokenizer` with them. None where the plan does not know the
    model type or what the run asks for (`kl_to_base`: the base's own row of logits, and its copy in full fine-tuning).
    """
    if run.train.kl_to_base > 0:
        return None
    try:
        model = read_model(run.model)
    except ModelError:  # a model of the Hub, loaded, of which no config.json can be had alone
        return None
    if model.shape is None:
        return None
    sample = Sample(tuple(turns_of(tree) for tree in row), len(row), True, num_new_tokens, num_tokenizer)
    device = Device("the run's own", 0, None, None, cpu=cpu)
    return make_case(run, model.shape, sample, device, world_size=1).memory.peak_bytes


def turns_of(tree: Tree) -> Turns:
    """The tree as (context, target) tokens in turn, each token once; what follows the last target is context too."""
    turns: list[tuple[int, int]] = []
    context = target = 0
    for segment in tree.segments:
        if segment.kind == "context" and target:
            turns.append((context, target))
            context = target = 0
        if segment.kind == "context":
            context += len(segment.ids)
        else:
            target += len(segment.ids)
    return (*turns, (context, target))
