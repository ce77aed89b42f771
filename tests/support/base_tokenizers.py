"""Tokenizer files in the form in which they lie on the hub, written by hand: byte-level BPE and SentencePiece."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

Json = dict[str, Any]
TEXT = (
    "The capital of France is Paris. What is two plus two? The answer is four, isn't it? I don't know; you'll see.\n\n"
    "In 2024 there were 123 of 1000 apples and 45 pears, at 12.50 each. We've sold 2024 of 12345, they're gone!\n"
    "def add_two(numberOne, numberTwo):\n    return numberOne + numberTwo  # sum\n\n    print(add_two(12, 30));\n"
    "Où est l'été? Zoë über naïve café, déjà vu. The question and the answer: one two three four five six.\n"
    'user: what is the answer? assistant: the answer is four. {"name": "value"}, [1, 2, 3]...\n\n'
)
NUM_BYTES = 256
NUM_BYTE_LEVEL = 410
NUM_LEARNED_PIECES = 120

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Also that of cl100k."""

QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AFTER_SPLIT = BYTE_LEVEL | {"use_regex": False}


def token(content: str, number: int, special: bool = True, **flags: bool) -> Json:
    """Describe an added token as tokenizer.json does."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content} | plain | flags | {"special": special}


def tokens(contents: Sequence[str], first: int, special: bool = True) -> list[Json]:
    """Number added tokens from `first` on."""
    return [token(content, first + place, special) for place, content in enumerate(contents)]


def decoder_entries(added: Sequence[Json]) -> Json:
    """Turn added tokens into the `added_tokens_decoder` of tokenizer_config.json."""
    return {str(one["id"]): {key: one[key] for key in sorted(one) if key != "id"} for one in added}


def saved(content: str, typed: bool = False, normalized: bool = False) -> Json:
    """Describe a special token as special_tokens_map.json does; `typed` as an old tokenizer_config.json does."""
    flags = {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return ({"__type": "AddedToken"} if typed else {}) | flags


def beginning(content: str, number: int) -> Json:
    """Build the post-processor that puts a token before every text."""
    special = {"SpecialToken": {"id": content, "type_id": 0}}
    second = {"SpecialToken": {"id": content, "type_id": 1}}
    texts = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [special, texts[0]],
        "pair": [special, texts[0], second, texts[1]],
        "special_tokens": {content: {"id": content, "ids": [number], "tokens": [content]}},
    }


def splits(*patterns: str) -> Json:
    """Build the pre-tokenizer that cuts by these expressions and then goes to bytes."""
    cuts = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in patterns]
    return {"type": "Sequence", "pretokenizers": [*cuts, AFTER_SPLIT]}


@cache
def _byte_level_core() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Train merges that cross what the families split at, so that a wrong split shows in the ids."""
    trained = Tokenizer(models.BPE())
    coarse = pre_tokenizers.Split(Regex(r" ?\S+|\s+"), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [coarse, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_BYTE_LEVEL, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TEXT] * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    assert len(model["vocab"]) == NUM_BYTE_LEVEL
    return tuple(model["vocab"]), tuple((left, right) for left, right in model["merges"])


def byte_level_vocabulary(first: Sequence[str] = (), last: Sequence[str] = ()) -> dict[str, int]:
    """Number the tokens of byte-level BPE, special ones before and behind them."""
    return {content: number for number, content in enumerate([*first, *_byte_level_core()[0], *last])}


def byte_level_json(vocabulary: dict[str, int], added: Sequence[Json], pre_tokenizer: Json, **changes: Any) -> Json:
    """Build a whole tokenizer.json. `changes`: of its first level, or of its model; `merges_as_text` as before 2024."""
    as_text = changes.pop("merges_as_text", False)
    merges = [" ".join(pair) if as_text else list(pair) for pair in _byte_level_core()[1]]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    model |= {key: changes.pop(key) for key in list(changes) if key in model}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": BYTE_LEVEL | {"trim_offsets": False},
        "decoder": BYTE_LEVEL,
    }
    return whole | changes | {"model": model}


