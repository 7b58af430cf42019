"""What a card, a log or a published checkpoint may say of the machine it was made on."""

import pytest

from hf_ssl.hub.privacy import scrub, scrub_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/my photos", "my photos"),
        ("/home/alice/photos/", "photos"),
        ("~/photos/*.parquet", "*.parquet"),
        ("~alice/photos", "photos"),
        (r"C:\Users\alice\photos", "photos"),
        ("file:///data/alice/a.png", "a.png"),
        ("/home/alice/red/1.png: truncated file", "1.png: truncated file"),
        ("cannot open '/home/alice/x.bin' (/mnt/b/y)", "cannot open 'x.bin' (y)"),
        ("photos/red/1.png", "photos/red/1.png"),
        ("owner/name", "owner/name"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("hf://datasets/owner/name/x.parquet", "hf://datasets/owner/name/x.parquet"),
        ("3/4 of 1 / 2", "3/4 of 1 / 2"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("https://alice:secret@host/x", "https://***@host/x"),
    ],
)
def test_paths_are_cut_and_tokens_hidden(text: str, shown: str) -> None:
    assert scrub(text) == shown
    assert scrub({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


def test_a_command_can_still_be_typed() -> None:
    command = (
        "hf-ssl train simclr --dataset '/home/al ice/my photos' --output_dir=/srv/run --hub_token *** --lr 0.1 -x a/b"
    )
    shown = "hf-ssl train simclr --dataset 'my photos' --output_dir=run --hub_token *** --lr 0.1 -x a/b"
    assert scrub_command(command) == shown
    assert scrub_command("broken ' quote /home/alice/x") == "broken ' quote x"
