"""Rendering and tokenising a file of conversations: our conversations per second against TRL's, and how they scale.

    python benchmarks/rendering.py [--repetitions 3] [--template llama3]
    python benchmarks/rendering.py --before CHECKOUT

Both sides read the same JSON lines and prepare them for a loss on the assistant's turns alone, with two processes: ours
by `render_all`, in a program of its own, as `preceptor check` is; TRL's by `load_dataset` and the
SFTTrainer's own preparation (`assistant_only_loss`, `dataset_num_proc=2`, no truncation, no packing). Both have
prepared four rows before, so that the template is compiled. They take turns; each figure is the fastest of the
repetitions. The trained tokens of both are counted: with llama3 they are the same; with a ChatML template TRL's twin
also trains the newline after each turn. Writes benchmarks/results/rendering.json.

--before: the price of what was built since another commit, whose work tree is named: both render each kind of data, in
turns, in processes of their own. 1b21c92 is the last commit before the guards of docs/reliability.md. Writes
benchmarks/results/rendering_before.json.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rendering_work import SIZES, SPECIAL, Size, Text, make_tokenizer, write

from machine import describe
from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.data.examples import Conversation, Message, Rejection
from preceptor.data.forest import Tree
from preceptor.data.sources import OpenSource
from preceptor.data.workers import render_all

ROOT = Path(__file__).parents[1]
NUM_PROCESSES = 2
FEW = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = (2, 4, 8, 15, 30, 60)
TOOLS = [
    {"type": "function", "function": {"name": name, "description": about, "parameters": {"type": "object"}}}
    for name, about in (("find", "Find what holds these words."), ("read", "Read a file."), ("weather", "The weather."))
]


class Profile(NamedTuple):
    """A kind of data: chat template, whether the tokenizer has a normalizer, what the conversations hold."""

    template: str
    normalizer: bool
    kind: str  # plain, tools or reasoning
    size: str
    number: int


PROFILES = {
    "plain, short": Profile("llama3", False, "plain", "short", 4_000),
    "plain, medium": Profile("llama3", False, "plain", "medium", 1_200),
    "plain, long": Profile("llama3", False, "plain", "long", 200),
    "plain, medium, NFC": Profile("qwen3_instruct_2507", True, "plain", "medium", 1_200),
    "tools, NFC": Profile("qwen3", True, "tools", "", 800),
    "reasoning, short, NFC": Profile("qwen3", True, "reasoning", "short", 2_400),
    "reasoning, medium, NFC": Profile("qwen3", True, "reasoning", "medium", 800),
}
EXTRA_TOKENS_PER_TURN = {"llama3": 0, "qwen3_instruct_2507": 1}  # that TRL trains: the newline after <|im_end|>


# The two sides -------------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a side made of a file.

    seconds_to_read: of the seconds, those that loading the file into a table took. cpu_seconds: of all processes, their
    start included; what can be compared on a machine that is not quiet.
    """

    seconds: float
    seconds_to_read: float
    cpu_seconds: float
    num_conversations: int
    num_trained: int
    num_turns: int


def cpu_seconds() -> float:
    """User and system time of this process and of those that it started and that have ended."""
    for child in multiprocessing.active_children():
        child.join()
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def in_own_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def make_renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, load_template("tokenizer", tokenizer), stop_token_ids=[])


def ours(file: str, tokenizer: Any, num_processes: int = NUM_PROCESSES) -> Prepared:
    cpu, start = cpu_seconds(), time.perf_counter()
    trees = list(render_all(make_renderer(tokenizer), OpenSource(file).examples(), num_processes))
    seconds = time.perf_counter() - start
    cpu = cpu_seconds() - cpu
    assert not any(isinstance(tree, Rejection) for tree in trees)
    num_turns = sum(segment.kind == "target" for tree in trees if isinstance(tree, Tree) for segment in tree.segments)
    num_trained = sum(tree.num_trained for tree in trees if isinstance(tree, Tree))
    return Prepared(seconds, 0.0, cpu, len(trees), num_trained, num_turns)


def ours_warm(file: str, tokenizer: Any) -> Prepared:
    """The same in a process that has prepared a few rows before, as TRL's has."""
    renderer = make_renderer(tokenizer)
    for _ in range(4):
        renderer.render(Conversation("", tuple(Message(message) for message in FEW)))
    return ours(file, tokenizer)


