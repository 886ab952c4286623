"""Give a pretrained softmax model another normalizer: ``softpick convert``."""
