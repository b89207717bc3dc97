"""Read and write generation parameters of images: A1111's `parameters` text, and JSON of our own.

Other programs read the text; `ldm replay` reads the JSON, key `ldm`, which is complete. The info of
an image is a plain dict; `format_parameters` uses these keys, all optional:

    prompt, negative_prompt, seed, sampler, scheduler, scheduler_in_use, rho, sigmas, steps, scale,
    eta, s_churn, s_tmin, s_tmax, s_noise, brownian,
    size (height, width), strength, checkpoint (name), checkpoint_hash, ldm (version),
    mask_box, mask_grow, mask_blur, noise_level, mix_noise_level, weight (of each image),
    clip_skip, tiling, depth_range (lowest and highest of 0 … 65535),
    prompt_2, negative_prompt_2, original_size, crop, target_size and aesthetic_score (also
    negative_ ones), refiner_strength or refiner_start, sld, sld_concept, apg, perp_neg, pag,
    freeu, freeu_version, syntax,
    safety (flagged, concepts, special, scores, special_scores, action),
    vae, refiner, loras and embeddings (each file a dict with path and hash; a LoRA's with weight
    and a1111_hash, a refiner's with ema if its EMA weights were used)

The JSON contains these and all others (legacy, watermark, config, config_hash, dtype, device,
torch, sha256_unmarked …), and `sha256`, the hash of the pixels in the file.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from ldm.diffusion.names import SAMPLERS, SCHEDULERS, SLD_CONCEPTS
from ldm.imaging.reading import open_image
from ldm.prompts.a1111 import EMPHASIS_MODES
from ldm.runtime.files import disk_errors_about
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "format_parameters", "hash_pixels", "parse_parameters", "parse_sampler", "read_info",
    "write_png",
]  # fmt: skip

JSON_KEY = "ldm"
FIXED_SCHEDULE_SAMPLERS = ("ddim", "plms", "unipc")  # A1111 ignores the schedule type for these


def _format_value(value: object) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _format_file(file: Mapping[str, str]) -> str:
    return f"{PurePath(file['path']).stem} [{file['hash']}]"


def _parse_file(text: str) -> dict[str, str | None]:
    match = re.fullmatch(r"(.+?)(?: \[([0-9a-f]+)\])?", text)
    if match is None:
        raise ValueError(f"`{text}` is not a name and a hash")
    return {"path": match[1], "hash": match[2]}


def _format_hashes(files: Iterable[Mapping[str, str]], key: str) -> str:
    hashes = ((PurePath(file["path"]).stem, file.get(key)) for file in files)
    return ", ".join(f"{name}: {digest}" for name, digest in hashes if digest)


def _parse_two_integers(text: str) -> list[int]:
    first, second = text.split(",")
    return [int(first), int(second)]


def _parse_size(text: str) -> list[int]:
    width, height = text.split("x")
    return [int(height), int(width)]


def _parse_numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _find_concept_name(text: str) -> str:
    """Return the key of a text in SLD_CONCEPTS, else the text itself."""
    return next((name for name, concept in SLD_CONCEPTS.items() if concept == text), text)


def _get_sampler_label(name: str) -> str:
    """Return A1111's name of a sampler; `dpm`, a variant of `dpmpp_2m`, has the same name."""
    spec = SAMPLERS.get(name)
    if spec is None:
        return name
    return SAMPLERS[spec.function_name].label if spec.function_name in SAMPLERS else spec.label


def _get_emphasis(syntax: str) -> str:
    """Return A1111's mode of emphasis, "" if it is the default."""
    return "" if syntax == "a1111" else EMPHASIS_MODES.get(syntax, "")


def _format_safety(safety: JsonMapping) -> str:
    """Format the result of the safety checker: flagged or passed, highest score, action."""
    action = f", {safety['action']}" if safety.get("action") else ""
    return f"{'flagged' if safety['flagged'] else 'passed'} {max(safety['scores']):+.3f}{action}"


class Setting(NamedTuple):
    """A setting in A1111's text.

    Args:
        key: Its key in the info.
        parse: Parses the value; None = it is only written.
        format: Formats a value that differs from the default; "" = the setting is not written.
    """

    key: str
    parse: Callable[[str], object] | None = None
    format: Callable[[Any], str] = _format_value


