"""Fault injection: kill, stop and hang the ranks of a small run, fill its disk, check that nothing is lost.

This is the library of ``tools/fault_test.py``. ``aims`` lists what can be hit, ``job`` starts and watches the
ranks, ``rank`` runs inside each of them, and ``kills`` and ``mishaps`` do the damage.
"""
