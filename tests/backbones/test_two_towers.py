import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    VisionTextDualEncoderConfig,
    ViTConfig,
    ViTModel,
)

from hf_ssl import backbones
from hf_ssl.backbones import two_towers
from hf_ssl.processing import tokenizers
from tests.contract.tiny import CAPTIONS, RESNET, VIT

WORDS = ["grinning face", "face with tears of joy", "red heart", "flag: Åland Islands", "GRINNING CAT"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return tokenizers.train_tokenizer(WORDS * 3, vocab_size=600, context_length=16)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as published encoders are: model, with its pooler, and tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "face"]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_a_trained_tokenizer_is_clips(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("Grinning  FACE")["input_ids"]
    assert ids == tokenizer("grinning face")["input_ids"]  # lower case, one space
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.tokenize("grinning face") == ["grinning</w>", "face</w>"]  # seen words are one token
    assert tokenizer.decode(ids, skip_special_tokens=True) == "grinning face"
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id} == {len(tokenizer) - 2, len(tokenizer) - 1}
    assert len(tokenizer) <= 600 and tokenizer.model_max_length == 16


def test_no_text_holds_an_unknown_token(tokenizer: CLIPTokenizer) -> None:
    """CLIP's unknown token is the end of text: the tower would pool in the middle of the caption."""
    for strange in ("漢字", "naïve ☃", "\x00\x07", "🏳️‍🌈 z", "".join(map(chr, range(33, 1500)))):
        assert tokenizer(strange)["input_ids"][1:-1].count(tokenizer.eos_token_id) == 0


def test_a_trained_tokenizer_round_trips_through_plain_transformers(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for again in (CLIPTokenizer.from_pretrained(tmp_path), tokenizers.load_tokenizer(tmp_path)):
        assert type(again) is CLIPTokenizer and again.model_max_length == 16
        assert again(WORDS)["input_ids"] == tokenizer(WORDS)["input_ids"]
        assert again.get_vocab() == tokenizer.get_vocab()
        assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is CLIPTokenizer


def test_training_follows_the_captions_and_the_size() -> None:
    sizes = [len(tokenizers.train_tokenizer(CAPTIONS, size, 16)) for size in (514, 530, 4096)]
    assert sizes[:2] == [514, 530] and 530 < sizes[2] < 4096  # few captions give fewer merges
    assert (
        tokenizers.train_tokenizer(CAPTIONS, 530).get_vocab()
        == tokenizers.train_tokenizer(iter(CAPTIONS), 530).get_vocab()
    )
    learned = tokenizers.train_tokenizer(CAPTIONS, 4096, 16)
    assert len(learned.tokenize(CAPTIONS[0])) == 3
    vocabulary, merges = learned.get_vocab(), json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]
    assert all("".join(merge) in vocabulary for merge in merges)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"vocab_size": 513}, "vocab_size must be at least 514"),
    ({"context_length": 15}, "context_length must be from 16 to 77 tokens, not 15"),
    ({"context_length": 78}, "context_length must be"),
])  # fmt: skip
def test_settings_no_clip_tokenizer_has_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokenizers.train_tokenizer(CAPTIONS, **arguments)


def test_folders_without_a_usable_tokenizer_are_named(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tokenizers.load_tokenizer(tmp_path)
    unpadded = tokenizers.load_tokenizer(bert)
    unpadded.pad_token = None
    unpadded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no padding token"):
        tokenizers.load_tokenizer(tmp_path)


# --- config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", two_towers.TEXT_PRESETS)
def test_presets_beside_a_vit_are_a_clip_model(preset: str, tokenizer: CLIPTokenizer) -> None:
    config = two_towers.image_text_config(
        backbones.from_preset("vit-pico", image_size=32, patch_size=8), preset, tokenizer, 24
    )
    assert type(config) is CLIPConfig and config.projection_dim == 24
    words, vision = config.text_config, config.vision_config
    assert (words.vocab_size, words.max_position_embeddings) == (len(tokenizer), 16)
    assert (words.eos_token_id, words.bos_token_id, words.pad_token_id) == (
        tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    assert (vision.hidden_size, vision.image_size, vision.patch_size) == (128, 32, 8)
    assert vision.projection_dim == words.projection_dim == 24
    assert (
        two_towers.image_text_config(vision, preset, tokenizer, context_length=12).text_config.max_position_embeddings
        == 12
    )


def test_the_text_tower_pools_at_the_end_of_the_text(tokenizer: CLIPTokenizer) -> None:
    vision = backbones.from_preset("vit-pico", image_size=16, patch_size=8)
    model = CLIPModel(two_towers.image_text_config(vision, "text-pico", tokenizer, 8)).eval()
    texts = tokenizer(
        ["red heart", "face with tears of joy red"], padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.text_model(**texts)
        alone = model.get_text_features(**tokenizer(["red heart"], return_tensors="pt")).pooler_output
        padded = model.get_text_features(**texts).pooler_output
    ends = [len(tokenizer(t)["input_ids"]) - 1 for t in ("red heart", "face with tears of joy red")]
    assert ends[0] < ends[1] < 15
    for row, end in enumerate(ends):
        assert torch.equal(output.pooler_output[row], output.last_hidden_state[row, end])
    torch.testing.assert_close(padded[:1], alone, rtol=0, atol=1e-6)  # padding changes nothing


def test_tokenizers_at_whose_end_clip_cannot_pool_are_refused(bert: Path) -> None:
    vision = dict(VIT)
    assert tokenizers.end_token_id(tokenizers.load_tokenizer(bert)) == 3  # [SEP]
    config = two_towers.image_text_config(vision, "text-pico", tokenizers.load_tokenizer(bert), 8, context_length=16)
    assert config.text_config.eos_token_id == 3 and config.text_config.bos_token_id == 2

    second = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "red"]
    ends_in_two = BertTokenizer(vocab={word: i for i, word in enumerate(second)})
    with pytest.raises(ValueError, match="has the id 2"):
        two_towers.image_text_config(vision, "text-pico", ends_in_two)
    endless = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token="<e>", pad_token="<p>"
    )
    endless.add_tokens(["a"])
    with pytest.raises(ValueError, match="adds no end-of-text token"):
        two_towers.image_text_config(vision, "text-pico", endless)


def test_transformers_still_pools_at_the_highest_id_where_the_end_is_two() -> None:
    """The reason for refusing it; if this fails, the refusal can go."""
    tower = AutoModel.from_config(
        CLIPTextConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=2,
        )
    ).eval()
    output = tower(torch.tensor([[1, 7, 5, 2]]))
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, 1])


