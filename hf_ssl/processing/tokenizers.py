"""Tokenizers of image-text methods: trained on captions, loaded, and what a CLIP text tower needs of one."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from ..loading import load_pretrained

CONTEXT_LENGTHS = (16, 77)  # tokens of a trained tokenizer: begin and end included
_PAPER_CONTEXT = 77
_END_OF_WORD = "</w>"


def train_tokenizer(captions: Iterable[str], vocab_size: int = 4096, context_length: int = 32) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-case byte-level BPE) learned from ``captions``, which plain transformers loads.

    vocab_size: the most tokens it has, at least 514: every byte within and at the end of a word, begin and end of
    text; few captions give fewer. context_length: tokens a text is cut to, 16 to 77, begin and end included.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # All 512 byte symbols are there: CLIP's unknown token is the end of text, and the tower would pool at it.
    vocab = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet)]
    if vocab_size < len(vocab) + 2:
        raise ValueError(f"vocab_size must be at least {len(vocab) + 2} (bytes, begin, end), not {vocab_size}.")
    low, high = CONTEXT_LENGTHS
    if not low <= context_length <= high:
        raise ValueError(f"context_length must be from {low} to {high} tokens, not {context_length}.")
    native = CLIPTokenizer().backend_tokenizer  # its normaliser and word splitting, so that training sees the same
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = native.normalizer, native.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=_END_OF_WORD, show_progress=False,
        # Pairs that are equally frequent go by number. Letters at a word's end would be numbered as the trainer's hash
        # table happens to hand out words, in another order in each training; as "special" ones they are numbered here.
        special_tokens=vocab[len(alphabet) :],
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges: list[Any] = []
    known = set(vocab)
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        first, second = merge if isinstance(merge, list) else merge.split(" ")
        merged = first + second
        if merged not in known:
            if len(vocab) + 2 == vocab_size:
                break
            known.add(merged)
            vocab.append(merged)
        merges.append((first, second))
    # Begin and end come last, as in CLIP: transformers' oldest configs pool at the highest id.
    ids = {token: index for index, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    # Kept because few captions give fewer tokens than were asked for.
    asked: Any = {"trained_vocab_size": vocab_size}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=context_length, **asked)


def trained_for(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The numbers that ``train_tokenizer`` was given for ``tokenizer``; {} where it made another one."""
    if "trained_vocab_size" not in tokenizer.init_kwargs:
        return {}
    vocab_size, length = tokenizer.init_kwargs["trained_vocab_size"], tokenizer.model_max_length
    return {"vocab_size": vocab_size, "context_length": length}


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a Hub repo; ValueError if there is none or it cannot pad."""
    try:
        tokenizer = load_pretrained(AutoTokenizer, name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} holds no tokenizer that can be loaded: {error}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up from a config
        raise ValueError(f"{name} holds no tokenizer that can be loaded: its vocabulary is empty")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no padding token: set one and save it again")
    return tokenizer


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends every text, where CLIP's text tower pools (BERT's tokenizers: [SEP]).

    Raises ValueError for a tokenizer that ends texts without such a token, and for the id 2, which transformers takes
    for a mistake of old checkpoints: its CLIP then pools at the highest id, whatever that is.
    """
    last = tokenizer("a")["input_ids"][-1]
    if last not in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        raise ValueError(
            f"{type(tokenizer).__name__} adds no end-of-text token, and a CLIP text tower pools at it: take a "
            "pretrained text tower, or train a tokenizer on the captions"
        )
    if last == 2:
        raise ValueError(
            f"the end-of-text token of this {type(tokenizer).__name__} has the id 2, for which transformers' CLIP "
            "pools at the highest id instead: take a pretrained text tower, or train a tokenizer on the captions"
        )
    return last


def max_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a text is cut to unless stated otherwise: the tokenizer's own limit, at most CLIP's 77."""
    return min(tokenizer.model_max_length, _PAPER_CONTEXT)
