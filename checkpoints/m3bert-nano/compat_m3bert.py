"""The names of transformers that have no stable home, imported in one place.

Everything else in the package uses top-level names of transformers, so that a release which moves one of these breaks
one file. Verified with transformers 5.17 and 5.23.
"""

from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward as library_sdpa_attention_forward
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ROPE_INIT_FUNCTIONS",
    "FlashAttentionKwargs",
    "GradientCheckpointingLayer",
    "can_return_tuple",
    "capture_outputs",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "dynamic_rope_update",
    "find_packed_sequence_indices",
    "init",
    "is_flash_attention_requested",
    "is_tracing",
    "library_sdpa_attention_forward",
    "merge_with_config_defaults",
    "packed_sequence_mask_function",
]
