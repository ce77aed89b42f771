"""The section `data`: which rows are read, how they become tokens, and how a step is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from apollo_sft.config.keys import (
    LAYOUT,
    LENGTH,
    NOTHING,
    ORDER,
    TOKENS,
    Key,
    Section,
    unused_with,
)
from apollo_sft.config.schema_types import (
    Count,
    CountOrAll,
    PathText,
    Share,
    Strings,
    Text,
    TrainFiles,
    ValFiles,
    day,
)

MULTITURN = "data.multiturn.enable=true"


class MultiturnConfig(Section):
    """Multi-turn data: one column of messages takes the place of the two columns of prompt and response."""

    enable: Annotated[bool, Key(changes=TOKENS)] = False
    """true reads conversations from messages_key. false reads prompt_key and response_key."""

    messages_key: Annotated[Text, Key(changes=TOKENS, example="conversation", needs=MULTITURN)] = "messages"
    """The column of messages: a list of {role, content, …}."""

    tools_key: Annotated[str, Key(changes=TOKENS, example="functions")] = "tools"
    """The column of tool schemas: a list, or JSON text. Read where the column exists, single-turn too."""

    enable_thinking_key: Annotated[str, Key(changes=TOKENS, example="thinking")] = "enable_thinking"
    """A column of true/false that the chat template gets as enable_thinking. Read where the column exists."""


class CustomClsConfig(Section):
    """A class of your own that reads train_files and val_files and returns conversations or samples:
    docs/data_formats.md. It may read the keys of columns above, or leave them.
    """

    path: Annotated[
        PathText | None,
        Key(
            changes=TOKENS,
            per_host=True,
            stored_as="custom_cls",
            example="my_data.py",
            needs="data.custom_cls.name=Chats",
        ),
    ] = None
    """The Python file of the class. null reads the files as the keys above say."""

    name: Annotated[
        Text | None,
        Key(changes=TOKENS, stored_as="custom_cls", example="Chats", needs="data.custom_cls.path=my_data.py"),
    ] = None
    """The name of the class in that file."""


class DataConfig(Section):
    """The data: which rows are read, how they become tokens, and how a step is made of them."""

    train_batch_size: Annotated[Count, Key(changes=ORDER | LENGTH, example="64")] = 256
    """Samples of one optimizer step, over all ranks, 1 or more. The last step of an epoch holds the samples that are
    left.
    """

    micro_batch_size_per_gpu: Annotated[Count, Key(changes=LAYOUT, neutral=1, example="8")] = 4
    """Samples of one forward and backward on each data rank, 1 to train_batch_size. Validation uses it too. It changes
    memory and speed, never the loss. The older spelling data.micro_batch_size means the same.
    """

    train_files: Annotated[
        TrainFiles,
        Key(
            changes=TOKENS | ORDER,
            per_host=True,
            by_content=True,  # the store's key of a checkpoint must be that of the present files
            stored_as="files",
            example="[a.parquet,b.parquet]",
            needs="data.val_files=val.parquet",
            written="~/data/gsm8k/train.parquet",
        ),
    ] = ("~/data/gsm8k/train.parquet",)
    """A file (parquet, .jsonl, .arrow), a folder, a glob, a URL (s3, gs, hf, hdfs, https), a data set of the hub, or a
    list of them: ~/a.parquet, [a.parquet,b.jsonl], 'data/*.parquet'; see docs/data_formats.md. Or sources with shares
    of the epoch: [{path: a.parquet, weight: 2, name: math}, {path: b.parquet, max_samples: 1000}], quoted for the
    shell; see docs/mixtures.md.
    """

    val_files: Annotated[
        ValFiles,
        Key(changes=NOTHING, per_host=True, example="val.parquet", written="~/data/gsm8k/test.parquet"),
    ] = ("~/data/gsm8k/test.parquet",)
    """The same for validation; null trains without validation. Must be set when train_files is set. Or sets with a loss
    of their own: [{path: a.parquet, name: math}, {path: b.parquet}]. docs/mixtures.md
    """

    train_max_samples: Annotated[CountOrAll, Key(changes=TOKENS, stored_as="max_rows", example="1000")] = -1
    """Use at most this many training rows, counted over all files in their order; -1 uses all. Refused when train_files
    has sources.
    """

    val_max_samples: Annotated[CountOrAll, Key(changes=NOTHING, example="200")] = -1
    """The same for validation rows."""

    prompt_key: Annotated[Text, Key(changes=TOKENS, example="prompt")] = "question"
    """Single-turn data: the column of the prompt."""

    response_key: Annotated[Text, Key(changes=TOKENS, example="response")] = "answer"
    """Single-turn data: the column of the response. It may be the column of the prompt, with another path into it."""

    prompt_dict_keys: Annotated[
        Strings, Key(changes=TOKENS, example="[extra,question]", unused=unused_with(MULTITURN))
    ] = ("question",)
    """Where the prompt is inside a cell that is a struct, as a path: [question] or [extra,question]. A cell that is a
    text is taken as it is. null or [] takes every cell as it is.
    """

    response_dict_keys: Annotated[
        Strings, Key(changes=TOKENS, example="[extra,answer]", unused=unused_with(MULTITURN))
    ] = ("answer",)
    """The same for the response."""

    multiturn: MultiturnConfig

    max_length: Annotated[int, Field(ge=2), Key(changes=TOKENS, example="4096")] = 1024
    """Longest row in tokens, prompt and response together, 2 or more. At most the number of positions of the model."""

    truncation: Annotated[Literal["error", "left", "right", "drop"], Key(changes=TOKENS, example="drop")] = "error"
    """What happens to a longer row: error (the run is refused before the model is loaded), left or right (the row is
    cut on that side, and counted), drop (the row is not trained, and counted).
    """

    use_dynamic_bsz: Annotated[bool, Key(changes=LAYOUT, neutral=False, needs="data.max_token_len_per_gpu=8192")] = (
        False
    )
    """Limit each forward by its tokens (max_token_len_per_gpu) instead of by its samples."""

    max_token_len_per_gpu: Annotated[
        Count | None, Key(changes=LAYOUT, neutral=None, example="16384", needs="data.use_dynamic_bsz=true")
    ] = None
    """Most tokens of one forward on each rank; needs use_dynamic_bsz=true. null sets no limit."""

    balance_dp_token: Annotated[bool, Key(changes=LAYOUT, neutral=False)] = False
    """Give all data ranks of a step samples of equal cost instead of equal numbers of samples."""

    drop_last: Annotated[bool, Key(changes=ORDER | LENGTH)] = False
    """Leave out the last step of an epoch when it holds fewer than train_batch_size samples."""

    chat_template: Annotated[Text | None, Key(changes=TOKENS, stored_as="template", example="chatml")] = None
    """The chat template: null is the tokenizer's own. Or a path to a jinja file, jinja text, or a built-in name:
    chatml, plain.
    """

    apply_chat_template_kwargs: Annotated[dict[str, Any], Key(changes=TOKENS, example="{enable_thinking: false}")] = (
        Field(default_factory=dict)
    )
    """Arguments for the chat template, for example {enable_thinking: false}."""

    template_date: Annotated[
        str,
        AfterValidator(day),
        Field(description="a day, as 2025-01-31"),
        Key(changes=TOKENS, example="2026-01-31"),
    ] = "2025-01-01"
    """The day that a chat template gets when it asks for today's date, as 2025-01-31. With a fixed day, samples do not
    depend on the day on which they are made.
    """

    history: Annotated[Literal["expand", "last_turn", "as_rendered"], Key(changes=TOKENS, example="last_turn")] = (
        "expand"
    )
    """For templates that rewrite earlier turns when later ones follow (Qwen3 removes their thinking): expand (a row
    becomes as few samples as hold every turn as inference would produce it), last_turn (one sample; it trains the turns
    that fit its last one), as_rendered (one sample; earlier turns are trained as the template rewrites them, which no
    inference produces).
    """

    train_on: Annotated[Literal["assistant", "all", "last"], Key(changes=TOKENS, example="last")] = "assistant"
    """Which messages are trained: assistant (each of its turns), last (its last turn), all (every message of every
    role).
    """

    thinking: Annotated[Literal["auto", "all", "none"], Key(changes=TOKENS, example="none")] = "auto"
    """What is trained under a template that thinks or not by request, such as Qwen3's: auto (a reply without reasoning
    is trained as a reply with thinking off: its empty block is part of the prompt, not a target), all (every reply as
    the template writes it without a request, an empty block too), none (answers only; reasoning is context). A row's or
    message's enable_thinking and data.apply_chat_template_kwargs come before auto.
    """

    train_key: Annotated[str, Key(changes=TOKENS, example="use_this_row")] = "train"
    """A column of true/false, read where it exists: a row with false is not trained. {train: false} does the same in a
    message.
    """

    system_key: Annotated[str, Key(changes=TOKENS, example="system_prompt")] = "system"
    """A column with the text of the system message, read where it exists. '' reads none."""

    template_kwargs_key: Annotated[str, Key(changes=TOKENS, example="kwargs")] = "chat_template_kwargs"
    """A column with arguments for the chat template, such as {enable_thinking: false}: a struct, or JSON text. Read
    where it exists; the row's arguments come before data.apply_chat_template_kwargs.
    """

    special_tokens_in_content: Annotated[Literal["error", "drop", "allow"], Key(changes=TOKENS, example="drop")] = (
        "error"
    )
    """What happens to a row whose text contains a control token of the tokenizer, such as <|im_end|>, and could so
    forge a turn: error (the run is refused), drop (the row is not trained, and counted), allow (it is trained as it is,
    and counted).
    """

    bad_rows: Annotated[Literal["error", "skip"], Key(changes=TOKENS)] = "error"
    """What happens to rows that cannot be used: error (the run is refused before the model is loaded, after all rows
    were seen; the message counts them by reason and names the first ones by file, row and column) or skip (they are
    left out, counted, and listed in rejected.jsonl).
    """

    max_bad_ratio: Annotated[Share, Key(changes=NOTHING, example="0.2", needs="data.bad_rows=skip")] = 0.05
    """With bad_rows=skip: the largest share of rows that may be left out, 0 to 1, of train_files and of val_files each.
    A larger share is an error.
    """

    store_dir: Annotated[PathText | None, Key(changes=NOTHING, per_host=True, example="~/stores")] = None
    """The folder for tokenised data. They are made once, and later runs find them again. null is a folder in the user's
    cache.
    """

    custom_cls: CustomClsConfig
