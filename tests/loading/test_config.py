"""YAML files: numbers, overrides, references, and targets that are allowed."""

import sys

import pytest
import torch

import ldm
from ldm.loading.build import build_on_meta
from ldm.loading.config import instantiate, parse_yaml, read_yaml
from ldm.nets.autoencoder import AutoencoderKL
from ldm.runtime.files import find_file

DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def test_numbers_are_read_as_omegaconf_reads_them_and_overrides_come_last():
    text = "a: {b: 1.e-6, c: 5.0e-07, d: 1e-4, e: 0.0120, f: 1000, g: [1]}"
    config = parse_yaml(text, ["a.f=2.5"])
    assert config == {"a": {"b": 1e-6, "c": 5e-7, "d": 1e-4, "e": 0.012, "f": 2.5, "g": [1]}}
    config = parse_yaml("a: {b: 1, c: [1, 2]}", ["a.d.e=null", "a.c=[3]"])
    assert config == {"a": {"b": 1, "c": [3], "d": {"e": None}}}


def test_a_parsed_config_may_be_changed_without_changing_the_next():
    parse_yaml("a: {b: [1]}")["a"]["b"].append(2)
    assert parse_yaml("a: {b: [1]}") == {"a": {"b": [1]}}


@pytest.mark.parametrize("override", ["modle.params.x=1", "model", "=3"])
def test_invalid_overrides_are_refused(override):
    with pytest.raises(ValueError, match="invalid override .* of tiny.yaml"):
        parse_yaml("model: {}", [override], where="tiny.yaml")


def test_an_override_of_a_list_element_is_refused():
    with pytest.raises(ValueError, match=r"^x\.yaml: Cannot merge"):
        parse_yaml("a: {b: [1]}", ["a.b[0]=2"], where="x.yaml")


def test_references_are_resolved():
    text = "a: {b: 3, c: [{x: 1}]}\nd: ${a.b}\ne: ${a.c.0}\nf: ${d}"
    assert parse_yaml(text) == {"a": {"b": 3, "c": [{"x": 1}]}, "d": 3, "e": {"x": 1}, "f": 3}


MALICIOUS_YAML = {
    "environment": "a: ${oc.env:HOME}",
    "resolver": "a: ${oc.create:'x'}",
    "inside text": "a: b\nc: x${a}",
    "nested": "a: b\nc: ${${a}}",
    "absent": "a: ${b.c}",
    "cycle": "a: ${b}\nb: ${a}",
    "bomb of references": "a0: [1, 1]\n"
    + "\n".join(f"a{i}: [{', '.join([f'${{a{i - 1}}}'] * 9)}]" for i in range(1, 12)),
    "bomb of aliases": "a0: &a0 [1, 1]\n"
    + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
    "python object": "a: !!python/object/apply:os.system [echo]",
    "list": "[1, 2]",
    "syntax": "a: [1, 2",
    "same key twice": "a: 1\na: 2",
}


@pytest.mark.parametrize("name", MALICIOUS_YAML)
def test_malicious_yaml_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^x\.yaml: "):
        parse_yaml(MALICIOUS_YAML[name], where="x.yaml")


def test_large_and_binary_files_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="neither UTF-8"):
        read_yaml(path)
    path.write_bytes(b"a: 1\n" * 300_000)
    with pytest.raises(ValueError, match="too much"):
        read_yaml(path)


def test_configs_are_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("configs/stable-diffusion/v2-inference.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="tried"):
        find_file("configs/absent.yaml")


def test_networks_are_built_by_the_originals_or_our_names():
    params = {"embed_dim": 4, "ddconfig": DDCONFIG, "lossconfig": {"target": "os.system"}}
    for package in ("models", "nets"):
        target = f"ldm.{package}.autoencoder.AutoencoderKL"
        autoencoder = ldm.instantiate({"target": target, "params": params})
        assert isinstance(autoencoder, AutoencoderKL)
        assert "encoder.down.0.block.0.norm1.weight" in autoencoder.state_dict()


@pytest.mark.parametrize("name", ["v2-inference", "v2-inference-v"])
def test_configs_of_the_original_for_intel_equal_those_for_any_device(name, tmp_path, monkeypatch):
    folder = "configs/stable-diffusion"
    for dtype in ("fp32", "bf16"):
        config = read_yaml(f"{folder}/intel/{name}-{dtype}.yaml")
        assert config == read_yaml(f"{folder}/{name}.yaml")
    monkeypatch.chdir(tmp_path)  # a file of this name here comes first
    path = tmp_path / folder / f"intel/{name}-fp32.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("model: {target: mine}")
    assert read_yaml(f"{folder}/intel/{name}-fp32.yaml") == {"model": {"target": "mine"}}


def test_half_precision_of_a_config_is_ignored(tiny_yaml):
    spec = read_yaml(tiny_yaml)["model"]["params"]["unet_config"]
    spec["params"]["use_fp16"] = True
    assert ldm.instantiate(spec).dtype is torch.float32


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("UNet", {"chanel_mult": [1]}, "unknown parameter of UNet `chanel_mult`, did you mean `ch"),
        ("Unet", {}, "unknown target `ldm.nets.unet.Unet`, did you mean `ldm.nets.unet.UNet`"),
        ("UNet", {"in_channels": 4}, "UNet needs .*`model_channels`"),
    ],
)
def test_unknown_and_missing_parameters_are_named(target, params, message):
    with pytest.raises(ValueError, match=rf"v\.yaml: {message}"):
        instantiate({"target": f"ldm.nets.unet.{target}", "params": params}, where="v.yaml")


