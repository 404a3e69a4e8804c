"""Settings work, and resume, or are refused by name before the first batch."""

import numpy as np
import pytest
import torch

from qvision_lab.interpretation.maps import METHODS, word_maps
from qvision_lab.interpretation.trace import trace

NAN = float("nan")
WORKING = [
    *({"max_new_tokens": 64}, {"max_length": 5}, {"max_new_tokens": np.int64(5)}, {"top_p": 0}),
    *({"temperature": np.float32(0.5), "seed": np.int64(3)}, {"top_k": torch.tensor(3)}),
    *({"temperature": 2}, {"do_sample": None, "batch_size": np.int64(2)}, {"max_time": 5}),
    *({"bad_words_ids": ((1, 2), (3,))}, {"suppress_tokens": (3, 4)}, {"guidance_scale": 1.0}),
    *({"sequence_bias": {(1, 2): -1.0}}, {"num_beams": 2, "num_return_sequences": 2}),
]
REFUSED = {
    "max_new_tokens": (65, 10**9, 0, -5, "10", NAN, 2.5, True),
    "num_return_sequences": (10**7, 0, -1, "2"),
    "num_beams": (10**7, 0, -1, "3", 2.0),
    "temperature": (-1.0, 0, NAN, "0.5", float("inf")),
    **{"top_k": (-1, "5"), "top_p": (NAN, 2.0, "x"), "min_p": (NAN,), "typical_p": (NAN,)},
    **{"repetition_penalty": (0.0, -1.0, NAN, "x"), "length_penalty": (NAN,), "max_time": (NAN,)},
    **{"seed": ("x", 1.5, NAN, None), "batch_size": ("4", 0.5, NAN, -1), "min_length": (-1, "3")},
    **{"stop_strings": (["a"],), "guidance_scale": (2.0,), "sequence_bias": ({},)},
    **{"logits_processor": ("x", [5]), "stopping_criteria": (5, "x"), "streamer": ("x", [])},
    **{"prefix_allowed_tokens_fn": (5,), "tokenizer": (5,)},
    **{"no_repeat_ngram_size": ("2",), "cache_implementation": ("quantized",), "max_length": (1,)},
}


@pytest.mark.parametrize("settings", WORKING, ids=str)
def test_settings_of_any_kind_of_number_resume(byte_captioner, noise, tmp_path, settings):
    noise[0].save(tmp_path / "a.png")
    for captioned in (1, 0):
        report = byte_captioner.caption_folder(tmp_path, tmp_path / "o", **settings)
        assert (report.captioned, report.skipped) == (captioned, 1 - captioned)


@pytest.mark.parametrize(("name", "value"), [(n, x) for n, xs in REFUSED.items() for x in xs])
def test_other_values_are_refused_before_the_first_batch(byte_captioner, name, value):
    unread = (pytest.fail("a picture was read") for _ in range(1))
    with pytest.raises(ValueError, match=name):
        byte_captioner.caption(unread, **{name: value})


def test_processors_criteria_and_streamers_work_alone_and_in_lists(byte_captioner, noise):
    def forbid(ids, scores):
        return scores.index_fill(1, torch.arange(255), -torch.inf)

    def stop(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] > 2)

    class Heard(list):
        put, end = list.append, list.clear

    for how in ({"preset": "greedy"}, {"temperature": 0.5}):
        for several in (lambda x: x, lambda x: [x], lambda x: (x,)):
            settings = {"logits_processor": several(forbid), "stopping_criteria": several(stop)}
            for caption in byte_captioner.caption(noise, max_new_tokens=9, **how, **settings):
                assert len(caption.token_ids) <= 2
                assert set(caption.token_ids) <= {255, 256, 257, 258}
    byte_captioner.caption(noise[0], preset="greedy", streamer=Heard())


def test_inference_mode_changes_nothing(byte_captioner, noise):
    how = {"preset": "greedy", "max_new_tokens": 40}
    with torch.inference_mode():
        inside, traced = byte_captioner.caption(noise[0], **how), trace(byte_captioner, noise[0])
        assert all(word_maps(traced, method) for method in METHODS)
    assert inside == byte_captioner.caption(noise[0], **how)
