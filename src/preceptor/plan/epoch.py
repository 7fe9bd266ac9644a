"""The data of an epoch as a plan sees it: what fits, its largest sequence, tokens, sequences and steps."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preceptor import config
from preceptor.data.loader import few_steps
from preceptor.errors import DataError, counted
from preceptor.plan.sample import Sample
from preceptor.plan.work import TurnLengths

if TYPE_CHECKING:
    from preceptor.plan.dry_run import DryRun

CONTEXT_SHARE = 0.75  # of a sequence's tokens, assumed where the data cannot be sampled


def largest_sequence(run: config.Run, sample: Sample | str) -> tuple[TurnLengths, ...]:
    """The sample's largest sequence.

    Without a sample, and of a stream, of which larger ones may come: one conversation that fills the sequence,
    CONTEXT_SHARE of it context.
    """
    context = int(run.data.max_length * CONTEXT_SHARE)
    return known_largest(run, sample) or (((context, run.data.max_length - context),),)


def known_largest(run: config.Run, sample: Sample | str) -> tuple[TurnLengths, ...] | None:
    if isinstance(sample, str) or run.data.streaming:
        return None
    return fitted_to(run, sample).largest_sequence(run.data.max_length)


def fitted_to(run: config.Run, sample: Sample) -> Sample:
    return sample.fitted(run.data.max_length, run.data.overflow)


def of_model(sample: Sample | str, dry_run: "DryRun | None") -> Sample | str:
    """The sample, for the model's positions."""
    if isinstance(sample, str) or dry_run is None:
        return sample
    return replace(sample, num_positions=dry_run.num_positions)


def require_fitting(run: config.Run, sample: Sample | str) -> None:
    """Raises DataError where training would have no example, as far as the sample tells."""
    if isinstance(sample, str) or not sample.whole or not sample.conversations:
        return
    longest = sample.longest(run.data.max_length)
    if not fitted_to(run, sample).conversations:
        key = "data.max_length" if longest == run.data.max_length else "the model's learned positions, data.max_length"
        raise DataError(
            f"data.train: no example fits in {key} ({longest:,} tokens) with data.overflow: {run.data.overflow}; the "
            f"shortest has about {min(sample.lengths):,}: raise it, or set data.overflow"
        )


def _too_long(run: config.Run, sample: Sample) -> str | None:
    num, of = sample.too_long(run.data.max_length, run.data.overflow)
    if not num:
        return None
    longest = sample.longest(run.data.max_length)
    holds = "a sequence holds" if longest == run.data.max_length else "the model has learned positions for"
    refused = num > run.data.max_rejected * of and "too_long" not in run.data.allow_rejected
    allows = f"; data.max_rejected allows {run.data.max_rejected:.1%}, see `preceptor check`" if refused else ""
    return f"about {num:,} of {counted(of, 'example')} too long ({num / of:.1%}{allows}): {holds} {longest:,} tokens"


def data_facts(run: config.Run, sample: Sample | str) -> dict[str, Any]:
    """Sequences, tokens and steps; `open` says why they are not known, but for steps that the run file gives."""
    if isinstance(sample, str):
        return _open(run, sample)
    too_long, read = _too_long(run, sample), bool(sample.conversations)
    sample = fitted_to(run, sample)
    if read and not sample.conversations:
        return _open(run, "every example that was read is longer than data.max_length")
    sequences_per_epoch = sample.sequences_per_epoch(run.data.max_length)
    if sequences_per_epoch is None or sample.num_examples is None:
        found = _open(run, "how many examples the data has is known only once it is read")
        return {**found, "too_long": too_long}
    steps_per_epoch = math.ceil(sequences_per_epoch / run.train.batch_size)
    num_steps, per_epoch = run.train.duration.steps(steps_per_epoch), round(sample.num_tokens)
    longest = min(run.data.max_length, max(sample.lengths))
    return {
        "examples_per_epoch": round(sample.num_examples),
        "num_sampled": len(sample.conversations),
        "too_long": too_long,
        "tokens_per_epoch": per_epoch,
        "share_trained": sample.num_trained / sample.num_tokens,
        "sequences_per_epoch": sequences_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "num_steps": num_steps,
        "few_steps": few_steps(num_steps, steps_per_epoch, per_epoch, longest, run.train.duration.unit == "epochs"),
    }


def _open(run: config.Run, why: str) -> dict[str, Any]:
    duration = run.train.duration
    if duration.unit != "steps":
        return {"open": why}
    return {"open": f"{why}; {duration} are trained", "num_steps": duration.steps(0)}
