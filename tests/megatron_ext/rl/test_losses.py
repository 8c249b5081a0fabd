"""The policy losses against TRL's in float64, by value and by gradient; what TRL lacks by exact enumeration."""

import itertools

import pytest
import torch

from data_tools.base import declared
from data_tools.mistake import Problem
from megatron_ext.rl.losses import Tokens, Totals, correction_weights, mismatch_sums, policy_loss
from megatron_ext.rl.settings import Correction, Loss, check_loss

ROWS, WIDTH = 7, 9


class Batch:
    """Ragged rows: of one token, of all of them, of none; ratios above 3 under a negative advantage."""

    def __init__(self, seed: int):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        lengths = torch.tensor([1, WIDTH, 0, 4, 6, 2, 5])
        self.mask = (torch.arange(WIDTH) < lengths[:, None]).to(torch.float64)
        self.old = -normal(ROWS, WIDTH).abs()
        self.logp = self.old + 0.4 * normal(ROWS, WIDTH)
        self.logp[3, :2] = self.old[3, :2] + 1.5  # e^1.5 = 4.5
        self.reference = self.old + 0.3 * normal(ROWS, WIDTH)
        self.behaviour = self.old + 0.5 * normal(ROWS, WIDTH)
        self.advantages = normal(ROWS)
        self.advantages[3] = -1.2
        self.advantages[5] = 0.0  # of a group without variance

    def tokens(self, rows: list[int], logp: torch.Tensor) -> Tokens:
        """The trained tokens of these rows, as a rank holds them."""
        mask = self.mask[rows].bool()
        sequence = torch.arange(len(rows))[:, None].expand(-1, WIDTH)[mask]
        return Tokens(
            logp[rows][mask],
            self.old[rows][mask],
            self.advantages[rows][sequence],
            sequence,
            mask.sum(1),
            self.behaviour[rows][mask],
            self.reference[rows][mask],
        )

    @property
    def totals(self) -> Totals:
        return Totals(int(self.mask.sum()), ROWS, 12)


def ours(batch: Batch, config: Loss, shares: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient [rows, width]) added over the shares."""
    logp = batch.logp.clone().requires_grad_()
    loss = sum(policy_loss(batch.tokens(rows, logp), config, batch.totals)[0] for rows in shares)
    loss.backward()
    return loss.detach(), logp.grad


SHARES = {"whole": [[*range(ROWS)]], "micro-batches": [[0, 1], [2], [3, 4], [5, 6]], "ranks": [[6, 4, 2, 0], [5, 3, 1]]}


@pytest.mark.parametrize("cut", SHARES)
@pytest.mark.parametrize("correction", ["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("policy, level, aggregation", [
    ("clip", "token", "token"), ("clip", "token", "sequence"), ("clip", "token", "constant"),
    ("clip", "sequence", "sequence"), ("clip", "sequence", "token"), ("cispo", "token", "token"),
])  # fmt: skip
def test_value_and_gradient_are_trls(
    policy: str, level: str, aggregation: str, beta: float, correction: str, cut: str
) -> None:
    from tests.megatron_ext.rl.oracle import NAMES, trl_loss

    for seed, dual in itertools.product((0, 1), (0.0, 3.0) if policy == "clip" else (0.0,)):
        batch = Batch(seed)
        bounds = Correction(correction, 0.5, 1.6)
        config = Loss(policy, level, aggregation, 0.2, 0.28, dual, kl_beta=beta, correction=bounds)
        importance = None
        if correction != "off":
            every = batch.tokens([*range(ROWS)], batch.logp)
            importance = torch.ones(ROWS, WIDTH, dtype=torch.float64)
            importance[batch.mask.bool()] = correction_weights(every, bounds)
        logp = batch.logp.clone().requires_grad_()
        theirs = trl_loss(
            logp, batch.old, batch.mask, batch.advantages, names=NAMES[policy, level, aggregation], clip=(0.2, 0.28),
            longest=12, dual_clip=dual, beta=beta, reference=batch.reference, importance=importance,
        )  # fmt: skip
        theirs.backward()
        loss, gradient = ours(batch, config, SHARES[cut])
        assert abs(loss - theirs.detach()) < 1e-9
        assert (gradient - logp.grad).abs().max() < 1e-9
        assert gradient.abs().max() > 1e-3


def test_the_correction_weighs_as_its_bounds_say() -> None:
    behaviour = torch.tensor([0.1, 0.4, 0.5, 0.2]).log()
    old = torch.tensor([0.3, 0.4, 0.1, 0.3]).log()
    tokens = Tokens(old, old, old, torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2]), behaviour)

    def weights(mode: str) -> list[float]:
        return correction_weights(tokens, Correction(mode, 0.5, 2.0)).tolist()

    assert weights("token_truncate") == pytest.approx([2.0, 1.0, 0.2, 1.5])
    assert weights("token_mask") == pytest.approx([0.0, 1.0, 0.0, 1.5])
    assert weights("sequence_truncate") == pytest.approx([2.0, 2.0, 0.3, 0.3])
    assert weights("sequence_mask") == pytest.approx([0.0] * 4)
    sums = mismatch_sums(tokens)
    assert sums["max_probability_difference"] == pytest.approx(0.4) and sums["weight"] == pytest.approx(
        3 + 1 + 0.2 + 1.5
    )


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_gradient_of_the_kl_term_is_that_of_the_exact_kl(kind: str) -> None:
    """By enumeration over a categorical of five: the expectation over samples of the policy itself."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.2, -0.5, 0.0, 0.3], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    (logp.exp() * (logp - reference)).sum().backward()
    exact, logits.grad = logits.grad.clone(), None
    logp = torch.log_softmax(logits, 0)
    for token, probability in enumerate(logp.detach().exp()):
        one = Tokens(
            logp[token : token + 1], logp[token : token + 1].detach(), torch.zeros(1, dtype=torch.float64),
            torch.zeros(1, dtype=torch.int64), torch.ones(1), reference=reference[token : token + 1],
        )  # fmt: skip
        loss, _ = policy_loss(one, Loss(kl=kind, kl_beta=1.0), Totals(1, 1, 1))
        (probability * loss).backward(retain_graph=True)
    assert (logits.grad - exact).abs().max() < 1e-12


