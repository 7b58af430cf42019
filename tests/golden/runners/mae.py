import torch
from torch import Tensor

from hf_ssl import backbones, masks, schedules
from hf_ssl.methods.masked.mae import MAEConfig, MAEForPreTraining
from tests.golden.harness import Case, runner
from tests.golden.runners import vit

_DECODER = {"decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "predict"}


def build(case: Case, norm_pix: bool) -> MAEForPreTraining:
    official = case.config["mae"]
    ratio = official.get("mlp_ratio", 4)
    width = official.get("decoder_embed_dim", 512)
    model = MAEForPreTraining(
        MAEConfig(
            backbone_config=vit.config({**official, "qkv_bias": True}, case.config["ln_eps"]),
            mask_ratio=case.config["mask_ratio"],
            norm_pix_loss=norm_pix,
            decoder_hidden_size=width,
            decoder_num_layers=official.get("decoder_depth", 8),
            decoder_num_heads=official.get("decoder_num_heads", 16),
            decoder_intermediate_size=int(width * ratio),
        )
    )
    state = {}
    for name, value in case.part("weight").items():
        targets = our_names(name)
        state.update(zip(targets, value.chunk(len(targets)), strict=True))
    counters = {name: buffer for name, buffer in model.state_dict().items() if name in ("step", "total_steps")}
    model.load_state_dict({**state, **counters}, strict=True)
    return model.train()


def our_names(official: str) -> list[str]:
    if official == "mask_token":
        return ["decoder.mask_token"]
    if official == "decoder_pos_embed":
        return ["decoder_positions"]
    if official.startswith("decoder_blocks."):
        return [f"decoder.{name}" for name in vit.native_names(official.removeprefix("decoder_"))]
    if official.startswith("decoder_"):
        stem, leaf = official.rsplit(".", 1)
        return [f"decoder.{_DECODER[stem]}.{leaf}"]
    return [f"backbone.{name}" for name in vit.native_names(official)]


@runner("mae/model")
def model(case: Case) -> dict[str, Tensor]:
    images, noise = case.input("images"), case.input("noise")
    got: dict[str, Tensor] = {}
    for kind, norm_pix in (("norm_pix", True), ("raw_pix", False)):
        mae = build(case, norm_pix)
        output = mae(images[:, None], noise)
        output.loss.backward()
        got[f"{kind}.loss"] = output.loss
        parameters = dict(mae.named_parameters())
        for official in case.part("weight"):
            parts = [parameters[name].grad for name in our_names(official) if name in parameters]
            if parts and all(part is not None for part in parts):
                got[f"grad.{kind}.{official}"] = torch.cat(parts)
    with torch.no_grad():
        prediction, mask, latent = mae.predict(images, noise)
    keep = int(noise.shape[1] * (1 - case.config["mask_ratio"]))
    return got | {
        "latent": latent,
        "pred": prediction,
        "mask": mask,
        "ids_restore": masks.random_masking(noise, keep)[1],
        "patchify": masks.patchify(images, mae.patch),
        "unpatchify_pred": masks.unpatchify(prediction, mae.patch, *images.shape[-2:]),
    }


@runner("mae/sincos2d")
def sincos2d(case: Case) -> dict[str, Tensor]:
    return {
        f"table{index}": backbones.sincos_2d(
            call["embed_dim"], call["grid_size"], prefix=int(call.get("cls_token", False))
        )
        for index, call in enumerate(case.config["calls"])
    }


@runner("mae/lr_schedule")
def lr_schedule(case: Case) -> dict[str, Tensor]:
    """Columns: a plain group and one whose learning rate is scaled by 0.3."""
    got = {}
    for index, call in enumerate(case.config["calls"]):
        peak, end, warmup, total = call["lr"], call["min_lr"], call["warmup_epochs"], call["epochs"]
        ours = [schedules.warmup_cosine(e / total, peak, end, warmup / total) for e in case.config["epochs"]]
        rates = torch.tensor(ours, dtype=torch.float64)
        got[f"lr{index}"] = torch.stack([rates, 0.3 * rates], dim=1)
    return got