MALICIOUS_TARGETS = [
    "os.system", "posix.system", "os.popen", "os.execv", "subprocess.Popen", "subprocess.run",
    "subprocess.getoutput", "builtins.eval", "builtins.exec", "builtins.open", "builtins.getattr",
    "builtins.__import__", "pickle.loads", "pickle.load", "marshal.loads", "shelve.open",
    "torch.load", "torch.hub.load", "torch.hub.download_url_to_file", "torch.ops.load_library",
    "torch.utils.cpp_extension.load_inline", "torch.jit.load", "torch.package.PackageImporter",
    "torch.classes.load_library", "torch.nn.Module", "logging.os.system", "torch.os.system",
    "functools.partial", "operator.attrgetter", "importlib.import_module", "runpy.run_path",
    "ctypes.CDLL", "shutil.rmtree", "socket.socket", "webbrowser.open", "pdb.run", "code.interact",
    "numpy.load", "yaml.unsafe_load", "ldm.loading.load.save_model", "ldm.loading.config.read_yaml",
    "ldm.model.torch.load", "ldm.nets.unet.UNet.__init__", "antigravity.geohash", "this.s",
    "__main__.x", "", None, 3, ["os.system"], {"target": "os.system"},
]  # fmt: skip


@pytest.mark.parametrize("section", ["model", "unet_config", "cond_stage_config"])
def test_malicious_targets_are_refused_without_import(tiny_yaml, section):
    config, before = read_yaml(tiny_yaml), set(sys.modules)
    parent = config if section == "model" else config["model"]["params"]
    # Sections within the model are checked in the same way: some targets are enough.
    for target in MALICIOUS_TARGETS[:: 1 if section == "model" else 8]:
        parent[section] = {"target": target, "params": {"command": "echo"}}
        with pytest.raises(ValueError, match="target"), torch.device("meta"):
            instantiate(config, where="evil.yaml")
    imported = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not imported & {"antigravity", "this", "webbrowser", "shelve", "pdb"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user, with a class and other objects."""
    folder = tmp_path / "my_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(
        "import os\nfrom subprocess import Popen\nfrom os import system\nimport torch\n"
        "from functools import partial\n"
        "class Mine(torch.nn.Linear):\n"
        "    def __init__(self, *, width):\n        super().__init__(width, width)\n"
        "def function(**kwargs): raise AssertionError('called')\n"
        "def fake(**kwargs): raise AssertionError('called')\nfake.__module__ = 'my_pkg.nets'\n"
        "shell = os.system\nbound = partial(system, 'echo')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_pkg"
    for name in [name for name in sys.modules if name.startswith("my_pkg")]:
        del sys.modules[name]


def test_classes_of_an_allowed_package_are_built(package):
    spec = {"target": "my_pkg.nets.Mine", "params": {"width": 3}}
    with pytest.raises(ValueError, match="unknown target"):
        instantiate(spec)
    assert "my_pkg" not in sys.modules
    assert instantiate(spec, allow=package).in_features == 3


@pytest.mark.parametrize(
    "name",
    ["nets.Popen", "nets.system", "nets.os.system", "nets.function", "nets.fake", "nets.shell",
     "nets.bound", "nets.torch.nn.Linear", "nets.partial", "nets.Mine.__init__", "nets.__dict__",
     "absent.Mine", "nets.Absent", "nets", "..os.system", "_evil.Mine"],
)  # fmt: skip
def test_only_classes_of_an_allowed_package_are_built(package, name):
    with pytest.raises(ValueError, match="target|name of a class"):
        instantiate({"target": f"my_pkg.{name}".replace("._", "_")}, allow=[package])


@pytest.mark.parametrize("value", ["many", -1, None, [1, "x"], {"a": 1}, 2.5])
def test_invalid_values_are_refused_in_one_line(tiny_yaml, value):
    config = read_yaml(tiny_yaml)
    config["model"]["params"]["unet_config"]["params"]["model_channels"] = value
    with pytest.raises(ValueError, match=r"^tiny\.yaml: model"):
        instantiate(config, where="tiny.yaml")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [*(("image_size", size, r"integer, or \(height, width\)") for size in ("16", 0, [16], [16, -1],
     [16, 16.0])), ("scale_factor", 0, "number"), ("scale_factor", "nan", "number")],
)  # fmt: skip
def test_invalid_sizes_and_scale_factors_are_refused_in_one_line(tiny_yaml, key, value, allowed):
    config = read_yaml(tiny_yaml)
    config["model"]["params"][key] = value
    with pytest.raises(ValueError, match=rf"^tiny\.yaml: .*{key} must be a positive {allowed}"):
        build_on_meta(config, where="tiny.yaml")


def test_later_texts_override_earlier_ones():
    first = "model: {params: {x: 1, y: [1, 2]}}\nz: ${model.params.x}"
    config = parse_yaml([first, "model: {params: {x: 3, y: [4]}}\nnew: 5"], ["new=6"])
    assert config == {"model": {"params": {"x": 3, "y": [4]}}, "z": 3, "new": 6}
    with pytest.raises(ValueError, match=r"c.yaml: expected a YAML mapping"):
        parse_yaml([first, "[1, 2]"], where="c.yaml")
