"""The rules of docs and CONTRIBUTING that a machine can check, over every product file.

Each rule is a function from parsed sources to complaints; the tests run it over the tree, and over a small source
that breaks it.
"""

import ast
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedseek.dp import guards

ROOT = Path(__file__).resolve().parent.parent
TREES = ("fedseek", "server", "clients", "simulations")

THEORY = ("fedseek.lora", "fedseek.dp", "fedseek.he", "fedseek.identity", "fedseek.secagg")
VERBS = tuple(
    f"fedseek.{verb}"
    for verb in (
        "cohort",
        "groupkey",
        "dialogues",
        "records",
        "tokenise",
        "batches",
        "train_settings",
        "optimiser",
        "physical_batch",
        "plain_step",
        "progress",
        "train",
        "round_job",
        "several",
        "canaries",
        "canary_record",
        "svg",
        "audit_picture",
        "audit_command",
        "evaluate",
        "answers",
        "generate",
        "encode",
        "site_noise",
        "tag",
        "deal",
        "mask",
        "encrypt",
        "messages",
        "aggregate",
        "reveal",
        "unmask",
        "decrypt",
        "apply",
        "statement",
        "statement_words",
        "statement_page",
        "release",
        "prepare",
        "predict",
        "predict_privacy",
        "predict_picture",
        "predict_command",
        "model_command",
    )
)
DAEMON_PARTS = ("fedseek.daemon",)
EVIDENCE = ("fedseek.evidence", "fedseek.verification", "fedseek.verify_command")
PLAN = tuple((f"fedseek.plan{part}",) for part in ("_spec", "_stages", "_problems", ""))
LAYERS = (("fedseek.errors",), THEORY, *PLAN, VERBS, DAEMON_PARTS, EVIDENCE)
DAEMONS = ("fedseek_server", "fedseek_site")
CLI = "fedseek.cli"

# module -> where it may be imported: folders end in "/"
HOMES = {
    "tenseal": ("fedseek/he/",),
    "opacus": ("fedseek/dp/",),
    "dp_accounting": ("fedseek/dp/",),
    "peft": ("fedseek/lora/",),
    "bitsandbytes": ("fedseek/lora/",),
    "huggingface_hub": ("fedseek/lora/",),
    "flwr": (
        "server/fedseek_server/app.py",
        "server/fedseek_server/flower.py",
        "server/fedseek_server/flower_host.py",
        "clients/fedseek_site/app.py",
        "clients/fedseek_site/flower.py",
        "simulations/",
    ),
    "ray": ("simulations/",),
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "handler", "misc"}
PRINTERS = {"cli.py", "__main__.py"}
# one broad except for each process, at its outer edge
OUTER_EDGES = {"clients/fedseek_site/service.py": 1, "simulations/engine.py": 1}

MAX_FILE_LINES, MEDIAN_FILE_LINES = 400, 200
MAX_BODY_LINES, MEDIAN_BODY_LINES = 60, 12
PROTOCOL_AS_CODE = ("simulations/protocol.py", "run_round", 80)  # a whole round on a page, docstring and all
MAX_OWN_ANCESTORS = 2  # FedseekError <- PlanError <- InvalidPlan

# what a coordinator imports, and what must not come along
COORDINATOR_IMPORTS = (
    "fedseek.errors",
    "fedseek.plan",
    "fedseek.messages",
    "fedseek.aggregate",
    "fedseek.unmask",
    "fedseek.he.params",
    "fedseek.he.packing",
    "fedseek.he.ciphertext",
    "fedseek.identity.roster",
    "fedseek.identity.signing",
    "fedseek_server.coordinator",
)
NOT_AT_THE_COORDINATOR = (
    "torch",
    "opacus",
    "peft",
    "transformers",
    "fedseek.he.keys",
    "fedseek.identity.keys",
    "fedseek.identity.vault",
    "fedseek.groupkey",
    "fedseek.tag",
)


