"""Fields of the configurations of small models of other kinds than decoders of text, for the tests of the audit."""

# an encoder-decoder of two layers each, and a vision transformer: fields of their configurations
DIMS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
DIMS |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
VISION |= {"image_size": 32, "patch_size": 8}
