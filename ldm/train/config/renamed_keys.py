"""Former names of keys in the configs of runs, which are still accepted."""

from collections.abc import Mapping
from typing import TypeAlias

from ldm.data.former_options import RENAMED_OPTIONS
from ldm.runtime.errors import ConfigError
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["RENAMED_TRAINER_KEYS", "rename_keys"]

Names: TypeAlias = Mapping[str, "str | Names"]

# Former name -> name
RENAMED_TRAINER_KEYS = {
    "checkpoint_gradients": "gradient_checkpointing",
    "keep": "keep_states",
    "broken_share": "max_unreadable_fraction",
    "shard": "shard_size",
    "sanity": "check_initial_loss",
}
RENAMED_TRANSFORM_KEYS: Names = {
    **RENAMED_OPTIONS["emoji"],
    **RENAMED_OPTIONS["photo"],
    "conditions": {name: RENAMED_OPTIONS[name] for name in ("mask", "depth")},
}
RENAMED_DATASET_KEYS: Names = {
    **RENAMED_OPTIONS["hub"],
    **RENAMED_OPTIONS["shards"],
    "transform": RENAMED_TRANSFORM_KEYS,
}
RENAMED_KEYS: Names = {
    "lightning": {
        "trainer": RENAMED_TRAINER_KEYS,
        "optimizer": {
            "warm_up": "lr_warmup_steps",
            "decay": "lr_scheduler",
            "schedule": "scheduler_config",
        },
        "objective": {
            "drop": "conditioning_dropout_prob",
            "prior_weight": "prior_loss_weight",
            "offset_noise": "noise_offset",
            "offset_noise_by": "noise_offset_by",
            "timesteps": "timestep_range",
            "noise_bias": "timestep_bias",
            "l1": "l1_weight",
            "l2": "l2_weight",
            "gradient": "image_gradient_weight",
            "kl": "kl_weight",
            "peak": "top_errors_weight",
            "outlier": "outlier_weight",
            "trained": "trainable_part",
        },
        "callbacks": {
            "best": "save_top_k",
            "images": "max_images",
            "log_every": "log_steps",
            "weights": "export_weights",
            "dtype": "export_dtype",
            "sampling": {"grid": "scheduler", "rescale": "guidance_rescale"},
            "evaluation": {"steps": "every_n_steps"},
        },
        "textual_inversion": {"vectors": "num_vectors", "init": "initializer_words"},
    },
    "data": {
        "params": {
            "latents": {
                "cache": "cache_dir",
                "variants": "variants_per_image",
                "batch": "batch_size",
            },
            "texts": {"cache": "cache_dir", "batch": "batch_size"},
            "train": RENAMED_DATASET_KEYS,
            "validation": RENAMED_DATASET_KEYS,
            "prior": {"transform": RENAMED_TRANSFORM_KEYS},
        }
    },
}
# Sections that runs may have saved with keys under both names; the last of them is used.
SAVED_WITH_BOTH_NAMES = ("data.params.train", "data.params.validation", "data.params.prior")


def rename_keys(config: JsonMapping, names: Names = RENAMED_KEYS, where: str = "") -> JsonObject:
    """Return a config, or a section of it, with the present names of all keys.

    Args:
        names: Former name -> name; for a section, such a mapping of its keys.
        where: Dotted name of the section, for messages.
    Raises:
        ConfigError: A key is given under both names, except in SAVED_WITH_BOTH_NAMES.
    """
    renamed: JsonObject = {}
    for key, value in config.items():
        full_key = f"{where}.{key}" if where else key
        name = names.get(key)
        if not isinstance(name, str):
            name = key
        elif name in config and not where.startswith(SAVED_WITH_BOTH_NAMES):
            raise ConfigError(f"{full_key} is the former name of `{name}`: give one of the two")
        section = names.get(name)
        if isinstance(section, Mapping) and isinstance(value, Mapping):
            value = rename_keys(value, section, full_key)
        renamed[name] = value
    return renamed
