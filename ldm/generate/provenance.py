"""Provenance: what a picture says about its making, and what follows from that.

    flags, model, job -> info in the PNG -> flags -> the same picture, or the reasons why not

The names in the info are those of `imaging.metadata`. It says in which row of which batch a
picture was made, because kernels round differently for other shapes.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.generate import inputs
from ldm.runtime.version import __version__

if TYPE_CHECKING:
    from PIL import Image

    from ldm.model import LatentDiffusion

Info = dict[str, Any]

Kept = tuple["Image.Image", "Image.Image"]
PRECISIONS = {"float32": "full", "float16": "fp16", "bfloat16": "bf16"}
# What may explain that a picture differs.
CAUSES = (
    *("checkpoint_hash", "ema", "config_hash", "overrides", "device", "dtype", "attention"),
    *("threads", "torch", "ldm"),
)
FILES = ("loras", "embeddings")  # lists of what a model was extended by


def describe(args: Namespace, model: "LatentDiffusion") -> Info:
    """What is the same for all pictures of a run."""
    import torch

    from ldm.imaging.watermark import SMALLEST
    from ldm.loading.files.checkpoint import file_hash

    checkpoint = model.provenance["checkpoint"]
    is_large = args.size[0] * args.size[1] >= SMALLEST
    return {
        "task": args.task,
        "sampler": args.sampler,
        "grid": args.spacing,
        "steps": args.steps,
        "eta": args.ddim_eta,
        "scale": args.scale,
        "size": list(args.size),
        **inputs.describe(args),
        "tile": args.tile,
        "legacy": sorted(args.legacy),
        "watermark": method(args) if is_large else None,
        "payload": _payload(model),
        "checkpoint": Path(checkpoint).name,
        "checkpoint_hash": file_hash(checkpoint),
        "ema": args.ema,
        "loras": model.provenance.get("loras", []),
        "embeddings": model.provenance.get("embeddings", []),
        "config": args.config,
        "config_hash": model.provenance["config_hash"],
        "overrides": list(args.overrides),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attention,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "torch": torch.__version__,
        "ldm": __version__,
    }


def method(args: Namespace) -> str | None:
    """The watermark that the flags ask for."""
    if args.no_watermark:
        return None
    return "dwtDct" if "watermark" in args.legacy else "dwtDctSvd"


def marked(
    picture: "Image.Image", info: Mapping[str, Any], keep: Kept | None = None
) -> "Image.Image":
    """The picture with the watermark that its info names.

    keep: a picture and a mask: where the mask is 0, its pixels stay without a mark.
    """
    from PIL import Image

    from ldm.imaging.watermark import PAYLOADS, mark

    if info["watermark"] is not None:
        picture = mark(picture, PAYLOADS[info["payload"]], info["watermark"])
    return picture if keep is None else Image.composite(picture, *keep)


def flags(info: Mapping[str, Any], given: Namespace) -> Namespace:
    """The flags that made a picture, as far as they are not given anew.

    given: --ckpt, --config, --device, --precision, --attention, --verbose …; None for "as it was".
    Raises ValueError if the info is not that of a single picture.
    """
    if not info:
        raise ValueError(f"{given.picture} does not say how it was made")
    if info.get("task") == "grid":
        names = ", ".join(str(image.get("file")) for image in info.get("images", [])[:3])
        raise ValueError(f"{given.picture} is a grid, replay its pictures: {names}, …")
    lacking = [key for key in ("prompt", "seed", "rows", *CAUSES) if key not in info]
    if info.get("task") not in inputs.FILES or lacking:
        what = f"`{lacking[0]}`" if lacking else "a task that is known here"
        raise ValueError(f"{given.picture} lacks {what}: it was not written by this program")
    made = Namespace(**vars(given))
    made.task = info["task"]
    made.size = tuple(info["size"])
    made.H, made.W = made.size
    inputs.restore(info, made)
    made.steps, made.sampler, made.spacing = info["steps"], info["sampler"], info["grid"]
    made.ddim_eta, made.scale, made.tile = info["eta"], info["scale"], info["tile"]
    made.seed = info["seed"]
    made.legacy = frozenset(info["legacy"])
    made.fixed_code = bool(info.get("fixed_code"))
    made.n_samples = info.get("n_samples", info["rows"])
    made.no_watermark = info["watermark"] is None
    made.ema = given.ema or info["ema"]
    made.overrides = given.overrides or info["overrides"]
    made.attention = given.attention or info["attention"]
    made.lora = getattr(given, "lora", None) or [
        (file["path"], file["weight"]) for file in _unchanged(info.get("loras", ()), "--lora")
    ]
    made.embedding = getattr(given, "embedding", None) or [
        file["path"] for file in _unchanged(info.get("embeddings", ()), "--embedding")
    ]
    made.precision = given.precision or PRECISIONS[info["dtype"]]
    made.device = given.device or _device(info["device"])
    made.ckpt, made.config = _files(info, given)
    return made


def changes(info: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may explain a difference, one line each: `torch: 2.10.0 then, 2.11.0 now`."""
    then, now = (
        {**side, **{key: _contents(side.get(key, ())) for key in FILES}} for side in (info, now)
    )
    keys = (*CAUSES, *FILES)
    return [f"{key}: {then[key]} then, {now[key]} now" for key in keys if then[key] != now[key]]


