"""The house rules as tests: floors, fences, sizes. CONTRIBUTING.md explains them in words."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("ldm/**/*.py"), *ROOT.glob("scripts/*.py")])

# A file may import from its own floor or a lower one; the longest matching prefix counts.
FLOORS = {
    "ldm": 0,  # the package itself: lazy names, which nothing here imports at run time
    "ldm.runtime": 1, "ldm.nets": 1, "ldm.conditioning": 1, "ldm.imaging": 1,
    "ldm.diffusion": 2, "ldm.data": 2,
    "ldm.model": 3, "ldm.encoders": 3,
    "ldm.loading": 4, "ldm.pipelines": 4,
    "ldm.train": 5, "ldm.generate": 5,
    "ldm.app": 6,
    "scripts": 7,
}  # fmt: skip

# Third-party packages, and the only places that may import them.
FENCES = {
    "gradio": ["scripts.app"],
    "open_clip": ["ldm.encoders"],
    "transformers": ["ldm.encoders"],
    "timm": ["ldm.encoders.depth"],
    "xformers": ["ldm.nets.attention"],
    "omegaconf": ["ldm.loading.config"],
    "safetensors": ["ldm.loading.files.checkpoint"],
    "webdataset": ["ldm.data.shards"],
    "braceexpand": ["ldm.data.shards"],
    "datasets": ["ldm.data.hub"],
    "matplotlib": ["ldm.train.monitoring.timesteps"],
    "wandb": ["ldm.train.monitoring.logs"],
    "bitsandbytes": ["ldm.train.optim.optimizers"],
    "ftfy": ["ldm.encoders.tokenizer"],
    "regex": ["ldm.encoders.tokenizer"],
    "lightning": [],
    "pytorch_lightning": [],
    "diffusers": [],
}
OLD_NAMES = ("openaimodel", "first_stage_model", "cond_stage_model", "diffusion_model")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor(name: str) -> int:
    return FLOORS[max((p for p in FLOORS if within(name, p)), key=len)]


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) != "ldm"], ids=name_of)
def test_imports_go_down_the_floors(path):
    here = floor(name_of(path))
    for imported in imports_of(path):
        if within(imported, "ldm") or within(imported, "scripts"):
            assert floor(imported) <= here, f"{name_of(path)} reaches up to {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_third_party_packages_stay_behind_their_fences(path):
    for imported in imports_of(path):
        allowed = FENCES.get(imported.split(".")[0])
        inside = allowed is None or any(within(name_of(path), place) for place in allowed)
        assert inside, f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_old_names_live_in_one_file(path):
    if name_of(path) != "ldm.loading.legacy":
        text = path.read_text()
        assert not [name for name in OLD_NAMES if name in text]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_device_is_hard_coded_below_the_command_line(path):
    if floor(name_of(path)) < 5:
        strings = (n.value for n in ast.walk(ast.parse(path.read_text())) if is_string(n))
        assert "cuda" not in strings


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path):
    lines = path.read_text().splitlines()
    limit = 260 if path.name == "app.py" else 60 if path.parent.name == "scripts" else 400
    assert len(lines) <= limit, f"{len(lines)} lines, limit {limit}"
    for function in functions_of(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines, limit 60"
        positional = function.args.posonlyargs + function.args.args
        assert len(positional) <= 8, f"{function.name} has {len(positional)} positional parameters"


def test_functions_are_short_on_the_whole():
    lengths = [f.end_lineno - f.lineno + 1 for path in FILES for f in functions_of(path)]
    assert statistics.median(lengths) <= 10
    assert statistics.quantiles(lengths, n=10)[-1] <= 30


def test_samplers_need_only_math_and_torch():
    allowed = {"math", "torch", "collections", "itertools"}
    tops = {name.split(".")[0] for name in imports_of(ROOT / "ldm/diffusion/samplers.py")}
    assert tops <= allowed


def test_importing_ldm_is_light():
    code = "import sys, ldm; print(sorted(m for m in ('torch', 'numpy') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves():
    pytest.importorskip("torch", reason="all else here reads files only, and needs no packages")
    import ldm

    assert all(getattr(ldm, name) is not None for name in ldm.__all__)


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    yield from (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))


def is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
