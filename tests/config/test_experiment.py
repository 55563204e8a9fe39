"""A config is accepted whole or refused by name, and its hash says what was trained."""

import dataclasses
import math

import pytest

from paris_jax.config.experiment import Experiment, default_config
from paris_jax.encoders import codecs, text
from paris_jax.errors import UserError


def changed(**fields):
    """The default config with fields by dotted name (a__b is a.b)."""
    values = Experiment().to_dict()
    for name, value in fields.items():
        *groups, last = name.split("__")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return values


def refusal(**fields):
    with pytest.raises(UserError) as refused:
        Experiment.from_config(changed(**fields))
    return str(refused.value)


def test_defaults_are_accepted_as_config_and_as_dict():
    assert Experiment.from_config(default_config()) == Experiment.from_config({}) == Experiment()


def test_unknown_fields_are_refused_with_the_nearest_name():
    said = refusal(training__learning_rat=1e-3)
    assert "config.training.learning_rat is unknown" in said
    assert "did you mean 'learning_rate'?" in said
    assert "config.trainig is unknown" in refusal(trainig={})
    assert "did you mean 'training'?" in refusal(trainig={})


def test_a_config_dict_does_not_take_unknown_fields_either():
    with pytest.raises(AttributeError, match="stepz"):
        default_config().training.stepz = 1
    with pytest.raises(KeyError, match="stepz"):
        default_config().training.update(stepz=1)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("training__steps", 10.0, "config.training.steps=10.0: must be an int"),
        ("training__steps", True, "config.training.steps=True: must be an int"),
        ("training__steps", "10", "config.training.steps='10': must be an int"),
        ("training__learning_rate", "1e-3", "config.training.learning_rate='1e-3': must be a float"),
        ("training__learning_rate", float("nan"), "config.training.learning_rate=nan: must be finite"),
        ("data__source", 3, "config.data.source=3: must be a str"),
        ("data", 3, "config.data=3: must be a group of fields"),
        ("data", None, "config.data=None: must be a group of fields"),
        ("name", None, "config.name=None: must be a str"),
    ],
)
def test_wrong_types_are_refused(field, value, said):
    assert said in refusal(**{field: value})


def test_a_whole_number_stands_for_a_float():
    experiment = Experiment.from_config(changed(training__learning_rate=1, sampling__guidance_scale=3))
    assert experiment.sampling.guidance_scale == 3.0
    assert isinstance(experiment.training.learning_rate, float)
    assert experiment == Experiment.from_config(changed(training__learning_rate=1.0, sampling__guidance_scale=3.0))


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("data__source", "shape", "config.data.source='shape': must be one of shapes, folder, tfds, webdataset (did"),
        ("data__source", "folder", "config.data.path is empty"),
        ("data__num_clips", 0, "config.data.num_clips=0: must be at least 1"),
        ("data__num_frames", 0, "config.data.num_frames=0: must be at least 1"),
        ("data__seed", -1, "config.data.seed=-1: must be from 0 to 4294967295"),
        ("clustering__seed", -1, "config.clustering.seed=-1: must be from 0 to 4294967295"),
        ("data__fps", math.inf, "config.data.fps=inf: must be finite"),
        ("training__learning_rate", math.inf, "config.training.learning_rate=inf: must be finite"),
        ("training__optimizer", "adam", "config.training.optimizer='adam': must be one of adamw, muon, adafactor"),
        ("training__lr_decay_fraction", 2.0, "config.training.lr_decay_fraction=2.0: must be between 0.0 and 1.0"),
        ("data__fps", 0.0, "config.data.fps=0.0: must be above 0"),
        ("data__heldout_fraction", 0.6, "config.data.heldout_fraction=0.6: must be between 0.0 and 0.5"),
        ("codec__name", "pixel", "did you mean 'pixels'?"),
        ("codec__time", 0, "config.codec.time=0: must be at least 1"),
        ("codec__name", "hunyuan", "config.codec.time, height, width=(2, 2, 2): hunyuan has (4, 8, 8)"),
        ("text__name", "t5", "config.text.name='t5': must be one of words, minilm, t5+clip"),
        ("text__width", 4, "config.text.width=4: must be at least 8"),
        ("text__max_tokens", 0, "config.text.max_tokens=0: must be at least 1"),
        ("features__name", "dino", "did you mean 'dinov2'?"),
        ("clustering__num_clusters", 0, "config.clustering.num_clusters=0: must be at least 1"),
        ("clustering__fine_clusters", 2, "config.clustering.fine_clusters=2: must be 0 or at least num_clusters=3"),
        ("network__preset", "tinny", "did you mean 'tiny'?"),
        ("network__remat", "some", "config.network.remat='some': must be one of none, named, full, offload"),
        ("network__hidden", -1, "config.network.hidden=-1: must be at least 0"),
        ("network__heads", 3, "config.network.hidden=112 over heads=3 is not 16 a head"),
        ("network__hidden", 100, "for example hidden=112"),
        ("router__preset", "B", "config.router.preset='B': must be one of tiny, small, b"),
        ("diffusion__timestep_std", 0.0, "config.diffusion.timestep_std=0.0: must be above 0"),
        ("masks__last", 1.0, "config.masks.last needs data.cond_images=True"),
        ("diffusion__timestep_shift", -1.0, "config.diffusion.timestep_shift=-1.0: must be at least 0"),
        ("training__global_batch_size", 0, "config.training.global_batch_size=0: must be at least 1"),
        ("training__warmup_steps", 1000, "config.training.warmup_steps=1000: must be below steps=1000"),
        ("training__ema_decay", 1.0, "config.training.ema_decay=1.0: must be at least 0 and below 1"),
        ("training__drop_tokens", 1.5, "config.training.drop_tokens=1.5: must be between 0.0 and 1.0"),
        ("training__compute_dtype", "float16", "config.training.compute_dtype='float16': must be one of auto"),
        ("router_training__learning_rate", 0.0, "config.router_training.learning_rate=0.0: must be above 0"),
        ("sampling__solver", "eular", "did you mean 'euler'?"),
        ("sampling__num_inference_steps", 0, "config.sampling.num_inference_steps=0: must be from 1 to 10000"),
        ("sampling__guidance_scale", -1.0, "config.sampling.guidance_scale=-1.0: must be at least 0"),
        ("sampling__threshold", 2.0, "config.sampling.threshold=2.0: must be between 0.0 and 1.0"),
        ("sampling__top_k", 4, "config.sampling.top_k=4: must be at most clustering.num_clusters=3"),
        ("evaluation__num_clips", 1, "config.evaluation.num_clips=1: must be at least 2"),
        ("evaluation__num_shown", 0, "config.evaluation.num_shown=0: must be at least 1"),
    ],
)
def test_impossible_values_are_refused_by_name(field, value, said):
    assert said in refusal(**{field: value})


