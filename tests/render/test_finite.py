"""NaN and infinity are laid at the door of the first stage, and of the right turn."""

from __future__ import annotations

import pytest
import torch

from videojob_worker.errors import NotFiniteError
from videojob_worker.finite import Finite, check_contexts

SOUND = torch.ones((2, 3))


def bad(value: float) -> torch.Tensor:
    tensor = torch.ones((2, 3))
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stage_that_makes_it_of_sound_input_is_the_cause(value, dtype):
    finite = Finite(range(4, 6), is_first=False)
    finite.watch("at block 1", SOUND.to(dtype), SOUND.to(dtype))
    with pytest.raises(NotFiniteError, match=r"layers 4 to 5 gave NaN or infinity at block 2: set VIDEOJOB_DTYPE"):
        finite.watch("at block 2", SOUND.to(dtype), bad(value).to(dtype))


def test_a_stage_that_passes_it_on_is_not():
    finite = Finite(range(4, 6), is_first=False)
    finite.watch("at block 1", bad(float("nan")), bad(float("nan")))
    finite.settle()


def test_the_first_stage_speaks_for_the_scheduler():
    finite = Finite(range(2), is_first=True)
    with pytest.raises(NotFiniteError, match="latents are NaN or infinite at block 3, after the step before"):
        finite.watch("at block 3", bad(float("nan")), SOUND)


def test_a_stage_of_one_layer_is_named_so():
    with pytest.raises(NotFiniteError, match=r"^layer 7 gave"):
        Finite(range(7, 8), is_first=False).watch("at block 1", SOUND, bad(float("inf")))


def test_the_largest_numbers_are_sound():
    largest = torch.full((2, 2), torch.finfo(torch.float32).max)
    Finite(range(1), is_first=True).watch("at block 1", largest, -largest)


def test_a_text_encoder_that_overflows_is_named():
    check_contexts(SOUND)
    with pytest.raises(NotFiniteError, match="text encoder gave NaN or infinity: set VIDEOJOB_DTYPE"):
        check_contexts(bad(float("inf")))
