"""Models of the recorded configs, built under the original's names, with weights by `recipe`."""

import copy
import functools

from goldfile import GoldenFile, load_golden
from ldm.compat.util import instantiate_from_config
from recipe import fill

SCHEDULER = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {
        "warm_up_steps": [2], "f_min": [1.0], "f_max": [1.0], "f_start": [0.5],
        "cycle_lengths": [100],
    },
}  # fmt: skip

recorded = functools.cache(load_golden)


def build(config, salt="sd-gold-public", arch=None, **changes):
    """Build a model from a config of the original; `arch` is that of a tiny text tower."""
    config = copy.deepcopy(config)
    config["params"] |= changes
    for part in ("cond_stage_config", "embedder_config"):
        spec = config["params"].get(part)
        if isinstance(spec, dict) and "arch" in spec.get("params", {}):
            spec["params"]["arch"] = arch
    if "depth_stage_config" in config["params"]:
        config["params"]["depth_stage_config"] = {"target": "pipelines.goldmodels.FakeDepthNetwork"}
    model = instantiate_from_config(config)
    model.load_state_dict(fill(model.state_dict(), salt))
    return model.eval()


@functools.cache
def build_recorded(name, config="config"):
    file = recorded(name)
    arch = recorded("unclip_condition").meta["tiny_arch"]
    return build(file.meta[config], file.meta["salt"], arch)


def get_kwargs(file: GoldenFile, case: str):
    """Return the keyword arguments of a recorded call of `sample`, tensors included."""
    shared = file.select("shared/")
    kwargs = dict(file.case(case)["info"]["kwargs"])
    names = {"conditioning": "c", "unconditional_conditioning": "uc"}
    for key, value in kwargs.items():
        if value == "tensor/struct":
            kwargs[key] = shared[names.get(key, key)]
    for key in names.keys() & kwargs.keys():
        if case.startswith("dict"):
            kwargs[key] = {"c_crossattn": [kwargs[key]]}
        elif case.startswith("list"):
            kwargs[key] = [kwargs[key], kwargs[key].flip(1)]
    return kwargs
