"""Faults of one line each that must not go unnoticed, and for each the test that notices it.

The table measures how strong the suite is: a fault that no test catches shows where one is missing. When you
move or rewrite a line that is named here, adapt its entry. When you fix a bug that the suite has let through,
plant it here too, in place of a weaker entry.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault in one line of the package."""

    name: str
    """What is wrong, in a few words joined by hyphens."""
    file: str
    """The damaged file, relative to ``megatron_mesh``."""
    before: str
    """A piece of ``file`` that occurs in it exactly once."""
    after: str
    """Replaces ``before``."""
    test: str
    """The test that fails, as pytest takes it."""
    quick: bool = False
    """Whether ``make test`` plants it too: a few from different folders whose tests take little time."""


FAULTS = (
    # recurrence: the maths of the memory
    Fault(
        "routers-look-at-the-output",
        "recurrence/mesh.py",
        'return state.kept["h_t"]',
        "return o",
        "tests/unit/model/test_parity.py::test_options_of_mesh",
    ),
    Fault(
        "writes-in-the-wrong-order",
        "recurrence/memory.py",
        "(*state.writes, w)",
        "(w, *state.writes)",
        "tests/unit/recurrence/test_memory.py::test_factored_equals_slots",
    ),
    Fault(
        "read-weights-without-softmax",
        "recurrence/mesh.py",
        "r = torch.softmax(at_least_fp32(self.read[t](query)), dim=-1)",
        "r = at_least_fp32(self.read[t](query))",
        "tests/unit/recurrence/test_memory.py::test_observer_sees_every_cycle",
        quick=True,
    ),
    Fault(
        "anchor-at-the-embedding",
        "recurrence/schemes.py",
        'terms = ("h_0",)',
        'terms = ("h_emb",)',
        "tests/unit/recurrence/test_schemes.py::test_additive_schemes",
    ),
    # config: what a run may be
    Fault(
        "placement-off-by-one",
        "config/placement.py",
        "first = sum(parts[:rank])",
        "first = sum(parts[: rank + 1])",
        "tests/unit/config/test_parallel.py::test_every_layer_is_on_one_rank",
    ),
    Fault(
        "watchdog-no-faster-than-the-collectives",
        "config/resolve/parallel.py",
        "if parallel.watchdog_timeout_minutes >= parallel.distributed_timeout_minutes:",
        "if parallel.watchdog_timeout_minutes > parallel.distributed_timeout_minutes:",
        "tests/unit/config/test_parallel.py::test_errors_name_what_works",
    ),
    Fault(
        "precision-changes-on-resume",
        "config/resuming.py",
        '"bf16": Rule(Kind.OPTIMIZER)',
        '"bf16": Rule(Kind.FREE)',
        "tests/unit/train/test_resuming.py::test_incompatible_settings_are_refused",
    ),
    Fault(
        "activations-without-one-state",
        "config/sizes.py",
        "sharded_over_tp = 6 * model.hidden_size",
        "sharded_over_tp = 5 * model.hidden_size",
        "tests/unit/planner/test_rank_memory.py::test_activations_of_one_rank",
    ),
    # data: which tokens are trained on, and in which order
    Fault(
        "labels-not-shifted",
        "data/loader.py",
        'Batch(sample["tokens"], sample["labels"],',
        'Batch(sample["tokens"], sample["tokens"],',
        "tests/unit/data/test_loader.py::test_a_batch_holds_the_fields_of_its_samples",
    ),
    Fault(
        "later-epochs-ignore-the-seed",
        "data/stream.py",
        "default_rng([seed, epoch])",
        "default_rng([epoch])",
        "tests/unit/data/test_datasets.py::test_the_seed_orders_every_epoch",
    ),
    Fault(
        "samples-of-the-next-rank",
        "data/loader.py",
        "range(self._rank * share, (self._rank + 1) * share, self._micro)",
        "range((self._rank + 1) * share, (self._rank + 2) * share, self._micro)",
        "tests/unit/data/test_loader.py::test_a_global_batch_depends_only_on_its_number",
    ),
    Fault(
        "damaged-cache-entries-pass",
        "data/cache.py",
        "return arrays if intact else None",
        "return arrays",
        "tests/unit/data/test_cache.py::test_a_damaged_or_foreign_entry_is_rebuilt",
    ),
    # model
    Fault(
        "embedding-not-scaled",
        "model/gpt.py",
        "return super().embed(input_ids, position_ids) * self.config.embedding_scale",
        "return super().embed(input_ids, position_ids)",
        "tests/unit/model/test_parity.py::test_bf16_is_near",
    ),
    Fault(
        "all-parameters-draw-the-same",
        "model/build.py",
        '_draw(parameter, f"{seed}/{name}", this_std',
        '_draw(parameter, f"{seed}", this_std',
        "tests/unit/model/test_init.py::test_no_two_parameters_have_the_same_values",
    ),
    # kernels
    Fault(
        "gradient-of-the-neighbouring-weight",
        "kernels/triton_mixing.py",
        "tl.where(slot == j, dot",
        "tl.where(slot == j + 1, dot",
        "tests/unit/kernels/test_mixing_kernels.py::test_odd_layouts",
    ),
    # parallel: gradients over ranks and passes
    Fault(
        "routers-not-summed-over-tensor-parallel-ranks",
        "parallel/gradients.py",
        "        dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())\n",
        "",
        "tests/parallel/test_layouts.py::test_trains_as_one_process[mesh-2-False-none-tp2]",
    ),
    Fault(
        "gradient-of-later-passes-dropped",
        "parallel/ring.py",
        "return grad if accumulated is None else grad + accumulated, None",
        "return grad, None",
        "tests/parallel/test_layouts.py::test_trains_as_one_process[mesh-2-False-none-pp2]",
    ),
    Fault(
        "shared-core-reduced-too-early",
        "parallel/gradients.py",
        "[cores[0].start_grad_sync, *[_do_nothing] * (passes - 3)]",
        "[*[_do_nothing] * (passes - 3), cores[0].start_grad_sync]",
        "tests/parallel/test_layouts.py::test_trains_as_one_process[mesh-2-False-none-pp2-dp2-overlap]",
    ),
    Fault(  # each loop of a shared core would cast its weights to FP8 again
        "every-pass-marked-as-first",
        "parallel/ring.py",
        'if first and hasattr(module, "is_first_microbatch")',
        'if hasattr(module, "is_first_microbatch")',
        "tests/unit/model/test_te_layers.py::test_a_ring_chunk_marks_only_sections_that_no_earlier_chunk_runs",
    ),
    # train: the step and what ranks agree on
    Fault(
        "one-rank-alone-cannot-stop-the-run",
        "train/vote.py",
        "zip(REASONS, stops, strict=True) if votes]",
        "zip(REASONS, stops, strict=True) if votes == dist.get_world_size()]",
        "tests/parallel/test_step.py::test_all_ranks_agree_on_norm_loss_and_votes[fp32-dp2]",
    ),
    Fault(  # the schedule sets the decay in every step, which hides this from whole runs
        "no-weight-decay",
        "train/optimizer.py",
        "        weight_decay=config.weight_decay",
        "        weight_decay=0.0",
        "tests/unit/train/test_schedule.py::test_the_optimizer_itself_decays_weights",
    ),
    Fault(
        "a-skipped-step-updates",
        "train/step.py",
        "        if outcome.taken:\n",
        "        if True:\n",
        "tests/unit/train/test_guard.py::test_a_bad_step_does_not_change_the_weights",
    ),
    Fault(
        "masked-tokens-in-the-loss",
        "train/step.py",
        "(losses.float() * loss_mask).sum()",
        "losses.float().sum()",
        "tests/unit/train/test_step.py::test_loss_and_gradients_per_token",
    ),
    # metrics: what is logged and drawn
    Fault(
        "peak-memory-of-the-emptiest-rank",
        "metrics/meters.py",
        "op=dist.ReduceOp.MAX",
        "op=dist.ReduceOp.MIN",
        "tests/parallel/test_step.py::test_the_peak_memory_is_that_of_the_fullest_rank",
    ),
    Fault(
        "pauses-count-as-steps",
        "metrics/meters.py",
        "self._start += time.perf_counter() - stopped",
        "self._start += 0.0",
        "tests/unit/metrics/test_meters.py::test_a_pause_does_not_count_as_a_step",
    ),
    Fault(  # a resumed run repeats steps, and the last row of a step counts
        "first-row-of-a-repeated-step",
        "metrics/figures.py",
        'rows.setdefault(row["kind"], {})[row["step"]] = row',
        'rows.setdefault(row["kind"], {}).setdefault(row["step"], row)',
        "tests/unit/metrics/test_figures.py::test_a_repeated_step_counts_once_and_in_order",
    ),
    # checkpoint
    Fault(
        "every-checksum-matches",
        "checkpoint/reader.py",
        "if piece.sha256 is not None and sha256(content) != piece.sha256:",
        "if False:",
        "tests/unit/checkpoint/test_damage.py::test_the_previous_checkpoint_is_used",
    ),
    Fault(
        "published-before-it-is-on-disk",
        "checkpoint/directory.py",
        "            _sync(path)\n",
        "            pass\n",
        "tests/unit/checkpoint/test_saver.py::test_contents_reach_the_disk_before_names",
    ),
    Fault(
        "resumes-from-the-oldest",
        "checkpoint/directory.py",
        "found = list(reversed(saved_steps(load).values()))",
        "found = list(saved_steps(load).values())",
        "tests/unit/checkpoint/test_damage.py::test_every_piece_is_read_once_and_no_other_checkpoint",
    ),
    Fault(  # the float32 main parameters would lose what bfloat16 cannot hold
        "rounded-weights-as-main-parameters",
        "checkpoint/shares.py",
        "state_key(MAIN, self.place.key), self._part(self.main))",
        "state_key(MAIN, self.place.key), self._weight().float())",
        "tests/unit/train/test_checkpoint.py::test_resuming_is_bitwise[bf16]",
    ),
    # runtime
    Fault(
        "the-watchdog-never-fires",
        "runtime/health.py",
        "return waiting if waiting > limit else 0.0",
        "return 0.0",
        "tests/unit/runtime/test_health.py::test_a_rank_is_overdue_after_its_limit",
        quick=True,
    ),
    Fault(
        "another-owners-file-removed",
        "runtime/ownership.py",
        "if owner is not None and owner.token == self.token:",
        "if owner is not None:",
        "tests/unit/runtime/test_ownership.py::test_releasing_leaves_the_file_of_another_owner",
    ),
    Fault(
        "a-signal-is-forgotten",
        "runtime/stopping.py",
        "self._signalled = self._signalled or signal.Signals(number).name",
        'self._signalled = ""',
        "tests/unit/checkpoint/test_saver.py::test_requests_to_stop",
    ),
    # planner
    Fault(  # an all-reduce is a reduce-scatter and an all-gather
        "all-reduce-counted-once",
        "planner/costs.py",
        "return 2 * share * sizes.GRADIENT_BYTES, 0.0",
        "return share * sizes.GRADIENT_BYTES, 0.0",
        "tests/unit/planner/test_traffic.py::test_data_parallel_bytes",
    ),
    # hf: exports
    Fault(
        "positions-forget-the-cache",
        "hf/modeling/modeling_mesh.py",
        "device=inputs_embeds.device) + seen",
        "device=inputs_embeds.device)",
        "tests/unit/hf/test_caches.py::test_positions_follow_the_cache",
    ),
    Fault(  # engines could sample such a row
        "new-rows-copy-the-first",
        "hf/convert/tensors.py",
        "weight.mean(0, keepdim=True, dtype=torch.float32)",
        "weight[:1]",
        "tests/unit/hf/test_vocabulary.py::test_after_training_with_transformers",
    ),
    # evaluation
    Fault(
        "plain-accuracy-in-the-average",
        "evaluation/results.py",
        "math.fsum(r.metrics[TASKS[r.name].metric] for r in done)",
        'math.fsum(r.metrics["acc"] for r in done)',
        "tests/unit/evaluation/test_report.py::test_averages_use_the_papers_metric",
        quick=True,
    ),
    # slurm
    Fault(
        "minutes-taken-for-hours",
        "slurm/site.py",
        "or len(given) == 3 else [60, 1]",
        "or len(given) == 3 else [3600, 60]",
        "tests/unit/slurm/test_submit.py::test_times_are_read_as_slurm_reads_them",
    ),
    # faults: the tool that kills ranks and checks how runs resume
    Fault(
        "a-skipped-checkpoint-goes-unnoticed",
        "faults/runs.py",
        "if newer > step and newer not in damaged]",
        "if newer > step and newer in damaged]",
        "tests/unit/faults/test_aims.py::test_a_start_resumes_from_the_newest_checkpoint",
        quick=True,
    ),
    # compat: other packages' internals
    Fault(
        "a-copy-keeps-the-replaced-submodule",
        "compat/torch_internals.py",
        "{**module._modules, **submodules}",
        "{**submodules, **module._modules}",
        "tests/unit/compat/test_internals.py::test_a_shallow_copy_shares_what_it_does_not_replace",
    ),
)
