"""Inputs: what the flags of a task name on disk, as what its pipeline takes; and back.

flags -> read -> keywords of the pipeline          before the model is loaded, so errors are early
flags -> describe -> info in the PNG -> restore    paths and hashes of files, so a replay is sure
"""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.runtime.ranks import rank_and_world_size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion

# Flags of a task that a picture records: files, and all others.
FILES = {
    "txt2img": (),
    "img2img": ("init_img",),
    "inpaint": ("init_img", "mask"),
    "depth2img": ("init_img", "depth_map", "midas"),
    "upscale": ("init_img",),
    "unclip": ("init_img", "prior", "clip_stats"),
}
OTHERS = {
    "txt2img": (),
    "img2img": ("strength",),
    "inpaint": ("strength", "mask_box", "mask_grow", "mask_blur", "no_composite"),
    "depth2img": ("strength", "depth_inverted"),
    "upscale": ("noise_level",),
    "unclip": ("weight", "noise_level", "mix_noise_level", "prior_steps", "prior_scale"),
}
PRIOR_SEED = 1 << 32  # apart from the seeds of pictures


def read(args: Namespace) -> dict[str, Any]:
    """The keywords that the task's pipeline takes beyond the common ones.

    Raises FileNotFoundError or ValueError about a file.
    """
    if args.task == "unclip":
        return _seen(args)
    if args.task == "txt2img":
        return {}
    told: dict[str, Any] = {"image": _image(args, _picture(args.init_img))}
    if args.task == "upscale":
        return told | {"noise_level": args.noise_level}
    told["strength"] = args.strength
    if args.task == "inpaint":
        told |= {"mask": _mask(args), "composite": not args.no_composite}
    if args.task == "depth2img" and args.depth_map:
        from ldm.imaging.reading import load_depth

        told["depth"] = load_depth(args.depth_map, inverted=args.depth_inverted)
    return told


def pairs(args: Namespace) -> list[tuple[str | None, str | None]]:
    """(picture, mask) of every run: those of the flags, or X.png with X_mask.png of a folder.

    Of a folder, several processes take a share of the pairs each.
    Raises FileNotFoundError if there is none, or a picture is lacking.
    """
    if args.indir is None:
        return [(args.init_img, args.mask)]
    masks = sorted(Path(args.indir).expanduser().glob("*_mask.png"))
    found = [(mask.with_name(mask.name.removesuffix("_mask.png") + ".png"), mask) for mask in masks]
    if not found:
        raise FileNotFoundError(f"no pairs X.png and X_mask.png in `{args.indir}`")
    for picture, mask in found:
        if not picture.is_file():
            raise FileNotFoundError(f"no picture `{picture}` for the mask `{mask}`")
    rank, ranks = rank_and_world_size()
    return [(str(picture), str(mask)) for picture, mask in found[rank::ranks]]


def pipeline(
    args: Namespace, model: "LatentDiffusion", told: dict[str, Any]
) -> Callable[..., "Tensor"]:
    """The pipeline of the task, for this model; `args.size` becomes that of its pictures."""
    from ldm import pipelines

    if "image" in told:
        factor = model.downscale if args.task == "upscale" else 1
        height, width = told["image"].shape[-2:]
        args.size = (height * factor, width * factor)
    if args.task != "unclip":
        return getattr(pipelines, args.task)
    if not told["images"] and not args.prior:
        raise ValueError("there is nothing to see: give a picture (--image), or a prior (--prior)")
    if "jpg" in model.conditioner.keys:
        for key in ("noise_levels", "mix_level"):
            del told[key]
        return pipelines.vary
    return _with_prior(args, model) if args.prior else pipelines.unclip


def kept(told: dict[str, Any]) -> tuple["Image.Image", "Image.Image"] | None:
    """The picture whose known pixels must stay as they are, and where it is painted anew."""
    if not told.get("composite"):
        return None
    from PIL import Image

    from ldm.imaging.pixels import to_pil

    painted = (told["mask"][0, 0] > 0).numpy()
    return to_pil(told["image"])[0], Image.fromarray(painted)


