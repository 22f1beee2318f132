"""What only the CUDA kernels promise: bits that do not depend on how a row is divided, and NaN where nothing is checked.

Everything else is in the tests of the ops. On a machine without a GPU the kernels run on the CPU, as tests/emulated.py has
them; what the compiler makes of them is asked of the module, where it was built with CUDA.
"""

import dataclasses
import importlib
import math
import mmap

import emulated
import pytest
import torch
from batches import credit_to, lengths_to_cu, random_batch, random_credit, run

import capo
from capo import LossRule, backends, reference

if backends.why_not("native", "cpu") is not None:
    pytest.skip("no native module", allow_module_level=True)
cuda = importlib.import_module("capo.cuda")
GPU = torch.cuda.is_available() and cuda.why_not() is None
RULE = LossRule(kl_coef=0.1, entropy_coef=0.01, temperature=0.8, reduce="token_mean")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)] if GPU else ["cpu"])
def device(request, monkeypatch):
    """The device on which the kernels run; values are not looked at before."""
    monkeypatch.setattr(cuda, "checks_values", lambda device_type: False)
    if GPU:
        with capo.use_backend("native"):
            yield torch.device("cuda")
        return
    if emulated.compiler() is None:
        pytest.skip("no g++ for the emulator")
    module = emulated.module()
    monkeypatch.setattr(cuda, "_module", module)
    monkeypatch.setitem(backends.BACKENDS, "emulated", "capo.cuda")
    with capo.use_backend("emulated"):
        yield torch.device("cpu")
    play()


def play(clusters=True, multiprocessors=4, most=227 * 1024, target=40 * 1024):
    """Change the device that is played: whether there are clusters, and bytes of shared memory for a block at most, and for one
    of several."""
    if not GPU:
        emulated.module().set_device(clusters, multiprocessors, most, target)


def everything(batch, rule, **options):
    out, grad = run(batch, rule, **options)
    return (*(x.detach() for x in out), grad)


def same(results):
    first, *others = results
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# ---- policy_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 1030, 4099, 9000])
def test_all_forms_give_the_same_bits(vocab, dtype, device, monkeypatch):
    batch = random_batch(lengths=(3, 0, 4), vocab=vocab, dtype=dtype).to(device)
    batch.logits[0, vocab // 2] += 40.0
    results = []
    for form in cuda.FORMS:
        monkeypatch.setattr(cuda, "_form", form)
        results.append(everything(batch, RULE))
    assert same(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_blocks_of_a_row_does_not_change_its_bits(dtype, device, monkeypatch):
    if GPU:
        pytest.skip("a GPU has the shared memory that it has")
    monkeypatch.setattr(cuda, "_form", "on chip")
    batch = random_batch(lengths=(3, 2), vocab=7 * 1024 + 5, dtype=dtype)
    results = []
    for target in (227, 24, 13, 7, 3):  # one block to eight, of which not all have columns
        play(target=target * 1024)
        results.append(everything(batch, RULE))
    assert same(results)


def test_the_form_is_chosen_by_the_device(device):
    if GPU:
        pytest.skip("a GPU is what it is")
    module, batch = emulated.module(), random_batch(lengths=(9,), vocab=2000)

    def launches(rule=RULE, batch=batch):
        before = module.launches()
        capo.policy_loss(rule=rule, **vars(batch.replace(logits=batch.logits.clone().requires_grad_(True))))
        return module.launches() - before

    assert launches() == 3  # a row in a cluster: weights, rows, metrics
    credit = random_credit(4, num_responses=9)
    of_tokens = random_batch(lengths=credit.cu_seqlens.diff().tolist(), vocab=2000)
    of_credit = of_tokens.replace(credit=credit, cu_seqlens=credit.cu_seqlens)
    assert launches(batch=of_credit) == 3  # advantages are made with the weights
    assert launches(LossRule(ratio="sequence"), of_credit) == 6
    other_lengths = of_credit.replace(cu_seqlens=credit.cu_seqlens.clone())
    assert launches(batch=other_lengths) == 4  # they may say something else
    assert launches(LossRule(ratio="sequence")) == 6
    play(clusters=False)
    assert launches() == 3  # a row in a block, read twice
    play(clusters=False, multiprocessors=5)
    assert launches() == 6  # fewer rows than two a multiprocessor: they are divided
    play(most=4000, multiprocessors=5)
    assert launches() == 6  # no cluster holds a row


@pytest.mark.parametrize("form", cuda.FORMS[1:])
@pytest.mark.parametrize("label", [-1, 2000, 2**40, -(2**63)])
def test_an_unchecked_label_outside_the_vocabulary_gives_nan_in_its_row(label, form, device, monkeypatch):
    monkeypatch.setattr(cuda, "_form", form)
    batch = random_batch(lengths=(3, 2), vocab=2000).replace(mask=None)
    batch.credit[:] = 1.0
    batch = batch.to(device)
    _, clean = run(batch, LossRule())
    labels = batch.labels.clone()
    labels[1] = label
    out, grad = run(batch.replace(labels=labels), LossRule())
    others = torch.arange(5, device=device) != 1
    assert bool(out.loss.isnan()) and bool(grad[1].isnan().all()) and torch.equal(grad[others], clean[others])
    assert capo.logprobs(batch.logits, labels)[0].isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 6], [1, 3, 5], [0, 4, 3], [-7, 3, 5], [0, 9, 5], [0, -(2**62), 5]])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_unchecked_lengths_that_do_not_fit_give_nan(cu_seqlens, ratio, device):
    batch = random_batch(lengths=(3, 2), vocab=11).replace(cu_seqlens=torch.tensor(cu_seqlens)).to(device)
    assert bool(run(batch, LossRule(ratio=ratio))[0].loss.isnan())


