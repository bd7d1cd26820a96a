"""What is installed is found by entry points, and what is broken among it breaks nothing else."""

from __future__ import annotations

import logging
import sys
from importlib import metadata

import pytest
import torch
from recorders import Recorder

import geohooks
from geohooks import AdapterError, PluginError, zoo
from geohooks.adapter import Adapter
from geohooks.registry import adapter_for, disabled, installed, load_plugin

GOOD = """
import geohooks

class Counts(geohooks.Plugin):
    description = "counts"
    def __init__(self):
        self.count = 0
    @geohooks.hookimpl
    def on_hidden(self, event):
        self.count += 1

@geohooks.hookimpl
def adapt(model):
    return None
"""


def forget():
    from geohooks import registry

    installed.cache_clear()
    registry._adapters.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts distributions with entry points on the path: files by name, and the text of entry_points.txt."""

    def put(name, entry_points, **modules):
        folder = tmp_path / name
        info = folder / f"{name}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(entry_points)
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(folder)
        forget()

    yield put
    forget()


def test_a_plugin_is_found_by_its_name_and_made_anew(install):
    install("good-plugin", "[geohooks.plugins]\ncounts = good_module:Counts\n", good_module=GOOD)
    first, second = load_plugin("counts"), load_plugin("counts")
    assert first is not second
    model = zoo.untrained("llama")
    with geohooks.instrument(model, ["counts"]) as host, torch.no_grad():
        model(**zoo.example_inputs(model))
        assert host["counts"].count > 0
    with geohooks.instrument(model, "counts") as host:
        assert list(host.plugins) == ["counts"]


def test_a_plugin_goes_by_the_name_of_its_entry_point(install):
    install(
        "renamed-plugin",
        "[geohooks.plugins]\nelsewhere = renamed_module:Counts\n",
        renamed_module=GOOD.replace('description = "counts"', 'name = "own"'),
    )
    with geohooks.instrument(zoo.untrained("llama"), ["elsewhere"]) as host:
        assert list(host.plugins) == ["elsewhere"]


def test_the_installed_ones_say_where_they_come_from(install):
    install("good-plugin", "[geohooks.plugins]\ncounts = good_module:Counts\n", good_module=GOOD)
    (entry,) = [one for one in installed("geohooks.plugins") if one.name == "counts"]
    assert (entry.distribution, entry.origin) == ("good-plugin", "good-plugin 1.5 (good_module:Counts)")
    assert entry.error is None
    assert {one.name for one in installed("geohooks.adapters")} >= {"llama", "qwen", "t5", "vit", "structural"}


BROKEN = {
    "missing module": ("no_such_module_anywhere:Thing", {}),
    "missing object": ("broken_module:Thing", {"broken_module": "x = 1\n"}),
    "raises": ("broken_module:Thing", {"broken_module": "raise ValueError('half installed')\n"}),
    "exits": ("broken_module:Thing", {"broken_module": "raise SystemExit(3)\n"}),
    "not python": ("broken_module:Thing", {"broken_module": "def (:\n"}),
    "not a reference": ("this is no reference!", {}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_broken_plugin_breaks_no_other(install, kind, caplog):
    target, modules = BROKEN[kind]
    install("broken-plugin", f"[geohooks.plugins]\nbroken = {target}\n", **modules)
    install("good-plugin", "[geohooks.plugins]\ncounts = good_module:Counts\n", good_module=GOOD)
    with caplog.at_level(logging.WARNING, "geohooks"):
        assert load_plugin("counts").count == 0
    assert "broken" in caplog.text
    (entry,) = [one for one in installed("geohooks.plugins") if one.name == "broken"]
    assert entry.error is not None
    assert entry.target is None
    with pytest.raises(PluginError, match=r"plugin 'broken' of broken-plugin 1\.5 .*can't be loaded"):
        load_plugin("broken")
    with pytest.raises(PluginError, match="broken"):
        geohooks.instrument(zoo.untrained("llama"), ["broken"])


@pytest.mark.parametrize("kind", BROKEN)
def test_one_broken_adapter_breaks_no_other(install, kind, caplog):
    target, modules = BROKEN[kind]
    install("broken-adapter", f"[geohooks.adapters]\nbroken = {target}\n", **modules)
    with caplog.at_level(logging.WARNING, "geohooks"):
        assert adapter_for(zoo.untrained("llama")).name == "llama"
    assert "broken" in caplog.text
    with pytest.raises(AdapterError, match="broken"):
        adapter_for(zoo.untrained("llama"), "broken")


RAISING = GOOD.replace("return None", "raise ValueError('cannot read this')")


def test_an_adapter_that_raises_when_asked_breaks_no_other(install, caplog):
    install("raising-adapter", "[geohooks.adapters]\nraising = raising_module\n", raising_module=RAISING)
    with caplog.at_level(logging.WARNING, "geohooks"):
        assert adapter_for(zoo.untrained("llama")).name == "llama"
    assert "raising" in caplog.text


def test_an_adapter_with_a_wrong_signature_breaks_no_other(install, caplog):
    wrong = GOOD.replace("def adapt(model)", "def adapt(network)")
    install("wrong-adapter", "[geohooks.adapters]\nwrong = wrong_module\n", wrong_module=wrong)
    with caplog.at_level(logging.WARNING, "geohooks"):
        assert adapter_for(zoo.untrained("llama")).name == "llama"
    assert "wrong" in caplog.text


def test_a_third_partys_adapter_comes_before_the_structural_one(install):
    own = """
