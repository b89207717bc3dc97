"""The app with tiny models of SDXL, without a browser."""

import shutil
from pathlib import Path

import gradio as gr
import pytest
import torch

from ldm.app.backend import Backend
from ldm.app.form import DEFAULTED_FIELDS, TaskForm
from ldm.app.form_events import FormEvents
from ldm.app.library import Library
from ldm.app.limits import Limits
from ldm.app.progress import Progress
from ldm.generate.defaults import resolve_sampling
from ldm.generate.groups import ModelOptions
from ldm.generate.tasks import TASKS
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.model import Defaults
from make_tiny_sdxl import make_tiny_sdxl

BASE, REFINER = "sd_xl_base_1.0.safetensors", "sd_xl_refiner_1.0.safetensors"
TXT2IMG = TASKS["txt2img"]


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    models = make_tiny_sdxl(folder / "models")
    (folder / "models/sd_xl_turbo_1.0.safetensors").symlink_to(models["xl"])
    demo = Path(__file__).parents[2] / "checkpoints/demo.safetensors"
    shutil.copy(demo, folder / "models")
    options = ModelOptions(device="cpu", precision="full")
    return Backend(Library(folder / "models"), folder / "out", options, Limits())


@pytest.fixture
def events(backend):
    return FormEvents(backend)


def make_request(backend, model, **changes):
    form = TaskForm(TXT2IMG, Limits())
    values = {name: field.kwargs.get("value") for name, field in form.fields.items()}
    values |= {"seed": "5", "width": 64, "height": 64, "steps": 4, **changes}
    return backend.build_request(TXT2IMG, model, form.parse(values, backend.uploads))


def test_settings_and_fields_follow_the_checkpoint(events):
    settings = events.forms["txt2img"].setting_fields
    initial = {name: settings[name].kwargs["value"] for name in DEFAULTED_FIELDS}

    def select_checkpoint(checkpoint):
        _, _, accordion, _, defaults, *updates = events.update_for_checkpoint(
            "txt2img", checkpoint, [], "", initial, *initial.values()
        )
        for name, update in zip(defaults, updates, strict=True):
            # Fields that have their value already are skipped.
            assert update == (gr.skip() if defaults[name] == initial[name] else defaults[name])
        return (accordion["visible"], *(defaults[name] for name in ("width", "scale", "steps")))

    assert select_checkpoint(BASE) == (True, 1024, 5.0, 25)
    assert select_checkpoint("sd_xl_turbo_1.0.safetensors") == (True, 512, 1.0, 4)
    assert select_checkpoint("demo.safetensors") == (False, 128, 2.0, 25)


@pytest.fixture
def lora(backend):
    path = backend.library.folder / "loras/lcm-lora-sdxl.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_checkpoint(path, {"lora_unet_x.alpha": torch.ones(())})
    return path


def test_settings_follow_loras_in_the_prompt_and_the_sampler(events, lora):
    def apply_defaults(defaults, prompt="a cat", **values):
        form = [{**defaults, **values}[name] for name in DEFAULTED_FIELDS]
        return events.apply_defaults("txt2img", BASE, [], prompt, defaults, *form)[0]

    plain = apply_defaults(dict.fromkeys(DEFAULTED_FIELDS))
    with_lora = apply_defaults(plain, f"a cat <lora:{lora.stem}:1>")
    assert [with_lora[name] for name in ("sampler", "steps", "scale")] == ["lcm", 4, 1.0]
    for prompt in ("a cat <lora:none", "<lora:none:1>"):
        assert apply_defaults(with_lora, prompt) == plain
    assert apply_defaults(plain, sampler="euler_cfg_pp") == {**plain, "scale": 1.0}
    assert apply_defaults(plain, sampler="euler") == plain


def test_an_empty_scale_is_the_default_of_the_sampler(backend):
    request = make_request(backend, BASE, scale=None, sampler="euler_cfg_pp")
    assert resolve_sampling(request, Defaults()).scale == 1.0


def test_reused_settings_are_not_replaced_by_defaults_of_the_lora(events, lora):
    """The image has the defaults of the model, although its LoRA is for few steps."""
    values = {"steps": 25, "scale": 5.0, "sampler": "ddim", "width": 1024, "height": 1024}
    info = {"prompt": f"a cat <lora:{lora.stem}:1>", **values, "size": [1024, 1024]}
    *filled, defaults = events.fill_fields(info, BASE, values)
    form = dict(zip(events.forms["txt2img"].common_fields, filled, strict=False))
    shown = [form[name] for name in DEFAULTED_FIELDS]
    assert shown == [values[name] for name in DEFAULTED_FIELDS]
    arguments = ("txt2img", BASE, [], info["prompt"], defaults, *shown)
    with_lora, *updates = events.apply_defaults(*arguments)
    assert with_lora["steps"] == 4
    assert updates == [gr.skip()] * len(DEFAULTED_FIELDS)


@pytest.mark.slow
def test_an_image_of_a_refiner_fills_the_form_and_replays(backend, events):
    assert list(backend.library.list_addons("refiner")) == [REFINER]
    changes = {"refiner": REFINER, "refiner_start": 0.5, "original_size": "512,768"}
    progress = Progress()
    backend.generate(make_request(backend, BASE, **changes), progress)
    info = progress.infos[0]
    assert (info["refiner"]["path"], info["refiner_start"]) == (REFINER, 0.5)
    assert info["request"]["refiner"] == REFINER
    assert backend._model_cache.count == 2
    fields = events.forms["txt2img"].common_fields
    filled = dict(zip(fields, events.fill_fields(info, None, {}), strict=False))
    assert filled.items() >= (changes | {"prompt_2": "", "steps": 4, "width": 64}).items()
    assert backend.replay(info["path"], Progress()) == "identical"


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (BASE, {"refiner": "../secret.ckpt"}, "unknown refiner"),
        (BASE, {"refiner": REFINER, "width": 72}, "width 72 is not a positive multiple of 64"),
        (BASE, {"crop": "left"}, "is not TOP,LEFT"),
        (REFINER, {}, "txt2img needs a text-to-image model"),
    ],
)
def test_unsuitable_models_and_values_are_refused(backend, model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_request(backend, model, **changes)


def test_fields_of_sdxl_are_ignored_for_other_models(backend):
    changes = {"refiner": REFINER, "crop": "8,8", "aesthetic_score": "7"}
    plain = make_request(backend, "demo.safetensors", **changes)
    assert plain.sdxl == TXT2IMG.build_request().sdxl
    without_refiner = make_request(backend, BASE, **changes | {"refiner": ""}).sdxl
    assert (without_refiner.crop, without_refiner.aesthetic_score) == ((8, 8), None)
