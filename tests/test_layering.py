"""Who may import whom, and where side effects may live: read from the source, not by importing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("moelite", "quant", "cache", "cli")

# Top may import below or beside, never above. A new module gets its line here.
LAYERS = (
    {"api"},  # moelite/__init__.py: names only
    {"cli"},
    {
        "engine",
        "gpu.model",
        "sizing",
        "convert",
        "inputs",
        "calibration",
        "target",
        "demo",
        "demo_files",
        "bench",
        "verify",
        "foresee",
    },
    {"outlook", "meter", "tiers"},
    {"generate", "session", "model", "layers", "evaluate", "budget", "warm", "gpu", "trace"}
    | {
        "inventory",
        "packing",
        "lookahead",
        "expertjobs",
        "cachedreads",
        "allocation",
        "layerfile",
        "kept",
        "sparsity",
        "tradeoff",
        "densefile",
    }
    | {
        "belief",
        "forward",
        "stream",
        "calibrate",
        "calibrate_dense",
        "resume",
        "scores",
        "agreement",
        "frontier",
        "storesize",
    },
    {"cache", "store", "storefile", "models"},
    {
        *{
            "quant",
            "checkpoint",
            "sources",
            "hub",
            "config",
            "arch",
            "routing",
            "ops",
            "kernels",
            "simd",
            "lowering",
            "sync",
            "raw",
            "attention",
            "bandwidth",
            "crc",
            "words",
            "step",
            "program",
            "dispatch",
        },
        *{"kv", "rope", "workspace", "threads", "sampling", "tokenizer", "template", "sandbox"},
        *{"jit", "tensorfile", "machine", "process", "drive"},
        *{"forecast", "hitrates", "speeds", "recipe"},
    },
    {"errors", "units", "notes"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

ONLY_IN = {  # package -> files that may import it
    "torch": ("moelite/gpu/", "scripts/", "tests/"),
    "triton": ("moelite/gpu/triton_", "scripts/", "tests/"),
    "pynvml": ("moelite/gpu/", "tests/"),
    "bitsandbytes": ("moelite/gpu/", "scripts/", "tests/"),
    "transformers": ("scripts/", "tests/"),
    "plotly": ("cli/plot.py", "tests/"),
    "matplotlib": ("cli/plot.py", "tests/"),
    "typer": ("cli/", "tests/"),
    "rich": ("cli/", "tests/"),
    "prompt_toolkit": ("cli/", "tests/"),
}


def sources(*folders: str) -> list[Path]:
    """The Python files of root folders; the links inside moelite/ are not followed."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).parts[:-1]
            if not (folder == "moelite" and inner and inner[0] in CODE):
                found.append(path)
    return found


def part_of(path: Path) -> str:
    """The layer name of a file: its module, or its package for quant, cache, cli and models."""
    folder, *rest = path.relative_to(ROOT).parts
    if folder != "moelite":
        return folder
    if rest == ["__init__.py"]:
        return "api"
    return "gpu.model" if rest == ["gpu", "model.py"] else rest[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and TYPE_CHECKING included.

    `from moelite import arch` counts as moelite.arch; `from moelite.x import y` as moelite.x.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "moelite":
                for alias in node.names:
                    yield node.lineno, f"moelite.{alias.name}"
            else:
                yield node.lineno, module


def upward(path: str, source: str) -> list[str]:
    """The imports of a file that its layer forbids."""
    part = part_of(ROOT / path)
    bad = []
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            bad.append(f"{path}:{line}: relative import; write `from moelite...`")
        elif name.split(".")[0] in CODE[1:]:
            bad.append(f"{path}:{line}: import moelite.{name}, not {name}")
        elif name.startswith("moelite."):
            target = name.split(".")[1]
            if name.startswith("moelite.gpu.model"):
                target = "gpu.model"  # assembles a model, as the engine does; the rest lies below
            if target not in RANK:
                bad.append(f"{path}:{line}: {target} has no layer yet; add it to LAYERS")
            elif RANK[target] < RANK[part]:
                bad.append(f"{path}:{line}: {part} may not import {target}")
    return bad


def misplaced(path: str, source: str) -> list[str]:
    """The imports of a file that only other files may make."""
    return [
        f"{path}:{line}: only {', '.join(ONLY_IN[package])} may import {package}"
        for line, name in imports(ast.parse(source))
        if (package := name.split(".")[0]) in ONLY_IN and not path.startswith(ONLY_IN[package])
    ]


def outside_functions(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def environment_reads(source: str) -> list[int]:
    """Lines that read os.environ or call os.getenv; {**os.environ} for a child is no read."""
    tree = ast.parse(source)
    handed_on = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    }
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and id(node) not in handed_on
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in {"environ", "getenv", "environb"}
    )


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(*CODE), ids=relative)
def test_imports_go_down_the_layers(path: Path) -> None:
    assert part_of(path) in RANK, f"{relative(path)} has no layer yet; add it to LAYERS"
    assert upward(relative(path), path.read_text()) == []


