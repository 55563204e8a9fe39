"""What a browser sends is checked field by field, and pictures are decoded in a process of their own."""

import base64

import numpy as np
import pytest

from paris_jax.config.sampling import SamplingParams
from paris_jax.data import video
from paris_jax.data.decoding.decoders import Decoders
from paris_jax.ensemble import sampling_params
from paris_jax.errors import UserError
from paris_jax.serving import cards, pictures, requests
from paris_jax.serving.limits import Limits
from paris_jax.serving.side_by_side import Update

LIMITS = Limits(max_steps=20, max_prompt_length=30, max_columns=2, max_image_mb=1)
COLUMNS = ("ensemble", "expert 0", "expert 1", "monolith")
FORM = {"prompt": "a red circle", "columns": ["ensemble"]}


def read(**changes):
    return requests.read(FORM | changes, LIMITS, COLUMNS, requests.most(LIMITS, 8, 2))


def test_values_become_parameters_of_the_ensemble():
    given = {"num_inference_steps": 5.0, "guidance_scale": 3, "seed": 7, "solver": "heun", "negative_prompt": ""}
    request = read(columns=["monolith", "ensemble"], routing="top_k", top_k=2, threshold=0.5, fixed_expert=1, **given)
    assert request.columns == ("ensemble", "monolith")
    wanted = {
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "seed": 7,
        "solver": "heun",
        "top_k": 2,
        "routing": "top_k",
    }
    assert request.params == wanted and type(request.params["guidance_scale"]) is float
    sampling_params.resolve(SamplingParams(), None, request.params)
    assert read(routing="fixed", fixed_expert=1, top_k=2).params == {"fixed_expert": 1}
    assert read(num_frames="4", timestep_shift="1.5").params == {"num_frames": 4, "timestep_shift": 1.5}
    assert read(num_frames="", timestep_shift=None).params == {}
    assert read(routing="full", top_k=2).params == {"routing": "full"}


def test_every_shown_field_is_one_of_the_sampling_parameters():
    shown = [*requests.MAIN, *requests.ROUTING, *requests.FRAMES, *requests.MORE]
    assert len(shown) == len(set(shown)) and set(shown) < set(sampling_params.FIELD_NAMES)
    assert {requests.kind(name) for name in shown} <= {int, float, str}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"prompt": "a" * 31}, "prompt must be text of at most 30 characters"),
        ({"prompt": ["a"]}, "prompt must be text"),
        ({"negative_prompt": {"a": 1}}, "negative_prompt must be text"),
        ({"columns": []}, "No model is chosen"),
        ({"columns": "ensemble"}, "No model is chosen"),
        ({"columns": ["expert 7"]}, "columns='expert 7': must be one of"),
        ({"columns": ["ensemble", "expert 0", "expert 1"]}, "3 models are chosen; must be at most 2"),
        ({"num_inference_steps": 21}, "num_inference_steps=21: this page allows at most 20"),
        ({"num_frames": 9}, "num_frames=9: this page allows at most 8"),
        ({"seed": 2**60}, "this page allows at most"),
        ({"num_inference_steps": [4]}, "this page allows at most 20"),
        ({"num_inference_steps": "seven"}, "num_inference_steps='seven': must be a whole number"),
        ({"num_inference_steps": [[4]]}, "num_inference_steps='[4]': must be a whole number"),
        ({"guidance_scale": 10**400}, "must be a number"),
        ({"num_frames": "7.5"}, "num_frames='7.5': must be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale='nan': must be a number"),
        ({"timestep_shift": "inf"}, "timestep_shift='inf': must be a number"),
        ({"guidance_scale": True}, "guidance_scale='True': must be a number"),
        ({"solver": 3}, "solver='3': must be text"),
        ({"routing": "nearest"}, "routing='nearest': must be one of top_k, full, threshold, fixed"),
        ({"routing": "fixed"}, "routing='fixed' has no expert"),
        ({"image": "/etc/passwd"}, "The picture did not arrive as a file"),
        ({"image": "http://localhost/a.png"}, "The picture did not arrive as a file"),
        ({"image": {"path": "/etc/passwd"}}, "The picture did not arrive as a file"),
        ({"image": "data:image/png;base64,%%"}, "The picture arrived damaged"),
        ({"image": "data:image/png;base64," + "A" * 1_400_000}, "The picture has more than 1 MB"),
    ],
)  # fmt: skip
def test_a_wrong_value_gives_its_sentence(changes, sentence):
    with pytest.raises(UserError) as refused:
        read(**changes)
    assert sentence in str(refused.value)


def test_fields_of_pictures_count_only_with_a_picture():
    assert read(fit="crop", image_guidance_scale=2).params == {}
    address = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    request = read(fit="crop", image_guidance_scale=2, image=address)
    assert request.image == b"picture" and request.params == {"fit": "crop", "image_guidance_scale": 2.0}


def test_pictures_are_decoded_and_what_is_none_is_refused():
    image = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    with Decoders(1, pictures.LIMITS) as decoders:
        np.testing.assert_array_equal(pictures.decode(video.png_bytes(image), decoders), image)
        for junk in (b"no picture", b"", b"#EXTM3U\nfile:///etc/passwd\n"):
            with pytest.raises(UserError, match=r"The picture .*; choose another"):
                pictures.decode(junk, decoders)
        np.testing.assert_array_equal(pictures.decode(video.png_bytes(image), decoders), image)


def test_text_of_strangers_stays_text():
    attack = "<img src=x onerror=alert(1)>\"'"
    update = Update(attack, 1, 2, np.array([[0.25, 0.75]]), [0, 1], np.zeros((2, 16, 16, 3), np.uint8), 8.0)
    shown = cards.Card(attack, attack).show(update) + cards.sentence(attack, "fault") + cards.title(attack, attack)
    assert "<img" not in shown and shown.count("&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;") == 6


def test_bars_are_as_high_as_the_weights():
    weights = np.array([[0.25, 0.75], [1.0, 0.0]])
    chart = cards.routing(Update("ensemble", 2, 4, weights, [0, 3], None, 8.0))
    assert chart.count("<rect") == 3
    assert "step 1, expert 3: 0.75" in chart and 'height="42.00"' in chart and 'height="14.00"' in chart
    assert "expert 0 62%" in chart and "expert 3 38%" in chart
