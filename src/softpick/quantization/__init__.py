"""What quantization costs a model: weights by other libraries, activations and the key-value cache simulated.

:mod:`.methods` quantizes, :mod:`.verify` checks that it did, :mod:`.simulate` rounds activations, keys and values.
"""
