"""Task files: three kinds of items, and each mistake with its place."""

import pytest

from preceptor.errors import DataError
from preceptor.evaluate.tasks import choose_prompts, read_prompts, read_task, read_texts

ASKED = [{"role": "user", "content": "Which region?"}]
ANSWER = {"role": "assistant", "content": "It is America."}
GENERATION = {"messages": ASKED, "accepted": ["It is America."]}
CHOICE = {"prompt": "It is", "choices": [" so.", " not."], "answer": 1}
TEXT = {"text": "It is so."}


def test_each_kind_is_read(write_jsonl):
    task = read_task(
        write_jsonl([GENERATION, {"prompt": "7 is", "accepted": ["7"], "match": "numeric", "until": ["\n"]}])
    )
    first, second = task.items
    assert task.kind == "generation" and first.source.endswith("train.jsonl:1")
    assert (
        first.prompt.messages == tuple(ASKED)
        and first.match == "exact"
        and first.prompt.last_message == "Which region?"
    )
    assert second.prompt.text == "7 is" and second.until == ("\n",) and second.prompt.messages is None
    (choice,) = read_task(write_jsonl([{**CHOICE, "family": "so"}])).items
    assert choice.choices == (" so.", " not.") and choice.answer == 1 and choice.groups == {"family": "so"}
    (text,) = read_task(write_jsonl([TEXT])).items
    assert text.text == "It is so."


def test_a_question_file_is_a_generation_task(write_jsonl):
    row = {"messages": [*ASKED, ANSWER], "answers": ["It is America.", "America."], "wording": "new"}
    (item,) = read_task(write_jsonl([row])).items
    assert item.prompt.messages == tuple(ASKED) and item.accepted == ("It is America.", "America.")
    assert item.groups == {"wording": "new"}


BAD = {
    "it needs `accepted`": {"messages": ASKED},
    "unknown key 'acepted'": {**GENERATION, "acepted": ["x"]},
    "did you mean 'match'": {**GENERATION, "mach": "exact"},
    "unknown key 'prompt' of a perplexity item": {"text": "x", "prompt": "y"},
    "give either `messages` or `prompt`": {**GENERATION, "prompt": "x"},
    "`accepted` must be a list of texts": {**GENERATION, "accepted": "It is America."},
    "`accepted` must be a list of texts, none of them empty": {**GENERATION, "accepted": [""]},
    "match is 'fuzzy'": {**GENERATION, "match": "fuzzy"},
    "is not a regular expression": {**GENERATION, "accepted": ["("], "match": "regex"},
    "is not a number": {**GENERATION, "accepted": ["seven"], "match": "numeric"},
    "there is nothing to answer": {**GENERATION, "messages": [*ASKED, ANSWER]},
    "the only message is the assistant's": {"messages": [ANSWER], "answers": ["x"]},
    "has role 'robot'": {**GENERATION, "messages": [{"role": "robot", "content": "x"}]},
    "at least two different texts": {**CHOICE, "choices": ["a", "a"]},
    "0 to 1": {**CHOICE, "answer": 2},
    "answer is True": {**CHOICE, "answer": True},
    "answer is None": {key: value for key, value in CHOICE.items() if key != "answer"},
    "`text` must be a text": {"text": " "},
    "`family` must be a string": {**TEXT, "family": 3},
    "`tools` must be a list": {**GENERATION, "tools": "x"},
    "goes with messages": {"prompt": "x", "accepted": ["y"], "tools": []},
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_is_named_with_its_place(write_jsonl, message):
    good = CHOICE if "choices" in BAD[message] else TEXT if "text" in BAD[message] else GENERATION
    with pytest.raises(DataError) as error:
        read_task(write_jsonl([good, BAD[message]]))
    assert "train.jsonl:2: " in str(error.value) and message in str(error.value)


def test_kinds_do_not_mix(write_jsonl):
    with pytest.raises(DataError, match=r"train\.jsonl:2: a perplexity item in a generation task"):
        read_task(write_jsonl([GENERATION, TEXT]))
    with pytest.raises(DataError, match="a generation task where texts are wanted"):
        read_texts(write_jsonl([GENERATION]))


def test_a_limit_is_a_seeded_choice_in_order(write_jsonl):
    task = read_task(write_jsonl([{"text": f"number {n}"} for n in range(50)]))
    chosen = task.limited(10, seed=0)
    places = [task.items.index(item) for item in chosen.items]
    assert places == sorted(places) and len(set(places)) == 10 and places != list(range(10))
    assert task.limited(10, seed=0) == chosen != task.limited(10, seed=1)
    assert task.limited(99) is task.limited(None) is task


def test_paragraphs_of_a_text_file(tmp_path):
    file = tmp_path / "novel.txt"
    file.write_text("One\nand one.\n\n\nTwo.\n \nThree.\n", encoding="utf-8")
    task = read_texts(str(file))
    assert [(item.source, item.text) for item in task.items] == [
        (f"{file}:1", "One\nand one."),
        (f"{file}:5", "Two."),
        (f"{file}:7", "Three."),
    ]
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(str(file))


def test_prompts_come_from_a_file_or_from_the_messages_of_tasks(write_jsonl):
    file = write_jsonl([{"messages": [*ASKED, ANSWER], "id": 7}, {"prompt": "x"}], "prompts.jsonl")
    (source, prompt, reference), (_, plain, none) = read_prompts(file)
    assert source == f"{file}:1" and prompt.messages == tuple(ASKED) and reference == ANSWER["content"]
    assert plain.text == "x" and none == ""
    task = read_task(write_jsonl([GENERATION, {"prompt": "x", "accepted": ["y"]}]))
    (chosen,) = choose_prompts(None, [task], 5, seed=0)
    assert chosen[1].messages == tuple(ASKED) and chosen[2] == "It is America."
    assert len(choose_prompts(file, [task], 1, seed=0)) == 1
    with pytest.raises(DataError, match=r":1: an example needs"):
        read_prompts(write_jsonl([TEXT]))


def test_the_shipped_tasks_are_read():
    kinds = {
        name: read_task(f"scholar:{name}").kind for name in ("heldout", "completions", "choices", "library_heldout")
    }
    assert list(kinds.values()) == ["generation", "generation", "multiple choice", "perplexity"]


def test_whatever_an_item_holds_is_an_error_with_its_place(write_jsonl, monkeypatch):
    for row, says in (
        (GENERATION | {"match": ["exact"]}, "match is \\['exact'\\]"),
        (TEXT | {"kind": float("nan")}, "kind is nan"),
        (GENERATION | {"chat_template_kwargs": {"x": "\ud800"}}, "half of a surrogate pair"),
    ):
        with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{says}"):
            read_task(write_jsonl([row]))

    def fail(*arguments):
        raise KeyError("x")

    monkeypatch.setattr("preceptor.evaluate.tasks.read_messages", fail)
    for read in (read_task, read_prompts):
        with pytest.raises(DataError, match=r"train\.jsonl:1: cannot be read: KeyError"):
            read(write_jsonl([GENERATION]))
