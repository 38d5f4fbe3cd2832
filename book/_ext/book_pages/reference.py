"""The reference: entries made from docstrings, each with a link to the chapter that derives it, and back.

A page of the reference lists files of the library, ``.. entries:: modlib.methods.admm``: the file's docstring
(equation and source) and an entry for each public name that it defines.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python._object import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

# Where public names are looked for, and the path that a name goes by: the first that has it.
ROOMS = (
    "modlib",
    "modlib.training",
    "modlib.parallel",
    "modlib.methods",
    "modlib.objectives",
    "modlib.networks",
    "modlib.data",
    "modlib.kernels",
    "modlib.tokens",
    "modlib.measure.audit",
    "modlib.measure.angles",
    "modlib.measure.costs",
    "modlib.measure.memory",
    "modlib.certificates",
    "modlib.diagnosis",
    "modlib.few_labels",
    "modlib.transfer",
    "modlib.zoo",
    "modlib.viz",
    "modlib.experiments",
)

# The page of the book that derives what a file of the library holds.
DERIVED = {
    "modlib.network": "question/backpropagation",
    "modlib.training": "question/backpropagation",
    "modlib.training.evaluation": "how-to-use",
    "modlib.parallel": "how-to-use",
    "modlib.device": "how-to-use",
    "modlib.methods.method": "question/modules",
    "modlib.methods.e2ebp": "question/backpropagation",
    "modlib.methods.proxy": "modular/proxy-objectives",
    "modlib.methods.only": "modular/modules-as-parts",
    "modlib.methods.local": "weakly-modular/greedy",
    "modlib.methods.greedy": "weakly-modular/greedy",
    "modlib.methods.ensemble": "weakly-modular/greedy",
    "modlib.methods.transport": "weakly-modular/greedy",
    "modlib.methods.auglocal": "weakly-modular/what-a-head-costs",
    "modlib.methods.local_error_signals": "weakly-modular/local-error-signals",
    "modlib.methods.mono_forward": "weakly-modular/greedy",
    "modlib.methods.random_classifiers": "weakly-modular/greedy",
    "modlib.methods.greedy_infomax": "weakly-modular/infonce",
    "modlib.methods.hsic": "weakly-modular/hsic-infopro",
    "modlib.methods.infopro": "weakly-modular/hsic-infopro",
    "modlib.methods.target_propagation": "weakly-modular/target-propagation",
    "modlib.methods.synthetic_gradients": "weakly-modular/synthetic-gradients",
    "modlib.methods.delayed_gradients": "weakly-modular/delayed-gradients",
    "modlib.methods.mac": "weakly-modular/auxiliary-variables",
    "modlib.methods.admm": "weakly-modular/auxiliary-variables",
    "modlib.methods.block_coordinate_descent": "weakly-modular/auxiliary-variables",
    "modlib.methods.alternating_minimisation": "weakly-modular/auxiliary-variables",
    "modlib.methods.lifted": "weakly-modular/auxiliary-variables",
    "modlib.objectives.objective": "question/modules",
    "modlib.objectives.proxy": "modular/proxy-objectives",
    "modlib.objectives.cross_entropy": "question/backpropagation",
    "modlib.objectives.auxiliary": "weakly-modular/greedy",
    "modlib.objectives.similarity": "weakly-modular/local-error-signals",
    "modlib.objectives.hsic": "weakly-modular/hsic-infopro",
    "modlib.objectives.infopro": "weakly-modular/hsic-infopro",
    "modlib.objectives.infonce": "weakly-modular/infonce",
    "modlib.networks": "question/backpropagation",
    "modlib.networks.vit": "how-to-use",
    "modlib.networks.whitened": "how-to-use",
    "modlib.networks.inverses": "weakly-modular/target-propagation",
    "modlib.networks.patches": "weakly-modular/infonce",
    "modlib.networks.vgg": "weakly-modular/local-error-signals",
    "modlib.networks.residual": "weakly-modular/greedy",
    "modlib.kernels": "question/kernel-machines",
    "modlib.tokens": "weakly-modular/greedy",
    "modlib.data": "how-to-use",
    "modlib.measure.audit": "question/modules",
    "modlib.measure.angles": "weakly-modular/target-propagation",
    "modlib.measure.costs": "weakly-modular/what-a-head-costs",
    "modlib.measure.memory": "question/backpropagation",
    "modlib.certificates": "modular/many-classes",
    "modlib.certificates.bounds": "modular/two-classes",
    "modlib.certificates.head": "question/kernel-machines",
    "modlib.certificates.unbalanced": "modular/unbalanced-classes",
    "modlib.reuse.extract": "modular/transfer",
    "modlib.reuse.pairs": "modular/few-labels",
    "modlib.reuse.few_labels": "modular/few-labels",
    "modlib.reuse.transfer": "modular/transfer",
    "modlib.reuse.zoo": "modular/modules-as-parts",
    "modlib.reuse.diagnosis": "modular/modules-as-parts",
    "modlib.viz": "how-to-use",
    "modlib.experiments": "how-to-use",
}


def connect(app: Sphinx) -> None:
    """Add the directive, and the links that chapters and entries get by themselves."""
    app.add_directive("entries", Entries)
    app.add_directive("overview", Overview)
    next(f for f in PyObject.doc_field_types if f.name == "variable").label = "Attributes"
    app.connect("doctree-read", _space_pairs)
    app.connect("doctree-read", _link_code)
    app.connect("doctree-read", _link_back)
    app.connect("missing-reference", _find_type)
    app.connect("autodoc-process-signature", _as_written)
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # before napoleon,
    app.connect("autodoc-process-docstring", _mend_fields, priority=600)  # and after it


@cache
def public() -> dict[str, str]:
    """Every public name by the path that a user writes, and the file that defines it."""
    found: dict[str, str] = {}
    seen: set[int] = set()
    for room in ROOMS:
        for name in exported(pkgutil.resolve_name(room)):
            path = f"{room}.{name}"
            if id(value(path)) not in seen:
                seen.add(id(value(path)))
                found[path] = _file(path)
    return found


def value(path: str) -> Any:
    """What a path names: a function, even where a file is called like it."""
    room, _, name = path.rpartition(".")
    return getattr(pkgutil.resolve_name(room), name)


def exported(module: ModuleType) -> list[str]:
    """What a module offers: its ``__all__``, or what it takes from the library without an underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, found in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(found) or inspect.isfunction(found))
        and found.__module__.startswith("modlib.")
    ]