def trl_side(tokenizer: Any) -> Callable[[str], Prepared]:
    """TRL's preparation, by a trainer of a tiny model."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            dataset_num_proc=NUM_PROCESSES,
            max_length=None,
            packing=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        few = datasets.Dataset.from_list([{"messages": FEW}] * 4)
        trainer = SFTTrainer(LlamaForCausalLM(config), args=arguments, train_dataset=few, processing_class=tokenizer)

    def prepare(file: str) -> Prepared:
        with tempfile.TemporaryDirectory() as cache:
            cpu, start = cpu_seconds(), time.perf_counter()
            table = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
            read = time.perf_counter()
            rows = trainer._prepare_dataset(table, tokenizer, arguments, False, None, "train")
            done = time.perf_counter()
            cpu = cpu_seconds() - cpu
            labels = rows.with_format("numpy")["labels"]
            num_trained = sum(int((row != -100).sum()) for row in labels)
            return Prepared(done - start, read - start, cpu, len(rows), num_trained, 0)

    return prepare


# What is measured ----------------------------------------------------------------------------------------------------


def compare(tokenizer: Any, files: dict[str, str], template: str, repetitions: int) -> dict[str, Any]:
    """Conversations per second of both sides for each file, and the load of the machine while they ran."""
    theirs = trl_side(tokenizer)
    result = {}
    for name, file in files.items():
        pairs = [(in_own_process(ours_warm, file, tokenizer), theirs(file)) for _ in range(repetitions)]
        for one, other in pairs:
            extra = EXTRA_TOKENS_PER_TURN[template] * one.num_turns
            assert one.num_conversations == other.num_conversations
            assert one.num_trained + extra == other.num_trained, (one, other)
        best, other = min(one for one, _ in pairs), min(other for _, other in pairs)
        num = best.num_conversations
        reading_apart = min(o.seconds - o.seconds_to_read for _, o in pairs)
        result[name] = {
            "conversations": num,
            "turns": best.num_turns,
            "trained_tokens": best.num_trained,
            "trained_tokens_trl": other.num_trained,
            "ours_per_second": round(num / best.seconds, 1),
            "trl_per_second": round(num / other.seconds, 1),
            "ratio": round(other.seconds / best.seconds, 2),
            "ratio_without_trl_reading": round(reading_apart / best.seconds, 2),
            "cpu_ratio": round(min(o.cpu_seconds for _, o in pairs) / min(one.cpu_seconds for one, _ in pairs), 2),
            "cpu_seconds": [[round(one.cpu_seconds, 2), round(o.cpu_seconds, 2)] for one, o in pairs],
            "seconds": [[round(one.seconds, 2), round(o.seconds, 2)] for one, o in pairs],
            "load": round(os.getloadavg()[0], 1),
        }
        print(f"{name}: {result[name]}", flush=True)
    return result


def by_turns(tokenizer: Any, repetitions: int) -> list[dict[str, float]]:
    """Milliseconds (CPU time) that a conversation takes in one process, by its number of turns."""
    result = []
    for turns in TURNS:
        text = Text(turns)
        size = Size(0, (turns, turns), (40, 40))
        records = [
            Conversation(f"{n}", tuple(Message(m, train=m["role"] == "assistant") for m in text.conversation(size)))
            for n in range(40)
        ]
        seconds = []
        for _ in range(repetitions):
            renderer = make_renderer(tokenizer)
            renderer.render(records[0])
            renderer.render(records[1])
            start = time.process_time()
            for record in records[2:]:
                renderer.render(record)
            seconds.append(time.process_time() - start)
        each = 1000 * min(seconds) / (len(records) - 2)
        result.append({"turns": turns, "milliseconds": round(each, 3), "per_turn": round(each / turns, 4)})
    return result


def by_tool_turns(repetitions: int) -> list[dict[str, float]]:
    """The same for agents' conversations, in which most of the assistant's turns call tools; no two are of a shape."""
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    renderer, text = make_renderer(tokenizer), Text(5)
    for _ in range(20):
        renderer.render(conversation_of(text.tool_conversation(6)))
    result = []
    for turns in TURNS:
        records = [conversation_of(text.tool_conversation(turns)) for _ in range(10 * repetitions)]
        start = time.process_time()
        trees = [renderer.render(record) for record in records]
        each = 1000 * (time.process_time() - start) / len(records)
        assert not any(isinstance(tree, Rejection) for tree in trees)
        result.append({"turns": turns, "milliseconds": round(each, 3), "per_turn": round(each / turns, 4)})
    return result


def conversation_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Conversation:
    return Conversation("", tuple(Message(m, train=m["role"] == "assistant") for m in messages), tools)


def profile_records(profile: Profile) -> list[Conversation]:
    text = Text(7)
    if profile.kind == "tools":
        return [conversation_of(text.tool_conversation(turns), TOOLS) for turns in (3, 4, 6, 8) * (profile.number // 4)]
    make = text.reasoning_conversation if profile.kind == "reasoning" else text.conversation
    return [conversation_of(make(SIZES[profile.size])) for _ in range(profile.number)]


def by_profile(repetitions: int, names: Sequence[str] = tuple(PROFILES)) -> dict[str, Any]:
    """For each kind of data: milliseconds (CPU time) that a conversation takes in one process, and how it was rendered.

    The first tenth of the records is rendered before, so that what is learnt once is not counted. The smallest of the
    repetitions counts.
    """
    result = {}
    for name in names:
        profile = PROFILES[name]
        tokenizer = make_tokenizer(profile.template, profile.normalizer)
        records = profile_records(profile)
        seconds, served = [], {}
        for _ in range(repetitions):
            renderer = make_renderer(tokenizer)
            num_first = len(records) // 10
            first = [renderer.render(record) for record in records[:num_first]]
            renderer.counts.clear()
            gc.collect()
            gc.disable()  # as `render_all` does
            start = time.process_time()
            trees = [renderer.render(record) for record in records[num_first:]]
            seconds.append(time.process_time() - start)
            gc.enable()
            assert not any(isinstance(tree, Rejection) for tree in [*first, *trees])
            served = {way: round(number / len(trees), 4) for way, number in renderer.counts.most_common()}
        num_tokens = sum(tree.num_tokens for tree in trees if isinstance(tree, Tree))
        each = 1000 * min(seconds) / len(trees)
        result[name] = {"milliseconds": round(each, 4), "tokens": round(num_tokens / len(trees)), "served": served}
        print(f"{name}: {result[name]}", flush=True)
    return result


def against_before(checkout: Path, repetitions: int) -> None:
    """For each kind of data, a conversation's milliseconds at both commits, the smallest of the turns."""
    head = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    found: dict[Path, list[dict[str, Any]]] = {checkout.resolve(): [], ROOT: []}
    for _ in range(repetitions):
        for root, profiles in found.items():
            command = [sys.executable, str(root / "benchmarks/rendering.py"), "--profiles-only", "--repetitions", "1"]
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": str(root / "src")},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            profiles.append(json.loads(done.stdout[done.stdout.index("\n{\n") :])["profiles"])
    rows = {}
    for name in PROFILES:
        before, now = (min(each[name]["milliseconds"] for each in profiles) for profiles in found.values())
        rows[name] = {"before": before, "now": now, "now / before": round(now / before, 3)}
        print(f"{name}: {rows[name]}")
    result = {
        "command": "python benchmarks/rendering.py --before CHECKOUT",
        "commit": commit,
        **describe(),
        "profiles": rows,
    }
    (ROOT / "benchmarks/results/rendering_before.json").write_text(json.dumps(result, indent=1) + "\n")


def peak_megabytes(file: str, times: int, tokenizer: Any, num_processes: int) -> tuple[float, float]:
    """The most memory that this process, and the largest of those that it started, ever held; rows are let go."""

    def rows() -> Iterator[Any]:
        for _ in range(times):
            yield from OpenSource(file).examples()

    for _ in render_all(make_renderer(tokenizer), rows(), num_processes):
        pass
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, others = (round(kilobytes / 1024, 1) for kilobytes in usage)
    return own, others


def memory(tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """Peak memory at 1, 3 and 10 times the rows, each in a process of its own; no two rows are alike."""
    result = []
    for times in (1, 3, 10):
        file = write(folder / f"rows-{times}.jsonl", Size(times * 1_000, (3, 8), (20, 100)), seed=times)
        own, _ = in_own_process(peak_megabytes, file, 1, tokenizer, 1)
        result.append({"rows": times * 1_000, "peak_megabytes": own})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--template", choices=sorted(SPECIAL), default="llama3")
    parser.add_argument("--profiles-only", action="store_true", help="print the profiles and stop")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--before", type=Path, help="a work tree of another commit")
    arguments = parser.parse_args()
    if arguments.before:
        against_before(arguments.before, arguments.repetitions)
        return
    if arguments.profiles_only:
        print(json.dumps({**describe(), "profiles": by_profile(arguments.repetitions)}, indent=1))
        return
    tokenizer = make_tokenizer(arguments.template)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: write(Path(folder) / f"{name}.jsonl", SIZES[name]) for name in arguments.sizes}
        result: dict[str, Any] = {
            "command": "python benchmarks/rendering.py",
            **describe(),
            **{name: version(name) for name in ("tokenizers", "trl", "datasets")},
            "template": arguments.template,
            "processes": NUM_PROCESSES,
            "memory": memory(tokenizer, Path(folder)),
            "turns": by_turns(tokenizer, arguments.repetitions),
            "tool_turns": by_tool_turns(arguments.repetitions),
            "profiles": by_profile(arguments.repetitions),
            "against_trl": compare(tokenizer, files, arguments.template, arguments.repetitions),
        }
    file = ROOT / "benchmarks" / "results" / "rendering.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'':8}{'conversations':>14}{'ours/s':>10}{'TRL/s':>10}{'ratio':>8}{'CPU':>8}{'trained tokens':>16}{'TRL':>12}"
    ]
    for name, row in result["against_trl"].items():
        lines.append(
            f"{name:8}{row['conversations']:14}{row['ours_per_second']:10}{row['trl_per_second']:10}{row['ratio']:8}"
            f"{row['cpu_ratio']:8}"
            f"{row['trained_tokens']:16}{row['trained_tokens_trl']:12}"
        )
    lines += [f"{row['turns']:3} turns {row['milliseconds']:8} ms, {row['per_turn']} a turn" for row in result["turns"]]
    for row in result["tool_turns"]:
        lines.append(f"{row['turns']:3} turns with tools {row['milliseconds']:8} ms, {row['per_turn']} a turn")
    for name, row in result["profiles"].items():
        lines.append(f"{name:24} {row['milliseconds']:8} ms {row['served']}")
    lines += [f"{row['rows']:6} rows: peak {row['peak_megabytes']} MB" for row in result["memory"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