def test_all_mistakes_are_reported_at_once():
    said = refusal(training__global_batch_size=0, data__fps=-1.0, sampling__solver="rk4", text__wdith=3)
    for field in ("training.global_batch_size", "data.fps", "sampling.solver", "text.wdith"):
        assert f"config.{field}" in said


@pytest.mark.parametrize(
    "field, size, near",
    [("num_frames", 7, 8), ("height", 18, 16), ("width", 3, 4)],
)
def test_sizes_that_codec_and_packing_do_not_divide_are_refused(field, size, near):
    said = refusal(**{f"data__{field}": size})
    assert f"config.data.{field}={size}: must be a multiple of" in said
    assert said.endswith(f"for example {near}")


def test_a_picture_too_small_for_the_features_is_refused():
    assert "data.height, data.width=2, 20: features.name='statistics' needs" in refusal(data__height=2, codec__height=1)


def test_a_causal_codec_wants_one_frame_more():
    causal = {"codec": {"name": "hunyuan", "time": 4, "height": 8, "width": 8}, "data__height": 32, "data__width": 48}
    assert codecs.latent_shape(Experiment.from_config(changed(**causal, data__num_frames=33))) == (9, 4, 6, 16)
    assert codecs.latent_shape(Experiment.from_config(changed(**causal, data__num_frames=1))) == (1, 4, 6, 16)
    said = refusal(**causal, data__num_frames=32)
    assert "config.data.num_frames=32: must be 1 more than a multiple of 4" in said
    assert said.endswith("for example 33")


def test_latent_and_text_sizes_follow_the_encoders():
    experiment = Experiment.from_config(changed(text__width=48, data__height=20))
    assert codecs.latent_shape(experiment) == (4, 10, 10, 24)
    assert text.widths_of(experiment) == (48, 48)
    assert text.widths_of(Experiment.from_config(changed(text__name="minilm"))) == (384, 384)


def test_a_network_without_blocks_is_refused():
    assert "at least one block" in refusal(network__double_blocks=0, network__single_blocks=0)


def test_the_monolith_takes_the_sum_of_the_experts_steps():
    experiment = Experiment.from_config(changed(training__steps=70, clustering__num_clusters=5))
    assert experiment.steps("monolith") == 5 * experiment.steps("expert") == 350
    assert experiment.steps("router") == experiment.router_training.steps


def test_the_hash_depends_on_the_training_alone():
    base = Experiment().hash
    same = {
        **{
            "name": "other",
            "wandb_project": "project",
            "sampling__num_inference_steps": 7,
            "sampling__top_k": 2,
            "evaluation__num_clips": 8,
        },
        **{"training__fsdp": 2, "training__max_to_keep": 9, "router_training__tensor": 2, "network__remat": "full"},
    }
    for field, value in same.items():
        assert Experiment.from_config(changed(**{field: value})).hash == base, field
    other = {
        "data__seed": 1,
        "curation__min_motion": 1.0,
        "text__width": 32,
        "clustering__seed": 1,
        "network__double_blocks": 2,
        "router__preset": "small",
        "diffusion__timestep_shift": 2.0,
        "training__seed": 1,
        "router_training__steps": 999,
    }
    hashes = [Experiment.from_config(changed(**{field: value})).hash for field, value in other.items()]
    assert len({base, *hashes}) == 1 + len(other)


def test_every_group_of_fields_decides_the_hash_or_is_named_as_not():
    groups = {field.name for field in dataclasses.fields(Experiment)}
    assert groups - {"name", "wandb_project", "sampling", "evaluation"} == {
        *("data", "curation", "codec", "text", "features", "clustering", "network", "router"),
        *("diffusion", "masks", "training", "router_training"),
    }


def test_run_folders_from_before_a_field_was_there_are_still_those_of_their_configs():
    """Later fields (attention, padded texts, validation) do not count while they have the value of before."""
    before = Experiment.from_config(changed(data__validation_share=0.0))
    assert before.hash.startswith("35e2138cdd57f19a")
    assert before.data_hash.startswith("bd285bf67344b028") and before.data_hash != Experiment().data_hash
    for field, value in {"network__attention": "factorised", "router__attention": "factorised"}.items():
        found = Experiment.from_config(changed(**{field: value}))
        assert found.hash != Experiment().hash and found.data_hash == Experiment().data_hash
    padded = dataclasses.replace(Experiment().text, name="t5+clip", pad_to_max_tokens=True)
    both = [
        dataclasses.replace(Experiment(), text=dataclasses.replace(padded, pad_to_max_tokens=p)).data_hash
        for p in (True, False)
    ]
    assert both[0] != both[1]
