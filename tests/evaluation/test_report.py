"""The report of real run folders: complete, self-contained, escaped, and never silent about what is missing."""

import html.parser
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, BitImageProcessor

import hf_ssl
from hf_ssl.evaluation import charts, layout, pictures, untrained
from hf_ssl.evaluation.album import Missing, Run, load_album
from hf_ssl.evaluation.report import skipped_images, verdict, write_report

HOSTILE = "<img src=x onerror=alert(1)> & 'so'.png"
RESULTS = [
    {"protocol": "mine", "model": "raw pixels", "knn20_label": 0.5, "r1": 0.9, "std": 0.1},
    {"protocol": "mine", "model": "untrained", "knn20_label": 0.25, "r1": 0.125, "std": 0.2},
    {"protocol": "mine", "model": "trained", "knn20_label": 0.75, "r1": 0.25, "std": 0.3},
]
VIT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 pictures of two kinds, one with a hostile name and one that is no picture."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind in ("bars", "dots"):
        (root / kind).mkdir()
        for i in range(12):
            picture = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            if kind == "bars":
                picture[:, i % 8 :: 8] = 255
            else:
                picture[i % 8 :: 8, ::4] = (250, 120, 0)
            name = HOSTILE if (kind, i) == ("dots", 0) else f"{kind}{i}.png"
            Image.fromarray(picture).save(root / kind / name)
    (root / "dots" / "broken <b>.png").write_bytes(b"\x89PNG no more")
    return root


def _save(run, model, folder, **card):
    model.save_pretrained(run)
    BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(run)
    (run / "run.json").write_text(json.dumps({"dataset": str(folder), "seed": 3, **card}))


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory, folder):
    run = tmp_path_factory.mktemp("run")
    backbone = AutoConfig.for_model("vit", image_size=16, patch_size=4, **VIT)
    decoder = {"decoder_hidden_size": 16, "decoder_num_layers": 1, "decoder_num_heads": 2}
    model = hf_ssl.MAEForPreTraining(hf_ssl.MAEConfig(backbone_config=backbone, **decoder))
    model.save_pretrained(run / "ssl")
    log = [
        {"step": s, "loss": 2 / s, "learning_rate": 0.1, "feature_std": 0.2, "rankme": 9.0, "novel": s} for s in (1, 2)
    ]
    log.append({"step": 2, "eval_knn_top1": 0.5, "eval_knn_label": 0.5})
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    card = {"method": "mae", "command": "hf-ssl train mae --x '<script>'", "results": RESULTS, "time_seconds": 3700}
    card |= {"skipped_images": {"count": 1, "names": [f"{HOSTILE}: truncated"]}, "environment": {"torch": "2 & up"}}
    _save(run, model.backbone, folder, arguments={"seed": 3, "odd": [1, None]}, **card)
    return run


@pytest.fixture(scope="module")
def page(mae_run):
    path = write_report(mae_run, progress=False)
    assert path == mae_run / "report.html" and path.stat().st_size < 6e6
    return path.read_text(encoding="utf-8")


