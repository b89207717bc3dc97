"""The mathematics of diffusion, without parameters or files.

Reading order: schedule (noise levels), denoiser (prediction to estimate of the clean latent, and
training target), guidance (classifier-free guidance), samplers (solvers).
"""
