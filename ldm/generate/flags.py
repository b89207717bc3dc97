"""Flags: the groups that scripts put their command lines together from, and how they are read.

Flags may be written with `_` or `-`, and shortened while that is unambiguous. Nothing here imports
torch, so `--help` and a misspelt flag answer at once; tests hold the lists of names to the truth.
"""

import argparse
import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

SAMPLERS = (
    *("ddim", "plms", "dpm", "euler", "euler_a", "heun"),
    *("dpmpp_2s_a", "dpmpp_2m_sde", "lms", "dpmpp_2m"),
)
SPACINGS = ("uniform", "trailing", "karras", "exponential", "time_uniform")
ATTENTION = ("xformers", "sdpa", "math")
LEGACY = (
    *("steps", "noise", "truncate", "plms-v", "x0-eps", "watermark", "size", "strength", "weights"),
)
# A shortened flag means what it meant to the original script, whatever was added since.
ORIGINAL = frozenset(
    [
        *("--help", "--prompt", "--outdir", "--steps", "--plms", "--dpm", "--fixed_code"),
        *("--ddim_eta", "--n_iter", "--H", "--W", "--C", "--f", "--n_samples", "--n_rows"),
        *("--scale", "--from-file", "--config", "--ckpt", "--seed", "--precision", "--repeat"),
        *("--device", "--torchscript", "--ipex", "--bf16", "--strength"),
    ]
)

SCALE, DEMO_SCALE = 9.0, 3.0  # the original's, and what suits the small models that ship
DEMO_SCALES = {"upscale": 1.0}  # by task, where that is another: text says little about details
# Models that ship beside the one that is for text alone, by task.
DEMOS = {
    "inpaint": "checkpoints/demo-inpainting.safetensors",
    "upscale": "checkpoints/demo-upscaler.safetensors",
}


