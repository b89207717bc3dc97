"""Layers, imports of third-party packages, and what `import ldm` imports; see CONTRIBUTING.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("ldm/**/*.py"), *ROOT.glob("scripts/*.py")])

# A module imports from its own layer and from those below it; the longest matching prefix counts.
LAYERS = {
    "ldm.runtime": 1, "ldm.nets": 1, "ldm.conditioning": 1, "ldm.prompts": 1,
    "ldm.diffusion": 2, "ldm.imaging": 2, "ldm.data": 2,
    "ldm.model": 3, "ldm.encoders": 3,
    "ldm.loading": 4, "ldm.pipelines": 4,
    "ldm": 5,  # `import ldm`, the public names
    "ldm.train": 5, "ldm.generate": 5, "ldm.evaluation": 5, "ldm.compat": 5, "ldm.models": 5,
    "ldm.app": 6,
    "ldm.commands": 7, "ldm.__main__": 7,
    "scripts": 7,
}  # fmt: skip

# Third-party packages, and those that open connections -> the only modules that may import them.
ALLOWED_IMPORTERS = {
    "gradio": ["scripts.app", "ldm.app"],
    "open_clip": ["ldm.encoders", "ldm.compat.encoders"],
    "timm": ["ldm.encoders.depth"],
    "xformers": ["ldm.nets.attention"],
    "omegaconf": ["ldm.loading.config"],
    "safetensors": ["ldm.loading.files"],
    "webdataset": ["ldm.data.shards"],
    "braceexpand": ["ldm.data.shards"],
    "datasets": ["ldm.data.hub"],
    "huggingface_hub": ["ldm.loading.hub"],
    "urllib": ["ldm.data.http_stream", "ldm.loading.hub"],
    "http": ["ldm.data.http_stream"],
    "socket": [],
    "requests": [],
    "httpx": [],
    "matplotlib": ["ldm.train.monitoring", "ldm.evaluation.report"],
    "wandb": ["ldm.train.monitoring.logs"],
    "pydantic": ["ldm.train.config"],
    "bitsandbytes": ["ldm.train.optim.optimizers"],
    "trimesh": ["ldm.imaging.mesh"],
    "dynamicprompts": ["ldm.generate.wildcards"],
    "pyparsing": ["ldm.generate.wildcards"],
    "ftfy": ["ldm.encoders.tokenizer"],
    "regex": ["ldm.encoders.tokenizer"],
    "transformers": [],
    "lightning": [],
    "pytorch_lightning": ["ldm.compat.lightning"],
    "diffusers": [],
}
ORIGINAL_NAMES = ("openaimodel", "first_stage_model", "cond_stage_model", "diffusion_model")


@cache
def parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def get_module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def iter_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(parse_file(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def find_layer(name: str) -> int:
    return LAYERS[max((p for p in LAYERS if is_within(name, p)), key=len)]


def test_every_package_has_a_layer():
    packages = {".".join(get_module_name(path).split(".")[:2]) for path in FILES} - {"ldm"}
    assert {name for name in packages if name.startswith("ldm.")} <= LAYERS.keys()


def test_imports_go_down_the_layers():
    upward = [
        f"{get_module_name(path)} imports {imported}"
        for path in FILES
        if get_module_name(path) != "ldm"
        for imported in iter_imports(path)
        if imported.split(".")[0] in ("ldm", "scripts")
        and find_layer(imported) > find_layer(get_module_name(path))
    ]
    assert upward == []


def test_third_party_packages_are_imported_only_where_allowed():
    violations = [
        f"{get_module_name(path)} imports {imported}"
        for path in FILES
        for imported in iter_imports(path)
        if not any(
            is_within(get_module_name(path), importer)
            for importer in ALLOWED_IMPORTERS.get(imported.split(".")[0], [get_module_name(path)])
        )
    ]
    assert violations == []


def test_names_of_the_original_occur_in_few_files():
    violations = [
        f"{get_module_name(path)}: {name}"
        for path in FILES
        for name in ORIGINAL_NAMES
        if name in path.read_text("utf-8")
        and get_module_name(path)
        not in ("ldm.loading.legacy", "ldm.loading.sgm", "ldm.loading.weight_names")
        and not is_within(get_module_name(path), "ldm.compat")
    ]
    assert violations == []


def test_no_other_package_uses_compat():
    violations = {
        (get_module_name(path), imported)
        for path in FILES
        if not is_within(get_module_name(path), "ldm.compat")
        for imported in iter_imports(path)
        if is_within(imported, "ldm.compat")
    }
    # `ldm.models`, a file that web UIs look for, also does, by a string that is not seen here.
    names = ("import_submodule", "install_finder")
    assert violations == {("ldm", f"ldm.compat.finder.{name}") for name in names}


def test_cuda_is_not_hard_coded_below_the_programs():
    violations = [
        get_module_name(path)
        for path in FILES
        if find_layer(get_module_name(path)) < 5 and get_module_name(path) != "ldm.runtime.device"
        for node in ast.walk(parse_file(path))
        if isinstance(node, ast.Constant) and node.value == "cuda"
    ]
    assert violations == []


def test_any_is_rare():
    # Most values in `ldm.compat` come from programs that were written for the original.
    for is_compat, max_per_1000_lines in ((False, 8), (True, 32)):
        paths = [p for p in FILES if is_within(get_module_name(p), "ldm.compat") == is_compat]
        names = [n for p in paths for n in ast.walk(parse_file(p)) if isinstance(n, ast.Name)]
        lines = sum(path.read_text("utf-8").count("\n") for path in paths)
        assert sum(name.id == "Any" for name in names) < max_per_1000_lines * lines / 1000


def test_samplers_need_only_math_and_torch():
    allowed = {"math", "torch", "collections", "functools", "itertools"}
    files = ROOT.glob("ldm/diffusion/samplers/*.py")
    others = {n for f in files for n in iter_imports(f) if n.split(".")[0] not in allowed}
    assert {n for n in others if not is_within(n, "ldm.diffusion.samplers")} == {
        "ldm.diffusion.names"
    }


def test_importing_ldm_imports_neither_torch_nor_numpy():
    code = "import sys, ldm; print(sorted(m for m in ('torch', 'numpy') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves():
    pytest.importorskip("torch", reason="all else here reads files only, and needs no packages")
    import ldm

    assert all(getattr(ldm, name) is not None for name in ldm.__all__)
    assert set(ldm.__all__) <= set(dir(ldm))


def test_names_of_test_files_are_unique():
    """Pytest imports test files by name, so two files with one name stop the whole run."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
