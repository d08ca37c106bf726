"""Checkpoints: saves a run's state so that any rank layout can load it, and finds an intact one to resume
from.

Start reading in ``save.py`` and ``load.py``. ``directory.py`` knows the names, ``content.py`` what each rank
writes and reads, ``index.py`` and ``integrity.py`` the format, and ``offline.py`` serves the tools.
"""