def write_json(path: Path, content: Json) -> None:
    """Write a JSON file as transformers 4 does: keys in order, but for tokenizer.json."""
    content = content if path.name == "tokenizer.json" else dict(sorted(content.items()))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_vocabulary(folder: Path, vocabulary: dict[str, int]) -> None:
    """Write vocab.json and merges.txt of byte-level BPE."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in _byte_level_core()[1])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of pieces in SentencePiece's own format."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of a SentencePiece BPE model: text, score and type of each, by number."""

    all: tuple[tuple[str, float, int], ...]

    @property
    def vocabulary(self) -> dict[str, int]:
        return {text: number for number, (text, _, _) in enumerate(self.all)}

    def merges(self) -> list[tuple[str, str]]:
        """List all ways to make each piece of two others, as the converter of transformers 4 does."""
        numbers = self.vocabulary
        found = []
        for text, score, _ in self.all:
            halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            known = [pair for pair in halves if pair[0] in numbers and pair[1] in numbers]
            found += [(score, pair) for pair in sorted(known, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))]
        return [pair for _, pair in sorted(found, key=lambda item: -item[0])]


@cache
def _learned_pieces() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Train pieces of words; (learned, single characters). Accents are left to bytes but for one."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    text = "".join(letter if letter.isascii() or letter == "é" else " " for letter in TEXT).replace("\n", " ")
    alphabet = {letter for letter in text if letter != " "} | {"▁"}
    size = len(alphabet) + NUM_LEARNED_PIECES
    trained.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    known = list(trained.get_vocab())
    learned = sorted((one for one in known if len(one) > 1), key=lambda one: trained.token_to_id(one) or 0)
    return tuple(learned), tuple(sorted(alphabet))


def pieces(specials: Sequence[tuple[str, int]], more: Sequence[str] = ()) -> Pieces:
    """Put special pieces (text, type) first, then bytes, learned pieces and characters; `more` are user-defined."""
    learned, letters = _learned_pieces()
    front = [(text, 0.0, kind) for text, kind in specials] + [(text, 0.0, USER_DEFINED) for text in more]
    all_bytes = [(f"<0x{number:02X}>", 0.0, BYTE) for number in range(NUM_BYTES)]
    scored = [(text, -1.0 - number, NORMAL) for number, text in enumerate([*learned, *letters])]
    return Pieces((*front, *all_bytes, *scored))


def write_sentencepiece(path: Path, held: Pieces, dummy_prefix: bool) -> None:
    """Write a model file of SentencePiece. The numbers of special pieces are read from their usual names."""
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    model: Any = protocol.ModelProto()
    for text, score, kind in held.all:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    numbers = held.vocabulary
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = 2, len(held.all), True
    trainer.unk_id, trainer.pad_id = numbers["<unk>"], numbers.get("<pad>", -1)
    trainer.bos_id = numbers.get("<s>", numbers.get("<bos>", -1))
    trainer.eos_id = numbers.get("</s>", numbers.get("<eos>", -1))
    trainer.unk_piece, trainer.unk_surface = "<unk>", " \u2047 "
    trainer.bos_piece, trainer.eos_piece = ("<s>", "</s>") if "<s>" in numbers else ("<bos>", "<eos>")
    normalizer.name, normalizer.add_dummy_prefix = "identity", dummy_prefix
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    path.write_bytes(model.SerializeToString())


LEADING_SPACE: Json = {"type": "Prepend", "prepend": "▁"}
SPACES: Json = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE: Json = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
LLAMA_NORMALIZER: Json = {"type": "Sequence", "normalizers": [LEADING_SPACE, SPACES]}
_UNESCAPE: list[Json] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
LLAMA_DECODER: Json = {
    "type": "Sequence",
    "decoders": [*_UNESCAPE, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
}
GEMMA_DECODER: Json = {"type": "Sequence", "decoders": _UNESCAPE}


def sentencepiece_json(held: Pieces, added: Sequence[Json], as_text: bool, **parts: Any) -> Json:
    """Build the tokenizer.json of a SentencePiece model. `parts`: normalizer, decoder and so on."""
    merges = held.merges()
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": held.vocabulary,
        "merges": [" ".join(pair) for pair in merges] if as_text else [list(pair) for pair in merges],
    }
    whole: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added)}
    empty: Json = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    return whole | empty | parts | {"model": model}