import geohooks
from geohooks.adapter import Adapter

class Mine(Adapter):
    name = "mine"

@geohooks.hookimpl
def adapt(model):
    return Mine(model.config) if model.config.model_type == "mixtral" else None
"""
    install("own-adapter", "[geohooks.adapters]\nmine = own_module\n", own_module=own)
    assert adapter_for(zoo.untrained("mixtral")).name == "mine"
    assert adapter_for(zoo.untrained("llama")).name == "llama"


def test_two_plugins_of_one_name_are_told_apart(install, caplog):
    install("good-plugin", "[geohooks.plugins]\ncounts = good_module:Counts\n", good_module=GOOD)
    install("rival-plugin", "[geohooks.plugins]\ncounts = rival_module:Counts\n", rival_module=GOOD)
    with caplog.at_level(logging.WARNING, "geohooks"), pytest.raises(PluginError) as caught:
        load_plugin("counts")
    assert "good-plugin" in str(caught.value)
    assert "rival-plugin" in str(caught.value)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(PluginError, match=r"no plugin 'signal' is installed; did you mean 'signals'\?"):
        geohooks.instrument(zoo.untrained("llama"), ["signal"])
    with pytest.raises(PluginError, match=r"no plugin 'xyzzy' is installed.* installed are: .*signals"):
        load_plugin("xyzzy")


def test_named_plugins_are_kept_out(install, monkeypatch):
    install("good-plugin", "[geohooks.plugins]\ncounts = good_module:Counts\n", good_module=GOOD)
    monkeypatch.setenv("GEOHOOKS_DISABLE_PLUGINS", " counts ,, other")
    assert disabled() == {"counts", "other"}
    with pytest.raises(PluginError, match="GEOHOOKS_DISABLE_PLUGINS"):
        geohooks.instrument(zoo.untrained("llama"), ["counts"])
    monkeypatch.delenv("GEOHOOKS_DISABLE_PLUGINS")
    assert disabled() == frozenset()
    assert load_plugin("counts").count == 0


def test_a_plugin_that_is_kept_out_is_not_even_imported(install, monkeypatch):
    install(
        "fatal-plugin",
        "[geohooks.plugins]\nfatal = fatal_module:Thing\n",
        fatal_module="raise AssertionError('imported')\n",
    )
    monkeypatch.setenv("GEOHOOKS_DISABLE_PLUGINS", "fatal")
    forget()
    with pytest.raises(PluginError, match="signals"):
        load_plugin("signalz")
    assert "fatal_module" not in sys.modules


# Choosing the adapter


def test_an_adapter_may_be_given():
    model = zoo.untrained("llama")

    class Mine(Adapter):
        name = "mine"

    given = Mine(model.config)
    assert geohooks.instrument(model, adapter=given).anatomy.adapter is given
    assert geohooks.instrument(model, adapter="structural").anatomy.adapter.name == "structural"
    recorder = Recorder("decoder.0.output")
    with geohooks.instrument(model, [recorder], adapter="structural"), torch.no_grad():
        model(**zoo.example_inputs(model))
    assert len(recorder.records) == 1


def test_an_adapter_that_does_not_fit_is_refused():
    model = zoo.untrained("llama")
    with pytest.raises(AdapterError, match=r"no adapter 'lama' is installed.* installed are: .*llama"):
        geohooks.instrument(model, adapter="lama")
    with pytest.raises(AdapterError, match="adapter 't5' can't read LlamaForCausalLM"):
        geohooks.instrument(model, adapter="t5")
    with pytest.raises(AdapterError, match="neither an Adapter nor"):
        geohooks.instrument(model, adapter=3)
    with pytest.raises(AdapterError, match="neither an Adapter nor"):
        geohooks.instrument(model, adapter=Adapter)


def test_the_built_in_ones_are_found_as_those_of_third_parties_are():
    names = {point.name for point in metadata.entry_points(group="geohooks.plugins")}
    assert "signals" in names
    assert names <= {one.name for one in installed("geohooks.plugins")}
