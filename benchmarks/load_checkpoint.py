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
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
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
            from opponents import write_folder

            write_folder(Path(folder))
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

    from ldm.loading.files import pickles

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


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


if __name__ == "__main__":
    main()
