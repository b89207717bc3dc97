"""Names and signatures that programs written for the original use, in its order."""

_SAMPLER_SAMPLE = (
    "S, batch_size, shape, conditioning=None, callback=None, normals_sequence=None, "
    "img_callback=None, quantize_x0=False, eta=0.0, mask=None, x0=None, temperature=1.0, "
    "noise_dropout=0.0, score_corrector=None, corrector_kwargs=None, verbose=True, x_T=None, "
    "log_every_t=100, unconditional_guidance_scale=1.0, unconditional_conditioning=None"
)
_MAKE_SCHEDULE = "ddim_num_steps, ddim_discretize='uniform', ddim_eta=0.0, verbose=True"
_P_SAMPLE = (
    "x, c, t, index, repeat_noise=False, use_original_steps=False, quantize_denoised=False, "
    "temperature=1.0, noise_dropout=0.0, score_corrector=None, corrector_kwargs=None, "
    "unconditional_guidance_scale=1.0, unconditional_conditioning=None"
)
_GUIDANCE = "unconditional_guidance_scale=1.0, unconditional_conditioning=None"
_CORRECTOR = "score_corrector=None, corrector_kwargs=None"
_DDCONFIG = (
    "*, ch, out_ch, ch_mult=(1, 2, 4, 8), num_res_blocks, attn_resolutions, dropout=0.0, "
    "resamp_with_conv=True, in_channels, resolution, z_channels, {}, use_linear_attn=False, "
    "attn_type='vanilla', **ignored"
)

