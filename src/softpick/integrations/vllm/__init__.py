"""A plug-in of vLLM: models that run a normalizer of ours are recognised, and run with our attention.

vLLM calls :func:`register` in every one of its processes (entry point ``vllm.general_plugins``). The architectures that
:mod:`softpick.integrations.checkpoints` writes get vLLM's own model code, in which the attention layers are ours
(:mod:`.attention`); all others are left alone. Written for and tested with vLLM 0.32.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Teach vLLM our architectures and, for GPUs, our attention backend. Repeatable."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import softpick.integrations.transformers  # noqa: F401  (model types of saved configurations)
    from softpick.integrations.checkpoints import MARK

    home = __name__ + ".models"
    for name in list(ModelRegistry.get_supported_archs()):
        if not name.endswith(MARK):
            ModelRegistry.register_model(name + MARK, f"{home}:{name}{MARK}")
            if name in MODELS_CONFIG_MAP:  # what vLLM changes in the settings of an architecture
                MODELS_CONFIG_MAP[name + MARK] = MODELS_CONFIG_MAP[name]
    ModelRegistry.register_model("SoftpickLlamaForCausalLM", f"{home}:SoftpickLlamaForCausalLM")
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.attention.CUDABackend")
