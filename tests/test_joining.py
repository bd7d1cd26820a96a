"""Plugins join a host and leave it, under names, and may be objects of any kind."""

from __future__ import annotations

import attrs
import pytest
import torch
from recorders import Calls, Editor, Recorder, hook_count, logits_of, same, state_of
from torch import nn

import geohooks
from geohooks import Plugin, PluginError, SelectorError, hookimpl, zoo
from geohooks.host import Host


@pytest.fixture
def llama():
    return zoo.untrained("llama")


@pytest.fixture
def inputs(llama):
    return zoo.example_inputs(llama)


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


# Joining and leaving


def test_a_host_says_what_it_has(llama):
    recorder, calls = Recorder(), Calls()
    with geohooks.instrument(llama, [recorder, calls]) as host:
        assert isinstance(host, Host)
        assert host.model is llama
        assert host.plugins == {"recorder": recorder, "calls": calls}
        assert list(host.plugins) == ["recorder", "calls"]
        assert host["calls"] is calls
        host.plugins.clear()
        assert len(host.plugins) == 2
        with pytest.raises(PluginError, match=r"no plugin 'recorders' on this host; it has: recorder, calls"):
            host["recorders"]
    assert host.plugins == {}


def test_plugins_join_last_and_leave_at_any_time(llama, inputs):
    site = "decoder.0.output"
    bare = run(llama, inputs)
    with geohooks.instrument(llama) as host:
        assert host.add(Editor(site, lambda h: h + 1, "plus")) == "plus"
        one = run(llama, inputs)
        assert host.add(Editor(site, lambda h: h * 2, "times")) == "times"
        both = run(llama, inputs)
        host.remove("plus")
        assert list(host.plugins) == ["times"]
        twice = run(llama, inputs)
        host.remove("times")
        assert same(run(llama, inputs), bare)
        with pytest.raises(PluginError, match="no plugin 'times'"):
            host.remove("times")
    with geohooks.instrument(llama, [Editor(site, lambda h: (h + 1) * 2)]):
        assert same(run(llama, inputs), both)
    with geohooks.instrument(llama, [Editor(site, lambda h: h * 2)]):
        assert same(run(llama, inputs), twice)
    assert not same(one, both)


def test_a_plugin_may_join_and_leave_in_the_middle_of_a_call(llama, inputs):
    late = Recorder(name="late")
    bare = run(llama, inputs)

    class Invites(Plugin):
        host = None

        @hookimpl
        def on_attach(self, host):
            self.host = host

        @hookimpl
        def sites(self):
            return ["decoder.0.output", "decoder.1.output"]

        @hookimpl
        def on_hidden(self, event):
            if event.site.layer == 0:
                self.host.add(late)
            else:
                self.host.remove("late")

    recorder = Recorder()
    with geohooks.instrument(llama, [Invites(), recorder]) as host:
        for _ in range(2):
            assert same(run(llama, inputs), bare)
            assert list(host.plugins) == ["invites", "recorder"]
    assert recorder.at("decoder.1.output")
    assert hook_count(llama) == 0


def test_a_plugin_that_leaves_in_a_call_hears_no_more(llama, inputs):
    class Once(Plugin):
        def __init__(self):
            self.heard = []

        @hookimpl
        def on_attach(self, host):
            self.host = host

        @hookimpl
        def on_hidden(self, event):
            self.heard.append(str(event.site))
            self.host.remove("once")

    once = Once()
    with geohooks.instrument(llama, [once]):
        run(llama, inputs)
        run(llama, inputs)
    assert once.heard == ["decoder.embedding"]


def test_attach_and_detach_are_told_once_each_with_the_host(llama):
    told = []

    class Told(Plugin):
        @hookimpl
        def on_attach(self, host):
            told.append(("attach", host, self.name))

        @hookimpl
        def on_detach(self, host):
            told.append(("detach", host, self.name))

    first, second = Told(), Told()
    first.name, second.name = "first", "second"
    with geohooks.instrument(llama, [first, second]) as host:
        host.add(Recorder())
        host.remove("recorder")
        host.remove("second")
    assert told == [
        ("attach", host, "first"),
        ("attach", host, "second"),
        ("detach", host, "second"),
        ("detach", host, "first"),
    ]


