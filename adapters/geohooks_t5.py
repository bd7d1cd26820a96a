"""T5 and T5 v1.1: encoder and decoder, or the encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from geohooks.adapter import Adapter, Names
from geohooks.discovery import model_type
from geohooks.markers import hookimpl

__all__ = ["T5", "adapt"]

FAMILIES = ("t5",)


class T5(Adapter):
    """A block is a list of sublayers, each of which adds its own output to the stream."""

    name = "t5"
    final_norm = "final_layer_norm"
    attention_projections: ClassVar[Names] = {"q": ("q",), "k": ("k",), "v": ("v",), "o": ("o",)}
    mlp_projections: ClassVar[Names] = {"gate": ("wi_0",), "up": ("wi_1", "wi"), "down": ("wo",)}

    def find_mlp(self, layer: Any) -> nn.Module | None:
        """The feed-forward layer, without the norm, dropout and sum of the sublayer around it."""
        return layer.layer[-1].DenseReluDense

    def tokens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The decoder's token ids: those given, else the labels shifted right, as the model does it."""
        labels = inputs.get("labels")
        given = super().tokens(inputs)
        if given is not None or labels is None or not self.config.is_encoder_decoder:
            return given
        shifted = F.pad(labels[..., :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def loss(self, model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Cross-entropy with the labels as they stand: the decoder's input was shifted, not they."""
        if model.loss_type != "ForConditionalGeneration" or inputs.get("labels") is None:
            return super().loss(model, logits, inputs)
        return F.cross_entropy(logits.flatten(0, -2), inputs["labels"].to(logits.device).flatten())


@hookimpl
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of `model` if it is of this family."""
    return T5(model.config) if model_type(model) in FAMILIES else None