@dataclass(frozen=True, slots=True)
class Source:
    path: str  # relative to the root, with forward slashes
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        if parts[0] in ("server", "clients"):
            parts = parts[1:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source(path: str, text: str) -> Source:
    return Source(path=path, text=text, tree=ast.parse(text))


def product_files() -> list[Source]:
    paths = sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))
    return [source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


SOURCES = product_files()


def imported_modules(file: Source) -> Iterator[str]:
    """Every module that a file imports, also inside functions; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def may_import(importer: str, imported: str) -> bool:
    """Whether the arrows of the design allow it; both are modules of ours."""
    if is_in(importer, ("simulations",)):
        return True
    if is_in(importer, DAEMONS):
        own = importer.split(".")[0]
        return is_in(imported, (own,)) or (is_in(imported, ("fedseek",)) and imported != CLI)
    if importer == CLI:
        return is_in(imported, ("fedseek",))
    for height, layer in enumerate(LAYERS):
        if is_in(importer, layer):
            below = tuple(package for lower in LAYERS[:height] for package in lower)
            siblings = (
                layer
                if layer in (VERBS, DAEMON_PARTS, EVIDENCE)
                else tuple(package for package in layer if is_in(importer, (package,)))
            )
            return imported == "fedseek" or is_in(imported, below + siblings)
    return False


def check_import_direction(file: Source) -> Iterator[str]:
    placed = is_in(file.module, ("simulations", *DAEMONS, CLI, *(name for layer in LAYERS for name in layer)))
    if not placed and file.module not in ("fedseek", "server", "clients"):
        yield f"{file.path}: module {file.module} has no place in the import order (LAYERS)"
    for imported in imported_modules(file):
        known = is_in(imported, ("fedseek", "simulations", "tests", *DAEMONS))
        # `from fedseek.errors import X` also yields fedseek.errors.X; that it is a name, not a module, changes nothing
        if known and placed and not may_import(file.module, imported):
            yield f"{file.path}: {file.module} may not import {imported}"


def check_relative_imports(file: Source) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield f"{file.path}:{node.lineno}: relative import; write the whole name"


def check_heavy_libraries(file: Source) -> Iterator[str]:
    for imported in imported_modules(file):
        homes = HOMES.get(imported.split(".")[0])
        if homes and not any(file.path == home or (home[-1] == "/" and file.path.startswith(home)) for home in homes):
            yield f"{file.path}: imports {imported}, whose place is {', '.join(homes)}"


def check_pickles(file: Source) -> Iterator[str]:
    for imported in imported_modules(file):
        if imported.split(".")[0] in PICKLES:
            yield f"{file.path}: imports {imported}; nothing of ours is unpickled"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
            yield f"{file.path}:{node.lineno}: {ast.unparse(node.func)} is a pickle; use safetensors"


def check_print(file: Source) -> Iterator[str]:
    if Path(file.path).name in PRINTERS:
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{file.path}:{node.lineno}: print() outside a command line"


def broad_excepts(file: Source) -> list[int]:
    """Lines of ``except:``, ``except Exception``, ``except BaseException`` and ``suppress`` of either."""
    broad = ("Exception", "BaseException")
    lines = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = node.args
        else:
            continue
        if any(each is None or ast.unparse(each) in broad for each in caught):
            lines.append(node.lineno)
    return lines


def check_broad_excepts(file: Source) -> Iterator[str]:
    lines = broad_excepts(file)
    allowed = OUTER_EDGES.get(file.path, 0)
    if len(lines) > allowed:
        yield f"{file.path}: broad except in lines {lines}, wanted at most {allowed}"


def check_vague_names(file: Source) -> Iterator[str]:
    for part in file.module.split("."):
        if part in VAGUE_NAMES:
            yield f"{file.path}: {part!r} says nothing about what is in it"


def check_docstrings(file: Source) -> Iterator[str]:
    stem = Path(file.path).stem
    public = not stem.startswith("_") or stem in ("__init__", "__main__")
    if public and not ast.get_docstring(file.tree):
        yield f"{file.path}: no module docstring"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last line."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - statements[0].lineno + 1 if statements else 0


def functions(file: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(file.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def check_sizes(file: Source) -> Iterator[str]:
    lines = len(file.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{file.path}: {lines} lines, wanted at most {MAX_FILE_LINES}"
    for function in functions(file):
        allowed = PROTOCOL_AS_CODE[2] if (file.path, function.name) == PROTOCOL_AS_CODE[:2] else MAX_BODY_LINES
        if body_lines(function) > allowed:
            yield (
                f"{file.path}:{function.lineno}: body of {function.name} has {body_lines(function)} lines, "
                f"wanted at most {allowed}"
            )


def class_bases(files: list[Source]) -> dict[str, list[str]]:
    """Our classes and the names of their bases; our class names are unique enough to go by the bare name."""
    classes = (node for file in files for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef))
    return {node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases] for node in classes}


def own_ancestors(name: str, bases: dict[str, list[str]]) -> int:
    return max((1 + own_ancestors(base, bases) for base in bases[name] if base in bases and base != name), default=0)


def check_class_chains(files: list[Source]) -> Iterator[str]:
    bases = class_bases(files)
    for name in bases:
        height = own_ancestors(name, bases)
        if height > MAX_OWN_ANCESTORS:
            yield f"class {name} has {height} ancestors of ours in a row, wanted at most {MAX_OWN_ANCESTORS}"


Check = Callable[[Source], Iterator[str]]
FILE_CHECKS: tuple[Check, ...] = (
    check_import_direction,
    check_relative_imports,
    check_heavy_libraries,
    check_pickles,
    check_print,
    check_broad_excepts,
    check_vague_names,
    check_docstrings,
    check_sizes,
)


@pytest.mark.parametrize("check", FILE_CHECKS, ids=lambda check: check.__name__)
def test_no_product_file_breaks_the_rule(check):
    complaints = [complaint for file in SOURCES for complaint in check(file)]
    assert not complaints, "\n".join(complaints)


def test_no_class_chain_is_too_long():
    assert not list(check_class_chains(SOURCES))


def test_the_page_on_pitfalls_names_every_guard():
    page = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
    names = [value for name, value in vars(guards).items() if name.isupper() and isinstance(value, str)]
    unnamed = [name for name in names if name.islower() and not name.endswith("_") and f"`{name}`" not in page]
    assert len(names) > 8
    assert not unnamed


def test_the_list_of_outer_edges_is_up_to_date():
    found = {file.path: len(broad_excepts(file)) for file in SOURCES if broad_excepts(file)}
    assert found == OUTER_EDGES


def test_median_sizes():
    files = [len(file.text.splitlines()) for file in SOURCES if Path(file.path).name != "__init__.py"]
    bodies = [body_lines(function) for file in SOURCES for function in functions(file)]
    assert statistics.median(files) <= MEDIAN_FILE_LINES
    assert statistics.median(bodies) <= MEDIAN_BODY_LINES


@pytest.mark.parametrize("package", ["fedseek", *THEORY])
def test_package_init_files_import_nothing(package):
    init = ROOT / package.replace(".", "/") / "__init__.py"
    assert not list(imported_modules(source(init.as_posix(), init.read_text(encoding="utf-8")))), init


@pytest.mark.parametrize("module", COORDINATOR_IMPORTS)
def test_a_coordinator_loads_no_training_library_and_no_secret_key_type(module):
    script = (
        f"import importlib, sys\n"
        f"importlib.import_module({module!r})\n"
        f"print(*[name for name in {NOT_AT_THE_COORDINATOR!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"cannot import {module}:\n{done.stderr}"
    assert done.stdout.strip() == "", f"importing {module} also loads: {done.stdout.strip()}"


LONG_BODY = "def f():\n    '''Doc.'''\n" + "    x = 1\n" * 61
BREAKS = [
    (check_import_direction, "fedseek/errors.py", "import fedseek.plan"),
    (check_import_direction, "fedseek/he/packing.py", "from fedseek.lora import adapter"),
    (check_import_direction, "fedseek/dp/ledger.py", "from fedseek import plan"),
    (check_import_direction, "fedseek/plan.py", "def f():\n    from fedseek.train import train"),
    (check_import_direction, "fedseek/train.py", "import fedseek_site.service"),
    (check_import_direction, "fedseek/train.py", "import simulations.protocol"),
    (check_import_direction, "fedseek/cli.py", "from fedseek_server import coordinator"),
    (check_import_direction, "fedseek/cli.py", "from simulations import engine"),
    (check_import_direction, "server/fedseek_server/app.py", "import fedseek_site.app"),
    (check_import_direction, "clients/fedseek_site/app.py", "from fedseek_server.coordinator import run"),
    (check_import_direction, "clients/fedseek_site/app.py", "import simulations"),
    (check_import_direction, "fedseek/novelty.py", ""),
    (check_relative_imports, "fedseek/train.py", "from . import plan"),
    (check_heavy_libraries, "fedseek/encrypt.py", "import tenseal.sealapi as sealapi"),
    (check_heavy_libraries, "fedseek/train.py", "from opacus import PrivacyEngine"),
    (check_heavy_libraries, "fedseek/train.py", "import peft"),
    (check_heavy_libraries, "server/fedseek_server/coordinator.py", "from flwr.common import Message"),
    (check_pickles, "fedseek/messages.py", "import pickle"),
    (check_pickles, "fedseek/lora/adapter.py", "import torch\ntorch.load('x')"),
    (check_print, "fedseek/train.py", "print('x')"),
    (check_broad_excepts, "fedseek/train.py", "try:\n    pass\nexcept Exception:\n    pass"),
    (check_broad_excepts, "fedseek/train.py", "try:\n    pass\nexcept:\n    pass"),
    (check_broad_excepts, "fedseek/train.py", "try:\n    pass\nexcept (ValueError, BaseException):\n    pass"),
    (check_broad_excepts, "fedseek/train.py", "import contextlib\nwith contextlib.suppress(Exception):\n    pass"),
    (check_broad_excepts, "simulations/engine.py", "try:\n    pass\nexcept Exception:\n    pass\n" * 2),
    (check_vague_names, "fedseek/lora/utils.py", ""),
    (check_docstrings, "fedseek/train.py", "x = 1"),
    (check_sizes, "fedseek/train.py", LONG_BODY),
    (check_sizes, "fedseek/train.py", "x = 1\n" * 401),
]


@pytest.mark.parametrize(
    ("check", "path", "text"), BREAKS, ids=[f"{c.__name__}-{i}" for i, (c, _, _) in enumerate(BREAKS)]
)
def test_each_rule_trips(check, path, text):
    assert list(check(source(path, text)))


KEEPS = [
    ("fedseek/train.py", "'''Doc.'''\nfrom fedseek.dp import noise\nfrom fedseek import encode, plan"),
    (
        "fedseek/he/packing.py",
        "'''Doc.'''\nfrom fedseek.he.params import BfvParams\nfrom fedseek.errors import TooLarge",
    ),
    ("fedseek/cli.py", "'''Doc.'''\nfrom fedseek.train import train\nprint('x')"),
    ("server/fedseek_server/app.py", "'''Doc.'''\nimport flwr\nfrom fedseek_server import coordinator"),
    ("simulations/engine.py", "'''Doc.'''\nimport flwr\nimport fedseek_server.app, fedseek_site.app, fedseek.cli"),
]


@pytest.mark.parametrize(("path", "text"), KEEPS, ids=[path for path, _ in KEEPS])
def test_what_is_allowed_passes_every_rule(path, text):
    assert not [complaint for check in FILE_CHECKS for complaint in check(source(path, text))]


def test_the_rule_on_class_chains_trips():
    chain = "class A: ...\nclass B(A): ...\nclass C(B): ...\n"
    assert not list(check_class_chains([source("fedseek/plan.py", chain)]))
    assert list(check_class_chains([source("fedseek/plan.py", chain + "class D(C): ...\n")]))
