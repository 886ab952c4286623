"""What a language model can do: the paper's benchmark tasks, passkey retrieval, perplexity by position.

``tasks`` runs lm-evaluation-harness, ``passkey`` and ``perplexity`` need transformers only. The command that puts them
together is ``softpick.evaluation.evaluate``.
"""
