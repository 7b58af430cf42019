"""The report's panel of an image-text model: pictures beside the texts that it finds most similar."""

from __future__ import annotations

from html import escape

import torch.nn.functional as F

from hf_ssl.evaluation import pictures
from hf_ssl.evaluation.album import Album, Missing, NotApplicable
from hf_ssl.evaluation.knn import nearest
from hf_ssl.evaluation.natives import load_native
from hf_ssl.evaluation.thumbnails import data_uri
from hf_ssl.evaluation.zero_shot import embed_texts, recalls


def text_panel(folder: str, album: Album, count: int = 10, k: int = 5) -> str:
    """Pictures drawn blindly, each with the `k` texts of the album most similar to it; its own are marked."""
    if not getattr(album.source, "has_captions", False):
        raise NotApplicable(f"{album.source.name} has no texts to match pictures with.")
    if album.source.is_stream:
        raise Missing(f"{album.source.name} is a stream, whose texts cannot be read again.")
    texts = [_texts(album, row) for row in album.rows.tolist()]
    candidates = list(dict.fromkeys(text for own in texts for text in own))
    if not candidates:
        raise NotApplicable("None of the pictures that were looked at has a text.")
    model, processor, _ = load_native(folder)
    embeddings = embed_texts(model, processor, candidates)
    numbers = {text: i for i, text in enumerate(candidates)}
    images = F.normalize(album.after, dim=1)
    found = recalls(images, embeddings, [{numbers[text] for text in own} for own in texts], (1, 10))
    values = album.values()
    with_text = [i for i, own in enumerate(texts) if own]
    queries = [with_text[i] for i in pictures.random_queries([values[i] for i in with_text], count)]
    similarity, ranked = nearest(images[queries], embeddings, min(k, len(candidates)))
    blocks = []
    for at, query in enumerate(queries):
        lines = zip(similarity[at].tolist(), [candidates[i] for i in ranked[at].tolist()], strict=True)
        items = "".join(_line(text, value, text in texts[query]) for value, text in lines)
        alt = f"{texts[query][0]}"
        blocks.append(
            f'<div class="query"><div><img src="{data_uri(album.thumbnails[query])}" alt="{escape(alt)}">'
            f'<span>{escape(alt)}</span></div><table class="plain"><tbody>{items}</tbody></table></div>'
        )
    return (
        f"<p>{escape(_summary(found))}</p>"
        f'<p class="hint"><b class="badge right">✓</b>its own text</p><figure class="gallery">{"".join(blocks)}'
        "<figcaption>The pictures are drawn by a fixed random number, not picked; under each stands its own text. The "
        "figure beside a text is the cosine of the two embeddings.</figcaption></figure>"
    )


def _texts(album: Album, row: int) -> list[str]:
    from hf_ssl.data.decode import BadImageError

    try:
        return album.source.captions(album.source.dataset[row])
    except BadImageError:
        return []


def _line(text: str, similarity: float, own: bool) -> str:
    mark = '<b class="badge right">✓</b>' if own else ""
    return f"<tr><td>{similarity:.3f}</td><td>{mark}{escape(text)}</td></tr>"


def _summary(found: dict[str, float]) -> str:
    return (
        f"Among {found['texts']:.0f} different texts a picture finds its own first in {found['i2t_r1']:.0%} of cases, "
        f"among the first ten in {found['i2t_r10']:.0%} (a random order: {found['i2t_r10_chance']:.1%}); a text finds "
        f"a picture of its own among the first ten in {found['t2i_r10']:.0%} ({found['t2i_r10_chance']:.1%})."
    )
