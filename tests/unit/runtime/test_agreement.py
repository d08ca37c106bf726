"""What ranks say is short, however many they are."""

from megatron_mesh.runtime.distributed import summarize_reasons


def test_each_reason_once_with_the_first_place() -> None:
    full = [("No space left on device", f"node{rank // 8}") for rank in range(512)]
    assert summarize_reasons(full) == ["No space left on device (rank 0 on node0 and 511 more)"]
    assert summarize_reasons([None, ("a", "x"), None, ("b", "y")]) == ["a (rank 1 on x)", "b (rank 3 on y)"]
    assert summarize_reasons([None, None]) == []


def test_many_reasons_are_counted() -> None:
    found = summarize_reasons([(f"reason {rank}", "x") for rank in range(512)])
    assert len(found) == 6 and found[0] == "reason 0 (rank 0 on x)" and found[-1] == "and 507 more reasons"
