"""Check whether a version of transformers knows the format of a folder: no weight and no library is needed.

Training does not come here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from apollo_sft.checkpoint.model_folder.sidecars import stated_dtype
from apollo_sft.checkpoint.model_folder.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.errors import CheckpointError, ConfigError
from apollo_sft.tools.handoff.subject import Subject, WrongError, some

Version = tuple[int, int]
TooNew = tuple[str, str, str]
"""The name of what is wrong, what the reader makes of it, and what to do."""
OLDEST: Version = (4, 51)
"""The version that AlphaApollo and vLLM 0.8.5 use: later formats are searched for."""
NEW_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
"""Classes of tokenizers that came with transformers 5."""
NEW_DTYPE_KEY: Version = (4, 56)
"""The first version that reads `dtype` in config.json; `torch_dtype` is read by all."""


def parse_reader(text: str) -> Version:
    """Read `transformers==4.51`, or 4.51.3 alone. Raises: ConfigError."""
    found = re.fullmatch(r"(?:transformers==)?(\d+)\.(\d+)(?:\.\d+)?", text.strip())
    if found is None:
        raise ConfigError("--for names no version of transformers", found=text, expected="--for transformers==4.51")
    return int(found[1]), int(found[2])


def check_readers(subject: Subject) -> str:
    """Check that the version of `--for` knows the format of every file; without it the oldest one, for a note."""
    version = subject.reader or OLDEST
    shown = ".".join(map(str, version))
    for name, what, fix in _too_new(subject, version):
        message = f"transformers {shown}: {what}"
        raise WrongError(name, message, fix, is_note=subject.reader is None or name == "dtype_key")
    return f"transformers {shown} and later know the format of config, tokenizer and weights"


def _too_new(subject: Subject, version: Version) -> Iterator[TooNew]:
    """Yield each format that came after a version."""
    if version < (5, 0):
        yield from _tokenizer(subject)
        yield from _weights(subject)
        yield from _positions(subject)

    keys = subject.config
    if version < NEW_DTYPE_KEY and stated_dtype(keys) is not None and "torch_dtype" not in keys:
        yield (
            "dtype_key",
            "it does not read dtype in config.json, and takes the files' own or float32",
            f'"torch_dtype": "{stated_dtype(keys)}" in config.json',
        )


def _tokenizer(subject: Subject) -> Iterator[TooNew]:
    try:
        raw = read_json(subject.folder / TOKENIZER_CONFIG)
    except CheckpointError:  # the check `tokenizer` reports it
        return

    fix = "the base model's own tokenizer files, where they are older"
    if isinstance(raw.get("extra_special_tokens"), list):
        what = "it cannot open the tokenizer: extra_special_tokens in tokenizer_config.json is a list"
        yield "tokenizer_form", what, f"additional_special_tokens in its place; or {fix}"
    if raw.get("tokenizer_class") in NEW_CLASSES:
        what = f"it has no tokenizer_class {raw['tokenizer_class']}"
        yield "tokenizer_form", what, f'"tokenizer_class": "PreTrainedTokenizerFast"; or {fix}'


def _weights(subject: Subject) -> Iterator[TooNew]:
    """Yield experts that transformers 5 has written as it holds them, in one tensor."""
    from transformers.core_model_loading import revert_weight_conversion

    state = subject.model_state
    older = revert_weight_conversion(subject.model, dict(state)).keys()
    fused = sorted(name for name in subject.tensors if name in state and name not in older)
    if fused:
        what = f"it does not find {some(fused)}: the tensors of all experts are one"
        yield "weights_form", what, "save_pretrained(save_original_format=True) with transformers 5 splits them"


def _positions(subject: Subject) -> Iterator[TooNew]:
    """Yield rotary parameters under the one key of transformers 5, without the keys that earlier versions read."""
    parts = {"config.json": subject.config} | {k: v for k, v in subject.config.items() if isinstance(v, dict)}
    for where, part in parts.items():
        if "rope_parameters" in part and not {"rope_theta", "rope_scaling", "rotary_emb_base"} & part.keys():
            what = f"it does not read rope_parameters in {where}, and silently computes other positions"
            yield "config_form", what, f"rope_theta (and rope_scaling) beside it: {part['rope_parameters']}"
