"""What one version of transformers reads of model folders, as JSON. Run by path: it imports nothing of this project.

`python reader_script.py JOB`: the job is a JSON file with `out` (a folder for the answers), `texts`, `conversations`,
`new_tokens`, and `folders`: name -> {folder, template or null, prompts or null}. Answers are `NAME.json` and
`NAME.npy` (the logits); what fails is written as the class of the exception and its first line.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = 40
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
Json = dict[str, Any]


def attempt(action: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Do it; give what it raises as the answer."""
    try:
        return action(*given, **named)
    except Exception as error:  # whatever a library raises is what is asked for
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {"error": f"{type(error).__name__}: {lines[0].strip()[:300]}", "at": place}


def failed(answer: Any) -> bool:
    return isinstance(answer, dict) and "error" in answer


def read_tokenizer(folder: str, job: Json, template: str | None) -> tuple[Any, Json]:
    """Open it as a user would; ids, decoded texts and renderings. `template` stands in for one that is missing."""
    tokenizer = attempt(AutoTokenizer.from_pretrained, folder)
    if failed(tokenizer):
        return None, {"tokenizer": tokenizer}
    texts = job["texts"]
    ids = [attempt(encode, tokenizer, text) for text in texts]
    rendered = {
        f"{place}{', prompt' if prompt else ''}": attempt(render, tokenizer, messages, prompt, template)
        for place, messages in enumerate(job["conversations"])
        for prompt in (False, True)
    }
    named = ("bos_token", "eos_token", "pad_token", "unk_token")
    return tokenizer, {
        "tokenizer": type(tokenizer).__name__,
        "length": len(tokenizer),
        "named": {name: getattr(tokenizer, name, None) for name in named},
        "special": sorted(tokenizer.all_special_tokens),
        "side": tokenizer.padding_side,
        "longest": tokenizer.model_max_length,
        "ids": ids,
        "plain": [attempt(encode, tokenizer, text, add_special_tokens=False) for text in texts],
        "decoded": [attempt(tokenizer.decode, one) for one in ids],
        "clean": [attempt(tokenizer.decode, one, skip_special_tokens=True) for one in ids],
        "rendered": rendered,
    }


def read_slow(folder: str, texts: list[str]) -> Any:
    """Encode with the tokenizer that is written in Python, where this version has such."""
    if DTYPE == "dtype":
        return None
    opened = attempt(AutoTokenizer.from_pretrained, folder, use_fast=False)
    return opened if failed(opened) else [attempt(encode, opened, text) for text in texts]


def encode(tokenizer: Any, text: str, **more: Any) -> list[int]:
    return list(tokenizer(text, **more)["input_ids"])


def render(tokenizer: Any, messages: list[Json], prompt: bool, template: str | None) -> str:
    more = {} if template is None else {"chat_template": template}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **more))


def make_prompts(tokenizer: Any, conversations: list[Any], template: str | None) -> list[list[int]]:
    """Encode the conversations that end with the user, for an answer."""
    asking = [messages for messages in conversations if messages[-1]["role"] == "user"]
    texts = [render(tokenizer, messages, True, template) for messages in asking]
    return [encode(tokenizer, text, add_special_tokens=False) for text in texts]


def read_model(folder: str, out: Path, prompts: Any, new_tokens: int) -> Json:
    """Open the weights in fp32; logits of fixed ids into `out`, greedy answers to prompts."""
    how = {"attn_implementation": "eager", "output_loading_info": True, DTYPE: torch.float32}
    opened = attempt(AutoModelForCausalLM.from_pretrained, folder, **how)
    if failed(opened):
        return {"model": opened}
    model, info = opened
    model.eval()
    own = attempt(AutoModelForCausalLM.from_pretrained, folder, **{DTYPE: "auto"})
    answer: Json = {
        "model": type(model).__name__,
        "dtype": own if failed(own) else str(own.dtype),
        "loading": {kind: sorted(map(str, info.get(f"{kind}_keys") or [])) for kind in ("missing", "mismatched")},
        "unexpected": sorted(map(str, info.get("unexpected_keys") or [])),
        "logits": attempt(save_logits, model, out),
        "stops": model.generation_config.eos_token_id,
    }
    if prompts is not None and not failed(prompts):
        answer["generated"] = [attempt(generate, model, one, new_tokens) for one in prompts]
    return answer


def save_logits(model: Any, out: Path) -> list[int]:
    """Save the logits of one row of ids; give back their shape."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(IDS).reshape(1, -1) * 7 % min(rows, 400)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    np.save(out, logits[0].float().numpy())
    return list(logits.shape)


def generate(model: Any, prompt: list[int], new_tokens: int) -> Json:
    """Answer greedily, with what generation_config.json says otherwise; the stop that ended it, or None."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    answer = found[0, len(prompt) :].tolist()
    stops = model.generation_config.eos_token_id
    ended = bool(answer) and answer[-1] in (stops if isinstance(stops, list) else [stops])
    return {"ids": answer, "stop": answer[-1] if ended else None}


def read_folder(name: str, asked: Json, job: Json) -> Json:
    """Answer all that is asked of one folder."""
    tokenizer, answer = read_tokenizer(asked["folder"], job, asked["template"])
    prompts = asked["prompts"]
    if prompts is None and tokenizer is not None:
        prompts = attempt(make_prompts, tokenizer, job["conversations"], asked["template"])
    answer["prompts"] = prompts
    answer["slow"] = read_slow(asked["folder"], job["texts"])
    return answer | read_model(asked["folder"], Path(job["out"]) / f"{name}.npy", prompts, job["new_tokens"])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    for name, asked in job["folders"].items():
        with warnings.catch_warnings(record=True):
            answer = read_folder(name, asked, job)
        text = json.dumps(answer | {"versions": versions}, ensure_ascii=True, indent=1)
        (Path(job["out"]) / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
