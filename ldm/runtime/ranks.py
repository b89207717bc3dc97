"""Read rank and world size from the environment variables of torchrun and Slurm."""

import os

__all__ = ["get_local_rank", "get_local_world_size", "get_rank_and_world_size"]

RANK_VARIABLES = (  # (rank, world size) by torchrun and Slurm
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def get_rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size) under torchrun or Slurm, else (0, 1)."""
    for rank, world_size in RANK_VARIABLES:
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    return 0, 1


def get_local_rank() -> int:
    """Return the rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def get_local_world_size() -> int:
    """Return the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", 1)))
