"""Page: what a page asks for each task, what the answers mean, and how it shows a run.

TASKS, table      task -> names of fields -> component and settings     no toolkit is imported
told              answers -> flags of the task's script                  pictures become uploads
show, about       a run, the info of a picture -> HTML, text
"""

import base64
import html
import io
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.app.progress import Live
from ldm.app.studio import Limits, Uploads
from ldm.generate import flags

# Every task: the label of its tab and its fields; pictures that are sent to it go to the first.
PROMPTS = "prompt negative_prompt lora"
TASKS = {
    "txt2img": ("Text to image", PROMPTS),
    "img2img": ("Image to image", f"init_img {PROMPTS} strength"),
    "inpaint": ("Inpaint", f"sketch {PROMPTS} strength mask_grow mask_blur"),
    "depth2img": ("Depth", f"init_img depth_map {PROMPTS} depth_inverted strength"),
    "upscale": ("Upscale", f"init_img {PROMPTS} noise_on_picture"),
    "unclip": ("Variations", f"pictures {PROMPTS} weight noise_on_seen"),
}
SAMPLING = "steps scale n_samples n_iter W H seed sampler spacing ddim_eta tile"
EXAMPLE = "a 3d emoji of a red apple on a blue background"
CSS = """
.gradio-container { max-width: 1400px !important }
.tab-container button { padding: 0 9px }
#live { min-height: 4.5em }
#live img { width: 100%; max-height: 420px; object-fit: contain; border-radius: 6px }
#live .bar { height: 6px; margin: 8px 0; border-radius: 3px }
#live .bar { background: var(--border-color-primary) }
#live .bar div { height: 100%; border-radius: 3px; background: var(--color-accent) }
#live .failed { color: var(--error-text-color, #b91c1c) }
#report textarea, #facts textarea, #about textarea { font: 12px/1.5 var(--font-mono) }
"""
OWN = "the sampler's own"
SEEDS = 1 << 31
# Fields of one number where 0 stands for "not given".
OPTIONAL = ("W", "H", "tile", "scale")


