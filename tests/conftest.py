"""Fixtures of all tests: every device with every backend that runs there, and memory poisoned with NaN."""

import importlib.util
import os

import emulated
import pytest
import torch

from capo import backends

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    import interpreter  # noqa: F401  the Triton backend runs on the CPU

# Python processes that tests start find the installed capo, not the checkout (before 3.11 the variable does nothing).
os.environ["PYTHONSAFEPATH"] = "1"

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PAIRS = [(device, backend) for device in DEVICES for backend in backends.available(device)]
if backends.why_not("native", "cpu") is None and emulated.compiler() is not None:
    PAIRS.append(("cpu", "emulated"))  # the CUDA kernels

# The interpreter needs some 10 ms a row: it runs these tests only, and of their cases every n-th or those with one of
# these in their names.
INTERPRETED = {
    "test_every_option": ("float32", "all-bfloat16", "default-float16"),
    "test_importance_on_policy": 1,
    "test_gradients_are_rounded_to_nearest": 1,
    "test_every_combination_equals_the_reference": 17,
    "test_every_regime": (
        "-inf-all-float32",
        "spike-all-float32",
        "spike-default-bfloat16",
        "huge-default-float16",
        "0.999-all-float32",
        "one-hot-all-float32",
        "far below zero-all-float32",
        "1-1e-6-default-float32",
    ),
    "test_every_size_of_vocabulary": ("-1-float32", "-2-bfloat16", "-33-float16", "-8192-float32", "-151643-bfloat16"),
    "test_a_ratio_on_the_edge_is_not_clipped_and_beyond_it_is": 1,
    "test_the_dual_clip_leaves_good_tokens_alone": 1,
    "test_extreme_ratios_stay_finite": 5,
    "test_extreme_advantages": 1,
    "test_half_precision_at_its_limits_and_a_small_temperature": 1,
    "test_the_gradient_of_the_true_class_survives_in_confident_rows": 1,
    "test_the_entropy_of_a_uniform_row_has_no_gradient_wherever_its_logits_lie": 1,
    "test_poison_in_masked_rows_changes_nothing": 1,
    "test_nan_in_one_row_stays_there": 1,
    "test_a_row_of_minus_infinity_is_nan_and_harmless_if_masked": 1,
    "test_strided_logits": 1,
    "test_inplace_gives_the_same_bits_in_the_memory_of_the_logits": ("all-float32", "default-bfloat16"),
    "test_upstream_gradients_scale": 1,
    "test_without_grad_mode_there_is_no_gradient_and_the_same_loss": 1,
    "test_no_tokens": 1,
    "test_a_credit_has_the_bits_of_its_advantages": ("capo-default", "grpo-all", "capo-gspo"),
    "test_a_credit_that_does_not_fit_is_named": 1,
    "test_rows_of_live_tokens_give_the_bits_of_all_rows": ("all-float32", "default-bfloat16"),
    "test_rows_of_dead_tokens_may_be_among_them": 1,
    "test_a_token_without_a_row_counts_as_one_without_gradient": ("dr_grpo", "dapo"),
    "test_rows_inplace_strided_and_of_32_bits": 1,
    "test_rows_of_no_tokens": 1,
    "test_rows_that_do_not_fit_are_named": 1,
    "test_bad_arguments_are_named": 1,
    "test_a_label_outside_the_vocabulary_is_named": 1,
    "test_values_that_the_rule_does_not_use_are_not_read": 1,
    "test_a_label_of_probability_zero_leaves_its_neighbours_their_gradient": 1,
    "test_as_accurate_as_eager": ("1.0-float32", "4096-0.6-bfloat16", "32003-2.5-float16"),
    "test_masked_rows_are_not_read": 1,
    "test_strided_and_padded_vocabularies": 1,
    "test_nothing": 1,
    "test_the_golden_vector_of_the_paper": 1,
    "test_step_weights": 2,
    "test_presets_by_hand": 1,
    "test_every_rule_equals_the_reference": (
        "majority-capo",
        "average-grpo_process",
        "union-vppo",
        "intersection-papo",
    ),
    "test_every_reward_with_every_normalisation": 4,
    "test_without_process_weight_steps_and_votes_have_no_influence_bit_for_bit": 5,
    "test_constant_groups_have_advantage_zero": 2,
    "test_a_group_whose_rewards_differ_in_the_last_bit_is_not_constant": 1,
    "test_one_flagged_token_among_many_is_amplified_as_the_formula_says": 1,
    "test_statistics_do_not_cancel": 1,
    "test_groups_are_ids_in_any_order_and_do_not_mix": 1,
    "test_an_undecided_outcome_leaves_its_group": 1,
    "test_tokens_outside_all_steps_have_weight_zero": 1,
    "test_empty_everything": 1,
    "test_bad_values_are_named": 1,
}
# The same of the tests of the loss from hidden states.
INTERPRETED_LINEAR = {
    "test_every_option": (
        "cpu-triton-default-float32",
        "triton-gspo-bfloat16",
        "triton-all-float16",
        "triton-dual-bfloat16",
    ),
    "test_every_regime": ("-inf-all-float32", "spike-all-float32", "huge-default-bfloat16"),
    "test_every_shape": ("-1-1-float32", "-2-7-bfloat16", "-33-31-float32"),
    "test_what_is_clipped_and_dead_changes_no_denominator": ("default", "gspo_token"),
    "test_all_of_the_gradient_of_weight_is_written": 4,
    "test_poison_in_masked_rows_changes_nothing": 1,
    "test_nan_in_one_row_shows_and_stays_in_its_gradient": 1,
    "test_softcap": ("default-float32",),
    "test_a_temperature_for_each_row": ("default-bfloat16",),
    "test_a_padded_vocabulary": ("all",),
    "test_strides_change_nothing": 1,
    "test_no_tokens_and_no_live_ones": ("default", "gspo"),
    "test_bad_arguments_are_named": 1,
    "test_as_accurate_as_eager": (
        "-1-None-1.0-torch.float32",
        "4096-None-per row-torch.bfloat16",
        "33-3.0-0.6-torch.float32",
    ),
    "test_masked_rows_are_not_read": 1,
    "test_on_policy_the_ratio_is_exactly_one": 1,
    "test_padded_vocabularies": 1,
    "test_nothing": 1,
}


