"""The flags of every method are the recorded ones: commands and recipes of today must run tomorrow."""

import pytest

from hf_ssl.cli.fields import train_flags
from hf_ssl.methods import METHODS

COMMON = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    allow_changed allow_outside_files attn_implementation auto_find_batch_size average_tokens_across_devices
    backbone base_learning_rate batch_eval_metrics bf16 bf16_full_eval blur_kernel blur_p blur_sigma brightness
    clip_grad_per_module clip_grad_per_tensor contrast count crops_of cutout data_seed dataloader_drop_last
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train
    enable_jit_checkpoint erase_p erase_scale eval_accumulation_steps eval_crop_pct eval_dataset eval_delay
    eval_do_concat_batches eval_images eval_on_start eval_split eval_steps eval_strategy eval_use_gather_object fp16
    fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs grayscale_p greater_is_better grid grid_patch grid_shuffle health_steps hflip
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token hue ignore_data_skip
    image_column image_mean image_size image_std include_for_metrics include_num_input_tokens_seen interpolation
    jitter_p label_column label_names label_smoothing_factor learning_rate length_column_name liger_kernel_config
    load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_bad_fraction
    max_grad_norm max_steps metric_for_best_model min_learning_rate momentum neftune_noise_alpha nonfinite_steps
    num_channels num_train_epochs optim optim_args optim_target_modules output_dir patch_size
    per_device_eval_batch_size per_device_train_batch_size pixel_values precision prediction_loss_only project
    push_to_hub randaugment randaugment_magnitude randaugment_p ratio remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint rotation run_name saturation save_minutes
    save_on_each_node save_only_model save_steps save_strategy save_total_limit scale seed shuffle_buffer size
    skip_memory_metrics solarize_p split streaming sync_batchnorm tf32 torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    train_sampling_strategy translate use_cache use_cpu use_liger_kernel validation_fraction validation_split vflip
    views views_on warmup_steps weight_decay weight_decay_end
