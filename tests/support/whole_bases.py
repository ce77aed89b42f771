"""Base folders that hold more than a model: other files, tensors that training does not use, code of their own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.data import CHATML, tiny_tokenizer
from tests.support.disagreeing import gemma3_with_vision
from tests.support.models import save_tiny_model, tiny_config

VOCABULARY = 360
SAMPLING = {"eos_token_id": 0, "pad_token_id": 0, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
NEXT = "model.layers.2"
"""The layer of multi-token prediction of a model of two layers."""

CONFIGURATION = """from transformers import Qwen2Config


class OwnConfig(Qwen2Config):
    model_type = "own"
"""
MODELING = """from transformers import Qwen2ForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def _with_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer(None, eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text()) | {"chat_template": CHATML}
    path.write_text(json.dumps(raw, indent=4, sort_keys=True))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))


def _change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def write_gemma3(folder: Path) -> Path:
    """A Gemma 3 of text and images, with what its processor needs, and weights in another form in a sub-folder."""
    config = gemma3_with_vision()
    config.text_config.vocab_size = VOCABULARY
    save_tiny_model(folder, config)
    _with_tokenizer(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps({"processor_class": "Gemma3Processor", "image_size": 28}))
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 10)
    (folder / "LICENSE").write_text("terms\n")
    (folder / "README.md").write_text("# A model\n")
    (folder / ".gitattributes").write_text("*.safetensors lfs\n")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    torch.save({"a": torch.ones(1)}, folder / "original" / "consolidated.00.pth")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def write_glm4_moe(folder: Path) -> Path:
    """A GLM-4-MoE whose files hold a layer of multi-token prediction, which transformers does not build."""
    changes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    more = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": VOCABULARY}
    save_tiny_model(folder, tiny_config("Glm4Moe", tie_word_embeddings=False, **changes, **more), torch.bfloat16)
    _with_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    layer = {name: value for name, value in weights.items() if name.startswith("model.layers.1.")}
    weights |= {name.replace("model.layers.1", NEXT): value.flip(0).contiguous() for name, value in layer.items()}
    weights[f"{NEXT}.eh_proj.weight"] = torch.arange(32 * 64).reshape(32, 64).to(torch.float8_e4m3fn)
    weights[f"{NEXT}.enorm.weight"] = torch.linspace(0, 1, 32)
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    _change(folder / "config.json", num_nextn_predict_layers=1)
    return folder


def write_own_code(folder: Path, inside: str = "", repository: str = "") -> Path:
    """A model of its own code. `inside`: the sub-folder of the code; `repository`: the one of the hub that holds it."""
    save_tiny_model(folder, tiny_config("Qwen2", vocab_size=VOCABULARY))
    _with_tokenizer(folder)
    (folder / inside).mkdir(exist_ok=True)
    write_code(folder / inside)
    (folder / inside / "notes.txt").write_text("how the code came about\n")
    prefix = f"{repository}--" if repository else f"{inside}/" if inside else ""
    maps = {
        "AutoConfig": f"{prefix}configuration_own.OwnConfig",
        "AutoModelForCausalLM": f"{prefix}modeling_own.OwnForCausalLM",
    }
    _change(folder / "config.json", auto_map=maps, model_type="own", architectures=["OwnForCausalLM"])
    return folder


def write_code(folder: Path) -> None:
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)


def write_in_cache(cache: Path, repository: str) -> None:
    """Put the code into a cache of the hub, as a download would leave it."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    write_code(snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