def table(limits: Limits, loras: Sequence[str] = ()) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every field: the kind of component, and its settings.

    loras: what the field of these offers, `NAME:WEIGHT`; all of them are chosen.
    """
    side = {"precision": 0, "value": 0, "minimum": 0, "maximum": limits.side, "step": 8}
    own = {"info": "0: its own"}
    whole = {"minimum": 0, "step": 1, "precision": 0}
    some = whole | {"minimum": 1}
    share = {"minimum": 0, "maximum": 1, "step": 0.01}
    steps = {"maximum": limits.steps, "value": min(25, limits.steps)}
    count = {"maximum": limits.batch, "value": min(2, limits.batch)}
    seed = {"precision": 0, "minimum": -1, "maximum": SEEDS, "value": -1, "info": "-1: any"}
    trust = {"maximum": 349, "value": 20, "info": "more invents more"}
    loose = {"maximum": 999, "value": 0, "info": "more varies more"}
    several = {"type": "filepath", "height": 260, "interactive": True, "columns": 3}
    box = {"type": "filepath", "height": 260, "image_mode": None}
    box |= {"sources": ["upload", "clipboard"]}
    drawing = {"type": "pil", "height": 460, "image_mode": "RGBA"}
    drawing |= {"layers": False, "transforms": (), "sources": ["upload", "clipboard"]}
    text = {"max_length": 1000, "value": ""}
    guide = {"minimum": 0, "maximum": 30, "step": 0.5, "value": 0, "info": "0: as suits the model"}
    chips = {"choices": list(loras), "value": list(loras), "visible": bool(loras)}
    chips |= {"multiselect": True, "allow_custom_value": True}
    fields: dict[str, tuple[str, str, dict[str, Any]]] = {
        "prompt": ("Textbox", "Prompt", text | {"lines": 2, "placeholder": EXAMPLE}),
        "negative_prompt": ("Textbox", "Stay away from", text),
        "init_img": ("Image", "Picture", box),
        "lora": ("Dropdown", "LoRA", chips | {"info": "NAME:WEIGHT; other weights can be typed"}),
        "pictures": ("Gallery", "Pictures to see", several),
        "sketch": ("ImageEditor", "Picture: paint over what is to be made anew", drawing),
        "made": ("Image", "A picture that was made here", box),
        "depth_map": ("Image", "Depth map: your own, or estimated", box),
        "depth_inverted": ("Checkbox", "In the map, white is far", {}),
        "strength": ("Slider", "Strength", share | {"info": "0 keeps the picture, 1 forgets it"}),
        "mask_grow": ("Slider", "Grow the mask", whole | {"maximum": 64}),
        "mask_blur": ("Slider", "Soften its edge", whole | {"maximum": 64}),
        "weight": ("Textbox", "Weights of the pictures", text | {"placeholder": "2, 1"}),
        "noise_on_picture": ("Slider", "Noise on the picture", whole | trust),
        "noise_on_seen": ("Slider", "Noise on what is seen", whole | loose),
        "steps": ("Slider", "Steps", some | steps),
        "scale": ("Slider", "Guidance", guide),
        "n_samples": ("Slider", "Pictures at once", some | count),
        "n_iter": ("Slider", "How often", some | {"maximum": limits.batches, "value": 1}),
        "W": ("Number", "Width", side | own),
        "H": ("Number", "Height", side | own),
        "seed": ("Number", "Seed", seed),
        "sampler": ("Dropdown", "Sampler", {"choices": list(flags.SAMPLERS), "value": "ddim"}),
        "spacing": (
            "Dropdown",
            "Spacing of steps",
            {"choices": [OWN, *flags.SPACINGS], "value": OWN},
        ),
        "ddim_eta": ("Slider", "Fresh noise (eta)", share | {"value": 0}),
        "tile": ("Number", "Tile", side | {"maximum": 4096, "step": 64, "info": "pixels; 0: none"}),
    }
    return {name: (kind, {"label": label} | more) for name, (kind, label, more) in fields.items()}


def told(answers: Mapping[str, Any], uploads: Uploads) -> dict[str, Any]:
    """The flags that the answers of one task are.

    Raises ValueError about an answer, FileNotFoundError or ValueError about a picture.
    """
    flags: dict[str, Any] = {k: v or None if k in OPTIONAL else v for k, v in answers.items()}
    is_any = flags["seed"] is None or flags["seed"] < 0
    flags["seed"] = secrets.randbelow(SEEDS) if is_any else flags["seed"]
    flags["spacing"] = None if flags["spacing"] == OWN else flags["spacing"]
    if "noise_on_picture" in flags:
        flags["noise_level"] = flags.pop("noise_on_picture")
    if "noise_on_seen" in flags:
        flags["noise_level"] = [flags.pop("noise_on_seen")]
        flags["weight"] = _numbers(flags["weight"])
        flags["init_img"] = [uploads.keep(path) for path, _ in flags.pop("pictures") or ()]
    for name in ("init_img", "depth_map"):
        if isinstance(flags.get(name), str):
            flags[name] = uploads.keep(flags[name])
    if "sketch" in flags:
        flags |= _painted(flags.pop("sketch"), uploads)
    if not flags.get("init_img", True):
        raise ValueError("there is no picture: put one in, or send one from the results")
    return flags


def show(live: Live) -> str:
    """A run as HTML: how far it is, how it stands, and what it will look like."""
    kind = "failed" if live.failed else "message"
    shown = f'<div class="bar"><div style="width: {live.share:.1%}"></div></div>'
    shown += f'<div class="{kind}">{html.escape(live.message)}</div>'
    preview = live.preview
    if preview is None:
        return shown
    buffer = io.BytesIO()
    preview.resize((4 * preview.width, 4 * preview.height)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'{shown}<img alt="preview" src="data:image/png;base64,{data}">'


def about(info: Mapping[str, Any]) -> str:
    """The info of a picture for people."""
    from ldm.imaging.metadata import parameters_text

    return parameters_text(info) or "it does not say how it was made"


def about_file(path: str | None) -> str:
    """The same of a picture in a file."""
    from ldm.imaging.metadata import read_info

    try:
        return "" if path is None else about(read_info(path))
    except OSError:
        return "this is no picture"


def _numbers(text: str) -> list[float] | None:
    words = text.replace(",", " ").split()
    try:
        return [float(word) for word in words] or None
    except ValueError as error:
        raise ValueError(f"`{text}` are not weights, such as 2, 1") from error


def _painted(sketch: "Mapping[str, Any] | None", uploads: Uploads) -> dict[str, Any]:
    """Picture and mask of a sketch: where anything was painted over the background."""
    from PIL import Image, ImageChops

    if sketch is None or sketch["background"] is None:
        return {"init_img": None}
    picture: Image.Image = sketch["background"]
    mask = Image.new("L", picture.size)
    for layer in sketch["layers"]:
        alpha = layer.getchannel("A").resize(picture.size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 * (value > 127)))
    if mask.getbbox() is None:
        raise ValueError("nothing is painted over: paint over what is to be made anew")
    kept = uploads.keep_drawn(picture.convert("RGB"))
    return {"init_img": kept, "mask": uploads.keep_drawn(mask)}
