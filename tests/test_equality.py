"""Every (loss, KL, reduction) triple equals the formulas of TRL and verl, executed from their installed packages.

``python tests/test_equality.py > docs/equality.md`` writes which triple is checked against which peer.
"""

import itertools
from pathlib import Path

import numerics
import peers
import pytest
import torch
from batches import closed_form_gradient, random_batch, reference, run, slopes

from capo import LossRule

LOSSES = {
    "clip": LossRule(clip_low=0.2, clip_high=0.28),
    "dual clip": LossRule(clip_low=0.2, clip_high=0.28, clip_dual=1.4),
    "cispo": LossRule(objective="cispo", clip_low=1.0, clip_high=0.2),
    "cispo, bounded below": LossRule(objective="cispo", clip_low=0.15, clip_high=0.2),
    "sequence ratio": LossRule(ratio="sequence", clip_low=0.03, clip_high=0.04),
    "sequence ratio, dual clip": LossRule(ratio="sequence", clip_low=0.03, clip_high=0.04, clip_dual=1.1),
    "sequence ratio by token": LossRule(ratio="sequence_token", clip_low=0.03, clip_high=0.04),
}
KLS = (None, "k1", "k2", "k3")
REDUCES = ("sequence_mean", "token_mean", "constant")
EXTRAS = {
    "plain": {},
    "importance": {"importance_cap": 1.1},
    "entropy and temperature": {"entropy_coef": 0.02, "temperature": 0.7},
    "on-policy": {},
}


def rule_of(loss: str, kl: str | None, reduce: str, extra: str = "plain") -> LossRule:
    fields = {**vars(LOSSES[loss]), **EXTRAS[extra], "reduce": reduce}
    if reduce == "constant":
        fields["constant"] = 23.0
    if kl:
        fields |= {"kl": kl, "kl_coef": 0.1}
    return LossRule(**fields)


def batch_of(extra: str):
    """One response without tokens, one of which every token is masked, tokens of advantage 0."""
    batch = random_batch(lengths=(7, 1, 0, 9, 3, 12), vocab=41, seed=2)
    batch.mask[17:20] = False
    # The log-probabilities given are those at temperature 1.
    batch.logits *= EXTRAS[extra].get("temperature", 1.0)
    return batch.replace(old_logprobs=None) if extra == "on-policy" else batch


def by_peer(loss, batch, rule):
    logits = batch.logits.detach().clone().requires_grad_(True)
    value = loss(batch, logits, rule)
    value.backward()
    return value.detach(), logits.grad


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors this small a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = list(itertools.product(LOSSES, KLS, REDUCES, EXTRAS))


@pytest.mark.parametrize(("loss", "kl", "reduce", "extra"), CASES)
def test_equals_peers_in_float64(loss, kl, reduce, extra):
    rule, batch = rule_of(loss, kl, reduce, extra), batch_of(extra).double()
    (value, *_), grad = reference(batch, rule)
    for peer in peers.offers(rule).values():
        expected, expected_grad = by_peer(peer, batch, rule)
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("loss", "kl", "reduce"), list(itertools.product(LOSSES, KLS, REDUCES)))
def test_equals_peers_in_float32(loss, kl, reduce, device):
    rule, batch = rule_of(loss, kl, reduce), batch_of("plain")
    out, grad = run(batch.to(device), rule)
    size = batch.logits.double().abs().amax(-1) + 1
    by_capo = [reference(batch, rule)[1], closed_form_gradient(batch, rule)]
    for peer in peers.offers(rule).values():
        value, eager = by_peer(peer, batch, rule)
        truth_value, truth = by_peer(peer, batch.double(), rule)
        numerics.assert_rows_as_accurate(grad.cpu(), [eager, *by_capo], truth, slopes(batch.double(), rule), size)
        numerics.assert_as_accurate(out.loss.detach().cpu(), value, truth_value, size.max())


def test_the_batch_reaches_every_branch():
    batch = batch_of("plain").double()
    active = batch.mask & (batch.credit != 0)
    for name, rule in LOSSES.items():
        live = _live(batch, rule)
        ratio, inside = live.ratio(rule)
        bounded, clipped, dual = live.clip(ratio, rule)
        assert clipped.any() and not clipped.all() and inside.all(), name
        assert (bounded[clipped] < 1).any() or rule.clip_low == 1.0, name
        assert (bounded[clipped] > 1).any(), name
        assert bool(dual.any()) == (rule.clip_dual is not None), name
    counts = torch.zeros(6, dtype=torch.int64).index_add(0, _response(batch), batch.mask.long())
    assert counts.tolist().count(0) == 2 and active.sum() < batch.mask.sum()


def _live(batch, rule):
    from capo.reference import _Live

    return _Live(*(getattr(batch, n) for n in ("logits", "labels", "credit", "old_logprobs", "cu_seqlens")), rule,
                 batch.ref_logprobs, batch.mask, batch.rollout_logprobs)  # fmt: skip


def _response(batch):
    lengths = batch.cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


# ---- further names of TRL and verl for the same losses


def test_trl_dapo_is_token_mean():
    rule, batch = rule_of("clip", "k3", "token_mean"), batch_of("plain").double()
    (value, *_), grad = reference(batch, rule)
    theirs = by_peer(lambda b, z, r: peers.trl_loss(b, z, r, loss_type="dapo"), batch, rule)
    torch.testing.assert_close((value, grad), theirs, rtol=1e-11, atol=1e-14)


