"""The configuration of a tiny EnCodec model."""

TINY_CODEC = {
    "target_bandwidths": [0.32],  # 4 codebooks of 4 bits at 20 Hz
    "sampling_rate": 800,
    "hidden_size": 8,
    "num_filters": 4,
    "num_residual_layers": 1,
    "upsampling_ratios": [4, 5, 2],
    "use_causal_conv": False,
    "codebook_size": 16,
    "use_conv_shortcut": False,
    "num_lstm_layers": 1,
}
