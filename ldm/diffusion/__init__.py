"""The mathematics of diffusion: no parameters, no files, no devices.

Reading order: schedule (how much noise at which step), denoiser (network output to clean estimate
and back to a training target), guidance (wrappers of a denoiser), samplers (integrators).
"""