def describe(args: Namespace) -> dict[str, Any]:
    """What a picture says about its inputs."""
    info: dict[str, Any] = {flag: getattr(args, flag) for flag in OTHERS[args.task]}
    if not FILES[args.task]:
        return info
    files = {flag: _paths(getattr(args, flag)) for flag in FILES[args.task]}
    info["inputs"] = {
        flag: [{"path": str(Path(path).resolve()), "sha256": _digest(path)} for path in paths]
        for flag, paths in files.items()
    }
    return info | {"fit": [args.H, args.W]}


def restore(info: Mapping[str, Any], made: Namespace) -> None:
    """Sets the flags that `describe` recorded.

    Raises FileNotFoundError or ValueError if a file is gone or is not what it was.
    """
    for flag in OTHERS[made.task]:
        value = info.get(flag)
        setattr(made, flag, tuple(value) if flag == "mask_box" and value else value)
    recorded = info.get("inputs", {})
    for flag in FILES[made.task]:
        files = recorded.get(flag, [])
        for file in files:
            if not Path(file["path"]).is_file():
                raise FileNotFoundError(f"made from `{file['path']}`, which is not there")
            if _digest(file["path"]) != file["sha256"]:
                raise ValueError(f"`{file['path']}` is not the file it was made from any more")
        paths = [file["path"] for file in files]
        is_list = made.task == "unclip" and flag == "init_img"
        setattr(made, flag, paths if is_list else paths[0] if paths else None)
    if "fit" in info:
        made.H, made.W = info["fit"]


def _picture(path: str | None) -> "Image.Image":
    from ldm.imaging.reading import load_image

    if path is None:
        raise ValueError("which picture? say it with --init-img FILE")
    return load_image(path)


def _image(args: Namespace, picture: "Image.Image") -> "Tensor":
    """The picture at the size that the flags ask for, (1, 3, H, W)."""
    from ldm.imaging.pixels import to_tensor

    return to_tensor(_sized(args, picture))


def _sized(args: Namespace, picture: "Image.Image") -> "Image.Image":
    from ldm.imaging.pixels import resize_to_multiple, scale_and_crop

    if "size" in args.legacy and args.task != "upscale":
        return resize_to_multiple(picture, 64)
    return scale_and_crop(picture, (args.H, args.W))


def _mask(args: Namespace) -> "Tensor":
    """(1, 1, H, W) in [0, 1]; 1 = paint anew."""
    from ldm.imaging.pixels import to_tensor
    from ldm.imaging.reading import make_mask

    grow, blur = args.mask_grow, args.mask_blur
    mask = make_mask(args.init_img, args.mask, args.mask_box, grow=grow, blur=blur)
    return (to_tensor(_sized(args, mask))[:, :1] + 1) / 2


def _seen(args: Namespace) -> dict[str, Any]:
    from ldm.imaging.pixels import to_tensor

    images = [to_tensor(_picture(path)) for path in args.init_img or []]
    levels: list[int] = args.noise_level or [0]
    return {
        "images": images,
        "weights": args.weight,
        "noise_levels": levels[0] if len(levels) == 1 else levels,
        "mix_level": args.mix_noise_level,
    }


def _with_prior(args: Namespace, model: "LatentDiffusion") -> Callable[..., "Tensor"]:
    """unclip, with what the prior imagines of each prompt beside the pictures."""
    from ldm import pipelines
    from ldm.loading.addons.karlo import load_prior

    prior = load_prior(args.prior, device=model.device, dtype=model.dtype)
    numbers: dict[str, Any] = {"steps": args.prior_steps, "scale": args.prior_scale}
    numbers = {name: number for name, number in numbers.items() if number is not None}

    def imagining(model: Any, prompts: list[str], *rest: Any, **options: Any) -> "Tensor":
        noise = pipelines.seeded_noise([seed + PRIOR_SEED for seed in options["seeds"]])
        negative = options["negative_prompt"]
        seen = pipelines.imagined(
            model, prior, prompts, negative_prompt=negative, noise=noise, **numbers
        )
        return pipelines.unclip(model, prompts, *rest, embeddings=[seen], **options)

    return imagining


def _paths(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _digest(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
