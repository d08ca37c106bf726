"""Checkpoints: the state of a run goes in, and a run on any rank layout gets it back.

Start reading in ``save.py`` and ``load.py``. ``directory.py`` finds and publishes checkpoints, ``content.py``
lists the tensors of a rank, ``index.py`` and ``integrity.py`` define the format, and ``offline.py`` serves
the tools.
"""
