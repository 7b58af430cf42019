"""Image-text models: the pipeline's own scores, the ensemble rule, retrieval by hand, and files of prompts."""

import io
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTModel,
    pipeline,
)

from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation import (
    DEFAULT_TEMPLATES,
    EMOJI_GROUPS,
    SIMPLE_TEMPLATES,
    Prompts,
    class_embeddings,
    embed_texts,
    evaluate_backbone,
    load_prompts,
    model_kind,
    natural_measures,
    text_retrieval,
    zero_shot,
    zero_shot_predict,
)
from hf_ssl.evaluation.prompts import resolve
from hf_ssl.evaluation.zero_shot import recalls, zero_shot_accuracy

WORDS = "a photo of the cat dog bird red green blue thing picture"
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer():
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "<s>", "</s>"]))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        model_max_length=12, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def image_processor():
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def make(kind):
    """(model, processor) of a tiny native image-text model with random weights."""
    words, vision = tokenizer(), {**TINY, "image_size": 16, "patch_size": 8}
    text = {**TINY, "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPConfig(
            text_config={**text, "max_position_embeddings": 12}, vision_config=vision, projection_dim=8
        )
        model, processor = CLIPModel(config), CLIPProcessor(image_processor(), words)
    elif kind == "siglip":
        config = SiglipConfig(text_config={**text, "max_position_embeddings": 64}, vision_config=vision)
        words.model_max_length = 64
        model, processor = SiglipModel(config), CLIPProcessor(image_processor(), words)
    else:
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            ViTConfig(**vision), BertConfig(**text, max_position_embeddings=12), projection_dim=8
        )
        model = VisionTextDualEncoderModel(config, ViTModel(config.vision_config), BertModel(config.text_config))
        processor = VisionTextDualEncoderProcessor(image_processor(), words)
    with torch.no_grad():  # random weights see little: make the answers differ by more than rounding
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval(), processor


def pictures(labels, captions=None, names=None):
    rng, rows = np.random.default_rng(1), []
    for _ in labels:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=names) if names else datasets.Value("string"),
        caption=datasets.List(datasets.Value("string")),
    )
    rows = {"image": rows, "label": labels, "caption": captions or [[] for _ in labels]}
    dataset = datasets.Dataset.from_dict(rows, features)
    return ImageSource("toys", dataset, "test", ("label",), caption_column="caption" if captions else None)