def pytest_collection_modifyitems(config, items):
    counts, kept, left_out = {}, [], []
    for item in items:
        if "cpu-emulated" in item.nodeid and ("compile" in item.nodeid or "opcheck" in item.nodeid):
            left_out.append(item)  # about the ops, which are the same for all backends
            continue
        if "cpu-triton" not in item.nodeid:
            kept.append(item)
            continue
        table = INTERPRETED_LINEAR if "test_linear" in item.nodeid else INTERPRETED
        cases = table.get(item.originalname, ())
        key = item.path.name, item.originalname
        counts[key] = number = counts.get(key, -1) + 1
        wanted = number % cases == 0 if isinstance(cases, int) else any(case in item.nodeid for case in cases)
        (kept if wanted else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(
    params=[
        pytest.param(pair, id="-".join(pair), marks=[pytest.mark.gpu] if pair[0] == "cuda" else []) for pair in PAIRS
    ]
)
def device(request, monkeypatch):
    """Run the test on every device with every backend that runs there; values are checked on each."""
    name, backend = request.param
    if backend == "emulated":
        monkeypatch.setattr("capo.cuda._module", emulated.module())
        monkeypatch.setitem(backends.BACKENDS, "emulated", "capo.cuda")
    monkeypatch.setenv("CAPO_CHECK", "1")
    with backends.use_backend(backend):
        yield torch.device(name)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, and the largest integer: an element that was left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for every test, whatever ran before."""
    torch.manual_seed(0)