def _file(path: str) -> str:
    found, name = value(path), path.rpartition(".")[2]
    if inspect.isclass(found) or inspect.isfunction(found):
        return found.__module__
    for file, module in list(sys.modules.items()):  # a constant lives where it is described
        if file.startswith("modlib.") and vars(module).get(name) is found and _comment(file, name):
            return file
    raise LookupError(f"{path}: a public constant needs a docstring below it")


def _comment(file: str, name: str) -> str:
    return " ".join(ModuleAnalyzer.for_module(file).find_attr_docs().get(("", name), [])).strip()


def entries(file: str) -> list[str]:
    """The public names of a file, in its order."""
    order = list(vars(importlib.import_module(file)))
    names = [path for path, where in public().items() if where == file]
    return sorted(names, key=lambda path: order.index(path.rpartition(".")[2]))


def chapter(file: str) -> str:
    """The page that derives what a file holds; a file without one shares that of its package."""
    parents = [".".join(file.split(".")[:n]) for n in range(file.count(".") + 1, 0, -1)]
    for place in parents:
        if place in DERIVED:
            return DERIVED[place]
    raise LookupError(f"{file}: name the page that derives it in DERIVED of {__file__}")


def members(kind: type) -> list[str]:
    """Methods and properties that a class is the first to have: not those of torch, and no overrides."""
    return [
        name
        for name, found in vars(kind).items()
        if not name.startswith("_")
        and isinstance(found, property | staticmethod | classmethod | FunctionType)
        and inspect.getdoc(found)
        and not any(hasattr(base, name) for base in kind.__bases__)
    ]


class Entries(SphinxDirective):
    """``.. entries:: FILE``: the docstring of a file, and its public names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Hand autodoc what there is, and add to each entry where it is derived."""
        file = self.arguments[0]
        lines = [f".. automodule:: {file}", "   :no-index:", ""]
        for path in entries(file):
            lines += [*_entry(path), ""]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=file), 0, node, match_titles=0)
        return list(node.children)