def test_trl_luspo_is_the_constant_number_of_responses():
    batch = batch_of("plain").double()
    rule = LossRule(ratio="sequence", clip_low=0.03, clip_high=0.04, reduce="constant", constant=6.0)
    (value, *_), grad = reference(batch, rule)
    theirs = by_peer(lambda b, z, r: peers.trl_loss(b, z, r, loss_type="luspo"), batch, rule)
    torch.testing.assert_close((value, grad), theirs, rtol=1e-11, atol=1e-14)


def test_trl_cispo_with_a_sequence_ratio():
    batch = batch_of("plain").double()
    rule = LossRule(objective="cispo", ratio="sequence", clip_low=1.0, clip_high=0.04, reduce="token_mean")
    (value, *_), grad = reference(batch, rule)
    torch.testing.assert_close((value, grad), by_peer(peers.trl_loss, batch, rule), rtol=1e-11, atol=1e-14)


def test_verl_token_sum_is_the_constant_1():
    batch = batch_of("plain").double()
    rule = LossRule(reduce="constant", constant=1.0)
    core = peers.verl().core

    def loss(batch, logits, rule):
        x = peers.Padded(batch, logits, logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0], logits[:, 0])
        config = peers.verl().config(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=peers.NEVER
        )
        return core.compute_policy_loss_vanilla(x.old, x.logprobs, x.advantages, x.mask, "token-sum", config, None)[0]

    (value, *_), grad = reference(batch, rule)
    torch.testing.assert_close((value, grad), by_peer(loss, batch, rule), rtol=1e-11, atol=1e-14)


# ---- where the mappings end


def far(by: float):
    """Log-probabilities ``by`` away from the old ones."""
    batch = batch_of("plain").double()
    (_, logprobs, *_), _ = reference(batch.replace(mask=None), LossRule(kl_coef=1.0))
    return batch.replace(old_logprobs=logprobs - by)


@pytest.mark.parametrize("by", [-25.0, -19.0, 19.0, 25.0])
@pytest.mark.parametrize("loss", ["clip", "dual clip", "cispo"])
def test_log_ratios_are_limited_as_in_verl(loss, by):
    rule, batch = rule_of(loss, None, "sequence_mean"), far(by)
    (value, *_), grad = reference(batch, rule)
    torch.testing.assert_close((value, grad), by_peer(peers.verl_loss, batch, rule), rtol=1e-11, atol=1e-14)


def test_verl_holds_k3_at_10():
    rule, batch = rule_of("clip", "k3", "token_mean"), batch_of("plain").double()
    near = batch.ref_logprobs.clone()
    batch.ref_logprobs[::3] += 4.0  # k3 of about 50
    _, theirs = by_peer(peers.verl_loss, batch, rule)
    _, ours = reference(batch, rule)
    held = torch.zeros_like(batch.mask)
    held[::3] = True
    torch.testing.assert_close(theirs[~held], ours[~held], rtol=1e-11, atol=1e-14)
    _, without = reference(batch.replace(ref_logprobs=near), rule_of("clip", None, "token_mean"))
    torch.testing.assert_close(theirs[held], without[held], rtol=1e-11, atol=1e-14)
    assert (ours[held & batch.mask] != theirs[held & batch.mask]).any()


# ---- the table


def table() -> str:
    """docs/equality.md"""
    versions = " and ".join(f"{name} {version}" for name, version in peers.VERSIONS.items())
    lines = [
        "# Equality with TRL and verl",
        "",
        f"Each triple of loss, KL and reduction of `LossRule` equals the formulas of {versions}, executed from their",
        "installed packages, loss and gradient of the logits: in float64 (`capo.reference`, to 1e-11), and in float32",
        "(`capo.policy_loss` on every backend, against the peer in float64, by the tolerance rule of `tests/numerics.py`).",
        "The batches have per-token advantages, masked tokens, a masked and an empty response, and advantages of 0. In",
        "float64 each triple is checked alone, with truncated importance weights, with entropy bonus and temperature, and",
        "on-policy. *TRL + verl*: TRL's loss with verl's KL or entropy term, where no peer has both.",
        "",
        "Written by `python tests/test_equality.py > docs/equality.md`; a test fails where it is out of date.",
        "",
    ]
    for extra in EXTRAS:
        if extra == "on-policy":
            continue
        lines += [f"## {'Loss and KL' if extra == 'plain' else f'With {extra}'}", ""]
        lines += ["| loss | reduction | no KL | k1 | k2 | k3 |", "| --- | --- | --- | --- | --- | --- |"]
        for loss, reduce in itertools.product(LOSSES, REDUCES):
            cells = [", ".join(peers.offers(rule_of(loss, kl, reduce, extra))) for kl in KLS]
            lines.append(f"| {loss} | `{reduce}` | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## What differs, and how it maps", ""]
    for name, mappings in peers.MAPPINGS.items():
        lines += [f"{name}:", "", *(f"- {mapping}" for mapping in mappings), ""]
    return "\n".join(lines).rstrip() + "\n"


def test_the_table_in_the_documentation_is_this_one():
    assert (Path(__file__).parents[1] / "docs/equality.md").read_text() == table()


def test_every_triple_has_a_peer():
    for loss, kl, reduce, extra in CASES:
        assert peers.offers(rule_of(loss, kl, reduce, extra)), (loss, kl, reduce, extra)


if __name__ == "__main__":
    print(table(), end="")
