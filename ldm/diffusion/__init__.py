"""The mathematics of diffusion, without parameters or files.

Reading order:

    names                  tables of samplers and schedulers, hyperparameters of guidance methods
    scheduler_options      checks of options for the scheduler
    step_noise             options for the samplers' noise, and their checks
    schedule               noise levels of a model
    schedulers             noise levels of a run
    denoiser               network prediction -> estimate of the clean latent; training target
    samplers               ODE and SDE solvers
    brownian               noise of SDE samplers
    guidance               classifier-free guidance and other methods
    guidance_embedding     networks that take the guidance scale as an input
"""