class _Page(html.parser.HTMLParser):
    """Tags with their attributes, and every section's text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sections, self.open, self.section = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "input", "path", "circle"):
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] = self.sections.get(self.section, "") + data


def test_the_page_is_complete(page):
    found = _Page(page)
    assert not found.open, "unclosed tags"
    assert list(found.sections) == [
        "results", "training", "map", "neighbours", "attention", "reconstruction", "skipped", "repeat",
    ]  # fmt: skip
    assert 'class="missing"' not in page
    assert "MAE on " in page and "2111.06377" in page and "1 h 01 min" in page
    for words in ("Loss", "Online kNN", "Spread of the features", "1/√d", "Learning rate", "Novel"):
        assert words in found.sections["training"]
    assert "head 2" in found.sections["attention"] and "mean, untrained" in found.sections["attention"]
    assert "borrows its brightness" in found.sections["reconstruction"]
    assert "2 & up" in found.sections["repeat"] and "[1, null]" in found.sections["repeat"]


def test_nothing_is_fetched_from_anywhere(page):
    for tag, attributes in _Page(page).tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\((?!data:)", page)
    assert "default-src 'none'" in page  # the browser would refuse it anyway


def test_names_cannot_become_markup(page):
    tags = _Page(page).tags
    assert "<img src=x" not in page and "<script>'" not in page and page.count("<script>") == 1
    assert all("onerror" not in attributes for _, attributes in tags)
    titles = [attributes.get("title", "") for tag, attributes in tags if tag == "i"]
    assert f"{HOSTILE} · dots" in titles  # read back whole
    skipped = _Page(page).sections["skipped"]
    assert HOSTILE in skipped and "broken <b>.png" in skipped and "Training skipped 1 picture" in skipped


def test_every_picture_has_words_and_symbols_beside_colour(page):
    tags = _Page(page).tags
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    tiles = re.findall(r'<div class="tile (\w*)">(.*?)</div>', page)
    assert tiles and all({"right": "✓", "wrong": "✗"}[kind] in body for kind, body in tiles)


def test_the_best_of_each_column_is_bold_and_health_is_not_scored(page):
    rows = re.findall(r'<th scope="row">(raw pixels|untrained|trained)</th>(.*?)</tr>', page)
    bold = {name: re.findall(r"<b>([\d.]+)</b>", cells) for name, cells in rows}
    assert bold == {"raw pixels": ["0.900"], "untrained": [], "trained": ["0.750"]}


def test_what_is_missing_says_why(tmp_path, folder):
    resnet = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    _save(tmp_path, untrained(resnet, 1), folder)
    found = _Page(write_report(tmp_path, progress=False, max_images=10).read_text()).sections
    assert "was not evaluated" in found["results"] and "no trainer_state.json" in found["training"]
    assert "attention" not in found  # a ResNet has no class token: nothing is missing
    assert "the run folder has no ssl/" in found["reconstruction"]
    assert "t-SNE of 10 pictures" in found["map"] and "does not hold the command" in found["repeat"]
    assert "does not say how many" in found["skipped"]


def test_what_is_wider_than_the_screen_says_so(page):
    """Tables, map and strips scroll within their box; a script shows the hint where the box is too narrow."""
    inside = re.findall(r'<div class="wide">\s*<(?:table|div class="(?:map|strip))', page)
    assert len(inside) == len(re.findall(r'<table|<div class="(?:map|strip)', page)) > 3
    assert "box.scrollWidth > box.clientWidth" in page and "scroll it sideways" in page and ".wide.more {" in page


def test_ruined_files_and_a_vanished_dataset_do_not_stop_it(tmp_path):
    (tmp_path / "run.json").write_text('{"dataset": "/nowhere/<b>", "resu')
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"log_history": [{"step": 2, "loss": NaN}, 7]}')
    found = _Page(text := write_report(tmp_path, progress=False).read_text())
    assert "run.json cannot be read" in text and "no finite value: loss" in found.sections["training"]
    assert "no exported model" in found.sections["map"]
    (tmp_path / "run.json").write_text(json.dumps({"dataset": "/nowhere/<b>", "results": "?", "skipped_images": []}))
    AutoConfig.for_model("vit", image_size=16, patch_size=4, **VIT).save_pretrained(tmp_path)
    found = _Page(write_report(tmp_path, progress=False).read_text())
    assert "could not be loaded" in found.sections["neighbours"] and "no picture" in found.sections["skipped"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(tmp_path)


def test_before_is_the_checkpoint_the_run_started_from(tmp_path, mae_run, folder):
    start = tmp_path / "start"
    model = untrained(str(mae_run), 7)
    _save(start, model, folder)
    run = Run.open(mae_run)
    run.card["init"] = {"from_pretrained": str(start)}
    album = load_album(run, progress=False)
    assert album.before_name == f"before ({start})"
    assert torch.equal(album.before_model.embeddings.cls_token, model.embeddings.cls_token)
    assert album.names.count(HOSTILE) == 1 and len(album.names) == 24 == len(album.after)
    assert set(album.labels["label"]) == {"bars", "dots"} and "broken" in album.skipped[0]


def test_gallery_png(mae_run, tmp_path):
    path = pictures.gallery_png(mae_run, tmp_path / "g.png", queries=3)
    found = np.asarray(Image.open(path))
    assert found.shape[0] == 40 + 3 * 88 + 8
    frames = {tuple(colour) for colour in found[40:].reshape(-1, 3)[::7]}
    assert pictures.WRONG in frames or pictures.RIGHT in frames


def test_verdict_says_what_did_not_improve():
    mood, (sentence,) = verdict(RESULTS)
    assert mood == "mixed"
    assert sentence == (
        "Mine: the trained model is better than the untrained network on all 2 measures (kNN-20 0.25 → 0.75), and "
        "better than raw pixels on 1 of 2 measures (kNN-20 0.50 → 0.75), but worse on 1 (R@1 0.90 → 0.25)."
    )
    worse = [{**RESULTS[1], "knn20_label": 0.8, "r1": 0.3}, RESULTS[2]]
    assert verdict(worse)[0] == "bad" and "worse than the untrained network on all 2" in verdict(worse)[1][0]
    assert verdict(None)[0] == "" and "nothing can be said" in verdict([])[1][0]


@pytest.mark.parametrize(
    ("found", "expected"),
    [(None, (None, [])), (4, (4, [])), (["a"], (1, ["a"])), ({"count": 9, "names": ["a"]}, (9, ["a"])), ({}, (0, []))],
)
def test_skipped_images_in_every_form(found, expected):
    assert skipped_images(found) == expected


def test_charts_put_values_where_they_belong():
    chart = charts.Chart(
        "T", "y", {"a": ([0, 10], [0.0, 1.0]), "gone": ([0], [float("nan")])}, references={"half": 0.5}
    )
    text = charts.figure(chart)
    line = re.search(r'class="s0 line" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', text)
    left, low, right, high = map(float, line.groups())
    half = float(re.search(r'class="ref" d="M\d+ ([\d.]+)H', text)[1])
    assert left < right and low > high and half == pytest.approx((low + high) / 2, abs=0.1)
    assert "gone" in text and charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.number(0.00001) == "1e-05" and charts.number(1234.5) == "1,234" and charts.number(0.25) == "0.25"


def test_tsne_keeps_clusters_apart_and_survives_collapse():
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, 16, generator=generator)
    features = (centres[:, None] + torch.randn(3, 30, 16, generator=generator)).flatten(0, 1)
    places = layout.tsne(features)
    assert np.array_equal(places, layout.tsne(features))
    kinds = np.repeat(np.arange(3), 30)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(90)
    assert (kinds[distance.argmin(1)] == kinds).mean() == 1.0
    middles = np.stack([places[kinds == k].mean(0) for k in range(3)])
    spread = max(np.linalg.norm(places[kinds == k] - middles[k], axis=1).mean() for k in range(3))
    assert min(np.linalg.norm(middles[i] - middles[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 3 * spread
    assert np.isfinite(layout.tsne(torch.ones(20, 8))).all() and layout.tsne(torch.ones(2, 8)).shape == (2, 2)


def test_pictures_on_the_map_do_not_hide_one_another():
    crowd = np.random.default_rng(0).normal(0.5, 0.02, (40, 2))
    places = layout.push_apart(layout.fit_box(crowd, 0.8), 0.05, 0.8, rounds=200)
    gap = np.abs(places[:, None] - places[None]).max(-1) + np.eye(40)
    assert gap.min() > 0.04 and places.min() >= 0.025 and places[:, 1].max() <= 0.775
    kept = layout.thin(crowd, 0.03)
    assert (np.abs(crowd[kept][:, None] - crowd[kept][None]).max(-1) + np.eye(len(kept))).min() >= 0.03


def test_a_picture_is_never_its_own_neighbour():
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0.1, 1]]), dim=1)
    similarity, rows = pictures.neighbours(features, 2)
    assert rows.shape == (5, 2) and all(i not in row for i, row in enumerate(rows.tolist()))
    assert rows[3, 0] == 4 and similarity[0].tolist() == [1, 1]
    assert pictures.share_of_label(["a", "a", "b", None, "b"], rows[:, :1]) == pytest.approx(
        np.mean(
            [v == ["a", "a", "b", None, "b"][i] for v, i in zip("aabb", rows[[0, 1, 2, 4], 0].tolist(), strict=True)]
        )
    )
    with pytest.raises(Missing, match="alone"):
        pictures.neighbours(features[:1], 3)


def test_attention_glows_on_its_own_patch():
    attention = torch.zeros(1, 8)
    attention[0, 5] = 1  # second row of a 2 x 4 grid, second column
    found = pictures.overlay(np.full((1, 4, 8, 3), 100, np.uint8), attention)[0].astype(int).sum(-1)
    bright = np.zeros((4, 8), bool)
    bright[2:, 2:4] = True
    assert (found[bright].min() > found[~bright].max()) and len(np.unique(found)) == 2
    with pytest.raises(Missing, match="do not form a grid"):
        pictures.overlay(np.zeros((1, 4, 4, 3), np.uint8), torch.zeros(1, 5))
