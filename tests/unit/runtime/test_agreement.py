"""Reasons from many ranks are summarized in a few lines."""

from megatron_mesh.runtime.distributed import summarize_reasons


def test_each_reason_is_listed_once_with_its_first_rank() -> None:
    full = [("No space left on device", f"node{rank // 8}") for rank in range(512)]
    assert summarize_reasons(full) == ["No space left on device (rank 0 on node0 and 511 more)"]
    assert summarize_reasons([None, ("a", "x"), None, ("b", "y")]) == ["a (rank 1 on x)", "b (rank 3 on y)"]
    assert summarize_reasons([None, None]) == []


def test_only_a_few_reasons_are_listed_and_the_others_counted() -> None:
    found = summarize_reasons([(f"reason {rank}", "x") for rank in range(512)])
    assert len(found) == 6 and found[0] == "reason 0 (rank 0 on x)" and found[-1] == "and 507 more reasons"