# Settings by their name in A1111's text, or a name of our own, in A1111's order.
SETTINGS = {
    "Steps": Setting("steps", int),
    "Sampler": Setting("sampler", None, _get_sampler_label),  # read by `parse_sampler`
    "Schedule type": Setting("schedule_type"),  # also by `parse_sampler`
    "Schedule rho": Setting("rho", float),
    "Sigmas": Setting("sigmas", _parse_numbers, lambda sigmas: ", ".join(map(repr, sigmas))),
    "CFG scale": Setting("scale", float),
    "Seed": Setting("seed", int),
    "Size": Setting("size", _parse_size, lambda size: f"{size[1]}x{size[0]}"),
    "Model hash": Setting("checkpoint_hash", str),
    "Model": Setting("checkpoint", str, lambda path: PurePath(path).stem),
    "VAE hash": Setting("vae", None, lambda vae: vae.get("hash") or ""),
    "VAE": Setting("vae", None, lambda vae: PurePath(vae["path"]).name),
    "Denoising strength": Setting("strength", float),
    "Clip skip": Setting("clip_skip", int),
    "Mask box": Setting("mask_box"),
    "Resize mode": Setting("resize_mode"),
    "Mask expand": Setting("mask_grow", int),
    "Mask blur": Setting("mask_blur", float),
    "Noise level": Setting("noise_level", int),
    "Depth range": Setting("depth_range"),
    # A1111 writes "True" for both axes.
    "Tiling": Setting("tiling", lambda text: "xy" if text == "True" else text),
    "Mix noise level": Setting("mix_noise_level"),
    "Image weights": Setting("weight"),
    "Eta": Setting("eta", float),
    "Eta DDIM": Setting("eta", float),
    "Sigma churn": Setting("s_churn", float),
    "Sigma tmin": Setting("s_tmin", float),
    "Sigma tmax": Setting("s_tmax", float),
    "Sigma noise": Setting("s_noise", float),
    "Brownian noise": Setting("brownian", lambda text: text == "True"),
    "Prompt 2": Setting("prompt_2", str),
    "Negative prompt 2": Setting("negative_prompt_2", str),
    "Original size": Setting("original_size", _parse_two_integers),
    "Crop": Setting("crop", _parse_two_integers),
    "Target size": Setting("target_size", _parse_two_integers),
    "Aesthetic score": Setting("aesthetic_score", float),
    "Negative original size": Setting("negative_original_size", _parse_two_integers),
    "Negative crop": Setting("negative_crop", _parse_two_integers),
    "Negative target size": Setting("negative_target_size", _parse_two_integers),
    "Negative aesthetic score": Setting("negative_aesthetic_score", float),
    "SLD": Setting("sld", str),
    "SLD concept": Setting("sld_concept", str, _find_concept_name),
    "Emphasis": Setting("syntax", None, _get_emphasis),
    "Prompt syntax": Setting("syntax", str),
    "APG": Setting("apg", str),
    "Perp-neg": Setting("perp_neg", float),
    "PAG scale": Setting("pag", float),
    "FreeU": Setting("freeu", str),
    "FreeU version": Setting("freeu_version", str),
    "Safety checker": Setting("safety", None, _format_safety),
    "Refiner": Setting("refiner", _parse_file, _format_file),
    "Refiner switch at": Setting("refiner_start", float),
    "Latent upscaler": Setting("upscaler", None, _format_file),
    "Noise sigma": Setting("noise_sigma"),
    "Lora hashes": Setting("loras", None, partial(_format_hashes, key="a1111_hash")),
    "TI hashes": Setting("embeddings", None, partial(_format_hashes, key="hash")),
    "Version": Setting("version", str),
}
FORMER_SETTING_NAMES = {"Mask grow": "Mask expand"}  # of version 0.1
# By key; default values are not written, nor are None, "", [] and {}.
DEFAULT_VALUES = {
    "resize_mode": "crop", "mask_grow": 0, "mask_blur": 0, "tiling": "none", "s_churn": 0,
    "s_tmin": 0, "s_noise": 1, "brownian": False, "syntax": "plain", "noise_sigma": 0,
}  # fmt: skip
DDIM_CFG_PP = "DDIM CFG++"  # A1111 divides its guidance scale by 12.5, Forge does not
LORA_TAGS = re.compile(r" ?<lora:([^<>:]*):?([^<>]*)>")  # name, weight
SETTING_PATTERN = re.compile(r'\s*(\w[^:,"]*):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')


