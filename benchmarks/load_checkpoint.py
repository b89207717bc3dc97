"""Time and memory of loading a full-size checkpoint, each way in a fresh process, interleaved.

    python benchmarks/make_checkpoint.py /tmp/sd2.ckpt
    python benchmarks/load_checkpoint.py /tmp/sd2.ckpt                          # 5.2 GB, float32
    python benchmarks/load_checkpoint.py /tmp/sd2-fp16.safetensors --dtype float16 --diffusers

    ldm        ldm.load, weights mapped into place or cast one by one
    read       nothing but the tensors: read into memory, cast, kept
    diffusers  StableDiffusionPipeline.from_single_file, with local configs and tokenizer

Seconds are the call's own, imports excluded; peak is the process's largest resident size, of which
`import torch` alone is the first line. `touched` is after every page of every weight was looked at.
"""

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--config", default="configs/stable-diffusion/v2-inference.yaml")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--diffusers", action="store_true", help="SD 2 only")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    ways = ["torch", "ldm", "read", *(["diffusers"] if args.diffusers else [])]
    with tempfile.TemporaryDirectory() as folder:
        if args.diffusers:
            diffusers_folder(Path(folder))
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for i in range(args.rounds):
            for way in ways if i % 2 == 0 else ways[::-1]:
                command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
                command += ["--folder", folder]
                run = subprocess.run(command, env=_environment(), capture_output=True, text=True)
                if run.returncode:
                    print(f"{way} fails: {run.stderr.strip().splitlines()[-1]}")
                else:
                    rows[way].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{args.file}, {args.file.stat().st_size / 1e9:.2f} GB, to {args.dtype}")
    print(
        f"{'':10} {'seconds':>8} {'CPU s':>8} {'weights':>12} {'peak':>10} {'touched':>10}  (GiB)"
    )
    for way, found in rows.items():
        if not found:
            continue
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        print(
            f"{way:10} {middle['seconds']:8.2f} {middle['cpu']:8.2f} {middle['weights']:12.2f} "
            f"{middle['peak']:10.2f} {middle['touched']:10.2f}"
        )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One way, in this process."""
    import torch

    prepare = WAYS[args.way]
    run = prepare(args, getattr(torch, args.dtype))
    start, cpu = time.perf_counter(), time.process_time()
    kept = run()
    row = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    row["peak"] = peak()
    tensors = [t.detach() for t in kept]
    row["weights"] = sum(t.nbytes for t in tensors) / 2**30
    for tensor in tensors:
        tensor.flatten().view(torch.uint8)[::4096].sum()
    return row | {"touched": peak()}


def _nothing(args: argparse.Namespace, dtype: Any) -> Any:
    return list


def _ldm(args: argparse.Namespace, dtype: Any) -> Any:
    from ldm.loading.load import load

    def run() -> list[Any]:
        measure.model = load(args.config, args.file, dtype=dtype)  # type: ignore[attr-defined]
        return list(measure.model.state_dict().values())  # type: ignore[attr-defined]

    return run


def _read(args: argparse.Namespace, dtype: Any) -> Any:
    import torch
    from safetensors.torch import load_file

    from ldm.loading import pickles

    def run() -> list[Any]:
        if args.file.suffix == ".safetensors":
            state = {name: value.clone() for name, value in load_file(args.file).items()}
        else:
            with torch.serialization.safe_globals(list(pickles.STAND_INS)):
                content = torch.load(args.file, weights_only=True)
            state = content.pop("state_dict")
        return [state.pop(name).to(dtype) for name in list(state)]

    return run


def _diffusers(args: argparse.Namespace, dtype: Any) -> Any:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    assert all((AutoencoderKL, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer))

    def run() -> list[Any]:
        pipe = StableDiffusionPipeline.from_single_file(
            str(args.file),
            config=str(args.folder),
            torch_dtype=dtype,
            local_files_only=True,
            safety_checker=None,
        )
        measure.model = pipe  # type: ignore[attr-defined]
        parts = (pipe.unet, pipe.vae, pipe.text_encoder)
        return [t for part in parts for t in part.state_dict().values()]

    return run


WAYS = {"torch": _nothing, "ldm": _ldm, "read": _read, "diffusers": _diffusers}


def peak() -> float:
    """The largest resident size so far, GiB."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", text)
    return int(found[1]) / 2**20 if found else float("nan")


def diffusers_folder(folder: Path) -> None:
    """The configs (no weights) that diffusers otherwise downloads for Stable Diffusion 2."""
    channels, down = [320, 640, 1280, 1280], "CrossAttnDownBlock2D"
    parts: dict[str, dict[str, Any]] = {
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4,
            "out_channels": 4, "layers_per_block": 2, "block_out_channels": channels,
            "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
            "use_linear_projection": True, "down_block_types": [down] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL", "sample_size": 512, "latent_channels": 4,
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "scaling_factor": 0.18215,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "hidden_act": "gelu", "vocab_size": 49408,
            "max_position_embeddings": 77, "projection_dim": 512,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1,
            "set_alpha_to_one": False, "num_train_timesteps": 1000,
        },
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!",
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        },
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "feature_extractor": [None, None], "safety_checker": [None, None],
            "requires_safety_checker": False,
        },
    }  # fmt: skip
    merges, vocabulary = _bpe()
    parts["tokenizer/vocab.json"] = vocabulary
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))


def _bpe() -> tuple[list[str], dict[str, int]]:
    """CLIP's merges and vocabulary, from the file that open_clip brings."""
    spec = find_spec("open_clip")
    assert spec is not None
    home = Path(str(spec.submodule_search_locations[0]))  # type: ignore[index]
    text = gzip.decompress((home / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]
    words = [*characters, *(c + "</w>" for c in characters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return merges, {word: i for i, word in enumerate(words)}


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


if __name__ == "__main__":
    main()
