"""Templates compiled into their one-pass form, which renders many beginnings of a conversation in one run.

See `one_pass.py` for the form and what it needs. A template that has another is not compiled: None.
"""

from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from preceptor.chat.one_pass import OnePass, StretchLoop

_PROMPTED = "add_generation_prompt"
_OTHER_FORMS = (nodes.Break, nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport)
_STATEFUL = {"cycler", "joiner"}  # what besides namespaces changes while a template runs


@lru_cache(maxsize=256)
def compiled_one_pass(environment: jinja2.Environment, text: str, head_again: bool) -> jinja2.Template | None:
    """The template in its one-pass form, compiled once; None if it has not the form that this takes."""
    return one_pass(one_pass_environment(environment), text, head_again)


@lru_cache(maxsize=8)
def one_pass_environment(environment: jinja2.Environment) -> jinja2.Environment:
    """Templates in their one-pass form ask the pass by filters, which Jinja calls at a third of a function's cost."""
    overlay = environment.overlay()
    overlay.filters = {**environment.filters, "__stretch__": OnePass.stretch, "__prompted__": OnePass.prompted}
    return overlay


def one_pass(environment: jinja2.Environment, text: str, head_again: bool = False) -> jinja2.Template | None:
    """The template in its one-pass form; None if it has not the form that this takes.

    head_again: what comes before the main loop is run again in each world.
    """
    try:
        return _compiled(environment, text, head_again)
    except Exception:  # one loop more than Python can nest, say
        return None


def _compiled(environment: jinja2.Environment, text: str, head_again: bool) -> jinja2.Template | None:
    tree = _Prompted().visit(environment.parse(text))
    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For) and node.find(nodes.Output)]
    if not loops or _keeps_state(tree):
        return None
    if any(name.ctx == "store" and name.name == _PROMPTED for name in tree.find_all(nodes.Name)):
        return None
    head, main, tail = tree.body[: loops[-1]], tree.body[loops[-1]], tree.body[loops[-1] + 1 :]
    if main.test is not None or main.else_ or main.recursive:
        return None
    again = head if head_again else []
    of_head = {name.name: None for node in again for name in node.find_all(nodes.Name) if name.ctx == "store"}
    set_by_head = nodes.Tuple([nodes.Name(name, "load") for name in of_head], "load")
    main.iter = _ask("__stretch__", main.iter, set_by_head if head_again else nodes.Const(None))
    world = nodes.Name("__world__", "store")
    worlds = nodes.For(world, nodes.Name("__worlds__", "load"), [*again, main, *tail], [], None, False)
    tree.body = [worlds] if head_again else [*head, worlds]
    worlds.set_lineno(main.lineno)
    worlds.set_environment(environment)
    template = environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals({})
    )
    template.root_render_func.__globals__["LoopContext"] = StretchLoop
    return template


def _ask(name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(nodes.Name("__pass__", "load"), name, list(arguments), [], None, None)


def _keeps_state(tree: nodes.Template) -> bool:
    """Whether anything but a namespace outlives a turn of the loop, or the template is spread over several files."""
    if any(name.name in _STATEFUL for name in tree.find_all(nodes.Name)):
        return True
    if any(attribute.attr == "changed" for attribute in tree.find_all(nodes.Getattr)):
        return True
    if any(tree.find(kind) is not None for kind in _OTHER_FORMS):
        return True
    # A namespace that is held by anything but the name that it was made under would not be put back.
    made = [node for node in tree.find_all(nodes.Assign) if _makes_namespace(node.node)]
    names = {node.target.name for node in made if isinstance(node.target, nodes.Name)}
    held = (node.node for node in tree.find_all(nodes.Assign) if isinstance(node.node, nodes.Name))
    num_calls = sum(_makes_namespace(call) for call in tree.find_all(nodes.Call))
    named = all(isinstance(node.target, nodes.Name) for node in made)
    return not named or num_calls != len(made) or any(name.name in names for name in held)


def _makes_namespace(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "namespace"


class _Prompted(NodeTransformer):
    """Asks for `add_generation_prompt` anew wherever it is read: it is not the same in every world."""

    def visit_If(self, node: nodes.If) -> nodes.Node | list[nodes.Node]:
        self.generic_visit(node)
        test = node.test.node if isinstance(node.test, nodes.Not) else node.test
        never = isinstance(test, nodes.Const) and bool(test.value) == isinstance(node.test, nodes.Not)
        return node.else_ if never and not node.elif_ else node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        if isinstance(node.node, nodes.Name) and node.node.name == _PROMPTED and node.name in ("defined", "undefined"):
            return nodes.Const(node.name == "defined", lineno=node.lineno, environment=node.environment)
        return self.generic_visit(node)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name != _PROMPTED or node.ctx != "load":
            return node
        asked = _ask("__prompted__").set_lineno(node.lineno)
        return asked.set_environment(node.environment) if node.environment else asked
