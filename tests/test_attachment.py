"""What a host puts on a model comes off again, copies do not carry it, and what users put there stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorders import Calls, Recorder, Scores, hook_count, logits_of, same, state_of
from torch import nn

import geohooks
from geohooks import Plugin, hookimpl, zoo
from geohooks.host import Host

FAMILIES = zoo.families()


def run(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_every_module_as_it_was(family):
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    before = state_of(model)
    host = geohooks.instrument(model, [Recorder(), Scores(), Calls()])
    assert state_of(model) != before
    run(model, inputs)
    host.detach()
    assert state_of(model) == before
    host.detach()
    assert state_of(model) == before
    assert same(run(model, inputs), bare)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_way_of_coming_and_going_leaves_the_model_as_it_was(data):
    family = data.draw(st.sampled_from(["llama", "qwen3_moe", "t5", "vit"]))
    model = zoo.untrained(family)
    before = state_of(model)
    names = [str(site) for site in geohooks.instrument(model).anatomy.sites]
    hosts: list[Host] = []
    for step in range(data.draw(st.integers(1, 10))):
        what = data.draw(st.sampled_from(["attach", "add", "remove", "detach"]))
        if what == "attach" or not hosts:
            hosts.append(geohooks.instrument(model))
            continue
        host = data.draw(st.sampled_from(hosts))
        if what == "add":
            host.add(Recorder(data.draw(st.lists(st.sampled_from(names), max_size=4)), f"plugin{step}"))
        elif what == "remove" and host.plugins:
            host.remove(data.draw(st.sampled_from(sorted(host.plugins))))
        elif what == "detach":
            host.detach()
    for host in data.draw(st.permutations(hosts)):
        host.detach()
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_without_listeners_nothing_at_all_is_put_on_the_model(family):
    class Deaf(Plugin):
        @hookimpl
        def sites(self, anatomy):
            return []

        @hookimpl
        def on_hidden(self, event):
            raise AssertionError

        @hookimpl
        def on_attach(self, host):
            pass

        @hookimpl
        def on_detach(self, host):
            pass

        @hookimpl
        def commands(self, app):
            pass

    model = zoo.untrained(family)
    before = state_of(model)
    for plugins in ([], [Deaf()]):
        with geohooks.instrument(model, plugins) as host:
            assert state_of(model) == before
            assert hook_count(model) == 0
            assert host.backend is None


def test_the_last_plugin_that_leaves_takes_every_hook_with_it():
    model = zoo.untrained("llama")
    before = state_of(model)
    with geohooks.instrument(model, [Recorder()]) as host:
        recorder = host.remove("recorder")
        assert isinstance(recorder, Recorder)
        assert state_of(model) == before


def test_a_thousand_hosts_leave_no_hook_and_no_memory():
    model = zoo.untrained("llama", num_hidden_layers=1)
    inputs = zoo.example_inputs(model, batch=1, length=2)
    before = state_of(model)

    def cycle(*, with_pass):
        recorder = Recorder(["decoder.0.output", "decoder.0.pattern", "logits"])
        with geohooks.instrument(model, [recorder, Scores()]) as host:
            if with_pass:
                run(model, inputs)
        return weakref.ref(host), weakref.ref(recorder)

    for _ in range(3):
        cycle(with_pass=True)
    gc.collect()
    objects = len(gc.get_objects())
    references = [one for index in range(1000) for one in cycle(with_pass=index % 50 == 0)]
    gc.collect()
    assert [one for one in references if one() is not None] == []
    assert state_of(model) == before
    assert len(gc.get_objects()) - objects < 2100 + 200  # the references themselves, and slack for caches


def test_a_host_that_is_left_by_an_error_is_gone():
    model = zoo.untrained("llama")
    before = state_of(model)
    with pytest.raises(KeyError), geohooks.instrument(model, [Recorder()]):
        raise KeyError
    assert state_of(model) == before


@pytest.mark.parametrize("hook", ["sites", "on_attach"])
def test_a_plugin_that_fails_to_join_leaves_the_model_untouched_and_the_others_told(hook):
    class Fails(Plugin):
        name = "fails"

    def fail(self):
        raise ZeroDivisionError

    setattr(Fails, hook, hookimpl(fail))
    told = []

    class Told(Plugin):
        @hookimpl
        def on_hidden(self, event):
            pass

        @hookimpl
        def on_detach(self, host):
            told.append(host)

    model = zoo.untrained("llama")
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        geohooks.instrument(model, [Told(), Fails()])
    assert state_of(model) == before
    assert len(told) == 1


# Copies


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    yield torch.load(stream, weights_only=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "t5", "vit"])
def test_a_copy_of_an_instrumented_model_is_clean(family):
    model = zoo.untrained(family)
    inputs = zoo.example_inputs(model)
    bare = run(model, inputs)
    plain = [[(path, list(m.__dict__)) for path, m in one.named_modules()] for one in copies(model)]
    one, other = Recorder(), Recorder(name="other")
    with geohooks.instrument(model, [one, Scores()]), geohooks.instrument(model, [other]):
        instrumented = list(copies(model))
        for made, expected in zip(instrumented, plain, strict=True):
            assert hook_count(made) == 0
            assert [(path, list(m.__dict__)) for path, m in made.named_modules()] == expected
            assert same(run(made, inputs), bare)
        assert one.records == other.records == []
        assert same(run(model, inputs), bare)
        assert len(one.records) == len(other.records) == len(geohooks.instrument(model).anatomy.sites)
    for made in instrumented:
        fresh = Recorder()
        with geohooks.instrument(made, [fresh]):
            assert same(run(made, inputs), bare)
        assert len(fresh.records) == len(one.records)


def test_a_copy_of_a_part_of_an_instrumented_model_is_clean():
    model = zoo.untrained("llama")
    recorder = Recorder()
    with geohooks.instrument(model, [recorder]):
        layer = copy.deepcopy(model.model.layers[0])
        attention = copy.deepcopy(model.model.layers[1].self_attn)
        assert hook_count(layer) == hook_count(attention) == 0
        assert attention.config._attn_implementation == model.config._attn_implementation
        inner = copy.deepcopy(model.model)
        inner(**zoo.example_inputs(model))
        assert recorder.records == []


def test_a_copy_keeps_the_hooks_of_the_user():
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    heard = []
    model.model.layers[0].register_forward_hook(lambda *_: heard.append("after"))
    model.model.layers[0].register_forward_pre_hook(lambda *_, **__: heard.append("before"), with_kwargs=True)
    with geohooks.instrument(model, [Recorder()]):
        made = copy.deepcopy(model)
    run(made, inputs)
    assert heard == ["before", "after"]


def test_the_state_dict_of_an_instrumented_model_is_its_own():
    model = zoo.untrained("llama")
    before = model.state_dict()
    with geohooks.instrument(model, [Recorder()]):
        during = model.state_dict()
        assert [(name, value.data_ptr()) for name, value in during.items()] == [
            (name, value.data_ptr()) for name, value in before.items()
        ]
        assert model.load_state_dict(during).missing_keys == []


def test_an_instrumented_model_saves_and_loads(tmp_path):
    model = zoo.untrained("llama")
    inputs = zoo.example_inputs(model)
    with geohooks.instrument(model, [Recorder()]):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert same(run(loaded, inputs), run(model, inputs))


def test_the_attention_config_of_other_modules_is_not_touched():
    model = zoo.untrained("llama")
    with geohooks.instrument(model, [Recorder("decoder.0.pattern")]):
        assert model.config._attn_implementation == "sdpa"
        assert model.model.layers[1].self_attn.config is model.config
        assert model.model.layers[0].self_attn.config is not model.config
    assert model.model.layers[0].self_attn.config is model.config


def test_any_module_without_hooks_is_not_marked():
    model = zoo.untrained("llama")
    with geohooks.instrument(model, [Recorder("decoder.0.output")]):
        marked = [path for path, module in model.named_modules() if "__reduce_ex__" in module.__dict__]
        assert marked == ["", "model", "model.layers.0"]
    assert isinstance(model, nn.Module)
