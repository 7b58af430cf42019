"""Every method saves its parts under the names it always had: what was saved before loads."""

import pytest

from hf_ssl.methods import METHODS
from tests.contract.tiny import build

# Of the tiny setting; the native models' own names, in backbone, teacher_backbone and ema, are transformers'.
KEYS = {
    "barlow_twins": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.weight projector.4.bias
        projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var projector.4.weight
        projector.6.weight step total_steps
    """,
    "byol": """
        predictor.0.weight predictor.1.bias predictor.1.num_batches_tracked predictor.1.running_mean
        predictor.1.running_var predictor.1.weight predictor.3.weight projector.0.weight projector.1.bias
        projector.1.num_batches_tracked projector.1.running_mean projector.1.running_var projector.1.weight
        projector.3.weight step teacher_projector.0.weight teacher_projector.1.bias
        teacher_projector.1.num_batches_tracked teacher_projector.1.running_mean teacher_projector.1.running_var
        teacher_projector.1.weight teacher_projector.3.weight total_steps
    """,
    "clip": """
        step total_steps
    """,
    "dcl": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.weight projector.4.num_batches_tracked
        projector.4.running_mean projector.4.running_var projector.4.weight step total_steps
    """,
    "deepcluster_v2": """
        memory.bank.rows memory.bank.waiting.count memory.bank.waiting.index memory.bank.waiting.rows memory.clock
        memory.labels memory.seen projector.0.weight projector.1.bias projector.1.num_batches_tracked
        projector.1.running_mean projector.1.running_var projector.1.weight projector.3.bias projector.3.weight
        prototypes.0.weight prototypes.1.weight prototypes.2.weight step total_steps
    """,
    "dino": """
        center.count center.sum center.value head.last_layer.weight_g head.last_layer.weight_v head.mlp.0.bias
        head.mlp.0.weight head.mlp.2.bias head.mlp.2.weight head.mlp.4.bias head.mlp.4.weight step
        teacher_head.last_layer.weight_g teacher_head.last_layer.weight_v teacher_head.mlp.0.bias
        teacher_head.mlp.0.weight teacher_head.mlp.2.bias teacher_head.mlp.2.weight teacher_head.mlp.4.bias
        teacher_head.mlp.4.weight total_steps
    """,
    "dinov2": """
        center.count center.sum center.value head.last_layer.weight_g head.last_layer.weight_v head.mlp.0.bias
        head.mlp.0.weight head.mlp.2.bias head.mlp.2.weight head.mlp.4.bias head.mlp.4.weight mask_token
        patch_center.count patch_center.sum patch_center.value step teacher_head.last_layer.weight_g
        teacher_head.last_layer.weight_v teacher_head.mlp.0.bias teacher_head.mlp.0.weight teacher_head.mlp.2.bias
        teacher_head.mlp.2.weight teacher_head.mlp.4.bias teacher_head.mlp.4.weight total_steps
    """,
    "dinov3": """
        head.last_layer.weight head.mlp.0.bias head.mlp.0.weight head.mlp.2.bias head.mlp.2.weight head.mlp.4.bias
        head.mlp.4.weight mask_token patch_head.last_layer.weight patch_head.mlp.0.bias patch_head.mlp.0.weight
        patch_head.mlp.2.bias patch_head.mlp.2.weight patch_head.mlp.4.bias patch_head.mlp.4.weight step
        teacher_head.last_layer.weight teacher_head.mlp.0.bias teacher_head.mlp.0.weight teacher_head.mlp.2.bias
        teacher_head.mlp.2.weight teacher_head.mlp.4.bias teacher_head.mlp.4.weight
        teacher_patch_head.last_layer.weight teacher_patch_head.mlp.0.bias teacher_patch_head.mlp.0.weight
        teacher_patch_head.mlp.2.bias teacher_patch_head.mlp.2.weight teacher_patch_head.mlp.4.bias
        teacher_patch_head.mlp.4.weight total_steps
    """,
    "fixmatch": """
        step total_steps
    """,
    "infomin": """
        patch_head.each.0.bias patch_head.each.0.weight patch_head.each.2.bias patch_head.each.2.weight
        patch_head.together.bias patch_head.together.weight projector.0.bias projector.0.weight projector.2.bias
        projector.2.weight queue.filled queue.pointer queue.rows queue.waiting.count queue.waiting.index
        queue.waiting.rows step teacher_projector.0.bias teacher_projector.0.weight teacher_projector.2.bias
        teacher_projector.2.weight total_steps
    """,
    "instdisc": """
        bank.rows bank.waiting.count bank.waiting.index bank.waiting.rows partition projector.bias projector.weight
        step total_steps
    """,
    "lejepa": """
        projector.0.bias projector.0.weight projector.1.bias projector.1.num_batches_tracked
        projector.1.running_mean projector.1.running_var projector.1.weight projector.3.bias projector.3.weight
        projector.4.bias projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var
        projector.4.weight projector.6.bias projector.6.weight step total_steps
    """,
    "mae": """
        decoder.embed.bias decoder.embed.weight decoder.layers.0.attention.k_proj.bias
        decoder.layers.0.attention.k_proj.weight decoder.layers.0.attention.o_proj.bias
        decoder.layers.0.attention.o_proj.weight decoder.layers.0.attention.q_proj.bias
        decoder.layers.0.attention.q_proj.weight decoder.layers.0.attention.v_proj.bias
        decoder.layers.0.attention.v_proj.weight decoder.layers.0.layernorm_after.bias
        decoder.layers.0.layernorm_after.weight decoder.layers.0.layernorm_before.bias
        decoder.layers.0.layernorm_before.weight decoder.layers.0.mlp.fc1.bias decoder.layers.0.mlp.fc1.weight
        decoder.layers.0.mlp.fc2.bias decoder.layers.0.mlp.fc2.weight decoder.mask_token decoder.norm.bias
        decoder.norm.weight decoder.predict.bias decoder.predict.weight decoder_positions step total_steps
    """,
    "moco": """
        projector.0.bias projector.0.weight projector.2.bias projector.2.weight queue.filled queue.pointer
        queue.rows queue.waiting.count queue.waiting.index queue.waiting.rows step teacher_projector.0.bias
        teacher_projector.0.weight teacher_projector.2.bias teacher_projector.2.weight total_steps
    """,
    "mocov3": """
        predictor.0.weight predictor.1.bias predictor.1.num_batches_tracked predictor.1.running_mean
        predictor.1.running_var predictor.1.weight predictor.3.weight predictor.4.num_batches_tracked
        predictor.4.running_mean predictor.4.running_var projector.0.weight projector.1.bias
        projector.1.num_batches_tracked projector.1.running_mean projector.1.running_var projector.1.weight
        projector.3.weight projector.4.bias projector.4.num_batches_tracked projector.4.running_mean
        projector.4.running_var projector.4.weight projector.6.weight projector.7.num_batches_tracked
        projector.7.running_mean projector.7.running_var step teacher_projector.0.weight teacher_projector.1.bias
        teacher_projector.1.num_batches_tracked teacher_projector.1.running_mean teacher_projector.1.running_var
        teacher_projector.1.weight teacher_projector.3.weight teacher_projector.4.bias
        teacher_projector.4.num_batches_tracked teacher_projector.4.running_mean teacher_projector.4.running_var
        teacher_projector.4.weight teacher_projector.6.weight teacher_projector.7.num_batches_tracked
        teacher_projector.7.running_mean teacher_projector.7.running_var total_steps
    """,
    "msn": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.weight projector.4.bias
        projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var projector.4.weight
        projector.6.bias projector.6.weight prototypes step teacher_projector.0.weight teacher_projector.1.bias
        teacher_projector.1.num_batches_tracked teacher_projector.1.running_mean teacher_projector.1.running_var
        teacher_projector.1.weight teacher_projector.3.weight teacher_projector.4.bias
        teacher_projector.4.num_batches_tracked teacher_projector.4.running_mean teacher_projector.4.running_var
        teacher_projector.4.weight teacher_projector.6.bias teacher_projector.6.weight total_steps
    """,
    "nnclr": """
        predictor.0.weight predictor.1.bias predictor.1.num_batches_tracked predictor.1.running_mean
        predictor.1.running_var predictor.1.weight predictor.3.bias predictor.3.weight projector.0.weight
        projector.1.bias projector.1.num_batches_tracked projector.1.running_mean projector.1.running_var
        projector.1.weight projector.3.weight projector.4.bias projector.4.num_batches_tracked
        projector.4.running_mean projector.4.running_var projector.4.weight projector.6.weight projector.7.bias
        projector.7.num_batches_tracked projector.7.running_mean projector.7.running_var projector.7.weight
        queue.filled queue.pointer queue.rows queue.waiting.count queue.waiting.index queue.waiting.rows step
        total_steps
    """,
    "obow": """
        generators.0.0.weight generators.0.1.bias generators.0.1.num_batches_tracked generators.0.1.running_mean
        generators.0.1.running_var generators.0.1.weight generators.0.3.bias generators.0.3.weight
        generators.1.0.weight generators.1.1.bias generators.1.1.num_batches_tracked generators.1.1.running_mean
        generators.1.1.running_var generators.1.1.weight generators.1.3.bias generators.1.3.weight nearest.count
        nearest.sum nearest.value step total_steps vocabulary.0.filled vocabulary.0.pointer vocabulary.0.rows
        vocabulary.0.waiting.count vocabulary.0.waiting.index vocabulary.0.waiting.rows vocabulary.1.filled
        vocabulary.1.pointer vocabulary.1.rows vocabulary.1.waiting.count vocabulary.1.waiting.index
        vocabulary.1.waiting.rows
    """,
    "pirl": """
        bank.rows bank.waiting.count bank.waiting.index bank.waiting.rows partition patch_head.each.0.bias
        patch_head.each.0.weight patch_head.together.bias patch_head.together.weight projector.0.bias
        projector.0.weight step total_steps
    """,
    "pmsn": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.weight projector.4.bias
        projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var projector.4.weight
        projector.6.bias projector.6.weight prototypes step teacher_projector.0.weight teacher_projector.1.bias
        teacher_projector.1.num_batches_tracked teacher_projector.1.running_mean teacher_projector.1.running_var
        teacher_projector.1.weight teacher_projector.3.weight teacher_projector.4.bias
        teacher_projector.4.num_batches_tracked teacher_projector.4.running_mean teacher_projector.4.running_var
        teacher_projector.4.weight teacher_projector.6.bias teacher_projector.6.weight total_steps
    """,
    "ressl": """
        projector.0.bias projector.0.weight projector.2.bias projector.2.weight queue.filled queue.pointer
        queue.rows queue.waiting.count queue.waiting.index queue.waiting.rows step teacher_projector.0.bias
        teacher_projector.0.weight teacher_projector.2.bias teacher_projector.2.weight total_steps
    """,
    "sela_v2": """
        memory.bank.rows memory.bank.waiting.count memory.bank.waiting.index memory.bank.waiting.rows memory.clock
        memory.labels memory.seen projector.0.weight projector.1.bias projector.1.num_batches_tracked
        projector.1.running_mean projector.1.running_var projector.1.weight projector.3.bias projector.3.weight
        prototypes.0.weight prototypes.1.weight prototypes.2.weight step total_steps
    """,
    "simclr": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.weight projector.4.num_batches_tracked
        projector.4.running_mean projector.4.running_var projector.4.weight step total_steps
    """,
    "simclr_v2": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.weight projector.4.bias
        projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var projector.4.weight
        projector.6.weight projector.7.num_batches_tracked projector.7.running_mean projector.7.running_var
        projector.7.weight queue.filled queue.pointer queue.rows queue.waiting.count queue.waiting.index
        queue.waiting.rows step teacher_projector.0.weight teacher_projector.1.bias
        teacher_projector.1.num_batches_tracked teacher_projector.1.running_mean teacher_projector.1.running_var
        teacher_projector.1.weight teacher_projector.3.weight teacher_projector.4.bias
        teacher_projector.4.num_batches_tracked teacher_projector.4.running_mean teacher_projector.4.running_var
        teacher_projector.4.weight teacher_projector.6.weight teacher_projector.7.num_batches_tracked
        teacher_projector.7.running_mean teacher_projector.7.running_var teacher_projector.7.weight total_steps
    """,
    "simsiam": """
        predictor.0.weight predictor.1.bias predictor.1.num_batches_tracked predictor.1.running_mean
        predictor.1.running_var predictor.1.weight predictor.3.bias predictor.3.weight projector.0.weight
        projector.1.bias projector.1.num_batches_tracked projector.1.running_mean projector.1.running_var
        projector.1.weight projector.3.weight projector.4.bias projector.4.num_batches_tracked
        projector.4.running_mean projector.4.running_var projector.4.weight projector.6.weight
        projector.7.num_batches_tracked projector.7.running_mean projector.7.running_var step total_steps
    """,
    "swav": """
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.bias projector.3.weight prototypes.0.weight
        queue.filled queue.pointer queue.rows queue.waiting.count queue.waiting.index queue.waiting.rows step
        total_steps
    """,
    "tico": """
        covariance.count covariance.sum covariance.value projector.0.weight projector.1.bias
        projector.1.num_batches_tracked projector.1.running_mean projector.1.running_var projector.1.weight
        projector.3.bias projector.3.weight step teacher_projector.0.weight teacher_projector.1.bias
        teacher_projector.1.num_batches_tracked teacher_projector.1.running_mean teacher_projector.1.running_var
        teacher_projector.1.weight teacher_projector.3.bias teacher_projector.3.weight total_steps
    """,
    "vicreg": """
        projector.0.bias projector.0.weight projector.1.bias projector.1.num_batches_tracked
        projector.1.running_mean projector.1.running_var projector.1.weight projector.3.bias projector.3.weight
        projector.4.bias projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var
        projector.4.weight projector.6.weight step total_steps
    """,
    "vicregl": """
        map_projector.0.bias map_projector.0.weight map_projector.1.bias map_projector.1.num_batches_tracked
        map_projector.1.running_mean map_projector.1.running_var map_projector.1.weight map_projector.3.bias
        map_projector.3.weight map_projector.4.bias map_projector.4.num_batches_tracked map_projector.4.running_mean
        map_projector.4.running_var map_projector.4.weight map_projector.6.weight projector.0.bias
        projector.0.weight projector.1.bias projector.1.num_batches_tracked projector.1.running_mean
        projector.1.running_var projector.1.weight projector.3.bias projector.3.weight projector.4.bias
        projector.4.num_batches_tracked projector.4.running_mean projector.4.running_var projector.4.weight
        projector.6.weight step total_steps
    """,
    "w_mse": """
        projector.0.bias projector.0.weight projector.1.bias projector.1.num_batches_tracked
        projector.1.running_mean projector.1.running_var projector.1.weight projector.3.bias projector.3.weight step
        total_steps
    """,
}
NATIVE = ("backbone.", "teacher_backbone.", "ema.")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_state_dict_keys_are_the_recorded_ones(name: str) -> None:
    own = {key for key in build(name).state_dict() if not key.startswith(NATIVE)}
    assert own == set(KEYS[name].split()), "published repos and checkpoints hold the recorded names"
