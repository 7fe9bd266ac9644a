"""Random changes of values, texts and bytes, each a function of a seeded generator."""

# ruff: noqa: E501 (inputs, many in a line)

import copy
import json
import math

DEEP = json.loads("[" * 150 + "]" * 150)
HOSTILE = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 1e308, 1e-300, math.nan, math.inf, -0.0,
    "", " ", "\x00", "\x1b[31m\x07", "\x9b2J\x85", "\ud800", "\u202e", "<|im_end|>", "<think>", "{{ 7*7 }}", "\n", "true",
    "a" * 5000, "é" * 300, "null", "[1", '{"a": NaN}', "[[[[[", "../..", "/", "-", "3 epochs", "1e400",
    [], {}, [[]], [None], [1, "a"], {"a": None}, {"": ""}, {"type": "text", "text": "x"}, {"type": "image"},
    [{"type": "text", "text": "x"}, {"type": "image_url"}], {"role": "user", "content": "x"}, DEEP,
]  # fmt: skip
KEYS = """messages conversations prompt completion response instruction input output question answer text system history tools
    chat_template_kwargs role content from value tool_calls function name arguments reasoning_content train weight loss
    trainable loss_mask images documents self type parameters properties id tool_call_id enable_thinking path data model
    out columns split count nulls""".split()  # noqa: SIM905


def places_of(value, place=()):
    """The path of every value inside `value`, its own first."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, own in list(inner):
        yield from places_of(own, (*place, key))


def get(value, place):
    for key in place:
        value = value[key]
    return value


def changed_value(value, rng):
    """A copy with one to three changes of its structure."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [place for place in places_of(value) if place]
        if not places:
            return rng.choice(HOSTILE)
        place = rng.choice(places)
        parent, key = get(value, place[:-1]), place[-1]
        how = rng.randrange(7)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = parent.pop(key)
        elif how == 2:
            parent[key] = rng.choice([[parent[key]], {rng.choice(KEYS): parent[key]}, [parent[key]] * 3])
        elif how == 3:
            parent[key] = copy.deepcopy(get(value, rng.choice(places)))
        elif how == 4 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = copy.deepcopy(rng.choice(HOSTILE))
        elif how == 5 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(HOSTILE)))
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def changed_text(text, rng, words):
    """The text with one to four pieces left out, repeated, moved, or replaced by one of `words`."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((1, 3, 10, 60)))
        piece, other = text[start:end], rng.randrange(len(text) + 1)
        text = rng.choice(
            (
                text[:start] + text[end:],
                text[:start] + piece * rng.choice((2, 50)) + text[end:],
                text[:start] + rng.choice(words) + text[start:],
                text[:start] + rng.choice(words) + text[end:],
                text[:other] + piece + text[other:],
            )
        )
    return text


def changed_bytes(content, rng):
    """The content with bits flipped, cut off, with bytes left out or put in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del content[at:]
        elif how == 2:
            del content[at : at + rng.choice((1, 8, 100))]
        elif how == 3:
            content[at:at] = rng.choice((b"\x00", b"\xff", b"\xed\xa0\x80", b"\x1b[2J", b"\n", bytes(64), b"9" * 5000))
        else:
            content[at : at + 4] = rng.randbytes(4)
    return bytes(content)