"""
OWN = {
    "barlow_twins": """
        bias_gradient_scale hidden_dim joint_batchnorm num_layers projection_dim redundancy_weight
    """,
    "byol": """
        hidden_dim joint_batchnorm projection_dim teacher_momentum
    """,
    "clip": """
        caption_column context_length micro_batch_size projection_dim text_backbone tokenizer vocab_size
    """,
    "dcl": """
        hidden_dim joint_batchnorm projection_dim sigma temperature weighted
    """,
    "deepcluster_v2": """
        assigned_crops freeze_prototypes heads hidden_dim joint_batchnorm kmeans_iterations local_pixel_values
        num_examples num_prototypes projection_dim temperature
    """,
    "dino": """
        bottleneck_dim center_momentum freeze_last_layer hidden_dim interpolate_offset joint_batchnorm
        local_pixel_values norm_last_layer num_layers out_dim student_temperature teacher_momentum
        teacher_temperature teacher_temperature_warmup use_bn_in_head warmup_teacher_temperature
    """,
    "dinov2": """
        bottleneck_dim center_momentum centering freeze_last_layer hidden_dim joint_batchnorm koleo_weight
        layer_decay local_pixel_values local_weight mask_ratio mask_share num_layers out_dim patch_bottleneck_dim
        patch_embedding_rate patch_hidden_dim patch_out_dim patch_weight separate_heads sinkhorn_iterations
        student_temperature teacher_momentum teacher_momentum_end teacher_temperature teacher_temperature_warmup
        warmup_teacher_temperature
    """,
    "dinov3": """
        bottleneck_dim center_momentum centering freeze_last_layer gram_every gram_pixel_values gram_updates
        gram_warmup gram_weight hidden_dim joint_batchnorm koleo_weight layer_decay local_pixel_values local_weight
        mask_ratio mask_share num_layers out_dim patch_bottleneck_dim patch_embedding_rate patch_hidden_dim
        patch_out_dim patch_weight separate_heads sinkhorn_iterations student_temperature teacher_momentum
        teacher_momentum_end teacher_temperature teacher_temperature_warmup warmup_teacher_temperature
    """,
    "fixmatch": """
        alignment_momentum ema_momentum label_fraction label_ids label_seed labels_per_class strong_pixel_values
        temperature threshold unlabeled_dataset unlabeled_ratio unlabeled_split unlabeled_weight weak_pixel_values
    """,
    "infomin": """
        hidden_dim joint_batchnorm key_batchnorm num_layers num_patches patch_pixel_values patch_weight
        projection_dim queue_size teacher_momentum temperature
    """,
    "instdisc": """
        bank_momentum criterion joint_batchnorm nce_negatives num_examples partition projection_dim temperature
    """,
    "lejepa": """
        directions hidden_dim joint_batchnorm knots largest local_pixel_values num_layers projection_dim
        sigreg_weight
    """,
    "mae": """
        decoder_hidden_size decoder_intermediate_size decoder_num_heads decoder_num_layers fixed_positions
        mask_ratio norm_pix_loss
    """,
    "moco": """
        hidden_dim joint_batchnorm key_batchnorm num_layers projection_dim queue_size teacher_momentum temperature
    """,
    "mocov3": """
        fixed_positions freeze_patches hidden_dim joint_batchnorm num_layers projection_dim teacher_momentum
        temperature
    """,
    "msn": """
        entropy_weight hidden_dim joint_batchnorm label_smoothing local_pixel_values out_dim patch_drop prior_weight
        projection_dim sharpening sinkhorn_iterations teacher_momentum temperature
    """,
    "nnclr": """
        hidden_dim joint_batchnorm predictor_hidden_dim projection_dim queue_size temperature
    """,
    "obow": """
        distance_momentum inverse_delta joint_batchnorm kappa levels local_pixel_values teacher_momentum
        teacher_pixel_values vocabulary_size
    """,
    "pirl": """
        bank_momentum criterion hidden_dim joint_batchnorm nce_negatives num_examples num_patches partition
        patch_pixel_values patch_weight projection_dim temperature
    """,
    "pmsn": """
        entropy_weight exponent hidden_dim joint_batchnorm label_smoothing local_pixel_values out_dim patch_drop
        prior_weight projection_dim sharpening sinkhorn_iterations teacher_momentum temperature
    """,
    "ressl": """
        hidden_dim joint_batchnorm key_batchnorm num_layers projection_dim queue_size teacher_momentum
        teacher_temperature temperature
    """,
    "sela_v2": """
        assigned_crops epsilon freeze_prototypes heads hidden_dim joint_batchnorm local_pixel_values num_examples
        num_prototypes projection_dim sinkhorn_iterations temperature
    """,
    "simclr": """
        hidden_dim joint_batchnorm num_layers projection_dim temperature
    """,
    "simclr_v2": """
        hidden_dim joint_batchnorm memory_size num_layers projection_dim teacher_momentum temperature
    """,
    "simsiam": """
        bottleneck_dim fix_predictor_rate hidden_dim joint_batchnorm num_layers projection_dim
    """,
    "swav": """
        assigned_crops epsilon freeze_prototypes hidden_dim joint_batchnorm local_pixel_values num_prototypes
        projection_dim queue_size queue_start sinkhorn_iterations temperature
    """,
    "tico": """
        covariance_momentum covariance_weight hidden_dim joint_batchnorm projection_dim teacher_momentum
    """,
    "vicreg": """
        covariance_weight hidden_dim invariance_weight joint_batchnorm num_layers projection_dim variance_weight
    """,
    "vicregl": """
        alpha covariance_weight hidden_dim invariance_weight joint_batchnorm local_matches map_dim matches
        num_layers projection_dim variance_weight
    """,
    "w_mse": """
        epsilon hidden_dim iterations joint_batchnorm normalise num_layers projection_dim sub_batch
    """,
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_flags_are_the_recorded_ones(method: str) -> None:
    assert set(train_flags(method)) == {*COMMON.split(), *OWN[method].split()}
