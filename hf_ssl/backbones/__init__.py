"""Any native transformers model as a backbone: what it is, its features and tokens, presets, two towers, speed.

What is not public in transformers' models is touched here alone; ``tests/test_library_parts.py`` lists it.
"""

from .features import (
    classify as classify,
)
from .features import (
    classify_with_outputs as classify_with_outputs,
)
from .features import (
    feature_maps as feature_maps,
)
from .features import (
    features as features,
)
from .features import (
    features_and_outputs as features_and_outputs,
)
from .features import (
    features_and_patches as features_and_patches,
)
from .features import (
    last_attention as last_attention,
)
from .features import (
    make_classifier as make_classifier,
)
from .features import (
    over_views as over_views,
)
from .features import (
    patch_grid as patch_grid,
)
from .features import (
    patch_tokens as patch_tokens,
)
from .features import (
    pool as pool,
)
from .forward import build as build
from .kinds import (
    check_size as check_size,
)
from .kinds import (
    feature_dim as feature_dim,
)
from .kinds import (
    has_cls as has_cls,
)
from .kinds import (
    image_size as image_size,
)
from .kinds import (
    is_image_text as is_image_text,
)
from .kinds import (
    is_timm as is_timm,
)
from .kinds import (
    layer_rates as layer_rates,
)
from .kinds import (
    model_kind as model_kind,
)
from .kinds import (
    num_prefix_tokens as num_prefix_tokens,
)
from .kinds import (
    patch_projection as patch_projection,
)
from .kinds import (
    patch_size as patch_size,
)
from .kinds import (
    unwrap as unwrap,
)
from .positions import (
    interpolate_positions as interpolate_positions,
)
from .positions import (
    set_position_offset as set_position_offset,
)
from .positions import (
    sincos_2d as sincos_2d,
)
from .presets import (
    PRESETS as PRESETS,
)
from .presets import (
    from_preset as from_preset,
)
from .speed import prepare_to_train as prepare_to_train
from .tokens import (
    class_and_patch_tokens as class_and_patch_tokens,
)
from .tokens import (
    class_token_alone as class_token_alone,
)
from .tokens import (
    make_hidable as make_hidable,
)
from .tokens import (
    make_maskable as make_maskable,
)
from .tokens import (
    visible_features as visible_features,
)
from .tokens import (
    visible_tokens as visible_tokens,
)
