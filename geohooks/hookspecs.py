"""Every event that a plugin may implement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from geohooks.markers import hookspec

if TYPE_CHECKING:
    import typer
    from torch import Tensor, nn

    from geohooks.adapter import Adapter
    from geohooks.anatomy import Anatomy
    from geohooks.call import Call
    from geohooks.events import AttentionEvent, HiddenEvent, LogitsEvent, RouterEvent, ScoresEvent
    from geohooks.host import Host
    from geohooks.sites import Site

__all__ = ["AdapterSpecs", "PluginSpecs"]


class PluginSpecs:
    """The hooks of group `geohooks.plugins`; a plugin implements any of them with `@geohooks.hookimpl`.

    Plugins run in the order of the list given to `geohooks.instrument`.
    """

    @hookspec
    def sites(self, anatomy: Anatomy) -> Iterable[str | Site]:
        """Asked once, at attach: exactly what the plugin hears, over all its hooks.

        Left out: every site of the kinds whose hooks the plugin implements. A plugin that edits must define it.
        """
        raise NotImplementedError

    @hookspec
    def on_attach(self, host: Host) -> None:
        """The plugin joins `host`; raise `PluginError` when the model lacks what it needs."""

    @hookspec
    def on_detach(self, host: Host) -> None:
        """The plugin leaves `host`."""

    @hookspec
    def on_call_start(self, call: Call) -> None:
        """A forward pass of the model begins."""

    @hookspec
    def on_call_end(self, call: Call) -> None:
        """A forward pass ended; not called for one that an exception ended."""

    @hookspec
    def on_hidden(self, event: HiddenEvent) -> None:
        """A residual-stream or sublayer tensor passes; may assign `event.value`."""

    @hookspec
    def on_router(self, event: RouterEvent) -> None:
        """A router has decided; may assign `event.value`, the logits, which re-routes by the family's own rule."""

    @hookspec
    def on_attention(self, event: AttentionEvent) -> None:
        """An attention call is about to be made; `event.weights()` computes its weights on demand."""

    @hookspec
    def on_logits(self, event: LogitsEvent) -> None:
        """The model has given its output distribution; may assign `event.value`.

        With labels the loss follows the edit, or the edit is refused.
        """

    @hookspec
    def on_scores(self, event: ScoresEvent) -> None:
        """Next-token scores while generating, after the model, before sampling; may assign `event.value`."""

    @hookspec
    def loss_terms(self, call: Call) -> Mapping[str, Tensor]:
        """Extra differentiable terms of the loss by name, asked by `host.loss(call)`."""
        raise NotImplementedError

    @hookspec
    def report(self, host: Host) -> Any:
        """What the plugin would show a person (anything rich can print), asked by `host.report()`."""

    @hookspec
    def commands(self, app: typer.Typer) -> None:
        """Add sub-commands to the `geohooks` command."""


class AdapterSpecs:
    """The hook of group `geohooks.adapters`."""

    @hookspec(firstresult=True)
    def adapt(self, model: nn.Module) -> Adapter | None:
        """An adapter for `model`, or None where this is not its family; the first answer wins."""
