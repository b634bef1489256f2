"""What several processes do together; `tests/test_distributed.py` starts them."""

from ranks import replicated, sharded

# By number of processes. Three show what two cannot: who owns nothing, and who is told what.
CASES = {
    2: [*replicated.CASES, *sharded.CASES],
    3: [
        replicated.every_model_equals_one_process,
        replicated.ranks_may_leave_parameters_unused,
        replicated.gradients_may_be_averaged_by_hand,
        replicated.the_fewest_bytes_move,
        sharded.sharded_models_equal_one_process,
        sharded.gradients_may_be_reduced_after_several_backward_passes,
        sharded.a_rank_is_told_about_its_own_rows,
        sharded.rows_of_a_sharded_embedding_travel_to_their_owners,
    ],
}
