"""Giving an event to those who hear it, in order, and answering for what they do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from geohooks.errors import PluginError
from geohooks.events import check_edit
from geohooks.roster import Listener

if TYPE_CHECKING:
    from geohooks.host import Host

__all__ = ["tell"]


def tell(host: Host, listeners: tuple[Listener, ...], event: Any) -> None:
    """Give `event` to each listener in turn.

    An error goes on to the model's caller, or, where the host drops faulty plugins, costs the plugin its place: the
    event has then the value that it had before that plugin.
    """
    for listener in listeners:
        if event.call.progress.plan is not host.backend and not host.has(listener.plugin):
            continue  # It has left since the call began.
        before = event.value
        try:
            if listener.inner is None:
                listener.function(event)
            else:
                before = _around(host, listener, listener.inner, event)
            if event.value is not before:
                _edited(host, listener, event, before)
        except Exception as error:
            if not host.drops_faulty:
                raise
            if event.value is not before:
                event.value = before
            host.fault(listener.plugin, event.site, event.call, error)


def _around(host: Host, wrapper: Listener, inner: tuple[Listener, ...], event: Any) -> Tensor:
    """Run a wrapper around the listeners inside it; returns the value that these left, whose edits are their own."""
    before = event.value
    with wrapper.function(event):
        if event.value is not before:
            _edited(host, wrapper, event, before)
        tell(host, inner, event)
        after: Tensor = event.value
    return after


def _edited(host: Host, listener: Listener, event: Any, before: Tensor) -> None:
    check_edit(event.site, before, event.value)
    if not host.may_edit(listener.plugin, event.site):
        raise PluginError(
            f"plugin '{listener.plugin}' assigned '{event.site}' but does not say which sites it edits; "
            "give it a sites(anatomy) hook that returns them"
        )
    event.call.progress.edits.add((event.site, listener.plugin))
    host.edited.add(event.site)