def test_other_towers_are_a_dual_encoder(tokenizer: CLIPTokenizer, bert: Path) -> None:
    config = two_towers.image_text_config({**VIT, "image_size": [8, 16]}, "text-pico", tokenizer, 8)
    assert type(config) is VisionTextDualEncoderConfig and type(config.vision_config) is ViTConfig
    config = two_towers.image_text_config(dict(VIT), bert, tokenizers.load_tokenizer(bert), 8, context_length=16)
    assert type(config.text_config) is BertConfig and config.text_config.hidden_size == 16
    native = AutoModel.from_config(config)
    assert backbones.feature_dim(native) == 8
    vision = {"model_type": "convnextv2", "hidden_sizes": [8, 8, 8, 12], "depths": [1, 1, 1, 1], "image_size": 32}
    config = two_towers.image_text_config(vision, "text-pico", tokenizer, 8)
    assert config.vision_config.hidden_size == 12
    assert VisionTextDualEncoderConfig.from_dict(config.to_dict()).vision_config.hidden_size == 12


def test_parts_that_do_not_fit_are_refused(tokenizer: CLIPTokenizer, bert: Path) -> None:
    with pytest.raises(ValueError, match="tokens, the text tower embeds 8: they are no pair"):
        two_towers.image_text_config(dict(VIT), str(bert), tokenizer)
    with pytest.raises(ValueError, match="context_length 30 exceeds the 24 positions"):
        two_towers.image_text_config(dict(VIT), bert, tokenizers.load_tokenizer(bert), context_length=30)
    with pytest.raises(ValueError, match=r"reachable Hub id of a native model. The nearest preset is text-pico"):
        two_towers.image_text_config(dict(VIT), "text-piko", tokenizer)
    with pytest.raises(ValueError, match=r"ResNetModel cannot be a tower .* shape"):
        two_towers.image_text_config(
            ResNetConfig(**{k: v for k, v in RESNET.items() if k != "model_type"}), "text-pico", tokenizer
        )
    distil = DistilBertConfig(vocab_size=600, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    with pytest.raises(ValueError, match=r"DistilBertModel cannot be a tower .* no pooler_output"):
        two_towers.image_text_config(dict(VIT), distil, tokenizer)
    with pytest.raises(ValueError, match="a vit model has no vocabulary"):
        two_towers.image_text_config(dict(VIT), ViTConfig(), tokenizer)


# --- pretrained towers --------------------------------------------------------------------------------------------


def test_a_pretrained_tower_moves_in_and_the_other_stays(bert: Path, tmp_path: Path) -> None:
    config = two_towers.image_text_config(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}), bert,
                                    tokenizers.load_tokenizer(bert), 8, context_length=16)  # fmt: skip
    model, published = AutoModel.from_config(config), AutoModel.from_pretrained(bert)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    two_towers.load_tower(model, "text", bert)
    for key, value in published.state_dict().items():
        assert torch.equal(model.text_model.state_dict()[key], value), key
    rest = {key for key in before if not key.startswith("text_model.")}
    assert rest and all(torch.equal(before[key], model.state_dict()[key]) for key in rest)

    torch.manual_seed(9)
    ViTModel(config.vision_config, add_pooling_layer=False).save_pretrained(tmp_path)  # no pooler in the checkpoint
    two_towers.load_tower(model, "vision", tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    for key, value in loaded.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"lacks .* tensors of the text tower, a BertModel"):
        two_towers.load_tower(model, "text", tmp_path)


def test_a_tower_of_a_clip_repo_moves_in(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    vision = backbones.from_preset("vit-pico", image_size=16, patch_size=8)
    published = CLIPModel(two_towers.image_text_config(vision, "text-pico", tokenizer, 8))
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModel.from_config(
        two_towers.image_text_config(dict(VIT), tmp_path, tokenizers.load_tokenizer(tmp_path), 8)
    )
    two_towers.load_tower(model, "text", tmp_path)
    for key, value in published.text_model.state_dict().items():
        assert torch.equal(model.text_model.state_dict()[key], value), key