# --- zero-shot --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip", "dual"])
def test_scores_are_those_of_plain_transformers(kind, tmp_path):
    model, processor = make(kind)
    names, template = ["cat", "dog", "bird thing"], "a photo of the {}"
    source = pictures(["cat", "dog", "bird thing", "cat"])
    found = zero_shot_predict(model, processor, source, prompts=Prompts((template,)), progress=False)
    assert found.names == tuple(sorted(names)) and found.labels.tolist() == [1, 2, 0, 1]
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in source.dataset]
    if kind == "dual":  # the pipeline takes no dual encoder: the model's own logits
        inputs = processor(
            text=[template.format(n) for n in found.names], images=images, return_tensors="pt", padding=True
        )
        with torch.no_grad():
            expected = model(**inputs).logits_per_image.softmax(1)
    else:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        classify = pipeline(
            "zero-shot-image-classification", model=CLIPModel.from_pretrained(tmp_path) if kind == "clip" else model,
            tokenizer=processor.tokenizer, image_processor=processor.image_processor, device="cpu",
        )  # fmt: skip
        answers = classify(images, candidate_labels=list(found.names), hypothesis_template=template)
        scores = [{a["label"]: a["score"] for a in answer} for answer in answers]
        expected = torch.tensor([[s[name] for name in found.names] for s in scores])
        if kind == "clip":  # from the folder, with the processor that lies in it
            again = zero_shot_predict(
                str(tmp_path), None, source, prompts=Prompts((template,)), progress=False, device="cpu"
            )
            assert torch.allclose(again.probabilities, expected, atol=1e-5, rtol=0)
    assert torch.allclose(found.probabilities, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3  # the comparison would see a wrong order


def test_the_ensemble_is_embed_normalise_mean_normalise():
    model, processor = make("clip")
    prompts = Prompts(("a {}", "the {}"), {"cat": ("cat", "red cat"), "dog": ("dog",)})
    found = class_embeddings(model, processor, ("cat", "dog"), prompts)
    for row, texts in zip(
        found, (["a cat", "the cat", "a red cat", "the red cat"], ["a dog", "the dog"]), strict=True
    ):
        with torch.no_grad():
            each = [
                model.get_text_features(**processor(text=[t], return_tensors="pt")).pooler_output[0] for t in texts
            ]
        mean = torch.stack([vector / vector.norm() for vector in each]).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
    plain = torch.stack(each).mean(0)  # without the inner normalisation it is another vector
    assert not torch.allclose(row, plain / plain.norm(), atol=1e-5)


def test_batches_do_not_change_embeddings_and_long_texts_are_cut():
    model, processor = make("clip")
    texts = ["cat", "a photo of the red dog", "bird", "a " * 40]
    whole = embed_texts(model, processor, texts)
    assert torch.allclose(whole, embed_texts(model, processor, texts, batch_size=1), atol=1e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(4))


def test_top5_needs_more_than_five_classes():
    """Trap 12."""
    model, processor = make("clip")
    few = zero_shot(model, processor, pictures([0, 1, 2, 0], names=["cat", "dog", "bird"]), progress=False)
    assert set(few) == {"top1", "majority", "chance"} and few["majority"] == 0.5 and few["chance"] == 1 / 3
    six = ["cat", "dog", "bird", "red", "green", "blue"]
    many = zero_shot(model, processor, pictures([0, 5, -1], names=six), progress=False)
    found = zero_shot_predict(model, processor, pictures([0, 5, -1], names=six), progress=False)
    assert found.labels.tolist() == [0, 5, -1]
    worst = found.probabilities[:2].argmin(1).tolist()
    assert many["top5"] == np.mean([worst[0] != 0, worst[1] != 5]) and many["top1"] <= many["top5"]
    found.labels[:] = -1
    with pytest.raises(ValueError, match="No picture has a label"):
        zero_shot_accuracy(found)


def test_wrong_models_and_sources_are_told():
    model, processor = make("clip")
    bare = pictures(["cat", "dog"])
    with pytest.raises(ValueError, match="no texts"):
        text_retrieval(model, processor, bare, progress=False)
    with pytest.raises(ValueError, match="no text tower"):
        zero_shot(ViTModel(ViTConfig(**TINY, image_size=16, patch_size=8)), image_processor(), bare, progress=False)
    with pytest.raises(ValueError, match="tokenizer"):
        zero_shot(model, image_processor(), bare, progress=False)
    bare.labels = ()
    with pytest.raises(ValueError, match="no labels"):
        zero_shot(model, processor, bare, progress=False)


# --- retrieval --------------------------------------------------------------------------------------------------


def test_recalls_by_hand():
    """Four pictures, three texts: pictures 0 and 1 share text 0, picture 2 has texts 1 and 2, picture 3 none."""
    unit = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    images = torch.nn.functional.normalize(
        torch.tensor([[1, 0.5, 0.1], [0.1, 1, 0.5], [0.5, 0.1, 1], [0.2, 1, 0.1]]), dim=1
    )
    found = recalls(images, unit, [{0}, {0}, {1, 2}, set()], k=(1, 2, 10))
    # picture 0 finds text 0 first, picture 1 last, picture 2 its text 2 first; picture 3 asks nothing
    assert (found["i2t_r1"], found["i2t_r2"], found["i2t_r10"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0)
    # text 0 finds picture 0 first; text 1 finds 3, 1, 0 before 2; text 2 finds 2 first
    assert (found["t2i_r1"], found["t2i_r2"], found["t2i_r10"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0)
    assert found["i2t_r1_chance"] == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert found["i2t_r2_chance"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["t2i_r1_chance"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert found["t2i_r2_chance"] == pytest.approx((1 - 1 / 6 + 1 / 2 + 1 / 2) / 3)
    assert found["images"] == 4 and found["texts"] == 3


def test_equal_texts_are_one_candidate_and_all_texts_count():
    model, processor = make("clip")
    captions = [["red cat", "a cat"], ["red cat"], [], ["dog", "the dog"]]
    source = pictures(["cat", "cat", "cat", "dog"], captions)
    found = text_retrieval(model, processor, source, progress=False)
    assert found["texts"] == 4 and found["images"] == 4
    assert found["i2t_r5"] == found["i2t_r10"] == 1.0  # fewer candidates than k
    assert found["i2t_r1_chance"] == pytest.approx((2 / 4 + 1 / 4 + 2 / 4) / 3)
    first = text_retrieval(model, processor, source, progress=False, canonical=True, k=(1,))
    assert first["texts"] == 2 and set(first) == {
        "i2t_r1", "t2i_r1", "i2t_r1_chance", "t2i_r1_chance", "images", "texts",
    }  # fmt: skip


def test_emoji_have_two_right_pictures_a_text():
    model, processor = make("clip")
    found = text_retrieval(model, processor, load_source("emoji", "test"), progress=False)
    assert found["images"] == 756 and found["texts"] == 378
    assert found["i2t_r10_chance"] == pytest.approx(10 / 378)
    one_of_two = 1 - math.comb(754, 10) / math.comb(756, 10)
    assert found["t2i_r10_chance"] == pytest.approx(one_of_two)


# --- prompts ----------------------------------------------------------------------------------------------------


def test_the_packaged_prompts_fit_the_emoji():
    assert set(load_source("emoji", "test").dataset["group"][:]) == set(EMOJI_GROUPS)
    assert all(len(words) >= 3 for words in EMOJI_GROUPS.values())
    assert resolve(None, sorted(EMOJI_GROUPS)).texts("flags")[0] == EMOJI_GROUPS["flags"][0]
    assert resolve(None, ("cat", "red_dog")).texts("red_dog") == [t.format("red dog") for t in DEFAULT_TEMPLATES]
    assert len(SIMPLE_TEMPLATES) == 7 and load_prompts("simple").templates == SIMPLE_TEMPLATES


def test_a_file_of_prompts(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"templates": ["the {}"], "classes": {"cat": ["cat", "red cat"]}}))
    assert load_prompts(tmp_path / "p.json").texts("cat") == ["the cat", "the red cat"]
    (tmp_path / "p.yaml").write_text("classes:\n  cat: a cat\n  dog: [a dog, a red dog]\n")
    prompts = load_prompts(tmp_path / "p.yaml")
    assert prompts.texts("dog") == ["a dog", "a red dog"] and prompts.texts("cat") == ["a cat"]
    for names, words in (
        (("cat", "dog", "bird"), "lack 'bird'"),
        (("cat",), "describe 'dog', which is no class of the data"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve(prompts, names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", "neither YAML nor JSON"),
        ("templates: ['no place']", "holds {} once"),
        ("templates: []", "list of texts"),
        ("classes: [cat, dog]", "map each class name"),
        ("classes: {cat: [1]}", "list of texts"),
        ("prompts: [a]", "must hold the keys"),
        ("", "must hold the keys"),
    ],
)
def test_a_wrong_file_of_prompts_is_told(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_prompts(tmp_path / "p.yaml")
    assert "p.yaml" in str(caught.value)
    with pytest.raises(ValueError, match=r"gone\.yaml cannot be read"):
        load_prompts(tmp_path / "gone.yaml")


# --- the table --------------------------------------------------------------------------------------------------


def test_the_table_of_an_image_text_model(tmp_path):
    model, processor = make("clip")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert model_kind(tmp_path) == "image_text" and natural_measures(tmp_path)[:2] == ("zero_shot", "text_retrieval")
    source = load_source("emoji", "test")
    options = {"measures": (*natural_measures(tmp_path), "segmentation"), "labels": ("group",), "k": (5,)}
    rows = evaluate_backbone(
        str(tmp_path), None, source, source, progress=False, max_images=60, device="cpu", **options
    )
    assert [row["model"] for row in rows] == ["majority class", "chance", "raw pixels", "untrained", "trained"]
    table = {row["model"]: row for row in rows}
    scores = zero_shot(model, processor, source, "group", progress=False, max_images=60)
    assert table["majority class"]["zeroshot_group"] == scores["majority"]
    assert (table["trained"]["zeroshot_group"], table["trained"]["zeroshot5_group"]) == (
        scores["top1"],
        scores["top5"],
    )
    kept = {"zeroshot_group", "zeroshot5_group", "i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"}
    assert kept | {"knn5_group", "std", "rankme", "jaccard_best"} <= set(table["trained"])
    assert set(table["chance"]) - {"protocol", "model"} == {
        key for key in kept if key[1:3] == "2t" or key[1:3] == "2i"
    }
    assert not kept & set(table["raw pixels"]) and table["untrained"]["std"] != table["trained"]["std"]
    found = text_retrieval(model, processor, source, progress=False, max_images=60)
    assert table["trained"]["i2t_r10"] == found["i2t_r10"]


def test_the_file_of_prompts_in_the_readme_is_one(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "p.yaml").write_text(readme.split("```yaml\n", 1)[1].split("```")[0])
    prompts = load_prompts(tmp_path / "p.yaml")
    assert set(prompts.classes) == {"cat", "n02084071"} and prompts.texts("cat")[1] == "a drawing of a cat."
