"""View recipes that several methods share: lists of `ViewGroup` fields, for a class's `views = presets.NAME`."""

# BYOL (appendix B): after it MoCo v3, Barlow Twins, VICReg and TiCo.
BYOL_COLOUR = {
    "hflip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8,
    "grayscale_p": 0.2, "interpolation": "bicubic",
}  # fmt: skip
_BLURRED = {"key": "pixel_values", "count": 1, **BYOL_COLOUR, "blur_p": 1.0}
_SOLARIZED = {"key": "pixel_values", "count": 1, **BYOL_COLOUR, "blur_p": 0.1, "solarize_p": 0.2}
BYOL = [{**_BLURRED, "scale": [0.08, 1.0]}, {**_SOLARIZED, "scale": [0.08, 1.0]}]

# MoCo v2 (section 3): SimSiam and ReSSL's student as well. Its colours are SimCLR's at half strength.
HALF_COLOUR = {
    "interpolation": "bilinear", "hflip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    "jitter_p": 0.8, "grayscale_p": 0.2,
}  # fmt: skip
MOCO_V2_VIEW = {"key": "pixel_values", "scale": [0.2, 1.0], **HALF_COLOUR, "blur_p": 0.5}
MOCO_V2 = [{**MOCO_V2_VIEW, "count": 2}]

# SimCLR (appendix A): version 2 as well; SwAV's and InfoMin's colours are these.
STRONG_COLOUR = {
    "hflip": 0.5, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8,
    "grayscale_p": 0.2, "blur_p": 0.5,
}  # fmt: skip
SIMCLR = [{"key": "pixel_values", "count": 2, "scale": [0.08, 1.0], **STRONG_COLOUR, "blur_kernel": 0.1}]

# MSN (official configuration), PMSN: the teacher's view and an anchor are large.
MSN = [
    {"key": "pixel_values", "count": 2, "scale": [0.3, 1.0], **HALF_COLOUR, "blur_p": 0.5},
    {"key": "local_pixel_values", "count": 10, "size": 96, "scale": [0.05, 0.3], **HALF_COLOUR, "blur_p": 0.5},
]

# SwAV (appendix A.3): DeepCluster v2 and SeLa v2 as well.
_SWAV_COLOUR = {**STRONG_COLOUR, "interpolation": "bilinear"}
SWAV = [
    {"key": "pixel_values", "count": 2, "scale": [0.14, 1.0], **_SWAV_COLOUR},
    {"key": "local_pixel_values", "count": 6, "size": 96, "scale": [0.05, 0.14], **_SWAV_COLOUR},
]

# The jigsaw's patches of PIRL and InfoMin: nine cells of a crop, in random order (PyContrast's sizes).
JIGSAW = {"key": "patch_pixel_values", "grid": 3, "grid_shuffle": True, "size": 64, "scale": [0.6, 1.0]}

# DINO (section 3.2): BYOL's pair and eight small crops. DINOv2 (official configuration): the same at other scales.
# DINOv3: larger, not mirrored; with a count, the Gram teacher's as well.
_SMALL = {"key": "local_pixel_values", "count": 8, "size": 96, **BYOL_COLOUR, "blur_p": 0.5}
DINO = [
    {**_BLURRED, "scale": [0.4, 1.0]},
    {**_SOLARIZED, "scale": [0.4, 1.0]},
    {**_SMALL, "scale": [0.05, 0.4]},
]
DINOV2 = [
    {**_BLURRED, "scale": [0.32, 1.0]},
    {**_SOLARIZED, "scale": [0.32, 1.0]},
    {**_SMALL, "scale": [0.05, 0.32]},
]
DINOV3 = [
    {**_BLURRED, "scale": [0.32, 1.0], "hflip": 0.0},
    {**_SOLARIZED, "scale": [0.32, 1.0], "hflip": 0.0},
    {**_SMALL, "scale": [0.05, 0.32], "hflip": 0.0, "size": 112},
    {"key": "gram_pixel_values", "count": 0, "size": 512, "crops_of": "pixel_values", "interpolation": "bicubic"},
]