@pytest.mark.parametrize("form", cuda.FORMS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_rows_is_read_or_written(dtype, form, device, monkeypatch):
    monkeypatch.setattr(cuda, "_form", form)
    batch = random_batch(lengths=(3, 2), vocab=1500, dtype=dtype).to(device)
    batch.credit[1] = 0.0  # a dead row is written, too
    expected = everything(batch, LossRule())
    for offset in range(9):  # rows that begin at any address
        wide = torch.full((5, 1500 + 17), math.nan, dtype=dtype, device=device)
        wide[:, offset : offset + 1500] = batch.logits
        logits = wide[:, offset : offset + 1500]
        assert same([expected, everything(batch.replace(logits=logits), LossRule())])
        leaf = logits.detach().requires_grad_(True)
        capo.policy_loss(rule=LossRule(), **{**vars(batch), "logits": leaf}, inplace=True).loss.backward()
        assert torch.equal(leaf.grad, expected[-1])
        wide[:, offset : offset + 1500] = 0
        assert int(wide.isnan().sum()) == 5 * 17


def rows_at(offset, rows, vocab, dtype, device):
    """Contiguous rows of NaN that begin `offset` elements behind a multiple of 16 bytes, and the memory around them."""
    memory = torch.full((rows * vocab + 32,), math.nan, dtype=dtype, device=device)
    assert memory.data_ptr() % 16 == 0
    return memory, memory[16 + offset :][: rows * vocab].view(rows, vocab)


def watch(*tensors):
    """From now on rows of these tensors alone may be touched. Gives how often another place was, since the last call."""
    if GPU:  # compute-sanitizer watches there
        return 0
    sizes = [(row.data_ptr(), row.nbytes) for tensor in tensors for row in tensor]
    return emulated.module().watch([(begin, begin + size) for begin, size in sizes])


# Rows of one vector or less, and of two tiles: of 2047 columns all vectors end in other columns than tiles do.
@pytest.mark.parametrize("vocab", [1, 5, 2047])
@pytest.mark.parametrize("form", cuda.FORMS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_odd_address_changes_no_bit_and_no_byte_beside_a_row_is_touched(dtype, form, vocab, device, monkeypatch):
    monkeypatch.setattr(cuda, "_form", form)
    dead = torch.tensor([False, False, True, False, False, False])
    batch = random_batch(lengths=(3, 3), vocab=vocab, dtype=dtype).replace(mask=~dead)
    batch.credit[:] = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, -1.0])
    batch.labels[0], batch.labels[1], batch.labels[-1] = 0, vocab - 1, vocab - 1
    batch = batch.to(device)
    _, *others = batch.values()
    kernel = backends.kernel("policy_loss", device)

    def results(logits, grad):
        return (*kernel(logits, grad, *others, *capo.ops._fields(RULE)), grad)

    wide = torch.zeros(6, (vocab + 7) // 8 * 8, dtype=dtype, device=device)[:, :vocab]
    expected = results(wide.copy_(batch.logits), torch.zeros_like(wide, memory_format=torch.preserve_format))
    for offset in range(16 // dtype.itemsize):
        for other in (0, 3):  # the gradient at the same distance from a multiple of 16 bytes as the logits, and not
            (_, logits), (memory, grad) = (
                rows_at(x % (16 // dtype.itemsize), 6, vocab, dtype, device) for x in (offset, offset + other)
            )
            logits.copy_(batch.logits)
            watch(logits, grad)
            found = results(logits, grad)
            assert watch() == 0
            assert same([expected, found]), (offset, other)
            assert int(memory.isnan().sum()) == 32


@pytest.mark.parametrize("form", cuda.FORMS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_but_for_its_ends_a_row_at_an_odd_address_is_read_and_written_by_vectors(dtype, form, device, monkeypatch):
    if GPU:
        pytest.skip("the emulator counts")
    monkeypatch.setattr(cuda, "_form", form)
    vocab, width = 12 * 1024 + 1, 16 // dtype.itemsize
    batch = random_batch(lengths=(1,), vocab=vocab, dtype=dtype).replace(mask=None)
    batch.credit[:] = 1.0
    _, *others = batch.values()
    for offset in range(width):
        (_, logits), (_, grad) = (rows_at(offset, 1, vocab, dtype, device) for _ in range(2))
        logits.copy_(batch.logits)
        before = emulated.module().elements()
        backends.kernel("policy_loss", device)(logits, grad, *others, *capo.ops._fields(RULE))
        # The sums read the first tile and the last one column by column, and for all others what lies in the next vector.
        assert emulated.module().elements() - before < 2 * 1024 + 12 * width + 5 * width


@pytest.mark.parametrize("form", cuda.FORMS[1:])
def test_a_label_beyond_the_vocabulary_writes_nothing(form, device, monkeypatch):
    monkeypatch.setattr(cuda, "_form", form)
    batch = random_batch(lengths=(2,), vocab=1501).replace(mask=None).to(device)
    batch.credit[:] = 1.0
    _, labels, *others = batch.values()
    for column in (1501, 1503, 2047):
        (_, logits), (memory, grad) = (rows_at(0, 2, 1501, torch.float32, device) for _ in range(2))
        logits.copy_(batch.logits)
        labels[1] = column
        watch(logits, grad)
        backends.kernel("policy_loss", device)(logits, grad, labels, *others, *capo.ops._fields(RULE))
        assert watch() == 0
        assert bool(grad[1].isnan().all()) and int(memory.isnan().sum()) == 32 + 1501


@pytest.mark.parametrize("form", cuda.FORMS[1:])
def test_dead_rows_are_not_read(form, device, monkeypatch):
    monkeypatch.setattr(cuda, "_form", form)
    batch = random_batch(lengths=(9, 8), vocab=3000).to(device)
    expected = everything(batch, LossRule())
    dead = (batch.credit == 0) | ~batch.mask
    assert 0 < int(dead.sum()) < 17
    logits = batch.logits.clone()
    logits[dead] = math.nan
    assert same([expected, everything(batch.replace(logits=logits), LossRule())])


@pytest.mark.parametrize("reduce", ["sequence_mean", "token_mean"])
def test_responses_of_more_tokens_than_a_block_has_threads(reduce, device):
    batch, rule = random_batch(lengths=(600, 2, 300), vocab=3).to(device), LossRule(reduce=reduce)
    found = everything(batch, rule)
    with capo.use_backend("torch"):
        expected = everything(batch, rule)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_threads_that_are_drawn_by_lot_give_the_same_bits(device):
    batch = random_batch(lengths=(4, 2), vocab=5000, dtype=torch.bfloat16).to(device)
    assert same([everything(batch, RULE) for _ in range(5)])


# ---- rows of some tokens only


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_some_tokens_have_the_bits_of_all_in_every_form(dtype, device, monkeypatch):
    batch = random_batch(lengths=(6, 0, 7), vocab=3100, dtype=dtype).to(device)
    expected = everything(batch, LossRule())
    rows = capo.live_rows(batch.credit, LossRule(), batch.mask)
    assert 0 < len(rows) < 13
    few = batch.replace(logits=batch.logits[rows])
    for form in cuda.FORMS:
        monkeypatch.setattr(cuda, "_form", form)
        assert same([(*expected[:-1], expected[-1][rows]), everything(few, LossRule(), rows=rows)])
    monkeypatch.setattr(cuda, "_form", "chosen")
    play(clusters=False, multiprocessors=50)
    assert same([(*expected[:-1], expected[-1][rows]), everything(few, LossRule(), rows=rows)])


@pytest.mark.parametrize(
    "rows", [[0, 2, 5], [-1, 2, 3], [2, 2, 3], [3, 1, 4], [0, 1, 2**62], [-(2**63), 1, 2]], ids=str
)
@pytest.mark.parametrize("form", cuda.FORMS[1:3])
def test_unchecked_rows_that_do_not_fit_give_a_loss_of_nan(rows, form, device, monkeypatch):
    monkeypatch.setattr(cuda, "_form", form)
    batch = random_batch(lengths=(3, 2), vocab=1500)
    batch = batch.replace(mask=None, credit=torch.ones(5), old_logprobs=None).to(device)
    rows = torch.tensor(rows, device=device)
    out, grad = run(batch.replace(logits=batch.logits[:3]), LossRule(), rows=rows)
    assert bool(out.loss.isnan()) and out.logprobs.shape == (5,)
    outside = (rows < 0) | (rows >= 5)
    assert not grad[outside].any() and bool(grad[~outside].any(-1).all())


def test_rows_of_some_tokens_take_no_more_launches(device):
    if GPU:
        pytest.skip("the emulator counts launches")
    credit = random_credit(4, num_responses=9)
    batch = random_batch(lengths=credit.cu_seqlens.diff().tolist(), vocab=2000)
    batch = batch.replace(credit=credit, cu_seqlens=credit.cu_seqlens)
    rows = capo.live_rows(credit, RULE, batch.mask)
    before = emulated.module().launches()
    run(batch.replace(logits=batch.logits[rows]), RULE, rows=rows)
    assert emulated.module().launches() == before + 3


# ---- credit


@pytest.mark.parametrize(
    "change",
    [
        {"votes": torch.tensor([[0], [2], [0], [0]], dtype=torch.int8)},
        {"outcomes": torch.tensor([math.inf, 0.0])},
        {"ends": [2, 5, 7, 10]},
        {"ends": [2, 4, 7, 11]},
        {"ends": [2, 4, 7, 2**62]},
        {"starts": [0, 1, 4, 7]},
        {"starts": [0, 2, 3, 7]},
        {"starts": [-(2**62), 2, 4, 7]},
        {"cu_steps": [0, 9, 4]},
        {"cu_steps": [0, -9, 4]},
        {"cu_seqlens": [0, 2**62, 10]},
        {"cu_seqlens": [0, 11, 10]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_unchecked_credit_that_contradicts_itself_is_nan(change, device):
    fields = {"starts": [0, 2, 4, 7], "ends": [2, 4, 7, 10], "cu_steps": [0, 2, 4], "cu_seqlens": [0, 4, 10]}
    starts, ends, cu_steps, cu_seqlens = (torch.tensor(change.get(k, v)).to(device) for k, v in fields.items())
    votes = change.get("votes", torch.tensor([[0], [1], [0], [0]], dtype=torch.int8)).to(device)
    outcomes = change.get("outcomes", torch.tensor([1.0, 0.0])).to(device)
    groups = torch.zeros(2, dtype=torch.int64, device=device)
    rule = capo.ops._fields(capo.CreditRule())
    advantages = backends.kernel("credit", device)(
        outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, 10, *rule
    )
    assert bool(advantages.isnan().all())


def test_tokens_that_no_response_has_are_nan_and_other_groups_are_not(device):
    credit = random_credit(1)
    steps, rule = credit.steps, capo.ops._fields(credit.rule)
    layout = credit.outcomes, credit.votes, steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens, credit.groups
    layout = [x.to(device) for x in layout]
    number = int(credit.cu_seqlens[-1])
    function = backends.kernel("credit", device)
    expected, longer = function(*layout, number, *rule), function(*layout, number + 7, *rule)
    assert torch.equal(longer[:number], expected) and bool(longer[number:].isnan().all())
    layout[0][0] = math.inf
    spoilt = function(*layout, number, *rule)
    own = credit.groups == credit.groups[0]
    own = torch.repeat_interleave(own, credit.cu_seqlens.diff().long()).to(device)
    assert bool(spoilt[own].isnan().all()) and torch.equal(spoilt[~own], expected[~own])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_loss_of_a_credit_that_contradicts_itself_is_nan_where_its_advantages_are(ratio, device):
    credit = random_credit(1, num_responses=9, num_groups=3)
    batch = random_batch(lengths=credit.cu_seqlens.diff().tolist(), vocab=37).to(device)
    credit = credit_to(credit, device, batch.cu_seqlens)
    credit.outcomes[4] = math.inf
    batch = batch.replace(credit=credit, mask=None)
    expected = everything(batch.replace(credit=credit.advantages()), LossRule(ratio=ratio))
    assert bool(expected[0].isnan()) and not bool(expected[-1].isnan().all(-1).all())
    for mine, theirs in zip(everything(batch, LossRule(ratio=ratio)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 6], [1, 3, 5], [0, 4, 3], [-7, 3, 5], [0, 9, 5], [0, -(2**62), 5]])
def test_lengths_of_a_credit_that_do_not_fit_give_a_loss_of_nan(cu_seqlens, device):
    nothing, cu_seqlens = torch.zeros(0, dtype=torch.int64), torch.tensor(cu_seqlens).to(device)
    credit = capo.Credit(
        torch.tensor([1.0, 0.0]), torch.zeros(0, 1, dtype=torch.int8),
        capo.Steps(nothing, nothing, torch.zeros(3, dtype=torch.int64)), cu_seqlens.cpu(), torch.zeros(2).long(),
    )  # fmt: skip
    credit = credit_to(credit, device, cu_seqlens)
    batch = random_batch(lengths=(3, 2), vocab=11).to(device).replace(cu_seqlens=cu_seqlens, credit=credit)
    assert bool(run(batch, LossRule())[0].loss.isnan())


def test_a_loss_of_a_credit_of_groups_larger_than_what_a_block_lists(device):
    credit = random_credit(2, num_responses=4500, num_groups=2)
    few = random_batch(lengths=credit.cu_seqlens.diff().tolist(), vocab=3).to(device)
    batch = few.replace(credit=credit_to(credit, device, few.cu_seqlens))
    assert same([everything(x, LossRule()) for x in (batch, batch.replace(credit=batch.credit.advantages()))])


@pytest.mark.parametrize("preset", ["capo", "grpo", "rloo", "papo", "grpo_process", "vppo"])
def test_groups_larger_than_what_a_block_lists(preset, device):
    credit = random_credit(2, num_responses=4500, num_groups=2, rule=capo.CreditRule.preset(preset))
    credit.outcomes[7] = math.nan
    check_credit(credit, device)


def test_members_of_a_group_may_be_far_apart(device):
    credit = random_credit(5, num_responses=2300, num_groups=2300)
    groups = torch.arange(2300)
    groups[2200] = groups[1] = groups[0]  # between them are more ids than a block looks at in one go
    credit = dataclasses.replace(credit, groups=groups, outcomes=torch.arange(2300) % 2.0)
    assert int((reference_advantages(credit) != 0).sum()) > 0
    check_credit(credit, device)


def test_steps_and_votes_beyond_a_warp(device):
    steps = 150
    credit = capo.Credit(
        torch.tensor([1.0, 0.0]), (torch.arange(steps * 19).reshape(steps, 19) % 7 % 3 - 1).to(torch.int8),
        capo.Steps(torch.arange(0, 300, 2), torch.arange(2, 301, 2), torch.tensor([0, steps, steps])),
        lengths_to_cu((300, 40)), torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    check_credit(credit, device)


def reference_advantages(credit):
    steps = credit.steps
    layout = credit.votes, steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens, credit.groups
    return reference.token_advantages(credit.outcomes, *layout, credit.rule)


def check_credit(credit, device):
    found = credit_to(credit, device).advantages().cpu().double()
    torch.testing.assert_close(found, reference_advantages(credit), rtol=1e-6, atol=1e-9)


def test_credit_is_one_launch(device):
    if GPU:
        pytest.skip("the emulator counts launches")
    before = emulated.module().launches()
    random_credit(3, num_responses=40).advantages()
    assert emulated.module().launches() == before + 1


# ---- rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_of_rows_equal_the_reference(dtype, device):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 2500, generator=g)).to(dtype)
    logits[1] = -math.inf
    logits[2, 7] = math.nan
    logits[3, 1200:] = -math.inf
    logits[4] = math.nan
    labels = torch.tensor([3, 0, 5, -1, 2, 2499])
    stats = cuda.row_stats(logits.to(device), labels.to(device), 0.7).cpu()
    truth = reference.row_stats(logits, labels, 0.7)
    assert stats[1, 0] == -math.inf and bool(stats[1:3, 1].isnan().all())
    assert bool(stats[4, 0].isnan()), "NaN must not be taken for -inf by whoever adds up parts of a row"
    for row in (0, 3, 5):
        torch.testing.assert_close(stats[row, [0, 1, 2, 4]], truth[row, [0, 1, 2, 4]], rtol=1e-6, atol=0)


def test_rows_of_more_tiles_than_a_warp_has_lanes(device):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 50 * 1024 + 3, generator=g)
    labels = torch.tensor([50 * 1024, 7])
    found = cuda.row_stats(logits.to(device), labels.to(device), 1.0).cpu()
    truth = reference.row_stats(logits, labels, 1.0)
    torch.testing.assert_close(found[:, [0, 1, 2, 4]], truth[:, [0, 1, 2, 4]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", cuda.FORMS[1:])
def test_offsets_beyond_32_bits(form, device, monkeypatch):
    """Three rows more than 2^30 elements apart, in memory of which no more than they is ever touched."""
    if GPU:
        pytest.skip("tests/test_gpu.py has tensors of that size")
    monkeypatch.setattr(cuda, "_form", form)
    batch = random_batch(lengths=(3,), vocab=1500, dtype=torch.bfloat16).replace(mask=None)
    batch.credit[:] = 1.0
    expected = everything(batch, RULE)
    stride = 2**30 + 8
    logits, grad = (
        torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 1500)), dtype=torch.bfloat16).as_strided(
            (3, 1500), (stride, 1)
        )
        for _ in range(2)
    )
    logits.copy_(batch.logits)
    _, *others = batch.values()
    found = backends.kernel("policy_loss", device)(logits, grad, *others, *capo.ops._fields(RULE))
    assert torch.equal(found[0], expected[0]) and torch.equal(grad, expected[-1])


# ---- errors, and where the kernels run


def test_a_launch_that_fails_is_an_error(device, monkeypatch):
    if GPU:
        pytest.skip("a GPU accepts the launch")
    play(most=4000)
    monkeypatch.setattr(cuda, "_form", "two passes")
    with pytest.raises(RuntimeError, match="policy_loss: CUDA: "):
        run(random_batch(lengths=(2,), vocab=2**19), LossRule())


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "80-real,90a-real", True),
        ((8, 6), "80-real,90a-real", True),
        ((7, 5), "80-real,90a-real", False),
        ((9, 0), "80-real,90a-real", True),
        ((9, 0), "80-real", False),
        ((10, 3), "100-real", True),
        ((10, 3), "100a-real", False),
        ((12, 0), "90a-real,100-real", False),
        ((12, 0), "100-real,100-virtual", True),
        ((9, 0), "100-virtual", False),
    ],
)
def test_which_devices_are_served(capability, built, runs, monkeypatch):
    monkeypatch.setattr(cuda, "architectures", lambda: tuple(built.split(",")))
    assert cuda.built_for(capability) == runs


def test_without_cuda_kernels_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_module", None)
    assert "CAPO_CUDA=on" in cuda.why_not() and cuda.architectures() == ()
    assert "built without CUDA" in backends.why_not.__wrapped__("native", "cuda")


def test_a_gpu_that_the_kernels_were_not_built_for_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "_module", object())
    monkeypatch.setattr(cuda, "architectures", lambda: ("80-real",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert "built for 80-real, GPU 0 has 9.0" in cuda.why_not()
