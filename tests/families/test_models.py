"""What the models are, what their configs tell, and which shapes they can do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvx_deploy.errors import ShapeError
from cvx_deploy.exporters.sources.synth_configs import transformer_config, vae_config
from cvx_deploy.families.cogvideox.models import MODELS, Limits, Traits, model_with_traits
from cvx_deploy.shape import Shape

PLAIN = Limits(spatial=16, temporal=4, sample_height=480, sample_width=720, fixed_size=False, table_size=False)
LEARNED = Limits(spatial=16, temporal=4, sample_height=480, sample_width=720, fixed_size=True, table_size=False)
TABLE = Limits(spatial=16, temporal=4, sample_height=768, sample_width=1360, fixed_size=False, table_size=True)
ODD_TABLE = Limits(spatial=16, temporal=4, sample_height=776, sample_width=1368, fixed_size=False, table_size=True)

sizes = st.integers(-100, 3000)


def fix_of(limits: Limits, shape: Shape) -> str | None:
    try:
        limits.check(shape)
    except ShapeError as error:
        return error.fix
    return None


def applied(fix: str | None, shape: Shape) -> list[Shape]:
    """Every shape that a fix such as ``use --height 480 or 496`` leads to."""
    if fix is None:
        return [shape]
    _, option, *numbers = fix.split()
    name = option.removeprefix("--")
    return [Shape(**{**vars(shape), name: int(number)}) for number in numbers if number != "or"]


def test_traits_are_read_from_every_models_config(model_name: str) -> None:
    model = MODELS[model_name]
    for scale in ("full", "tiny"):
        assert Traits.from_transformer_config(transformer_config(model, scale), model.traits.task) == model.traits


def test_traits_name_one_model_each(model_name: str) -> None:
    found = model_with_traits(MODELS[model_name].traits)
    assert found is not None
    assert found.name == model_name


def test_a_shape_reads_back_from_its_words() -> None:
    assert Shape.parse(str(Shape(49, 480, 720))) == Shape(49, 480, 720)


@pytest.mark.parametrize(
    "text", ["", "49", "49x480", "49x480x720x1", "0x480x720", "-1x8x8", "4 x8x8", "1.5x8x8", "axbxc"]
)
def test_other_words_are_no_shape(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Shape.parse(text)


def test_traits_of_no_published_model_have_no_name() -> None:
    assert model_with_traits(Traits("image-to-video", "sincos", None, False)) is None


def test_the_default_shape_of_every_model_can_be_done(model_name: str) -> None:
    model = MODELS[model_name]
    config, vae = transformer_config(model, "full"), vae_config(model, "full")
    limits = Limits(
        spatial=8 * config["patch_size"],
        temporal=vae["temporal_compression_ratio"],
        sample_height=8 * config["sample_height"],
        sample_width=8 * config["sample_width"],
        fixed_size=model.traits.positions == "rope+learned",
        table_size=model.traits.patch_size_t is not None,
    )
    limits.check(Shape(model.frames, model.height, model.width))


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [
        *((-7, "1"), (0, "1"), (2, "1 or 8"), (7, "1 or 8"), (10, "9 or 16"), (15, "9 or 16")),
        *((18, "17 or 24"), (48 + 2, "49 or 56"), (79, "73 or 80"), (82, "81 or 88")),
    ],
)
def test_a_frame_count_that_cannot_be_decoded_is_told_its_neighbours(frames: int, nearest: str) -> None:
    assert fix_of(PLAIN, Shape(frames, 480, 720)) == f"use --frames {nearest}"


@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17, 48, 49, 80, 81])
def test_frame_counts_of_8k_and_8k_plus_1_can_be_done(frames: int) -> None:
    PLAIN.check(Shape(frames, 480, 720))


@pytest.mark.parametrize(
    ("height", "nearest"),
    [(0, "16"), (-16, "16"), (15, "16"), (17, "16 or 32"), (479, "464 or 480"), (481, "480 or 496")],
)
def test_a_height_between_two_that_work_is_told_both(height: int, nearest: str) -> None:
    assert fix_of(PLAIN, Shape(9, height, 720)) == f"use --height {nearest}"


def test_a_size_other_than_the_trained_one_is_refused_for_learned_positions() -> None:
    with pytest.raises(ShapeError, match=r"width 736: the learned positions .* exist for 480x720 only.*--width 720"):
        LEARNED.check(Shape(49, 480, 736))
    LEARNED.check(Shape(49, 480, 720))


def test_a_size_beyond_the_rotary_table_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"height 784: the rotary table .* ends at 768.*use --height 768"):
        TABLE.check(Shape(81, 784, 1360))


def test_a_size_just_below_the_end_of_the_table_is_not_sent_beyond_it() -> None:
    assert fix_of(ODD_TABLE, Shape(9, 770, 1360)) == "use --height 768"
    assert fix_of(ODD_TABLE, Shape(9, 768, 1370)) == "use --width 1360"


@given(limits=st.sampled_from([PLAIN, LEARNED, TABLE, ODD_TABLE]), frames=sizes, height=sizes, width=sizes)
def test_following_the_fix_leads_to_a_shape_that_works(limits: Limits, frames: int, height: int, width: int) -> None:
    reached = [Shape(frames, height, width)]
    for _ in range(4):  # frames, height and width, each once, and what is too large as a whole
        reached = [new for shape in reached for new in applied(fix_of(limits, shape), shape)]
    assert [fix_of(limits, shape) for shape in reached] == [None] * len(reached)


@given(frames=st.integers(-50, 500))
def test_the_nearest_frame_counts_are_the_nearest(frames: int) -> None:
    def can(count: int) -> bool:
        return fix_of(PLAIN, Shape(count, 480, 720)) is None

    below = next((count for count in range(frames, 0, -1) if can(count)), None)
    above = next(count for count in range(max(frames + 1, 1), frames + 60) if can(count))
    assert PLAIN.nearest_frames(frames) == ((above,) if below is None else (below, above))


def test_a_shape_prints_as_people_write_it() -> None:
    assert str(Shape(49, 480, 720)) == "49x480x720"
