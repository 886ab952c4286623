"""Training: data (:mod:`.data`), the tasks' sequences, and the glue to the transformers Trainer (:mod:`.engine`).

Importing this package imports neither transformers nor tokenizers; its modules need ``pip install 'softpick[compare]'``.
"""
