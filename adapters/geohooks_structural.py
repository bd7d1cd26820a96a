"""Models of no known family, read by what they declare to transformers, else by the shape of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from geohooks.adapter import Adapter, Names
from geohooks.anatomy import Tap
from geohooks.discovery import declared_layers, first_of, runner_of, stack_name, stack_named
from geohooks.errors import AdapterError
from geohooks.markers import hookimpl

__all__ = ["Structural", "adapt"]

_NO_TOKENS = ("mask", "position", "labels", "token_type", "cache")


class Structural(Adapter):
    """Reads declarations, then shapes; it does not claim that the parts of a block sum to its output."""

    name = "structural"
    additive = False
    attention_projections: ClassVar[Names] = {
        "q": ("q_proj", "query", "q", "q_lin"),
        "k": ("k_proj", "key", "k", "k_lin"),
        "v": ("v_proj", "value", "v", "v_lin"),
        "o": ("o_proj", "out_proj", "c_proj", "dense", "o", "out_lin"),
    }
    mlp_projections: ClassVar[Names] = {
        "gate": ("gate_proj",),
        "up": ("up_proj", "c_fc", "fc1", "dense_h_to_4h", "linear1", "wi", "intermediate.dense"),
        "down": ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "linear2", "wo", "output.dense"),
    }

    def find_layers(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """The declared lists of layers, else the lists of like blocks; the longest if names don't differ."""
        lists = declared_layers(model) or _like_blocks(model)
        if not lists:
            raise AdapterError(
                f"{type(model).__name__} has no blocks: looked for modules whose hidden states transformers "
                "declares to record, then for a list (nn.ModuleList, nn.Sequential) of modules of one "
                "class that hold weight matrices; pass adapter= with an Adapter of your own, or instrument "
                "the transformer inside this model"
            )
        names = {self.stack_name(model, path, layers[0]) for path, layers in lists.items()}
        if len(names) == len(lists):
            return lists
        length = max(map(len, lists.values()))
        longest = {path: layers for path, layers in lists.items() if len(layers) == length}
        if len(longest) > 1:
            raise AdapterError(
                f"{type(model).__name__} has several lists of {length} like blocks ({', '.join(longest)}), "
                "and their names do not tell encoder, decoder, vision and text apart; pass adapter= with "
                "an Adapter whose find_layers chooses"
            )
        return longest

    def tokens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The decoder's token ids, else those under the usual name, else the first rows of whole numbers given."""
        for name in ("decoder_input_ids", "input_ids"):
            if inputs.get(name) is not None:
                return inputs[name]
        if any(name.endswith("inputs_embeds") for name in inputs):
            return None
        given = (value for name, value in inputs.items() if not any(part in name for part in _NO_TOKENS))
        whole = (value for value in given if isinstance(value, Tensor) and not value.is_floating_point())
        return next((value for value in whole if value.dim() == 2), None)

    def stack_name(self, model: nn.Module, path: str, layer: nn.Module) -> str:
        """As for known families; a foreign model of no telling names that predicts words is a decoder."""
        if hasattr(model, "config") or stack_named(path):
            return stack_name(model, path, layer)
        return "decoder" if self.head(model)[0] == "vocabulary" else "encoder"

    def width(self, model: nn.Module, path: str) -> int:
        """The configuration's width, else what the first norm or linear layer of the stack reads."""
        configured = first_of(runner_of(model, path), ("config.hidden_size",))
        if configured is not None:
            return int(configured)
        modules = list(model.get_submodule(path).modules())
        norms = [weight.shape[-1] for module in modules if _is_norm(module) for weight in module.parameters()]
        linears = [module.in_features for module in modules if isinstance(module, nn.Linear)]
        return [*norms, *linears][0]

    def find_embedding(self, model: nn.Module, path: str) -> Tap | None:
        """The input of the first layer: nothing declares which module made it."""
        return Tap(self.find_layers(model)[path][0], "input")

    def find_final_norm(self, model: nn.Module, path: str) -> nn.Module | None:
        """The last norm after the layers (or named final) in what holds them, or in what holds that."""
        parts = path.split(".") if path else []
        for depth in reversed(range(len(parts))):
            children = dict(model.get_submodule(".".join(parts[:depth])).named_children())
            after = list(children)[list(children).index(parts[depth]) :]
            late = [name for name in children if name in after or name.startswith("final")]
            norms = [children[name] for name in late if _is_norm(children[name])]
            if norms:
                return norms[-1]
        return None

    def find_attention(self, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """What calls transformers' attention interface, else what has attention in its class's name."""
        found = super().find_attention(layer)
        if found != (None, None):
            return found
        attention, cross_attention, *_ = [*_named_attention(layer), None, None]
        return attention, cross_attention

    def find_mlp(self, layer: nn.Module) -> nn.Module | None:
        """The one child of `layer` beside the attention that holds matrices; None where several do."""
        beside = self._beside_attention(layer)
        return beside[0] if len(beside) == 1 else None

    def added(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The sublayers; of one that is spread over several modules (BERT, OPT), the last linear layer."""
        kinds = zip(("attention", "cross_attention"), self.find_attention(layer), strict=True)
        modules = {kind: _projected(layer, module) for kind, module in kinds if module is not None}
        beside = self._beside_attention(layer)
        if beside:
            modules["mlp"] = beside[0] if len(beside) == 1 else _linears(beside[-1])[-1]
        return modules

    def head(self, model: nn.Module) -> tuple[Literal["vocabulary", "classes"] | None, int | None]:
        """As declared; in a foreign model, words if the last linear layer is as wide as an embedding long."""
        if hasattr(model, "config"):
            return super().head(model)
        lengths = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
        linears = _linears(model)
        outputs = linears[-1].out_features if linears else None
        return ("vocabulary", outputs) if outputs in lengths else (None, None)

    def _beside_attention(self, layer: nn.Module) -> list[nn.Module]:
        attention = {module for module in self.find_attention(layer) if module is not None}
        holding = [child for child in layer.children() if _holds_matrix(child)]
        return [child for child in holding if attention.isdisjoint(child.modules())]


def _like_blocks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost lists of modules of one class, by path; lists inside blocks are parts of those."""
    lists: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{found}." if found else "") for found in lists)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = list(module)
        alike = len({type(block) for block in blocks}) == 1
        if alike and all(list(block.children()) and _holds_matrix(block) for block in blocks):
            lists[path] = blocks
    return lists


def _named_attention(layer: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in `layer` whose classes are named for attention."""
    for child in layer.children():
        name = type(child).__name__.lower()
        if ("attention" in name or "attn" in name) and not _is_norm(child):
            yield child
        else:
            yield from _named_attention(child)


def _projected(layer: nn.Module, attention: nn.Module) -> nn.Module:
    """What holds `attention` in `layer`: itself, or the last linear layer beside it in what encloses both."""
    enclosing = next(child for child in layer.children() if attention in child.modules())
    inside = set(attention.modules())
    beside = [linear for linear in _linears(enclosing) if linear not in inside]
    return beside[-1] if beside else attention


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _holds_matrix(module: nn.Module) -> bool:
    return any(weight.dim() in (2, 3) for weight in module.parameters())


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [inner for inner in module.modules() if isinstance(inner, nn.Linear)]


@hookimpl(trylast=True)
def adapt(model: nn.Module) -> Adapter | None:
    """The adapter of any model; whether it has blocks shows in `anatomy`."""
    return Structural(getattr(model, "config", None))