# Tier 1: {module: lines of NAME(SIGNATURE); methods without self, names without brackets}
TIER_1 = {
    "ldm.util": """
        instantiate_from_config(config, **more)
        get_obj_from_str(string, reload=False)
        exists(x)
        default(val, d)
        ismap(x)
        isimage(x)
        mean_flat(tensor)
        log_txt_as_img(wh, xc, size=10)
        count_params(model, verbose=False)
    """,
    "ldm.models.diffusion.ddim": f"""
        DDIMSampler(model, schedule="linear", device=None, **kwargs)
        DDIMSampler.make_schedule({_MAKE_SCHEDULE})
        DDIMSampler.sample({_SAMPLER_SAMPLE}, dynamic_threshold=None, ucg_schedule=None, **kwargs)
        DDIMSampler.ddim_sampling(cond, shape, x_T=None, ddim_use_original_steps=False, \
            callback=None, timesteps=None, quantize_denoised=False, mask=None, x0=None, \
            img_callback=None, log_every_t=100, temperature=1.0, noise_dropout=0.0, {_CORRECTOR}, \
            {_GUIDANCE}, dynamic_threshold=None, ucg_schedule=None)
        DDIMSampler.p_sample_ddim({_P_SAMPLE}, dynamic_threshold=None)
        DDIMSampler.stochastic_encode(x0, t, use_original_steps=False, noise=None)
        DDIMSampler.decode(x_latent, cond, t_start, {_GUIDANCE}, use_original_steps=False, \
            callback=None)
        DDIMSampler.encode(x0, c, t_enc, use_original_steps=False, return_intermediates=None, \
            {_GUIDANCE}, callback=None)
        DDIMSampler.register_buffer(name, attr)
    """,
    "ldm.models.diffusion.plms": f"""
        PLMSSampler(model, schedule="linear", device=None, **kwargs)
        PLMSSampler.make_schedule({_MAKE_SCHEDULE})
        PLMSSampler.sample({_SAMPLER_SAMPLE}, dynamic_threshold=None, **kwargs)
        PLMSSampler.plms_sampling(cond, shape)
        PLMSSampler.p_sample_plms({_P_SAMPLE}, old_eps=None, t_next=None)
        PLMSSampler.register_buffer(name, attr)
    """,
    "ldm.models.diffusion.dpm_solver": f"""
        DPMSolverSampler(model, device=None, **kwargs)
        DPMSolverSampler.sample({_SAMPLER_SAMPLE}, **kwargs)
    """,
    "ldm.models.diffusion.dpm_solver.dpm_solver": """
        model_wrapper(model, noise_schedule, model_type="noise", model_kwargs=None, \
            guidance_type="uncond", condition=None, unconditional_condition=None, \
            guidance_scale=1., classifier_fn=None, classifier_kwargs=None)
        DPM_Solver.dpm_solver_first_update(x, s, t, model_s=None)
    """,
    "ldm.models.diffusion.ddpm": f"""
        uniform_on_device(r1, r2, shape, device)
        DDPM(unet_config, timesteps=1000, beta_schedule="linear", loss_type="l2", ckpt_path=None, \
            ignore_keys=[], load_only_unet=False, monitor="val/loss", use_ema=True, \
            first_stage_key="image", image_size=256, channels=3, log_every_t=100, \
            clip_denoised=True, linear_start=1e-4, linear_end=2e-2, cosine_s=8e-3, \
            given_betas=None, original_elbo_weight=0.0, v_posterior=0.0, l_simple_weight=1.0, \
            conditioning_key=None, parameterization="eps", scheduler_config=None, \
            use_positional_encodings=False, learn_logvar=False, logvar_init=0.0, \
            make_it_fit=False, ucg_training=None, reset_ema=False, reset_num_ema_updates=False)
        LatentDiffusion(first_stage_config, cond_stage_config, num_timesteps_cond=None, \
            cond_stage_key="image", cond_stage_trainable=False, concat_mode=True, \
            cond_stage_forward=None, conditioning_key=None, scale_factor=1.0, scale_by_std=False, \
            force_null_conditioning=False, *args, **kwargs)
        LatentDiffusion.get_learned_conditioning(c)
        LatentDiffusion.decode_first_stage(z, predict_cids=False, force_not_quantize=False)
        LatentDiffusion.ema_scope(context=None)
        LatentDiffusion.encode_first_stage(x)
        LatentDiffusion.get_first_stage_encoding(encoder_posterior)
        LatentDiffusion.apply_model(x_noisy, t, cond, return_ids=False)
        LatentDiffusion.q_sample(x_start, t, noise=None)
        LatentDiffusion.get_input(batch, k, return_first_stage_outputs=False, \
            force_c_encode=False, cond_key=None, return_original_cond=False, bs=None, \
            return_x=False)
        LatentDiffusion.log_images(batch, N=8, n_row=4, sample=True, ddim_steps=50, ddim_eta=0.0, \
            return_keys=None, quantize_denoised=True, inpaint=True, plot_denoise_rows=False, \
            plot_progressive_rows=True, plot_diffusion_rows=True, \
            unconditional_guidance_scale=1.0, unconditional_guidance_label=None, \
            use_ema_scope=True, **kwargs)
        LatentDiffusion.sample_log(cond, batch_size, ddim, ddim_steps, **kwargs)
        LatentDiffusion.predict_eps_from_z_and_v(x_t, t, v)
        LatentDiffusion.predict_start_from_z_and_v(x_t, t, v)
        LatentDiffusion.predict_start_from_noise(x_t, t, noise)
        LatentDiffusion.get_unconditional_conditioning(batch_size, null_label=None)
        LatentDiffusion.register_schedule(given_betas=None, beta_schedule="linear", \
            timesteps=1000, linear_start=1e-4, linear_end=2e-2, cosine_s=8e-3)
        LatentDiffusion.p_mean_variance(x, c, t, clip_denoised, return_codebook_ids=False, \
            quantize_denoised=False, return_x0=False, {_CORRECTOR})
        LatentDiffusion.p_sample(x, c, t, clip_denoised=False, repeat_noise=False, \
            return_codebook_ids=False, quantize_denoised=False, return_x0=False, \
            temperature=1.0, noise_dropout=0.0, {_CORRECTOR})
        LatentDiffusion.p_sample_loop(cond, shape, return_intermediates=False, x_T=None, \
            verbose=True, callback=None, timesteps=None, quantize_denoised=False, mask=None, \
            x0=None, img_callback=None, start_T=None, log_every_t=None)
        LatentDiffusion.sample(cond, batch_size=16, return_intermediates=False, x_T=None, \
            verbose=True, timesteps=None, quantize_denoised=False, mask=None, x0=None, \
            shape=None, **kwargs)
        LatentDiffusion.progressive_denoising(cond, shape, verbose=True, callback=None, \
            quantize_denoised=False, img_callback=None, mask=None, x0=None, temperature=1.0, \
            noise_dropout=0.0, {_CORRECTOR}, batch_size=None, x_T=None, start_T=None, \
            log_every_t=None)
        LatentDiffusion.shared_step(batch, **kwargs)
        LatentDiffusion.p_losses(x_start, cond, t, noise=None)
        LatentDiffusion.get_loss(pred, target, mean=True)
        LatentDiffusion.forward(x, c, *args, **kwargs)
        LatentDiffusion.instantiate_first_stage(config)
        LatentDiffusion.instantiate_cond_stage(config)
        LatentDiffusion.init_from_ckpt(path, ignore_keys=[], only_model=False)
        LatentDiffusion.configure_optimizers()
        LatentDiffusion.to_rgb(x)
        LatentDiffusion._get_denoise_row_from_list(samples, desc="", \
            force_no_decoder_quantization=False)
        LatentDiffusion.make_cond_schedule
        LatentDiffusion.meshgrid(h, w)
        LatentDiffusion.delta_border(h, w)
        LatentDiffusion.get_weighting
        LatentDiffusion.get_fold_unfold
        DiffusionWrapper(diff_model_config, conditioning_key)
        LatentInpaintDiffusion
        LatentDepth2ImageDiffusion
        LatentUpscaleDiffusion
        ImageEmbeddingConditionedLatentDiffusion
        extract_into_tensor(a, t, x_shape)
        disabled_train
        exists
        default
        LitEma
        normal_kl
        DiagonalGaussianDistribution
        AutoencoderKL
        IdentityFirstStage
        make_beta_schedule
        noise_like
        DDIMSampler
    """,
    "ldm.modules.diffusionmodules.openaimodel": """
        UNetModel(image_size, in_channels, model_channels, out_channels, num_res_blocks, \
            attention_resolutions, dropout=0, channel_mult=(1, 2, 4, 8), conv_resample=True, \
            dims=2, num_classes=None, use_checkpoint=False, use_fp16=False, use_bf16=False, \
            num_heads=-1, num_head_channels=-1, num_heads_upsample=-1, \
            use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False, \
            use_spatial_transformer=False, transformer_depth=1, context_dim=None, n_embed=None, \
            legacy=True, disable_self_attentions=None, num_attention_blocks=None, \
            disable_middle_self_attn=False, use_linear_in_transformer=False, adm_in_channels=None)
        UNetModel.forward(x, timesteps=None, context=None, y=None, **kwargs)
        UNetModel.convert_to_fp16()
        UNetModel.convert_to_fp32()
        TimestepBlock
        TimestepEmbedSequential.forward(x, emb, context=None)
        ResBlock(channels, emb_channels, dropout, out_channels=None, use_conv=False, \
            use_scale_shift_norm=False, dims=2, use_checkpoint=False, up=False, down=False)
        ResBlock.forward(x, emb)
        ResBlock._forward(x, emb)
        AttentionBlock(channels, num_heads=1, num_head_channels=-1, use_checkpoint=False, \
            use_new_attention_order=False)
        AttentionBlock.forward(x)
        AttentionBlock._forward(x)
        Downsample(channels, use_conv, dims=2, out_channels=None, padding=1)
        Upsample(channels, use_conv, dims=2, out_channels=None, padding=1)
        timestep_embedding
        conv_nd
        linear
        zero_module
        avg_pool_nd
        normalization
        checkpoint
        SpatialTransformer
        exists
        th
        nn
        F
        np
        math
    """,
    "ldm.modules.attention": """
        CrossAttention(query_dim, context_dim=None, heads=8, dim_head=64, dropout=0.0)
        CrossAttention.forward(x, context=None, mask=None)
        MemoryEfficientCrossAttention(query_dim, context_dim=None, heads=8, dim_head=64, \
            dropout=0.0)
        BasicTransformerBlock(dim, n_heads, d_head, dropout=0.0, context_dim=None, gated_ff=True, \
            checkpoint=True, disable_self_attn=False)
        BasicTransformerBlock.forward(x, context=None)
        BasicTransformerBlock._forward(x, context=None)
        BasicTransformerBlock.ATTENTION_MODES
        SpatialTransformer(in_channels, n_heads, d_head, depth=1, dropout=0.0, context_dim=None, \
            disable_self_attn=False, use_linear=False, use_checkpoint=True)
        SpatialTransformer.forward(x, context=None)
        FeedForward(dim, dim_out=None, mult=4, glu=False, dropout=0.0)
        GEGLU(dim_in, dim_out)
        GEGLU.forward(x)
        Normalize(in_channels, num_groups=32)
        default
        exists
        checkpoint
        zero_module
        XFORMERS_IS_AVAILBLE
    """,
    "ldm.modules.diffusionmodules.util": """
        timestep_embedding(timesteps, dim, max_period=10000, repeat_only=False)
        make_ddim_timesteps(ddim_discr_method, num_ddim_timesteps, num_ddpm_timesteps, \
            verbose=True)
        make_ddim_sampling_parameters(alphacums, ddim_timesteps, eta, verbose=True)
        extract_into_tensor(a, t, x_shape)
        noise_like(shape, device, repeat=False)
        make_beta_schedule(schedule, n_timestep, linear_start=1e-4, linear_end=2e-2, cosine_s=8e-3)
        zero_module(module)
        scale_module(module, scale)
        conv_nd(dims, *args, **kwargs)
        avg_pool_nd(dims, *args, **kwargs)
        linear(*args, **kwargs)
        normalization(channels)
        GroupNorm32
        GroupNorm32.forward(x)
        checkpoint(func, inputs, params, flag)
        mean_flat(tensor)
        SiLU
        betas_for_alpha_bar
        HybridConditioner
    """,
    "ldm.modules.diffusionmodules.model": f"""
        Encoder({_DDCONFIG.format("double_z=True")})
        Encoder.forward(x)
        Decoder({_DDCONFIG.format("give_pre_end=False, tanh_out=False")})
        Decoder.forward(z)
        ResnetBlock(*, in_channels, out_channels=None, conv_shortcut=False, dropout, \
            temb_channels=512)
        ResnetBlock.forward(x, temb=None)
        AttnBlock(in_channels)
        AttnBlock.forward(x)
        MemoryEfficientAttnBlock(in_channels)
        make_attn(in_channels, attn_type="vanilla", attn_kwargs=None)
        Normalize(in_channels, num_groups=32)
        nonlinearity(x)
        Upsample(in_channels, with_conv)
        Downsample(in_channels, with_conv)
    """,
    "ldm.models.autoencoder": """
        AutoencoderKL(ddconfig, lossconfig, embed_dim, ckpt_path=None, ignore_keys=[], \
            image_key="image", colorize_nlabels=None, monitor=None, ema_decay=None, \
            learn_logvar=False)
        AutoencoderKL.encode(x)
        AutoencoderKL.decode(z)
        AutoencoderKL.forward(input, sample_posterior=True)
        IdentityFirstStage(*args, vq_interface=False, **kwargs)
        VQModelInterface
        VQModel
        Encoder
        Decoder
    """,
    "ldm.modules.distributions.distributions": """
        DiagonalGaussianDistribution(parameters, deterministic=False)
        DiagonalGaussianDistribution.sample()
        DiagonalGaussianDistribution.mode()
        DiagonalGaussianDistribution.kl(other=None)
        DiagonalGaussianDistribution.nll(sample, dims=(1, 2, 3))
        normal_kl(mean1, logvar1, mean2, logvar2)
    """,
    "ldm.modules.encoders.modules": """
        FrozenCLIPEmbedder(version="openai/clip-vit-large-patch14", device=None, max_length=77, \
            freeze=True, layer="last", layer_idx=None)
        FrozenOpenCLIPEmbedder(arch="ViT-H-14", version="laion2b_s32b_b79k", device=None, \
            max_length=77, freeze=True, layer="last")
        AbstractEncoder
        CLIPTextModel.from_pretrained
    """,
    "ldm.modules.midas": "api",
    "ldm.modules.midas.api": """
        ISL_PATHS
        load_model(model_type)
        MiDaSInference(model_type)
    """,
    "ldm.data.util": "AddMiDaS(model_type)",
}
# Tier 2: what training needs in addition.
TIER_2 = {
    "ldm.data.base": "Txt2ImgIterableBaseDataset(num_records=0, valid_ids=None, size=256)",
    "ldm.modules.ema": """
        LitEma(model, decay=0.9999, use_num_upates=True)
        LitEma.copy_to(model)
        LitEma.store(parameters)
        LitEma.restore(parameters)
        LitEma.reset_num_updates()
    """,
    "ldm.lr_scheduler": """
        LambdaLinearScheduler(warm_up_steps, f_min, f_max, f_start, cycle_lengths, \
            verbosity_interval=0)
        LambdaWarmUpCosineScheduler
        LambdaWarmUpCosineScheduler2(warm_up_steps, f_min, f_max, f_start, cycle_lengths, \
            verbosity_interval=0)
    """,
    "ldm.modules.losses": """
        LPIPSWithDiscriminator(disc_start, logvar_init=0.0, kl_weight=1.0, pixelloss_weight=1.0, \
            disc_num_layers=3, disc_in_channels=3, disc_factor=1.0, disc_weight=1.0, \
            perceptual_weight=1.0, use_actnorm=False, disc_conditional=False, disc_loss="hinge")
        LPIPSWithDiscriminator.forward(inputs, reconstructions, posteriors, optimizer_idx, \
            global_step, last_layer=None, cond=None, split="train", weights=None)
    """,
    "ldm.modules.losses.contperceptual": "LPIPSWithDiscriminator",
}
