import math

import pytest
import torch

from lookalike_trainers.pretrain.denoiser import alphas_cumprod, stratified_timesteps, v_loss
from lookalike_trainers.pretrain.evaluate import both_nouns, colour_scenes, scene_figures
from lookalike_trainers.pretrain.judge import BACKGROUNDS, Judge, Verdict, targets
from lookalike_trainers.pretrain.metrics import all_in_top_k, psnr, top_k
from lookalike_trainers.pretrain.nouns import STYLES
from lookalike_trainers.pretrain.runs import learning_rate
from lookalike_trainers.pretrain.scenes import Scene

NOUNS = ["cat", "dog", "fox", "owl", "bee", "ant"]


def test_top_k_counts_as_sorting_does() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(40, 6), torch.randint(0, 6, (40,))
    for k in (1, 3, 5):
        ranks = [sorted(range(6), key=lambda c, r=row: -r[c])[:k] for row in logits.tolist()]
        naive = sum(w in best for w, best in zip(wanted.tolist(), ranks, strict=True)) / 40
        assert top_k(logits, wanted, k) == pytest.approx(naive)


def test_both_nouns_need_both() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    wanted = torch.tensor([[0, 1], [0, 3]])
    assert all_in_top_k(logits, wanted, 2) == 0.5


def test_psnr_is_the_mean_of_each_picture() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    naive = sum(10 * math.log10(4 / e**2) for e in (0.2, 0.02)) / 2
    assert psnr(a, b) == pytest.approx(naive, abs=1e-3)


def test_scene_figures_against_a_hand_count() -> None:
    scenes = [Scene(("cat",), "noto", "red"), Scene(("ant",), "fluent", "sea")]
    noun = torch.eye(6)[[0, 0]]  # the second is taken for a cat too; ant is last but ties
    noun[1, 5] = -1
    style = torch.eye(3)[[list(STYLES).index("noto"), list(STYLES).index("twemoji")]]
    background = torch.eye(len(BACKGROUNDS))[[BACKGROUNDS.index("red"), BACKGROUNDS.index("sea")]]
    figures = scene_figures(Verdict(noun, style, background), scenes, NOUNS)
    assert figures == {"top1": 0.5, "top5": 0.5, "style": 0.5, "background": 1.0}
    two = [Scene(("cat", "dog"), "noto", "red")]
    assert both_nouns(Verdict(torch.eye(6)[[0]] + torch.eye(6)[[1]], style, background), two, NOUNS)


def test_judge_shapes_and_targets() -> None:
    verdict = Judge(6, width=8)(torch.zeros(2, 3, 64, 64))
    assert verdict.noun.shape == (2, 6)
    assert verdict.style.shape == (2, 3)
    assert verdict.background.shape == (2, 17)
    noun, style, background = targets([Scene(("cat", "fox"), "noto", "blue")], NOUNS)
    assert noun.tolist() == [[0.5, 0, 0.5, 0, 0, 0]]
    assert (style.item(), BACKGROUNDS[int(background)]) == (1, "blue")


def test_prompts_walk_through_the_pairs_evenly() -> None:
    pairs = [(noun, style) for noun in NOUNS for style in STYLES]
    shown = [(s.nouns[0], s.style) for s in colour_scenes(2 * len(pairs), pairs, seed=0)]
    assert all(shown.count(pair) == 2 for pair in pairs)


def test_v_loss_is_nought_for_the_true_v_and_weighed_as_written() -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t, abar = torch.tensor([0, 400, 999]), alphas_cumprod()
    a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
    truth = a * noise - s * x0

    class Oracle(torch.nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = off

        def forward(self, noisy: torch.Tensor, t: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return truth + self.off

    tokens = torch.zeros(3, 4, dtype=torch.long)
    assert v_loss(Oracle(0.0), x0, tokens, t, noise, abar, 5.0) == 0
    naive = 0.0
    for i in t.tolist():
        snr = float(abar[i] / (1 - abar[i]))
        naive += min(snr + 1, 5.0) / (snr + 1) * 0.25 / 3
    assert float(v_loss(Oracle(0.5), x0, tokens, t, noise, abar, 5.0)) == pytest.approx(naive, 1e-4)


def test_the_schedule_is_diffusers_scaled_linear() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(alphas_cumprod(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_timesteps_fill_every_stratum() -> None:
    t = stratified_timesteps(10, torch.Generator().manual_seed(0))
    assert sorted(i // 100 for i in t.tolist()) == list(range(10))


def test_learning_rate_rises_holds_and_falls() -> None:
    rates = [learning_rate(i, 100, 1.0, 10, decay=0.2) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
