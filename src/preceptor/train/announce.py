"""What a run says of itself before its first step: examples, parameters, the engine, what is unusual."""

from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from preceptor import config
from preceptor.chat.thinking import left_out_lines, spelled, thinking_lines
from preceptor.data.loader import Loader, StreamLoader, few_steps
from preceptor.errors import counted
from preceptor.model.adapters.folder import table_lines
from preceptor.model.load import unusable_settings
from preceptor.model.parts import causal_lm, has_experts, tower_parameters
from preceptor.model.quantization import num_parameters
from preceptor.model.routers import named_by_config, require_routers, router_aux_coef
from preceptor.train.build import saved_dtype
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import offloads, optimizer_lines
from preceptor.train.prepare import Prepared


def announce(
    console: Console,
    prepared: Prepared,
    state: State,
    num_steps: int,
    loader: Loader | StreamLoader,
    where_rejected: str,
) -> None:
    run, model, engine = prepared.run, state.model, state.engine
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = num_parameters(model)
    tokens = prepared.tokens
    of = "first window: " if prepared.stream else ""
    held_out = f"; {len(prepared.held_out):,} held out" if prepared.held_out else ""
    console.print(
        f"{of}{counted(prepared.examples_per_epoch, 'example')}, {tokens.computed:,} tokens, {tokens.trained:,} of "
        f"them trained ({tokens.trained / tokens.computed:.0%}); sequences {loader.fill:.0%} full; "
        f"{counted(num_steps, 'step')}{held_out}\n"
        f"{total:,} parameters, {trained:,} trained ({trained / total:.1%}), on {model.device}",
        highlight=False,
    )
    towers = sum(p.numel() for p in tower_parameters(model))
    of_towers = f"{towers:,} parameters are of towers that no text goes through: saved as they are" if towers else ""
    optimisations = f"engine: {', '.join(sorted(engine.state.optimisations)) or 'plain'}"
    lines = [of_towers, optimisations, str(tokens), str(prepared.shortened)]
    lines += thinking_lines(prepared.counts.thinking(), prepared.counts.defaults(), prepared.counts.unread())
    lines += left_out_lines(prepared.counts.left_out())
    clocks = prepared.chat.template.clock.values() if prepared.chat.template else ()
    lines += [f"the chat template writes the date: {clock.date:%d %B %Y} in all of this run" for clock in clocks]
    lines += [*prepared.chat.doubts, *table_lines(model), *_model_lines(prepared, model)]
    if run.optimizer.offload and not offloads(state.optimizer):
        lines.append("optimizer.offload changes nothing: the model is in the host's memory too")
    if (num := run.optimizer.warmup.steps(loader.steps_per_epoch, num_steps)) > num_steps:
        lines.append(
            f"optimizer.warmup: {num:,} steps, more than the run has: its learning rate never gets to the peak"
        )
    decay = run.optimizer.decay.steps(loader.steps_per_epoch, num_steps) if run.optimizer.decay else 0
    if num <= num_steps < num + decay:
        left = counted(num_steps - num, "step")
        lines.append(f"optimizer.decay: {left}, as the warm-up leaves no more; {decay:,} were asked for")
    lines += [*optimizer_lines(state.optimizer), *_saved_lines(run.model, model)]
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False)
    longest, by_epochs = int(prepared.train.lengths.max()), run.train.duration.unit == "epochs"
    few = few_steps(num_steps, loader.steps_per_epoch, tokens.computed, longest, by_epochs)
    if few and not prepared.stream:
        console.print(few, style="yellow", highlight=False, markup=False)
    if prepared.chat.added:
        console.print(f"new tokens: {' '.join(prepared.chat.added)}", highlight=False, markup=False)
    if prepared.rejections:
        num = len(prepared.rejections)
        console.print(f"{of}{num} example{'s' * (num != 1)} rejected, {where_rejected}", style="yellow")


def _model_lines(prepared: Prepared, model: Any) -> Iterator[str]:
    """What the model's kind makes of the run."""
    limits = prepared.chat.limits
    longest = int(prepared.train.lengths.max())
    if limits is not None and limits.num_positions is not None and longest > limits.num_positions:
        yield f"the longest example has {longest:,} tokens; the base was made for {limits.num_positions:,}"
    if not has_experts(model):
        return
    if prepared.run.adapter is not None:
        covered = any(".experts." in name for name, weight in model.named_parameters() if weight.requires_grad)
        yield "the adapter trains the experts too" if covered else "the experts have no adapter: they stay as they are"
    asked, settings = prepared.run.loss.router_aux_coef, causal_lm(model).config
    if (coef := router_aux_coef(asked, settings)) > 0:
        where = "as the model's config asks" if asked is None else "loss.router_aux_coef"
        yield f"load-balancing loss: {coef:g} times that of {len(require_routers(model))} routers ({where})"
    elif (own := named_by_config(settings)) > 0:
        yield f"load-balancing loss: off (loss.router_aux_coef); router_aux_loss_coef in the model's config is {own:g}"


def _saved_lines(settings: config.Model, model: Any) -> Iterator[str]:
    """In what the saved model will differ from the one that is held, and from the base."""
    dtype = saved_dtype(settings)
    if dtype not in (None, model.dtype):
        why = "model.save_dtype" if settings.save_dtype else "as the base model's files have them"
        yield f"weights are held in {_name(model.dtype)} and saved in {_name(dtype)} ({why})"
    unusable = unusable_settings(model.generation_config)
    if unusable:
        yield f"generation config: {spelled(unusable)} does not validate in the base model's and is left out"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
