from pathlib import Path

import torch

from lookalike_trainers.pretrain.judge import train_judge
from lookalike_trainers.pretrain.runs import load_checkpoint, save_checkpoint
from lookalike_trainers.pretrain.scenes import Sprites

NOUNS = ["cat", "dog", "fox"]


def test_a_judge_is_kept_for_its_nouns_and_steps_and_else_trained_anew(
    sprites: Sprites, tmp_path: Path
) -> None:
    def judge_saved_after(steps: int, nouns: list[str]) -> dict[str, object]:
        train_judge(nouns, sprites, tmp_path, steps=steps, batch_size=2)
        state = load_checkpoint(tmp_path / "judge.pt")
        assert state is not None
        return state

    state = judge_saved_after(1, NOUNS)
    assert state["steps"] == 1
    save_checkpoint(tmp_path / "judge.pt", state | {"mark": "kept"})
    assert "mark" in judge_saved_after(1, NOUNS)
    longer = judge_saved_after(2, NOUNS)
    assert longer["steps"] == 2
    assert "mark" not in longer
    assert judge_saved_after(2, NOUNS[:2])["nouns"] == NOUNS[:2]


def test_a_judge_read_back_judges_as_it_did(sprites: Sprites, tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 64, 64)
    trained = train_judge(NOUNS, sprites, tmp_path, steps=1, batch_size=2)
    again = train_judge(NOUNS, sprites, tmp_path, steps=1, batch_size=2)
    with torch.no_grad():
        assert torch.equal(trained(pictures).noun, again(pictures).noun)
