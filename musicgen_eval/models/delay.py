"""Applies the delay pattern, which determines the position of each code in the decoder's input and output.

Codebook k is shifted right by `delays[k]` steps, after one step that contains the special token (id V, here `#`) in all codebooks:

    delays 0 1 2      step   0 1 2 3 4 5 6      frame t of codebook k is fed at step     t + 1 + delay_k
    codebook 0               # 0 1 2 3 # #      and predicted by the output at step     t + delay_k
    codebook 1               # # 0 1 2 3 #
    codebook 2               # # # 0 1 2 3

T + max(delays) steps are sufficient to score all codes of T frames. The last step of the full layout is not fed to the decoder,
because its codes are all predicted by the output at the preceding step.

Source: MusicGen (arXiv 2306.05284), section 2.2; audiocraft 1.3.0, `DelayedPatternProvider`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def delay_codes(
    codes: Tensor,
    *,
    delays: Sequence[int],
    special_token: int,
    valid: Tensor | None = None,
    num_steps: int | None = None,
) -> Tensor:
    """Arranges codes in the decoder's input layout.

    Args:
        codes: (B, K, T) int64 codes.
        delays: (K,) delay of each codebook, in steps.
        special_token: Id to feed to the decoder at positions without a code.
        valid: (B, K, T) bool mask, False for padding, which is replaced with the special token. None means that all codes are
            valid.
        num_steps: Number of steps, S. None means T + max(delays).

    Returns:
        (B, K, S) int64 decoder input.

    >>> delay_codes(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), delays=(0, 1), special_token=9).tolist()
    [[[9, 1, 2, 3], [9, 9, 4, 5]]]
    """
    B, K, T = codes.shape
    S = T + max(delays) if num_steps is None else num_steps
    if valid is not None:
        codes = codes.masked_fill(~valid.to(codes.device), special_token)
    steps = codes.new_full((B, K, S), special_token)
    for k, delay in enumerate(delays):
        last = min(T, S - 1 - delay)
        if last > 0:
            steps[:, k, 1 + delay : 1 + delay + last] = codes[:, k, :last]
    return steps


def undelay_codes(steps: Tensor, *, delays: Sequence[int], num_frames: int) -> Tensor:
    """Extracts codes from the decoder's input layout. This is the inverse of `delay_codes`.

    Args:
        steps: (B, K, S) decoder input, where S >= num_frames + 1 + max(delays).
        delays: (K,) delay of each codebook, in steps.
        num_frames: Number of frames, T.

    Returns:
        (B, K, T) codes.
    """
    return realign(steps[:, :, 1:], delays=delays, num_frames=num_frames)


def realign(outputs: Tensor, *, delays: Sequence[int], num_frames: int) -> Tensor:
    """Moves each decoder output from its step to the frame that it predicts.

    Args:
        outputs: (B, K, S, ...) decoder outputs, such as (B, K, S, V) logits, where S >= num_frames + max(delays).
        delays: (K,) delay of each codebook, in steps.
        num_frames: Number of frames, T.

    Returns:
        (B, K, T, ...) outputs, in which entry (k, t) is the output at step t + delays[k].

    Raises:
        ValueError: If there are too few steps for the last frame.
    """
    num_steps = outputs.shape[2]
    if num_steps < num_frames + max(delays):
        raise ValueError(
            f"{num_frames} frames with delays up to {max(delays)} need at least {num_frames + max(delays)} steps, got {num_steps}; "
            "feed all delayed codes, or set tail='drop'"
        )
    return torch.stack([outputs[:, k, delay : delay + num_frames] for k, delay in enumerate(delays)], dim=1)


def tail_mask(num_frames: int, *, delays: Sequence[int]) -> Tensor:
    """Returns a mask of the codes scored with `tail="drop"`. The mask excludes the last `delays[k]` frames of each codebook k.

    Returns:
        (K, T) bool mask on the CPU, True for codes that are scored.

    Source: audiocraft 1.3.0, which feeds T + 1 steps and therefore does not score the delayed tail.
    """
    frames = torch.arange(num_frames)
    return torch.stack([frames < num_frames - delay for delay in delays])


def default_delays(num_codebooks: int, *, channels: int) -> tuple[int, ...]:
    """Returns the delays of MusicGen's checkpoints. The checkpoints' configuration files do not contain the delays.

    The delays are 0, 1, 2, ... for mono checkpoints, and 0, 0, 1, 1, ... for stereo checkpoints, whose left and right codebooks are
    interleaved.

    >>> default_delays(8, channels=2)
    (0, 0, 1, 1, 2, 2, 3, 3)

    Source: transformers, `MusicgenForCausalLM.build_delay_pattern_mask`.
    """
    return tuple(k // channels for k in range(num_codebooks))
