"""Build the components of the page: a tab for each task, shared prompts and settings, output."""

import html
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr

from ldm.app.form import (
    DEFAULTED_FIELDS,
    IMAGE_KWARGS,
    LORA_SLOTS,
    MAX_SLIDER_WEIGHT,
    MODEL_VAE,
    SETTINGS,
    Field,
    TaskForm,
)
from ldm.app.view import render_progress
from ldm.generate.tasks import PAGE_TASKS
from ldm.runtime.version import __version__

__all__ = ["Layout"]

SDXL_ROWS = (
    ("prompt_2",), ("negative_prompt_2",),
    ("original_size", "target_size"), ("crop", "aesthetic_score"),
    ("negative_original_size", "negative_target_size"),
    ("negative_crop", "negative_aesthetic_score"),
)  # fmt: skip
INFO_TABS = {"replay": "PNG Info", "inspect": "Checkpoint info"}


class Layout:
    """All components, created in the `gr.Blocks` whose context is entered.

    Args:
        forms: The form of each task by its name.
        device: Name of the device, for the title.
    """

    def __init__(self, forms: dict[str, TaskForm], device: str) -> None:
        self.forms = forms
        self.device = device
        self.fields: dict[str, Any] = {}  # by NAME if shared, else by TASK.NAME
        self.tab_image_fields: dict[str, Any] = {}  # the first image field of each tab
        self.token_counts: dict[str, Any] = {}  # by name of the prompt
        self.visitor = gr.BrowserState("", storage_key="ldm-visitor", secret="ldm")
        self.stored_form = gr.Textbox(visible="hidden")  # JSON of the form in the browser's storage
        self.task = gr.Textbox("txt2img", visible="hidden", elem_id="task")
        self.sketch_size = gr.Textbox(visible="hidden", elem_id="sketch-size")
        self.job = gr.State(None)
        self.infos = gr.State([])  # of the images in the gallery
        self.selected_info = gr.State(None)  # of the image selected in the gallery
        self.file_info = gr.State({})
        initial = forms["txt2img"].setting_fields
        # The defaults that DEFAULTED_FIELDS were set to last.
        self.defaults = gr.State({n: initial[n].kwargs["value"] for n in DEFAULTED_FIELDS})
        self._build_header()
        with gr.Column(elem_id="main"):
            with gr.Tabs(elem_id="tabs"):
                for name in PAGE_TASKS:
                    self._build_task(name)
                self._build_replay()
                self._build_inspect()
            self._build_prompts()
            self._build_settings()
            self._build_output()

    @property
    def image_fields(self) -> list[Any]:
        """The image fields of all tabs."""
        return [
            self.fields[f"{task}.{key}"]
            for task, form in self.forms.items()
            for key in form.image_fields
        ]

    @property
    def filled_fields(self) -> list[Any]:
        """The components that `FormEvents.fill_fields` updates."""
        fields = [self.fields[name] for name in self.forms["txt2img"].common_fields]
        return [*fields, self.loras, *self.weights, self.error, self.defaults]

    @property
    def stored_fields(self) -> dict[str, Any]:
        """The fields that the browser stores, by name: all but images."""
        images = self.image_fields
        stored = {name: field for name, field in self.fields.items() if field not in images}
        stored |= {"checkpoint": self.checkpoint, "vae": self.vae, "loras": self.loras}
        return stored | {f"weight{k}": slider for k, slider in enumerate(self.weights)}

    def _build_header(self) -> None:
        with gr.Row(elem_id="header"):
            gr.HTML(
                f"<h1>ldm {__version__} <small>on {html.escape(self.device)}</small></h1>",
                elem_classes="title",
            )
            self.checkpoint = gr.Dropdown([], label="Checkpoint", scale=3, elem_id="checkpoint")
            self.refresh_button = gr.Button("⟳", elem_classes="icon", elem_id="refresh")
            self.vae = gr.Dropdown([MODEL_VAE], value="", label="VAE", scale=1, elem_id="vae")
        for field in (self.checkpoint, self.vae):
            _disable_checks(field)
        self.checkpoint_error = gr.HTML(elem_id="checkpoint-error")
        self.suitable_checkpoints = gr.Radio(
            [], label="Checkpoints for this tab", visible=False, elem_id="suitable-checkpoints"
        )
        _disable_checks(self.suitable_checkpoints)

    def _build_task(self, name: str) -> None:
        form = self.forms[name]
        with gr.Tab(PAGE_TASKS[name].title, id=name, elem_id=f"tab-{name}") as tab:
            for key, field in form.own_fields.items():
                self.fields[f"{name}.{key}"] = _make_component(field)
            if form.image_fields:
                self.tab_image_fields[name] = self.fields[f"{name}.{next(iter(form.image_fields))}"]
            if "sketch" in form.image_fields:
                self.fields[f"{name}.sketch"] = gr.Gallery(type="filepath", visible="hidden")
            if "depth_map" in form.image_fields:
                self.estimate_button = gr.Button("Estimate depth", elem_id="estimate")
        self._connect_tab(tab, name)

    def _build_replay(self) -> None:
        with gr.Tab(INFO_TABS["replay"], id="replay", elem_id="tab-replay") as tab:
            field = Field("Image", {"label": "Image", **IMAGE_KWARGS})
            self.tab_image_fields["replay"] = _make_component(field)
            self.file_parameters = gr.Textbox(
                label="Parameters", lines=4, elem_id="file-parameters", interactive=False,
                buttons=["copy"],
            )  # fmt: skip
            with gr.Row(elem_id="file-send"):
                self.file_send_buttons = {
                    name: _make_send_button(name, "file-send") for name in PAGE_TASKS
                }
            self.replay_button = gr.Button(
                "Reproduce", variant="primary", interactive=False, elem_id="go-replay"
            )
        self._connect_tab(tab, "replay")

    def _build_inspect(self) -> None:
        with gr.Tab(INFO_TABS["inspect"], id="inspect", elem_id="tab-inspect") as tab:
            self.file = _disable_checks(gr.Dropdown([], label="File", elem_id="file"))
            self.inspect_button = gr.Button("Inspect", variant="primary", elem_id="go-inspect")
            self.report = gr.Textbox(label="Report", lines=18, elem_id="report", buttons=["copy"])
            self.skipped = gr.Markdown()
        self._connect_tab(tab, "inspect")

    def _build_prompts(self) -> None:
        fields = self.forms["txt2img"].prompt_fields
        with gr.Row(elem_id="prompts"):
            with gr.Column(scale=5, min_width=260):
                for name, elem_id in {"prompt": "prompt", "negative_prompt": "negative"}.items():
                    with gr.Column(elem_classes="counted"):
                        self.fields[name] = _make_component(fields[name], elem_id=elem_id)
                        self.token_counts[name] = gr.HTML(elem_id=f"{elem_id}-tokens")
            with gr.Column(scale=1, min_width=180):
                self.generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Row(elem_classes="tools"):
                    self.stop_button = gr.Button(
                        "Stop", size="sm", interactive=False, elem_id="stop"
                    )
                    self.paste_button = gr.Button("↙ Paste", size="sm", elem_id="paste")
                self.fields["syntax"] = _make_component(fields["syntax"], elem_id="syntax")

    def _build_settings(self) -> None:
        fields = self.forms["txt2img"].setting_fields
        rows = (("sampler", "steps"), ("scheduler", "scale"), ("n_iter", "n_samples"))
        advanced = SETTINGS[SETTINGS.index("eta") :]
        with gr.Column(elem_id="settings"), gr.Accordion("Generation settings", open=True):
            for names in rows:
                with gr.Row():
                    for name in names:
                        self.fields[name] = _make_component(fields[name], min_width=150)
                if names[0] == "scheduler":
                    self._build_size(fields)
            with gr.Row(elem_classes="tools"):
                self.fields["seed"] = _make_component(fields["seed"], min_width=120)
                self.random_seed_button = gr.Button("⚂", elem_classes="icon", elem_id="random-seed")
                self.reuse_seed_icon = gr.Button(
                    "♻", elem_classes="icon", elem_id="reuse-seed-icon"
                )
            with gr.Row():
                self.loras = gr.Dropdown(
                    [], multiselect=True, label="LoRA", elem_id="lora", min_width=150,
                    max_choices=LORA_SLOTS, info="type to search",
                )  # fmt: skip
                self.embedding_tokens = gr.Dropdown(
                    [], label="Embedding", elem_id="embedding", value=None, min_width=150,
                    info="is added to the prompt",
                )  # fmt: skip
            self.weights = [
                _disable_checks(
                    gr.Slider(-MAX_SLIDER_WEIGHT, MAX_SLIDER_WEIGHT, 1.0, step=0.05, visible=False)
                )
                for _ in range(LORA_SLOTS)
            ]
            for field in (self.loras, self.embedding_tokens):
                _disable_checks(field)
            self._build_sdxl()
            self._build_upscaling()
            with gr.Accordion("Advanced", open=False), gr.Row(elem_id="advanced"):
                for name in advanced:
                    self.fields[name] = _make_component(fields[name], min_width=150)

    def _build_sdxl(self) -> None:
        fields = self.forms["txt2img"].sdxl_fields
        with gr.Accordion("SDXL", open=True, visible=False, elem_id="sdxl") as self.sdxl:
            for name in ("refiner", "refiner_start"):
                self.fields[name] = _make_component(fields[name])
            with gr.Accordion("Second prompts, sizes and scores", open=False):
                for names in SDXL_ROWS:
                    with gr.Row():
                        for name in names:
                            self.fields[name] = _make_component(fields[name], min_width=150)

    def _build_upscaling(self) -> None:
        fields = self.forms["txt2img"].upscaling_fields
        accordion = gr.Accordion("Twice the size", open=False, visible=False, elem_id="upscaling")
        with accordion as self.upscaling, gr.Row():
            for name, field in fields.items():
                self.fields[name] = _make_component(field, min_width=150)

    def _build_size(self, fields: dict[str, Field]) -> None:
        with gr.Row(elem_id="size", elem_classes="tools"):
            self.fields["width"] = _make_component(fields["width"], min_width=100)
            swap = gr.Button("⇅", elem_classes="icon", elem_id="swap")
            self.fields["height"] = _make_component(fields["height"], min_width=100)
        size = [self.fields["width"], self.fields["height"]]
        swap.click(None, size, size, js="(width, height) => [height, width]")

    def _build_output(self) -> None:
        with gr.Column(elem_id="output"):
            with gr.Column(elem_id="status"):
                self.error = gr.HTML(elem_id="error")
                gr.HTML('<div id="browser-note" class="alert" role="alert"></div>')
                self.progress = gr.HTML(render_progress(None), elem_id="progress")
                self.queue = gr.HTML(elem_id="queue")
                self.clear_button = gr.Button(
                    "Clear queue", size="sm", visible=False, elem_id="clear"
                )
            with gr.Column(elem_id="stage"):
                self.gallery = gr.Gallery(
                    label="Output", columns=4, object_fit="contain", interactive=False,
                    buttons=["download", "fullscreen"], elem_id="gallery",
                )  # fmt: skip
                self.preview = gr.HTML(elem_id="preview")
            with gr.Column(elem_id="side"):
                self.relief = gr.Model3D(
                    label="Relief", visible="hidden", height=360, elem_id="relief",
                    camera_position=(75, 75, None),
                )  # fmt: skip
                self.parameters = gr.Textbox(
                    label="Generation parameters", lines=3, elem_id="parameters", interactive=False,
                    buttons=["copy"],
                )  # fmt: skip
                with gr.Row(elem_id="send"):
                    self.send_buttons = {
                        name: _make_send_button(name) for name in self.tab_image_fields
                    }
                with gr.Row(elem_classes="tools"):
                    self.reuse_all_button = _make_button("Reuse all", "reuse-all")
                    self.reuse_seed_button = _make_button("Reuse seed", "reuse-seed")
                    self.download_button = _make_button("Download all", "download-all")
                    self.archive = gr.DownloadButton(visible="hidden", elem_id="archive")

    def _connect_tab(self, tab: gr.Tab, name: str) -> None:
        css_tab = name if name in PAGE_TASKS else "info"  # see page.css
        js = f"() => {{ document.body.dataset.tab = '{css_tab}'; return '{name}' }}"
        tab.select(None, None, self.task, js=js)


