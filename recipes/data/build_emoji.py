"""Build `hf_ssl/data/assets/emoji.parquet`: 64 px emoji in two drawing styles, with names, groups and a split.

    python recipes/data/build_emoji.py [--output FILE] [--packages DIR]

Sources (npm, versions pinned): emoji-datasource-google, emoji-datasource-twitter (drawings), emojibase-data (names).
The output is deterministic with one Pillow; another version's WebP encoder may write other bytes for the same pixels.
Takes about five minutes, nearly all in that encoder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PACKAGES = ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0", "emojibase-data@17.0.0")
STYLES = ("google", "twitter")
ASSETS = Path(__file__).resolve().parents[2] / "hf_ssl" / "data" / "assets"
MAX_BYTES = 9_000_000
TEST_FRACTION = 0.2
SAME_DRAWING_RMS = 8.0  # of 255, over premultiplied RGBA: a recoloured cape is the same drawing, another face is not
PEOPLE = {
    "PERSON": {"1F468", "1F469", "1F9D1"},
    "CHILD": {"1F466", "1F467", "1F9D2"},
    "OLD": {"1F474", "1F475", "1F9D3"},
}
IGNORED = {"FE0F", "200D", "2640", "2642", "27A1"} | {f"1F3F{tone}" for tone in "BCDEF"}
# Gendered people that Unicode encodes as unrelated code points.
SYNONYMS = [
    {"1F385", "1F936", "PERSON-1F384"},  # Santa, Mrs Claus, Mx Claus
    {"1F934", "1F478", "1FAC5"},  # prince, princess, person with crown
    {"1F57A", "1F483"},  # man, woman dancing
    {"1F46B", "1F46C", "1F46D", "PERSON-1F91D-PERSON"},  # people holding hands
    {"1F48F", "PERSON-2764-1F48B-PERSON"},  # kiss
    {"1F491", "PERSON-2764-PERSON"},  # couple with heart
    {"1F46A", "PERSON-PERSON-CHILD"},  # family
]


def install(folder: Path) -> Path:
    """Unpack the npm packages below `folder` (no install script runs) and return their node_modules."""
    command = ["npm", "install", "--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run([*command, *PACKAGES], check=True)
    return folder / "node_modules"


def read_drawing(path: Path) -> np.ndarray:
    """One PNG as (64, 64, 4) uint8; the invisible colour under alpha 0 is set to 0."""
    rgba = np.array(Image.open(path).convert("RGBA"))
    if rgba.shape != (64, 64, 4):
        raise SystemExit(f"{path}: expected a 64 x 64 picture, found {rgba.shape[1]} x {rgba.shape[0]}.")
    rgba[rgba[..., 3] == 0] = 0
    return rgba


def read_emoji(packages: Path) -> list[dict]:
    """Every base emoji (no skin tones, no components) both styles draw, in Unicode order, one per distinct drawing."""
    listing = json.loads((packages / "emoji-datasource-google" / "emoji.json").read_text())
    labels = json.loads((packages / "emojibase-data" / "meta" / "groups.json").read_text())
    entries = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text())
    names = {entry["hexcode"].replace("-FE0F", ""): entry for entry in entries}
    rows, seen = [], set()
    for item in sorted(listing, key=lambda item: (item["sort_order"], item["unified"])):
        entry = names[item["unified"].replace("-FE0F", "")]
        group = labels["groups"][str(entry["group"])]
        if group == "component" or not all(item[f"has_img_{style}"] for style in STYLES):
            continue
        drawings = {
            style: read_drawing(packages / f"emoji-datasource-{style}" / "img" / style / "64" / item["image"])
            for style in STYLES
        }
        # Some flags (Norway, Bouvet Island, ...) and families share one Google drawing: keep the first code point.
        digest = hashlib.sha256(drawings["google"].tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if np.array_equal(drawings["google"], drawings["twitter"]):
            raise SystemExit(f"{item['unified']}: both styles hold the same drawing, one of them is a fallback.")
        rows.append(
            {
                "code_point": item["unified"],
                "name": entry["label"],
                "keywords": list(entry["tags"]),
                "group": group,
                "subgroup": labels["subgroups"][str(entry["subgroup"])],
                "drawings": drawings,
            }
        )
    return rows


def family_key(code_point: str) -> str:
    """Code point without gender, skin tone, hair and direction: variants of one base share it."""
    parts = [part for part in code_point.split("-") if part not in IGNORED]
    key = "-".join(next((kind for kind, codes in PEOPLE.items() if part in codes), part) for part in parts)
    return next((min(group) for group in SYNONYMS if key in group), key)


def families(rows: list[dict]) -> list[str]:
    """Family of each row: rows with one key, or with one and the same drawing in either style, belong together."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first: dict[str, int] = {}
    keys = [family_key(row["code_point"]) for row in rows]
    for index, key in enumerate(keys):
        parent[index] = first.setdefault(key, index)
    for style in STYLES:
        pixels = np.stack([row["drawings"][style] for row in rows]).astype(np.float64)
        pixels[..., :3] *= pixels[..., 3:] / 255
        flat = pixels.reshape(len(rows), -1)
        squares = (flat**2).sum(1)
        distances = squares[:, None] + squares[None] - 2 * flat @ flat.T
        for i, j in np.argwhere(np.triu(distances < SAME_DRAWING_RMS**2 * flat.shape[1], 1)):
            low, high = sorted((root(i), root(j)))
            parent[high] = low
    return [keys[root(index)] for index in range(len(rows))]


