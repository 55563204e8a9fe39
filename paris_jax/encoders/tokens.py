"""Tokenizers of published text encoders, from the files beside their weights; nothing is downloaded."""

import importlib.util
from collections.abc import Callable
from typing import Any

from etils import epath

from paris_jax.errors import UserError

Tokenize = Callable[[str], list[int]]
# Folders in which diffusers keeps the tokenizer of a text encoder.
BESIDE = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def tokenizer(folder: epath.PathLike) -> Tokenize:
    """Returns the tokenizer of a folder in Hugging Face's format: text to ids, with start and end tokens.

    Raises:
      UserError: the folder has no tokenizer.json, spiece.model, or vocab.json with merges.txt, or the package that
        reads it is not installed.
    """
    folder = epath.Path(folder)
    folders = [folder, *([folder.parent / BESIDE[folder.name]] if folder.name in BESIDE else [])]
    for place in folders:
        if (place / "tokenizer.json").exists():
            return _of_json(_needed("tokenizers").Tokenizer.from_file(str(place / "tokenizer.json")))
        if (place / "spiece.model").exists():
            return _of_pieces(str(place / "spiece.model"))
        if (place / "vocab.json").exists() and (place / "merges.txt").exists():
            return _of_json(_of_clip(str(place / "vocab.json"), str(place / "merges.txt")))
    raise UserError(
        f"{' and '.join(map(str, folders))} hold no tokenizer: put tokenizer.json, spiece.model, or vocab.json and "
        "merges.txt there, as published with the weights"
    )


def _needed(package: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"The tokenizer needs the package {package!r}; pip install -e '.[encoders]'")
    return importlib.import_module(package)


def _of_json(tokens: Any) -> Tokenize:
    tokens.no_padding()
    tokens.no_truncation()
    return lambda text: tokens.encode(text).ids


def _of_pieces(path: str) -> Tokenize:
    pieces = _needed("sentencepiece").SentencePieceProcessor(model_file=path)
    return lambda text: [*pieces.encode(text), pieces.eos_id()]


def _of_clip(vocabulary: str, merges: str) -> Any:
    """CLIP's byte-pair encoding: lower case, words split by its pattern, with an end-of-word mark."""
    tokenizers = _needed("tokenizers")
    model = tokenizers.models.BPE.from_file(
        vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"
    )
    tokens = tokenizers.Tokenizer(model)
    normal, before = tokenizers.normalizers, tokenizers.pre_tokenizers
    spaces = normal.Replace(tokenizers.Regex(r"\s+"), " ")
    tokens.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase()])
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokens.pre_tokenizer = before.Sequence(
        [before.Split(words, behavior="removed", invert=True), before.ByteLevel(add_prefix_space=False)]
    )
    ends = [(name, tokens.token_to_id(name)) for name in ("<|startoftext|>", "<|endoftext|>")]
    template = f"{ends[0][0]} $A {ends[1][0]}"
    tokens.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ends)
    return tokens