def write_png(path: str | Path, image: Image.Image, info: JsonMapping) -> None:
    """Write an image as a PNG with its info.

    Args:
        info: See the top of this file; `sha256` is added. Sets become lists, other values that
            JSON does not support become strings.
    """
    metadata = {**info, "sha256": hash_pixels(image)}
    text = PngInfo()
    # Pillow writes tEXt for Latin-1, else iTXt; neither can encode lone surrogates.
    text.add_text("parameters", format_parameters(info).encode("utf-8", "replace").decode())
    text.add_text(JSON_KEY, json.dumps(metadata, default=_to_json))
    with disk_errors_about(path):
        image.save(path, "PNG", pnginfo=text)


def read_info(path: str | Path) -> JsonObject:
    """Read the metadata of an image file: our JSON, else A1111's text, of a PNG, JPEG or WebP.

    Returns:
        The info passed to `write_png`, with `sha256`; for files of other programs the keys at the
        top of this file, `version`, and other settings under `other`; {} without metadata.
    """
    with open_image(path) as image:
        texts = {**image.info, **getattr(image, "text", {})}
        comment = _read_user_comment(image)
    try:
        info = json.loads(texts.get(JSON_KEY, ""))
    except (ValueError, TypeError):
        info = None
    if isinstance(info, dict):
        return info
    parameters = texts.get("parameters", comment)
    return parse_parameters(parameters) if isinstance(parameters, str) else {}


def _read_user_comment(image: Image.Image) -> str | None:
    """Return the comment in the EXIF data, where A1111 writes its text into a JPEG or WebP."""
    try:
        exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
        comment: bytes = exif[ExifTags.Base.UserComment]
        is_unicode = comment.startswith(b"UNICODE\0")
        return comment[8:].decode("utf-16-be" if is_unicode else "utf-8").strip("\0")
    except Exception:  # no comment, or any error of Pillow on damaged EXIF data
        return None


