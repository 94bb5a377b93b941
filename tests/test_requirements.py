"""The 45 requirements of the project, the tests that hold each, and its state.

A requirement "holds", holds "in part" with what is missing, or is "open" with the area to be built.
Tests that need a CUDA device or are marked `slow` count, although a run of the suite may skip them.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

NO_CUDA = "in part: the same bits on CUDA are tested only where there is a CUDA device"
# number: (requirement, tests, state)
REQUIREMENTS = {
    1: (
        "per-sample gradients are those of single samples, for eight kinds of layers and both dtypes",
        (
            "test_reductions.py::test_per_sample_gradients_are_exact_to_a_share_of_their_norm",
            "test_reductions.py::test_every_reduction_is_that_of_materialised_gradients",
        ),
        "holds",
    ),
    2: (
        "their weighted mean is the batch gradient, and chunks change nothing",
        (
            "test_gradients.py::test_per_sample_gradients_are_those_of_the_samples_and_their_mean_the_batchs",
            "test_gradients.py::test_the_weighted_mean_of_per_sample_gradients_is_the_gradient_of_the_weighted_loss",
            "test_gradients.py::test_any_chunk_size_gives_the_same",
        ),
        "holds",
    ),
    3: (
        "no call writes into its inputs, shares storage, or changes an earlier result",
        (
            "test_gradients.py::test_inputs_are_left_alone_and_outputs_are_the_callers_own",
            "test_reductions.py::test_inputs_are_left_alone_and_outputs_are_the_callers_own",
            "test_conformance.py::test_it_is_pure",
            "test_conformance.py::test_a_step_is_pure_and_shares_nothing",
            "test_scan_compiled.py::test_outputs_are_the_callers_own_and_inputs_are_left_alone",
            "test_train_backends.py::test_inputs_are_left_alone_and_outputs_are_the_callers_own",
            "test_cudagraph.py::test_results_are_new_and_stay_as_they_are",
            "test_hypergradient.py::test_arguments_are_neither_written_into_nor_shared",
            "test_curvature.py::test_inputs_are_left_alone_and_outputs_are_the_callers_own",
            "test_sweep.py::test_nothing_is_written_to_and_nothing_shared",
            "test_schedules.py::test_nothing_is_written_and_nothing_shared",
            "test_stats.py::test_nothing_is_written_and_nothing_shared",
            "test_problems.py::test_nothing_is_shared_or_disturbed",
            "test_modules.py::test_initial_values_are_nobody_elses",
            "test_random.py::test_a_draw_leaves_its_key_alone",
            "test_sampling.py::test_take_indexes_every_leaf",
            "test_jit.py::test_results_share_no_storage_with_arguments",
            "test_plot.py::test_the_inputs_are_left_alone",
            "test_inputs.py::test_writes_of_a_function_do_not_reach_its_inputs",
        ),
        "holds",
    ),
    4: (
        "descent on a quadratic is its closed form, also where it diverges",
        ("test_kit_descent.py::test_descent_on_a_quadratic_is_the_closed_form",),
        "holds",
    ),
    5: (
        "descent, Nesterov and SGD meet their bounds, and the stationary variance is exact",
        (
            "test_kit_descent.py::test_descent_contracts",
            "test_kit_descent.py::test_a_method_is_what_it_claims",
            "test_convergence.py::test_minibatch_sgd_meets_its_bound",
            "test_convergence.py::test_the_stationary_variance_of_sgd_is_exact",
        ),
        "holds",
    ),
    6: (
        "parameters and state are those of torch.optim after each step",
        ("test_parity_optim.py::test_a_transformation_is_its_torch_optimizer_step_by_step",),
        "holds",
    ),
    7: (
        "a loss times 2^k at lr / 2^k gives the same bits",
        ("test_step.py::test_a_scaled_loss_with_lr_scaled_back_is_the_same_path_bit_for_bit",),
        "holds",
    ),
    8: (
        "a step keeps structure, shape, dtype, device and stride; counters are int64",
        (
            "test_step.py::test_a_step_keeps_structure_shape_dtype_and_strides",
            "test_conformance.py::test_it_keeps_structure_shape_dtype_device_and_stride",
            "test_conformance.py::test_a_step_keeps_structure_shape_dtype_and_device",
        ),
        "holds",
    ),
    9: (
        "an eager scan is the Python loop bit for bit",
        (
            "test_scan.py::test_scan_is_the_nine_line_loop",
            "test_train.py::test_train_is_the_python_loop_of_its_step_bit_for_bit",
        ),
        "holds",
    ),
    10: (
        "sequences of different length are refused, and no steps give the start",
        (
            "test_scan.py::test_bad_calls_raise",
            "test_train_backends.py::test_no_steps_give_the_start_and_an_empty_record",
            "test_scan_compiled.py::test_any_number_of_steps",
        ),
        "holds",
    ),
    11: (
        "200 compiled steps of four models end where eager ones do",
        (
            "test_train_backends.py::test_200_compiled_steps_are_those_of_eager_to_a_share_of_the_movement",
            "test_native.py::test_a_network_is_trained_as_in_eager",
        ),
        "holds",
    ),
    12: (
        "another lr, seed, data or length compiles nothing",
        (
            "test_train_backends.py::test_another_lr_seed_data_step_or_length_compiles_nothing",
            "test_native.py::test_lengths_and_numbers_in_tensors_compile_nothing",
            "test_scan_compiled.py::test_a_gradient_of_other_data_and_length_compiles_nothing",
        ),
        "holds",
    ),
    13: (
        "fifty losses and fifty trees are compiled in one process",
        ("test_scan_compiled.py::test_many_losses_and_trees_hit_no_recompile_limit",),
        "holds",
    ),
    14: (
        "gradients through runs, single and chained, are those of the loop",
        (
            "test_scan.py::test_every_backend_is_the_loop_under_every_transformation",
            "test_hypergradient.py::test_every_exact_adjoint_is_the_derivative",
        ),
        "holds",
    ),
    15: (
        "a vmapped sweep is separate runs, whatever its size",
        (
            "test_scan.py::test_every_backend_is_the_loop_under_every_transformation",
            "test_train.py::test_a_vmapped_sweep_is_separate_runs",
            "test_sweep.py::test_row_i_is_the_single_run_i",
        ),
        "holds",
    ),
    16: (
        "a compilation that fails raises, and auto warns once with the reason",
        (
            "test_scan_compiled.py::test_auto_replays_with_one_warning_where_compiling_fails",
            "test_auto.py::test_a_loss_of_ten_seconds_is_said_once_at_the_users_line_with_its_remedy",
            "test_scan_compiled.py::test_no_compiler_is_one_clear_sentence",
            "test_native.py::test_no_compiler_is_one_clear_sentence",
        ),
        "holds",
    ),
    17: (
        "Ctrl-C stops a compiled run within a second and a segment, and keeps the state",
        (
            "test_native.py::test_ctrl_c_stops_the_loop",
            "test_native.py::test_segments_of_the_loop_take_50_ms_from_the_first_of_the_next_call",
            "test_train_backends.py::test_ctrl_c_keeps_all_steps_done_and_the_rest_goes_on_to_the_same_bits",
            "test_train_backends.py::test_ctrl_c_within_a_segment_gives_the_state_before_it",
        ),
        "holds",
    ),
    18: (
        "the compile cache is a directory of the user alone, or refused",
        (
            "test_cache.py::test_directory_open_to_others_is_refused_before_anything_is_compiled",
            "test_cache.py::test_directory_of_another_user_is_refused",
            "test_cache.py::test_directory_and_missing_parents_are_made_for_the_user_alone",
        ),
        "holds",
    ),
    19: (
        "sizes of a batch and shapes of predictions that differ are refused",
        (
            "test_gradients.py::test_bad_batches_raise_before_anything_is_computed",
            "test_losses.py::test_no_loss_broadcasts",
        ),
        "holds",
    ),
    20: (
        "parameters that are no separate floating-point tensors are refused by path",
        ("test_gradients.py::test_bad_parameters_raise_before_anything_is_computed",),
        "holds",
    ),
    21: (
        "a loss that is no real scalar, or depends on no parameter, is refused",
        ("test_gradients.py::test_bad_losses_raise",),
        "holds",
    ),
    22: (
        "bad hyperparameters are named with their range",
        (
            "test_errors.py::test_bad_hyperparameters_are_named_with_their_range",
            "test_errors.py::test_scalars_are_checked_against_their_interval",
            "test_conformance.py::test_hyperparameters_out_of_range_raise",
            "test_conformance.py::test_a_hyperparameter_out_of_range_is_named",
        ),
        "holds",
    ),
    23: (
        "bad batch sizes and empty data are refused; carry draws every sample once an epoch",
        (
            "test_sampling.py::test_plans_and_indices_out_of_range_are_refused",
            "test_sampling.py::test_carry_draws_every_sample_once_an_epoch",
            "test_train.py::test_bad_calls_raise",
        ),
        "holds",
    ),
    24: (
        "devices or dtypes of parameters and data that differ are refused",
        (
            "test_gradients.py::test_bad_parameters_raise_before_anything_is_computed",
            "test_gradients.py::test_bad_batches_raise_before_anything_is_computed",
            "test_train.py::test_bad_calls_raise",
        ),
        "holds",
    ),
    25: (
        "1000 steps from parameters that require gradients keep no graph",
        ("test_train_backends.py::test_a_run_keeps_neither_a_graph_nor_tensors_beyond_its_record",),
        "holds",
    ),
    26: (
        "NaN at a step is reported with the state before, or skipped and counted",
        (
            "test_train.py::test_check_finite_reports_the_step_and_keeps_the_last_good_state",
            "test_train.py::test_skipped_steps_keep_all_bits_and_are_counted_in_a_run",
            "test_family.py::test_a_skipped_step_keeps_all_bits_and_is_counted",
        ),
        "holds",
    ),
    27: (
        "per-sample gradients over the memory limit are refused with a chunk size that fits",
        (
            "test_reductions.py::test_per_sample_gradients_over_the_limit_raise_before_anything_is_allocated",
            "test_reductions.py::test_a_chunk_over_the_limit_raises_and_names_one_that_fits",
        ),
        "holds",
    ),
    28: (
        "wrong names, batch norm in training and recurrent modules are refused",
        (
            "test_modules.py::test_wrong_names_raise",
            "test_modules.py::test_layers_that_mix_samples_or_cannot_be_mapped_are_refused_per_sample",
        ),
        "holds",
    ),
    29: (
        "random bits are Random123's, vmapped, compiled and on CUDA",
        (
            "test_random.py::test_threefry_gives_the_published_answers",
            "test_random.py::test_draws_are_jax_draws",
            "test_random.py::test_vmap_over_keys_gives_the_single_draws",
            "test_random.py::test_compiled_draws_have_the_same_bits",
            "test_random.py::test_draws_on_cuda_have_the_same_bits",
            "test_layers.py::test_nothing_forbidden_is_used",
        ),
        NO_CUDA,
    ),
    30: (
        "the order of samples depends on seed, epoch, n and batch size alone",
        (
            "test_sampling.py::test_an_epoch_visits_every_sample_at_most_once",
            "test_sampling.py::test_carry_draws_every_sample_once_an_epoch",
            "test_sampling.py::test_plans_of_consecutive_epochs_make_the_whole_plan",
            "test_random.py::test_draws_on_cuda_have_the_same_bits",
        ),
        NO_CUDA + ", and world sizes wait for many machines",
    ),
    31: (
        "streams are distinct, bad seeds raise, and global generators are left alone",
        (
            "test_random.py::test_high_bits_of_the_seed_count",
            "test_random.py::test_bad_arguments_are_refused",
            "test_random.py::test_split_keys_do_not_collide",
            "conftest.py::_global_state_is_left_alone",
            "test_modules.py::test_torchs_generators_are_neither_read_nor_written",
        ),
        "holds",
    ),
    32: (
        "a repeated run has the same bits",
        (
            "test_train_backends.py::test_segments_change_no_bit",
            "test_train_backends.py::test_a_run_in_another_process_has_the_same_bits",
            "test_scan_compiled.py::test_outputs_are_the_callers_own_and_inputs_are_left_alone",
            "test_cudagraph.py::test_a_graph_belongs_to_the_settings_it_was_made_under",
        ),
        "in part: repeats are tested on a CPU only, and there is no deterministic= for CUDA",
    ),
    33: ("ranks of torchrun together are the single process", (), "open: many machines"),
    34: ("a rank that differs or fails ends all ranks with a message", (), "open: many machines"),
    35: (
        "each sample adds no more than the clipping norm, and nothing where not finite",
        (
            "test_privacy.py::test_every_sample_is_clipped_to_its_bound",
            "test_privacy.py::test_what_is_not_finite_adds_exactly_zero",
            "test_privacy.py::test_an_empty_batch_succeeds",
            "test_privacy.py::test_one_sample_more_moves_the_sum_by_its_bound_at_most",
        ),
        "holds",
    ),
    36: (
        "the noise has its size, draws are distinct, and the divisor is a constant",
        (
            "test_privacy.py::test_the_noise_has_its_size_and_no_other",
            "test_kit_draws.py::test_right_private_steps_keep_their_law",
            "test_privacy.py::test_nobody_adds_nothing_and_changes_no_divisor",
        ),
        "holds",
    ),
    37: (
        "no epsilon is reported, and accountants get Poisson plans alone",
        (
            "test_privacy.py::test_no_epsilon_is_reported",
            "test_privacy.py::test_a_history_is_of_poisson_plans_alone",
            "test_privacy.py::test_the_published_epsilon_follows_from_the_history",
        ),
        "holds",
    ),
    38: (
        "loading runs no code, and damaged files raise one error",
        ("test_layers.py::test_nothing_forbidden_is_used",),
        "open: files (no loader yet to fuzz; the package calls no pickle, torch.load or eval)",
    ),
    39: ("every damage of a checkpoint is seen, and a killed save leaves a whole file", (), "open: files"),
    40: (
        "a run goes on from a file to the same bits",
        (
            "test_train_backends.py::test_an_interrupted_run_is_resumed_to_the_bits_of_the_whole",
            "test_train_backends.py::test_resuming_another_run_is_refused",
        ),
        "open: files (an interrupted run goes on from its pickled exception)",
    ),
    41: (
        "an impure function is refused by name, and auto runs it in eager",
        (
            "test_purity.py::test_an_impure_function_is_refused_by_name_and_leaves_everything_as_found",
            "test_purity.py::test_auto_gives_of_an_impure_function_what_eager_gives",
            "test_purity.py::test_a_tensor_kept_for_the_next_call_is_refused_if_it_is_read_there",
            "test_purity.py::test_an_iterator_that_a_trace_advanced_is_an_error_under_auto_too",
            "test_purity.py::test_a_clock_is_refused_at_the_users_line",
        ),
        "holds",
    ),
    42: (
        "float32 and bfloat16 runs agree with torch's, and what is not finite is seen",
        (
            "test_parity_optim.py::test_narrow_run_agrees_with_torchs_of_float32",
            "test_parity_optim.py::"
            "test_float32_run_of_a_method_or_a_schedule_agrees_with_torchs_to_3e_6_of_the_movement",
            "test_conformance.py::test_what_is_not_finite_in_a_gradient_is_seen_in_the_update",
        ),
        "holds",
    ),
    43: (
        "files of the cache are checked before they are loaded, and bounded",
        (
            "test_native_build.py::test_damaged_library_is_compiled_again",
            "test_native_build.py::test_library_with_another_length_or_digest_is_not_sound",
            "test_native_build.py::test_library_and_its_directory_are_on_the_disk_when_it_is_stored",
            "test_native_build.py::test_library_that_others_could_have_written_is_compiled_again",
            "test_native_build.py::test_cache_has_a_bound_and_drops_the_least_recently_used",
            "test_native_build.py::test_library_of_a_forgotten_loop_is_unloaded",
            "test_cache.py::test_changed_and_unfinished_files_are_deleted_once_per_process",
            "test_cache.py::test_full_directory_is_emptied",
        ),
        "holds",
    ),
    44: (
        "a call of train traces once, and a function without a key is told in 50 ms",
        (
            "test_purity.py::test_a_train_traces_twice_in_all_its_segments_together",
            "test_key.py::test_an_object_of_any_library_costs_at_most_50_ms",
            "test_key.py::test_the_walk_stops_at_the_first_thing_that_is_not_plain",
        ),
        "holds",
    ),
    45: (
        "no operation reads a value on the host or mixes devices",
        (
            "test_meta.py::test_transformations_run",
            "test_meta.py::test_steps_and_their_runs_run",
            "test_meta.py::test_adjoints_run",
            "test_meta.py::test_reducers_run",
            "test_meta.py::test_other_functions_run",
        ),
        "in part: grid reads its labels, sweep its flags of divergence, modules.init its keys, once each",
    ),
}


@functools.cache
def functions_of(file):
    tree = ast.parse((Path(__file__).parent / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("number", range(1, 46))
def test_requirement_has_a_state_and_tests_that_exist(number):
    _, tests, state = REQUIREMENTS[number]
    assert re.fullmatch("holds|in part: .+|open: (files|many machines).*", state)
    assert tests or state.startswith("open")
    for name in tests:
        file, function = name.split("::")
        assert function in functions_of(file), f"{name} does not exist"


def test_table_has_45_requirements():
    assert list(REQUIREMENTS) == list(range(1, 46))