def test_the_entropy_term_is_a_mean_over_all_tokens() -> None:
    batch = Batch(3)
    entropy = torch.rand(int(batch.mask.sum()), dtype=torch.float64, requires_grad=True)
    tokens = batch.tokens([*range(ROWS)], batch.logp)
    tokens = Tokens(**{**vars(tokens), "entropy": entropy})
    with_term, _ = policy_loss(tokens, Loss(entropy=0.1), batch.totals)
    without, _ = policy_loss(tokens, Loss(), batch.totals)
    assert float(with_term) == pytest.approx(float(without - 0.1 * entropy.mean()))


def test_a_step_without_change_has_ratio_one_and_clips_nothing() -> None:
    batch = Batch(4)
    batch.logp = batch.old.clone()
    _, sums = policy_loss(batch.tokens([*range(ROWS)], batch.logp), Loss(), batch.totals)
    assert sums["ratio"] == batch.mask.sum() and sums["clipped_low"] == sums["clipped_high"] == 0


def extreme_tokens(seed: int) -> Tokens:
    """float32 tokens of 6 rollouts, whose log-probs are up to 1,000 nats apart, and with advantages of 0 among them."""
    random = torch.Generator().manual_seed(seed)
    n = 48
    sizes = torch.tensor([0.0, 0.3, 30.0, 100.0, 1000.0])

    def log_probs() -> torch.Tensor:
        return -sizes[torch.randint(5, (n,), generator=random)] * torch.randn(n, generator=random).abs()

    logp, sequence = log_probs(), torch.arange(n) // 8
    advantage = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0, 0.5])[sequence]
    lengths, entropy = torch.full((6,), 8), torch.rand(n, generator=random)
    return Tokens(
        logp.requires_grad_(), log_probs(), advantage, sequence, lengths, log_probs(), log_probs(), entropy,
    )  # fmt: skip


@pytest.mark.parametrize("correction", ["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_an_extreme_mismatch_gives_a_finite_gradient_or_is_counted(correction: str) -> None:
    """What a mask, a clip or a cap leaves out leaves no NaN; what is not left out is told."""
    counted = 0
    shapes = itertools.product(("clip", "cispo"), ("token", "sequence"), ("token", "sequence", "constant"),
                               (0.0, 3.0), (0.0, 0.1), ("k2", "k3"), range(3))  # fmt: skip
    for policy, level, aggregation, dual, beta, kl, seed in shapes:
        tokens = extreme_tokens(seed)
        config = Loss(policy, level, aggregation, dual_clip=dual, kl=kl, kl_beta=beta, entropy=0.01,
                      correction=Correction(correction, 0.5, 2.0))  # fmt: skip
        loss, sums = policy_loss(tokens, config, Totals(48, 6, 8))
        loss.backward()
        case = (config, seed)
        assert loss.isfinite() and tokens.logp.grad.isfinite().all(), case
        assert all(value.isfinite() for value in sums.values()), case
        unbounded = (policy == "clip" and not dual) or (beta and kl == "k3")
        assert unbounded or not sums["beyond"], case
        counted += int(sums["beyond"])
    assert counted
    assert all(value.isfinite() for value in mismatch_sums(extreme_tokens(0)).values())


def test_what_a_mask_leaves_out_has_no_part_in_loss_or_gradient() -> None:
    for mode in ("token_mask", "sequence_mask"):
        tokens = extreme_tokens(1)
        masked = correction_weights(tokens, Correction(mode, 0.5, 2.0)) == 0
        loss, sums = policy_loss(tokens, Loss(correction=Correction(mode, 0.5, 2.0)), Totals(48, 6, 8))
        loss.backward()
        assert masked.any() and not tokens.logp.grad[masked].any() and sums["masked"] == masked.sum()


def test_wrong_settings_are_told_with_the_nearest() -> None:
    wrong = Loss("clipp", clip_low=2, dual_clip=1.1, kl_beta=-1, correction=Correction("tis", 3.0, 2.0))
    problems: list[Problem] = declared.check(wrong, "loss")
    assert [problem.where for problem in problems] == [
        "loss.policy",
        "loss.clip_low",
        "loss.kl_beta",
        "loss.correction.mode",
    ]
    assert "did you mean clip?" in problems[0].message
    assert [problem.where for problem in check_loss(wrong)] == ["loss.dual_clip", "loss.correction.low"]