def compare(old: "Image.Image", new: "Image.Image") -> str | None:
    """By how much two pictures differ, in words; None if they do not."""
    import numpy as np

    if old.size != new.size:
        return f"the size is {old.width}x{old.height} in the file and {new.width}x{new.height} now"
    then, now = (np.asarray(picture.convert("RGB"), np.int16) for picture in (old, new))
    apart = np.abs(then - now)
    if not apart.any():
        return None
    share = (apart.max(-1) > 0).mean()
    most, mean = apart.max(), apart.mean()
    return f"{share:.2%} of the pixels differ, by {most} of 255 at most, {mean:.4f} on average"


def _contents(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells files apart: not where they are."""
    return [" ".join(str(file[key]) for key in ("hash", "weight") if key in file) for file in files]


def _payload(model: "LatentDiffusion") -> str:
    """What the original scripts of the model's family wrote."""
    text = model.conditioner.text
    return "StableDiffusionV1" if text is not None and text.generation == 1 else "SDV2"


def _unchanged(files: Sequence[Mapping[str, Any]], flag: str) -> Sequence[Mapping[str, Any]]:
    """The files of `flag` that a picture was made with, which must be what they were."""
    from ldm.loading.files.checkpoint import file_hash

    for file in files:
        hint = f"hint: say with {flag} where it is now"
        if not Path(file["path"]).is_file():
            raise FileNotFoundError(f"made with `{file['path']}`, which is not there\n{hint}")
        if file_hash(file["path"]) != file["hash"]:
            raise ValueError(f"`{file['path']}` is not the file it was made with any more\n{hint}")
    return files


def _device(name: str) -> str | None:
    """The recorded kind of device if there is one, else the automatic choice."""
    from ldm.runtime.device import pick_device

    try:
        return str(pick_device(name))
    except ValueError:
        return None


def _files(info: Mapping[str, Any], given: Namespace) -> tuple[str | None, str | None]:
    """Checkpoint and config: as given, or by the recorded names where they are usually kept."""
    from ldm.loading.load import DEMO
    from ldm.runtime.files import find_file

    config = given.config or info["config"]
    if given.ckpt is not None:
        return given.ckpt, config
    name = Path(info["checkpoint"]).name
    if name == Path(DEMO[1]).name and config is None:
        return None, None
    try:
        return str(find_file(Path("checkpoints") / name)), config
    except FileNotFoundError as error:
        hash_ = info["checkpoint_hash"]
        raise FileNotFoundError(
            f"made with {name} (hash {hash_}): say --ckpt where that is"
        ) from error