def hash_pixels(image: Image.Image) -> str:
    """Return the SHA-256 of the RGB, or 16-bit gray, pixels of an image in hexadecimal."""
    pixels = image if image.mode == "I;16" else image.convert("RGB")
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def format_parameters(info: JsonMapping) -> str:
    """Format the info as A1111 does: prompt, negative prompt and one line of settings."""
    tags = [f"<lora:{PurePath(lora['path']).stem}:{_format_value(lora['weight'])}>"
            for lora in info.get("loras") or ()]  # fmt: skip
    lines = [" ".join(filter(None, [str(info.get("prompt") or ""), *tags]))]
    if info.get("negative_prompt"):
        lines.append(f"Negative prompt: {info['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in _iter_settings(info)))
    return "\n".join(line for line in lines if line)


def _iter_settings(info: JsonMapping) -> Iterator[tuple[str, str]]:
    """Yield A1111's names and values of the settings in the info, in A1111's order."""
    sampler, strength = info.get("sampler"), info.get("refiner_strength")
    spec = SAMPLERS.get(sampler or "")
    values = {
        **info,
        "schedule_type": _get_schedule_type(info),
        "version": f"ldm {info['ldm']}" if info.get("ldm") else None,
    }
    if strength is not None:
        values["refiner_start"] = round(1 - strength, 4)
    defaults = DEFAULT_VALUES | {"eta": spec.eta if spec else 0}
    skipped = ["Eta" if sampler in FIXED_SCHEDULE_SAMPLERS else "Eta DDIM"]
    if not info.get("s_churn"):
        skipped += ["Sigma tmin", "Sigma tmax"]
    for name, setting in SETTINGS.items():
        value = values.get(setting.key)
        is_default = value in (None, "", [], {}) or value == defaults.get(setting.key)
        if not is_default and name not in skipped and (text := setting.format(value)):
            yield name, text


def _parse_weight(text: str) -> float | str:
    """Parse the weight of a LoRA: a number, or the text of weights by network and block."""
    try:
        return float(text)
    except ValueError:
        return text or 1.0


def _get_schedule_type(info: JsonMapping) -> str | None:
    """Return the name of the scheduler in A1111, or a name that A1111 does not use."""
    if info.get("sigmas"):
        return None
    # Version 0.1 wrote "grid".
    name = info.get("scheduler_in_use") or info.get("scheduler") or info.get("grid")
    if name == "uniform" and info.get("sampler") in FIXED_SCHEDULE_SAMPLERS:
        return None  # in A1111 the schedule type has no effect on these
    return SCHEDULERS[name].label if name in SCHEDULERS else None


def parse_parameters(parameters: str) -> JsonObject:
    """Parse A1111's text into an info; the last line is settings if it has at least three.

    Returns:
        See `read_info`.
    """
    *prompt_lines, last_line = parameters.strip().split("\n")
    settings = SETTING_PATTERN.findall(last_line)
    if len(settings) < 3:
        prompt_lines, settings = [*prompt_lines, last_line], []
    prompt, _, negative = "\n".join(["", *prompt_lines]).partition("\nNegative prompt:")
    info: JsonObject = {"prompt": prompt[1:], "negative_prompt": negative.strip()}
    other_settings = {}
    for name, quoted in settings:
        value = _unquote(quoted)
        try:
            setting = SETTINGS.get(FORMER_SETTING_NAMES.get(name, name))
            if setting is not None and setting.parse is not None:
                info[setting.key] = setting.parse(value)
            else:
                other_settings[name] = value
        except ValueError:
            other_settings[name] = value
    is_ours = str(info.get("version")).startswith("ldm ")
    modes = {mode: name for name, mode in EMPHASIS_MODES.items()}
    syntax = modes.get(other_settings.get("Emphasis", ""), "a1111")
    if syntax != "a1111":
        del other_settings["Emphasis"]
    info.setdefault("syntax", "plain" if is_ours else syntax)
    if is_ours:
        tags = LORA_TAGS.findall(info["prompt"])
        info["loras"] = [{"path": name, "weight": _parse_weight(text)} for name, text in tags]
        info["prompt"] = LORA_TAGS.sub("", info["prompt"])
    version = str(info.get("version") or "")
    is_forge = version.startswith("f")  # "f2.0.1v1.10.1"
    if other_settings.get("Sampler") == DDIM_CFG_PP and "scale" in info and not is_forge:
        info["scale"] /= 12.5
    info |= parse_sampler(other_settings, version)
    spec = SAMPLERS.get(info.get("sampler", ""))
    if spec and spec.takes_brownian and not is_ours:
        info["brownian"] = True  # as in A1111, which uses k-diffusion's samplers
    return {**info, "other": other_settings} if other_settings else info


def parse_sampler(settings: dict[str, str], version: str) -> dict[str, str]:
    """Remove sampler and schedule type from settings, and return them as options of ours.

    A1111 before 1.9 wrote both as "Sampler".

    Args:
        settings: Value by A1111's name; changed in place.
        version: Version of the program that wrote them; unless it is ours, a missing schedule type
            means A1111's default.
    Returns:
        `sampler` and `scheduler`, as far as they are known.
    """
    is_ours = version.startswith("ldm")
    name, schedule = settings.pop("Sampler", ""), settings.get("Schedule type", "")
    schedulers = {scheduler.label: key for key, scheduler in SCHEDULERS.items()}
    # "Uniform" is k-diffusion's in A1111, but the original's in texts of our version 0.1.
    schedulers["Uniform"] = "uniform" if is_ours else "normal"
    for label in schedulers:
        if name.endswith(f" {label}"):
            name, schedule = name.removesuffix(f" {label}"), label
    options = {}
    if name:
        labels = {sampler.label: key for key, sampler in SAMPLERS.items()}
        options["sampler"] = "euler_cfg_pp" if name == DDIM_CFG_PP else labels.get(name, name)
    spec = SAMPLERS.get(options.get("sampler", ""))
    ignores_schedule = options.get("sampler") in FIXED_SCHEDULE_SAMPLERS or name == DDIM_CFG_PP
    if spec and not is_ours and (ignores_schedule or schedule in ("", "Automatic")):
        match = re.match(r"(?:.*v)?(\d+)\.(\d+)", version)
        is_before_1_9 = match is not None and (int(match[1]), int(match[2])) < (1, 9)
        # Before 1.9 these two were part of the sampler's name; a name without them means "normal".
        was_in_name = spec.a1111_scheduler in ("karras", "exponential")
        is_normal = is_before_1_9 and was_in_name
        options["scheduler"] = "normal" if is_normal else spec.a1111_scheduler
    elif schedule in schedulers:
        options["scheduler"] = schedulers[schedule]
    if "scheduler" in options:
        settings.pop("Schedule type", None)
    return options


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquote(text: str) -> str:
    try:
        return str(json.loads(text)) if text.startswith('"') else text.strip()
    except ValueError:
        return text


def _to_json(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
