"""The turns of a tree: each with its context and its target."""

from dataclasses import dataclass

from preceptor.data.forest import Tree, leaf_paths, path_ids


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One assistant message: the tokens that a server feeds, and those that the model must generate.

    message: its index among the messages. target: ends with the token at which a server stops.
    """

    message: int
    context: tuple[int, ...]
    target: tuple[int, ...]
    context_text: str
    target_text: str


def turns_of(tree: Tree) -> tuple[RenderedTurn, ...]:
    """The turns of a tree. A target stands in several segments where a later context shares only its beginning."""
    of_message: dict[int, list[int]] = {}
    for index, segment in enumerate(tree.segments):
        if segment.message is not None:
            of_message.setdefault(segment.message, []).append(index)
    paths = {index: path[: place + 1] for path in leaf_paths(tree) for place, index in enumerate(path)}
    turns = []
    for message, indices in sorted(of_message.items()):
        path = paths[indices[-1]]
        before = path[: path.index(indices[0])]
        whole, context = path_ids(tree, indices[-1]), path_ids(tree, before[-1] if before else None)
        texts = ["".join(tree.segments[index].text for index in part) for part in (before, path[len(before) :])]
        turns.append(RenderedTurn(message, context, whole[len(context) :], *texts))
    return tuple(turns)
