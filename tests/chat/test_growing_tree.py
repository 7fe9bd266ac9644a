"""Trees of conversations: shared prefixes once, every turn's tokens on one path."""

from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.chat.growing_tree import GrowingTree
from preceptor.chat.origins import shared_length

IDS = st.lists(st.integers(0, 2), max_size=6).map(tuple)


def paths(tree):
    """For each segment, the ids from the root to its end."""
    found = []
    for segment in tree.segments:
        before = () if segment.parent is None else found[segment.parent]
        found.append(before + segment.ids)
    return found


def spell(ids):
    return "".join(map(str, ids))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(IDS, IDS.filter(bool)), min_size=1, max_size=6), st.booleans())
def test_every_turn_lies_on_a_path_and_prefixes_are_shared(turns, extend):
    tree, whole, context, contexts = GrowingTree(), (), (), []
    for more, target in turns:
        before = context
        context = whole + more if extend else more
        whole = context + target
        contexts.append((context, target))
        num_shared = shared_length(before, context)
        tree.add(context, target, (spell(context), spell(target)), 1.0, num_shared)
    grown = tree.finish("file:1", spell)
    ends = paths(grown)
    for context, target in contexts:
        assert context in ends or not context
        assert any(end == context + target and grown.segments[i].kind == "target" for i, end in enumerate(ends))
    assert all(s.text == spell(s.ids) for s in grown.segments)
    assert all(s.parent is None or s.parent < i for i, s in enumerate(grown.segments))
    for i, segment in enumerate(grown.segments):  # of two contexts that follow the same, the first tokens differ
        for other in grown.segments[:i]:
            if segment.parent == other.parent and "target" not in (segment.kind, other.kind):
                assert segment.ids[0] != other.ids[0]
    if extend:
        assert [s.parent for s in grown.segments if s.kind == "target"][1:] == [
            i - 1 for i, s in enumerate(grown.segments) if s.kind == "target"
        ][1:]


def test_a_branch_starts_where_the_tokens_part():
    tree = GrowingTree()
    tree.add((1, 2, 3), (4, 5), ("a", "b"), 0.5)
    tree.add((1, 2, 3, 4, 9), (6,), ("c", "d"), 2.0, num_shared=2)
    grown = tree.finish("file:1", str)
    assert [(s.kind, s.ids, s.parent, s.weight) for s in grown.segments] == [
        ("context", (1, 2, 3), None, 1.0),
        ("target", (4,), 0, 0.5),
        ("target", (5,), 1, 0.5),
        ("context", (9,), 1, 1.0),
        ("target", (6,), 3, 2.0),
    ]


def test_the_text_of_a_branch_is_that_of_the_prompt():
    tree = GrowingTree()
    tree.add((1, 2), (3,), ("ab", "c"), 1.0)
    tree.add((1, 2, 4), (5,), ("abd", "e"), 1.0, num_shared=2)
    tree.add((1, 2, 4, 6), (7,), ("abdf", "g"), 1.0, num_shared=3)
    tree.add((1, 8), (9,), ("ah", "i"), 1.0, num_shared=1)
    decoded = []
    grown = tree.finish("file:1", lambda ids: decoded.append(ids) or str(ids))
    texts = {s.ids: s.text for s in grown.segments}
    assert [texts[(number,)] for number in (3, 4, 5, 6, 7, 9)] == ["c", "d", "e", "f", "g", "i"]
    assert decoded == [(1,), (2,), (8,)]  # of what was cut in two, and of what follows it
