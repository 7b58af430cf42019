"""View recipes that several methods share: lists of `ViewGroup` fields, for a class's `views = presets.NAME`."""

# BYOL (appendix B): after it MoCo v3, Barlow Twins, VICReg and TiCo.
BYOL_COLOUR = {
    "hflip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8,
    "grayscale_p": 0.2, "interpolation": "bicubic",
}  # fmt: skip
BYOL = [
    {"key": "pixel_values", "count": 1, "scale": [0.08, 1.0], **BYOL_COLOUR, "blur_p": 1.0},
    {"key": "pixel_values", "count": 1, "scale": [0.08, 1.0], **BYOL_COLOUR, "blur_p": 0.1, "solarize_p": 0.2},
]

# MoCo v2 (section 3): SimSiam and ReSSL's student as well.
MOCO_V2_VIEW = {
    "key": "pixel_values", "scale": [0.2, 1.0], "interpolation": "bilinear", "hflip": 0.5, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5,
}  # fmt: skip
MOCO_V2 = [{**MOCO_V2_VIEW, "count": 2}]

# SimCLR (appendix A): version 2 as well.
SIMCLR = [
    {
        "key": "pixel_values", "count": 2, "scale": [0.08, 1.0], "hflip": 0.5, "brightness": 0.8, "contrast": 0.8,
        "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "blur_kernel": 0.1,
    }
]  # fmt: skip

# MSN (official configuration), PMSN: SimCLR's colours at half strength; the teacher's view and an anchor are large.
_MSN_COLOUR = {
    "interpolation": "bilinear", "hflip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5,
}  # fmt: skip
MSN = [
    {"key": "pixel_values", "count": 2, "scale": [0.3, 1.0], **_MSN_COLOUR},
    {"key": "local_pixel_values", "count": 10, "size": 96, "scale": [0.05, 0.3], **_MSN_COLOUR},
]

# SwAV (appendix A.3): DeepCluster v2 and SeLa v2 as well.
_SWAV_COLOUR = {
    "hflip": 0.5, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8,
    "grayscale_p": 0.2, "blur_p": 0.5, "interpolation": "bilinear",
}  # fmt: skip
SWAV = [
    {"key": "pixel_values", "count": 2, "scale": [0.14, 1.0], **_SWAV_COLOUR},
    {"key": "local_pixel_values", "count": 6, "size": 96, "scale": [0.05, 0.14], **_SWAV_COLOUR},
]

# DINOv2 (official configuration): DINO's views at other scales. DINOv3: larger, not mirrored; with a count, the Gram
# teacher's as well.
DINOV2 = [
    {"key": "pixel_values", "count": 1, "scale": [0.32, 1.0], **BYOL_COLOUR, "blur_p": 1.0},
    {"key": "pixel_values", "count": 1, "scale": [0.32, 1.0], **BYOL_COLOUR, "blur_p": 0.1, "solarize_p": 0.2},
    {"key": "local_pixel_values", "count": 8, "size": 96, "scale": [0.05, 0.32], **BYOL_COLOUR, "blur_p": 0.5},
]
_STILL = {**BYOL_COLOUR, "hflip": 0.0}
DINOV3 = [
    {"key": "pixel_values", "count": 1, "scale": [0.32, 1.0], **_STILL, "blur_p": 1.0},
    {"key": "pixel_values", "count": 1, "scale": [0.32, 1.0], **_STILL, "blur_p": 0.1, "solarize_p": 0.2},
    {"key": "local_pixel_values", "count": 8, "size": 112, "scale": [0.05, 0.32], **_STILL, "blur_p": 0.5},
    {"key": "gram_pixel_values", "count": 0, "size": 512, "crops_of": "pixel_values", "interpolation": "bicubic"},
]
