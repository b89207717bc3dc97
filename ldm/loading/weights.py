"""Read weights from a file, a diffusers folder or a run folder, and identify their family.

path -> Checkpoint    names as in the file, or the original's for a diffusers folder; the config of
                      a folder is in the metadata
     -> Weights       our names, with family, metadata and prediction type
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ldm.loading.diffusers.files import is_diffusers_folder, read_folder
from ldm.loading.families import (
    DetectedPredictionType,
    Family,
    detect_family,
    detect_prediction_type,
)
from ldm.loading.files.checkpoint import CONFIG_KEY, Checkpoint, read_checkpoint, use_ema_weights
from ldm.loading.published import resolve_checkpoint
from ldm.loading.variants import find_model_name
from ldm.loading.weight_names import (
    MARKERS,
    UNET_PREFIX,
    has_prefix,
    has_sgm_names,
    rename_weights,
    select_buffers,
    to_original_name,
)
from ldm.runtime.errors import FileFormatError, MissingArgument, MissingFile, errors_as
from ldm.runtime.files import read_text

__all__ = [
    "TRANSPOSED_WARNING", "Weights", "has_transposed_projection", "identify_weights",
    "list_weight_files", "open_checkpoint",
]  # fmt: skip

# Patterns of weights and configs in a run folder of ours or of the original, or in the folder of a
# published model of latent-diffusion (`model.ckpt` or `last.ckpt`), the preferred first.
RUN_WEIGHTS_PATTERNS = (
    "checkpoints/last.safetensors", "checkpoints/last.ckpt", "checkpoints/*.safetensors",
    "checkpoints/*.ckpt", "model.safetensors", "model.ckpt", "last.safetensors", "last.ckpt",
)  # fmt: skip
RUN_CONFIG_PATTERNS = ("config.yaml", "configs/*-project.yaml")
TRANSPOSED_WARNING = (
    "text_projection of the second text encoder looks transposed, as in files converted from a "
    "diffusers folder without transposing it; it is used as it is, and images follow the prompt "
    "less well"
)
TEXT_PROJECTIONS = tuple(f"conditioner.{name}.model.text_projection" for name in ("text_2", "text"))
# Value of entry [0, 1] in a transposed projection of SDXL base (0.0218 if not transposed). The
# tolerance is for fine-tunes.
TRANSPOSED_ENTRY, ENTRY_TOLERANCE = -0.0037, 1e-3


@dataclass
class Weights:
    """The weights of a checkpoint under our names, with its family and metadata.

    Args:
        buffers: Tensors that are not weights, under the original's names: noise schedule, scale
            factor (if training measured it), statistics of embeddings or latents.
        metadata: Metadata of the file; each marker tensor (`v_pred`) adds an entry with value "".
        family: None = unknown.
        memory_mapped: Whether all tensors are memory-mapped.
    """

    checkpoint: Checkpoint
    state_dict: dict[str, Tensor]
    buffers: dict[str, Tensor]
    metadata: dict[str, str]
    family: Family | None
    memory_mapped: bool
    prediction_type: DetectedPredictionType = field(init=False)

    def __post_init__(self) -> None:
        self.update_prediction_type()

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.checkpoint.path

    def update_prediction_type(self) -> None:
        """Set the prediction type by all methods that do not run the network."""
        name, step = find_model_name(self.path), self.checkpoint.step
        self.prediction_type = detect_prediction_type(
            self.family, self.state_dict, step, self.metadata, name
        )

    def select_ema(self, names: Collection[str], ema: bool) -> None:
        """Use EMA weights or raw weights; EMA weights also replace missing raw weights.

        Args:
            names: Our names of the model's weights.
            ema: Whether to use EMA weights; False = only check that the raw weights are there.

        Raises:
            MissingArgument: The file has only EMA weights for the model's UNet.
        """
        if ema:
            all_names = (*names, *self.state_dict)
            is_sgm = has_sgm_names(all_names)
            names_by_original = {to_original_name(name, sgm=is_sgm): name for name in all_names}
            use_ema_weights(
                self.state_dict, self.checkpoint.ema_state_dict, names_by_original, self.path
            )
            self.update_prediction_type()
        elif (
            self.checkpoint.has_ema
            and has_prefix(names, UNET_PREFIX)
            and not has_prefix(self.state_dict, UNET_PREFIX)
        ):
            message = f"`{self.path}` contains only EMA weights of the UNet"
            raise MissingArgument(f"{message}\nhint: load it with `ema`", "ema")


def open_checkpoint(path: str | Path, file_variant: str | None = None) -> Checkpoint:
    """Open a checkpoint; names are those of the file, or the original's for a diffusers folder.

    The config of a run folder is added to the metadata, unless its checkpoint contains one.

    Args:
        path: A .ckpt or .safetensors, a diffusers folder, the folder of a training run, or a
            published name or `hf:` address for `resolve_checkpoint`.
        file_variant: Variant in the file names of a diffusers folder, such as `fp16`; None = see
            `read_folder`.
    """
    local_path = resolve_checkpoint(path, file_variant=file_variant)
    if not local_path.is_dir():
        return read_checkpoint(local_path)
    if is_diffusers_folder(local_path):
        return read_folder(local_path, file_variant)
    weights_path = _find_newest(local_path, RUN_WEIGHTS_PATTERNS)
    config_path = _find_newest(local_path, RUN_CONFIG_PATTERNS)
    if weights_path is None:
        raise MissingFile(
            f"`{path}` is neither a diffusers folder (`model_index.json`), nor that of a training "
            "run (`checkpoints/last.ckpt`) or of a model of latent-diffusion (`model.ckpt`)"
        )
    checkpoint = read_checkpoint(weights_path)
    if config_path is None or CONFIG_KEY in checkpoint.metadata:
        return checkpoint
    metadata = checkpoint.metadata | {CONFIG_KEY: read_text(config_path)}
    return replace(checkpoint, metadata=metadata)


def list_weight_files(path: Path) -> list[Path]:
    """Return the files with the weights of a checkpoint: itself, or those in its folder."""
    if not path.is_dir():
        return [path]
    if is_diffusers_folder(path):
        return [*path.glob("*/*.safetensors"), *path.glob("*/*.bin")]
    weights_path = _find_newest(path, RUN_WEIGHTS_PATTERNS)
    return [] if weights_path is None else [weights_path]


def identify_weights(checkpoint: Checkpoint) -> Weights:
    """Return weights under our names, with their family and prediction type."""
    state, buffers = rename_weights(checkpoint.state_dict), select_buffers(checkpoint.state_dict)
    metadata = checkpoint.metadata | {name: "" for name in MARKERS if name in checkpoint.state_dict}
    with errors_as(FileFormatError, f"`{checkpoint.path}` has weights of invalid shapes"):
        family = detect_family(state, checkpoint.ema_state_dict, metadata)
    return Weights(checkpoint, state, buffers, metadata, family, checkpoint.memory_mapped)


def has_transposed_projection(state: Mapping[str, Tensor]) -> bool:
    """Return whether the projection of SDXL's second text encoder is transposed by mistake.

    Some tools rename the weights of a diffusers folder without transposing the projection. It is
    recognized by an entry that nearly all fine-tunes change by less than ENTRY_TOLERANCE.

    Args:
        state: Weights of a file in the original's layout, under our names.
    """
    projection = next((state[name] for name in TEXT_PROJECTIONS if name in state), None)
    if projection is None or tuple(projection.shape) != (1280, 1280):
        return False
    return abs(float(projection[0, 1]) - TRANSPOSED_ENTRY) < ENTRY_TOLERANCE


def _find_newest(folder: Path, patterns: Iterable[str]) -> Path | None:
    """Return the newest file that matches the first pattern with a match; None if none has one."""
    for pattern in patterns:
        if files := list(folder.glob(pattern)):
            return max(files, key=lambda file: file.stat().st_mtime)
    return None
