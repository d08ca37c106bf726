"""Converts between our checkpoints and Hugging Face directories, in both directions.

``export.py`` turns a checkpoint into a directory that transformers loads; ``bring_in.py`` turns such a
directory, or a GPT-NeoX such as Pythia, into a checkpoint. An export carries copies of ``modeling_mesh.py``
and the files that it imports, which need only torch and transformers (see ``ship.py``). Start reading there.
"""
