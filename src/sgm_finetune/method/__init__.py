"""The mathematics of docs/method.md as pure functions: its sections, and the file and the functions of each.

    1.1 The noise edge
        snr: noise_edge
    1.2 The noise level, from the middle of the bulk
        snr: bulk_share_above, bulk_median, bulk_energy, bulk_sigma
        noise_density: bulk_density
    1.3 How far above the edge noise still reaches
        snr: noise_margin
    1.4 Deflation
        snr: confirm_rank, deflate, distance_from_noise, absorption_factor, estimate_noise
    1.5 The ratio
        snr: signal_to_noise
        decibels: ratio_decibels
    1.6 Selecting
        selection: select_matrices, ranking, choose_per_kind, top_fraction_per_kind, above_threshold, ties
    1.8 The published formula
        snr: published_formula
    1.9 The decomposition, and the precision that it needs
        singular_values: singular_values, batched_singular_values, exact_bfloat16_products
    2.1 Sketches
        subspace: test_matrix, sketch_batch, sketch_stack, squared_norm, energy_kept, with_unit_norm
        sides: width
    2.2 A basis for several matrices
        subspace: equalise_channels, leading_parts, leading_part, leading_basis, leading_rows
        subspace: shared_basis, spectral_basis
    2.3 Cosines of whole gradients
        subspace: reconstruct, reconstruct_all, cosines, cosines_of
    3. What is merged
        build_plan: build_plan, merge_layers, merge_readers, kind_numbers, plan_kind, plan_matrix, gradient_energy
        plan_rules: inconsistency
    3.1 Similarity
        subspace: pairwise_retention, retention_of_pairs
        agreement: side_agreement, kind_agreement, probed_halves, pair_values, mean_of_pairs
    3.2 Who may share
        build_plan: sort_by_kind, sort_by_activation, join_kinds, choose_side, choose_sharing
        sides: sides_of
    3.3 Groups
        grouping: group_layers
        build_plan: find_groups
    4. Merged updates
        parameter_count: adapter_parameters, most_per_direction
        pools: owners, first_codes
        low_rank: cut_update, extract_update
    6. The step for a factor
        descent: polar_factor, inverse_root, inverse_roots, channel_profile, partner_metric, partner_floor
        descent: descent_directions, pool_metric, largest_change, code_steps
    6.1 The learning rate by trials
        rate_search: best_rate, next_rate, lowest_point, rate_for
    9.1 Clipping by a running norm
        running_norm: running_norm, clip_factor
    9.2 Stochastic rounding
        rounding: stochastic_round, rounding_seed
    10. Losses of preferences
        preference: dpo, ipo, orpo, simpo, kto, divergence, apo_zero, apo_down, bradley_terry

`plan` holds the data that sections 1 to 3 produce. Sections 5 and 8 change models: see `model` and `train/fast`.
"""
