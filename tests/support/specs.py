"""Codec specifications for tests without a checkpoint."""

from musicgen_eval.records import CodecSpec


def codec_spec(num_codebooks: int = 4, codebook_size: int = 2048, max_frames: int = 1500) -> CodecSpec:
    """Returns the specification of a mono codec with 50 frames per second at 32 kHz, and with the delays 0, 1, 2 ..."""
    delays = tuple(range(num_codebooks))
    return CodecSpec(32000, 50, 640, num_codebooks, codebook_size, 1, delays, max_frames)