@pytest.mark.parametrize("path", sources(*CODE, "scripts", "tests"), ids=relative)
def test_optional_packages_stay_in_their_files(path: Path) -> None:
    assert misplaced(relative(path), path.read_text()) == []


@pytest.mark.parametrize("path", sources("moelite", "quant", "cache"), ids=relative)
def test_the_core_reads_no_environment_variable(path: Path) -> None:
    assert environment_reads(path.read_text()) == []


@pytest.mark.parametrize("path", sources("moelite/models"), ids=relative)
def test_an_architecture_file_knows_no_kernel(path: Path) -> None:
    """Architectures are data: they import neither numba nor anything that runs a model."""
    allowed = {"arch", "config", "routing", "rope", "errors", "models"}
    for line, name in imports(ast.parse(path.read_text())):
        assert name.split(".")[0] != "numba", f"{relative(path)}:{line}"
        if name.startswith("moelite."):
            assert name.split(".")[1] in allowed, f"{relative(path)}:{line}: {name}"


@pytest.mark.parametrize("path", sources("quant"), ids=relative)
def test_a_format_knows_no_other_format(path: Path) -> None:
    """Formats share helpers, never one another; quant/__init__.py alone lists them."""
    if path.name == "__init__.py":
        return
    formats = {p.stem for p in sources("quant") if "\nFORMAT = " in p.read_text()}
    assert {"int8", "int4"} <= formats
    for line, name in imports(ast.parse(path.read_text())):
        if name.startswith("moelite.quant."):
            other = name.split(".")[2]
            assert other == path.stem or other not in formats, f"{relative(path)}:{line}: {name}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/int4.py", "from moelite.cli import main"),
        ("moelite/evaluate.py", "def f():\n    import moelite.engine"),
        ("moelite/errors.py", "from moelite import arch"),
        ("moelite/store.py", "import quant"),
        ("cache/lru.py", "from . import stats"),
        ("moelite/store.py", "import moelite.invented"),
    ],
)
def test_a_planted_upward_import_is_found(path: str, source: str) -> None:
    assert len(upward(path, source)) == 1


def test_planted_misplaced_packages_and_environment_reads_are_found() -> None:
    assert misplaced("moelite/engine.py", "def f():\n    import torch.nn")
    assert misplaced("moelite/engine.py", "from rich.table import Table")
    assert not misplaced("cli/render.py", "from rich.table import Table")
    assert environment_reads("import os\nx = os.environ.get('A')\ny = os.getenv('B')") == [2, 3]
    assert environment_reads("import os\nx = {**os.environ, 'A': 'b'}") == []


HEAVY = {"torch", "triton", "bitsandbytes"}
LIGHT = tuple(f"moelite/gpu/{name}.py" for name in ("__init__", "devices", "plan", "speeds"))


def test_torch_is_never_imported_with_a_module() -> None:
    """But for the files of moelite/gpu, which others import inside functions, save the LIGHT."""
    light = {name.removesuffix(".py").replace("/", ".") for name in LIGHT}
    for path in sources(*CODE):
        name = relative(path)
        heavy = name.startswith("moelite/gpu/") and name not in LIGHT
        for node in outside_functions(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and not heavy:
                names = [name for _, name in imports(node)]
                assert not any(n.split(".")[0] in HEAVY for n in names), name
                assert not any(n.startswith("moelite.gpu.") and n not in light for n in names), name
