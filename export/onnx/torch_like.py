"""An exported graph that is called like a model of transformers, for evaluation code that expects one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ara.errors import UsageError
from export.onnx.runner import OnnxDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class TorchLike(torch.nn.Module):
    """An :class:`OnnxDecoder` with the interface of a model of transformers.

    Args:
        decoder: the exported model.
        config: config of the checkpoint, for code that reads it from the model.
    """

    def __init__(self, decoder: OnnxDecoder, config: PreTrainedConfig) -> None:
        from transformers import GenerationConfig

        super().__init__()
        self.decoder, self.config = decoder, config
        # Chat models name the token that ends a turn in their generation config alone.
        self.generation_config = GenerationConfig(eos_token_id=list(decoder.about.decoder.eos) or None)
        self.anchor = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        """Return an object with ``logits`` (b, t, v) float32."""
        from transformers.modeling_outputs import CausalLMOutput

        logits, _past = self.decoder.forward(input_ids.cpu().numpy())
        return CausalLMOutput(logits=torch.from_numpy(logits))

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.anchor.device

    def tie_weights(self) -> None:
        """Do nothing: the graph cannot change."""

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        pad_token_id: int = 0,
        **_: Any,
    ) -> torch.Tensor:
        """Return ids (b, t) followed by their greedy continuations: (b, t + new), padded on the right.

        Args:
            input_ids: (b, t).
            attention_mask: (b, t), 0 for padding, which is on the left; all ones by default.
            max_new_tokens: upper limit of new tokens.
            max_length: upper limit of all tokens, where ``max_new_tokens`` is not given.
            do_sample: must be false.
            pad_token_id: token for the padding.

        Raises:
            UsageError: sampling was asked for.
        """
        if do_sample:
            raise UsageError("an exported graph continues greedily only", "use --backend torch for this task")
        new = max_new_tokens if max_new_tokens is not None else (max_length or 0) - input_ids.shape[1]
        rows = []
        for number, ids in enumerate(input_ids):
            prompt = ids if attention_mask is None else ids[attention_mask[number].bool()]
            room = min(new, self.decoder.context - len(prompt))
            rows.append(torch.tensor(list(self.decoder.generate(prompt.cpu().numpy(), room)), dtype=input_ids.dtype))
        continued = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        return torch.cat([input_ids, continued], 1)
