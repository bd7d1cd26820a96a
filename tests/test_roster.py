"""Plugins that are written wrongly are refused by name, with what to do."""

from __future__ import annotations

import pytest
import torch
from recorders import Recorder, state_of

import geohooks
from geohooks import Plugin, PluginError, SelectorError, hookimpl, zoo
from geohooks.hookspecs import PluginSpecs
from geohooks.roster import Roster

HOOKS = sorted(name for name in vars(PluginSpecs) if not name.startswith("_"))


@pytest.fixture(scope="module")
def llama():
    return zoo.untrained("llama")


def refused(model, plugin, match, error=PluginError):
    before = state_of(model)
    with pytest.raises(error, match=match) as caught:
        geohooks.instrument(model, [plugin])
    assert state_of(model) == before
    return str(caught.value)


def with_method(name, function, marker=hookimpl):
    class Wrong(Plugin):
        pass

    function.__name__ = name
    setattr(Wrong, name, marker(function) if marker else function)
    return Wrong()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_misspelt_hook_suggests_the_right_one(llama, hook):
    misspelt = hook[:-2] + hook[-1] + hook[-2]
    message = refused(llama, with_method(misspelt, lambda self: None), f"there is no hook '{misspelt}'")
    assert f"did you mean '{hook}'?" in message
    assert "wrong" in message.lower()


def test_a_hook_of_quite_another_name_lists_them_all(llama):
    message = refused(llama, with_method("zzz", lambda self: None), "there is no hook 'zzz'")
    assert all(hook in message for hook in HOOKS)


def test_a_misspelt_specname_suggests_the_right_one(llama):
    plugin = with_method("anything", lambda self, event: None, hookimpl(specname="on_hiden"))
    assert "did you mean 'on_hidden'?" in refused(llama, plugin, "no hook 'on_hiden'")


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.startswith("on_")])
def test_a_hook_that_is_not_marked_is_an_error(llama, hook):
    plugin = with_method(hook, lambda self, event: None, marker=None)
    assert "@geohooks.hookimpl" in refused(llama, plugin, f"{hook} is not marked")


def test_a_sites_that_is_not_marked_is_an_error(llama):
    class Unmarked(Plugin):
        def sites(self, anatomy):
            return ["decoder.0.output"]

        @hookimpl
        def on_hidden(self, event):
            pass

    refused(llama, Unmarked(), "sites is not marked")


def test_attributes_named_like_hooks_are_no_hooks(llama):
    class Fine(Plugin):
        def __init__(self):
            self.sites = ["decoder.0.output"]
            self.report = {}
            self.on_hidden_values = []

        @hookimpl
        def on_logits(self, event):
            pass

    with geohooks.instrument(llama, [Fine()]) as host:
        assert list(host.plugins) == ["fine"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_wrong_argument_is_an_error(llama, hook):
    message = refused(llama, with_method(hook, lambda self, thing: None), "thing")
    assert hook in message
    assert "wrong" in message.lower()


def test_a_class_is_no_plugin(llama):
    refused(llama, Recorder, r"Recorder is a class; give an instance: Recorder\(\)")


@pytest.mark.parametrize("nothing", [object(), 3, None])
def test_what_implements_no_hook_is_no_plugin(llama, nothing):
    refused(llama, nothing, "implements no hook")


def test_the_same_object_twice_is_refused(llama):
    recorder = Recorder()
    with pytest.raises(PluginError, match="already"):
        geohooks.instrument(llama, [recorder, recorder])


def test_a_plugin_may_be_on_two_hosts(llama):
    recorder = Recorder("logits")
    with geohooks.instrument(llama, [recorder]), geohooks.instrument(llama, [recorder]), torch.no_grad():
        llama(**zoo.example_inputs(llama))
    assert len(recorder.records) == 2


# Sites


class Asks(Plugin):
    def __init__(self, wanted):
        self.wanted = wanted

    @hookimpl
    def sites(self, anatomy):
        return self.wanted(anatomy) if callable(self.wanted) else self.wanted

    @hookimpl
    def on_hidden(self, event):
        self.heard = [*getattr(self, "heard", []), str(event.site)]


@pytest.mark.parametrize(
    "wanted",
    [
        "decoder.*.output",
        ["decoder.0.output", "decoder.1.output"],
        ("decoder.-1.output", "decoder.0.output", "decoder.0.output"),
        {"decoder.[0:2].output"},
        lambda anatomy: (site for site in anatomy.sites if site.kind == "output"),
        lambda anatomy: anatomy.select("decoder.*.output"),
        lambda anatomy: iter(["decoder.[:].output"]),
        geohooks.Site("decoder", 0, "output"),
    ],
)
def test_sites_may_be_given_in_any_form(llama, wanted):
    plugin = Asks(wanted)
    with geohooks.instrument(llama, [plugin]), torch.no_grad():
        llama(**zoo.example_inputs(llama))
    every = ["decoder.0.output", "decoder.1.output"]
    assert plugin.heard == (every[:1] if isinstance(wanted, geohooks.Site) else every)


def test_sites_may_be_a_generator_function(llama):
    class Yields(Plugin):
        heard = 0

        @hookimpl
        def sites(self, anatomy):
            for stack in anatomy.stacks:
                yield f"{stack.name}.-1.output"

        @hookimpl
        def on_hidden(self, event):
            self.heard += 1

    plugin = Yields()
    with geohooks.instrument(llama, [plugin]), torch.no_grad():
        llama(**zoo.example_inputs(llama))
    assert plugin.heard == 1


def test_no_sites_is_said_by_an_empty_list(llama):
    refused(llama, Asks(None), "returned None; return a list of selectors")
    with geohooks.instrument(llama, [Asks([])]) as host:
        assert host.backend is None


@pytest.mark.parametrize("wanted", [3, [3], [None], [["decoder.0.output"]]])
def test_what_is_no_selector_is_refused(llama, wanted):
    refused(llama, Asks(wanted), r"(3|None|\[)", error=geohooks.GeohooksError)


def test_a_selector_that_matches_nothing_names_the_plugin_and_the_nearest(llama):
    message = refused(llama, Asks(["decoder.0.ouput"]), "'decoder.0.ouput' matches no site", SelectorError)
    assert "decoder.0.output" in message
    assert "decoder (2 layers)" in message
    assert "asks" in message


def test_a_site_whose_hook_is_not_implemented_is_an_error(llama):
    for site, hook in [("logits", "on_logits"), ("decoder.0.pattern", "on_attention")]:
        refused(llama, Asks([site]), f"asks for '{site}' but does not implement {hook}")


def test_sites_is_asked_once(llama):
    asked = []

    def wanted(anatomy):
        asked.append(anatomy)
        return ["decoder.0.output"]

    with geohooks.instrument(llama, [Asks(wanted)]) as host:
        for _ in range(2):
            host.add(Recorder("logits"))
            host.remove("recorder")
    assert asked == [host.anatomy]


def test_a_hook_of_a_site_that_the_model_lacks_is_harmless_without_sites(llama):
    class Routers(Plugin):
        @hookimpl
        def on_router(self, event):
            raise AssertionError

    with geohooks.instrument(llama, [Routers()]) as host:
        assert host.backend is None
        llama(**zoo.example_inputs(llama))


def test_a_roster_says_who_implements_what():
    roster = Roster({"asks": Asks("*"), "recorder": Recorder()})
    assert dict(roster.all_hooks()) == {
        "asks": ("on_hidden", "sites"),
        "recorder": ("on_attention", "on_hidden", "on_logits", "on_router", "sites"),
    }