def _make_component(field: Field, **kwargs: Any) -> Any:
    if field.component == "ImageEditor":
        kwargs["brush"] = gr.Brush(colors=["#ff40ff"])
    component = getattr(gr, field.component)(**field.kwargs, **kwargs)
    if field.component == "Image":  # pass the path, as our reader has clearer errors than gradio
        return _set_preprocess(component, lambda data: data and data.path)
    keeps_checks = field.component in ("ImageEditor", "Gallery")
    return component if keeps_checks else _disable_checks(component)


def _disable_checks(component: Any) -> Any:
    """Disable gradio's checks of a field, as `Limits` and options have one-line errors."""
    return _set_preprocess(component, lambda value: value)


def _set_preprocess(component: Any, preprocess: Callable[[Any], Any]) -> Any:
    """Replace `preprocess` in a subclass, as gradio makes a new component of it at each update."""
    parent = type(component)
    attributes = {"preprocess": staticmethod(preprocess), "__module__": parent.__module__}
    # Not type(parent)(...), as gradio's metaclass writes a .pyi file beside the class.
    component.__class__ = ABCMeta.__new__(type(parent), parent.__name__, (parent,), attributes)
    return component


def _make_send_button(name: str, prefix: str = "send") -> gr.Button:
    title = PAGE_TASKS[name].title if name in PAGE_TASKS else INFO_TABS[name]
    return _make_button(title, f"{prefix}-{name}")


def _make_button(title: str, elem_id: str) -> gr.Button:
    """Return a button that is disabled until there is an image."""
    return gr.Button(title, size="sm", interactive=False, elem_id=elem_id)