class Overview(SphinxDirective):
    """``.. overview:: PAGE ...``: every name on these pages of the reference, with its first line."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Write a list for each page, under a link to it."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        lines = []
        for page in self.arguments[0].split():
            lines += [f".. rubric:: :doc:`{page}`", "", ".. rst-class:: overview", ""]
            for file in files(folder / f"{page}.md"):
                for path in entries(file):
                    lines += [f"   :py:obj:`{path}`", f"      {_first_line(path)}", ""]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, node)
        return list(node.children)


def files(page: Path) -> list[str]:
    """The files of the library that a page of the reference lists."""
    return re.findall(r"^\.\. entries:: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)


def _first_line(path: str) -> str:
    found, name = value(path), path.rpartition(".")[2]
    if inspect.isclass(found) or inspect.isfunction(found):
        return (inspect.getdoc(found) or "").partition("\n")[0]
    return _comment(public()[path], name)


def _entry(path: str) -> Iterator[str]:
    found = value(path)
    if inspect.isclass(found):
        yield f".. autoclass:: {path}"
        if shown := members(found):
            yield f"   :members: {', '.join(shown)}"
        yield ""
    elif inspect.isfunction(found):
        yield from (f".. autofunction:: {path}", "")
    else:
        room, _, name = path.rpartition(".")
        yield from (
            f".. py:data:: {name}",
            f"   :module: {room}",
            "",
            f"   {_first_line(path)}",
            "",
        )
    yield from ("   .. rst-class:: derived", "")
    yield f"      In the book: :doc:`/book/{chapter(public()[path])}`."


def _as_written(
    app: Sphinx, what: str, path: str, found: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """The signature as the source has it: autodoc spells aliases of types out, over many lines."""
    if hasattr(found, "__dataclass_fields__"):
        return f"({', '.join(map(_field, inspect.signature(found).parameters.values()))})", ""
    try:
        source = inspect.getsource(found.__init__ if inspect.isclass(found) else found)
    except (OSError, TypeError):
        return None  # a constructor of torch's
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        return None
    arguments = function.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    returned = "" if what == "class" or function.returns is None else ast.unparse(function.returns)
    return f"({ast.unparse(arguments)})", returned


def _field(parameter: inspect.Parameter) -> str:
    """An argument of a dataclass, whose constructor has no source."""
    default = repr(parameter.default)
    given = "" if parameter.default is parameter.empty else f" = {default}"
    return f"{parameter.name}: {parameter.annotation}" + (" = ..." if "<" in given else given)


def _keep_colons(
    app: Sphinx, what: str, path: str, found: Any, options: Any, lines: list[str]
) -> None:
    """A property's first line may hold a colon: napoleon takes what stands before it for a type."""
    if what == "property":
        lines.insert(0, "\\")  # an escaped end of line: nothing


def _mend_fields(
    app: Sphinx, what: str, path: str, found: Any, options: Any, lines: list[str]
) -> None:
    """What napoleon made types of: the first of two arguments, and a result's words before a colon."""
    for i, line in enumerate(lines):
        if pair := re.match(r":(param|ivar) ([\w, ]+,[\w, ]+):", line):
            lines[i] = f":{pair[1]} {pair[2].replace(' ', '')}:{line[pair.end() :]}"
        if line.startswith(":rtype: "):
            result = next(k for k in range(i) if lines[k].startswith(":returns:"))
            said = line.removeprefix(":rtype: ")
            lines[result] = f":returns: {said}:{lines[result].removeprefix(':returns:')}"
            lines[i] = ""


def _space_pairs(app: Sphinx, tree: nodes.document) -> None:
    """Set the space again that two arguments of one line had to do without."""
    for name in tree.findall(addnodes.literal_strong):
        name[0] = nodes.Text(name.astext().replace(",", ", "))


def _link_code(app: Sphinx, tree: nodes.document) -> None:
    """Inline code that is a public name leads to its entry."""
    for code in list(tree.findall(nodes.literal)):
        path = code.astext().removesuffix("()")
        if path in public() and not isinstance(
            code.parent, nodes.reference | addnodes.pending_xref
        ):
            code.replace_self(_reference(path, code.deepcopy()))


def _reference(path: str, shown: nodes.Node) -> addnodes.pending_xref:
    return addnodes.pending_xref(
        "", shown, refdomain="py", reftype="obj", reftarget=path, refexplicit=True, refwarn=True
    )


def _link_back(app: Sphinx, tree: nodes.document) -> None:
    """A chapter ends with the entries of what it derives."""
    page = app.env.docname.removeprefix("book/")
    paths = [path for path, file in public().items() if chapter(file) == page]
    if not paths or app.env.doc2path(app.env.docname, base=False).endswith(".md"):
        return
    line = nodes.paragraph("", nodes.Text("In the reference: "), classes=["derived"])
    for path in paths:
        line += [_reference(path, nodes.literal("", path.rpartition(".")[2])), nodes.Text(", ")]
    line[-1] = nodes.Text(".")
    next(iter(tree.findall(nodes.section))).append(line)


def _find_type(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Element
) -> nodes.Node | None:
    """Types in signatures: the library's lead to their entries, Python's and PyTorch's stay text.

    Their manuals are elsewhere, and the book is read offline.
    """
    if not _in_signature(node):
        return None
    found = [path for path in public() if path.endswith(f".{node['reftarget']}")]
    if len(found) != 1:
        return shown
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, shown)


def _in_signature(node: nodes.Node | None) -> bool:
    while node is not None and not isinstance(node, addnodes.desc_signature):
        node = node.parent
    return node is not None