def assign_splits(rows: list[dict]) -> None:
    """Whole families go to test in the order of their hash until a fifth of the code points is there."""
    keys = families(rows)
    wanted = round(TEST_FRACTION * len(rows))
    test: set[str] = set()
    count = 0
    for key in sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest()):
        if count + keys.count(key) <= wanted:
            test.add(key)
            count += keys.count(key)
        if count == wanted:
            break
    for row, key in zip(rows, keys, strict=True):
        row["split"] = "test" if key in test else "train"


def encode(rgba: np.ndarray) -> bytes:
    """Lossless WebP: a fifth smaller than the best PNG, and every reader of PNG in `datasets` reads it."""
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, format="WEBP", lossless=True, quality=100, method=6, exact=True)
    if not np.array_equal(np.array(Image.open(io.BytesIO(buffer.getvalue())).convert("RGBA")), rgba):
        raise SystemExit("The WebP encoder changed pixels: it must be lossless.")
    return buffer.getvalue()


def build_table(rows: list[dict], licences: dict[str, str]) -> pa.Table:
    """One row per (code point, style), Unicode order, with the features `datasets` reads from the schema."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    features = Features(
        image=ImageFeature(),
        **dict.fromkeys(("code_point", "style", "name"), text),
        keywords=List(text),
        **dict.fromkeys(("group", "subgroup", "split"), text),
    )
    records = []
    for row in rows:
        shared = {key: value for key, value in row.items() if key != "drawings"}
        for style in STYLES:
            path = f"{style}/{row['code_point'].lower()}.webp"
            image = {"bytes": encode(row["drawings"][style]), "path": path}
            records.append({"image": image, "style": style, **shared})
    schema = features.arrow_schema
    metadata = {**(schema.metadata or {}), **{f"licence:{name}": body for name, body in licences.items()}}
    return pa.Table.from_pylist(records, schema=schema.with_metadata(metadata))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the emoji parquet that ships in hf_ssl.")
    parser.add_argument("--output", type=Path, default=ASSETS / "emoji.parquet")
    parser.add_argument("--packages", type=Path, help="a node_modules that already holds the three packages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = read_emoji(options.packages or install(Path(folder)))
    assign_splits(rows)
    licences = {path.stem: path.read_text() for path in sorted(ASSETS.glob("LICENSE-emoji-*.txt"))}
    pq.write_table(build_table(rows, licences), options.output, compression="zstd", row_group_size=1024)
    size = options.output.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{options.output} has {size} bytes, more than the {MAX_BYTES} allowed.")
    test = sum(row["split"] == "test" for row in rows)
    groups, subgroups = ({row[key] for row in rows} for key in ("group", "subgroup"))
    print(f"{options.output}: {size} bytes, {len(rows)} code points x {len(STYLES)} styles, {test} test code points,")
    print(f"{len(groups)} groups, {len(subgroups)} subgroups")


if __name__ == "__main__":
    main()