def test_a_plugin_keeps_what_it_heard_and_may_join_again(llama, inputs):
    recorder = Recorder("logits")
    for count in (1, 2):
        with geohooks.instrument(llama, [recorder]):
            run(llama, inputs)
        assert len(recorder.records) == count


def test_a_host_left_by_detach_may_take_plugins_again(llama, inputs):
    recorder = Recorder("logits")
    host = geohooks.instrument(llama, [recorder])
    host.detach()
    host.add(recorder)
    run(llama, inputs)
    host.detach()
    assert len(recorder.records) == 1
    assert hook_count(llama) == 0


# Names


def test_plugins_may_be_of_any_kind(llama, inputs):
    @attrs.define
    class Equal:
        heard: int = 0

        @hookimpl
        def sites(self):
            return ["decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            self.heard += 1

    class Unhashable(Equal):
        name = "second"
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError

    one, two = Equal(), Unhashable()
    with geohooks.instrument(llama, [one, two]) as host:
        assert list(host.plugins) == ["equal", "second"]
        run(llama, inputs)
    assert (one.heard, two.heard) == (1, 1)


def test_equal_plugins_are_two(llama, inputs):
    @attrs.define
    class Named:
        name: str = attrs.field(eq=False)
        heard: list = attrs.field(factory=list, eq=False)

        @hookimpl
        def on_logits(self, event):
            self.heard.append(event)

    one, two = Named("one"), Named("two")
    assert one == two
    with geohooks.instrument(llama, [one, two]):
        run(llama, inputs)
    assert (len(one.heard), len(two.heard)) == (1, 1)


def test_a_module_may_be_a_plugin(llama, inputs):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 2)
            self.heard = []

        @property
        def not_there_yet(self):
            raise RuntimeError("read too early")

        @hookimpl
        def sites(self):
            return ["decoder.-1.output"]

        @hookimpl
        def on_hidden(self, event):
            self.heard.append(self.linear(event.value))

        def forward(self, hidden):
            return self.linear(hidden)

    head = Head()
    with geohooks.instrument(llama, [head]) as host:
        run(llama, inputs)
        assert list(host.plugins) == ["head"]
    assert head.heard[0].shape == (2, 8, 2)


def test_a_module_of_functions_may_be_a_plugin(llama, inputs):
    import types

    module = types.ModuleType("counting")
    module.heard = []

    @hookimpl
    def on_logits(event):
        module.heard.append(event.site)

    module.on_logits = on_logits
    with geohooks.instrument(llama, [module]) as host:
        run(llama, inputs)
        assert list(host.plugins) == ["counting"]
    assert len(module.heard) == 1


def test_properties_of_a_plugin_are_not_run(llama, inputs):
    class Trap(Plugin):
        @property
        def result(self):
            raise RuntimeError("nothing measured yet")

        @property
        def on_fire(self):
            raise AssertionError

        def __getattr__(self, name):
            raise AttributeError(name)

        @hookimpl
        def on_logits(self, event):
            pass

    with geohooks.instrument(llama, [Trap()]):
        run(llama, inputs)


def test_a_plugin_needs_no_init_of_the_base_class(llama):
    class Own(Plugin):
        name = "its-own"
        description = "has no super().__init__()"

        def __init__(self, size):
            self.size = size

        @hookimpl
        def on_logits(self, event):
            pass

    with geohooks.instrument(llama, [Own(3)]) as host:
        assert list(host.plugins) == ["its-own"]


def test_a_name_is_taken_once(llama):
    before = state_of(llama)
    with pytest.raises(PluginError, match="a plugin 'recorder' is already on this host"):
        geohooks.instrument(llama, [Recorder(), Recorder()])
    assert state_of(llama) == before
    with geohooks.instrument(llama, [Recorder()]) as host:
        with pytest.raises(PluginError, match="already"):
            host.add(Recorder())
        assert list(host.plugins) == ["recorder"]


def test_a_plugin_that_is_refused_does_not_disturb_the_others(llama, inputs):
    recorder = Recorder("logits")
    with geohooks.instrument(llama, [recorder]) as host:
        with pytest.raises(SelectorError):
            host.add(Recorder("decoder.9.output", "late"))
        assert list(host.plugins) == ["recorder"]
        run(llama, inputs)
    assert len(recorder.records) == 1
