"""Who may import whom (docs/design.md, section 1), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train", "generate", "convert_weights", "evaluate", "serve"}
TEXT_NAMES = (
    "arguments",
    "attendant",
    "chat",
    "command_line",
    "config",
    "files",
    "lora_config",
    "planner",
    "provenance",
    "schedule",
    "screen",
    "tokenizer",
)
TEXT_HALF = {"llama", *(f"llama.{name}" for name in TEXT_NAMES)}
SOURCES = [
    *(ROOT / f"{name}.py" for name in sorted(SCRIPTS) if (ROOT / f"{name}.py").exists()),
    *(path for folder in ("llama", "kernels", "data", "web") for path in sorted((ROOT / folder).rglob("*.py"))),
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it; `from a import b` counts as a.b where that is a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                deep = ROOT / f"{base}.{alias.name}".replace(".", "/")
                found.add(f"{base}.{alias.name}" if deep.with_suffix(".py").exists() else base)
    return found


def ours(names: set[str]) -> set[str]:
    return {n for n in names if n.split(".")[0] in {"llama", "kernels", "data", "web", *SCRIPTS}}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_follow_the_plan(path: Path) -> None:
    module, names = module_of(path), imports_of(path)
    assert not ours(names) & SCRIPTS, "nothing imports a script"
    top = module.split(".")[0]
    if top == "kernels":
        assert {n.split(".")[0] for n in ours(names)} <= {"kernels"}, "kernels know tensors only"
        assert "kernels" not in names, "the seam calls the kernel files, never the other way"
        assert not names & {"numpy", "sentencepiece"}
    elif module in TEXT_HALF:
        assert ours(names) <= TEXT_HALF
        assert not any(n.split(".")[0] in {"torch", "numpy", "triton"} for n in names), "the text half has no torch"
    elif top == "llama":
        assert not any(n.startswith("kernels.") for n in names), "llama uses the seam, not its files"
        assert not any(n.split(".")[0] in {"data", "web"} for n in names), "llama imports neither data nor web"
    elif top == "data":
        assert {n for n in ours(names) if not n.startswith("data")} <= TEXT_HALF
        assert not any(n.split(".")[0] == "web" for n in names)
        if module != "data.loader":
            assert not any(n.split(".")[0] == "torch" for n in names), "torch only in data/loader.py"


def test_web_leaves_numbers_to_llama() -> None:
    """The HTTP layer asks engine and doctor; tensors and kernels are no business of its."""
    for path in (ROOT / "web").rglob("*.py"):
        used = {n.split(".")[0] for n in imports_of(path)}
        assert not used & {"torch", "numpy", "kernels", "triton", "sentencepiece"}, path


def test_a_cpu_run_never_loads_triton() -> None:
    """Its import takes a fifth of a second, and machines without it must work."""
    program = (
        "import sys, torch, kernels; x = torch.ones(2, 4); "
        "kernels.swiglu(x, x); kernels.rms_norm(x, x[0], 1e-5, x); kernels.describe(); kernels.use('auto', 'cpu'); "
        "sys.exit('triton' in sys.modules or 'kernels.flash' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_happens_at_import(path: Path) -> None:
    """Top level holds definitions, constants and imports; no statement that acts."""
    for node in ast.parse(path.read_text()).body:
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        allowed = (ast.Import, ast.ImportFrom, *definitions)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        registration = path.parent.name == "kernels" and ".register_autograd(" in ast.unparse(node)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        assert isinstance(node, allowed) or docstring or main or registration or typing_only, (
            f"{path.name}:{node.lineno}"
        )


@pytest.mark.parametrize("package", ["llama", "data", "web"])
def test_package_files_import_nothing(package: str) -> None:
    assert not imports_of(ROOT / package / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_every_signature_is_typed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{path.name}:{node.lineno} {node.name}: {bare} not typed"
            assert node.returns is not None, f"{path.name}:{node.lineno} {node.name}: no return type"