def parser(description: str | None, *parents: ArgumentParser, **defaults: Any) -> ArgumentParser:
    """The parser of one script: its docstring, groups of flags, and its own defaults."""
    made = ArgumentParser(
        description=description,
        parents=list(parents),
        usage="%(prog)s [flags] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.set_defaults(**defaults)
    return made


def model_flags() -> ArgumentParser:
    """Which model, where and how precisely it runs."""
    parent = ArgumentParser(add_help=False)
    group = parent.add_argument_group("model", "key=value changes the YAML: model.params.x=1")
    add = group.add_argument
    add("--ckpt", metavar="FILE", help="checkpoint, .ckpt or .safetensors (the small demo model)")
    add("--config", metavar="FILE", help="YAML of the model (recognised from the checkpoint)")
    add("--ema", action="store_true", help="use the EMA weights of the checkpoint")
    add(
        "--allow-module",
        action="append",
        default=[],
        metavar="M",
        help="trust targets in package M",
    )
    adapter_flags(add)
    add("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (the first that is there)")
    add(
        "--precision",
        choices=["full", "autocast", "fp16", "bf16"],
        default="autocast",
        help="full is fp32; autocast what suits device and model (%(default)s)",
    )
    add("--bf16", dest="precision", action="store_const", const="bf16", help="--precision bf16")
    add("--attention", choices=ATTENTION, help="implementation of attention (the fastest there is)")
    add("--tile", "--vae-tile", nargs="?", type=_count, const=512, metavar="PIXELS",
        help="decode in tiles of this many pixels, to save memory (%(const)s)")  # fmt: skip
    add("--C", type=int, metavar="N", help="latent channels; the model knows")
    add("--f", type=int, metavar="N", help="downsampling factor; the model knows")
    for name in ("--torchscript", "--ipex", "--laion400m"):
        add(name, action="store_true", help="accepted and ignored")
    add("--verbose", action="store_true", help="say more, and show the traceback of an error")
    return parent


def prompt_flags() -> ArgumentParser:
    """What is to be seen."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("prompt").add_argument
    add("--prompt", nargs="?", metavar="TEXT", help="what to paint (%(default)s)")
    add("--negative-prompt", default="", metavar="TEXT", help="what to stay away from")
    add("--from-file", metavar="FILE", help="one prompt per line, blank lines too; a line may end"
        ' in --seed N and --negative-prompt "TEXT"')  # fmt: skip
    add(
        "--repeat",
        type=_count,
        default=1,
        metavar="N",
        help="use each line of the file so often (%(default)s)",
    )
    return parent


def sampling_flags() -> ArgumentParser:
    """How the picture is found."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("sampling").add_argument
    add(
        "--steps",
        "--ddim_steps",
        type=_count,
        default=50,
        metavar="N",
        help="sampling steps (%(default)s)",
    )
    add("--sampler", choices=SAMPLERS, metavar="NAME", help=f"{', '.join(SAMPLERS)} (ddim)")
    add("--plms", action="store_true", help="--sampler plms")
    add("--dpm", "--dpm_solver", action="store_true", help="--sampler dpm: DPM-Solver++ 2M")
    add(
        "--spacing",
        "--grid-spacing",
        choices=SPACINGS,
        metavar="NAME",
        help="where the steps lie: " + ", ".join(SPACINGS) + " (the sampler's own)",
    )
    add(
        "--ddim_eta",
        "--eta",
        type=float,
        default=0.0,
        metavar="ETA",
        help="share of fresh noise (%(default)s)",
    )
    add(
        "--scale",
        type=float,
        metavar="S",
        help=f"guidance; 1 is none ({SCALE:g}, the demo model {DEMO_SCALE:g})",
    )
    add(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="image k of the run has seed + k (%(default)s)",
    )
    add("--fixed_code", action="store_true", help="the same start noise for every batch")
    add(
        "--H", type=int, metavar="N", help="height in pixels, a multiple of 8 (512, or the model's)"
    )
    add("--W", type=int, metavar="N", help="width in pixels, a multiple of 8 (512, or the model's)")
    add("--legacy", nargs="?", type=_quirks, const=frozenset(LEGACY), default=frozenset(),
        metavar="NAMES", help="do as the original: all or some of " + ",".join(LEGACY))  # fmt: skip
    return parent


def picture_flags(strength: float | None = None) -> ArgumentParser:
    """The picture that a task begins with.

    strength: its default, if the task has it.
    """
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("picture").add_argument
    add("--init-img", "--image", metavar="FILE", help="the picture; --H and --W scale and crop it")
    if strength is not None:
        add("--strength", type=_share, default=strength, metavar="S",
            help="0 keeps the picture, 1 forgets it (%(default)s)")  # fmt: skip
    return parent


def mask_flags() -> ArgumentParser:
    """What of it is painted anew."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("mask").add_argument
    add("--mask", metavar="FILE", help="white is painted anew (what is transparent in the picture)")
    add("--mask-box", type=_box, metavar="L,T,R,B", help="paint this box anew, in pixels")
    add("--mask-grow", type=_level, default=0, metavar="N", help="pixels to reach further (0)")
    add("--mask-blur", type=float, default=0.0, metavar="R", help="radius of a soft edge (0)")
    add("--no-composite", action="store_true", help="leave known pixels as the decoder made them")
    add("--indir", metavar="DIR", help="all pairs X.png and X_mask.png of a folder,"
        " each to OUTDIR/X.png")  # fmt: skip
    return parent


def depth_flags() -> ArgumentParser:
    """Depth of one's own, or to keep."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("depth").add_argument
    add("--depth-map", metavar="FILE", help="a map of 8 or 16 bits, white is near (estimated)")
    add("--depth-inverted", action="store_true", help="in the map, white is far")
    add("--save-depth", metavar="FILE", help="write the estimated map, a PNG of 16 bits")
    add("--midas", metavar="FILE", help="depth network, dpt_hybrid-midas-501f0c75.pt (the model's)")
    return parent


def upscale_flags() -> ArgumentParser:
    """How far the picture is trusted."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("upscaling").add_argument
    add("--noise-level", type=_level, default=20, metavar="N",
        help="noise on the picture, 0 to 349: more invents more (%(default)s)")  # fmt: skip
    return parent


def unclip_flags() -> ArgumentParser:
    """Which pictures are seen, and how they are mixed."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("pictures").add_argument
    add("--image", "--init-img", dest="init_img", action="append", metavar="FILE",
        help="a picture; may be given several times")  # fmt: skip
    add("--weight", type=float, action="append", metavar="W",
        help="of each picture, then of the prior (all alike)")  # fmt: skip
    add("--noise-level", type=_level, action="append", metavar="N",
        help="noise on what is seen, 0 to 999, for all or for each (0)")  # fmt: skip
    add("--mix-noise-level", type=_level, metavar="N", help="noise on the mix (none)")
    add("--prior", metavar="FILE", help="the Karlo prior: imagines a picture of the prompt")
    add("--prior-steps", type=_count, metavar="N", help="sampling steps of the prior (25)")
    add("--prior-scale", type=float, metavar="S", help="guidance of the prior (4)")
    add("--clip-stats", metavar="FILE", help="statistics of CLIP's embeddings (ViT-L-14_stats.th)")
    return parent


def output_flags() -> ArgumentParser:
    """How many pictures, and what becomes of them."""
    parent = ArgumentParser(add_help=False)
    add = parent.add_argument_group("output").add_argument
    add("--outdir", nargs="?", metavar="DIR", help="folder for samples/ and the grid (%(default)s)")
    add("--n_samples", type=_count, default=3, metavar="N", help="batch size (%(default)s)")
    add(
        "--n_iter",
        type=_count,
        default=3,
        metavar="N",
        help="how often all prompts are used (%(default)s)",
    )
    add(
        "--n_rows",
        type=int,
        default=0,
        metavar="N",
        help="pictures per row of the grid (the batch size)",
    )
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--skip_save", action="store_true", help="do not save single pictures")
    add("--no-watermark", action="store_true", help="leave the invisible watermark out")
    add("--json", action="store_true", help="write one JSON object per picture to stdout")
    return parent


def parse(parser: ArgumentParser, argv: Sequence[str] | None = None) -> Namespace:
    """Understand a command line, in either spelling, without importing anything heavy.

    argv: words after the script's name; those of this process if None.
    Returns the flags; `overrides` holds the key=value words, `size` is (H, W) with None for unset.
    Exits with status 2 and one line about the first mistake.
    """
    words = _spelled(parser, list(sys.argv[1:] if argv is None else argv))
    args, rest = parser.parse_known_args(words)
    args.overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    for word in rest:
        if word not in args.overrides:
            _refuse(parser, word)
    if "sampler" in args:
        _settle(parser, args)
    if "scale" in args and args.scale is None:
        is_demo = args.ckpt is None and args.config is None
        suits_demo = DEMO_SCALES.get(args.task, DEMO_SCALE)
        args.scale = suits_demo if is_demo else getattr(args, "usual_scale", SCALE)
    for flag in ("prompt", "outdir"):
        if flag in args and getattr(args, flag) is None:
            parser.error(f"--{flag} needs a value")
    return args


def _spelled(parser: ArgumentParser, words: list[str]) -> list[str]:
    """The words with every long flag in the spelling the parser knows."""
    end = words.index("--") if "--" in words else len(words)
    return [_flag(parser, word) for word in words[:end]] + words[end:]


def _flag(parser: ArgumentParser, word: str) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    key = name.replace("-", "_")
    flags = parser._option_string_actions
    for pool in (ORIGINAL & flags.keys(), flags.keys()):
        exact = [flag for flag in pool if flag.replace("-", "_") == key]
        found = exact or [flag for flag in pool if flag.replace("-", "_").startswith(key)]
        if len({id(flags[flag]) for flag in found}) == 1:
            return found[0] + equals + value
    if found:
        parser.error(f"`{name}` could be any of {', '.join(sorted(found))}")
    return word


def _refuse(parser: ArgumentParser, word: str) -> NoReturn:
    known = parser._option_string_actions
    near = difflib.get_close_matches(word.partition("=")[0].replace("-", "_"), known, n=1)
    near = near or difflib.get_close_matches(word.partition("=")[0], known, n=1)
    hint = f", did you mean `{near[0]}`?" if near else ""
    parser.error(f"unknown argument `{word}`{hint}")


def _settle(parser: ArgumentParser, args: Namespace) -> None:
    """Decide what several flags say together."""
    chosen = "plms" if args.plms else "dpm" if args.dpm else None
    if chosen and args.sampler not in (None, chosen):
        parser.error(f"--{chosen} contradicts --sampler {args.sampler}")
    args.sampler = chosen or args.sampler or "ddim"
    if args.sampler == "plms" and args.ddim_eta != 0:
        parser.error("PLMS is deterministic: --ddim_eta must be 0")
    for flag in ("H", "W"):
        side = getattr(args, flag)
        if side is not None and "size" in args.legacy:
            side -= side % 8
        if side is not None and (side < 8 or side % 8):
            parser.error(f"--{flag} {side} is not a positive multiple of 8")
        setattr(args, flag, side)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number from 1 up")
    return int(text)


def _level(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number from 0 up")
    return int(text)


def adapter_flags(add: Callable[..., object]) -> None:
    """LoRAs and words, by the `add_argument` of a parser or of a group."""
    lora_flag(add)
    add("--embedding", action="append", default=[], metavar="FILE",
        help="a textual inversion, or a folder of them: words to use in prompts")  # fmt: skip


def lora_flag(add: Callable[..., object]) -> None:
    """LoRAs alone, for what makes no pictures."""
    add("--lora", type=weighted, action="append", default=[], metavar="FILE[:WEIGHT]",
        help="add a LoRA, in kohya's or diffusers' format; may be given several times")  # fmt: skip


def weighted(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon may also be part of the file's name."""
    name, _, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number in 0 … 1")
    return share


def _box(text: str) -> tuple[int, ...]:
    sides = tuple(int(side) if side.isdigit() else -1 for side in text.split(","))
    if len(sides) != 4 or min(sides) < 0 or sides[0] >= sides[2] or sides[1] >= sides[3]:
        raise argparse.ArgumentTypeError(f"`{text}` is not LEFT,TOP,RIGHT,BOTTOM in pixels")
    return sides


def _quirks(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.replace("_", "-").split(",")]
    for name in names:
        if name not in LEGACY:
            raise argparse.ArgumentTypeError(f"unknown `{name}`, choose from {', '.join(LEGACY)}")
    return frozenset(names)
