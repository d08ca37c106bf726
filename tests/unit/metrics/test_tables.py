"""Tables in Markdown."""

from megatron_mesh.metrics.tables import TextTable


def test_markdown_is_a_table() -> None:
    lines = TextTable("T", ["a", "b"], [["x", "1"]], notes=["n"]).markdown().splitlines()
    assert lines == ["## T", "", "| a | b |", "| --- | ---: |", "| x | 1 |", "", "n  "]
