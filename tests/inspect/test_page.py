"""The page of rows: it holds what the trees hold, escapes everything, loads nothing, and can be stepped through."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from preceptor import cli
from preceptor.chat.format import add_tokens, align_tokenizer
from preceptor.chat.render import Renderer
from preceptor.chat.template import load_template
from preceptor.chat.token_origins import TEMPLATE, UNKNOWN, Field, token_origins
from preceptor.chat.tokenise import pieces_of, spans
from preceptor.data.examples import Completion, Conversation, Document, Rejection, read_messages
from preceptor.data.truncation import Fitter
from preceptor.errors import CheckpointError, ConfigError
from preceptor.inspect import page as pages
from preceptor.inspect.page import check_page_file, example_json
from preceptor.inspect.show import fitted, to_json
from tiny import tiny_tokenizer

NASTY = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- @DATA@ @NOTE@ &lt; \u2028 日🏯 http://x.test"
)

# As Qwen3's: what the model thought is gone from the history, the prompt of a turn with reasoning opens <think>.
FORGETS = """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.last and message.reasoning_content -%}
{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif -%}
{{ message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def conversation(*messages, source="rows.jsonl:1", tools=None):
    return Conversation(source, read_messages(list(messages), source), tools)


@pytest.fixture
def renderer(tmp_path):
    def make(text=None, **chosen):
        name = "chatml"
        if text is not None:
            name = str(tmp_path / "own.jinja")
            (tmp_path / "own.jinja").write_text(text)
        tokenizer = tiny_tokenizer()
        template = load_template(name, tokenizer)
        add_tokens(tokenizer, template.needed_tokens)
        align_tokenizer(tokenizer, template, "<|im_end|>")
        return Renderer(tokenizer, template, stop_token_ids=(), **chosen)

    return make


REASONED = (
    user("Which is larger?"),
    assistant("The first.", reasoning_content="Compare both."),
    user("Sure?"),
    assistant("Yes.", reasoning_content="It holds."),
)
RECORDS = [
    conversation(user(NASTY), assistant("No & never, 日."), source="rows.jsonl:1"),
    conversation(*REASONED, source="rows.jsonl:2"),
    conversation(user("Say it"), assistant("<|im_end|>" + NASTY), source="rows.jsonl:3"),
    Rejection("rows.jsonl:4", "bad_message", "messages[0] is <b>str</b>"),
    Completion("rows.jsonl:5", "Once upon", " a time."),
    Document("rows.jsonl:6", "Plain text."),
]


def make_page(records, renderer, about, number=None, **limits):
    settings = {"max_length": 1 << 20, "overflow": "reject", **limits}
    return pages.make_page(fitted(records, Fitter(renderer, **settings), number), renderer, about, number)


def island_of(text):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def named(record, renderer):
    """{field: all text that came from it}, in the order of the segments."""
    found = token_origins(record, *renderer.render_with_turns(record), renderer.tokenizer)
    texts = {}
    for fields, spelled in zip(found.fields, found.spelled, strict=True):
        for field, place in dict.fromkeys(zip(fields, spelled or (), strict=False)):
            key = " + ".join(f.name if f.message is None else f"{f.message}.{f.name}" for f in field)
            texts[key] = texts.get(key, "") + place[1]
    return texts


def test_the_island_equals_the_trees(renderer):
    chosen = renderer(FORGETS)
    rows = island_of(make_page(RECORDS, chosen, "about").text)["examples"]
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, record in zip(rows, RECORDS, strict=True):
        rendered = record if isinstance(record, Rejection) else chosen.render(record)
        expected = json.loads(json.dumps(to_json(record.source, rendered)))
        assert {key: row[key] for key in ("source", "rejection")} == {
            key: expected[key] for key in ("source", "rejection")
        }
        kept = [{key: segment[key] for key in ("id", "parent", "kind", "ids", "text")} for segment in row["segments"]]
        assert kept == expected["segments"]
        for segment in row["segments"]:
            assert sum(piece[0] for piece in segment["pieces"]) == len(segment["ids"])
            assert "".join(piece[1] for piece in segment["pieces"]) == segment["text"]
    assert [row["rejection"]["code"] for row in rows if row["rejection"]] == ["special_token_in_text", "bad_message"]
    assert rows[2]["given"][1] == ["messages[1] (assistant)", "<|im_end|>" + NASTY]


def test_nothing_of_a_row_is_read_as_html_and_nothing_is_loaded(renderer):
    text = make_page(RECORDS, renderer(), "<b>about</b> @NOTE@").text
    assert text.count("</script>") == 2 and "<img" not in text and "<!-- @" not in text and "\u2028" not in text
    assert "&lt;b&gt;about" in text and "<b>about" not in text
    assert island_of(text)["examples"][0]["segments"][0]["text"].count(NASTY) == 1
    without_data = re.sub(r'(<script id="data"[^>]*>).*?(</script>)', r"\1\2", text, flags=re.DOTALL)
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", without_data)
    assert "default-src 'none'" in html.unescape(without_data)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", without_data)


def test_every_token_knows_its_message_and_field(renderer):
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": "Oslo"}}}
    record = conversation(
        {"role": "system", "content": "Be brief."},
        user("Rain in 日本?"),
        assistant("Let me see.", reasoning_content="A tool helps.", tool_calls=[call]),
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
        assistant("It rains."),
        tools=[tool],
    )
    texts = named(record, renderer())
    assert texts["0.content"] == "Be brief."
    assert texts["1.content"] == "Rain in 日本?"
    assert texts["2.reasoning_content"] == "A tool helps."
    assert texts["2.content"] == "Let me see."
    assert texts["2.tool_calls[0].function.name"] == "look"
    assert texts["2.tool_calls[0].function.arguments.at"] == "Oslo"
    assert texts["3.content"] == "rain" and texts["4.content"] == "It rains."
    assert '"description": "Looks."' in texts["template or tools"]
    assert "Looks" not in texts["template"] and "assistant\n" in texts["template"]
    assert "unknown" not in texts


def test_a_tree_says_which_branch_is_which_turn(renderer):
    chosen, record = renderer(FORGETS), conversation(*REASONED)
    tree = chosen.render(record)
    turns = {1: "", 3: ""}
    for segment in tree.segments:
        assert (segment.message is None) == (segment.kind == "context")
        if segment.message is not None:
            turns[segment.message] += segment.text
    assert turns[1] == "<think>\nCompare both.\n</think>\n\nThe first.<|im_end|>"
    assert turns[3] == "<think>\nIt holds.\n</think>\n\nYes.<|im_end|>"
    (example,) = fitted([record], Fitter(chosen, 1 << 20, "reject"), None)
    row = example_json(example, chosen)
    assert row["turns"] == [1, 3] and row["num_saved"] == len(tree.segments[0].ids)
    texts = named(record, chosen)
    assert texts["1.content"] == "The first." * 2, "once as generated, once as history"
    assert texts["1.reasoning_content"] == "Compare both."


def test_reasoning_that_the_prompt_opens_and_the_template_leaves_out_is_named(renderer):
    opens = FORGETS.replace("message.content +", "message.content.split('</think>\n\n')[-1] +").replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    inline = conversation(user("Which?"), assistant("<think>\nCompare.\n</think>\n\nThe first."))
    texts = named(inline, renderer(opens.replace("and message.reasoning_content", "and false")))
    assert texts["1.content"] == "Compare.\n</think>\n\nThe first."
    assert texts["template"].endswith("<think>\n<|im_end|>") and "unknown" not in texts


def test_what_is_read_as_plain_text_is_named_and_what_cannot_be_is_unknown(renderer):
    texts = named(conversation(user("a <|im_end|> b"), assistant("Hi.")), renderer(special_tokens_in_text="plain"))
    assert texts["0.content"] == "a <|im_end|> b" and texts["1.content"] == "Hi."
    lossy = FORGETS.replace(
        "{{ message.content +", "{{ (message.content | center(1) if loop.first else message.content) +"
    )
    chosen, record = renderer(lossy), conversation(user("Hidden words"), assistant("Hi."))
    assert named(record, chosen)["unknown"] == "Hidden words"
    tree = chosen.render(record)
    other = conversation(user("Another"), assistant("Tree."))
    found = token_origins(other, tree, chosen.render_with_turns(other)[1], chosen.tokenizer)
    assert {field for segment in found.fields for field in segment} == {(UNKNOWN,)}


def test_plain_text_has_fields_too(renderer):
    chosen = renderer()
    texts = named(RECORDS[4], chosen)
    assert (texts["prompt"], texts["completion"]) == ("Once upon", " a time.")
    assert texts["added around the text"] == "<|im_end|>"
    assert named(RECORDS[5], chosen)["text"] == "Plain text."
    assert Field("template") == TEMPLATE


def test_spans_measure_tokens_or_give_up(renderer):
    tokenizer = renderer().tokenizer
    text = "a user 日本 🏯<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    measured = spans(ids, text, tokenizer)
    assert [text[start:end] for start, end in dict.fromkeys(measured)] == [p.text for p in pieces_of(ids, tokenizer)]
    assert len(measured) == len(ids) > len(set(measured))
    assert spans(ids, text + "x", tokenizer) is None and spans(ids, text.replace("user", "usex"), tokenizer) is None


def test_a_page_is_limited_and_says_so(renderer, monkeypatch):
    chosen = renderer()
    monkeypatch.setattr(pages, "MAX_EXAMPLES", 2)
    page = make_page(RECORDS, chosen, "about")
    assert page.num_examples == 2 and "The first 2 examples" in page.text and "--example N" in page.text
    assert "All 2 examples" in make_page(RECORDS[:2], chosen, "about").text
    one = make_page(RECORDS, chosen, "about", number=5)
    assert [row["source"] for row in island_of(one.text)["examples"]] == ["rows.jsonl:5"]
    monkeypatch.setattr(pages, "MAX_TOKENS", 10)
    assert make_page(RECORDS, chosen, "about").num_examples == 1


def test_the_page_does_not_overwrite_data(tmp_path, renderer):
    for name, as_json, said in (("rows.jsonl", False, "ends in .html"), ("page.html", True, "exclude each other")):
        with pytest.raises(ConfigError, match=said):
            check_page_file(tmp_path / name, as_json)
    with pytest.raises(CheckpointError, match="No such file"):
        examples = fitted(RECORDS, Fitter(renderer(), 1 << 20, "reject"), None)
        pages.write_page(tmp_path / "nowhere" / "page.html", examples, renderer(), "about", None)


LONG = [
    conversation(*[m for k in range(4) for m in (user(f"Question {k}?"), assistant(f"Answer {k}."))], source="a:1"),
    Document("a:2", "Plain text, " * 30),
    conversation(user("Hi"), assistant("Ho."), source="a:3"),
]


@pytest.mark.parametrize("overflow", ["reject", "truncate_context", "split"])
def test_what_is_too_long_is_shown_as_it_is_trained(renderer, overflow):
    """As `check` counts it: rejected, shortened or in parts."""
    chosen, fitter = renderer(), Fitter(renderer(), 64, overflow)
    rows = island_of(make_page(LONG, chosen, "about", max_length=64, overflow=overflow).text)["examples"]
    expected = []
    for record in LONG:
        found = fitter.fit(record, chosen.render(record))
        expected += [found] if isinstance(found, Rejection) else [tree for _, tree in found]
    assert [row["source"] for row in rows] == [each.source for each in expected]
    for row, outcome in zip(rows, expected, strict=True):
        if isinstance(outcome, Rejection):
            assert row["rejection"]["code"] == "too_long" and row["given"] and not row["segments"]
            continue
        assert row["num_tokens"] == outcome.num_tokens <= 64 and row["num_trained"] == outcome.num_trained
        assert [tuple(segment["ids"]) for segment in row["segments"]] == [s.ids for s in outcome.segments]
        assert ("it was too long: this is what data.overflow makes of it" in row["notes"]) == (row["number"] != 3)
        named = {f["name"] for fields in row["fields"] for f in fields}
        assert ("unknown" in named) == (row["number"] == 2), "of a piece of text it is not known"
    assert {row["number"] for row in rows} == {1, 2, 3}
    only = island_of(make_page(LONG, chosen, "about", 1, max_length=64, overflow=overflow).text)["examples"]
    assert only == [row for row in rows if row["number"] == 1]


def test_what_the_template_leaves_out_is_said_on_the_page(renderer):
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
    record = conversation(user("Rain?"), assistant("No."), tools=[tool])
    (row,) = island_of(make_page([record], renderer(FORGETS), "about").text)["examples"]
    assert row["notes"] == ["the template leaves out the tools: the model never sees it"]


def test_show_writes_the_page(monkeypatch, capsys, tmp_path, base_folder, write_jsonl):
    data = write_jsonl([{"messages": [user("Hi"), assistant("Hello.")]}] * 3)
    out = tmp_path / "page.html"
    arguments = ["show", "--model", str(base_folder), "--data", data, "--chat-template", "chatml", "--html", str(out)]
    monkeypatch.setattr(sys, "argv", ["preceptor", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and ": 3; open it" in capsys.readouterr().out
    assert len(island_of(out.read_text())["examples"]) == 3


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def dom_of(text, folder):
    """The page as a browser makes it."""
    file = folder / "page.html"
    file.write_text(text)
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in shown.stderr
    return shown.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page's script is not run")
def test_in_a_browser_the_first_token_of_a_text_is_read(renderer, tmp_path):
    text = make_page(RECORDS[5:], renderer(), "about").text
    acts = """<script>
      const all = [...document.querySelectorAll("[data-token]")];
      all[0].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    </script></body>"""
    dom = dom_of(text.replace("</body>", acts), tmp_path)
    tree = dom[dom.index('<div class="tree">') : dom.index("</main>")]
    (row,) = island_of(text)["examples"]
    num = row["num_tokens"]
    assert row["num_trained"] == num - 1 == row["segments"][0]["num_trained"]
    assert f"{num} tokens, {num - 1} trained" in re.sub(r"<[^>]+>", "", tree)
    assert tree.count(" read") == 1 and 'class="t read same chosen"' in tree
    panel = re.sub(r"<[^>]+>", "", dom[dom.index('<aside id="token"') : dom.index("</aside>")])
    assert "context: read" in panel


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page's script is not run")
def test_in_a_browser_rows_are_stepped_through_and_tokens_answer(renderer, tmp_path):
    """The page with a script at its end that presses → and points at a token; then its DOM is read."""
    text = make_page(RECORDS, renderer(FORGETS), "about").text
    acts = """<script>
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
      const all = [...document.querySelectorAll("[data-token]")];
      all.find(token => token.textContent === "T").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    </script></body>"""
    dom = dom_of(text.replace("</body>", acts), tmp_path)
    assert "<h2>rows.jsonl:2</h2>" in dom and "a tree of 2 branches" in dom
    tree = dom[dom.index('<div class="tree">') : dom.index("</main>")]
    assert (
        tree.count('class="branch"') == 1 and re.sub(r"<[^>]+>", "", tree).count("Which") == 1 and "2 ways on" in tree
    )
    panel = re.sub(r"<[^>]+>", "", dom[dom.index('<aside id="token"') : dom.index("</aside>")])
    assert "target: trained" in panel and "from messages[1] (assistant) content" in panel
