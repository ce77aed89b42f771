"""From SFT to RL as a user starts it: `python -m examples.rl.grpo`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo_sft.errors import DataError
from examples.rl.grpo import SeenPrompts, main
from examples.rl.reward import Rise, reward
from examples.rl.start import Split, check_prompts, read_sft_run
from tests.support import python

ROOT = Path(__file__).resolve().parents[2]
with_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: it comes with the extra apollo-sft[rl]"
)


def example(folder: Path, *arguments: str, timeout_seconds: float = 280) -> tuple[int, str]:
    """Exit code, and what it said."""
    finished = python.run(
        [sys.executable, "-m", "examples.rl.grpo", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    return finished.returncode, finished.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT until a few answers are right, and two steps of GRPO: too few to learn, which the exit code says."""
    folder = tmp_path_factory.mktemp("rl")
    code, said = example(folder, "--sft-steps=60", "--steps=2", "--held-out=8", "--seed=1")
    assert code == 1, said[-4000:]
    assert "step 2/2" in said and "did not rise" in said
    return folder / "apollo-rl"


@with_trl
def test_rl_starts_from_the_sft_folder_and_leaves_one_that_opens(pair: Path) -> None:
    result = json.loads((pair / "result.json").read_text())
    assert result["sft_model"] == "apollo-rl/trained-model"
    assert (result["risen"], result["greedy"]["num_questions"], result["grpo"]["num_steps"]) == (False, 8, 2)
    assert 16 < result["prompts_sampled_from"] <= 32
    before, after = weights(pair / "trained-model"), weights(pair / "rl-model")
    assert before.keys() == after.keys()
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 1e-3, "as far as two steps of Adam at this learning rate go, from the weights of SFT"
    prompt = [{"role": "user", "content": "How many?"}]
    rendered = [
        AutoTokenizer.from_pretrained(pair / name).apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False
        )
        for name in ("trained-model", "rl-model")
    ]
    assert rendered[0] == rendered[1]


@with_trl
def test_rl_prompts_are_what_sft_put_before_the_first_target(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.parent)
    run = read_sft_run(Path("apollo-rl/trained-model"), num_held_out=8)
    row = run.held_out.rows[0]
    tokenizer = AutoTokenizer.from_pretrained(pair / "trained-model")
    text = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert list(run.held_out.prompts[0]) == tokenizer(text, add_special_tokens=False)["input_ids"]

    other = row | {"prompt": [{"role": "user", "content": row["prompt"][0]["content"] + " Think."}]}
    with pytest.raises(DataError, match="question 0: RL has another prompt than SFT"):
        check_prompts(pair / "trained-model", Split([other], run.held_out.prompts[:1]))


def test_a_foreign_prompt_is_refused_before_it_is_sampled_from() -> None:
    class Model:
        def generate(self, **inputs: torch.Tensor) -> int:
            return len(inputs["input_ids"])

    model = Model()
    seen = SeenPrompts(model, frozenset({(5, 6, 7), (8,)}))
    ids, mask = torch.tensor([[5, 6, 7], [0, 0, 8], [0, 0, 8]]), torch.tensor([[1, 1, 1], [0, 0, 1], [0, 0, 1]])
    assert model.generate(input_ids=ids, attention_mask=mask) == 3
    assert seen.prompts == {(5, 6, 7), (8,)}
    with pytest.raises(DataError, match="SFT did not train"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(mask))


def test_rewards_are_those_of_gsm8k() -> None:
    texts = ["6 + 1 = 7\n#### 7", "#### 8", "7", "#### 1,007", "#### 7\n#### 9", ""]
    truths = ["7", "7", "7", "1007", "7", "7"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rows: list[dict[str, Any]] = [{"style": "rule", "ground_truth": truth} for truth in truths]
    assert reward(completions=completions, reward_model=rows, prompts=[], trainer_state=None) == [1, 0, 0, 1, 0, 0]


def test_noise_is_measured_on_the_same_questions() -> None:
    steady = Rise.of([0, 1, 0, 1] * 25, [0.1, 1.1, 0.1, 1.1] * 25)
    assert steady.difference == pytest.approx(0.1)
    assert steady.exceeds_noise(3)
    wild = Rise.of([0, 1] * 50, [1, 0] * 49 + [1, 1])
    assert wild.difference == pytest.approx(0.01)
    assert not wild.exceeds_noise(3)


@with_trl
def test_a_folder_that_no_training_left_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--model={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert "was not left by a training" in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [0, 1, 2])
@with_trl
def test_the_reward_rises(tmp_path: Path, seed: int) -> None:
    code, said = example(tmp_path, f"--seed={seed}", timeout_seconds=1400)
    assert code == 0, said[-4000:]
    rise = json.loads((tmp_path / "apollo-rl/result.json").read_text())["sampled"]
    assert rise["num_questions"] == 400
    assert rise["difference"] > 3 * rise["error"] > 0
